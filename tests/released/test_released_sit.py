"""SiT becomes a field with u(z, t, t) = -SiT(z, 1 - t), against `sit_reference.py`.

What torch gives is frozen in `sit.npz`, so that machines without torch compare with it, too. To write it anew:

    PYTHONPATH=tests python tests/released/test_released_sit.py
"""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

pytest.importorskip("msgpack")
from random_tensors import random_tensor
from released_files import (
    CHANNELS,
    DEPTH,
    FEATURES,
    HEADS,
    HEIGHT,
    LABELS,
    PATCH,
    positions,
    sit_shapes,
    sit_tensors,
    WIDTH,
)

import mf_eqx as mfx
from mf_eqx import nn, released
from mf_eqx.released import _sit

FROZEN = Path(__file__).with_name("sit.npz")
SIZE = mfx.DiTSize(DEPTH, FEATURES, HEADS, PATCH)
TIMES, POINT_LABELS = (0.0, 0.125, 0.5, 0.875, 1.0), (0, 3, LABELS, 1, 2)
"""Our t, exact in float32, and labels; one of them is none."""
OUT, FIRST = "final_layer.linear.weight", "t_embedder.mlp.0.weight"
XL2 = {"depth": 28, "width": 1152, "patch": 2, "channels": 4, "labels": 1000, "height": 32, "columns": 32}


def state():
    shape = (1, CHANNELS, HEIGHT, WIDTH)
    return random_tensor("sit z", shape, scale=np.sqrt(np.prod(shape)))[0]


# In torch


def reference():
    import sit_reference
    import torch

    grid = (HEIGHT // PATCH, WIDTH // PATCH)
    network = sit_reference.SiT(CHANNELS, grid, DEPTH, FEATURES, HEADS, PATCH, LABELS)
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in sit_tensors().items()})
    return network.double()


def now():
    """What is frozen: SiT's answers at 1 - t, in float64."""
    import torch

    rows = torch.from_numpy(state()).double().expand(len(TIMES), -1, -1, -1)
    with torch.no_grad():
        velocity = reference()(rows, 1 - torch.tensor(TIMES, dtype=torch.float64), torch.tensor(POINT_LABELS))
    return {"velocity": velocity.numpy()}


@functools.cache
def frozen():
    with np.load(FROZEN, allow_pickle=False) as held:
        return held["velocity"]


# In JAX


def shapes(data_shape=(CHANNELS, HEIGHT, WIDTH), size=SIZE, labels=LABELS, **options):
    return eqx.filter_eval_shape(lambda key: mfx.DiT(data_shape, size, labels=labels, key=key, **options), jr.key(0))


def filled(tensors=None, dtype=jnp.float32, seed=0):
    tensors = sit_tensors() if tensors is None else tensors
    return nn.cast(released.fill_sit(shapes(dtype=dtype, unroll=1), tensors, "sit", key=jr.key(seed)), dtype)


@jax.jit
def at_all_points(field, z, r, t, label):
    return jax.vmap(lambda r, t, label: field(z, r, t, label))(r, t, label)


def of_ours(field, dtype=jnp.float32, duration=0.0):
    """u at all points, with r earlier than t by `duration`."""
    z, r, t = (jnp.asarray(x, dtype) for x in (state(), np.array(TIMES) - duration, TIMES))
    return np.asarray(at_all_points(field, z, r, t, jnp.asarray(POINT_LABELS)))


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


# What it computes


def test_velocity_is_minus_that_of_sit_at_the_reversed_time():
    assert np.abs(frozen()).max() > 0.5
    assert relative_error(of_ours(filled()), -frozen()) < 1e-5


def test_only_the_rounding_of_the_weights_is_left_in_float64(x64):
    # The first time layer is turned in float64 and kept in float32.
    assert relative_error(of_ours(filled(dtype=jnp.float64), jnp.float64), -frozen()) < 5e-7


def test_frozen_velocities_depend_on_time_and_label():
    for other in range(1, len(TIMES)):
        assert relative_error(frozen()[other], frozen()[0]) > 1e-2


def test_start_of_the_interval_changes_nothing():
    np.testing.assert_array_equal(of_ours(filled(), duration=0.25), of_ours(filled()))


def test_duration_can_be_learned():
    z, time, label = jnp.asarray(state()), jnp.asarray(0.75), jnp.asarray(1)

    def loss(field):
        return jnp.sum(field(z, time / 2, time, label) ** 2)

    gradient = jax.jit(lambda field: eqx.filter_grad(loss)(field).embedding.times.out[1])(filled())
    assert jnp.abs(gradient.weight).min() > 0 and jnp.abs(gradient.bias).min() > 0


