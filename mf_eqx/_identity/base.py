r"""The interface of identities.

Every one-step method is a boundary condition, u(z, t, t) = v, which is plain Flow Matching, plus an equation that must
hold for r < t. Only that equation differs between papers; a subclass of `AbstractIdentity` states it as a residual
whose squared norm the objective minimises. Most are

    residual = u(z, r, t) - sg(what the equation says u should be).

("Identity" means an equation here, not `eqx.nn.Identity`.)
"""

import abc

import equinox as eqx
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._field import AbstractField
from .._row import Row
from .facts import Facts


class AbstractIdentity(eqx.Module):
    """An equation for average velocities."""

    @property
    @abc.abstractmethod
    def facts(self) -> Facts:
        """The properties of the method with these values of its parameters."""

    @abc.abstractmethod
    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        """The residual of the equation for one example. It is zero for the true average velocity with its marginal v.

        **Arguments:** `field` to be learnt; `row` the example.
        """


class AbstractIdentityWithLoss(AbstractIdentity):
    """An equation with a loss of its own, for one row or for a group of rows, in place of the objective's weight.

    The weight of the objective then applies to its boundary rows alone.
    """

    @abc.abstractmethod
    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        """The residual of the equation, and the loss.

        **Arguments:** `field` to be learnt; `row` the example. If `facts.group` > 1, all arrays of `row`, and so the
        residual, have a leading axis of that size, and the loss is the mean loss of these rows.
        """

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        return self.residual_and_loss(field, row)[0]


class AbstractIdentityWithVelocity(AbstractIdentity):
    """An equation that evaluates the velocity head, if the field has one, beside u, so that its rows train both. Its
    values of u also serve the objective's perceptual terms."""

    @abc.abstractmethod
    def residual_and_values(
        self, field: AbstractField, row: Row
    ) -> tuple[Float[Array, "*data"], Float[Array, "*data"], Float[Array, "*data"] | None]:
        """The residual of the equation, u(z, r, t), and v(z, t) of the velocity head, None without a head.

        **Arguments:** `field` to be learnt; `row` the example.
        """

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        return self.residual_and_values(field, row)[0]


class AbstractScheduledIdentity(AbstractIdentity):
    """An equation with parameters that change with the training step."""

    @classmethod
    @abc.abstractmethod
    def for_training(cls, steps: int) -> "AbstractScheduledIdentity":
        """The method with the schedules of its paper, stretched over a training of `steps` steps."""
