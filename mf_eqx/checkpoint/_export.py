"""What is left of a training for those who only sample: the averaged weights, or a sampler as one file.

    save_weights("ema.safetensors", state.averages[0], config={"width": 96})
    field = load_weights("ema.safetensors", lambda config: make_field(Config(**config), jr.key(0)))

    export_sampler("sampler.jaxexport", field, (3, 32, 32), condition=0, times=(1.0, 0.0))

Both need the extra `export`.
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

from .._custom_types import Condition
from .._field import AbstractField
from .._files import read_regular, write_whole
from .._json import parse_json
from .._leaves import compare, digest, fill_shapes, leaves, listed, on_host, shapes, without_key_dtype
from .._optional import optional
from .._sample import sample
from .._sharding import Parallelism

_Field = TypeVar("_Field", bound=AbstractField)

_FORMAT = "mf_eqx weights 1"
_LONGEST_HEADER = 100_000_000


def save_weights(path: str | Path, field: AbstractField, config: Mapping[str, Any] | None = None) -> None:
    """Write the arrays of a field as safetensors, each under its path in the field, with the configuration that the
    field is made from. The file is whole or absent, and its bytes are the same each time for the same arrays and
    configuration. One process writes; all must call it.

    **Arguments:** `path` of the file; `field` usually an average; `config` anything that JSON can hold.

    **Raises:** `ValueError` for arrays in bfloat16, float8 and the like, which safetensors cannot read into NumPy
    (averages are float32). `OSError` if the file cannot be written; what stood there before still does.
    """
    with optional("safetensors", extra="export"):
        import safetensors.numpy
    arrays = {name: on_host(without_key_dtype(leaf)) for name, leaf in leaves(field).items()}
    if unknown := [f"{name} in {array.dtype}" for name, array in arrays.items() if not _is_kept(array.dtype)]:
        raise ValueError(f"field must have arrays that safetensors keeps, got {listed(unknown)}: cast them to float32")
    if jax.process_index() == 0:
        text = json.dumps(dict(config or {}))
        content = {"format": _FORMAT, "config": text, "sha256": _digest(arrays, text)}
        write_whole(path, *_with_ordered_header(safetensors.numpy.save(arrays, content)))


def load_weights(
    path: str | Path, make_field: Callable[[dict[str, Any]], _Field], parallelism: Parallelism | None = None
) -> _Field:
    """The field in a file of `save_weights`.

    **Arguments:** `path` of the file; `make_field` makes a field of the right structure from the configuration, of
    which only shapes are taken and whatever is no array; `parallelism` None for one device.

    **Raises:** `OSError` if the file cannot be read; `ValueError` that names it and what is wrong with it: not
    safetensors, cut off, of another format, configuration or arrays not as written, or not the arrays of the field
    (with the paths that differ).
    """
    path = Path(path)
    config, arrays = _read(path)
    wanted = eqx.filter_eval_shape(lambda: make_field(config))
    compare(shapes(arrays), shapes({name: without_key_dtype(leaf) for name, leaf in leaves(wanted).items()}), path)
    return _placed(fill_shapes(wanted, {name: jnp.asarray(leaf) for name, leaf in arrays.items()}), parallelism)


def export_sampler(
    path: str | Path,
    field: AbstractField,
    data_shape: tuple[int, ...],
    condition: Condition = None,
    *,
    times: Sequence[float] = (1.0, 0.0),
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write `sample` with its weights as one compiled-anywhere program, by `jax.export`.

        exported = jax.export.deserialize(pathlib.Path("sampler.jaxexport").read_bytes())
        x = exported.call(eps, label)                     (rows, *data_shape) from noise of the same shape

    needs nothing but JAX. The number of rows is free. The weights are inside the program: a few hundred MB are fine, a
    format limit of 2 GB is not far from the largest networks. Unlike the other files here it has no checksum, since
    JAX alone reads it: where it is copied far, send its SHA-256 along. Names and lines of source files are left out, so
    that one version of JAX writes the same bytes for the same field wherever it is called from.

    **Arguments:** `path` of the file; `field`; `data_shape` of one row; `condition` of one row, whose structure, shapes
    and dtypes count, or None; `times` as of `sample`; `platforms` that it may run on.
    """
    with optional("flatbuffers", extra="export"):
        import flatbuffers  # noqa: F401 # pyright: ignore[reportMissingImports] # what jax.export writes with

    def draw(eps: Any, *conditions: Any) -> Any:
        return jax.vmap(lambda eps, *one: sample(field, eps, *one, times=tuple(times)))(eps, *conditions)

    (rows,) = jax.export.symbolic_shape("rows")
    conditions = () if condition is None else (condition,)
    given = [jax.ShapeDtypeStruct((rows, *data_shape), jnp.float32)]
    given += jax.tree.map(lambda c: jax.ShapeDtypeStruct((rows, *np.shape(c)), jnp.result_type(c)), conditions)
    with _without_source_lines():
        exported = jax.export.export(jax.jit(draw), platforms=list(platforms))(*given)
    if jax.process_index() == 0:
        write_whole(path, bytes(exported.serialize()))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and arrays of a file of `save_weights`, if they are what was written."""
    with optional("safetensors", extra="export"):
        import safetensors
        import safetensors.numpy
    content, rule = read_regular(path), f"{path}: must be a file of save_weights"
    try:
        metadata = _metadata(content)  # of another program's file, tensors may have types that NumPy lacks
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
        raise ValueError(f"{rule}, whose configuration is an object, got {type(config).__name__}")
    return config, arrays


def _is_kept(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype can be written and read: NumPy's own, not those of other packages."""
    return dtype.isbuiltin == 1 and dtype != np.complex128


def _metadata(content: bytes) -> dict[str, str]:
    """What safetensors has beside its arrays: an object in the header, after eight bytes with its length."""
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content), _LONGEST_HEADER):
        raise ValueError(f"its header has {length} bytes")
    return json.loads(content[8 : 8 + length])["__metadata__"] or {}


def _with_ordered_header(content: bytes) -> tuple[bytes, memoryview]:
    """The header and the arrays of a safetensors file, with its metadata sorted: the library writes them in an order
    that differs from call to call."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text, memoryview(content)[start:]


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """A context in which JAX notes no tracebacks in the programs that it makes."""
    before = jax.config.jax_traceback_in_locations_limit  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _placed(field: _Field, parallelism: Parallelism | None) -> _Field:
    if parallelism is None:
        return field
    return jax.tree.map(
        lambda leaf, sharding: leaf if sharding is None else jax.device_put(leaf, sharding),
        field,
        parallelism.of_tree(field),
        is_leaf=lambda leaf: leaf is None,
    )


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """Of arrays by their names, in whatever order a file has them."""
    return digest(dict(sorted(arrays.items())), text)
