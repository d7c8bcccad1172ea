r"""Averages of the parameters over training, which give better samples than the parameters themselves.

An average is a complete field, kept in float32 or better. It starts as a *copy* of the parameters: the same buffer in
two places of a donated state is an error.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ._custom_types import Scalar
from ._validate import as_float, check_counts, check_positive

_Network = TypeVar("_Network", bound=eqx.Module)


class HalfLife(eqx.Module):
    r"""The decay per step by which the weight of parameters halves over a number of images, fewer at first:

    $$d_n = 2^{-B / H_n}, \qquad H_n = \min(H, \rho\, (n - 1) B)$$

    at step n, counted from 1. At n = 1 the average becomes the parameters, unless `rampup` is None: then H_n = H.

    **Arguments:** `images` H, > 0: 500, 1000 and 2000 thousand for pixel MeanFlow. `batch` images per step B, >= 1.
    `rampup` $\rho$, > 0: the half-life is at most this share of the images seen before; None for H throughout.

    **Reference:** Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al., 2022, arXiv
    2206.00364, whose code has this rule with rampup 0.05.
    """

    images: float = eqx.field(converter=as_float("images"))
    batch: int
    rampup: float | None = 0.05

    def __check_init__(self):
        check_positive("images", self.images)
        check_counts(batch=self.batch)
        if self.rampup is not None:
            check_positive("rampup", self.rampup)

    def __call__(self, step: Int[Array, ""]) -> Scalar:
        """The decay of the step that is the `step`-th, counted from 1."""
        return 2.0 ** -self._halvings(step)

    def share(self, step: Int[Array, ""], interval: int = 1) -> Scalar:
        """1 - d^k for an update after k steps, the last of them the `step`-th. For a long half-life 1 - d would lose
        its digits in float32: for 2,000,000 images and a batch of 1 it would be 3% too large."""
        return -jnp.expm1(-math.log(2) * interval * self._halvings(step))

    def _halvings(self, step: Int[Array, ""]) -> Scalar:
        """B / H_n, infinite at the first step of a ramp."""
        images = jnp.asarray(self.images, float)
        if self.rampup is not None:
            images = jnp.minimum(images, self.rampup * self.batch * (jnp.asarray(step, float) - 1))
        return jnp.where(images > 0, self.batch / jnp.where(images > 0, images, 1), jnp.inf)


class ExponentialAverage(eqx.Module):
    r"""The exponential moving average $a \leftarrow d^k a + (1 - d^k)\, \theta$, every k steps.

    **Arguments:** `decay` d per step, in [0, 1): 0.9999 in the ImageNet experiments; 0.99995 for CIFAR-10, whose code
    also keeps 0.9999 and 0.9996; or a `HalfLife`. `interval` k: 1 by default; 16 in the CIFAR-10 code. An
    average in float32 does not follow shares 1 - d^k much below 1e-7: take a longer interval then.
    """

    decay: float | HalfLife = eqx.field(
        converter=lambda decay: decay if isinstance(decay, HalfLife) else as_float("decay")(decay)
    )
    interval: int = 1

    def __check_init__(self):
        if not isinstance(self.decay, HalfLife) and not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")
        check_counts(interval=self.interval)

    def init(self, field: _Network) -> _Network:
        """The average before any step: a copy."""
        return jax.tree.map(_copy, field)

    def update(self, average: _Network, field: _Network, step: Int[Array, ""]) -> _Network:
        """The average after `step` finished steps (counted from 1), where `field` holds the parameters at that step."""
        every = self.interval
        share = self.decay.share(step, every) if isinstance(self.decay, HalfLife) else 1 - self.decay**every
        share = jnp.where(step % every == 0, share, 0.0)

        def move(a: Any, p: Any) -> Any:
            return a + share.astype(a.dtype) * (p.astype(a.dtype) - a) if eqx.is_inexact_array(a) else a

        return jax.tree.map(move, average, field)


def as_averages(averages: Sequence[ExponentialAverage]) -> tuple[ExponentialAverage, ...]:
    """`averages` as a tuple. **Raises:** `ValueError` unless they are a list or a tuple of `ExponentialAverage`."""
    if not isinstance(averages, Sequence) or not all(isinstance(one, ExponentialAverage) for one in averages):
        rule = "a list of ExponentialAverage, such as [ExponentialAverage(0.999)]"
        raise ValueError(f"averages must be {rule}, got {averages!r:.100}")
    return tuple(averages)


def _copy(leaf: Any) -> Any:
    if not eqx.is_array(leaf):
        return leaf
    dtype = np.promote_types(leaf.dtype, np.float32) if eqx.is_inexact_array(leaf) else leaf.dtype
    return jnp.array(leaf, dtype, copy=True)
