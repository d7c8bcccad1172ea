r"""Targets with less variance: the conditional velocity, averaged over data that could have led to the same state.

The conditional velocity $v_t = \dot\alpha_t x + \dot\sigma_t \epsilon$ is a noisy target: only its mean given z_t, the
marginal velocity, can be learnt. With references $x_1, ..., x_n$ besides the row's own $x_0 = x$, that mean is
estimated by

$$v^*(z, t) = \sum_j w_j \left(\dot\alpha_t x_j + \dot\sigma_t\, \frac{z - \alpha_t x_j}{\sigma_t}\right), \qquad
w = \mathrm{softmax}_j\left(-\frac{|z - \alpha_t x_j|^2}{2 \sigma_t^2}\right).$$

Over a whole data set this is the marginal velocity of that data set, without variance. With n references that are drawn
from the distribution of x, independently, the variance falls as 1/n and there is no bias at any n: given z and the set
{x_0, ..., x_n}, any of which might have been the row's own, $w_j$ is the probability that x_j led to z, so that v* is
the mean of the conditional velocity given z and the set.

Source: Stable Target Field for Reduced Variance Score Estimation in Diffusion Models, Xu, Tong, Jaakkola, 2023, arXiv
2302.00670.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from ._custom_types import Condition, Time
from ._interpolant import AbstractInterpolant
from ._validate import as_count, as_labels, check_finite, described

_DRAW = 0x53544654  # folds the key of a step away from the keys of its rows, which are folded with their index
_LEAST_SIGMA = 1e-6
# Up to this dimension distances come from differences, which stay exact for close points; above it from products, which
# need no differences of all rows and references in memory.
_LARGEST_DIM_OF_DIFFERENCES = 8


class StableTarget(eqx.Module):
    r"""The velocity $v^*$ from reference data, in place of the conditional velocity.

    For an `Objective`, with any path and any method that takes a velocity. It costs three products of a batch with n
    references, 6 n D operations for each row of D numbers, and no evaluation of the field.

    **Arguments:**

    - `x`: the references, on the scale on which the field sees data (after `TrainStep.prepare`), computed with in
      float32 or better. They are not trained and in no checkpoint. Give arrays of JAX: those of NumPy are copied to the
      device at each step; with several devices, what `Parallelism.replicate` returns.
    - `label`: an integer label for each of them, which data with labels need: rows are compared with references of
      their own label, and with all where the condition was dropped. None for data without conditions. Other conditions
      than one label have no such target: hardly two rows of data share the same vector.
    - `number`: None to use all references at every step; or how many of them a step draws at random, with replacement
      and the same ones for all its rows: so many of all labels together.

    Up to 8 dimensions the differences of all rows of a batch and all references are in memory. Above, distances of
    references come from products, rounded to about 1e-3 of the extent of the data: at times at which the noise is not
    larger than that, references that close to the row's own x count as equal to it.

    A row's own x is always added to references that are drawn at random. If all references are used, it is added unless
    it is one of them.

    **Raises:** `ValueError` unless x is floating point, label an integer for each, and number in [1, references]; when
    called, if the row has another shape, a condition that is no integer label, or a label where the references have
    none, or the other way round.
    """

    x: Float[Array | np.ndarray, "references *data"]
    label: Int[Array | np.ndarray, " references"] | None = None
    number: int | None = None

    def __check_init__(self):
        count = self.x.shape[0]
        if not jnp.issubdtype(self.x.dtype, jnp.floating) or count == 0:
            raise ValueError(f"x must be at least one reference, floating point; got {count} of {self.x.dtype}")
        if self.label is not None and self.label.shape != (count,):
            raise ValueError(f"label must be one for each of {count} references, got shape {self.label.shape}")
        if self.label is not None:
            as_labels("label", self.label)
        check_finite("largest value of x", jnp.max(jnp.abs(jnp.asarray(self.x))))
        if self.number is not None and not as_count("number", self.number) <= count:
            raise ValueError(f"number must be at most {count}, the number of references, got {self.number}")

    def velocity(
        self,
        path: AbstractInterpolant,
        x: Float[Array, "*data"],
        eps: Float[Array, "*data"],
        t: Time,
        condition: Condition = None,
        dropped: Bool[ArrayLike, ""] = False,
        *,
        key: Key[Array, ""],
    ) -> Float[Array, "*data"]:
        r"""The estimate $v^*$ at the state of `x` and `eps` at time `t`.

        **Arguments:** `path`; `x`, `eps` data and noise of a row; `t` time; `condition`, the row's label; `dropped`
        whether it was dropped; `key` of the step, the same for all rows.
        """
        if x.shape != self.x.shape[1:]:
            raise ValueError(f"x must have the shape of a reference, {self.x.shape[1:]}, got {x.shape}")
        references, label = self._drawn(key)
        counts = self._has_label(label, condition, dropped)
        references, own, noise = references.reshape(len(references), -1).astype(x.dtype), x.reshape(-1), eps.reshape(-1)
        alpha, sigma, alpha_rate, sigma_rate = path.rates(t)
        ratio = alpha / jnp.maximum(sigma, _LEAST_SIGMA)
        few = own.size <= _LARGEST_DIM_OF_DIFFERENCES
        squares, along, is_own, weighted = (_from_differences if few else _from_products)(references, own, noise)

        # |z - alpha x_j|^2 / sigma^2 less the row's own |eps|^2, so that the own x has the logit 0: at small sigma both
        # are huge, and only their difference matters.
        logits = -(ratio**2) * squares / 2 + ratio * along
        logits = jnp.where(counts, jnp.where(is_own, 0, logits), -jnp.inf)
        # The own x is added to references that are drawn at random; a whole data set already contains it.
        is_added = ~jnp.any(is_own & counts) if self.number is None else jnp.asarray(True)
        shift = weighted(_softmax(logits, is_added))
        v = alpha_rate * x + sigma_rate * eps
        return v + (alpha_rate - sigma_rate * ratio) * shift.reshape(x.shape)

    def _drawn(self, key: Key[Array, ""]) -> tuple[Float[Array, "drawn *data"], Int[Array, " drawn"] | None]:
        """The references of a step."""
        x, label = jnp.asarray(self.x), None if self.label is None else jnp.asarray(self.label)
        if self.number is None:
            return x, label
        rows = jr.randint(jr.fold_in(key, _DRAW), (self.number,), 0, len(x))
        return x[rows], None if label is None else label[rows]

    def _has_label(
        self, label: Int[Array, " drawn"] | None, condition: Condition, dropped: Bool[ArrayLike, ""]
    ) -> Bool[Array, " #drawn"]:
        """Whether each reference has the row's label, or the row has none."""
        leaves = jax.tree.leaves(condition)
        is_label = len(leaves) == 1 and np.shape(leaves[0]) == () and jnp.issubdtype(leaves[0].dtype, jnp.integer)
        if leaves and not is_label:
            raise ValueError(
                f"condition must be one integer label or None for a StableTarget, got {described(condition)}"
            )
        if label is None:
            if leaves:
                raise ValueError("label must be given for the references of rows that have a condition, got None")
            return jnp.ones(1, bool)
        if not leaves:
            raise ValueError("condition must be one integer label where references have labels, got None")
        with jax.numpy_dtype_promotion("standard"):
            return (label == leaves[0]) | dropped


