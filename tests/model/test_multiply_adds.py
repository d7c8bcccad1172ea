"""What a forward pass costs: the multiply-adds of the paper's networks, as XLA counts them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import mf_eqx as mfx
from mf_eqx import measure

# Types are checked by other tests: to check them here takes most of the time.
pytestmark = pytest.mark.usefixtures("unchecked")

# In units of 10^9; computed from the paper's description. The paper itself says 5.6, 23.1, 54.0 and 119.0.
EXPECTED = {"B4": 5.56, "B2": 23.0, "M2": 53.8, "L2": 80.7, "XL2": 118.6}


def forward(size, unroll):
    """A network without numbers, and what it is called with."""
    make = lambda: mfx.DiT((4, 32, 32), size, labels=1000, unroll=unroll, key=jr.key(0))  # noqa: E731
    time, label = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return eqx.filter_eval_shape(make), jax.ShapeDtypeStruct((4, 32, 32), jnp.float32), time, time, label


def counted(function, *inputs):
    """Operations as XLA counts them. Only the CPU's says so of a program that is not compiled."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function).lower(*inputs).cost_analysis()["flops"]


@pytest.mark.parametrize("name", EXPECTED)
def test_products_of_a_forward_pass_are_those_of_the_paper(name):
    inputs = forward(getattr(mfx, f"DIT_{name}"), 1)
    flops = measure.product_flops(lambda field, *inputs: field(*inputs), *inputs)
    assert flops / 2e9 == pytest.approx(EXPECTED[name], rel=0.01)


@pytest.mark.parametrize("name", EXPECTED)
def test_xla_counts_the_same_multiply_adds(name):
    field, *inputs = forward(getattr(mfx, f"DIT_{name}"), True)
    arrays, rest = eqx.partition(field, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    flops = counted(lambda arrays, *inputs: eqx.combine(arrays, rest)(*inputs), arrays, *inputs)
    assert flops / 2e9 == pytest.approx(EXPECTED[name], rel=0.02)


# The in-context DiT, with one or both heads

PASSES = {
    "u": lambda field, z, time, condition: field(z, time, time, condition),
    "v": lambda field, z, time, condition: field.velocity(z, time, condition),
    "u and v": lambda field, z, time, condition: field.with_velocity(z, time, time, condition),
}


def in_context_products(size, heads):
    """Multiply-adds of a pass with so many heads, for 20 + 256 tokens, from the description of the network."""
    width, tokens, values = size.width, 20 + 256, 16 if size.bottleneck is None else 768
    patches = width * values if size.bottleneck is None else size.bottleneck * (values + width)
    block = tokens * (4 * width**2 + 3 * width * (8 * width // 3)) + 2 * tokens**2 * width
    blocks = (size.depth - size.head_depth + heads * size.head_depth) * block
    return blocks + 256 * (patches + width * values * heads) + 4 * (256 * width + width**2)


def in_context(size, unroll):
    shape = (4, 32, 32) if size.bottleneck is None else (3, 256, 256)
    make = lambda: mfx.InContextDiT(  # noqa: E731
        shape, size, labels=1000, guidance=True, velocity_head=True, unroll=unroll, key=jr.key(0)
    )
    label, number = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    condition = mfx.GuidanceCondition(label, number, number, number)
    return eqx.filter_eval_shape(make), jax.ShapeDtypeStruct(shape, jnp.float32), number, condition


@pytest.mark.parametrize("name", ["IMF_B2", "IMF_M2", "IMF_L2", "IMF_XL2", "PMF_B16", "PMF_L16", "PMF_H16"])
def test_in_context_pass_makes_no_product_beyond_its_own_head(name):
    size = getattr(mfx, name)
    inputs = in_context(size, 1)
    for heads, passes in ((1, ("u", "v")), (2, ("u and v",))):
        for which in passes:
            assert measure.product_flops(PASSES[which], *inputs) == 2 * in_context_products(size, heads)


@pytest.mark.parametrize("which", PASSES)
def test_xla_counts_the_multiply_adds_of_an_in_context_pass(which):
    size = mfx.IMF_B2._replace(depth=4, head_depth=2)
    field, *inputs = in_context(size, True)
    arrays, rest = eqx.partition(field, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    flops = counted(lambda arrays, *inputs: PASSES[which](eqx.combine(arrays, rest), *inputs), arrays, *inputs)
    expected = in_context_products(size, 1 + (which == "u and v"))
    assert flops / 2 == pytest.approx(expected, rel=0.02)
