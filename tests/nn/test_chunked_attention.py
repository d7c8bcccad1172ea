"""Attention over blocks of keys, held against attention in XLA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import refilled

import mf_eqx as mfx
from mf_eqx import measure, nn


def triples(tokens, dtype):
    """(query, key, value) of two heads, and a tangent of each."""
    return tuple(tuple(jr.normal(jr.key(seed), (3, tokens, 2, 8), dtype)) for seed in (0, 1))


def distance(found, exact):
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return np.linalg.norm(found - exact) / max(np.linalg.norm(exact), 1)  # with one key, the gradient of logits is zero


def sines(tree):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(tree))


MODES = {
    "value": lambda attention, inputs, tangents: attention(*inputs),
    "gradient": lambda attention, inputs, tangents: jax.grad(lambda inputs: sines(attention(*inputs)))(inputs),
    "tangent": lambda attention, inputs, tangents: jax.jvp(attention, inputs, tangents)[1],
    "gradient through the tangent": lambda attention, inputs, tangents: jax.grad(
        lambda *both: sines(jax.jvp(attention, *both)), (0, 1)
    )(inputs, tangents),
}


@functools.cache
def distances(tokens, block, dtype):
    """From attention in XLA, of every array that a mode returns, in one program."""

    @jax.jit
    def both(inputs, tangents):
        kinds = nn.ChunkedAttention(block), nn.XLAAttention()
        return [{name: mode(kind, inputs, tangents) for name, mode in MODES.items()} for kind in kinds]

    found, expected = both(*triples(tokens, dtype))
    return {name: max(map(distance, *map(jax.tree.leaves, (found[name], expected[name])))) for name in MODES}


# One block that is longer than the keys, blocks with a shorter last one, and blocks that divide the keys.
@pytest.mark.parametrize(("tokens", "block"), [(1, 4), (5, 2), (64, 24), (64, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_that_of_attention_in_xla(x64, mode, tokens, block):
    assert distances(tokens, block, jnp.float64)[mode] < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_float32_equals_that_of_attention_in_xla(mode):
    assert distances(64, 24, jnp.float32)[mode] < 1e-6
