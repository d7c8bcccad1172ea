import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from affine_field import Affine, affine, noise, samples

import mf_eqx as mfx
from mf_eqx.metrics import frechet_distance_of_moments

MEAN, COVARIANCE = np.array([0.5, -1.0]), np.array([[0.5, 0.2], [0.2, 0.3]])
BATCH = mfx.Batch(np.zeros((64, 2), np.float32))


def objective(mean=MEAN, covariance=COVARIANCE, population=mfx.RunningPopulation(0.9), **options):
    mean, covariance = (np.asarray(moment, np.float32) for moment in (mean, covariance))
    return mfx.SampleObjective(mfx.FrechetLoss(mean, covariance, population=population, **options))


@eqx.filter_jit
def evaluated(loss, field, batch=BATCH, *, key=jr.key(0), state=None):
    value, (metrics, after) = loss.evaluate(field, batch, loss.init() if state is None else state, key=key)
    return value, metrics, after


def test_first_loss_is_the_distance_of_the_batch():
    y = samples(affine(), jr.key(0))
    expected = frechet_distance_of_moments(y.mean(axis=0), np.cov(y.T, bias=True), MEAN, COVARIANCE)
    found, metrics, _ = evaluated(objective(), affine())
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert metrics["loss"].value == metrics["frechet_distance"].value == found


def test_features_are_compared_in_place_of_samples():
    def features(x):
        return jnp.stack([x[0] ** 2, x[0] * x[1], x[1], jnp.ones(())])

    mean, covariance = np.array([1.0, 0.5, 0.0, 2.0]), np.diag([1.0, 2.0, 0.5, 0.0])
    y = samples(affine(), jr.key(0))
    y = np.stack([y[:, 0] ** 2, y[:, 0] * y[:, 1], y[:, 1], np.ones(64)], axis=1)
    expected = frechet_distance_of_moments(y.mean(axis=0), np.cov(y.T, bias=True), mean, covariance)
    found, _, _ = evaluated(objective(mean, covariance, features=features), affine())
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_gradient_goes_through_the_current_batch_alone():
    _, _, before = evaluated(objective(), affine())

    def value(field, state):
        return evaluated(objective(), field, key=jr.key(1), state=state)[0]

    def fall(field):
        return value(affine(), evaluated(objective(), field)[2])

    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(eqx.filter_grad(fall)(affine())))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(eqx.filter_grad(value)(affine(), before).shift))


@pytest.mark.parametrize("population", [mfx.RunningPopulation(0.7), mfx.QueuedPopulation(100)])
def test_gradient_is_that_of_finite_differences_in_float64(population):
    with jax.enable_x64(True):
        loss = mfx.SampleObjective(mfx.FrechetLoss(MEAN, COVARIANCE, population=population))
        field, batch = affine(jnp.float64), mfx.Batch(np.zeros((64, 2)))
        _, _, state = evaluated(loss, field, batch)

        @jax.jit
        def value(matrix, shift):
            return evaluated(loss, Affine(matrix, shift), batch, key=jr.key(1), state=state)[0]

        gradient = jax.grad(value, argnums=(0, 1))(field.matrix, field.shift)
        step = 1e-6
        for number, parameter in enumerate((field.matrix, field.shift)):
            for index in np.ndindex(parameter.shape):
                moved = [[field.matrix, field.shift] for _ in range(2)]
                for sign, both in zip((1, -1), moved, strict=True):
                    both[number] = parameter.at[index].add(sign * step)
                slope = (value(*moved[0]) - value(*moved[1])) / (2 * step)
                np.testing.assert_allclose(gradient[number][index], slope, rtol=1e-6, atol=1e-9)


def test_gradient_vanishes_where_moments_are_equal_and_not_elsewhere():
    with jax.enable_x64(True):
        field, batch = affine(jnp.float64), mfx.Batch(np.zeros((64, 2)))
        y = noise(jr.key(0), dtype=jnp.float64) @ np.asarray(field.matrix).T + np.asarray(field.shift)

        def gradient(mean):
            moments = mean, np.cov(y.T, bias=True)
            loss = mfx.SampleObjective(mfx.FrechetLoss(*moments, population=mfx.RunningPopulation(0)))
            return eqx.filter_grad(lambda field: evaluated(loss, field, batch)[0])(field)

        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient(y.mean(axis=0)))) < 1e-10
        np.testing.assert_allclose(gradient(y.mean(axis=0) - 0.5).shift, 1.0, rtol=1e-10)


