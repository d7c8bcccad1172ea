import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from devices import run_on_devices

import mf_eqx as mfx
from mf_eqx.metrics import energy_distance, frechet_distance_of_moments

MEAN, COVARIANCE = np.array([0.5, -1.0]), np.array([[0.5, 0.2], [0.2, 0.3]])
BATCH = mfx.Batch(np.zeros((64, 2), np.float32))


class Affine(mfx.AbstractField):
    """One step makes A eps + b of noise."""

    matrix: jax.Array
    shift: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z - self.matrix @ z - self.shift


def affine():
    return Affine(jnp.array([[1.0, 0.3], [0.0, 0.8]]), jnp.array([0.1, 0.2]))


def loss(decay=0.9):
    return mfx.FrechetLoss(MEAN.astype(np.float32), COVARIANCE.astype(np.float32), decay=decay)


def samples(field, key, rows=64):
    eps = jax.vmap(lambda index: jr.normal(jr.fold_in(key, index), (2,)))(jnp.arange(rows))
    return np.asarray(eps @ field.matrix.T + field.shift, np.float64)


def test_first_loss_is_the_distance_of_the_batch():
    y = samples(affine(), jr.key(0))
    expected = frechet_distance_of_moments(y.mean(axis=0), np.cov(y.T, bias=True), MEAN, COVARIANCE)
    found, (metrics, _) = loss().evaluate(affine(), BATCH, loss().init(), key=jr.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert metrics["loss"].value == found


def test_moments_are_averages_over_steps():
    state, y = loss().init(), [samples(affine(), jr.key(seed)) for seed in range(3)]
    for seed in range(3):
        found, (_, state) = loss().evaluate(affine(), BATCH, state, key=jr.key(seed))
    weights = 0.9 ** np.array([2, 1, 0]) / np.sum(0.9 ** np.arange(3))
    mean = sum(w * part.mean(axis=0) for w, part in zip(weights, y, strict=True))
    product = sum(w * part.T @ part / len(part) for w, part in zip(weights, y, strict=True))
    expected = frechet_distance_of_moments(mean, product - np.outer(mean, mean), MEAN, COVARIANCE)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_gradient_goes_through_the_current_batch_alone():
    _, (_, before) = loss().evaluate(affine(), BATCH, loss().init(), key=jr.key(0))

    def value(field, state):
        return loss().evaluate(field, BATCH, state, key=jr.key(1))[0]

    def fall(field):
        moments = loss().evaluate(field, BATCH, loss().init(), key=jr.key(0))[1][1]
        return value(affine(), moments)

    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(eqx.filter_grad(fall)(affine())))
    step = 1e-2
    moved = [eqx.tree_at(lambda f: f.shift, affine(), affine().shift + jnp.array([s, 0.0])) for s in (step, -step)]
    slope = (value(moved[0], before) - value(moved[1], before)) / (2 * step)
    np.testing.assert_allclose(eqx.filter_grad(value)(affine(), before).shift[0], slope, rtol=1e-2)


def trained(steps, objective, state=None):
    """The state after so many steps in all."""
    step = mfx.TrainStep(objective, optax.adam(optax.cosine_decay_schedule(1e-2, 300)))
    if state is None:
        field = mfx.MLP(2, width=32, depth=2, key=jr.key(0))
        state = mfx.init_state(field, step.optimizer, (), objective, key=jr.key(1))
    metrics = None
    for _ in range(0 if steps == 0 else int(state.step), steps):
        state, metrics = step(state, mfx.Batch(jnp.zeros((256, 2))))
    return state, metrics


def test_training_brings_samples_to_the_moments_of_the_data():
    state, metrics = trained(300, loss())
    x = jax.vmap(lambda eps: mfx.sample(state.field, eps))(jr.normal(jr.key(3), (4000, 2)))
    np.testing.assert_allclose(jnp.mean(x, axis=0), MEAN, atol=0.1)
    np.testing.assert_allclose(jnp.cov(x.T), COVARIANCE, atol=0.12)
    truth = jr.multivariate_normal(jr.key(4), MEAN, COVARIANCE, (4000,))
    assert energy_distance(x, truth) < 0.02
    assert metrics["loss"].value < 0.02


@pytest.mark.slow
def test_state_of_the_objective_is_saved_and_training_continues_with_the_same_bits(tmp_path):
    checkpoint = pytest.importorskip("mf_eqx.checkpoint")
    pytest.importorskip("orbax.checkpoint")
    half, _ = trained(5, loss())
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, half)
    checkpoints.wait()
    whole, _ = trained(10, loss(), half)
    restored = checkpoints.load(lambda: trained(0, loss())[0]).state
    assert restored.objective.weight > 0
    assert eqx.tree_equal(trained(10, loss(), restored)[0], whole)


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_moments_as_they_were():
    state, _ = trained(2, loss())
    spoiled = eqx.tree_at(lambda state: state.field, state, jax.tree.map(lambda leaf: leaf * jnp.nan, state.field))
    before = jax.tree.map(np.asarray, spoiled.objective)
    after, _ = trained(3, loss(), spoiled)
    assert after.faults.total == 1
    assert eqx.tree_equal(jax.tree.map(np.asarray, after.objective), before)


def test_a_state_without_moments_is_refused():
    step = mfx.TrainStep(loss(), optax.sgd(0.1))
    state = mfx.init_state(affine(), step.optimizer, key=jr.key(0))
    with pytest.raises(ValueError, match="init_state must be given the objective, FrechetLoss, which has a state"):
        step(state, BATCH)


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match="accumulation must be 1 for a loss that is no mean over rows, got 2"):
        mfx.TrainStep(loss(), optax.sgd(0.1), accumulation=2)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay must lie in \[0, 1\), got {decay}"):
        loss(decay)


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("methods_on_devices.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FrechetLoss", "InductiveMomentMatching", "TerminalVelocityMatching"])
def test_eight_devices_train_as_one_does(on_devices, name):
    assert on_devices[name] < 1e-10


def test_integers_are_moments_and_moments_that_are_not_finite_are_refused():
    whole = mfx.FrechetLoss([0, 1], [[1, 0], [0, 1]])
    gradient = eqx.filter_grad(lambda f: whole.evaluate(f, BATCH, whole.init(), key=jr.key(0))[0])(affine())
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    for moments in (([np.nan, 0.0], np.eye(2)), ([0.0, 0.0], np.diag([1.0, np.inf]))):
        with pytest.raises(ValueError, match="must be finite"):
            mfx.FrechetLoss(*moments)


def test_a_mean_far_from_zero_costs_no_precision():
    def slope(mean):
        objective = mfx.FrechetLoss(np.full(2, mean), 0.01 * np.eye(2))
        field = Affine(0.2 * jnp.eye(2), objective.mean)
        return eqx.filter_grad(lambda f: objective.evaluate(f, BATCH, objective.init(), key=jr.key(0))[0])(field).matrix

    np.testing.assert_allclose(slope(1000.0), slope(0.0), rtol=0.02, atol=0.002)
