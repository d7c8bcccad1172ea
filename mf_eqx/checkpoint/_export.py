"""Results of a training for users who only sample: the averaged weights, or a whole sampler, as one file.

    save_weights("ema.safetensors", state.averages[0], config={"width": 96})
    field = load_weights("ema.safetensors", lambda config: make_field(Config(**config), jr.key(0)))

    export_sampler("sampler.jaxexport", field, (3, 32, 32), condition=0, times=(1.0, 0.0))

Both require the extra `export`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._custom_types import Condition
from .._field import AbstractField
from .._files import read_regular, write_whole
from .._json import parse_json
from .._leaves import compare, digest, fill_shapes, leaves, listed, on_host, shapes, without_key_dtype
from .._optional import optional
from .._sample import sample
from .._sharding import Parallelism
from .._validate import as_tuple

_Field = TypeVar("_Field", bound=AbstractField)

_FORMAT = "mf_eqx weights 1"
_LONGEST_HEADER = 100_000_000


def save_weights(path: str | Path, field: AbstractField, config: Mapping[str, Any] | None = None) -> None:
    """Write the arrays of a field as safetensors, each under its path in the field, together with the configuration
    from which the field is made. The file is complete or absent, and equal arrays and configurations always give the
    same bytes. One process writes, but all must call this function.

    **Arguments:** `path` of the file; `field` usually an average; `config` any values that JSON can represent.

    **Raises:** `ValueError` for arrays in bfloat16, float8 and similar dtypes, which safetensors cannot read into NumPy
    (averages are float32). `OSError` if the file cannot be written; an existing file is then left unchanged.
    """
    with optional("safetensors", extra="export"):
        import safetensors.numpy
    arrays = {name: on_host(without_key_dtype(leaf)) for name, leaf in leaves(field).items()}
    if unknown := [f"{name} in {array.dtype}" for name, array in arrays.items() if not _is_supported(array.dtype)]:
        rule = "have arrays of dtypes that safetensors can read into NumPy"
        raise ValueError(f"field must {rule}, got {listed(unknown)}: cast them to float32")
    if jax.process_index() == 0:
        text = json.dumps(dict(config or {}))
        content = {"format": _FORMAT, "config": text, "sha256": _digest(arrays, text)}
        write_whole(path, *_with_ordered_header(safetensors.numpy.save(arrays, content)))


def load_weights(
    path: str | Path, make_field: Callable[[dict[str, Any]], _Field], parallelism: Parallelism | None = None
) -> _Field:
    """The field in a file of `save_weights`.

    **Arguments:** `path` of the file; `make_field` makes a field of the right structure from the configuration: from
    its result only the shapes and dtypes of arrays and everything that is not an array are used; `parallelism` None for
    one device.

    **Raises:** `OSError` if the file cannot be read; `ValueError` that names the file and what is wrong with it: not
    safetensors, truncated, another format, a configuration or arrays that changed after they were written, or arrays
    other than those of the field (with the paths that differ).
    """
    path = Path(path)
    config, arrays = _read(path)
    wanted = eqx.filter_eval_shape(lambda: make_field(config))
    compare(shapes(arrays), shapes({name: without_key_dtype(leaf) for name, leaf in leaves(wanted).items()}), path)
    return _on_devices(fill_shapes(wanted, {name: jnp.asarray(leaf) for name, leaf in arrays.items()}), parallelism)


def export_sampler(
    path: str | Path,
    field: AbstractField,
    data_shape: tuple[int, ...],
    condition: Condition = None,
    *,
    times: Sequence[float] = (1.0, 0.0),
    postprocess: Callable[[Float[Array, "*data"]], PyTree[Array]] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write `sample` together with the weights as one program for several platforms, by `jax.export`.

        generate = jax.jit(jax.export.deserialize(pathlib.Path("sampler.jaxexport").read_bytes()).call)
        x = generate(eps, label)                          (rows, *data_shape) from noise of the same shape

    requires nothing but JAX. Without `jax.jit` each call takes 0.2 ms longer (on a CPU: 0.3 instead of 0.1 ms for a
    network of negligible cost). The number of rows is arbitrary, but the first call with a new one compiles the
    program. In place of the label stands any condition, such as vectors or a dictionary of arrays, all with a leading
    axis of rows. The weights are part of the program: a few hundred MB are no problem, but the format's limit of 2 GB
    is close to the size of the largest networks. Unlike the other files of this part, it has no checksum, because JAX
    itself reads it: if you distribute the file, distribute its SHA-256 as well. Names and line numbers of source files
    are left out, so that one version of JAX always writes the same bytes for the same field.

    **Arguments:** `path` of the file; `field`; `data_shape` of one row; `condition` of one row, of which only the
    structure, shapes and dtypes are used, or None (a named tuple, or another class of nodes, must be registered for
    `jax.export` first: its error says how); `times` as for `sample`; `postprocess` None, or what the program returns of
    each sample: `mf_eqx.metrics.round_to_pixels` for uint8 pixels, the decoder of a tokenizer, or a function of your
    own that undoes the normalisation of the data; `platforms` on which the program can run.

    **Raises:** `ValueError` for a field that cannot be sampled, see `sample`, or if `data_shape` or `platforms` is no
    tuple or list.
    """
    with optional("flatbuffers", extra="export"):
        import flatbuffers  # noqa: F401 # pyright: ignore[reportMissingImports] # jax.export uses it for writing

    def draw(eps: Any, *condition: Any) -> Any:
        x = sample(field, eps, *condition, times=tuple(times))
        return x if postprocess is None else postprocess(x)

    data_shape = as_tuple("data_shape", data_shape, (3, 32, 32))
    platforms = as_tuple("platforms", platforms, ("cpu", "cuda"))
    (rows,) = jax.export.symbolic_shape("rows")
    conditions = () if condition is None else (condition,)
    arguments = [jax.ShapeDtypeStruct((rows, *data_shape), jnp.float32)]
    arguments += jax.tree.map(lambda c: jax.ShapeDtypeStruct((rows, *np.shape(c)), jnp.result_type(c)), conditions)
    with _without_source_lines():
        exported = jax.export.export(jax.jit(jax.vmap(draw)), platforms=list(platforms))(*arguments)
    if jax.process_index() == 0:
        write_whole(path, bytes(exported.serialize()))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and arrays of a file of `save_weights`, after a check that they are unchanged."""
    with optional("safetensors", extra="export"):
        import safetensors
        import safetensors.numpy
    content, rule = read_regular(path), f"{path}: must be a file of save_weights"
    try:
        # The metadata first: files from other programs may hold tensors of dtypes that NumPy lacks.
        metadata = _metadata(content)
        arrays = safetensors.numpy.load(content) if metadata.get("format") == _FORMAT else {}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{rule}, but it cannot be read: {error}") from error
    if (found := metadata.get("format")) != _FORMAT:
        raise ValueError(f"{rule} in the format {_FORMAT!r}, got {found!r:.60}")
    if metadata.get("sha256") != _digest(arrays, metadata.get("config", "")):
        raise ValueError(f"{path}: must hold the weights as written, but their sha256 differs: the file is damaged")
    try:
        config = parse_json(metadata["config"].encode(), finite=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{rule}, but its configuration cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{rule}, whose configuration is a JSON object, got {type(config).__name__}")
    return config, arrays


def _is_supported(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype can be written and read: only dtypes of NumPy itself can, not those of other
    packages."""
    return dtype.isbuiltin == 1 and dtype != np.complex128


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: an object in its JSON header, which follows eight bytes with its length."""
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content), _LONGEST_HEADER):
        raise ValueError(f"its header has {length} bytes")
    return json.loads(content[8 : 8 + length])["__metadata__"] or {}


def _with_ordered_header(content: bytes) -> tuple[bytes, memoryview]:
    """The header and the arrays of a safetensors file, with the metadata sorted: the library writes metadata in an
    order that differs from call to call."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the position of the arrays must be a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text, memoryview(content)[start:]


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """A context in which JAX writes no tracebacks into its programs."""
    before = jax.config.jax_traceback_in_locations_limit  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _on_devices(field: _Field, parallelism: Parallelism | None) -> _Field:
    if parallelism is None:
        return field
    return jax.tree.map(
        lambda leaf, sharding: leaf if sharding is None else jax.device_put(leaf, sharding),
        field,
        parallelism.of_tree(field),
        is_leaf=lambda leaf: leaf is None,
    )


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """SHA-256 of arrays with their names, whatever their order in a file, and of a text."""
    return digest(dict(sorted(arrays.items())), text)