_Differences: TypeAlias = tuple[
    Float[Array, " references"],
    Float[Array, " references"],
    Bool[Array, " references"],
    Callable[[Float[Array, " references"]], Float[Array, " dim"]],
]
"""Of the differences of the references from a row's own x: their squares, their products with the noise, whether they
are zero up to rounding, and the function from weights to their weighted sum."""


def _from_differences(
    references: Float[Array, "references dim"], own: Float[Array, " dim"], noise: Float[Array, " dim"]
) -> _Differences:
    difference = references - own
    squares = jnp.sum(difference**2, axis=1)
    is_own = squares <= (4 * jnp.finfo(own.dtype).eps) ** 2 * (jnp.sum(own**2) + jnp.sum(references**2, axis=1))
    along = jnp.sum(difference * noise, axis=1)
    return squares, along, is_own, lambda weights: jnp.sum(weights[:, None] * difference, axis=0)


def _from_products(
    references: Float[Array, "references dim"], own: Float[Array, " dim"], noise: Float[Array, " dim"]
) -> _Differences:
    product = functools.partial(jnp.matmul, precision="highest")  # TF32 would blur the differences
    center = jnp.mean(references, axis=0)  # near which squares round less
    references, own = references - center, own - center
    norms = jnp.sum(own**2) + jnp.sum(references**2, axis=1)
    squares = norms - 2 * product(references, own)
    is_own = squares <= 8 * jnp.finfo(own.dtype).eps * norms
    along = product(references, noise) - product(own, noise)
    return squares, along, is_own, lambda weights: product(weights, references) - jnp.sum(weights) * own


def _softmax(logits: Float[Array, " drawn"], with_zero: Bool[Array, ""]) -> Float[Array, " drawn"]:
    """The weights of the logits, perhaps beside one more logit of 0."""
    top = jnp.maximum(jnp.max(logits), 0)
    weights = jnp.exp(logits - top)
    return weights / (jnp.sum(weights) + jnp.where(with_zero, jnp.exp(-top), 0))