def test_relative_loss_has_the_gradient_of_the_logarithm():
    distance, _, _ = evaluated(objective(), affine())
    loss, metrics, _ = evaluated(objective(relative=True), affine())
    np.testing.assert_allclose([loss, metrics["frechet_distance"].value], [1, distance], rtol=1e-6)
    slopes = [eqx.filter_grad(lambda f, r=r: evaluated(objective(relative=r), f)[0])(affine()) for r in (True, False)]
    np.testing.assert_allclose(slopes[0].matrix, slopes[1].matrix / distance, rtol=1e-4)


def test_between_two_eigenvalue_problems_the_root_is_its_tangent_which_bounds_the_distance_from_below():
    population = mfx.RunningPopulation(0.5)  # which six batches fill
    losses = [objective(population=population), objective(population=population, refresh=4)]
    states, last = [loss.init() for loss in losses], None
    for number in range(12):
        field, key = Affine((1 + 0.02 * number) * affine().matrix, affine().shift), jr.key(number)
        values, slopes = [], []
        for i, (loss, state) in enumerate(zip(losses, states, strict=True)):
            value, metrics, states[i] = evaluated(loss, field, key=key, state=state)
            gradient = eqx.filter_grad(lambda field, a=loss, s=state, k=key: evaluated(a, field, key=k, state=s)[0])
            values.append(value)
            slopes.append(gradient(field).matrix)
        difference = np.abs(slopes[0] - slopes[1]).max() / np.abs(slopes[0]).max()
        if number in (0, 2, 6, 10):  # the first, that after the filling, and every fourth from there
            np.testing.assert_allclose(*values, rtol=1e-5)
            assert difference < 1e-4
            last = values[0]
        else:
            assert values[1] < values[0]
            assert difference > 1e-3
        np.testing.assert_allclose(metrics["frechet_distance"].value, last, rtol=1e-5)


def test_relative_loss_is_divided_by_the_last_distance_with_eigenvalues():
    plain, relative = objective(refresh=2), objective(refresh=2, relative=True)
    state = plain.init()
    for number in range(3):
        field, key = Affine((1 + 0.02 * number) * affine().matrix, affine().shift), jr.key(number)
        expected, metrics, after = evaluated(plain, field, key=key, state=state)
        found, _, again = evaluated(relative, field, key=key, state=state)
        np.testing.assert_allclose(found, expected / metrics["frechet_distance"].value, rtol=1e-5)
        assert eqx.tree_equal(again, after, rtol=1e-6)
        state = after


def test_integers_are_moments():
    loss = mfx.SampleObjective(mfx.FrechetLoss([0, 1], [[1, 0], [0, 1]]))
    gradient = eqx.filter_grad(lambda field: evaluated(loss, field)[0])(affine())
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([np.nan, 0.0], np.eye(2), "mean must be finite"),
        ([0.0, 0.0], np.diag([1.0, np.inf]), "covariance must be finite"),
        ([0.0, 0.0], np.eye(3), r"mean and covariance must be of shapes \(dim,\) and \(dim, dim\), got \(2,\)"),
        (0.0, np.eye(1), r"mean and covariance must be of shapes .*, got \(\) and \(1, 1\)"),
        ([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], "covariance must be symmetric, got entries that differ by 0.5"),
        ([0.0, 0.0], np.diag([1.0, -1.0]), "covariance must be positive semi-definite, got the eigenvalue -1.0"),
    ],
)
def test_what_are_no_moments_is_refused(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        mfx.FrechetLoss(mean, covariance)


@pytest.mark.parametrize("refresh", [0, True])
def test_what_is_no_number_of_steps_is_refused(refresh):
    with pytest.raises(ValueError, match="refresh must be an integer >= 1"):
        objective(refresh=refresh)


def test_what_is_no_population_is_refused():
    with pytest.raises(ValueError, match=r"population must be an instance of AbstractPopulation, got 0\.999"):
        mfx.FrechetLoss(MEAN, COVARIANCE, population=0.999)


def test_a_mean_far_from_zero_costs_no_precision():
    def slope(mean):
        loss = objective(np.full(2, mean), 0.01 * np.eye(2))
        field = Affine(0.2 * jnp.eye(2), loss.losses[0].mean)
        return eqx.filter_grad(lambda field: evaluated(loss, field)[0])(field).matrix

    np.testing.assert_allclose(slope(1000.0), slope(0.0), rtol=0.02, atol=0.002)
