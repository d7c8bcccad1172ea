"""Attention over blocks of keys, held against attention in XLA."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from attentions import (
    distance,
    distances,
    every_mode,
    IDENTITIES,
    losses,
    low_precision,
    MODES,
    sines,
    THROUGH,
    triples,
)
from fields import filled

import mf_eqx as mfx
from mf_eqx import measure, nn


@functools.cache
def distances_from_xla(tokens, block, dtype):
    kinds = nn.ChunkedAttention(block), nn.XLAAttention()
    return distances(*(every_mode(kind)(*triples(tokens, dtype)) for kind in kinds))


SIZES = [
    (5, 2),  # with a shorter last block
    pytest.param(1, 4, marks=pytest.mark.slow),  # no whole block
    pytest.param(64, 24, marks=pytest.mark.slow),
    pytest.param(64, 16, marks=pytest.mark.slow),  # whole blocks alone
]


@pytest.mark.parametrize(("tokens", "block"), SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_that_of_attention_in_xla(x64, mode, tokens, block):
    assert distances_from_xla(tokens, block, jnp.float64)[mode] < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_float32_equals_that_of_attention_in_xla(mode):
    assert distances_from_xla(64, 24, jnp.float32)[mode] < 1e-6


def test_value_without_compilation_is_that_of_the_compiled_program():
    inputs, _ = triples(5, jnp.float32)
    attention = nn.ChunkedAttention(2)
    assert distance(attention(*inputs), jax.jit(attention)(*inputs)) < 1e-6


# Large numbers and low precision


@pytest.mark.parametrize("mode", ["value", "tangent"])
def test_logits_of_ten_thousand_do_not_overflow(mode):
    (query, key, value), tangents = triples(64, jnp.float32)
    inputs = (1e4 * query, key, value)
    found, expected = (every_mode(kind)(inputs, tangents) for kind in (nn.ChunkedAttention(24), nn.XLAAttention()))
    # A logit of 1e4 is rounded by 1e-3, and so is its weight relative to itself.
    assert distances(found, expected)[mode] < 1e-2


@functools.cache
def errors_in_bfloat16(sharpness=1, motion=0):
    """Of each mode, against float32."""
    low = low_precision(sharpness, motion)
    with jax.numpy_dtype_promotion("strict"):
        found = every_mode(nn.ChunkedAttention(24))(*low)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    return distances(found, every_mode(nn.XLAAttention())(*nn.cast(low, jnp.float32)))


@pytest.mark.parametrize(("sharpness", "motion"), [(1, 0), (30, 0), (1, 30)])
@pytest.mark.parametrize("mode", ["value", "gradient", "tangent"])
def test_bfloat16_is_as_near_to_float32_as_its_rounding_allows(mode, sharpness, motion):
    # Weights, centred keys, and what is returned are rounded to eight bits, each by at most 2^-9 of itself. (Logits of
    # 30 that were rounded would be wrong by 0.1.)
    assert errors_in_bfloat16(sharpness, motion)[mode] < 3 * 2**-9


def test_common_motion_of_keys_costs_no_digits_of_the_gradient_through_the_tangent():
    at_rest, in_motion = (errors_in_bfloat16(motion=motion)[THROUGH] for motion in (0, 30))
    assert in_motion < 1.5 * at_rest < 0.02


# Memory


@functools.cache
def temporary_bytes(mode, tokens, attention=nn.ChunkedAttention()):
    rows = (jax.ShapeDtypeStruct((tokens, 2, 64), jnp.float32),) * 3
    return measure.compile_program(functools.partial(MODES[mode], attention), rows, rows).cost.temporary_bytes


SLOW = pytest.mark.slow


CASES = [(mode, tokens) for mode in MODES for tokens in (256, 1024)]


@pytest.mark.parametrize(("mode", "tokens"), [*(pytest.param(*case, marks=SLOW) for case in CASES[:-1]), CASES[-1]])
def test_four_times_the_tokens_need_four_times_the_memory(mode, tokens):
    # XLA's buffers are reused differently from size to size (4.26 with jax 0.10); quadratic memory would be 16 times.
    assert temporary_bytes(mode, 4 * tokens) < 4.5 * temporary_bytes(mode, tokens)


@pytest.mark.parametrize("mode", ["gradient", pytest.param(THROUGH, marks=SLOW)])
def test_memory_of_attention_in_xla_is_quadratic(mode):
    least, more = (temporary_bytes(mode, tokens, nn.XLAAttention()) for tokens in (256, 1024))
    assert more > 10 * least and more > 4 * temporary_bytes(mode, 1024)


def gradient_beside_a_stopped_tangent(attention, inputs, tangents):
    """As in MeanFlow, which learns through u and not through du/dt."""

    def loss(inputs):
        value, tangent = jax.jvp(attention, inputs, tangents)
        return jnp.sum(jnp.sin(value) * jax.lax.stop_gradient(tangent))

    return jax.grad(loss)(inputs)


COSTS = [*zip(MODES.values(), (2, 7, 7, 25), strict=True), (gradient_beside_a_stopped_tangent, 12)]


@pytest.mark.parametrize(("mode", "products"), COSTS, ids=[*MODES, "gradient beside a stopped tangent"])
def test_products_of_the_size_of_the_weights(mode, products):
    rows = (jax.ShapeDtypeStruct((512, 2, 64), jnp.float32),) * 3
    found = measure.product_flops(functools.partial(mode, nn.ChunkedAttention()), rows, rows)
    np.testing.assert_allclose(found, products * 2 * 2 * 512**2 * 64, rtol=5e-3)  # that of centring is not counted


# In networks and engines


class Mixer(mfx.AbstractField):
    """A layer of attention alone."""

    layer: nn.SelfAttention

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.layer(t * z + r)


def test_gradient_through_the_derivative_of_a_field_equals_that_with_attention_in_xla(x64):
    # Engines refuse it for fused kernels.
    z, v = jr.normal(jr.key(0), (2, 5, 4))

    def gradient(attention):
        field = nn.cast(filled(lambda: Mixer(nn.SelfAttention(4, 2, attention=attention, key=jr.key(1)))), jnp.float64)
        return jax.jit(jax.grad(lambda field: sines(mfx.total_derivative(field, z, v, 0.3, 0.8))))(field)

    found, expected = (jax.tree.leaves(gradient(kind)) for kind in (nn.ChunkedAttention(2), nn.XLAAttention()))
    for leaf, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"remat": True}], ids=["scanned", "remat"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_small_transformer_has_the_losses_of_attention_in_xla(x64, name, options):
    found = losses(IDENTITIES[name], nn.ChunkedAttention(5), **options)
    np.testing.assert_allclose(found, losses(IDENTITIES[name], nn.XLAAttention(), **options), rtol=1e-12)
    assert len(set(found)) == len(found)


def test_chunked_attention_is_its_own_form_for_forward_mode():
    attention = nn.ChunkedAttention()
    assert attention.forward_mode() is attention


@pytest.mark.parametrize("block", [0, -3])
def test_blocks_without_keys_are_refused(block):
    with pytest.raises(ValueError, match=f"block must be an integer >= 1, got {block}"):
        nn.ChunkedAttention(block)
