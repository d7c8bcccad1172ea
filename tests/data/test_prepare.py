"""What happens to a row on the device depends on the step and the row's index in the global batch alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx.data import EDMAugmentation, FromPixels, InTurn, RandomFlip, SamplePosterior, WithoutLabel
from mf_eqx.vae import LatentStatistics

KEY = jr.key(0)


def row(x, condition=None, index=0):
    return mfx.Batch(x, condition, jnp.asarray(index))


# Pixels


@pytest.mark.parametrize("compiled", [False, True])
def test_every_pixel_has_its_value(compiled):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    prepare = jax.jit(FromPixels()) if compiled else FromPixels()
    found = np.asarray(prepare(row(pixels), KEY).x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, pixels / 127.5 - 1, rtol=0, atol=2.4e-7)  # two roundings of numbers up to 2
    np.testing.assert_array_equal(np.round((found + 1) * 127.5), pixels)


def test_pixels_stay_in_range_when_compiled():
    found = jax.jit(FromPixels())(row(np.array([0, 255], np.uint8)), KEY).x
    assert found.tolist() == [-1, 1]


def test_pixels_keep_label_and_index():
    found = FromPixels()(row(np.zeros((1, 2, 2), np.uint8), jnp.asarray(3), 5), KEY)
    assert (found.condition, found.index) == (3, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.int32, bool])
def test_what_is_no_pixels_is_refused(dtype):
    x = np.ones((1, 2, 2), dtype)
    with pytest.raises(ValueError, match=f"x must be uint8 for FromPixels, pixels 0 to 255, got {x.dtype}"):
        jax.jit(FromPixels())(row(x), KEY)


def test_pixels_that_are_augmented_before_they_are_converted_are_refused(unchecked):
    prepare = InTurn([EDMAugmentation(), FromPixels()])
    with pytest.raises(ValueError, match="x must be floating point for EDMAugmentation"):
        jax.jit(prepare)(row(np.full((3, 8, 8), 200, np.uint8)), KEY)


# Flips

IMAGE = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)


def flipped(keys, probability=0.5):
    """For each key, whether the image is mirrored; None for whatever is neither it nor its mirror image."""
    found = jax.vmap(lambda key: RandomFlip(probability)(row(jnp.asarray(IMAGE)), key).x)(keys)
    mirrored, same = ((found == image).all(axis=(1, 2, 3)) for image in (IMAGE[..., ::-1], IMAGE))
    assert bool((mirrored ^ same).all())
    return np.asarray(mirrored)


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_share_of_mirrored_images_is_the_probability(probability):
    found = flipped(jr.split(KEY, 4096), probability)
    assert abs(found.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / 4096)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_certain_flips_are_certain(probability, expected):
    assert (flipped(jr.split(KEY, 64), probability) == expected).all()


def test_same_key_gives_the_same_image():
    np.testing.assert_array_equal(flipped(jr.split(KEY, 64)), flipped(jr.split(KEY, 64)))


def test_flip_keeps_dtype_label_and_index():
    found = RandomFlip(1.0)(row(IMAGE.astype(np.uint8), jnp.asarray(3), 5), KEY)
    assert (found.x.dtype, found.condition, found.index) == (np.uint8, 3, 5)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(probability):
    with pytest.raises(ValueError, match=rf"probability must lie in \[0, 1\], got {probability}"):
        RandomFlip(probability)


# Labels


def test_row_without_its_label_keeps_everything_else():
    found = WithoutLabel()(row(IMAGE, jnp.asarray(3), 5), KEY)
    assert found.condition is None and found.index == 5
    np.testing.assert_array_equal(found.x, IMAGE)


# Posteriors

MEAN, STD = np.random.default_rng(0).uniform(0.5, 2, (2, 3, 2, 4)).astype(np.float16)
MOMENTS = np.concatenate([MEAN, STD])


ONE = LatentStatistics((0.0,), (1.0,))


def latents(keys, statistics):
    return jax.jit(jax.vmap(lambda key: SamplePosterior(statistics)(row(jnp.asarray(MOMENTS)), key).x))(keys)


@pytest.mark.parametrize("statistics", [ONE, LatentStatistics(), LatentStatistics((1.0, 2.0, -3.0), (0.1, 1.0, 10.0))])
def test_latents_have_the_mean_and_the_deviation_of_the_posterior_standardised(statistics):
    count = 5000
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in (statistics.mean, statistics.std))
    found = np.asarray(latents(jr.split(KEY, count), statistics), np.float64) * std + mean
    # Five standard errors, for each of 24 places.
    assert (np.abs(found.mean(axis=0) - MEAN) < 5 * STD / np.sqrt(count)).all()
    assert (np.abs(found.std(axis=0) / STD - 1) < 5 / np.sqrt(2 * count)).all()


def test_places_of_a_latent_are_independent():
    found = latents(jr.split(KEY, 5000), ONE).reshape(-1, MEAN.size)
    correlation = np.corrcoef(np.asarray(found), rowvar=False) - np.eye(MEAN.size)
    assert np.abs(correlation).max() < 5 / np.sqrt(5000)


def test_latent_without_deviation_is_the_mean_standardised_channel_by_channel():
    certain = np.concatenate([MEAN, np.zeros_like(STD)])
    found = SamplePosterior(LatentStatistics((0.0, 1.0, 0.0), (2.0, 2.0, 4.0)))(row(certain), KEY).x
    assert found.dtype == jnp.float32
    mean = MEAN.astype(np.float32)
    np.testing.assert_array_equal(found, np.stack([0.5 * mean[0], 0.5 * (mean[1] - 1), 0.25 * mean[2]]))


def test_latent_keeps_label_and_index():
    found = SamplePosterior()(row(MOMENTS, jnp.asarray(3), 5), KEY)
    assert (found.condition, found.index) == (3, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_moments_that_are_no_floating_point_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match=r"x must be floating point for SamplePosterior, .* got"):
        jax.jit(SamplePosterior())(row(MOMENTS.astype(dtype)), KEY)


def test_moments_of_an_odd_number_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"an even number of channels for SamplePosterior, got shape \(5, 2, 4\)"):
        SamplePosterior()(row(MOMENTS[:5]), KEY)


def test_moments_of_other_channels_than_the_statistics_are_refused():
    with pytest.raises(ValueError, match="statistics must be of 3 channels, or one number for all, got 2"):
        SamplePosterior(LatentStatistics((0.0,), (1.0, 2.0)))(row(MOMENTS), KEY)


@pytest.mark.usefixtures("unchecked")
def test_a_number_in_the_place_of_statistics_is_refused():
    with pytest.raises(ValueError, match=r"statistics must be .*LatentStatistics, got 0\.18215"):
        SamplePosterior(0.18215)


def test_latent_of_float64_moments_is_float64_where_jax_keeps_it(x64):
    certain = np.concatenate([np.full_like(MEAN, 1e300, np.float64), np.zeros_like(STD, np.float64)])
    assert (SamplePosterior(ONE)(row(jnp.asarray(certain)), KEY).x == 1e300).all()


# Parts


class AddNoise(eqx.Module):
    """Adds a normal draw to every value."""

    def __call__(self, row, key):
        return mfx.Batch(row.x + jr.normal(key, row.x.shape), row.condition, row.index)


def test_parts_are_applied_in_turn():
    def double(row, key):
        return mfx.Batch(2 * row.x, row.condition, row.index)

    pixels = np.full((1, 1, 2), 255, np.uint8)
    assert (InTurn([FromPixels(), double])(row(pixels), KEY).x == 2).all()
    assert (InTurn([])(row(pixels), KEY).x == pixels).all()


def test_every_part_has_a_key_of_its_own():
    nothing = row(jnp.zeros(3))
    one, two = InTurn([AddNoise()])(nothing, KEY).x, InTurn([AddNoise(), AddNoise()])(nothing, KEY).x
    assert not np.isin(two - one, one).any() and (two != 2 * one).all()


def test_part_draws_the_same_wherever_the_parts_before_end():
    """The second part's key does not depend on what the first draws from its own."""
    firsts = (RandomFlip(), jnp.zeros(3)), (FromPixels(), jnp.zeros(3, jnp.uint8))
    found = [InTurn([first, AddNoise()])(row(x), KEY).x for first, x in firsts]
    np.testing.assert_allclose(found[0], found[1] + 1, rtol=1e-6)


