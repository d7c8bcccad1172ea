import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import GaussianField, PointMassField, ScaledField
from methods import EXACT, METHODS, taught_by

from mf_eqx import (
    AbstractField,
    LinearInterpolant,
    MeanFlow,
    Shortcut,
    SplitMeanFlow,
    TimePairs,
    TrigonometricInterpolant,
    UniformTimes,
)
from mf_eqx.metrics import (
    draw_states,
    field_errors,
    field_truth,
    relative_error,
    relative_error_by_cell,
    relative_identity_residual,
    relative_semigroup_residual,
)

PAIRS = TimePairs(UniformTimes())


pytestmark = pytest.mark.usefixtures("x64")


def gaussian():
    return GaussianField(jnp.array([1.0, -0.5]), 0.4)


@functools.cache
def drawn_states():
    return draw_states(gaussian().sample, LinearInterpolant(), PAIRS, 200, key=jr.key(1))


def states(rows=200):
    """The first rows of 200."""
    return [jnp.asarray(values[:rows]) for values in map(np.asarray, drawn_states())]


class WrongTimes(AbstractField):
    """A field that is right at r = t and takes v(z, t) for the average elsewhere, or right with a share of 0."""

    truth: AbstractField
    share: float | np.ndarray = 1.0

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.truth(z, r + self.share * (t - r), t)


@jax.jit
def velocities(truth, z, t):
    return jax.vmap(truth)(z, t, t)


# States


