"""Densities of samples against those that are known: of exact fields, of affine ones, and of a map that folds."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled, FusedAttention, GaussianField
from jax.scipy.stats import multivariate_normal

import mf_eqx as mfx
from mf_eqx import exact, metrics

pytestmark = pytest.mark.usefixtures("x64")

GRIDS = [(1.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.75, 0.5, 0.1, 0.0)]


def noise(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape))


def mixture():
    mean, std = jnp.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), jnp.array([0.2, 0.3, 0.4])
    return exact.GaussianMixture(mean, std, jnp.array([0.5, 0.2, 0.3]), jnp.array([0, 1, 1]))


class Affine(mfx.AbstractField):
    """u = A z + b, whatever the times."""

    matrix: jax.Array
    offset: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return (self.matrix @ z.reshape(-1)).reshape(z.shape) + self.offset


class Folding(mfx.AbstractField):
    """One step takes the absolute value of the noise: two noises make each sample."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return (z - jnp.abs(z)) / (t - r)


# Exact fields


@pytest.mark.parametrize("times", [GRIDS[0], GRIDS[2]])
@pytest.mark.parametrize("label", [None, np.arange(20) % 2], ids=["whole", "by label"])
def test_density_of_the_exact_field_of_a_mixture_is_that_of_the_mixture(times, label):
    field = exact.AverageVelocity(exact.MarginalVelocity(mixture()))

    @jax.jit
    @jax.vmap
    def draw(eps, label):
        made = mfx.sample_with_log_density(field, eps, label, times=times)
        return made.log_density, made.orientation, mixture().log_density(made.x, label)

    log_density, orientation, expected = draw(noise(20, 2), label)
    np.testing.assert_allclose(log_density, expected, rtol=0, atol=1e-7)  # seen: 7e-9; the solver's tolerance is 1e-10
    np.testing.assert_array_equal(orientation, 1)


@pytest.mark.parametrize("times", GRIDS)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (3, 2, 2)], ids=str)
def test_density_of_the_exact_field_of_a_gaussian_is_normal(times, shape):
    mean = 0.3 * jnp.arange(np.prod(shape), dtype=float).reshape(shape)
    field = exact.GaussianAverageVelocity(mean, 0.4)
    x, log_density, orientation = mfx.sample_with_log_density(field, noise(*shape), times=times)
    covariance = 0.4**2 * jnp.eye(x.size)
    expected = multivariate_normal.logpdf(x.reshape(-1), mean.reshape(-1), covariance)
    np.testing.assert_allclose(log_density, expected, rtol=1e-12)
    assert orientation == 1


def test_exact_field_has_no_divergence_from_the_truth_and_another_gaussian_the_known_one():
    mean, std, other = jnp.array([1.0, -0.5]), 0.4, 0.5
    field = exact.GaussianAverageVelocity(mean, other)
    x, log_density, _ = jax.vmap(lambda eps: mfx.sample_with_log_density(field, eps))(noise(20_000, 2))
    for truth, expected in ((other, 0.0), (std, (other / std) ** 2 - 1 - 2 * np.log(other / std))):
        true = jax.vmap(exact.GaussianMixture(mean[None], truth).log_density)(x)
        found = metrics.reverse_kullback_leibler(log_density, true)
        assert abs(found.divergence - expected) < 4 * found.standard_error + 1e-12
        assert found.standard_error < 0.01 and (expected == 0) == (found.effective_share > 1 - 1e-9)


# Fields by hand


@pytest.mark.parametrize("times", GRIDS)
def test_density_of_an_affine_field_is_that_of_its_steps(times):
    matrix, offset = jr.normal(jr.key(1), (3, 3)), jnp.array([0.5, -1.0, 2.0])
    field, z, steps = Affine(matrix, offset), noise(3), np.eye(3)
    for t, r in itertools.pairwise(times):
        z, steps = z - (t - r) * field(z, r, t), (np.eye(3) - (t - r) * np.asarray(matrix)) @ steps
    x, log_density, orientation = mfx.sample_with_log_density(field, noise(3), times=times)
    np.testing.assert_allclose(x, z, rtol=1e-13)
    center = x - steps @ noise(3)
    np.testing.assert_allclose(log_density, multivariate_normal.logpdf(x, center, steps @ steps.T), rtol=1e-10)
    assert orientation == np.sign(np.linalg.det(steps))


def test_map_that_turns_space_over_shows_in_the_orientation():
    made = mfx.sample_with_log_density(Affine(jnp.diag(jnp.array([2.0, 0.0])), jnp.zeros(2)), noise(2))
    np.testing.assert_allclose(made.x, noise(2) * jnp.array([-1, 1]))
    assert made.orientation == -1
    np.testing.assert_allclose(made.log_density, jax.scipy.stats.norm.logpdf(noise(2)).sum(), rtol=1e-13)


def test_map_that_loses_a_dimension_has_infinite_density():
    made = mfx.sample_with_log_density(Affine(jnp.diag(jnp.array([1.0, 0.0])), jnp.zeros(2)), noise(2))
    assert made.log_density == jnp.inf and made.orientation == 0


