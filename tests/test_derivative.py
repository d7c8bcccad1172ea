import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg

from mf_eqx import AbstractField, FusedJVP, total_derivative

pytestmark = pytest.mark.usefixtures("x64")

STEP = 1e-5
# Central differences with this step: truncation STEP^2 / 6 times a third derivative below 500, rounding near 1e-11.
TOLERANCE = 1e-8


class Curved(AbstractField):
    """Nonlinear in everything: tanh(A z + sin(3 r) a + t^2 b + c) (1 + z . z r t), plus noise z if a key is given."""

    matrix: jax.Array
    r_weight: jax.Array
    t_weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        inner = self.matrix @ z + jnp.sin(3 * r) * self.r_weight + t**2 * self.t_weight
        inner = inner if condition is None else inner + condition
        noise = 0.0 if key is None else jr.normal(key, z.shape, z.dtype) * z
        return jnp.tanh(inner) * (1 + z @ z * r * t) + noise


def curved():
    rng = np.random.default_rng(0)
    return Curved(*(jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), 3, 3)))


def point():
    return jnp.array([0.3, -1.2, 0.5]), jnp.asarray(0.2), jnp.asarray(0.7)


def direction():
    return jnp.array([1.1, 0.4, -0.6])


@pytest.mark.parametrize("condition", [None, (0.3, -0.2, 0.9)])
@pytest.mark.parametrize("seed", [None, 1])
def test_total_derivative_is_the_finite_difference_along_the_trajectory(condition, seed):
    field, (z, r, t) = curved(), point()
    condition = None if condition is None else jnp.asarray(condition)
    key = None if seed is None else jr.key(seed)
    generator = np.array([[0.1, -2.0, 0.3], [1.5, 0.2, 0.0], [0.4, -0.7, -0.5]])  # of dz/dt = generator z

    def along(time):
        return field(scipy.linalg.expm((time - t) * generator) @ z, r, jnp.asarray(time), condition, key=key)

    expected = (along(t + STEP) - along(t - STEP)) / (2 * STEP)
    _, dudt = total_derivative(field, z, generator @ z, r, t, condition, key=key)
    np.testing.assert_allclose(dudt, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("dr", "dt"), [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (-0.5, 2.0)])
def test_engine_differentiates_in_the_direction_it_is_given(dr, dt):
    field, (z, r, t), dz = curved(), point(), direction()

    def moved(step):
        return field(z + step * dz, r + step * dr, t + step * dt)

    _, derivative = FusedJVP()(field, z, r, t, None, tangent=(dz, dr, dt), key=None)
    expected = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    np.testing.assert_allclose(derivative, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", [None, 1])
def test_value_beside_the_derivative_is_the_field_itself(seed):
    field, (z, r, t), key = curved(), point(), None if seed is None else jr.key(seed)
    u, _ = total_derivative(field, z, direction(), r, t, jnp.ones(3), key=key)
    np.testing.assert_array_equal(u, field(z, r, t, jnp.ones(3), key=key))


def test_derivative_is_the_same_under_jit():
    results = [
        function(field, z, direction(), r, t)
        for field, (z, r, t) in [(curved(), point())]
        for function in (total_derivative, jax.jit(total_derivative))
    ]
    np.testing.assert_allclose(*results, rtol=1e-14)


class Constant(AbstractField):
    """Depends on nothing."""

    value: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.value


class Timeless(AbstractField):
    """Depends on the state alone."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.sin(z)


class Stateless(AbstractField):
    """Depends on the times alone."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.full_like(z, 3 * r + t**2)


def test_derivative_of_a_field_that_depends_on_nothing_is_zero():
    (z, r, t), value = point(), jnp.array([1.0, 2.0, 3.0])
    u, dudt = total_derivative(Constant(value), z, direction(), r, t)
    np.testing.assert_array_equal(u, value)
    np.testing.assert_array_equal(dudt, jnp.zeros(3))


def test_field_without_time_changes_only_as_its_state_moves():
    z, r, t = point()
    _, dudt = total_derivative(Timeless(), z, direction(), r, t)
    np.testing.assert_allclose(dudt, np.cos(z) * direction(), rtol=1e-15)


def test_field_without_time_has_derivative_zero_where_nothing_moves():
    z, r, t = point()
    _, dudt = total_derivative(Timeless(), z, jnp.zeros(3), r, t)
    np.testing.assert_array_equal(dudt, jnp.zeros(3))


def test_field_without_state_changes_only_with_t():
    z, r, t = point()
    _, dudt = total_derivative(Stateless(), z, direction(), r, t)
    np.testing.assert_allclose(dudt, jnp.full(3, 2 * t), rtol=1e-15)


def test_velocity_of_another_precision_is_cast_to_that_of_the_state():
    z, r, t = (value.astype(jnp.float32) for value in point())
    u, dudt = total_derivative(Timeless(), z, direction(), r, t)
    assert (u.dtype, dudt.dtype) == (jnp.float32, jnp.float32)
