"""The tokenizer against diffusers' own, in torch: the numbers that torch made are kept in autoencoder.npz, in float64.

PYTHONPATH=.:tests python tests/vae/test_autoencoder.py         writes them anew (needs the extra `parity`)
"""

import functools
import pathlib
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from diffusers_files import shapes, tensors, TINY, write_file
from random_tensors import random_tensor

from mf_eqx import vae

FROZEN = pathlib.Path(__file__).with_name("autoencoder.npz")
IMAGE = (3, 12, 20)  # height and width differ, so that neither can stand for the other; odd numbers of places


def image(shape=IMAGE):
    """About as bright as images are."""
    return np.clip(5 * random_tensor("image", (1, *shape))[0], -1, 1)


def latent(size, shape=IMAGE):
    factor = 2 ** (len(size.widths) - 1)
    height, width = shape[1] // factor, shape[2] // factor
    return 10 * random_tensor("latent", (size.latent, height * width)).reshape(size.latent, height, width)


@functools.cache
def tokenizer(size=TINY, dtype="float32"):
    """With the weights of `tensors`, by way of a file."""
    pytest.importorskip("safetensors")
    with tempfile.TemporaryDirectory() as folder, jax.enable_x64(False):
        path = write_file(pathlib.Path(folder) / "tokenizer.safetensors", tensors(size))
        return vae.load_autoencoder(path, size, dtype=jnp.dtype(dtype))


@eqx.filter_jit
def all_outputs(network, x, z):
    with jax.default_matmul_precision("highest"):
        moments = network.encode(x)
        return {"mean": moments.mean, "std": moments.std, "image": network.decode(z)}


