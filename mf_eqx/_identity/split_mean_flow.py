r"""SplitMeanFlow: the semigroup property of average velocities, without a derivative.

Additivity of the integral in Eq. 3 of the MeanFlow paper gives, for r <= s <= t and z_s = z_t - (t - s) u(z_t, s, t),

$$(t - r)\, u(z_t, r, t) = (t - s)\, u(z_t, s, t) + (s - r)\, u(z_s, r, s).$$

Source: SplitMeanFlow: Interval Splitting Consistency in Few-Step Generative Modeling, Guo, Wang, Ye, Yu, Zhang, et al.,
2025, arXiv 2507.16884. Progressive self-distillation (PSD) in How to build a consistency model, Boffi, Albergo,
Vanden-Eijnden, 2025, arXiv 2505.18825, is the same equation, with s uniform here and in the middle in `Shortcut`. Since
the former paper is on speech, `paper_settings` are those of PSD for CIFAR-10, without its learnt weight.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._custom_types import as_scalar, as_times, Condition, ScalarLike, TimeLike
from .._derivative import Passes
from .._field import AbstractField, stopped
from .._row import Row
from .._times import AbstractTimes, UniformTimes
from .base import AbstractIdentity
from .facts import Facts
from .lagrangian_self_distillation import SELF_DISTILLATION

_SPLIT = 0x53504C49  # large, since for small i jr.fold_in(key, i) is jr.split(key, n)[i], which a field may use


def semigroup_residual(
    field: AbstractField,
    z: Float[Array, "*data"],
    r: TimeLike,
    t: TimeLike,
    split: ScalarLike,
    condition: Condition = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*data"]:
    r"""The residual of the semigroup property: $u(z_t, r, t) - \mathrm{sg}((1 - \lambda)\, u(z_s, r, s) + \lambda\,
    u(z_t, s, t))$.

    **Arguments:** `field`; `z` state at `t`; `r <= t` times; `split` the share $\lambda$ of the interval above s, so
    that $s = t - \lambda (t - r)$; `condition`; `key` for dropout, the same in all three evaluations.
    """
    r, t = as_times(r, t, z)
    split, teacher = as_scalar("split", split, t), stopped(field)
    s = t - split * (t - r)
    upper = teacher(z, s, t, condition, key=key)
    lower = teacher(z - (t - s) * upper, r, s, condition, key=key)
    return field(z, r, t, condition, key=key) - jax.lax.stop_gradient((1 - split) * lower + split * upper)


class SplitMeanFlow(AbstractIdentity):
    """The semigroup property at a random s. It learns v from the boundary rows alone, and needs no JVP.
    `ConstantWeight` is the safe weight: see `AdaptiveWeight`.

    **Arguments:** `split` distribution of the share of the interval above s; uniform in the paper.
    """

    split: AbstractTimes = UniformTimes()

    @property
    def facts(self) -> Facts:
        settings = SELF_DISTILLATION.paper_settings
        passes = Passes(forward=2)
        return Facts(
            degenerate=True, trains_velocity=False, uses_velocity=False, passes=passes, paper_settings=settings
        )

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        if row.key is None:
            raise ValueError("key must be given, since SplitMeanFlow draws s from it; got None")
        split = jnp.asarray(self.split(key=jr.fold_in(row.key, _SPLIT)), row.t.dtype)
        return semigroup_residual(field, row.z, row.r, row.t, split, row.condition, key=row.key)
