"""A generator whose samples are known in closed form, for the tests of losses on samples."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mf_eqx as mfx


class Affine(mfx.AbstractField):
    """One step makes A eps + b of noise, or A eps + b + c under the condition c."""

    matrix: jax.Array
    shift: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        shift = self.shift if condition is None else self.shift + condition
        return z - self.matrix @ z - shift


def affine(dtype=jnp.float32):
    return Affine(jnp.array([[1.0, 0.3], [0.0, 0.8]], dtype), jnp.array([0.1, 0.2], dtype))


def noise(key, rows=64, dtype=jnp.float32):
    """That of a `SampleObjective` for rows 0, 1, ..."""
    return np.asarray(jax.vmap(lambda row: jr.normal(jr.fold_in(key, row), (2,), dtype))(jnp.arange(rows)), np.float64)


def samples(field, key, rows=64):
    return noise(key, rows) @ np.asarray(field.matrix, np.float64).T + np.asarray(field.shift, np.float64)
