import functools
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

from mf_eqx import AbstractField, LinearInterpolant, total_derivative, TrigonometricInterpolant
from mf_eqx.exact import AverageVelocity, GaussianAverageVelocity, GaussianMixture, MarginalVelocity

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def velocity(path=None):
    mean = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    mixture = GaussianMixture(mean, np.array([0.3, 0.5, 0.4]), label=np.array([0, 1, 1]))
    return MarginalVelocity(mixture, path or LinearInterpolant())


@eqx.filter_jit
def evaluate(field, z, r, t, condition=None):
    return jax.vmap(lambda z, r, t: field(z, r, t, condition))(z, r, t)


def points(number: int = 8):
    z = jr.normal(jr.key(0), (number, 2))
    r, t = jnp.sort(jr.uniform(jr.key(1), (2, number)), axis=0)
    return z, r.at[0].set(0.0), t.at[:2].set(1.0)


@pytest.mark.parametrize("path", [LinearInterpolant(), TrigonometricInterpolant()])
def test_field_equals_the_displacement_found_by_an_independent_solver(path):
    z, r, t = points()
    found = evaluate(AverageVelocity(velocity(path)), z, r, t)

    @jax.jit
    def slope(s, states):  # of all points at once: s goes from 0 to 1 while their times go from t to r
        return (jax.vmap(velocity(path))(states.reshape(z.shape), t + s * (r - t)) * (r - t)[:, None]).ravel()

    solved = scipy.integrate.solve_ivp(slope, (0.0, 1.0), np.ravel(z), "DOP853", rtol=1e-11, atol=1e-12)
    displacement = np.asarray(z) - solved.y[:, -1].reshape(z.shape)
    np.testing.assert_allclose(found, displacement / np.asarray(t - r)[:, None], rtol=1e-8, atol=1e-8)


def test_field_at_equal_times_is_the_velocity_to_rounding():
    z, _, t = points()
    np.testing.assert_allclose(
        evaluate(AverageVelocity(velocity()), z, t, t), jax.jit(jax.vmap(velocity()))(z, t), rtol=1e-15, atol=1e-15
    )


def test_total_derivative_at_equal_times_is_half_the_acceleration():
    z, _, t = points()
    v = velocity()

    def derivatives(z, t):
        rate = v(z, t)
        _, acceleration = jax.jvp(v, (z, t), (rate, jnp.ones_like(t)))
        return total_derivative(AverageVelocity(v), z, rate, t, t)[1], acceleration

    dudt, acceleration = jax.jit(jax.vmap(derivatives))(z, t)
    np.testing.assert_allclose(dudt, acceleration / 2, rtol=1e-12, atol=1e-12)


def test_jvp_through_the_solver_equals_finite_differences():
    z, r, t = points(3)
    field, step = AverageVelocity(velocity(), rtol=1e-12, atol=1e-12), 1e-4

    def in_direction(direction, z, r, t):
        def at(s):
            return field(z + s * direction[0], r + s * direction[1], t + s * direction[2])

        _, tangent = jax.jvp(at, (jnp.asarray(0.0),), (jnp.asarray(1.0),))
        return tangent, (at(jnp.asarray(step)) - at(jnp.asarray(-step))) / (2 * step)

    over_points = jax.vmap(in_direction, in_axes=(None, 0, 0, 0))
    tangent, difference = jax.jit(jax.vmap(over_points, in_axes=(0, None, None, None)))(jnp.eye(3), z, r, t)
    # Truncation is about step^2 times a third derivative that reaches some tens here.
    np.testing.assert_allclose(tangent, difference, atol=1e-6)


def test_function_and_module_give_the_same_field_and_get_the_condition():
    z, r, t = points()
    v = velocity()
    plain = evaluate(AverageVelocity(lambda z, t, condition: v(z, t, 1 - condition)), z, r, t, jnp.asarray(0))
    np.testing.assert_allclose(plain, evaluate(AverageVelocity(v), z, r, t, jnp.asarray(1)), rtol=1e-12)
    assert np.abs(plain - evaluate(AverageVelocity(v), z, r, t)).max() > 0.1


def test_of_a_field_the_velocity_is_what_it_is_at_equal_times():
    gaussian = GaussianAverageVelocity(np.array([0.7, -1.2]), 0.4)

    class Network(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return condition * gaussian(z, t, t)  # not an average at r < t

    z, r, t = points()
    found = evaluate(AverageVelocity(Network()), z, r, t, jnp.asarray(1.0))
    np.testing.assert_allclose(found, evaluate(gaussian, z, r, t), rtol=1e-8, atol=1e-9)


def test_one_example_outside_of_jit_equals_the_batch_inside():
    z, r, t = points()
    field = AverageVelocity(velocity())
    np.testing.assert_allclose(field(z[1], r[1], t[1]), evaluate(field, z, r, t)[1], rtol=1e-9)


def test_outside_of_jit_equal_fields_are_compiled_once():
    z, r, t = points()
    traced = []

    class Counted(eqx.Module):
        def __call__(self, z, t, condition):
            traced.append(t)
            return -z

    AverageVelocity(Counted())(z[0], r[0], t[0])
    number = len(traced)
    AverageVelocity(Counted())(z[1], r[1], t[1])
    assert len(traced) == number > 0


def test_another_solver_agrees():
    z, r, t = points()
    solver = diffrax.Tsit5()
    np.testing.assert_allclose(
        evaluate(AverageVelocity(velocity(), solver=solver), z, r, t),
        evaluate(AverageVelocity(velocity()), z, r, t),
        atol=1e-8,
    )


def test_float32_state_with_float64_tolerance_is_refused_with_the_way_out():
    z, r, t = (values.astype(jnp.float32) for values in points(1))
    with pytest.raises(ValueError, match=r"float32.*jax.enable_x64\(True\).*got rtol = 1e-10, atol = 1e-10"):
        AverageVelocity(velocity())(z[0], r[0], t[0])


def test_float32_works_at_its_own_tolerance():
    z, r, t = points()
    expected = evaluate(AverageVelocity(velocity()), z, r, t)
    with jax.enable_x64(False):
        mixture = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), velocity().distribution)
        inputs = [jnp.asarray(np.asarray(values), jnp.float32) for values in (z, r, t)]
        u = evaluate(AverageVelocity(MarginalVelocity(mixture), rtol=1e-5, atol=1e-5), *inputs)
    assert u.dtype == jnp.float32
    np.testing.assert_allclose(u, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": -1e-9}, "rtol must be >= 0 and finite, got -1e-09"),
        ({"atol": 0.0}, "atol must be > 0 and finite, got 0.0"),
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        AverageVelocity(velocity(), **arguments)


def test_solve_that_needs_too_many_steps_raises():
    z, r, t = points(1)
    with pytest.raises(Exception, match="maximum number of solver steps"):
        jax.block_until_ready(AverageVelocity(velocity(), max_steps=3)(z[0], r[0], t[0]))


def test_a_thousand_points_with_derivative_take_15_seconds_of_two_cores_at_most():
    angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    v = MarginalVelocity(GaussianMixture(2 * np.stack([np.cos(angle), np.sin(angle)], axis=1), 0.3))
    inputs = points(1000)
    start = time.process_time()  # of all threads, so that a busy machine does not fail the test
    pair = jax.jit(jax.vmap(lambda z, r, t: total_derivative(AverageVelocity(v), z, v(z, t), r, t)))(*inputs)
    jax.block_until_ready(pair)
    assert time.process_time() - start < 2 * 15  # compiling included; about 2 on an idle machine
