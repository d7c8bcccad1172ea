"""The U-Net against `unet_reference.py`, with the weights that `released.fill_unet` takes from its names.

What torch gives is frozen in `unet.npz`, so that machines without torch compare with it, too. To write it anew:

    PYTHONPATH=tests python tests/parity/test_unet_parity.py
"""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from random_tensors import random_tensor

import mf_eqx as mfx
from mf_eqx import measure, nn, released

FROZEN = Path(__file__).with_name("unet.npz")
SIDE, CHANNELS = 8, 3
# Attention at one place on each way; channels that stay, grow and shrink; two blocks that form one stack.
SIZE = mfx.UNetSize(width=8, multipliers=(1, 2), blocks=2, attention=(4,))
R, T = np.float32(0.3), np.float32(0.8)
FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32)[None, None] / 64


def number(name, *shape):
    """Standard normal numbers."""
    return random_tensor(name, (1, *shape), scale=np.sqrt(np.prod(shape)))[0]


def inputs():
    """z, v and the augmentation label."""
    shape = (CHANNELS, SIDE, SIDE)
    return number("z", *shape), number("v", *shape), number("augmentation", 6)


def weight(name, shape):
    """A tensor for a name of EDM's, nowhere zero; the scales of norms around one."""
    if name.endswith("resample_filter"):
        return FILTER
    is_scale = len(shape) == 1 and name.endswith("weight")
    return random_tensor(name, tuple(shape)) + np.float32(is_scale)


# In torch


def reference(side=SIDE, size=SIZE, **options):
    """The network in float64, and its tensors."""
    import torch
    import unet_reference

    with torch.device("meta"):
        network = unet_reference.UNet(
            side, CHANNELS, size.width, size.multipliers, size.blocks, size.attention, **options
        )
    tensors = {name: weight(name, leaf.shape) for name, leaf in network.state_dict().items()}
    network = network.double().to_empty(device="cpu")
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return network.eval(), tensors


def of_torch(network, z, v, *augmentation):
    """u and du/dt."""
    import torch

    z, v, *augmentation = (in_torch(x) for x in (z, v, *augmentation))
    tangents = (v, 0 * in_torch(R), 0 * in_torch(T) + 1)
    both = torch.func.jvp(lambda z, r, t: network(z, r, t, *augmentation), (z, in_torch(R), in_torch(T)), tangents)
    return tuple(x[0].detach().numpy() for x in both)


def in_torch(x):
    """A batch of one."""
    import torch

    return torch.from_numpy(np.asarray(x, np.float64)[None])


def outputs_of_blocks(network, z, augmentation):
    """Of every residual block, in order, by its name; and the embedding."""
    import unet_reference

    found = {}

    def keep(module, inputs, output, name):
        found[name] = output[0].detach().numpy()

    for name, module in network.named_modules():
        if isinstance(module, unet_reference.Block):
            module.register_forward_hook(functools.partial(keep, name=name))
    z, r, t, augmentation = map(in_torch, (z, R, T, augmentation))
    network(z, r, t, augmentation)
    found["embedding"] = network.embed(r, t, augmentation)[0].detach().numpy()
    return found


def now():
    """What is frozen: names and shapes of the tensors, u, du/dt, and what blocks give."""
    z, v, augmentation = inputs()
    network, tensors = reference()
    u, dudt = of_torch(network, z, v, augmentation)
    shapes = [",".join(map(str, tensor.shape)) for tensor in tensors.values()]
    blocks = outputs_of_blocks(network, z, augmentation)
    return {"names": np.array(list(tensors)), "shapes": np.array(shapes), "u": u, "dudt": dudt, **blocks}


# In JAX


@functools.cache
def frozen():
    with np.load(FROZEN, allow_pickle=False) as held:
        return dict(held)


def tensors():
    names, shapes = frozen()["names"].tolist(), frozen()["shapes"].tolist()
    return {name: weight(name, tuple(map(int, shape.split(",")))) for name, shape in zip(names, shapes, strict=True)}


