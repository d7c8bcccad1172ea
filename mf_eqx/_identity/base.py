r"""What an identity is.

Every one-step method is a boundary condition, u(z, t, t) = v, which is plain Flow Matching, plus an equation that must
hold for r < t. Only that equation differs between papers; a subclass of `AbstractIdentity` states it as a residual
whose squared norm the objective minimises:

    residual = u(z, r, t) - sg(what the equation says u should be).

(An equation, not `eqx.nn.Identity`.)
"""

import abc
from typing import TYPE_CHECKING

import equinox as eqx
from jaxtyping import Array, Float, Int, Key

from .._custom_types import Condition, Time
from .._field import AbstractField

if TYPE_CHECKING:  # to a type checker they are the same thing
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class Context(eqx.Module):
    """What an objective may know beyond its rows: schedules are functions of `step`, distillation needs `teacher`.

    **Arguments:** `step` number of finished training steps; `teacher` a field that does not learn (`TrainStep` hands in
    its first average), or None. Evaluate a teacher with `key=None`.
    """

    step: Int[Array, ""]
    teacher: AbstractField | None = None


class AbstractIdentity(eqx.Module):
    """An equation for average velocities.

    A subclass states two facts about itself:

    - `needs_boundary`: whether the equation alone leaves u undetermined (u = 0 would solve it, or u(z, t, t) would stay
      untrained), so that an identity share of 1 is refused;
    - `uses_velocity`: whether `v` enters; if not, no guidance passes are spent on its rows.
    """

    needs_boundary: AbstractClassVar[bool]
    uses_velocity: AbstractClassVar[bool]

    @abc.abstractmethod
    def residual(
        self,
        field: AbstractField,
        z: Float[Array, "*data"],
        v: Float[Array, "*data"],
        r: Time,
        t: Time,
        condition: Condition,
        *,
        key: Key[Array, ""] | None,
        context: Context | None = None,
    ) -> Float[Array, "*data"]:
        """What is left of the equation for one example; zero for the true average velocity and its marginal v.

        **Arguments:** `field` to be learnt; `z` state at `t`; `v` its velocity (conditional in training, guided if the
        objective guides); `r <= t` times; `condition`; `key` one key per row and step: pass it unchanged to every
        evaluation of `field`, so that all see the same dropout mask, and fold it with a large number for draws of
        your own (`fold_in(key, i)` with a small i is `split(key, n)[i]`, which the field may use; None only if neither
        happens); `context`.
        """
