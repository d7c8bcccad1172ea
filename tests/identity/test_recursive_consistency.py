import functools
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import Cubic, filled

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

ORDERS = [1, 2, 4]
R, T = 0.2, 0.7


@functools.cache
def fields():
    """The field that learns, and its teacher."""
    empty = mfx.MLP(3, width=8, depth=1, key=jr.key(0))
    return tuple(mfx.nn.cast(filled(lambda: empty, seed), jnp.float64) for seed in (0, 1))


def row(t=T, *, step=0, teacher=None, **options):
    z, v = jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6])
    return mfx.Row(z, v, R, t, context=mfx.Context(jnp.asarray(step), teacher), **options)


def taught(t=T):
    return row(t, teacher=fields()[1])


def direction(u, ubar, at, order, step):
    """g as the code of TwinFlow computes it, in numpy: sums over steps, no averages."""
    z, v, r, t = (np.asarray(value) for value in (at.z, at.v, at.r, at.t))
    step = min(step, t - r)
    z, times = z - step * v, np.linspace(t - step, r, order + 1)
    total = np.zeros(3)
    for s, later in itertools.pairwise(times):
        moved = (s - later) * np.asarray(ubar(jnp.asarray(z), later, s))
        z, total = z - moved, total + moved
    return ((t - r) * np.asarray(u(at.z, r, t)) - total) / step - v


def loss_of(g, gap, clip=1.0):
    """The code's loss, divided by its weight at equal times."""
    error = np.mean(np.clip(g, -clip, clip) ** 2)
    weight = (np.tan((1 - gap) * np.pi / 2.5) + 1) / (np.tan(np.pi / 2.5) + 1)
    return weight * error / np.sqrt(error + 1e-3**2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("step", "t"), [(0.01, T), (0.1, T), (0.01, R + 0.004)], ids=["short", "long", "clamped"])
def test_residual_and_loss_are_those_of_the_code(order, step, t):
    at, (u, ubar) = taught(t), fields()
    residual, loss = mfx.RecursiveConsistency(order, step).residual_and_loss(u, at)
    g = direction(u, ubar, at, order, step)
    np.testing.assert_allclose(residual, g, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(loss, loss_of(g, t - R), rtol=1e-11)


@pytest.mark.parametrize("clip", [0.1, 1.0, 3.0, 1e6])
def test_the_largest_magnitude_of_the_residual_in_the_loss_can_be_chosen(clip):
    at, (u, ubar) = taught(), fields()
    g = direction(u, ubar, at, 2, 0.01)
    assert (np.abs(g) > 3).any()
    _, loss = mfx.RecursiveConsistency(clip=clip).residual_and_loss(u, at)
    np.testing.assert_allclose(loss, loss_of(g, T - R, clip), rtol=1e-11)


def test_where_the_step_is_longer_than_the_interval_flow_matching_is_left():
    at, (u, _) = taught(R + 0.005), fields()
    for order in ORDERS:
        found = mfx.RecursiveConsistency(order, 0.01).residual(u, at)
        np.testing.assert_allclose(found, u(at.z, at.r, at.t) - at.v, rtol=1e-13)


@pytest.mark.parametrize("step", [0.002, 0.1])
def test_with_one_step_of_the_field_itself_it_is_alpha_flow_and_so_flow(step):
    u, at = fields()[0], row()
    part = step / (T - R)
    found = mfx.RecursiveConsistency(1, step, by_teacher=False).residual(u, at)
    np.testing.assert_allclose(found, mfx.SoFlow(part).residual(u, at), rtol=1e-9)
    np.testing.assert_allclose(found, mfx.AlphaFlow(part, clip=1e-4).residual(u, at), rtol=1e-9)


def test_without_a_teacher_the_steps_are_those_of_the_field():
    u, at = fields()[0], row()
    found = mfx.RecursiveConsistency(2, by_teacher=False).residual(u, at)
    np.testing.assert_allclose(found, direction(u, u, at, 2, 0.01), rtol=1e-10)


def test_euler_mean_flows_are_order_one_along_the_fields_own_velocity():
    u, at, step = fields()[0], row(), 0.05
    moved = at.z - step * u(at.z, T, T)
    expected = u(at.z, R, T) - at.v + (T - R - step) * (u(at.z, R, T) - u(moved, R, T - step)) / step
    found = mfx.RecursiveConsistency(1, step, 0.0, by_teacher=False).residual(u, at)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_the_first_step_can_be_along_a_mixed_direction():
    at, (u, ubar) = taught(), fields()
    mixed = 0.3 * at.v + 0.7 * u(at.z, T, T)
    along = eqx.tree_at(lambda row: row.v, at, mixed)
    expected = direction(u, ubar, along, 2, 0.05) + mixed - at.v  # the target keeps the given velocity
    for conditional in (0.3, lambda step: 0.3):
        found = mfx.RecursiveConsistency(2, 0.05, conditional).residual(u, at)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("identity", [mfx.RecursiveConsistency(), mfx.RecursiveConsistency(2, 0.1, 0.0, False)])
def test_gradient_flows_through_the_left_side_alone(identity):
    field, at = Cubic(np.float64(0.8)), row(teacher=Cubic(np.float64(0.5)))
    residual, _ = identity.residual_and_loss(field, at)
    gradient = jax.grad(lambda field: identity.residual_and_loss(field, at)[1])(field).factor
    way, by_factor = np.clip(residual, -1, 1), np.asarray(field(at.z, at.r, at.t)) / 0.8
    error = np.mean(way**2)
    scale = loss_of(residual, T - R) / error
    np.testing.assert_allclose(gradient, scale * 2 * np.mean(way * by_factor), rtol=1e-11)


def test_no_gradient_flows_into_the_teacher():
    def loss(ubar):
        return mfx.RecursiveConsistency().residual_and_loss(fields()[0], row(teacher=ubar))[1]

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(eqx.filter_grad(loss)(fields()[1])))