def filled(tensors, shape=(CHANNELS, SIDE, SIDE), size=SIZE, *, augmentation=6, dtype=jnp.float32):
    """Ours with these tensors, in the precision of `dtype`."""
    make = functools.partial(mfx.UNet, shape, size, augmentation=augmentation, dropout=0.2, dtype=dtype)
    return nn.cast(
        released.fill_unet(eqx.filter_eval_shape(lambda key: make(key=key), jr.key(0)), tensors, "unet"), dtype
    )


def compiled(function, field, *inputs):
    """`function(field, *inputs)`, compiled with the arrays of `field` as inputs, too."""
    arrays, rest = eqx.partition(field, eqx.is_array)
    return program(function, rest)(arrays, *inputs)


@functools.cache
def program(function, rest):
    return jax.jit(lambda arrays, *inputs: function(eqx.combine(arrays, rest), *inputs))


def of_ours(field, dtype=jnp.float32):
    """u and du/dt."""
    *state, augmentation = (jnp.asarray(x, dtype) for x in inputs())
    condition = None if field.embedding.augmentation is None else mfx.UNetCondition(augmentation=augmentation)
    times = jnp.asarray(R, dtype), jnp.asarray(T, dtype)
    return compiled(mfx.total_derivative, field, *state, *times, condition)


