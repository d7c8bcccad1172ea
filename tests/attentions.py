"""What attentions are compared by: every mode of differentiation, in one program, and the losses of a small DiT."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from fields import refilled
from methods import trainer

import mf_eqx as mfx
from mf_eqx import nn


def triples(tokens, dtype, size=8):
    """(query, key, value) of two heads, and a tangent of each."""
    return tuple(tuple(jr.normal(jr.key(seed), (3, tokens, 2, size), dtype)) for seed in (0, 1))


def low_precision(sharpness=1, motion=0, tokens=64):
    """`triples` in bfloat16, with logits of about `sharpness`, and with tangents of keys that have `motion` in common:
    it changes no weights, but the tangents of all logits."""
    (query, key, value), (dquery, dkey, dvalue) = triples(tokens, jnp.float32)
    return nn.cast(((sharpness * query, key, value), (dquery, dkey + motion, dvalue)), jnp.bfloat16)


def distance(found, exact):
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return np.linalg.norm(found - exact) / max(np.linalg.norm(exact), 1)  # with one key, the gradient of logits is zero


def sines(tree):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(tree))


THROUGH = "gradient through the tangent"
MODES = {
    "value": lambda attention, inputs, tangents: attention(*inputs),
    "gradient": lambda attention, inputs, tangents: jax.grad(lambda inputs: sines(attention(*inputs)))(inputs),
    "tangent": lambda attention, inputs, tangents: jax.jvp(attention.forward_mode(), inputs, tangents)[1],
    THROUGH: lambda attention, inputs, tangents: jax.grad(
        lambda *both: sines(jax.jvp(attention.forward_mode(), *both)), (0, 1)
    )(inputs, tangents),
}


@functools.cache
def every_mode(attention):
    """All modes in one program."""
    return jax.jit(lambda inputs, tangents: {name: mode(attention, inputs, tangents) for name, mode in MODES.items()})


def distances(found, expected):
    """The largest among the arrays of each mode."""
    return {name: max(map(distance, *map(jax.tree.leaves, (found[name], expected[name])))) for name in MODES}


SMALL = mfx.DiTSize(depth=2, width=16, heads=2, patch=2)
IDENTITIES = {
    "MeanFlow": mfx.MeanFlow(),
    "MeanFlow with a stopped JVP": mfx.MeanFlow(derivative=mfx.StoppedJVP()),
    "LagrangianSelfDistillation": mfx.LagrangianSelfDistillation(),
    "EulerianSelfDistillation": mfx.EulerianSelfDistillation(),
    "TerminalVelocityMatching": mfx.TerminalVelocityMatching(),
}


def losses(identity, attention, *, steps=3, **options):
    """Of a small DiT with 12 tokens in training, in float64."""
    field = mfx.DiT((3, 8, 6), SMALL, dtype=jnp.float64, attention=attention, **options, key=jr.key(0))
    step = trainer(identity, optax.sgd(0.1), [mfx.ExponentialAverage(0.9)])
    state = mfx.init_state(nn.cast(refilled(field), jnp.float64), step.optimizer, step.averages, key=jr.key(1))
    found = []
    for key in jr.split(jr.key(2), steps):
        state, metrics = step(state, mfx.Batch(jr.normal(key, (4, 3, 8, 6), jnp.float64)))
        found.append(float(metrics["loss"].value))
    return found
