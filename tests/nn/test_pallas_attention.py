"""Attention in kernels for GPUs, which JAX interprets here, held against attention in XLA."""

import collections
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from attentions import distance, distances, every_mode, IDENTITIES, losses, low_precision, MODES, triples

import mf_eqx as mfx
from mf_eqx import nn
from mf_eqx.nn._pallas_kernels import rows_at_a_time

INTERPRETED = nn.PallasAttention(16, interpret=True)


def distances_at(inputs, tangents):
    return distances(*(every_mode(kind)(inputs, tangents) for kind in (INTERPRETED, nn.XLAAttention())))


@functools.cache
def distances_from_xla(tokens, size, dtype):
    return distances_at(*triples(tokens, dtype, size))


SIZES = [
    (20, 8),  # tokens that are no whole tiles, heads smaller than a tile
    pytest.param(1, 24, marks=pytest.mark.slow),
    pytest.param(32, 16, marks=pytest.mark.slow),  # whole tiles alone
]


@pytest.mark.parametrize(("tokens", "size"), SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_that_of_attention_in_xla(x64, mode, tokens, size):
    assert distances_from_xla(tokens, size, jnp.float64)[mode] < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_float32_with_heads_of_72_equals_that_of_attention_in_xla(mode):
    assert distances_from_xla(40, 72, jnp.float32)[mode] < 1e-6


def test_value_that_comes_with_the_tangent_is_the_value():
    inputs, tangents = triples(20, jnp.float32)
    value, _ = jax.jvp(INTERPRETED.forward_mode(), inputs, tangents)
    assert distance(value, INTERPRETED(*inputs)) < 1e-6
    assert distance(value, INTERPRETED.forward_mode()(*inputs)) < 1e-6


def test_rows_of_a_batch_do_not_mix():
    inputs, tangents = (tuple(jr.normal(jr.key(seed), (3, 2, 20, 2, 8))) for seed in (0, 1))
    along = functools.partial(jax.jvp, INTERPRETED.forward_mode())
    found = jax.vmap(along)(inputs, tangents)
    for number in range(2):
        expected = along(*jax.tree.map(lambda rows, number=number: rows[number], (inputs, tangents)))
        for rows, row in zip(found, expected, strict=True):
            np.testing.assert_allclose(rows[number], row, rtol=1e-6, atol=1e-6)


# Large numbers and low precision


@pytest.mark.parametrize("mode", ["value", "tangent"])
def test_logits_of_ten_thousand_do_not_overflow(mode):
    (query, key, value), tangents = triples(40, jnp.float32, 72)
    # A logit of 1e4 is rounded by 1e-3, and so is its weight relative to itself.
    assert distances_at((1e4 * query, key, value), tangents)[mode] < 1e-2


@functools.cache
def errors_in_bfloat16(sharpness, motion):
    """Of each mode, against float32."""
    low = low_precision(sharpness, motion, tokens=40)
    with jax.numpy_dtype_promotion("strict"):
        found = every_mode(INTERPRETED)(*low)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    return distances(found, every_mode(nn.XLAAttention())(*nn.cast(low, jnp.float32)))


@pytest.mark.parametrize(("sharpness", "motion"), [(1, 0), (30, 0), (1, 30)])
@pytest.mark.parametrize("mode", ["value", "gradient", "tangent"])
def test_bfloat16_is_as_near_to_float32_as_its_rounding_allows(mode, sharpness, motion):
    # Weights, their changes, and what is returned are rounded to eight bits, each by at most 2^-9 of itself. (Logits of
    # 30 that were rounded would be wrong by 0.1, and a motion of 30 that was not taken out of the changes by as much.)
    assert errors_in_bfloat16(sharpness, motion)[mode] < 3 * 2**-9


# In networks and engines


@pytest.mark.slow
@pytest.mark.parametrize("name", IDENTITIES)
def test_small_transformer_has_the_losses_of_attention_in_xla(x64, name):
    found = losses(IDENTITIES[name], INTERPRETED)
    np.testing.assert_allclose(found, losses(IDENTITIES[name], nn.XLAAttention()), rtol=1e-12)
    assert len(set(found)) == len(found)


def primitives(function, *inputs):
    """How often each is in the program of a function, where a loop counts once. A kernel is known by its name."""

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation.params["name"].removeprefix("attention_")
                continue
            yield equation.primitive.name
            for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                yield from visit(inner) if hasattr(inner, "eqns") else ()

    return collections.Counter(visit(jax.make_jaxpr(function)(*inputs).jaxpr))


class Mixers(mfx.AbstractField):
    """Two layers of attention alone, in a loop."""

    layers: nn.Stack

    def __init__(self, key):
        def layer(key):
            return nn.SelfAttention(8, 2, attention=nn.PallasAttention(), key=key)

        self.layers = nn.Stack(layer, 2, unroll=1, key=key)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.layers(lambda layer, x: layer(x), t * z + r)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_gradient_that_stops_at_the_tangent_computes_nothing_for_it(stopped):
    field, (z, v) = Mixers(jr.key(0)), jr.normal(jr.key(1), (2, 20, 8))

    def loss(field):
        u, dudt = mfx.total_derivative(field, z, v, 0.3, 0.8)
        return jnp.sum(u * (jax.lax.stop_gradient(dudt) if stopped else dudt))

    found = primitives(jax.grad(loss), field)
    assert [found[name] for name in ("value", "value_and_tangent", "query_cotangent", "key_cotangents")] == [0, 1, 1, 1]
    # Through the tangent the rules of attention over blocks of keys are taken, which are not in kernels.
    assert (found["exp"] == 0) == stopped


def test_its_form_for_forward_mode_is_its_own():
    attention = nn.PallasAttention().forward_mode()
    assert attention.forward_mode() is attention


def test_a_row_that_fills_shared_memory_is_loaded_with_fifteen_others():
    assert rows_at_a_time(128, 4096, 4) == 16


# What is refused


@pytest.mark.parametrize("block", [0, 8, 48, -64])
def test_blocks_that_are_no_power_of_two_are_refused(block):
    with pytest.raises(ValueError, match=f"block must be a power of two >= 16, got {block}"):
        nn.PallasAttention(block)


def test_float64_is_refused_where_it_is_not_interpreted(x64):
    with pytest.raises(ValueError, match="must be given bfloat16, float16 or float32, got float64"):
        nn.PallasAttention()(*triples(20, jnp.float64)[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator")
def test_a_cpu_runs_it_only_if_asked_to_interpret():
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
        nn.PallasAttention()(*triples(20, jnp.float32)[0])
