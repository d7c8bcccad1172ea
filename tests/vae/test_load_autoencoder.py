"""Files of diffusers: every version's names, and whatever does not fit is refused by the file's own names."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
from diffusers_files import config, MIDDLES, shapes, tensors, TINY, with_old_names, write_file, write_folder

from mf_eqx import vae
from mf_eqx._foreign import read_safetensors
from mf_eqx._optional import MissingDependency

WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN = "encoder.down_blocks.1.resnets.0"


def load_changed(tmp_path, change):
    """The tokenizer in a file of which `change` has changed the dictionary of tensors."""
    held = tensors(TINY)
    change(held)
    return vae.load_autoencoder(write_file(tmp_path / "changed.safetensors", held), TINY)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# What is read


def test_every_tensor_of_the_file_is_in_the_network(tmp_path):
    network = load_changed(tmp_path, lambda held: None)
    found, held = (
        np.sort(np.concatenate([np.ravel(value) for value in values]))
        for values in (jax.tree.leaves(network), tensors(TINY).values())
    )
    np.testing.assert_array_equal(found, held)


def test_the_published_file_has_248_tensors():
    assert len(shapes(vae.SD_VAE)) == 248
    assert sum(int(np.prod(shape)) for shape in shapes(vae.SD_VAE).values()) == 83_653_863


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_attention_give_the_same_network(convolutions, tmp_path):
    old = with_old_names(tensors(TINY), convolutions=convolutions)
    assert f"{MIDDLES[0]}.proj_attn.weight" in old and old.keys() != tensors(TINY).keys()
    found = vae.load_autoencoder(write_file(tmp_path / "old.safetensors", old), TINY)
    assert_equal(found, load_changed(tmp_path, lambda held: None))


def test_half_precision_is_read_into_float32(tmp_path):
    def halve(held):
        held.update({name: tensor.astype(np.float16) for name, tensor in held.items()})

    network = load_changed(tmp_path, halve)
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype("float32")}


def test_the_compute_precision_is_that_asked_for(tmp_path):
    network = vae.load_autoencoder(write_folder(tmp_path), TINY, dtype=jnp.bfloat16)
    assert network.dtype == jnp.bfloat16


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_folder_is_read_at_its_top_or_in_vae(place, tmp_path):
    write_folder(tmp_path / "model" / place)
    found = vae.load_autoencoder(str(tmp_path / "model"), TINY)
    assert_equal(found, load_changed(tmp_path, lambda held: None))


def test_the_size_is_that_of_the_config_if_none_is_given(tmp_path):
    found = vae.load_autoencoder(write_folder(tmp_path))
    assert found.size == TINY
    assert_equal(found, load_changed(tmp_path, lambda held: None))


def test_without_config_and_size_it_is_that_of_stable_diffusion(tmp_path):
    (write_folder(tmp_path) / "config.json").unlink()
    rule = r"\(taken for one of Stable Diffusion's size, since no config.json is beside it\): must hold the tensors of"
    for path in (tmp_path, tmp_path / WEIGHTS):
        with pytest.raises(ValueError, match=rf"{WEIGHTS} {rule} .*lacks .* and \d+ more"):
            vae.load_autoencoder(path)


@pytest.mark.parametrize(
    "changes",
    [*({"latent_channels": value} for value in ("8", 0, [4, 8], True)), {"block_out_channels": []}],
    ids=str,
)
def test_a_size_in_the_config_that_cannot_be_is_refused(changes, tmp_path):
    write_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"config.json: must have integers >= 1 for block_out_channels, "):
        vae.load_autoencoder(tmp_path)


def test_widths_in_the_config_that_its_groups_do_not_divide_are_refused(tmp_path):
    write_folder(tmp_path, norm_num_groups=3)
    with pytest.raises(ValueError, match=r"config.json: block_out_channels must be multiples of .* 3, got \[4, 8, 8\]"):
        vae.load_autoencoder(tmp_path)


def test_a_folder_without_config_is_read(tmp_path):
    (write_folder(tmp_path) / "config.json").unlink()
    assert eqx.is_array(vae.load_autoencoder(tmp_path, TINY).to_moments.weight)


def test_the_scale_of_a_config_is_not_looked_at(tmp_path):
    write_folder(tmp_path, scaling_factor=0.13025, sample_size=1024, new_key_of_later_versions=[1])
    assert eqx.is_array(vae.load_autoencoder(tmp_path, TINY).to_moments.weight)


def test_the_config_beside_a_file_is_read_as_that_of_its_folder(tmp_path):
    file = write_folder(tmp_path) / WEIGHTS
    assert vae.load_autoencoder(file).size == TINY
    write_folder(tmp_path, latent_channels=7)
    with pytest.raises(ValueError, match=r"config.json: must describe .* given size, but latent_channels is 7, not 3"):
        vae.load_autoencoder(file, TINY)


@pytest.mark.parity
@pytest.mark.parametrize("old", [False, True])
def test_diffusers_reads_the_files_of_these_tests(old, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    write_folder(tmp_path)
    if old:
        write_file(tmp_path / WEIGHTS, with_old_names(tensors(TINY), convolutions=False))
    # Today's versions rename the attention only so, and take no convolutions for it.
    found = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False, local_files_only=True)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, torch.from_numpy(np.asarray(tensors(TINY)[name])))


@pytest.mark.parity
def test_what_diffusers_writes_is_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL(**{key: value for key, value in config(TINY).items() if not key.startswith("_")})
    network.save_pretrained(tmp_path)
    found = vae.load_autoencoder(tmp_path, TINY)
    theirs = network.state_dict()["encoder.conv_in.weight"].numpy()
    np.testing.assert_array_equal(found.encoder.conv_in.weight, theirs)


# Tensors that do not fit


def rename(old, new):
    return lambda held: held.update({new: held.pop(old)})


def reshape(name, shape):
    return lambda held: held.update({name: np.zeros(shape, np.float32)})


def spoil(held):
    held[f"{DOWN}.conv1.bias"][1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(f"{DOWN}.norm1.bias"), f"it lacks {DOWN}.norm1.bias"),
        (
            rename(f"{DOWN}.conv_shortcut.weight", f"{DOWN}.nin_shortcut.weight"),
            f"it lacks {DOWN}.conv_shortcut.weight; has the unexpected {DOWN}.nin_shortcut.weight",
        ),
        (
            rename(f"{MIDDLES[1]}.to_v.bias", f"{MIDDLES[1]}.to_w.bias"),
            f"it lacks {MIDDLES[1]}.to_v.bias; has the unexpected {MIDDLES[1]}.to_w.bias",
        ),
        (
            reshape("decoder.up_blocks.0.upsamplers.0.conv.weight", (8, 8, 1, 1)),
            "it differs: decoder.up_blocks.0.upsamplers.0.conv.weight is (8, 8, 1, 1), not (8, 8, 3, 3)",
        ),
        (
            reshape(f"{MIDDLES[0]}.to_k.weight", (8, 8, 1)),
            f"it differs: {MIDDLES[0]}.to_k.weight is (8, 8, 1), not",
        ),
        (spoil, f"it has values that are no finite real numbers in {DOWN}.conv1.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_changed(tmp_path, change)
    assert str(caught.value).startswith(
        f"{tmp_path / 'changed.safetensors'}: must hold the tensors of the network, but "
    )
    assert message in str(caught.value)


def test_a_missing_tensor_with_an_old_name_is_named_as_the_file_would(tmp_path):
    old = with_old_names(tensors(TINY), convolutions=True)
    del old[f"{MIDDLES[0]}.query.weight"]
    with pytest.raises(ValueError, match=f"but it lacks {MIDDLES[0]}.query.weight"):
        vae.load_autoencoder(write_file(tmp_path / "old.safetensors", old), TINY)


def test_a_file_of_another_size_is_refused(tmp_path):
    file = write_file(tmp_path / "alone.safetensors", tensors(TINY))
    with pytest.raises(ValueError, match=r"alone.safetensors: .* differs: .* is \(8,\), not \(12,\)"):
        vae.load_autoencoder(file, TINY._replace(widths=(4, 8, 12)))


# Files that do not


@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_a_truncated_file_is_refused(length, tmp_path):
    file = write_folder(tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: must be a safetensors file, but it cannot be read"):
        vae.load_autoencoder(tmp_path, TINY)


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_folder_with_pickled_weights_alone_is_refused(place, tmp_path):
    folder = write_folder(tmp_path / place)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    message = f"must be a folder with {WEIGHTS}, got only diffusion_pytorch_model.bin, which is pickled and not read"
    with pytest.raises(ValueError, match=message):
        vae.load_autoencoder(tmp_path, TINY)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"must be a folder with {WEIGHTS}, got no such file in it or in vae/"):
        vae.load_autoencoder(tmp_path, TINY)


def test_a_pickled_file_is_refused_unread(tmp_path):
    file = tmp_path / "weights.ckpt"
    file.write_bytes(b"never looked at")
    with pytest.raises(
        ValueError, match=r"must be a \.safetensors file \(nothing pickled is read\), got weights\.ckpt"
    ):
        vae.load_autoencoder(file, TINY)


def test_a_path_where_nothing_is_is_refused_by_name():
    with pytest.raises(
        FileNotFoundError, match=r"must be a \.safetensors file or a folder .*: 'stabilityai/sd-vae-ft-mse'"
    ):
        vae.load_autoencoder("stabilityai/sd-vae-ft-mse", TINY)


# A config that does not


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [4, 8]}, r"block_out_channels is \[4, 8\], not \[4, 8, 8\]"),
        ({"layers_per_block": 3}, "layers_per_block is 3, not 1"),
        ({"latent_channels": 16}, "latent_channels is 16, not 3"),
        ({"norm_num_groups": 4}, "norm_num_groups is 4, not 2"),
        ({"norm_num_groups": None}, "norm_num_groups is 32, not 2"),  # what diffusers takes where none is written
        ({"act_fn": "relu"}, 'act_fn is "relu", not "silu"'),
        ({"use_quant_conv": False}, "use_quant_conv is false, not true"),
        ({"_class_name": "VQModel"}, '_class_name is "VQModel", not "AutoencoderKL"'),
        ({"latent_channels": 16, "act_fn": "relu"}, 'latent_channels is 16, not 3, act_fn is "relu", not "silu"'),
    ],
)
def test_a_config_of_another_network_is_refused_by_its_keys(changes, message, tmp_path):
    write_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"config.json: must describe a network of the given size, but {message}$"):
        vae.load_autoencoder(tmp_path, TINY)


def test_a_config_of_other_layers_is_refused_without_a_size_too(tmp_path):
    write_folder(tmp_path, act_fn="relu")
    with pytest.raises(ValueError, match='must describe a network that can be read, but act_fn is "relu", not "silu"'):
        vae.load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "must be JSON"), (b"\xff\xfe\xff", "must be JSON"), (b"[]", "must be an object")]
)
def test_a_damaged_config_is_refused(content, message, tmp_path):
    (write_folder(tmp_path) / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        vae.load_autoencoder(tmp_path, TINY)


# The statistics of latents


@pytest.mark.parametrize(
    ("changes", "expected", "origin"),
    [
        ({}, vae.LatentStatistics(), "scaling_factor of Stable Diffusion, since CONFIG lacks it"),
        ({"scaling_factor": 0.5}, vae.LatentStatistics((0.0,), (2.0,)), "scaling_factor of CONFIG"),
        (
            {"shift_factor": 0.1},
            vae.LatentStatistics((0.1,), (1 / vae.SCALE,)),
            "shift_factor of CONFIG, scaling_factor of Stable Diffusion, since CONFIG lacks it",
        ),
        (
            {"scaling_factor": 0.5, "latents_mean": [1, 2, 3], "latents_std": [4, 5, 6]},
            vae.LatentStatistics((1.0, 2.0, 3.0), (8.0, 10.0, 12.0)),
            "latents_mean, latents_std, scaling_factor of CONFIG",
        ),
    ],
)
def test_statistics_are_those_of_the_config(changes, expected, origin, tmp_path):
    for path in (write_folder(tmp_path, **changes), tmp_path / WEIGHTS):
        assert vae.read_latent_statistics(path) == expected
        assert vae.latent_statistics_origin(path) == origin.replace("CONFIG", str(tmp_path / "config.json"))


def test_without_config_statistics_are_those_of_stable_diffusion(tmp_path):
    (write_folder(tmp_path) / "config.json").unlink()
    assert vae.read_latent_statistics(tmp_path / WEIGHTS) == vae.LatentStatistics()
    found = vae.latent_statistics_origin(tmp_path / WEIGHTS)
    assert found == f"scaling_factor of Stable Diffusion, since there is no {tmp_path / 'config.json'}"


@pytest.mark.parametrize(
    "changes",
    [
        *({"scaling_factor": value} for value in (0, "1", True, [1.0], -1, 10**400)),
        *({"latents_std": value} for value in ([-1], 3, [True], ["1"])),
        *({"latents_mean": value} for value in ("x", "123", ["1", "2", "3"], [], [1.0, 2.0])),
        {"shift_factor": "1"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_statistics_that_cannot_be_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: must say how latents are scaled, but cannot be read: "):
        vae.read_latent_statistics(write_folder(tmp_path, **changes))


# Optional packages


def test_without_safetensors_the_package_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path)
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "safetensors"), "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match="pip install safetensors"):
        vae.load_autoencoder(tmp_path, TINY)


def test_files_of_these_tests_hold_the_names_they_should(tmp_path):
    assert read_safetensors(write_folder(tmp_path) / WEIGHTS).keys() == shapes(TINY).keys()