def assert_near(found, expected, tolerance):
    """Relative to the largest value."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
def test_u_and_its_derivative_are_those_of_torch_in_float32():
    for found, name in zip(of_ours(filled(tensors())), ("u", "dudt"), strict=True):
        assert_near(found, frozen()[name], 1e-5)
        assert np.abs(frozen()[name]).max() > 0.5


def test_u_and_its_derivative_are_those_of_torch_in_float64(x64):
    for found, name in zip(of_ours(filled(tensors(), dtype=jnp.float64), jnp.float64), ("u", "dudt"), strict=True):
        assert_near(found, frozen()[name], 1e-12)


def test_every_block_gives_what_it_gives_in_torch(x64):
    field = filled(tensors(), dtype=jnp.float64)
    z, _, augmentation = (jnp.asarray(x, jnp.float64) for x in inputs())

    def blocks(stacks):
        for stack in stacks:
            for i in range(stack.depth):
                yield jax.tree.map(lambda leaf, i=i: leaf[i] if eqx.is_array(leaf) else leaf, stack.blocks)

    def outputs(field, z, r, t):
        c = field.embedding(r, t, mfx.UNetCondition(augmentation=augmentation))
        found, kept = [c], [field.first(z)]
        for block in blocks(field.down):
            kept.append(block(kept[-1], c, None))
        found += kept[1:]
        for block in blocks((*field.middle, *field.up)):
            found.append(block(found[-1], c, None, kept.pop() if block.plan.down_channels else None))
        return found

    found = compiled(outputs, field, z, jnp.asarray(R, jnp.float64), jnp.asarray(T, jnp.float64))
    names = [name for name in frozen() if name.startswith(("enc", "dec"))]
    assert names == list(dict.fromkeys(name.rsplit(".", 2)[0] for name in tensors() if ".conv1." in name))
    for output, name in zip(found, ["embedding", *names], strict=True):
        assert_near(output, frozen()[name], 1e-12)


@pytest.mark.slow
def test_another_order_of_queries_keys_and_values_is_another_network():
    # The way the tensor is laid out can be seen in no shape.
    swapped = {
        name: np.roll(tensor, 1, axis=0) if name == "dec.4x4_in0.qkv.weight" else tensor
        for name, tensor in tensors().items()
    }
    with pytest.raises(AssertionError):
        assert_near(of_ours(filled(swapped))[0], frozen()["u"], 1e-2)


@pytest.mark.parity
def test_frozen_file_is_what_torch_gives_now():
    pytest.importorskip("torch")
    made = now()
    assert made.keys() == frozen().keys()
    for name, expected in made.items():
        if expected.dtype.kind == "U":
            assert expected.tolist() == frozen()[name].tolist()
        else:
            assert_near(frozen()[name], expected, 1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("augmentation", [6, 0])
def test_presets_have_the_tensors_of_torch(augmentation):
    torch = pytest.importorskip("torch")
    import unet_reference

    with torch.device("meta"):
        network = unet_reference.UNet(augmentation=augmentation)
    held = {name: np.broadcast_to(FILTER.sum(), leaf.shape) for name, leaf in network.state_dict().items()}
    held = {name: FILTER if name.endswith("resample_filter") else leaf for name, leaf in held.items()}
    make = functools.partial(mfx.UNet, (3, 32, 32), mfx.UNET_CIFAR10, augmentation=augmentation)
    field = released.fill_unet(eqx.filter_eval_shape(lambda key: make(key=key), jr.key(0)), held, "unet")
    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(field, eqx.is_array)))
    assert count == sum(leaf.numel() for leaf in network.parameters())


@pytest.mark.parity
def test_preset_costs_the_multiply_adds_of_torch():
    torch = pytest.importorskip("torch")
    import unet_reference

    with torch.device("meta"):
        network = unet_reference.UNet(augmentation=0)
        expected = unet_reference.multiply_adds(network, torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1))
    field = eqx.filter_eval_shape(lambda key: mfx.UNet((3, 32, 32), mfx.UNET_CIFAR10, key=key), jr.key(0))
    z, time = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    flops = measure.product_flops(lambda field, *inputs: field(*inputs), field, z, time, time)
    assert flops / 2 == pytest.approx(expected, rel=0.02)  # theirs has the products of resampling, too


@pytest.mark.parity
def test_other_sizes_are_as_in_torch(x64):
    pytest.importorskip("torch")
    size = mfx.UNetSize(width=16, multipliers=(2, 1, 3), blocks=1, attention=(8, 2))
    network, held = reference(size=size, augmentation=0)
    z, v, _ = inputs()
    field = filled(held, size=size, augmentation=0, dtype=jnp.float64)
    for found, expected in zip(of_ours(field, jnp.float64), of_torch(network, z, v), strict=True):
        assert_near(found, expected, 1e-12)


def test_weights_of_edm_itself_have_query_key_and_value_of_each_channel_side_by_side():
    def alternate(rows):
        return np.stack(np.split(rows, 3), axis=1).reshape(rows.shape)

    held = tensors()
    edm = {name: alternate(leaf) if ".qkv." in name else leaf for name, leaf in held.items()}
    assert any(not np.array_equal(edm[name], held[name]) for name in held)
    field = eqx.filter_eval_shape(lambda: mfx.UNet((CHANNELS, SIDE, SIDE), SIZE, augmentation=6, key=jr.key(0)))
    found = released.fill_unet(field, edm, "unet", alternating=True)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (found, released.fill_unet(field, held, "unet"))))


@pytest.mark.slow
@pytest.mark.parity
def test_network_of_the_paper_is_that_of_torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    network, held = reference(32, mfx.UNET_CIFAR10)
    z, v = (number(name, 3, 32, 32) for name in ("z", "v"))
    augmentation = number("augmentation", 6)
    field = filled(held, (3, 32, 32), mfx.UNET_CIFAR10)
    condition = mfx.UNetCondition(augmentation=jnp.asarray(augmentation))
    derivative = eqx.filter_jit(lambda field, *inputs: mfx.total_derivative(field, *inputs, condition))
    found = derivative(field, *map(jnp.asarray, (z, v, R, T)))
    for output, expected in zip(found, of_torch(network, z, v, augmentation), strict=True):
        assert_near(output, expected, 1e-5)


if __name__ == "__main__":
    np.savez_compressed(FROZEN, **now())
