"""Inception against torch, on weights that are made from the names of their tensors."""

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from inception_reference import FROZEN, network_input, pixels, reference, tensor

from mf_eqx.metrics import ADM, convert_inception, Inception, load_inception
from mf_eqx.metrics._inception import _AveragePool, _origins

save_file = pytest.importorskip("safetensors.numpy").save_file


def shapes():
    return eqx.filter_eval_shape(lambda: Inception(key=jr.key(0)))


@pytest.fixture(scope="module")
def tensors(room):
    origins = _origins(shapes())
    return {name: tensor(name, origin.shape) for origin in origins.values() for name in origin.names}


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors | {"fc.bias": np.ones(1008, np.float32), "any.num_batches_tracked": np.zeros((), int)}, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def inception(path):
    return load_inception(path)


@eqx.filter_jit
def evaluate(network, x):
    return network(x)


def relative(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b))


def test_features_and_logits_are_those_of_torch(inception):
    frozen = np.load(FROZEN)
    features = evaluate(inception, network_input(pixels()))
    # Seen: 4e-7 and 6e-7. Between the two images there is 0.02.
    assert relative(features.pooled, frozen["pooled"]) < 1e-5
    assert relative(features.logits, frozen["logits"]) < 1e-5


@pytest.mark.parity
def test_frozen_features_are_what_torch_gives_now():
    pytest.importorskip("torch")
    pooled, logits = reference(network_input(pixels()))
    frozen = np.load(FROZEN)
    assert max(relative(pooled, frozen["pooled"]), relative(logits, frozen["logits"])) < 1e-5


@pytest.mark.parity
def test_features_of_small_images_are_those_of_torch_fidelity(inception, tensors, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    state = {name: torch.from_numpy(value) for name, value in tensors.items()} | {"fc.bias": torch.ones(1008)}
    torch.save(state, tmp_path / "weights.pth")
    extractor = theirs.FeatureExtractorInceptionV3("it", ["2048", "logits_unbiased"], str(tmp_path / "weights.pth"))
    images = pixels(size=32)
    pooled, logits = extractor(torch.from_numpy(images))
    features = evaluate(inception, ADM(jax.numpy.asarray(images)))
    assert max(relative(features.pooled, pooled.numpy()), relative(features.logits, logits.numpy())) < 1e-5


@pytest.mark.parity
def test_network_has_the_parameters_of_torch_fidelity():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unfilled(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            self.wanted = {name: tuple(value.shape) for name, value in self.state_dict().items()}

    torch_load, torch.load = torch.load, lambda *_, **__: {}
    try:
        wanted = Unfilled("it", ["2048"], "nowhere").wanted
    finally:
        torch.load = torch_load
    ours = {name: origin.shape for origin in _origins(shapes()).values() for name in origin.names}
    theirs = {name: shape for name, shape in wanted.items() if not name.endswith("num_batches_tracked")}
    assert ours | {"fc.bias": (1008,)} == theirs


def test_average_pool_of_a_constant_is_the_constant_to_the_edge():
    np.testing.assert_allclose(_AveragePool()(jax.numpy.ones((1, 2, 4, 5))), 1, rtol=1e-6)


def test_random_inception_has_variance_two_over_fan_in_and_norms_that_do_nothing():
    network = Inception(key=jr.key(0))
    layer = network.body.layers[1]
    assert layer.name == "Conv2d_2a_3x3"
    assert abs(np.var(layer.weight) * 32 * 9 / 2 - 1) < 0.05
    assert np.all(layer.scale == 1) and np.all(layer.shift == 0)
    assert abs(np.var(network.weight) * 2048 / 2 - 1) < 0.01


def test_file_without_a_tensor_is_refused(tmp_path):
    save_file({"fc.weight": np.zeros((1008, 2048), np.float32)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors: .* lacks Conv2d_1a_3x3\.bn\.bias, .* and 467 more"):
        load_inception(tmp_path / "head.safetensors")


def test_file_of_another_network_is_refused(tensors, tmp_path):
    other = {name: np.zeros(1, np.float32) for name in [*tensors, "AuxLogits.conv0"]}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"AuxLogits\.conv0; differs: Conv2d_1a_3x3\.bn\.bias is \(1,\), not \(32,\)"):
        load_inception(tmp_path / "other.safetensors")


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["", "inception."])
def test_converted_torch_file_loads_to_the_same_network(prefix, tensors, inception, tmp_path):
    torch = pytest.importorskip("torch")
    state = {prefix + name: torch.from_numpy(value) for name, value in tensors.items()}
    state |= {f"{prefix}fc.bias": torch.ones(1008), f"{prefix}Mixed_5b.bn.num_batches_tracked": torch.tensor(7)}
    torch.save(state, tmp_path / "weights.pth")
    convert_inception(tmp_path / "weights.pth", tmp_path / "new" / "weights.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["weights.safetensors"]
    assert eqx.tree_equal(load_inception(tmp_path / "new" / "weights.safetensors"), inception)


@pytest.mark.parity
def test_torch_file_of_another_network_is_not_converted(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: .*fc\.weight is \(1000, 2048\), not \(1008, 2048\)"):
        convert_inception(tmp_path / "weights.pth", tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3, 299, 299), np.uint8), ((1, 3, 75, 75), np.float32), ((3, 299, 299), np.float32)]
)
def test_what_is_no_input_of_the_network_is_refused(unchecked, shape, dtype):
    rule = r"x must be float32 of shape \(rows, 3, 299, 299\), got"
    with pytest.raises(ValueError, match=rule):
        eqx.filter_eval_shape(shapes(), jax.ShapeDtypeStruct(shape, dtype))
