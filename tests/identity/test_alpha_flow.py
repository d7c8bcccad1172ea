import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def field():
    return mfx.nn.cast(filled(lambda: mfx.MLP(3, width=8, depth=1, key=jr.key(0))), jnp.float64)


def row(step=0):
    z, v = jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6])
    return mfx.Row(z, v, 0.2, 0.7, context=mfx.Context(jnp.asarray(step)))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_residual_is_that_of_the_paper_in_units_of_alpha(alpha):
    u, at = field(), row()
    s = 0.7 - alpha * 0.5
    target = alpha * at.v + (1 - alpha) * u(at.z - (0.7 - s) * at.v, 0.2, s)
    expected = (u(at.z, 0.2, 0.7) - target) / alpha
    np.testing.assert_allclose(mfx.AlphaFlow(alpha).residual(u, at), expected, rtol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_gradient_is_that_of_the_papers_loss(power):
    """Its weight is alpha / (S + c) with power 1 and offset c = alpha^2 times ours, 1 / alpha with power 0."""
    alpha, weight, at = 0.25, mfx.AdaptiveWeight(power, 0.01), row()
    s = 0.7 - alpha * 0.5

    def ours(u):
        error = jnp.sum(mfx.AlphaFlow(alpha).residual(u, at) ** 2)
        return jax.lax.stop_gradient(weight(error)) * error

    def papers(u):
        target = alpha * at.v + (1 - alpha) * u(at.z - (0.7 - s) * at.v, 0.2, s)
        error = jnp.sum((u(at.z, 0.2, 0.7) - jax.lax.stop_gradient(target)) ** 2)
        return jax.lax.stop_gradient((error + alpha**2 * 0.01) ** -power * alpha ** (2 * power - 1)) * error

    found, expected = eqx.filter_jit(lambda u: (eqx.filter_grad(ours)(u), eqx.filter_grad(papers)(u)))(field())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-13)


def test_ends_of_alpha_are_flow_matching_and_mean_flow():
    u, at = field(), row()
    np.testing.assert_array_equal(mfx.AlphaFlow(1.0).residual(u, at), u(at.z, 0.2, 0.7) - at.v)
    np.testing.assert_array_equal(mfx.AlphaFlow(0.0).residual(u, at), mfx.MeanFlow().residual(u, at))
    assert mfx.AlphaFlow(0.0).facts.exact and not mfx.AlphaFlow(0.5).facts.exact


@pytest.mark.parametrize(("step", "alpha"), [(0, 1.0), (500, 0.5), (1000, 0.0)])
def test_a_schedule_has_the_value_of_the_training_step(step, alpha):
    found = mfx.AlphaFlow(mfx.SigmoidSchedule(0, 1000)).residual(field(), row(step))
    np.testing.assert_allclose(found, mfx.AlphaFlow(alpha).residual(field(), row()), rtol=1e-12)


@pytest.mark.parametrize("schedule", [mfx.SigmoidSchedule(0, 1000), optax.linear_schedule(1.0, 0.0, 1000)])
def test_where_nothing_trains_a_schedule_has_the_value_of_its_end(schedule):
    at = eqx.tree_at(lambda row: row.context, row(), None)
    found = mfx.AlphaFlow(schedule).residual(field(), at)
    np.testing.assert_allclose(found, mfx.MeanFlow().residual(field(), at), rtol=1e-12)


def conditionals(jaxpr):
    """The number of branches of each conditional in a program, in its loops and calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield len(equation.params["branches"])
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from conditionals(inner)


def test_one_branch_is_executed_at_a_time():
    objective = mfx.Objective(mfx.AlphaFlow(mfx.SigmoidSchedule(0, 1000)), identity_share=0.5)
    step = mfx.TrainStep(objective, optax.sgd(0.1))
    state = mfx.init_state(filled(lambda: mfx.MLP(2, width=8, depth=1, key=jr.key(0))), step.optimizer, key=jr.key(1))
    dynamic, static = eqx.partition(state, eqx.is_array)

    def loss(dynamic):
        return step(eqx.combine(dynamic, static), mfx.Batch(jnp.zeros((8, 2))))[1]["loss"].total

    # A conditional under vmap becomes a select, which computes all branches, if its predicate differs between rows.
    assert 3 in list(conditionals(jax.make_jaxpr(loss)(dynamic).jaxpr))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\] or be a schedule"):
        mfx.AlphaFlow(alpha)


@pytest.mark.parametrize(("start", "end"), [(3, 3), (4, 3)])
def test_a_schedule_that_ends_before_it_starts_is_refused(start, end):
    with pytest.raises(ValueError, match=f"end must be > start = {start}, got {end}"):
        mfx.SigmoidSchedule(start, end)
