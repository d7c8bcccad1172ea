"""What tests of identities share: one point of a path with the velocity there, some fields, and times that are not
random."""

import jax
import jax.numpy as jnp
import numpy as np

from mf_eqx import AbstractField, AbstractTimes


def point():
    """z, v, r and t."""
    return jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6]), jnp.asarray(0.2), jnp.asarray(0.7)


class Linear(AbstractField):
    """u = A z + r b + t c: moving (z, r, t) by (w, dr, dt) changes it by A w + dr b + dt c."""

    matrix: jax.Array
    r_rate: jax.Array
    t_rate: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.matrix @ z + r * self.r_rate + t * self.t_rate


def linear():
    rng = np.random.default_rng(0)
    return Linear(*(jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), 3, 3)))


class Curved(AbstractField):
    """Nonlinear in everything."""

    matrix: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.tanh(self.matrix @ z + jnp.sin(3 * r)) + t**2 * z


def curved():
    return Curved(jnp.asarray(np.random.default_rng(0).normal(size=(3, 3))))


class Quadratic(AbstractField):
    """u = a z + b r^2 + c t."""

    a: jax.Array
    b: jax.Array
    c: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.a * z + self.b * r**2 + self.c * t


class Fixed(AbstractTimes):
    """Always the same time."""

    time: float

    def __call__(self, *, key):
        return jnp.asarray(self.time)