def test_first_layer_of_the_duration_is_drawn_as_in_a_fresh_field():
    first, again, other = (filled(seed=seed).embedding.times.hidden[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.weight, again.weight)
    assert jnp.abs(first.weight - other.weight).max() > 0
    assert float(first.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not jnp.any(first.bias)


def test_second_half_of_the_channels_changes_nothing():
    tensors, unused = sit_tensors(), np.arange(2 * CHANNELS * PATCH**2) % (2 * CHANNELS) >= CHANNELS
    tensors[OUT][unused] += 1
    np.testing.assert_array_equal(of_ours(filled(tensors)), of_ours(filled()))
    tensors[OUT][~unused] += 1
    assert relative_error(of_ours(filled(tensors)), -frozen()) > 1e-2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_embedder.proj.weight", lambda weight: weight.swapaxes(2, 3)),
        (FIRST, lambda weight: np.roll(weight, 128, axis=1)),
        ("blocks.1.attn.qkv.weight", lambda weight: np.roll(weight, FEATURES, axis=0)),
    ],
)
def test_an_order_that_no_shape_shows_is_seen_in_the_result(name, change):
    tensors = sit_tensors()
    tensors[name] = change(tensors[name])
    assert relative_error(of_ours(filled(tensors)), -frozen()) > 1e-2


@pytest.mark.parity
def test_frozen_file_is_what_torch_gives_now():
    pytest.importorskip("torch")
    assert relative_error(frozen(), now()["velocity"]) < 1e-12


@pytest.mark.parity
def test_names_and_shapes_are_those_of_torch():
    pytest.importorskip("torch")
    found = {name: tuple(tensor.shape) for name, tensor in reference().state_dict().items()}
    assert found == {name: tensor.shape for name, tensor in sit_tensors().items()}


# What is read


def test_paper_network_has_the_tensors_that_it_should():
    field = shapes((4, 32, 32), mfx.DIT_XL2, 1000)
    asked = {name: origin.shape for origin in _sit._origins(field, jr.key(0)).values() for name in origin.names}
    expected = sit_shapes(**XL2)
    assert expected.pop("pos_embed") == (1, 256, 1152)
    assert asked == expected


def test_size_is_seen_in_the_tensors():
    assert released.measure_sit(sit_tensors(), "sit", heads=HEADS) == (CHANNELS, SIZE, LABELS)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in sit_shapes(**XL2).items()}
    assert released.measure_sit(tensors, "sit") == (4, mfx.DIT_XL2, 1000)


# What is refused


def replace(name, tensor):
    return lambda held: held.update({name: tensor})


FC1 = "blocks.2.mlp.fc1"
MISFITS = {
    "missing": (
        lambda held: held.pop(f"{FC1}.bias"),
        f"must hold the tensors of the network, but it lacks {FC1}.bias$",
    ),
    "renamed": (
        lambda held: held.update({f"{FC1}.kernel": held.pop(f"{FC1}.weight")}),
        f"but it lacks {FC1}.weight; has the unexpected {FC1}.kernel$",
    ),
    "extra": (replace("h_embedder.mlp.0.bias", np.zeros(16)), "it has the unexpected h_embedder.mlp.0.bias$"),
    "half the channels": (
        replace(OUT, np.zeros((16, 16), np.float32)),
        rf"it differs: {OUT} is \(16, 16\), not \(32, 16\)$",
    ),
    "transposed": (
        replace(f"{FC1}.weight", np.zeros((16, 64), np.float32)),
        rf"it differs: {FC1}.weight is \(16, 64\), not \(64, 16\)$",
    ),
    "infinite": (
        replace(FIRST, np.full((16, 256), np.inf, np.float32)),
        f"it has values that are no finite real numbers in {FIRST}$",
    ),
    "no positions": (
        lambda held: held.pop("pos_embed"),
        "must hold the tensors of the network, but it lacks pos_embed$",
    ),
    "positions of another grid": (
        replace("pos_embed", positions(3, 8, FEATURES)[None]),
        "pos_embed must be sines and cosines of the position, got others$",
    ),
    "positions of another size": (
        replace("pos_embed", positions(4, 4, FEATURES)[None]),
        r"pos_embed must have shape \(1, 24, 16\) for \(4, 8, 12\), got \(1, 16, 16\)$",
    ),
    "no positions but nan": (
        replace("pos_embed", np.full((1, 24, 16), np.nan)),
        "pos_embed must be sines and cosines of the position, got others$",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(kind):
    (change, message), tensors = MISFITS[kind], sit_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=f"^sit: .*{message}"):
        filled(tensors)


def test_a_field_that_sees_other_times_is_refused():
    with pytest.raises(ValueError, match=r"field must embed \(t, t - r\) at scale 1"):
        released.fill_sit(shapes(time_variables=nn.end_start), sit_tensors(), "sit", key=jr.key(0))


if __name__ == "__main__":
    np.savez_compressed(FROZEN, **now())
