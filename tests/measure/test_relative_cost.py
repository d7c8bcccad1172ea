"""What a step costs in units of Flow Matching's: the passes of `test_flops.py`, in a loop or not."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx.measure import relative_cost

SHAPE, WIDTH, TOKENS, DEPTH, LABELS = (4, 16, 16), 256, 64, 2, 10
DROPOUT = mfx.LabelDropout(0.1, LABELS)


def network(**options):
    size = mfx.DiTSize(DEPTH, WIDTH, heads=4, patch=2)
    return eqx.filter_eval_shape(lambda key: mfx.DiT(SHAPE, size, labels=LABELS, **options, key=key), jr.key(0))


def batch():
    return eqx.filter_eval_shape(lambda: mfx.Batch(jnp.zeros((16, *SHAPE)), jnp.zeros(16, jnp.int32)))


def tangent():
    """Of a pass: both factors of the attention's products move."""
    blocks = DEPTH * (12 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH + 6 * WIDTH**2)
    forward = blocks + 2 * TOKENS * 4 * 4 * WIDTH + 2 * WIDTH**2 + 2 * (256 * WIDTH + WIDTH**2)
    return 1 + DEPTH * 2 * TOKENS**2 * WIDTH / forward


class Mine(mfx.AbstractIdentity):
    """Says nothing of its passes: two more, and a gradient of one."""

    facts = mfx.Facts(uses_velocity=False, degenerate=True)

    def residual(self, field, row):
        middle = (row.r + row.t) / 2
        upper = row.evaluate(field, row.z, middle, row.t)
        lower = row.evaluate(field, row.z - (row.t - middle) * upper, row.r, middle)
        return row.evaluate(field, row.z, row.r, row.t) - jax.lax.stop_gradient((upper + lower) / 2)


GUIDED = mfx.Objective(guidance=mfx.Guidance(1.0, 0.5), label_dropout=DROPOUT)
COSTS = {
    "Flow Matching": (mfx.Objective(identity=None, identity_share=0), lambda T: 3),
    "MeanFlow": (mfx.Objective(), lambda T: 3 + T / 4),
    "every row": (mfx.Objective(identity_share=1), lambda T: 3 + T),
    "stopped": (mfx.Objective(mfx.MeanFlow(derivative=mfx.StoppedJVP())), lambda T: 3 + (1 + T) / 4),
    "improved": (mfx.Objective(mfx.ImprovedMeanFlow()), lambda T: 3 + (1 + T) / 4),
    "split": (mfx.Objective(mfx.SplitMeanFlow()), lambda T: 3 + 2 / 4),
    "Lagrangian": (mfx.Objective(mfx.LagrangianSelfDistillation()), lambda T: 3 + (1 + 3 * T) / 4),
    "with a teacher": (mfx.Objective(mfx.TerminalVelocityMatching()), lambda T: 3 + (1 + 3 * T) / 4),
    "guided": (GUIDED, lambda T: 3 + T / 4 + 1 + 1 / 4),
    "own": (mfx.Objective(Mine()), lambda T: 3 + 2 / 4),
}
QUICK = ("MeanFlow", "own")
"""All others are slow tests: a case is traced for a second."""


@functools.cache
def cost(name, unroll=1):
    return relative_cost(COSTS[name][0], network(unroll=unroll), batch())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COSTS]
)
def test_step_costs_what_its_passes_cost(name):
    _, passes = COSTS[name]
    np.testing.assert_allclose(cost(name), passes(tangent()) / 3, rtol=0.001)


@pytest.mark.parametrize("name", ["MeanFlow", pytest.param("guided", marks=pytest.mark.slow)])
def test_a_loop_costs_what_its_turns_cost(name):
    assert cost(name) == cost(name, unroll=True)


def test_a_tangent_pass_of_a_network_without_attention_costs_a_forward_pass():
    field = eqx.filter_eval_shape(lambda key: mfx.MLP(2, width=64, key=key), jr.key(0))
    batch = mfx.Batch(jnp.zeros((4, 2)))
    np.testing.assert_allclose(relative_cost(mfx.Objective(), field, batch), 1 + 1 / 12, rtol=0.01)


def test_a_field_without_products_has_no_relative_cost():
    class Flat(mfx.AbstractField):
        scale: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.scale * z

    with pytest.raises(ValueError, match="field must have matrix products or convolutions, got Flat without any"):
        relative_cost(mfx.Objective(), Flat(jnp.ones(())), mfx.Batch(jnp.zeros((4, 2))))