# Inside a step


class Seen(mfx.AbstractMeanObjective):
    """Reports the rows that it was given."""

    def __call__(self, field, batch, *, key, context=None):
        loss = jnp.sum(field.weight**2)
        return loss, {"loss": mfx.Mean(loss, jnp.ones(())), "x": mfx.Mean(batch.x, jnp.ones_like(batch.x))}


class Weight(mfx.AbstractField):
    """No field at all."""

    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z


def prepared(batch, step=0, accumulation=1):
    """The rows of one step as the objective sees them."""
    optimizer = optax.sgd(0.1)
    train_step = mfx.TrainStep(
        Seen(), optimizer, prepare=InTurn([FromPixels(), RandomFlip(), AddNoise()]), accumulation=accumulation
    )
    state = mfx.init_state(Weight(jnp.ones(2)), optimizer, key=jr.key(1))
    state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(step, jnp.int32))
    return np.asarray(train_step(state, batch)[1]["x"].value)


ROWS = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (ROWS, 1, 2, 3)).astype(np.uint8)


def test_row_is_augmented_by_its_step_and_index_wherever_it_stands():
    whole, order = prepared(mfx.Batch(PIXELS)), np.random.default_rng(1).permutation(ROWS)
    shuffled = prepared(mfx.Batch(PIXELS[order], index=order.astype(np.int32)))
    np.testing.assert_array_equal(shuffled, whole[order])
    part = prepared(mfx.Batch(PIXELS[5:7], index=np.array([5, 6], np.int32)))
    np.testing.assert_array_equal(part, whole[5:7])


def test_rows_and_steps_are_augmented_each_in_its_own_way():
    equal = mfx.Batch(np.broadcast_to(PIXELS[:1], PIXELS.shape))
    found = np.concatenate([prepared(equal, step) for step in (0, 1)]).reshape(2 * ROWS, -1)
    assert len(np.unique(found, axis=0)) == 2 * ROWS


def test_other_pixels_of_a_row_are_augmented_in_the_same_way():
    """Rows at the same place of the global batch at the same step get the same noise, whatever they are."""
    black, white = (prepared(mfx.Batch(np.full_like(PIXELS, value))) for value in (0, 255))
    np.testing.assert_allclose(white - black, 2, atol=1e-5)
