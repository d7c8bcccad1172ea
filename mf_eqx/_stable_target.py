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

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from ._custom_types import Condition, Time
from ._interpolant import AbstractInterpolant

_DRAW = 0x53544654  # folds the key of a step away from the keys of its rows, which are folded with their index
_LEAST_SIGMA = 1e-6


class StableTarget(eqx.Module):
    r"""The velocity $v^*$ from reference data, in place of the conditional velocity.

    For an `Objective`, with any path and any method that takes a velocity. It costs two products of a batch with the
    references, 4 n D operations for each row of D numbers, and no evaluation of the field.

    **Arguments:**

    - `x`: the references, on the scale on which the field sees data (after `TrainStep.prepare`); bfloat16 and float16
      save memory and are computed with in float32. Kept as they are, not trained, in no checkpoint.
    - `label`: None, or an integer label for each of them: rows are then compared with references of their own label,
      and with all where the condition was dropped.
    - `number`: None to use all references at every step; or how many of them a step draws at random, with replacement
      and the same ones for all its rows. References of all labels count.

    A row's own x always counts once, whether or not it is among the references.

    **Raises:** `ValueError` unless x is floating point, label an integer for each, and number in [1, references]; when
    called, if the row has another shape, or no integer label where the references have one.
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
        if self.number is not None and not 1 <= self.number <= count:
            raise ValueError(
                f"number must lie in [1, {count}], the number of references, or be None; got {self.number}"
            )

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
        references = references.reshape(len(references), -1).astype(x.dtype)
        own = x.reshape(-1)
        alpha, sigma, alpha_rate, sigma_rate = path.rates(t)
        ratio = alpha / jnp.maximum(sigma, _LEAST_SIGMA)
        # |z - alpha x_j|^2 / sigma^2 less the row's own |eps|^2, which is the zero of the logits: at small sigma both
        # are huge, and only their difference matters.
        squares = jnp.sum(own**2) - 2 * references @ own + jnp.sum(references**2, axis=1)
        along = references @ eps.reshape(-1) - own @ eps.reshape(-1)
        logits = -(ratio**2) * jnp.maximum(squares, 0) / 2 + ratio * along
        rounding = 8 * jnp.finfo(x.dtype).eps * (jnp.sum(own**2) + jnp.sum(references**2, axis=1))
        counts = squares > rounding  # others than the row's own x
        if label is not None:
            counts &= (label == self._label_of(condition)) | dropped
        weights = _softmax(logits, counts)
        shift = weights @ references - jnp.sum(weights) * own
        v = alpha_rate * x + sigma_rate * eps
        return v + (alpha_rate - sigma_rate * ratio) * shift.reshape(x.shape)

    def _drawn(self, key: Key[Array, ""]) -> tuple[Float[Array, "drawn *data"], Int[Array, " drawn"] | None]:
        """The references of a step."""
        x, label = jnp.asarray(self.x), None if self.label is None else jnp.asarray(self.label)
        if self.number is None:
            return x, label
        rows = jr.randint(jr.fold_in(key, _DRAW), (self.number,), 0, len(x))
        return x[rows], None if label is None else label[rows]

    def _label_of(self, condition: Condition) -> Int[Array, ""]:
        leaves = jax.tree.leaves(condition)
        if len(leaves) != 1 or jnp.shape(leaves[0]) != () or not jnp.issubdtype(leaves[0].dtype, jnp.integer):
            raise ValueError(f"condition must be one integer label where references have labels, got {condition}")
        return leaves[0]


def _softmax(logits: Float[Array, " drawn"], counts: Bool[Array, " drawn"]) -> Float[Array, " drawn"]:
    """The weights of those that count, beside one more of logit 0."""
    logits = jnp.where(counts, logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits), 0)
    weights = jnp.exp(logits - top)
    return weights / (jnp.sum(weights) + jnp.exp(-top))
