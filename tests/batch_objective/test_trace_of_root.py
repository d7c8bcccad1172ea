import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx._batch_objective.trace_of_root import trace_of_root

DRAWS = np.random.default_rng(0)


def covariance(rank, size=6, spread=0.0):
    """With eigenvalues that fall by this many orders of magnitude."""
    basis, _ = np.linalg.qr(DRAWS.standard_normal((size, size)))
    values = np.where(np.arange(size) < rank, 10.0 ** -np.linspace(0, spread, size), 0)
    return (basis * values) @ basis.T


def expected(a, factor):
    values = np.linalg.eigvalsh(factor.T @ a @ factor)
    return np.sqrt(values[values > 1e-12 * values.max()]).sum()


@pytest.mark.parametrize("rank", [6, 3])
def test_value_and_gradient_in_float64(rank):
    a, factor, direction = covariance(rank), np.linalg.cholesky(covariance(6)), covariance(rank)
    # A direction that keeps the rank: elsewhere the root has no derivative at 0.
    direction = a @ direction @ a
    with jax.enable_x64(True):
        found = jax.value_and_grad(trace_of_root)(jnp.asarray(a), jnp.asarray(factor))
        value, gradient = map(np.asarray, found)
    np.testing.assert_allclose(value, expected(a, factor), rtol=1e-12)
    slope = (expected(a + 1e-5 * direction, factor) - expected(a - 1e-5 * direction, factor)) / 2e-5
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-8)


def test_float32_gets_eigenvalues_of_float64():
    a, factor = np.float32(covariance(6, spread=5)), np.float32(covariance(6, spread=2.5))
    value, gradient = jax.jit(jax.value_and_grad(trace_of_root))(a, factor)
    assert value.dtype == gradient.dtype == np.float32
    with jax.enable_x64(True):
        right = np.asarray(jax.grad(trace_of_root)(jnp.asarray(a, jnp.float64), jnp.asarray(factor, jnp.float64)))
    np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-6 * np.abs(right).max())
    # Small eigenvalues of the product matter most to the gradient, and float32 alone knows little of them.
    values, vectors = np.linalg.eigh(factor.T @ a @ factor)
    half = factor @ vectors / np.sqrt(np.abs(values)) ** 0.5
    assert np.abs(half @ half.T / 2 - right).max() > 1e-3 * np.abs(right).max()


def test_nan_is_seen():
    value, gradient = jax.value_and_grad(trace_of_root)(jnp.full((3, 3), jnp.nan), jnp.eye(3))
    assert np.isnan(value) and np.isnan(gradient).all()


def test_a_covariance_of_zeros_has_the_trace_and_the_gradient_zero():
    value, gradient = jax.value_and_grad(trace_of_root)(jnp.zeros((3, 3)), jnp.eye(3))
    assert value == 0 and np.all(gradient == 0)
