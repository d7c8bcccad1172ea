import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, Float

from mf_eqx.metrics import ADM, CIFAR_TRAIN, collect_features, FeatureExtractor, Features, stream_moments


class Corners(eqx.Module):
    """A network that is cheap: features are pixels of the corner, logits their multiples."""

    weight: Float[Array, ""]

    def __call__(self, x: Float[Array, "rows 3 299 299"]) -> Features:
        pooled = self.weight * x[:, :, :2, 0].reshape(len(x), -1)
        return Features(pooled, 2 * pooled[:, :4])


EXTRACTOR = FeatureExtractor(Corners(jnp.asarray(1.0)), ADM)


def images(rows=20, seed=0):
    return jr.uniform(jr.key(seed), (rows, 3, 4, 4), minval=-1.0, maxval=1.0)


def test_features_are_those_of_all_images_in_their_order():
    x = images()
    samples = collect_features(EXTRACTOR, [x[:8], x[8:16], x[16:]])
    direct = EXTRACTOR.network(ADM(x))
    np.testing.assert_array_equal(samples.pooled, direct.pooled)
    np.testing.assert_array_equal(samples.logits, direct.logits)


def test_moments_are_those_of_the_features_and_say_where_they_come_from():
    x = images()
    samples = collect_features(EXTRACTOR, [x[:8], x[8:]])
    np.testing.assert_allclose(samples.moments.cov, np.cov(samples.pooled.astype(np.float64), rowvar=False), rtol=1e-11)
    assert (samples.moments.count, samples.moments.protocol) == (20, "ADM")
    assert samples.moments.weights == EXTRACTOR.digest()


def test_streamed_moments_are_those_of_collected_features():
    x = images()
    streamed = stream_moments(EXTRACTOR, (x[i : i + 5] for i in range(0, 20, 5)), count=18)
    collected = collect_features(EXTRACTOR, [x], count=18).moments
    np.testing.assert_allclose(streamed.cov, collected.cov, rtol=1e-11)
    assert streamed.count == collected.count == 18


def test_rows_beyond_the_count_are_cut_and_no_further_batch_is_drawn():
    x, drawn = images(), []

    def batches():
        for start in range(0, 20, 4):
            drawn.append(start)
            yield x[start : start + 4]

    assert len(collect_features(EXTRACTOR, batches(), count=10).pooled) == 10
    assert drawn == [0, 4, 8]


def test_padding_beyond_the_count_may_be_anything():
    x = images(8).at[5:].set(jnp.nan)
    assert np.isfinite(collect_features(EXTRACTOR, [x], count=5).pooled).all()


def test_pixels_and_samples_of_the_same_images_have_the_same_features():
    x = images()
    pixels = np.asarray(ADM.quantise(x))
    np.testing.assert_array_equal(collect_features(EXTRACTOR, [x]).pooled, collect_features(EXTRACTOR, [pixels]).pooled)


def test_grey_images_have_the_features_of_three_equal_channels():
    grey = images()[:, :1]
    colour = collect_features(EXTRACTOR, [jnp.repeat(grey, 3, axis=1)])
    np.testing.assert_array_equal(collect_features(EXTRACTOR, [grey]).pooled, colour.pooled)


def test_protocol_decides_what_the_network_sees():
    x = images()
    other = FeatureExtractor(EXTRACTOR.network, CIFAR_TRAIN)
    assert np.any(collect_features(EXTRACTOR, [x]).pooled != collect_features(other, [x]).pooled)


def test_equal_batches_compile_once():
    traced = []

    def network(x):
        traced.append(x.shape)
        return Features(x[:, 0, 0], x[:, 0, 0])

    collect_features(FeatureExtractor(network, ADM), [images(seed=seed) for seed in range(3)])
    assert len(traced) == 1


def test_digest_tells_weights_apart_and_nothing_else():
    same = FeatureExtractor(Corners(jnp.asarray(1.0)), CIFAR_TRAIN)
    assert same.digest() == EXTRACTOR.digest()
    others = [jnp.nextafter(1.0, 2.0), jnp.ones(1), jnp.asarray(1.0, jnp.float16)]
    assert len({FeatureExtractor(Corners(weight), ADM).digest() for weight in [*others, jnp.asarray(1.0)]}) == 4


def test_images_that_are_spread_over_devices_are_gathered():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = images(4 * jax.device_count())
    spread = collect_features(EXTRACTOR, [jax.device_put(x, sharding)])
    np.testing.assert_array_equal(spread.pooled, collect_features(EXTRACTOR, [x]).pooled)


def test_samples_beyond_one_are_no_pixels():
    assert len(collect_features(EXTRACTOR, [10 * images(), jnp.ones((2, 3, 4, 4))]).pooled) == 22


def test_sample_that_is_not_finite_is_named_by_its_number():
    x = images().at[13, 0, 1, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="samples must be finite, got NaN or infinity in sample 13"):
        collect_features(EXTRACTOR, [x[:8], x[8:]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("batches", "count", "message"),
    [
        ([jnp.zeros((2, 4, 4, 3))], None, r"shape \(rows, 3, height, width\) or .* got \(2, 4, 4, 3\)"),
        ([jnp.zeros((2, 2, 4, 4))], None, r"got \(2, 2, 4, 4\)"),
        ([jnp.zeros((2, 3, 4, 4), int)], None, "floating point or pixels in uint8, got int"),
        ([jnp.zeros((2, 3, 4, 4))], 3, "must hold 3 images, got 2"),
        ([], None, "must hold at least 1 images, got 0"),
        ([jnp.full((2, 3, 4, 4), 7.0)], None, r"float32 must be samples in \[-1, 1\], got numbers from 7.0 to 7.0"),
        ([np.full((2, 3, 4, 4), 255, np.float16)], None, "float16 must be samples .* got numbers from 255.0 to 255.0"),
        ([np.linspace(0.3, 254.7, 96).reshape(2, 3, 4, 4)], None, "got numbers from 0.3 to 254.7, which look like"),
        ([jnp.zeros((2, 3, 0, 4))], None, r"none of them 0, got \(2, 3, 0, 4\)"),
        ([jnp.zeros((2, 3, 4, 4))], 0, "count must be an integer >= 2, got 0"),
        ([jnp.zeros((2, 3, 4, 4))], 1, "count must be an integer >= 2, got 1"),
        ([jnp.zeros((2, 3, 4, 4))], 1.5, "count must be an integer >= 2, got 1.5"),
        ([jnp.zeros((2, 3, 4, 4))], True, "count must be an integer >= 2, got True"),
    ],
)
def test_wrong_batches_of_images_are_refused(batches, count, message):
    with pytest.raises(ValueError, match=message):
        collect_features(EXTRACTOR, batches, count)


@pytest.mark.parametrize("count", [0, 1.5])
def test_count_that_is_none_is_refused_before_anything_is_drawn(unchecked, count):
    def batches():
        raise AssertionError("a batch was drawn")
        yield

    with pytest.raises(ValueError, match="count must be "):
        stream_moments(EXTRACTOR, batches(), count)


@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_extractor_refuses_what_is_neither_samples_nor_pixels(unchecked, dtype):
    with pytest.raises(ValueError, match="x must be samples in floating point or pixels in uint8, got "):
        EXTRACTOR(jnp.ones((2, 3, 4, 4), dtype))
