r"""What the convolutional networks of features have in common: their weights.

Each convolution is followed by batch normalisation with stored moments, which is a scale a and a shift b for each
channel,

$$\gamma\, \frac{x - \mu}{\sqrt{\sigma^2 + 10^{-3}}} + \beta = a x + b, \qquad
  a = \frac{\gamma}{\sqrt{\sigma^2 + 10^{-3}}}, \qquad b = \beta - \mu a,$$

computed in float64 when the weights are loaded.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from .._foreign import Origin

_EPSILON = 1e-3

_Channels = Float[np.ndarray, " size"]


def norm_origins(place: str, name: str, size: int) -> dict[str, Origin]:
    """The origins of `scale` and `shift` of the module at `place`, from the normalisation `name` of a torch file."""
    names = tuple(f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
    return {f"{place}.scale": Origin(names, (size,), _scale), f"{place}.shift": Origin(names, (size,), _shift)}


def _scale(weight: _Channels, bias: _Channels, mean: _Channels, variance: _Channels) -> _Channels:
    return weight / np.sqrt(variance.astype(np.float64) + _EPSILON)


def _shift(weight: _Channels, bias: _Channels, mean: _Channels, variance: _Channels) -> _Channels:
    return bias - mean * _scale(weight, bias, mean, variance)


def random_weights(shapes: PyTree[Any], key: Key[Array, ""]) -> Any:
    """Arrays of these shapes: weights of variance 2 / fan-in, scales one, other vectors zero."""
    weights = [leaf for leaf in jax.tree.leaves(shapes) if len(leaf.shape) > 1]
    # One draw for all weights: compiling one program for each shape would take a minute.
    numbers = jr.normal(key, (sum(math.prod(leaf.shape) for leaf in weights),), jnp.float32)
    parts = iter(_split(numbers, tuple(leaf.shape for leaf in weights)))

    def fill(path: Any, leaf: Any) -> Any:
        if len(leaf.shape) > 1:
            return next(parts)
        return jnp.full(leaf.shape, 1.0 if getattr(path[-1], "name", "") == "scale" else 0.0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.partial(jax.jit, static_argnums=1)
def _split(numbers: Float[Array, " all"], shapes: tuple[tuple[int, ...], ...]) -> Sequence[Float[Array, "..."]]:
    parts = jnp.split(numbers, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [
        part.reshape(shape) * math.sqrt(2 / math.prod(shape[1:])) for part, shape in zip(parts, shapes, strict=True)
    ]
