r"""One Gaussian: a smooth distribution whose average velocity is elementary.

On the straight path the marginals are Gaussian too, and the flow moves their quantiles:

$$\Phi_{t \to r}(z) = (1 - r)\, m + \frac{\sigma_r}{\sigma_t} \big(z - (1 - t)\, m\big), \qquad
\sigma_t^2 = (1 - t)^2 s^2 + t^2.$$

In $u = (z - \Phi_{t \to r}(z)) / (t - r)$ the denominator cancels, because $\sigma_t^2 - \sigma_r^2 = (t - r)\,
\big((t + r) - s^2 (2 - t - r)\big)$:

$$u(z, r, t) = \frac{(t + r) - s^2 (2 - t - r)}{\sigma_t (\sigma_t + \sigma_r)} \big(z - (1 - t)\, m\big) - m.$$
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .._custom_types import as_times, Condition, Time, TimeLike
from .._field import AbstractField
from .._validate import as_float, check_finite, check_positive
from ._base import check_point


class GaussianAverageVelocity(AbstractField):
    """The average velocity of data N(m, s² I) on `LinearInterpolant`; it ignores the condition.

    There is no division by t - r: at r = t, u is v. It is smooth in all arguments.

    **Arguments:** `mean` m, finite; `std` s > 0 and finite, in the unit of the data.

    **Raises:** `ValueError` if `mean` or `std` does not satisfy this.
    """

    mean: Float[Array, "*data"] = eqx.field(converter=jnp.asarray)
    std: float = eqx.field(converter=as_float("std"))

    def __check_init__(self):
        check_finite("mean", self.mean)
        check_positive("std", self.std)

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        check_point("z", z, self.mean.shape)
        r, t = as_times(r, t, z)
        sigma_r, sigma_t = self._sigma(r), self._sigma(t)
        slope = ((t + r) - self.std**2 * (2 - t - r)) / (sigma_t * (sigma_t + sigma_r))
        return slope * (z - (1 - t) * self.mean) - self.mean

    def _sigma(self, t: Time) -> Time:
        return jnp.sqrt((1 - t) ** 2 * self.std**2 + t**2)
