"""With FSDP a device holds its part of the state, and beside it no more than one whole block and one gradient of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from devices import run_on_devices

import mf_eqx as mfx

pytestmark = pytest.mark.rehearsal
SLOW = pytest.mark.slow
NETWORKS = ("DiT", "DiT without a loop", "in-context DiT", "U-Net")
REST = ("block", "outside", "rows")


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("fsdp_on_devices.py")


@pytest.fixture(scope="module")
def slow():
    return run_on_devices("fsdp_on_devices.py", *NETWORKS)


def bound(found, fsdp, gradients):
    """The bytes that a device may hold: its part of the state and of the gradients, two blocks, all that stands outside
    of the stack and its gradients, and what its rows need."""
    divided = (found["state"] + gradients * found["parameters"]) / fsdp
    return divided + 2 * found["block"] + (1 + gradients) * found["outside"] + found["rows"]


# Gradients are there twice where copies of the parameters sum them.
HELD = [
    pytest.param("Flow Matching by 8", "on_devices", 8, 1, id="Flow Matching"),
    pytest.param("guided by 8", "on_devices", 8, 1, id="guided"),
    pytest.param("Flow Matching by 2", "slow", 2, 2, id="4 copies", marks=SLOW),
    pytest.param("guided XL/2 by 8", "slow", 8, 1, id="XL/2", marks=SLOW),
]


@pytest.mark.parametrize(("name", "measured", "fsdp", "gradients"), HELD)
def test_a_device_holds_its_part_of_the_state_and_two_blocks(name, measured, fsdp, gradients, request):
    found = request.getfixturevalue(measured)[name]
    assert (
        bound(found, fsdp, gradients) < bound(found | dict.fromkeys(REST, 0), fsdp, gradients) + found["parameters"] / 3
    )
    assert found["held"] <= bound(found, fsdp, gradients)


@pytest.mark.parametrize(("name", "measured"), [each.values[:2] for each in HELD if not each.marks])
def test_no_weight_of_all_blocks_is_ever_on_one_device(name, measured, request):
    """Which also holds for what the loop over blocks keeps for the backward pass."""
    whole = request.getfixturevalue(measured)[name]["whole"]
    assert whole and whole == [[False, True]] * len(whole)


@pytest.mark.parametrize("attention", [mfx.nn.XLAAttention(), mfx.nn.ChunkedAttention()], ids=["XLA", "chunked"])
def test_blocks_in_turn_keep_about_half_for_the_backward_pass(attention):
    """Of a network that otherwise keeps every intermediate (`remat=False`)."""
    field = mfx.DiT((4, 32, 32), mfx.DiTSize(3, 64, 2, 2), attention=attention, key=jr.key(0))
    in_turn = eqx.tree_at(lambda field: field.stack, field, field.stack.gathering(lambda block: block))

    def kept(field):
        arrays, rest = eqx.partition(field, eqx.is_inexact_array)
        z, t = jnp.zeros((4, 4, 32, 32)), jnp.zeros(4)

        def backward(arrays):
            return jax.vjp(lambda arrays: jax.vmap(eqx.combine(arrays, rest))(z, t, t), arrays)[1]

        return size(jax.eval_shape(backward, arrays)) - size(arrays)

    assert kept(in_turn) <= 0.6 * kept(field)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_gradients_are_summed_and_divided_at_once_and_no_row_moves_between_devices(on_devices):
    found = on_devices["guided by 8"]["collectives"]
    # Of each kind of rows, the three weights and three biases of a block; and all that stands outside.
    assert found["reduce-scatter"] >= 2 * 6
    assert found["all-to-all"] == found["collective-permute"] == 0
    # Small leaves, metrics and what the optimiser's step must know of all parameters: no gradient of a block.
    assert found["all-reduce"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_training_of_every_network_gives_the_numbers_of_one_device(slow, name):
    assert slow["differences"][name] <= 1e-6