def test_folding_map_has_a_bound_and_shows_in_signs_and_in_the_mean_weight():
    eps = noise(4000, 1)
    x, log_density, orientation = jax.vmap(lambda eps: mfx.sample_with_log_density(Folding(), eps))(eps)
    half_normal = jax.scipy.stats.norm.logpdf(x[:, 0]) + np.log(2)
    np.testing.assert_allclose(log_density, half_normal - np.log(2), rtol=1e-12)  # one of two equal terms
    np.testing.assert_array_equal(orientation, jnp.sign(eps[:, 0]))
    found = metrics.reverse_kullback_leibler(log_density, half_normal)
    np.testing.assert_allclose(found.divergence, -np.log(2), rtol=1e-12)  # the truth is 0
    np.testing.assert_allclose(found.mean_weight, 2, rtol=1e-12)  # noises for each point


# As a sampler


@pytest.mark.parametrize("times", GRIDS)
def test_samples_are_those_of_the_sampler(times):
    field = filled(lambda: mfx.MLP(2, width=8, depth=1, labels=3, key=jr.key(0)))
    eps = noise(2).astype(jnp.float32)
    made = mfx.sample_with_log_density(field, eps, 2, times=times)
    np.testing.assert_allclose(made.x, mfx.sample(field, eps, 2, times=times), rtol=1e-6)
    assert {value.dtype for value in made} == {jnp.dtype("float32")}
    assert made.log_density != mfx.sample_with_log_density(field, eps, 1, times=times).log_density


def test_sum_over_two_intervals_is_that_of_its_parts():
    field, eps = GaussianField(jnp.array([1.0, -0.5]), 0.4), noise(2)
    middle = mfx.sample_with_log_density(field, eps, times=(1.0, 0.4))
    last = mfx.sample_with_log_density(field, middle.x, times=(0.4, 0.0))
    change = last.log_density - jax.scipy.stats.norm.logpdf(middle.x).sum()
    whole = mfx.sample_with_log_density(field, eps, times=(1.0, 0.4, 0.0))
    np.testing.assert_allclose(whole.log_density, middle.log_density + change, rtol=1e-12)


def test_jit_and_eager_and_unrolled_agree_under_strict_promotion_of_types():
    field, eps = GaussianField(jnp.array([1.0, -0.5]), 0.4), noise(2)
    draw = functools.partial(mfx.sample_with_log_density, times=GRIDS[2])
    with jax.numpy_dtype_promotion("strict"):
        expected = draw(field, eps)
        for found in (jax.jit(draw)(field, eps), draw(field, eps, unroll=True)):
            np.testing.assert_allclose(jnp.stack(found[1:]), jnp.stack(expected[1:]), rtol=1e-13)


def test_gradient_of_a_log_density_is_that_of_finite_differences():
    field = filled(lambda: mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
    field = jax.tree.map(lambda leaf: leaf.astype(float) if eqx.is_array(leaf) else leaf, field)
    density = jax.jit(lambda eps: mfx.sample_with_log_density(field, eps).log_density)
    eps, step = noise(2), 1e-5
    slopes = [(density(eps + step * d) - density(eps - step * d)) / (2 * step) for d in jnp.eye(2)]
    np.testing.assert_allclose(jax.grad(density)(eps), jnp.stack(slopes), rtol=1e-6)


@pytest.mark.parametrize(
    ("eps", "times", "message"),
    [
        ([1.0, 2.0], (0.0, 1.0), "times must be a strictly decreasing sequence"),
        ([1.0, 2.0], (1.0,), "times must be a strictly decreasing sequence"),
        ([], (1.0, 0.0), r"eps must hold at least one value, got shape \(0,\)"),
    ],
)
def test_what_a_sampler_refuses_is_refused(eps, times, message):
    with pytest.raises(ValueError, match=message):
        mfx.sample_with_log_density(GaussianField(jnp.zeros(2), 0.4), eps, times=times)


@pytest.mark.usefixtures("unchecked")
def test_fields_that_are_none_are_refused():
    with pytest.raises(ValueError, match="field must be callable as field"):
        mfx.sample_with_log_density(lambda z: z, noise(2))
    with pytest.raises(ValueError, match=r"must return the shape of z, \(2,\), got \(2, 2\)"):
        mfx.sample_with_log_density(Affine(jnp.eye(2), jnp.zeros(4).reshape(2, 2)), noise(2))


# Kernels without forward mode


def test_field_without_forward_mode_is_refused():
    fused = jax.custom_vjp(lambda x: 2 * x)
    fused.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (2 * cotangent,))

    class Fused(mfx.AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return fused(z)

    with pytest.raises(ValueError, match="field must be differentiable in forward mode"):
        jax.vmap(lambda eps: mfx.sample_with_log_density(Fused(), eps))(noise(3, 2))


def test_fused_attention_is_replaced_and_a_gradient_that_would_lack_a_part_is_refused():
    size = mfx.DiTSize(depth=1, width=12, heads=2, patch=1)

    def density(attention, eps):
        field = filled(lambda: mfx.DiT((2, 2, 2), size, attention=attention, key=jr.key(0)))
        return mfx.sample_with_log_density(field, eps).log_density

    def gradient(attention):
        return jax.eval_shape(jax.grad(functools.partial(density, attention)), eps)

    fused, plain = FusedAttention(), mfx.nn.XLAAttention()
    eps = noise(2, 2, 2).astype(jnp.float32)
    found, expected = (jax.jit(functools.partial(density, attention))(eps) for attention in (fused, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient(plain)
    with pytest.raises(ValueError, match="must be behind stop_gradient"):
        gradient(fused)
