"""What a forward pass costs: the multiply-adds of the paper's networks, as XLA counts them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import mf_eqx as mfx
from mf_eqx import measure

# In units of 10^9; computed from the paper's description. The paper itself says 5.6, 23.1, 54.0 and 119.0.
EXPECTED = {"B4": 5.56, "B2": 23.0, "M2": 53.8, "L2": 80.7, "XL2": 118.6}


def forward(size, unroll):
    """A network without numbers, and what it is called with."""
    make = lambda: mfx.DiT((4, 32, 32), size, labels=1000, unroll=unroll, key=jr.key(0))  # noqa: E731
    time, label = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return eqx.filter_eval_shape(make), jax.ShapeDtypeStruct((4, 32, 32), jnp.float32), time, time, label


@pytest.mark.parametrize("name", EXPECTED)
def test_products_of_a_forward_pass_are_those_of_the_paper(name):
    inputs = forward(getattr(mfx, f"DIT_{name}"), 1)
    flops = measure.product_flops(lambda field, *inputs: field(*inputs), *inputs)
    assert flops / 2e9 == pytest.approx(EXPECTED[name], rel=0.01)


@pytest.mark.parametrize("name", EXPECTED)
def test_xla_counts_the_same_multiply_adds(name):
    field, *inputs = forward(getattr(mfx, f"DIT_{name}"), True)
    arrays, rest = eqx.partition(field, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    lowered = jax.jit(lambda arrays, *inputs: eqx.combine(arrays, rest)(*inputs)).lower(arrays, *inputs)
    assert lowered.cost_analysis()["flops"] / 2e9 == pytest.approx(EXPECTED[name], rel=0.02)