def by_torch(size, dtype, shape=IMAGE):
    """What diffusers computes from the same weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL(
        block_out_channels=size.widths,
        down_block_types=["DownEncoderBlock2D"] * len(size.widths),
        up_block_types=["UpDecoderBlock2D"] * len(size.widths),
        layers_per_block=size.blocks,
        latent_channels=size.latent,
        norm_num_groups=size.groups,
    )
    network.load_state_dict({name: torch.from_numpy(np.asarray(t)) for name, t in tensors(size).items()})
    network = network.eval().to(getattr(torch, dtype))
    with torch.no_grad():
        posterior = network.encode(torch.from_numpy(image(shape))[None].to(network.dtype)).latent_dist
        decoded = network.decode(torch.from_numpy(latent(size, shape))[None].to(network.dtype)).sample
    found = {"mean": posterior.mean, "std": posterior.std, "image": decoded}
    return {name: value[0].numpy() for name, value in found.items()}


def assert_near(found, expected, tolerance):
    """Relative to the largest value."""
    for name in ("mean", "std", "image"):
        assert found[name].shape == expected[name].shape
        error = np.abs(np.asarray(found[name]) - expected[name]).max() / np.abs(expected[name]).max()
        assert error < tolerance, (name, error)


# Against diffusers


def test_moments_and_images_are_those_of_diffusers():
    assert_near(all_outputs(tokenizer(), image(), latent(TINY)), np.load(FROZEN), 1e-5)


def test_moments_and_images_are_those_of_diffusers_to_twelve_digits(x64):
    found = all_outputs(tokenizer(dtype="float64"), jnp.float64(image()), jnp.float64(latent(TINY)))
    assert found["mean"].dtype == found["std"].dtype == found["image"].dtype == jnp.float64
    assert_near(found, np.load(FROZEN), 1e-12)


def test_frozen_numbers_depend_on_places():
    # Otherwise attention, padding and the order of places would not be compared.
    frozen = np.load(FROZEN)
    assert all(np.std(frozen[name], axis=(1, 2)).min() > 0.03 for name in ("mean", "image"))


@pytest.mark.parity
def test_frozen_numbers_are_what_torch_gives():
    assert_near(by_torch(TINY, "float64"), np.load(FROZEN), 1e-12)


@pytest.mark.parity
def test_names_and_shapes_are_those_of_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = diffusers.AutoencoderKL(
            block_out_channels=vae.SD_VAE.widths,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == shapes(vae.SD_VAE)


@pytest.mark.slow
@pytest.mark.parity
def test_the_full_size_is_that_of_diffusers():
    shape = (3, 64, 64)
    expected = by_torch(vae.SD_VAE, "float32", shape)
    assert_near(all_outputs(tokenizer(vae.SD_VAE), image(shape), latent(vae.SD_VAE, shape)), expected, 1e-4)


# Size


def structure(size, **options):
    """A tokenizer with shapes in place of arrays: made at once, and enough for whatever is refused."""
    return eqx.filter_eval_shape(lambda key: vae.Autoencoder(size, **options, key=key), jr.key(0))


def test_the_full_size_has_exactly_the_parameters_of_the_published_one():
    assert sum(leaf.size for leaf in jax.tree.leaves(structure(vae.SD_VAE))) == 83_653_863


def test_the_full_size_makes_latents_of_four_channels_an_eighth_as_large():
    x, key = jax.ShapeDtypeStruct((3, 256, 256), jnp.float32), jr.key(0)
    z = eqx.filter_eval_shape(lambda network, x: network.encode(x).sample(key=key), structure(vae.SD_VAE), x)
    assert z.shape == (4, 32, 32)
    assert eqx.filter_eval_shape(lambda network, z: network.decode(z), structure(vae.SD_VAE), z).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, r"size must be positive throughout, got AutoencoderSize\(widths=\(\)"),
        ({"channels": 0}, r"size must be positive throughout, got .*channels=0"),
        ({"blocks": 0}, r"size must be positive throughout, got .*blocks=0"),
        ({"widths": (4, 7)}, r"widths must be multiples of the 2 groups, got \(4, 7\)"),
    ],
)
def test_a_size_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vae.Autoencoder(TINY._replace(**change), key=jr.key(0))


def test_a_dtype_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be floating point, got .*int32"):
        vae.Autoencoder(TINY, dtype=jnp.int32, key=jr.key(0))


def test_a_fresh_tokenizer_tells_images_apart():
    size = vae.AutoencoderSize(widths=(2, 4), blocks=1, latent=2, groups=1)
    network = vae.Autoencoder(size, key=jr.key(0, impl="rbg"))  # compiled sooner than threefry
    found = all_outputs(network, image((3, 4, 6)), jnp.ones((2, 2, 3)))
    other = all_outputs(network, -image((3, 4, 6)), jnp.zeros((2, 2, 3)))
    assert found["mean"].shape == (2, 2, 3) and found["image"].shape == (3, 4, 6)
    assert all(0.001 < np.abs(found[name] - other[name]).max() < 100 for name in found)


def test_a_tokenizer_of_grey_images_has_one_channel_on_both_sides():
    network = structure(TINY._replace(channels=1))
    moments = eqx.filter_eval_shape(lambda network, x: network.encode(x), network, jnp.zeros((1, 12, 20)))
    assert moments.mean.shape == moments.std.shape == (3, 3, 5)
    decoded = eqx.filter_eval_shape(lambda network, z: network.decode(z), network, moments.mean)
    assert decoded.shape == (1, 12, 20)
    with pytest.raises(ValueError, match=r"x must be \(1, height, width\) .* got \(3, 12, 20\)"):
        network.encode(jnp.zeros((3, 12, 20)))


# Inputs


@pytest.mark.parametrize("shape", [(3, 30, 40), (3, 24, 44), (1, 24, 40), (24, 40, 3), (3, 0, 8)])
def test_an_image_of_another_shape_is_refused(shape):
    network = structure(vae.SD_VAE)
    message = f"x must be (3, height, width) with height and width positive multiples of 8, got {shape}"
    with pytest.raises(ValueError) as caught:
        network.encode(jnp.zeros(shape))
    assert str(caught.value) == message


def test_an_image_of_bytes_is_refused(unchecked):
    network = structure(TINY)
    with pytest.raises(ValueError, match=r"x must be floating point, in \[-1, 1\], got uint8"):
        network.encode(jnp.zeros(IMAGE, jnp.uint8))


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 0, 5), (3, 5)])
def test_a_latent_of_another_shape_is_refused(unchecked, shape):
    network = structure(TINY)
    with pytest.raises(ValueError, match=r"latent must be \(3, height, width\), none of them 0, got "):
        network.decode(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_a_latent_of_integers_is_refused(unchecked, dtype):
    network = structure(TINY)
    with pytest.raises(ValueError, match="latent must be floating point, got "):
        network.decode(jnp.ones((3, 3, 5), dtype))


# Moments


def test_the_variance_is_clipped_as_in_diffusers():
    network = tokenizer()
    bias = network.to_moments.bias.at[TINY.latent].set(100.0).at[TINY.latent + 1].set(-100.0)
    extreme = eqx.tree_at(lambda network: network.to_moments.bias, network, bias)
    std = all_outputs(extreme, image(), latent(TINY))["std"]
    np.testing.assert_allclose(std[0], np.exp(10.0), rtol=1e-6)
    np.testing.assert_allclose(std[1], np.exp(-15.0), rtol=1e-6)


def test_samples_have_the_moments():
    moments = vae.Moments(jnp.asarray([[[1.0, -2.0]]]), jnp.asarray([[[0.5, 0.0]]]))
    samples = jax.vmap(lambda key: moments.sample(key=key))(jr.split(jr.key(0), 4096))
    # Five standard errors.
    np.testing.assert_allclose(samples.mean(0), moments.mean, atol=5 * 0.5 / 64)
    np.testing.assert_allclose(samples.std(0), moments.std, atol=5 * 0.5 / 90)


# Precision and batches


def test_bfloat16_is_near_float32_and_returns_float32():
    found, expected = all_outputs(tokenizer(dtype="bfloat16"), image(), latent(TINY)), np.load(FROZEN)
    assert all(value.dtype == jnp.float32 for value in found.values())
    for name, value in found.items():
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert 1e-4 < error < 0.03, (name, error)  # and not float32 in disguise


def test_parameters_stay_float32_under_bfloat16():
    network = structure(TINY, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype("float32")}


def test_parameters_are_float32_where_float64_is_enabled(x64):
    network = structure(TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype("float32")}


def test_a_batch_in_pieces_is_the_batch():
    network = tokenizer()
    latents = jnp.stack([factor * latent(TINY) for factor in (-1.0, 0.5, 1.0, 2.0)])
    with jax.default_matmul_precision("highest"):
        images = eqx.filter_jit(lambda network, z: jax.lax.map(network.decode, z, batch_size=2))(network, latents)
    assert images.shape == (4, *IMAGE)
    np.testing.assert_allclose(images[2], np.load(FROZEN)["image"], atol=1e-4)


if __name__ == "__main__":
    np.savez_compressed(FROZEN, **by_torch(TINY, "float64"))
