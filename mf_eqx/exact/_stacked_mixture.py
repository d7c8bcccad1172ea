r"""Independent copies of a mixture: data of any dimension, whose exact velocity costs as much as those of the copies.

$$p(x) = \prod_i p_1(x_i), \qquad v(z, t)_i = v_1(z_i, t), \qquad u(z, r, t)_i = u_1(z_i, r, t).$$

Since the copies are independent, their velocities are computed one by one, although n copies of a mixture of K
components are a mixture of $K^n$ components.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from .._custom_types import Condition, Scalar, TimeLike
from .._interpolant import AbstractInterpolant
from ._base import AbstractDistribution, check_point
from ._gaussian_mixture import GaussianMixture


class StackedMixture(AbstractDistribution):
    """`copies` independent draws of a mixture, concatenated to one vector: 8 copies of a mixture in 2 dimensions are
    data in 16 dimensions.

    **Arguments:** `mixture` whose data are vectors; `copies` how many. All copies have the same condition.

    **Raises:** `ValueError` if the mixture's data are not vectors, or if copies < 1.
    """

    mixture: GaussianMixture
    copies: int

    def __check_init__(self):
        if self.mixture.mean.ndim != 2:
            raise ValueError(
                f"mixture must be of vectors, with a mean of shape (component, dim), got {self.mixture.mean.shape}"
            )
        if self.copies < 1:
            raise ValueError(f"copies must be >= 1, got {self.copies}")

    def velocity(
        self, interpolant: AbstractInterpolant, z: Float[Array, " dim"], t: TimeLike, condition: Condition = None
    ) -> Float[Array, " dim"]:
        velocity = jax.vmap(lambda part: self.mixture.velocity(interpolant, part, t, condition))
        return velocity(self._parts("z", z)).reshape(z.shape)

    def sample(self, *, key: Key[Array, ""], condition: Condition = None) -> Float[Array, " dim"]:
        keys = jr.split(key, self.copies)
        return jax.vmap(lambda key: self.mixture.sample(key=key, condition=condition))(keys).reshape(-1)

    def log_density(self, x: Float[Array, " dim"], condition: Condition = None) -> Scalar:
        """The logarithm of the density of the data: the sum over the copies."""
        return jnp.sum(jax.vmap(lambda part: self.mixture.log_density(part, condition))(self._parts("x", x)))

    def _parts(self, name: str, x: Float[Array, " dim"]) -> Float[Array, "copies part"]:
        check_point(name, x, (self.copies * self.mixture.mean.shape[1],))
        return x.reshape(self.copies, -1)
