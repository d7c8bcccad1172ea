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

PATH = mfx.LinearInterpolant()
IMM = mfx.InductiveMomentMatching(0.125, power=2.0, earlier_time=lambda t, gap: t - gap)
DEFAULT = mfx.InductiveMomentMatching()


@functools.cache
def field(dtype=jnp.float64):
    return mfx.nn.cast(filled(lambda: mfx.MLP(2, width=8, depth=1, key=jr.key(0))), dtype)


def group(r=0.2, t=0.7, size=4):
    x, eps = jnp.asarray(np.random.default_rng(1).standard_normal((2, size, 2)))

    def make(x, eps):
        return mfx.Row(*PATH.state_and_velocity(x, eps, t), r, t, x=x, eps=eps)

    return eqx.tree_at(lambda row: row.path, jax.vmap(make)(x, eps), PATH, is_leaf=lambda node: node is None)


@eqx.filter_jit
def value_and_gradient(identity, rows, field):
    return eqx.filter_value_and_grad(lambda u: identity.residual_and_loss(u, rows)[1])(field)


def ends(u, rows, r, t, s):
    earlier = (1 - s) * rows.x + s * rows.eps
    y = rows.z - (t - r) * jax.vmap(lambda z: u(z, r, t))(rows.z)
    return y, earlier - (s - r) * jax.vmap(lambda z: u(z, r, s))(earlier)


@pytest.mark.parametrize(("r", "s"), [(0.2, 0.575), (0.65, 0.65)])
def test_loss_is_the_discrepancy_of_a_group_and_the_residual_that_of_its_rows(r, s):
    rows = group(r)
    y, target = ends(field(), rows, r, 0.7, s)

    def mean_kernel(a, b):
        distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
        return np.mean(np.exp(-distances / (2 * (0.7 - r))))

    residual, loss = eqx.filter_jit(IMM.residual_and_loss)(field(), rows)
    np.testing.assert_allclose(residual, y - target, rtol=0, atol=1e-14)
    discrepancy = mean_kernel(y, y) + mean_kernel(target, target) - 2 * mean_kernel(y, target)
    log_ratio = 2 * np.log(0.3 / 0.7)
    weight = 0.3**2 / 2 / (0.3**2 + 0.7**2) * (2 / 0.3 + 2 / 0.7) / (1 + np.exp(log_ratio - 4.0))
    expected = weight * discrepancy
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-12)


def test_equal_samples_have_neither_loss_nor_gradient_that_is_not_finite():
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), group(0.7, 0.7))
    loss, gradient = value_and_gradient(IMM, rows, field())
    np.testing.assert_allclose(loss, 0, atol=1e-15)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


class Times(mfx.AbstractIdentityWithLoss):
    """Reports r and t of each row as the residual: its groups must share them."""

    @property
    def facts(self):
        return mfx.Facts(group=4)

    def residual_and_loss(self, field, row):
        spread = jnp.max(row.t) - jnp.min(row.t) + jnp.max(row.r) - jnp.min(row.r)
        return jnp.stack([row.r, row.t], axis=1), spread


def test_rows_of_a_group_share_their_times_and_groups_do_not():
    objective = mfx.Objective(Times(), identity_share=0.5)
    _, metrics = eqx.filter_jit(objective)(field(), mfx.Batch(jnp.zeros((64, 2))), key=jr.key(0))
    assert metrics["identity_error"].value > 0
    only = mfx.Objective(Times(), identity_share=1)
    loss, metrics = eqx.filter_jit(only)(field(), mfx.Batch(jnp.zeros((64, 2))), key=jr.key(0))
    assert loss == 0
    assert np.count_nonzero(metrics["identity_error_by_gap"].count) > 1


@pytest.mark.parametrize(("share", "rows"), [(0.5, 8), (0.25, 16), (1, 4), ("4/5", 5), (0.75, 16)])
def test_the_batch_must_hold_whole_groups(share, rows):
    objective = mfx.Objective(IMM, identity_share=share)
    assert objective.divisor == rows
    step = mfx.TrainStep(objective, optax.sgd(0.1), accumulation=2)
    step.check_batch_size(2 * rows)
    with pytest.raises(ValueError, match=f"positive multiple of {rows} .* = {2 * rows}, got {rows}"):
        step.check_batch_size(rows)


@pytest.mark.slow
def test_parts_of_a_batch_train_as_the_whole():
    objective = mfx.Objective(IMM, identity_share=0.5)
    batch = mfx.Batch(jr.normal(jr.key(4), (32, 2)))
    results = []
    for accumulation in (1, 4):
        step = mfx.TrainStep(objective, optax.sgd(0.1), accumulation=accumulation)
        state, metrics = step(mfx.init_state(field(), step.optimizer, key=jr.key(1)), batch)
        results.append((eqx.filter(state.field, eqx.is_array), metrics["loss"].value))
    assert eqx.tree_equal(*results, rtol=1e-12, atol=1e-14)


def test_a_group_without_a_loss_of_its_own_is_refused():
    class Grouped(mfx.AbstractIdentity):
        facts = mfx.Facts(group=2)

        def residual(self, field, row):
            return row.z

    with pytest.raises(ValueError, match="group must be 1 for Grouped, which is no AbstractIdentityWithLoss; got 2"):
        mfx.Objective(Grouped())


@pytest.mark.parametrize("particles", [1, 0])
def test_fewer_than_two_particles_are_refused(particles):
    with pytest.raises(ValueError, match=f"particles must be >= 2, got {particles}"):
        mfx.InductiveMomentMatching(particles=particles)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_loss_is_finite_at_both_ends_of_time(t, dtype):
    rows = jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, group(0.0, t))
    loss, gradient = value_and_gradient(DEFAULT, rows, field(dtype))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradient)))
