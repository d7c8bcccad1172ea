"""The weights of a field in one file, for users who only sample.

    save_weights("ema.safetensors", state.averages[0], notes=Notes(pixels=(-1, 1), steps=3000))
    field = load_weights("ema.safetensors")

An `MLP`, a `DiT`, an `InContextDiT` and a `UNet` describe themselves, so that nothing else is needed to load them. For
a network of your own, the file holds a configuration from which a function of yours makes the network:

    save_weights("ema.safetensors", field, {"width": 96})
    field = load_weights("ema.safetensors", lambda config: MyNet(**config, key=jr.key(0)))

A file holds arrays, each under its path in the field, and a text of JSON with `network`, `config` and `notes`; the
SHA-256 of all of them is checked whenever it is read.
"""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._field import AbstractField
from .._files import read_regular, write_whole
from .._json import parse_json, readable_json
from .._leaves import compare, digest_of_arrays, fill_shapes, leaves, listed, on_host, shapes, without_key_dtype
from .._model import describe, make_network
from .._model.description import Network
from .._optional import optional
from .._sharding import Parallelism
from ._notes import Notes, notes_of_json

_Field = TypeVar("_Field", bound=AbstractField)

_FORMAT = "mf_eqx weights 2"
_LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Weights:
    """A file of `save_weights`, whose arrays are in host memory.

    **Arguments:** `path` of the file; `network` the description of the field (`mf_eqx.describe`), or None; `config` as
    given to `save_weights`; `notes`, None if there are none; `arrays` by their paths in the field.
    """

    path: Path
    network: dict[str, Any] | None
    config: dict[str, Any]
    notes: Notes | None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def fill(self, make_field: Callable[[], _Field], parallelism: Parallelism | None = None) -> _Field:
        """The field that `make_field()` returns, with the arrays of the file.

        **Arguments:** `make_field` a function of no arguments (that of `load_weights` gets the configuration), of whose
        result only the shapes and dtypes of arrays and everything that is not an array are used; `parallelism` None for
        one device.

        **Raises:** `ValueError` if `make_field` is no such function, such as a network, or if the arrays are not those
        of the field (with the paths that differ).
        """
        _check_function(make_field, "no arguments, such as weights.make_network")
        wanted = eqx.filter_eval_shape(make_field)
        expected = {name: without_key_dtype(leaf) for name, leaf in leaves(wanted).items()}
        compare(shapes(self.arrays), shapes(expected), self.path)
        filled = fill_shapes(wanted, {name: jnp.asarray(leaf) for name, leaf in self.arrays.items()})
        return _on_devices(filled, parallelism)

    def make_network(self, **how: Any) -> AbstractField:
        """A new network as the file describes it, with the random parameters of `key=jr.key(0)`.

        **Arguments:** `how`: any of `dtype`, `attention`, `remat` and `unroll`, as for `mf_eqx.make_network`.

        **Raises:** `ValueError` if the file does not describe its network.
        """
        if self.network is None:
            rule = (
                "describe its network, an MLP, DiT, InContextDiT or UNet with labels, vectors as condition, or "
                "neither, and with parameters of the usual dtype"
            )
            raise ValueError(f"{self.path}: must {rule}; one of your own is loaded by load_weights(path, make_field)")
        try:
            return make_network(self.network, key=jr.key(0), **how)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def save_weights(
    path: str | Path, field: AbstractField, config: Mapping[str, Any] | None = None, notes: Notes | None = None
) -> None:
    """Write the arrays of a field as safetensors. The file is complete or absent, and equal arguments always give the
    same bytes. One process writes, but all must call this function.

    **Arguments:**

    - `path`: of the file.
    - `field`: usually an average. An `MLP`, `DiT`, `InContextDiT` or `UNet` is described (`mf_eqx.describe`) if that is
      possible; with a condition embedding of your own, or with parameters in another dtype than new ones have, it is
      not: `load_weights` then needs `make_field`. A warning tells of such a dtype.
    - `config`: any values that JSON can represent, such as those of which a network of your own is made. Its text has,
      with the notes, at most 64 MiB and about a million values, nested at most 64 times.
    - `notes`: what those who sample should know.

    **Raises:** `ValueError` for arrays in bfloat16, float8 and similar dtypes, which safetensors cannot read into NumPy
    (averages are float32), if `field` cannot be called, such as a whole state, if there are not as many
    `class_names` as labels, or if `config` is no JSON within these limits. `OSError` if the file cannot be written; an
    existing file is then left unchanged.
    """
    with optional("safetensors"):
        import safetensors
        import safetensors.numpy
    if not callable(field):
        raise ValueError(f"field must be a network, got {type(field).__name__}, which cannot be called")
    arrays = {name: on_host(without_key_dtype(leaf)) for name, leaf in leaves(field).items()}
    if unknown := [f"{name} in {array.dtype}" for name, array in arrays.items() if not _is_supported(array.dtype)]:
        rule = "have arrays of dtypes that safetensors can read into NumPy"
        raise ValueError(f"field must {rule}, got {listed(unknown)}: cast them to float32")
    about: dict[str, Any] = {"network": None, "config": dict(config or {})}
    try:
        about["network"] = describe(field)
    except ValueError:
        floats = {str(array.dtype) for array in arrays.values() if array.dtype.kind == "f"}
        if isinstance(field, Network) and (others := sorted(floats - {"float32"})):
            reason = f"its parameters are not all float32, got {', '.join(others)}"
            hint = "load_weights needs make_field; cast them to float32 to do without"
            warnings.warn(f"{path}: the network is not described, since {reason}: {hint}", stacklevel=2)
    if notes is not None:
        labels = about["network"] and about["network"]["labels"]
        if labels and notes.class_names and len(notes.class_names) != labels:
            raise ValueError(f"class_names must be {labels}, one for each label, got {len(notes.class_names)}")
        about["notes"] = notes.as_json()
    text = readable_json("config, with the notes,", about, finite=False)
    if jax.process_index() == 0:
        content = {"format": _FORMAT, "about": text, "sha256": _digest(arrays, text)}
        try:
            file = safetensors.numpy.save(arrays, content)
        except safetensors.SafetensorError as error:  # quotes are escaped twice, and the header has a bound of its own
            raise ValueError(f"config, with the notes, must fit into a safetensors header: {error}") from error
        write_whole(path, *_with_ordered_header(file))


