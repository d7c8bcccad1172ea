"""The objective of losses on generated samples: what it generates, its state, and that it trains."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from affine_field import affine, noise, samples
from devices import run_on_devices

import mf_eqx as mfx
from mf_eqx.metrics import energy_distance

MEAN, COVARIANCE = np.array([0.5, -1.0], np.float32), np.array([[0.5, 0.2], [0.2, 0.3]], np.float32)
BATCH = mfx.Batch(np.zeros((64, 2), np.float32))


class Seen(mfx.AbstractSampleLoss):
    """The mean of the samples; its state is the samples themselves."""

    factor: float = 1.0

    def init(self):
        return jnp.zeros((64, 2))

    def batches_to_fill(self, rows):
        return 0

    def __call__(self, x, batch, state):
        return self.factor * jnp.mean(x), {"size": mfx.Mean(jnp.sum(x**2), jnp.ones(()))}, x


@eqx.filter_jit
def evaluated(objective, field=None, batch=BATCH):
    return objective.evaluate(affine() if field is None else field, batch, objective.init(), key=jr.key(0))


def test_samples_are_made_of_the_noise_of_each_row():
    _, (metrics, (x,)) = evaluated(mfx.SampleObjective(Seen()))
    np.testing.assert_allclose(x, samples(affine(), jr.key(0)), rtol=1e-5)
    assert set(metrics) == {"loss", "size"}
    rows = np.array([5, 3], np.int32)
    _, (_, (x,)) = evaluated(mfx.SampleObjective(Seen()), batch=mfx.Batch(BATCH.x[:2], index=rows))
    np.testing.assert_allclose(x, samples(affine(), jr.key(0))[rows], rtol=1e-5)


def test_samples_have_the_conditions_of_the_rows():
    condition = np.arange(64, dtype=np.float32)
    _, (_, (x,)) = evaluated(mfx.SampleObjective(Seen()), batch=mfx.Batch(BATCH.x, condition))
    np.testing.assert_allclose(x, samples(affine(), jr.key(0)) + condition[:, None], rtol=1e-5)


@pytest.mark.parametrize("method", [mfx.sample, mfx.sample_heun])
def test_samples_are_made_along_the_grid_by_the_method(method):
    times = (1.0, 0.7, 0.0)
    _, (_, (x,)) = evaluated(mfx.SampleObjective(Seen(), times=times, method=method))
    eps = jnp.asarray(noise(jr.key(0)), jnp.float32)
    expected = jax.vmap(lambda eps: method(affine(), eps, times=times))(eps)
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_losses_are_added_by_their_weights():
    value, (metrics, states) = evaluated(mfx.SampleObjective((Seen(), Seen(2.0)), weights=(3.0, 0.5)))
    single, _ = evaluated(mfx.SampleObjective(Seen()))
    np.testing.assert_allclose(value, 4 * single, rtol=1e-5)
    assert set(metrics) == {"loss", "size_0", "size_1"} and len(states) == 2
    np.testing.assert_allclose(evaluated(mfx.SampleObjective([Seen(), Seen(2.0)]))[0], 3 * single, rtol=1e-5)


def test_populations_are_filled_with_samples_of_the_field_as_it_is():
    objective = mfx.SampleObjective((mfx.FrechetLoss(MEAN, COVARIANCE, population=mfx.QueuedPopulation(150)), Seen()))
    assert objective.batches_to_fill(64) == 3 and mfx.SampleObjective(Seen()).batches_to_fill(64) == 0
    queue, last = objective.fill(affine(), [BATCH] * 3, key=jr.key(5))
    parts = [samples(affine(), jr.fold_in(jr.key(5), number)) for number in range(3)]
    np.testing.assert_allclose(queue.features, np.concatenate(parts[::-1])[:150] - MEAN, rtol=1e-4, atol=1e-5)
    assert queue.count == 150
    np.testing.assert_allclose(last, parts[-1], rtol=1e-5)


def test_times_may_be_an_array():
    state, _ = trained(1, mfx.SampleObjective(mfx.FrechetLoss(MEAN, COVARIANCE), times=jnp.asarray([1.0, 0.5, 0.0])))
    assert state.faults.total == 0


@pytest.mark.parametrize(
    ("times", "method", "trained"),
    [
        ((1.0, 0.0), mfx.sample, mfx.Trained(True, False, False, False, ends_at_data=True, one_step=True)),
        ((1.0, 0.5, 0.0), mfx.sample, mfx.Trained(True, False, False, velocity=False)),
        ((1.0, 0.5), mfx.sample, mfx.Trained(True, False, False, False, one_step=True)),
        ((1.0, 0.0), mfx.sample_euler, mfx.Trained(False, False, False)),
    ],
)
def test_what_is_trained_is_known(times, method, trained):
    assert mfx.SampleObjective(Seen(), times=times, method=method).trained == trained


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mfx.SampleObjective(()), "losses must be at least one, got none"),
        (lambda: mfx.SampleObjective(mfx.MeanFlow()), "losses must be an instance of AbstractSampleLoss, got MeanFlow"),
        (lambda: mfx.SampleObjective(Seen(), (1.0, 1.0)), "weights must be 1, one for each loss, got 2"),
        (lambda: mfx.SampleObjective(Seen(), (0.0,)), "weights must be > 0"),
        (lambda: mfx.SampleObjective(Seen(), times=(0.0, 1.0)), "times must be a strictly decreasing sequence"),
        (
            lambda: evaluated(mfx.SampleObjective(Seen()), batch=mfx.Batch(np.zeros((64, 2), np.uint8))),
            "x must be one floating-point array here .*, got uint8",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In a training


def frechet(population=mfx.RunningPopulation(0.9)):
    return mfx.SampleObjective(mfx.FrechetLoss(MEAN, COVARIANCE, population=population))


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


@pytest.mark.slow
def test_training_brings_samples_to_the_moments_of_the_data():
    state, metrics = trained(300, frechet())
    x = jax.vmap(lambda eps: mfx.sample(state.field, eps))(jr.normal(jr.key(3), (4000, 2)))
    np.testing.assert_allclose(jnp.mean(x, axis=0), MEAN, atol=0.1)
    np.testing.assert_allclose(jnp.cov(x.T), COVARIANCE, atol=0.12)
    truth = jr.multivariate_normal(jr.key(4), MEAN, COVARIANCE, (4000,))
    assert energy_distance(x, truth) < 0.02
    assert metrics["loss"].value < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("population", [mfx.RunningPopulation(0.9), mfx.QueuedPopulation(700)])
def test_state_of_the_losses_is_saved_and_training_continues_with_the_same_bits(population, tmp_path):
    checkpoint = pytest.importorskip("mf_eqx.checkpoint")
    pytest.importorskip("orbax.checkpoint")
    half, _ = trained(5, frechet(population))
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, half)
    checkpoints.wait()
    whole, _ = trained(10, frechet(population), half)
    restored = checkpoints.load(lambda: trained(0, frechet(population))[0]).state
    assert all(leaf.any() for leaf in jax.tree.leaves(restored.objective))
    assert eqx.tree_equal(trained(10, frechet(population), restored)[0], whole)


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_moments_as_they_were():
    state, _ = trained(2, frechet())
    spoiled = eqx.tree_at(lambda state: state.field, state, jax.tree.map(lambda leaf: leaf * jnp.nan, state.field))
    before = jax.tree.map(np.asarray, spoiled.objective)
    after, _ = trained(3, frechet(), spoiled)
    assert after.faults.total == 1
    assert eqx.tree_equal(jax.tree.map(np.asarray, after.objective), before)


def test_a_state_without_moments_is_refused():
    step = mfx.TrainStep(frechet(), optax.sgd(0.1))
    state = mfx.init_state(affine(), step.optimizer, key=jr.key(0))
    with pytest.raises(ValueError, match="init_state must be given the objective of the step, SampleObjective"):
        step(state, BATCH)


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match="accumulation must be 1 for a loss that is no mean over rows, got 2"):
        mfx.TrainStep(frechet(), optax.sgd(0.1), accumulation=2)


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("methods_on_devices.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["SampleObjective", "RewardObjective", "InductiveMomentMatching", "TerminalVelocityMatching"]
)
def test_eight_devices_train_as_one_does(on_devices, name):
    assert on_devices[name] < 1e-10


@pytest.mark.slow
def test_eight_devices_train_as_one_does_in_float32_with_a_network_of_features(on_devices):
    # Parameters differ by 3e-7 after three steps, from sums in another order, and the slope of the root by 1e-5: it is
    # that of small eigenvalues of a covariance in float32.
    assert on_devices["float32"] < 5e-5
