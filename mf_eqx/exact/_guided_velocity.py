r"""The exact velocity of classifier-free guidance, which a network learns from a guided target (Sec. 4.2)."""

import equinox as eqx
from jaxtyping import Array, Float

from .._custom_types import as_scalar, Condition, TimeLike
from .._field import Velocity, velocity_at
from .._validate import as_float, check_finite


class GuidedVelocity(eqx.Module):
    r"""The guided velocity (Eq. 13),

    $$v_{cfg}(z, t \mid c) = \omega'\, v(z, t \mid c) + (1 - \omega')\, v(z, t).$$

    Without a condition both velocities are equal and the result is v(z, t), as for rows whose label was dropped.

    **Arguments:** `velocity` called as (z, t, condition), with condition None for the unconditional velocity; `scale`
    the *effective* $\omega'$, which is `Guidance.effective_scale`, finite; 1 means no guidance.
    """

    velocity: Velocity
    scale: float = eqx.field(converter=as_float("scale"))

    def __check_init__(self):
        check_finite("scale", self.scale)

    def __call__(self, z: Float[Array, "*data"], t: TimeLike, condition: Condition = None) -> Float[Array, "*data"]:
        """v_cfg(z, t | condition)."""
        t = as_scalar("t", t, z)
        conditional, unconditional = (velocity_at(self.velocity, z, t, c) for c in (condition, None))
        return self.scale * conditional + (1 - self.scale) * unconditional