def test_a_schedule_has_the_value_of_the_training_step():
    at, (u, ubar) = row(step=500, teacher=fields()[1]), fields()
    found = mfx.RecursiveConsistency(2, optax.linear_schedule(0.3, 0.1, 1000)).residual(u, at)
    np.testing.assert_allclose(found, direction(u, ubar, at, 2, 0.2), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_many_rows_at_once_are_as_one_by_one(order):
    u, ubar = fields()
    t = jnp.array([0.2, 0.205, 0.3, 1.0])
    identity = mfx.RecursiveConsistency(order)
    many = eqx.filter_jit(jax.vmap(lambda t: identity.residual_and_loss(u, row(t, teacher=ubar))))(t)
    for i in range(len(t)):
        one = identity.residual_and_loss(u, row(t[i], teacher=ubar))
        for found, expected in zip(many, one, strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-8, 0.01, 1.0])
def test_residual_and_loss_are_finite_in_single_precision_at_all_lengths(gap):
    u, ubar = (mfx.nn.cast(field, jnp.float32) for field in fields())
    z, v = jnp.array([0.3, -1.2, 0.5], jnp.float32), jnp.array([1.1, 0.4, -0.6], jnp.float32)
    at = mfx.Row(z, v, 1 - gap, 1.0, context=mfx.Context(jnp.asarray(0), ubar))
    residual, loss = mfx.RecursiveConsistency().residual_and_loss(u, at)
    assert residual.dtype == loss.dtype == jnp.float32
    assert np.isfinite(residual).all() and np.isfinite(loss)


def test_a_step_costs_one_pass_of_the_field_for_each_of_its_steps():
    seen = []

    class Counting(mfx.AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            seen.append((float(r), float(t), condition, key is None))
            return z

    condition, key = jnp.ones(3), jr.key(0)
    for identity, count in (
        (mfx.RecursiveConsistency(4), 4),
        (mfx.RecursiveConsistency(2, by_teacher=False), 2),
        (mfx.RecursiveConsistency(1, conditional=0.5, by_teacher=False), 2),
    ):
        seen.clear()
        at = mfx.Row(*taught().v[None].repeat(2, 0), R, T, condition, key=key, context=row(teacher=Counting()).context)
        identity.residual(Counting(), at)
        assert len(seen) == 1 + count == 1 + identity.facts.passes.forward
        assert all((given == condition).all() for _, _, given, _ in seen)
        assert [without for *_, without in seen].count(True) == (count if identity.by_teacher else 0)
        assert seen[-1][0] == float(jnp.asarray(R))  # it ends at r exactly


def test_a_teacher_is_needed_unless_the_field_teaches_itself():
    with pytest.raises(ValueError, match="context must have a teacher for RecursiveConsistency, got none"):
        mfx.RecursiveConsistency().residual(fields()[0], row())
    assert mfx.RecursiveConsistency().facts.needs_teacher
    assert not mfx.RecursiveConsistency(by_teacher=False).facts.needs_teacher


def test_boundary_rows_are_needed_along_the_fields_own_velocity():
    mfx.Objective(mfx.RecursiveConsistency(), identity_share=1)
    with pytest.raises(ValueError, match="identity_share must be below 1 for RecursiveConsistency"):
        mfx.Objective(mfx.RecursiveConsistency(conditional=0.9), identity_share=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"order": 0}, "order must be an integer >= 1, got 0"),
        ({"order": True}, "order must be an integer >= 1, got True"),
        ({"step": 0.0}, "step must be > 0, got 0.0"),
        ({"step": -0.1}, r"step must lie in \[0, 1\] or be a schedule, got -0.1"),
        ({"step": 1.5}, r"step must lie in \[0, 1\] or be a schedule, got 1.5"),
        ({"step": math.nan}, r"step must lie in \[0, 1\] or be a schedule, got nan"),
        ({"conditional": 1.5}, r"conditional must lie in \[0, 1\] or be a schedule, got 1.5"),
        ({"clip": 0.0}, "clip must be > 0 and finite, got 0.0"),
        ({"clip": math.nan}, "clip must be > 0 and finite, got nan"),
    ],
)
def test_values_without_meaning_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        mfx.RecursiveConsistency(**options)


def test_the_papers_weight_is_the_codes_but_for_its_factor_of_the_length():
    settings = mfx.RecursiveConsistency().facts.paper_settings
    residual = jnp.array([0.3, -0.2, 0.001])
    at = taught(R)
    error = jnp.sum(residual**2)
    np.testing.assert_allclose(settings["weight"](error, at) * error, loss_of(np.asarray(residual), 0.0), rtol=1e-12)


def test_attention_without_a_forward_derivative_serves_it():
    """No derivative of the field is taken but the gradient."""
    assert not mfx.RecursiveConsistency().facts.learns_through_derivative
    program = jax.make_jaxpr(lambda z: mfx.RecursiveConsistency().residual(OnlyBackward(), at_state(z)))(jnp.ones(3))
    assert "custom_vjp" in str(program)


@jax.custom_vjp
def backward_only(z):
    return jnp.sin(z)


backward_only.defvjp(lambda z: (jnp.sin(z), z), lambda z, g: (jnp.cos(z) * g,))


class OnlyBackward(mfx.AbstractField):
    """A field that forward mode refuses."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return backward_only(z)


def at_state(z):
    return mfx.Row(z, z, R, T, context=mfx.Context(jnp.asarray(0), OnlyBackward()))
