r"""SiT, a Flow Matching network in torch with DiT's names, as initial weights for an average velocity.

SiT is trained on the straight path with data at time 1 and noise at time 0, and predicts the velocity towards the data.
In `mf_eqx`, data are at time 0, so that

$$u(z, t, t) = -\mathrm{SiT}(z, 1 - t).$$

- The time: $\cos w(1 - t) = \cos w \cos wt + \sin w \sin wt$ and $\sin w(1 - t) = \sin w \cos wt - \cos w \sin wt$. So
  each pair of rows of the first linear layer is combined with these coefficients, and the network then takes t itself.
- The sign: the last linear layer is negated.
- SiT's last layer has twice the number of channels. The second half is never used and is left out.
- SiT has no embedding of h = t - r. The second layer of this embedding is set to zero, so that h has no effect at
  first. The first layer is initialized at random: if both were zero, their gradients would remain zero.
- The position embedding is stored in the file but is fixed: it must equal that of `mf_eqx.DiT`, and is not read.

Weights are (out, in) in torch, and those of the patches (width, channels, row, column).

Source: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers, Ma,
Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, 2024, arXiv 2401.08740.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from .._foreign import fill, Origin
from .._model import DiT
from ..nn import sinusoidal_positions, TimePairEmbedding
from ._dit import check_is_as_released, Convert, origins, Shape

_POSITIONS = "pos_embed"


def fill_sit(
    field: DiT, tensors: Mapping[str, Shaped[np.ndarray, "..."]], path: str | Path, *, key: Key[Array, ""]
) -> DiT:
    """`field` with u(z, r, t) = -SiT(z, 1 - t) for every r.

    **Arguments:** `field` with labels, which embeds (t, t - r); its structure is used, its values are replaced;
    `tensors` by their names, without a prefix; `path` of the file, for error messages; `key` for the random first layer
    of the embedding of t - r, which SiT lacks.

    **Raises:** `ValueError` that names every tensor which is missing, unexpected, of another shape, or not finite;
    also if the position embedding is not that of `mf_eqx.DiT`.
    """
    check_is_as_released(field)
    _check_positions(field, tensors, path)
    return fill(field, _origins(field, key), tensors, path, ignored=(_POSITIONS,))


def _check_positions(field: DiT, tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    _, height, width = field.data_shape
    expected = sinusoidal_positions(height // field.patch, width // field.patch, field.modulation.weight.shape[0])[None]
    found = tensors.get(_POSITIONS)
    if found is None:
        raise ValueError(f"{path}: must hold the tensors of the network, but it lacks {_POSITIONS}")
    if found.shape != expected.shape:
        rule = f"must have shape {expected.shape} for {field.data_shape}"
        raise ValueError(f"{path}: {_POSITIONS} {rule}, got {found.shape}")
    if not np.allclose(found, expected, rtol=0, atol=1e-4):
        raise ValueError(f"{path}: {_POSITIONS} must be sines and cosines of the position, got others")


def _origins(field: DiT, key: Key[Array, ""]) -> dict[str, Origin]:
    return dict(origins(field, _name, _converted)) | dict(_of_duration(field, key))


def _of_duration(field: DiT, key: Key[Array, ""]) -> Iterator[tuple[str, Origin]]:
    """Origins without tensors, for the embedding of t - r: its first layer as in a new network, its second zero."""
    times = field.embedding.times
    hidden = TimePairEmbedding(field.modulation.weight.shape[0], size=times.size, key=key).hidden[1]
    for kind in ("weight", "bias"):
        first, zero = np.asarray(getattr(hidden, kind)), np.zeros(getattr(times.out[1], kind).shape, np.float32)
        yield f".embedding.times.hidden[1].{kind}", Origin((), (), lambda value=first: value)
        yield f".embedding.times.out[1].{kind}", Origin((), (), lambda value=zero: value)


def _name(layer: str, kind: str) -> str:
    return f"{layer}.{'weight' if kind == 'table' else kind}"


def _converted(field: DiT, path: str, shape: Shape) -> tuple[Shape, Convert]:
    channels, patch = field.data_shape[0], field.patch
    outputs = 2 * shape[-1]
    match path:
        case "patches.weight":
            kernel = (shape[-1], channels, patch, patch)
            return kernel, lambda weight: weight.transpose(2, 3, 1, 0).reshape(shape)
        case "embedding.times.hidden[0].weight":
            return shape[::-1], lambda weight: _reversed_time(weight.T)
        case "out.weight":
            return (outputs, shape[0]), lambda weight: -_first_half(weight, channels).T
        case "out.bias":
            return (outputs,), lambda bias: -_first_half(bias, channels)
        case "embedding.label.table":
            return shape, lambda table: table
    return shape[::-1], np.transpose  # a bias is its own transpose


def _first_half(rows: Float[np.ndarray, "outputs *inputs"], channels: int) -> Float[np.ndarray, "values *inputs"]:
    """The used half of the channels of each pixel in a patch."""
    pixels = rows.reshape(-1, 2 * channels, *rows.shape[1:])
    return pixels[:, :channels].reshape(-1, *rows.shape[1:])


def _reversed_time(weight: Float[np.ndarray, "features width"]) -> Float[np.ndarray, "features width"]:
    """The weight W' with W' e(t) = W e(1 - t), where W is `weight` and e are the cosines and sines of a time."""
    cosines, sines = np.split(weight.astype(np.float64), 2)
    w = 10_000.0 ** (-np.arange(len(cosines)) / len(cosines))[:, None]
    rotated = [cosines * np.cos(w) + sines * np.sin(w), cosines * np.sin(w) - sines * np.cos(w)]
    return np.concatenate(rotated).astype(weight.dtype)
