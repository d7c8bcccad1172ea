"""Tokenizers that are written: in the layout of diffusers, and the same when they are read."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")
from diffusers_files import config, tensors, TINY, write_file
from fields import filled

from mf_eqx import vae
from mf_eqx._foreign import read_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
STATISTICS = vae.LatentStatistics((0.5, -1.0, 0.1), (2.0, 3.0, 0.25))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_again(channels, tmp_path):
    size = TINY._replace(channels=channels)
    network = filled(lambda: vae.Autoencoder(size, key=jax.random.key(0)))
    for name in ("first", "second"):
        vae.save_autoencoder(tmp_path / name, network, STATISTICS)
    found = vae.load_autoencoder(tmp_path / "first")
    assert found.size == size and found.digest() == network.digest()
    assert jax.tree.structure(found) == jax.tree.structure(network)
    assert vae.read_latent_statistics(tmp_path / "first") == STATISTICS
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_is_written_has_the_names_and_values_of_diffusers(tmp_path):
    network = vae.load_autoencoder(write_file(tmp_path / "theirs.safetensors", tensors(TINY)), TINY)
    vae.save_autoencoder(tmp_path / "ours", network, STATISTICS)
    found, wanted = read_safetensors(tmp_path / "ours" / WEIGHTS), tensors(TINY)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    theirs = {key: value for key, value in config(TINY).items() if key not in ("_diffusers_version", "sample_size")}
    assert {key: written[key] for key in theirs} == theirs


@pytest.mark.parity
@pytest.mark.parametrize("channels", [1, 3])
def test_diffusers_reads_what_is_written(channels, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    network = vae.Autoencoder(TINY._replace(channels=channels), key=jax.random.key(0))
    vae.save_autoencoder(tmp_path, network, STATISTICS)
    found = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False, local_files_only=True)
    assert list(found.config.latents_std) == list(STATISTICS.std) and found.config.scaling_factor == 1.0
    for name, tensor in read_safetensors(tmp_path / WEIGHTS).items():
        np.testing.assert_array_equal(found.state_dict()[name].numpy(), tensor)


def test_statistics_of_other_channels_are_not_written(tmp_path):
    network = filled(lambda: vae.Autoencoder(TINY, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="statistics must be of 3 channels, or one number for all, got 4"):
        vae.save_autoencoder(tmp_path / "new", network, vae.LatentStatistics((0.0,), (1.0, 2.0, 3.0, 4.0)))
    assert not (tmp_path / "new").exists()