def test_drawn_states_have_the_moments_of_the_true_marginal():
    truth = gaussian()
    z, r, t = draw_states(truth.sample, LinearInterpolant(), PAIRS, 20_000, key=jr.key(0))
    std = jnp.sqrt((1 - t) ** 2 * truth.std**2 + t**2)
    standardised = (z - (1 - t)[:, None] * truth.mean) / std[:, None]
    assert z.shape == (20_000, 2)
    assert bool(jnp.all((r >= 0) & (r <= t) & (t <= 1)))
    # 20000 draws: the standard error of a mean is 0.007, of a variance 0.01.
    np.testing.assert_allclose(standardised.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(jnp.cov(standardised.T), jnp.eye(2), atol=0.04)


def test_drawn_states_follow_the_given_interpolant():
    point = PointMassField(jnp.array([3.0]))
    z, _, t = draw_states(point.sample, TrigonometricInterpolant(), PAIRS, 20_000, key=jr.key(0))
    eps = (z[:, 0] - jnp.cos(jnp.pi / 2 * t) * 3) / jnp.sin(jnp.pi / 2 * t)
    np.testing.assert_allclose([eps.mean(), eps.var()], [0, 1], atol=0.04)


def test_condition_of_each_row_reaches_the_sampler():
    def sample(*, key, condition):
        return jnp.asarray([10.0 * condition])

    label = jnp.arange(5)
    z, _, t = draw_states(sample, LinearInterpolant(), PAIRS, 5, label, key=jr.key(0))
    residual = (z[:, 0] - (1 - t) * 10 * label) / t
    assert jnp.abs(residual).max() < 5  # standard normal noise; a wrong label would be off by 10 (1 - t) / t


def test_states_keep_the_precision_of_the_data():
    point = PointMassField(jnp.zeros(2, jnp.float32))
    for drawn in draw_states(point.sample, LinearInterpolant(), PAIRS, 3, key=jr.key(0)):
        assert drawn.dtype == jnp.float32


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows must be >= 1, got 0"):
        draw_states(gaussian().sample, LinearInterpolant(), PAIRS, 0, key=jr.key(0))


# Errors against the truth


@pytest.mark.parametrize("truth", [gaussian, lambda: PointMassField(jnp.array([0.3, 2.0]))], ids=["gaussian", "point"])
def test_truth_has_no_error(truth):
    truth = truth()
    assert relative_error(truth, truth, *states()).value < 1e-30


def test_scaled_truth_has_the_squared_excess_as_its_error_in_every_cell():
    truth = gaussian()
    errors = relative_error_by_cell(ScaledField(truth, 1.3), truth, *states())
    above = np.tri(4, dtype=bool).T
    np.testing.assert_allclose(errors.value[above], 0.09, rtol=1e-12)
    assert np.isnan(errors.value[~above]).all()  # r <= t: no row falls below the diagonal


def test_relative_error_is_the_ratio_of_mean_squares():
    truth, field = gaussian(), WrongTimes(gaussian())
    z, r, t = states(50)
    u, exact = (np.asarray(jax.jit(jax.vmap(f))(z, r, t)) for f in (field, truth))
    expected = np.mean((u - exact) ** 2) / np.mean(exact**2)
    errors = relative_error(field, truth, z, r, t)
    assert expected > 1e-3
    np.testing.assert_allclose(errors.value, expected, rtol=1e-12)
    assert errors.count == 50


def test_each_row_counts_in_its_own_cell():
    class One(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.ones_like(z)

    class Zero(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.zeros_like(z) + z * 0

    # Lower edges belong to the cell above them, the last upper edge to the last cell; (0.9, 1.1) lies outside.
    r = jnp.array([0.0, 0.1, 0.5, 0.25, 1.0, 0.9, -0.1])
    t = jnp.array([0.49, 0.5, 0.5, 1.0, 1.0, 1.1, 0.3])
    errors = relative_error_by_cell(Zero(), One(), jnp.zeros((7, 3)), r, t, edges=(0.0, 0.25, 0.5, 1.0))
    np.testing.assert_array_equal(errors.count, [[0, 1, 1], [0, 0, 1], [0, 0, 2]])
    np.testing.assert_array_equal(errors.truth, 3 * errors.count)
    np.testing.assert_array_equal(errors.error, 3 * errors.count)


def test_value_that_is_not_finite_spoils_its_own_cell_only():
    class Broken(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.where(r > 0.5, jnp.nan, z)

    z, r, t = jnp.ones((2, 1)), jnp.array([0.1, 0.6]), jnp.array([0.2, 0.9])
    errors = relative_error_by_cell(Broken(), ScaledField(Broken(), 2.0), z, r, t, edges=(0.0, 0.5, 1.0))
    assert errors.value[0, 0] == 0.25
    assert jnp.isnan(errors.error[1, 1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["r", "t"])
def test_time_that_is_not_finite_spoils_all_cells(which, value):
    truth = gaussian()
    z, *times = states()
    times[which] = jnp.asarray(np.where(np.arange(200) == 3, value, times[which]))
    assert np.isnan(relative_error_by_cell(ScaledField(truth, 1.5), truth, z, *times).value).all()


def test_empty_cells_are_nan_without_a_stop_by_debug_nans():
    truth = gaussian()
    rows = states()
    with jax.debug_nans(True):
        found = relative_error_by_cell(ScaledField(truth, 1.5), truth, *rows).value
    np.testing.assert_array_equal(np.isnan(found), np.tri(4, k=-1, dtype=bool))


def test_cells_add_up_to_the_overall_error():
    truth, field = gaussian(), WrongTimes(gaussian())
    drawn = states()
    overall, cells = relative_error(field, truth, *drawn), relative_error_by_cell(field, truth, *drawn)
    for name in ("error", "truth", "count"):
        np.testing.assert_allclose(getattr(cells, name).sum(), getattr(overall, name), rtol=1e-12)


def test_errors_of_two_sets_of_rows_add():
    truth, field = gaussian(), WrongTimes(gaussian())
    drawn = states()
    halves = [relative_error(field, truth, *(x[part] for x in drawn)) for part in (slice(0, 80), slice(80, None))]
    total, whole = halves[0] + halves[1], relative_error(field, truth, *drawn)
    np.testing.assert_allclose(total.value, whole.value, rtol=1e-12)
    assert total.count == whole.count == 200


def test_condition_of_each_row_reaches_the_fields():
    class Labelled(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return z * condition

    class Plain(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return z * jnp.where(condition > 1, condition, condition + 1)

    times = jnp.zeros(4), jnp.ones(4)
    errors = relative_error(Plain(), Labelled(), jnp.ones((4, 1)), *times, jnp.arange(4))
    np.testing.assert_array_equal([errors.error, errors.truth], [2, 14])


def test_table_holds_overall_diagonal_and_one_step_errors():
    truth = gaussian()
    errors = field_errors(WrongTimes(truth), known(), edges=(0.0, 0.5, 1.0))
    assert errors.diagonal.value < 1e-30  # two programs, which may round differently
    assert errors.one_step.value > errors.overall.value > 0
    assert errors.cells.value.shape == (2, 2)
    np.testing.assert_allclose(errors.cells.error.sum(), errors.overall.error, rtol=1e-12)


def test_one_step_error_is_that_at_pure_noise():
    truth = gaussian()
    errors = field_errors(WrongTimes(truth), known(20_000))
    # At t = 1 the state is N(0, I): v = z - m there, and the average over [0, 1] is z (1 - s) - m.
    expected = 2 * truth.std**2 / (2 * (1 - truth.std) ** 2 + np.sum(np.square(truth.mean)))
    np.testing.assert_allclose(errors.one_step.value, expected, rtol=0.02)  # standard error 0.9%


def test_edges_may_be_an_array():
    field, r, t = GaussianField(jnp.zeros(3), 0.5), jnp.asarray([0.1, 0.2]), jnp.asarray([0.3, 0.9])
    errors = relative_error_by_cell(field, field, jnp.ones((2, 3)), r, t, edges=np.linspace(0, 1, 3))
    np.testing.assert_array_equal(errors.count, [[1, 1], [0, 0]])


@pytest.mark.parametrize("edges", [(0.0,), (0.0, 0.5, 0.5), (1.0, 0.0)])
def test_edges_that_do_not_increase_are_refused(edges):
    truth = gaussian()
    with pytest.raises(ValueError, match="edges must be at least two strictly increasing numbers, got"):
        relative_error_by_cell(truth, truth, *states(3), edges=edges)


def test_errors_are_the_same_inside_another_jit():
    truth, field = gaussian(), WrongTimes(gaussian())
    z, r, t = states(20)
    inside = jax.jit(lambda z: relative_error(field, truth, z, r, t).value)(z)
    np.testing.assert_allclose(inside, relative_error(field, truth, z, r, t).value, rtol=1e-12)


# The truth, evaluated once


@functools.cache
def known(rows=120):
    """120 rows are two batches of 50 and a rest."""
    truth = gaussian()
    return field_truth(truth, truth.sample, LinearInterpolant(), PAIRS, rows, key=jr.key(2))


def test_known_rows_hold_the_truth_at_their_states_and_times():
    truth = gaussian()
    found = known()
    for rows in (found.overall, found.diagonal, found.one_step):
        expected = jax.jit(jax.vmap(truth))(rows.z, rows.r, rows.t)
        assert rows.z.shape == (120, 2)
        np.testing.assert_allclose(rows.u, expected, rtol=1e-12, atol=1e-14)


def test_known_rows_have_drawn_pairs_equal_times_and_the_whole_interval():
    found = known()
    assert bool(jnp.all(found.overall.r < found.overall.t))
    np.testing.assert_array_equal(found.diagonal.z, found.overall.z)
    np.testing.assert_array_equal([found.diagonal.r, found.diagonal.t], [found.overall.t, found.overall.t])
    np.testing.assert_array_equal([found.one_step.r, found.one_step.t], [np.zeros(120), np.ones(120)])


def test_states_at_the_start_of_one_step_are_fresh_noise():
    found = known(20_000)
    # Standard errors are 0.007 for the mean and 0.01 for the variance.
    np.testing.assert_allclose(found.one_step.z.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(jnp.cov(found.one_step.z.T), jnp.eye(2), atol=0.04)
    eps = (found.overall.z - (1 - found.overall.t)[:, None] * jnp.array([1.0, -0.5])) / found.overall.t[:, None]
    assert np.abs(np.corrcoef(found.one_step.z.T, eps.T)[:2, 2:]).max() < 0.04


def test_condition_of_each_row_reaches_the_truth():
    class Labelled(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return z * condition

        def sample(self, *, key, condition):
            return jr.normal(key, (2,))

    truth, label = Labelled(), jnp.arange(60)
    found = field_truth(truth, truth.sample, LinearInterpolant(), PAIRS, 60, label, key=jr.key(2))
    for rows in (found.overall, found.diagonal, found.one_step):
        np.testing.assert_array_equal(rows.condition, label)
        np.testing.assert_allclose(rows.u, rows.z * label[:, None], rtol=1e-14)


@pytest.mark.parametrize("error", [relative_error, relative_error_by_cell])
def test_values_in_place_of_the_truth_give_the_same_numbers(error):
    truth, field = gaussian(), WrongTimes(gaussian())
    z, r, t = states()
    expected, found = (error(field, given, z, r, t) for given in (truth, jax.jit(jax.vmap(truth))(z, r, t)))
    for name in ("error", "truth", "count"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


def test_table_is_made_of_the_errors_at_the_known_rows():
    truth, field = gaussian(), WrongTimes(gaussian())
    rows = known()
    errors = field_errors(field, rows)
    for name in ("overall", "diagonal", "one_step"):
        part = getattr(rows, name)
        expected = relative_error(field, truth, part.z, part.r, part.t)
        np.testing.assert_allclose(getattr(errors, name).error, expected.error, rtol=1e-12, atol=1e-25)
        np.testing.assert_allclose(getattr(errors, name).truth, expected.truth, rtol=1e-12)


# Residuals


@pytest.mark.parametrize("method", EXACT)
def test_truth_satisfies_identity_and_a_wrong_field_does_not(method):
    identity, truth = METHODS[method], gaussian()
    z, r, t = states()
    options = {"key": jr.key(3), **taught_by(identity, truth)}
    v = velocities(truth, z, t)
    right, wrong = (
        relative_identity_residual(identity, WrongTimes(truth, np.array(share)), z, v, r, t, **options)
        for share in (0.0, 1.0)
    )
    assert right < 1e-12
    assert wrong > 0.05


def test_relative_residual_of_a_constant_field_has_the_closed_form():
    class Constant(AbstractField):
        value: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.value

    # du/dt = 0, so the residual is u - v: (1, 2) - (4, -2) = (-3, 4) of length 5 against |v|^2 = 20.
    z, v = jnp.zeros((6, 2)), jnp.broadcast_to(jnp.array([4.0, -2.0]), (6, 2))
    value = relative_identity_residual(MeanFlow(), Constant(jnp.array([1.0, 2.0])), z, v, jnp.zeros(6), jnp.ones(6))
    np.testing.assert_allclose(value, np.sqrt(25 / 20), rtol=1e-12)


def test_wrong_tangent_leaves_a_residual_where_the_right_one_does_not():
    truth = gaussian()
    z, r, t = states()
    v = velocities(truth, z, t)
    for tangent in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        assert relative_identity_residual(MeanFlow(*tangent), truth, z, v, r, t) > 1e-2


@pytest.mark.parametrize("split", [0.5, 0.2, "one for each row"])
def test_truth_is_a_semigroup_and_a_wrong_field_is_not(split):
    truth = gaussian()
    z, r, t = states()
    split = jnp.asarray(np.random.default_rng(5).random(200)) if isinstance(split, str) else split
    assert relative_semigroup_residual(truth, z, r, t, split=split) < 1e-12
    assert relative_semigroup_residual(WrongTimes(truth), z, r, t, split=split) > 0.02


def test_midpoint_semigroup_residual_is_that_of_shortcut_models():
    field = WrongTimes(gaussian())
    z, r, t = states()
    u = jax.jit(jax.vmap(field))(z, r, t)
    expected = relative_identity_residual(Shortcut(), field, z, u, r, t)
    np.testing.assert_allclose(relative_semigroup_residual(field, z, r, t), expected, rtol=1e-12)


def test_residuals_are_those_of_the_field_without_dropout():
    class NoisyWithKey(AbstractField):
        truth: AbstractField

        def __call__(self, z, r, t, condition=None, *, key=None):
            u = self.truth(z, r, t)
            return u if key is None else u + jr.normal(key, z.shape)

    truth = gaussian()
    z, r, t = states()
    v = velocities(truth, z, t)
    assert relative_identity_residual(SplitMeanFlow(), NoisyWithKey(truth), z, v, r, t, key=jr.key(4)) < 1e-12


def test_each_row_draws_its_own_split():
    class Cubic(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return z * 0 + t**3

    rows = jnp.zeros((64, 1)), jnp.ones((64, 1)), jnp.zeros(64), jnp.ones(64)
    drawn = [relative_identity_residual(SplitMeanFlow(), Cubic(), *rows, key=jr.key(seed)) for seed in (0, 1)]
    # u = t^3 leaves 1 - ((1 - l) s^3 + l) with s = 1 - l, with l uniform in [0, 1].
    share = (np.arange(200_000) + 0.5) / 200_000
    expected = np.sqrt(np.mean((1 - (1 - share) ** 4 - share) ** 2))
    np.testing.assert_allclose(drawn, expected, rtol=0.25)  # 64 rows
    assert drawn[0] != drawn[1]


def test_identity_that_draws_asks_for_its_key():
    truth = gaussian()
    z, r, t = states(3)
    with pytest.raises(ValueError, match="key must be given, since SplitMeanFlow draws s from it"):
        relative_identity_residual(SplitMeanFlow(), truth, z, z, r, t)


def test_residual_of_a_field_that_is_zero_is_nan_without_a_stop_by_debug_nans():
    z, r, t = states(5)
    with jax.debug_nans(True):
        found = relative_semigroup_residual(ScaledField(gaussian(), 0.0), z, r, t)
    assert np.isnan(found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_make_residuals_and_errors_nan(value):
    truth = gaussian()
    z, r, t = states(5)
    z = z.at[2, 1].set(value)
    assert np.isnan(relative_error(ScaledField(truth, 1.5), truth, z, r, t).value)
    assert np.isnan(relative_semigroup_residual(truth, z, r, t))
    assert np.isnan(relative_identity_residual(MeanFlow(), truth, z, z, r, t))
