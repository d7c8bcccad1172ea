"""Weights written by other programs. Every tensor of a file must be used or explicitly ignored, and errors name the
tensors as the file does.

A loader states for each array of a module from which tensors it is made, and how:

    origins = {".conv.weight": Origin(("encoder.conv_in.weight",), (128, 3, 3, 3))}
    network = fill(network, origins, read_safetensors(path), path)
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from ._files import open_regular, read_regular
from ._leaves import fill_shapes, leaves, listed
from ._legacy_torch import is_legacy_torch, read_legacy_torch
from ._optional import optional

_Module = TypeVar("_Module")


def _unchanged(tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return tensor


_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "C64": np.complex64},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}
"""The dtypes by their names in safetensors files. The format has more (float8 and smaller), which are not supported."""


class Origin(NamedTuple):
    """Where one array of a module comes from.

    `names` of the tensors in the file; `shape` of each of them; `convert` the function of these tensors, in this order,
    that returns the array.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    convert: Callable[..., Shaped[np.ndarray, "..."]] = _unchanged


def read_safetensors(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a safetensors file by their names; bfloat16 and float16 as float32, which loses nothing.

    **Raises:** `OSError` if it cannot be read; `ValueError` that names it if it is not a safetensors file, is cut off,
    or has a tensor of an unsupported dtype such as float8.
    """
    with optional("safetensors"):
        import safetensors
    content = read_regular(path)
    try:
        tensors = safetensors.deserialize(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be a safetensors file, but it cannot be read: {error}") from error
    return {name: _array(name, tensor, path) for name, tensor in tensors}


def _array(name: str, tensor: Mapping[str, Any], path: str | Path) -> Shaped[np.ndarray, "..."]:
    if (dtype := _DTYPES.get(tensor["dtype"])) is None:
        raise ValueError(f"{path}: {name} must have a dtype among {', '.join(_DTYPES)}, got {tensor['dtype']}")
    array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return array.astype(np.float32) if tensor["dtype"] in ("BF16", "F16") else array


def read_torch(path: str | Path) -> dict[str, Any]:
    """The content of a file of `torch.save`: nested dictionaries with tensors as NumPy arrays.

    Nothing in the file is executed: files from before torch 1.6 are read by `read_legacy_torch`, others by torch with
    `weights_only`.

    **Raises:** `MissingDependency` without torch, which only files since torch 1.6 need; `OSError` if the file cannot
    be read; `ValueError` that names it if it is not such a file, is cut off, or contains anything but tensors and plain
    values.
    """
    if is_legacy_torch(path):
        return read_legacy_torch(path)
    with optional("torch"):
        import torch  # pyright: ignore[reportMissingImports]
    with open_regular(path) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # of many types, raised by torch, zipfile and the restricted unpickler
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: must be a file of torch.save with tensors alone, got: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dictionary, got {type(content).__name__}")

    def with_numpy_arrays(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: with_numpy_arrays(inner) for name, inner in value.items()}
        if isinstance(value, torch.Tensor):
            return (value.detach().float() if value.is_floating_point() else value).numpy()
        return value

    return with_numpy_arrays(content)


def fill(
    module: _Module,
    origins: Mapping[str, Origin],
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
    path: str | Path,
    *,
    ignored: Collection[str] = (),
) -> _Module:
    """`module` with the tensors of a file in place of its arrays, in the module's precision.

    **Arguments:**

    - `module`: its leaves are arrays, or `jax.ShapeDtypeStruct`s in their place.
    - `origins`: one for each array of `module`, by its path (`jax.tree_util.keystr`).
    - `tensors`, `path`: the content of the file, and its name for messages.
    - `ignored`: names of tensors in the file that are not needed.

    **Raises:** `ValueError` that names the tensors that are missing, that are not used, that have a wrong shape, or
    that contain values other than finite real numbers.
    """
    expected = leaves(module)
    if expected.keys() != origins.keys():  # a mistake of the loader, not of the file
        raise RuntimeError(f"origins must be of all arrays, but differ in {sorted(expected.keys() ^ origins.keys())}")
    _check(tensors, {name: origin.shape for origin in origins.values() for name in origin.names}, path, ignored)
    arrays = {}
    for name, leaf in expected.items():
        origin = origins[name]
        array = origin.convert(*(tensors[foreign] for foreign in origin.names))
        if array.shape != leaf.shape:
            raise RuntimeError(f"origin of {name} must give shape {leaf.shape}, got {array.shape}")
        with np.errstate(over="ignore"):
            arrays[name] = array.astype(leaf.dtype)
        if not np.isfinite(arrays[name]).all():  # checked in the dtype that is used
            raise ValueError(
                f"{path}: must hold values that are finite in {leaf.dtype}, but has others in {listed([*origin.names])}"
            )
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    return fill_shapes(eqx.filter_eval_shape(lambda: module), arrays)


def _check(
    tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], path: str | Path, ignored: Collection[str]
) -> None:
    names = tensors.keys() - set(ignored)
    shared = sorted(expected.keys() & names)
    misshapen = [name for name in shared if tensors[name].shape != expected[name]]
    parts = [
        ("lacks", [*(expected.keys() - names)]),
        ("has the unexpected", [*(names - expected.keys())]),
        ("differs:", [f"{name} is {tensors[name].shape}, not {expected[name]}" for name in misshapen]),
        ("has values that are no finite real numbers in", [name for name in shared if not _is_finite(tensors[name])]),
    ]
    if text := "; ".join(f"{word} {listed(sorted(found))}" for word, found in parts if found):
        raise ValueError(f"{path}: must hold the tensors of the network, but it {text}")


def _is_finite(tensor: Shaped[np.ndarray, "..."]) -> bool:
    return tensor.dtype.kind == "f" and bool(np.isfinite(tensor).all())