def load_weights(
    path: str | Path,
    make_field: Callable[[dict[str, Any]], AbstractField] | None = None,
    parallelism: Parallelism | None = None,
    **how: Any,
) -> Any:
    """The field in a file of `save_weights`. `read_weights` returns it with its description, configuration and notes.

    **Arguments:** `path` of the file; `make_field` None for a network that describes itself, or a function that makes a
    field of the right structure from the configuration, see `Weights.fill`; `parallelism` None for one device; `how`
    for a network that describes itself: any of `dtype`, `attention`, `remat` and `unroll`, as for
    `mf_eqx.make_network`.

    To compute in bfloat16, give `dtype=jnp.bfloat16`: parameters stay in float32, and are cast where they are used. To
    cast the parameters of a field does not change the precision in which it computes.

    **Raises:** `ValueError` if `make_field` is no function of one argument, or is given with `how`; otherwise as
    `read_weights`, `Weights.fill` and `Weights.make_network`.
    """
    if make_field is not None:
        if how:
            raise ValueError(f"{', '.join(how)} must be left out where make_field makes the field, got {how}")
        _check_function(make_field, "one argument, the configuration", {})
    weights = read_weights(path)
    made = (lambda: weights.make_network(**how)) if make_field is None else (lambda: make_field(weights.config))
    return weights.fill(made, parallelism)


def read_weights(path: str | Path) -> Weights:
    """The content of a file of `save_weights`, after a check that it is unchanged.

    **Raises:** `OSError` if the file cannot be read; `ValueError` that names the file and what is wrong with it: not
    safetensors, truncated, another format, or a text or arrays that changed after they were written.
    """
    path = Path(path)
    rule = f"{path}: must be a file of save_weights"
    metadata, arrays = _read(path, rule)
    text = metadata.get("about", "")
    if metadata.get("sha256") != _digest(arrays, text):
        raise ValueError(f"{path}: must hold the weights as written, but their sha256 differs: the file is damaged")
    try:
        about = parse_json(text.encode(), finite=False)
    except ValueError as error:
        raise ValueError(f"{rule}, but its configuration cannot be read: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{rule}, whose configuration is a JSON object, got {type(about).__name__}")
    network, config, notes = (about.get(name) for name in ("network", "config", "notes"))
    if not (isinstance(network, dict | None) and isinstance(config, dict) and isinstance(notes, dict | None)):
        raise ValueError(f"{rule}, with objects for network, config and notes, got {text:.80}")
    try:
        return Weights(path, network, config, None if notes is None else notes_of_json(notes), arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_function(make_field: Any, arguments: str, *given: Any) -> None:
    """Refuses what cannot be called with these arguments."""
    try:
        inspect.signature(make_field).bind(*given)
    except TypeError as error:
        found = getattr(make_field, "__name__", type(make_field).__name__)
        raise ValueError(f"make_field must be a function of {arguments}, got {found}: {error}") from error
    except ValueError:  # of some functions in C no signature is known
        pass


def _read(path: Path, rule: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata of a file in our format, and its arrays."""
    with optional("safetensors"):
        import safetensors
        import safetensors.numpy
    if not (content := read_regular(path)):
        raise ValueError(f"{rule}, but it is empty")
    try:
        # The metadata first: files from other programs may hold tensors of dtypes that NumPy lacks.
        metadata = _metadata(content)
        is_ours = metadata.get("format") == _FORMAT
        arrays = safetensors.numpy.load(content) if is_ours else {}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{rule}, but it cannot be read: {error}") from error
    if not is_ours:
        raise ValueError(f"{rule} in the format {_FORMAT!r}, got {metadata.get('format')!r:.60}")
    return metadata, arrays


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
    return digest_of_arrays(dict(sorted(arrays.items())), text)
