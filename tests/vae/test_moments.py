"""Latents of one image and of a whole data set: their divergence, and the numbers that bring them to one unit."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import vae

DRAWS = np.random.default_rng(2)
LATENTS = 5 * DRAWS.standard_normal((50, 3, 4, 4)) * np.array([0.1, 1.0, 7.0])[:, None, None] + 2


def test_divergence_is_the_integral_of_its_definition(x64):
    mean, std = 0.7, 0.4
    z = np.linspace(mean - 12 * std, mean + 12 * std, 20_001)
    log_q = -0.5 * ((z - mean) / std) ** 2 - np.log(std)
    integral = np.trapezoid(np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q + 0.5 * z**2), z)
    found = vae.Moments(jnp.full((1, 2, 3), mean), jnp.full((1, 2, 3), std)).divergence()
    np.testing.assert_allclose(found, 6 * integral, rtol=1e-10)


def test_divergence_is_zero_for_the_standard_normal_alone():
    shape = (2, 3, 3)
    assert vae.Moments(jnp.zeros(shape), jnp.ones(shape)).divergence() == 0
    for mean, std in ((0.1, 1.0), (0.0, 1.1), (0.0, 0.9)):
        assert vae.Moments(jnp.full(shape, mean), jnp.full(shape, std)).divergence() > 0.01


def test_standardised_latents_have_mean_zero_and_deviation_one_in_every_channel():
    statistics = vae.LatentStatistics.of(LATENTS, np.zeros_like(LATENTS))
    z = jax.vmap(statistics.standardise)(jnp.asarray(LATENTS, jnp.float32))
    np.testing.assert_allclose(z.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=(0, 2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(statistics.restore)(z), LATENTS, rtol=1e-5, atol=1e-5)
    assert statistics.std[2] > 50 * statistics.std[0]  # so that one number for all channels would not do


def test_statistics_are_those_of_latents_that_are_drawn():
    mean, std = jnp.asarray(LATENTS, jnp.float32), jnp.full(LATENTS.shape, 3.0)
    statistics = vae.LatentStatistics.of(mean, std)
    keys = jr.split(jr.key(0), (40, 50))
    drawn = jax.vmap(jax.vmap(lambda m, s, key: vae.Moments(m, s).sample(key=key)), (None, None, 0))(mean, std, keys)
    # Five standard errors of 32,000 draws in each channel.
    np.testing.assert_allclose(drawn.std(axis=(0, 1, 3, 4)), statistics.std, rtol=5 / 250)
    assert vae.LatentStatistics.of(mean, 0 * std).std[0] < 0.2 * statistics.std[0]


def test_default_is_the_scale_of_stable_diffusion():
    z = vae.LatentStatistics().standardise(jnp.full((4, 1, 1), 2.0))
    np.testing.assert_allclose(z, 2 * vae.SCALE, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_lists_become_tuples_so_that_programs_can_depend_on_them():
    found = vae.LatentStatistics([0, 1], [np.float32(0.5)])
    assert found == vae.LatentStatistics((0.0, 1.0), (0.5,)) and hash(found) == hash(dataclasses.replace(found))
    assert {type(number) for number in (*found.mean, *found.std)} == {float}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"mean": (np.nan,)}, r"mean must be at least one number, finite in float32, got \(nan,\)"),
        ({"mean": ()}, r"mean must be at least one number, finite in float32, got \(\)"),
        ({"mean": (10**400,)}, "mean must be at least one number, finite in float32"),
        ({"mean": ("1",)}, r"mean must be at least one number, finite in float32, got \('1',\)"),
        ({"mean": (True,)}, r"mean must be at least one number, finite in float32, got \(True,\)"),
        ({"mean": 1.0}, r"mean must be a tuple or a list, such as \(0.0,\), got 1.0"),
        ({"mean": "12"}, r"mean must be a tuple or a list, such as \(0.0,\), got '12'"),
        ({"std": np.ones(2)}, r"std must be a tuple or a list, such as \(0.0,\), got array"),
        ({"std": (1.0, 0.0)}, r"std must be > 0 in float32, got \(1.0, 0.0\)"),
        ({"std": (1e-50,)}, r"std must be > 0 in float32, got \(1e-50,\)"),
        ({"std": (np.inf,)}, "std must be at least one number, finite in float32"),
        ({"mean": (1.0, 2.0), "std": (1.0, 2.0, 3.0)}, "mean must have as many numbers as std, got 2 and 3"),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        vae.LatentStatistics(**numbers)


def test_channels_that_never_change_are_refused():
    with pytest.raises(ValueError, match="std must be > 0 in float32"):
        vae.LatentStatistics.of(np.zeros((3, 2, 1, 1)), np.zeros((3, 2, 1, 1)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("of_mean", "of_std"), [((3, 2, 1, 1), (4, 2, 1, 1)), ((2, 1, 1),) * 2, ((0, 2, 1, 1),) * 2])
def test_moments_that_do_not_belong_together_are_refused(of_mean, of_std):
    with pytest.raises(ValueError, match=r"mean and std must have the same shape \(images, latent, height, width\)"):
        vae.LatentStatistics.of(np.ones(of_mean), np.ones(of_std))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("statistics", [vae.LatentStatistics(), vae.LatentStatistics((0.0,), (1.0, 2.0))])
@pytest.mark.parametrize("method", ["standardise", "restore"])
def test_a_batch_is_refused_even_if_it_has_as_many_latents_as_channels(method, statistics):
    with pytest.raises(ValueError, match=r"latent must be \(channels, height, width\), .* got \(2, 2, 1, 1\)"):
        getattr(statistics, method)(jnp.zeros((2, 2, 1, 1)))


@pytest.mark.parametrize("method", ["standardise", "restore"])
def test_latents_of_other_channels_are_refused(method):
    statistics = vae.LatentStatistics((0.0,), (1.0, 2.0))
    with pytest.raises(ValueError, match="statistics must be of 3 channels, or one number for all, got 2"):
        getattr(statistics, method)(jnp.zeros((3, 1, 1)))
