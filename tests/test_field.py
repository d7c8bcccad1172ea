from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import AbstractField
from mf_eqx._field import stopped

pytestmark = pytest.mark.usefixtures("x64")


class Affine(AbstractField):
    """A user's field: u = activation(matrix z) + t, with leaves of every kind."""

    matrix: jax.Array
    offset: jax.Array
    activation: Callable

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.activation(self.matrix @ z) + t + self.offset[0]


def affine():
    return Affine(jnp.asarray(np.random.default_rng(0).normal(size=(2, 2))), jnp.array([3, 4]), jnp.tanh)


def point():
    return jnp.array([0.3, -1.2]), jnp.asarray(0.2), jnp.asarray(0.7)


def test_field_without_a_call_cannot_be_made():
    class Nothing(AbstractField):
        pass

    with pytest.raises(TypeError, match="__call__"):
        Nothing()


def test_stopped_field_has_the_same_values():
    np.testing.assert_array_equal(stopped(affine())(*point()), affine()(*point()))


def test_no_gradient_reaches_the_parameters_of_a_stopped_field():
    def norm(field, stop):
        return jnp.sum((stopped(field) if stop else field)(*point()) ** 2)

    gradient, control = (eqx.filter_grad(norm)(affine(), stop) for stop in (True, False))
    assert (control.matrix != 0).all()
    np.testing.assert_array_equal(gradient.matrix, 0)


def test_stopped_field_is_still_differentiable_in_its_state():
    z, r, t = point()
    derivatives = [jax.jacfwd(lambda z, field=field: field(z, r, t))(z) for field in (stopped(affine()), affine())]
    assert (derivatives[1] != 0).all()
    np.testing.assert_array_equal(*derivatives)


def test_stopping_keeps_leaves_that_are_no_parameters():
    field = affine()
    assert stopped(field).activation is field.activation
    assert stopped(field).offset is field.offset
