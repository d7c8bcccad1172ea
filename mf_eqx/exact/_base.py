r"""The interface of distributions of data whose velocity is exact.

On a path $z_t = \alpha_t x + \sigma_t \epsilon$ the marginal velocity is a combination of two posterior means,

$$v(z, t) = E[v_t \mid z_t = z] = \dot\alpha_t\, E[x \mid z] + \dot\sigma_t\, E[\epsilon \mid z] \qquad (1),$$

and the first of them gives the second: $E[\epsilon \mid z] = (z - \alpha_t E[x \mid z]) / \sigma_t$.
"""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Key

from .._custom_types import Condition, Time
from .._interpolant import AbstractInterpolant


def check_point(name: str, value: Float[Array, "..."], shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless `value` is one point of data of this shape, which it would otherwise broadcast
    with."""
    if value.shape != shape:
        rule = f"the shape of one data point, {shape} (functions are per example: jax.vmap makes batches)"
        raise ValueError(f"{name} must have {rule}, got {value.shape}")


class AbstractDistribution(eqx.Module):
    """A distribution of data whose marginal velocity is known in closed form."""

    @abc.abstractmethod
    def velocity(
        self, interpolant: AbstractInterpolant, z: Float[Array, "*data"], t: Time, condition: Condition = None
    ) -> Float[Array, "*data"]:
        r"""The marginal velocity $E[v_t \mid z_t = z, c]$ (Eq. 1).

        **Arguments:** `interpolant` the path; `z` state at time `t`; `condition` the condition of the data, or None for
        the distribution of all data.

        **Returns:** the velocity, of the shape of `z`.
        """

    @abc.abstractmethod
    def sample(self, *, key: Key[Array, ""], condition: Condition = None) -> Float[Array, "*data"]:
        """One data point, from the distribution given `condition` or, if it is None, from the whole distribution."""
