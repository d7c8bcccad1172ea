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

PATHS = [mfx.LinearInterpolant(), mfx.TrigonometricInterpolant()]
STAGES = optax.exponential_decay(1.0, 100, 0.5, staircase=True)


@functools.cache
def field():
    return mfx.nn.cast(filled(lambda: mfx.MLP(3, width=8, depth=1, key=jr.key(0))), jnp.float64)


def row(path=PATHS[0], step=None, t=0.7):
    x, eps = jnp.array([0.3, -1.2, 0.5]), jnp.array([1.1, 0.4, -0.6])
    context = None if step is None else mfx.Context(jnp.asarray(step))
    return mfx.Row(*path.state_and_velocity(x, eps, t), 0.0, t, x=x, eps=eps, path=path, context=context)


@pytest.mark.parametrize("path", PATHS)
def test_ends_of_two_states_of_one_pair_are_compared(path):
    u, at = field(), row(path)
    s = mfx.ect_earlier_time(jnp.asarray(0.7), 0.25)
    earlier = path.state_and_velocity(at.x, at.eps, s)[0]
    expected = (at.z - 0.7 * u(at.z, 0.0, 0.7)) - (earlier - s * u(earlier, 0.0, s))
    residual, loss = mfx.ConsistencyTraining(0.25, 0.1).residual_and_loss(u, at)
    np.testing.assert_allclose(residual, expected, rtol=0, atol=1e-14)
    huber = np.sqrt(np.sum(expected**2) + 0.03) - np.sqrt(0.03)
    np.testing.assert_allclose(loss, huber / (0.7 / 0.3 - s / (1 - s)), rtol=1e-12)


def test_the_first_stage_is_regression_on_the_data():
    at = row(step=0)
    expected = at.z - 0.7 * field()(at.z, 0.0, 0.7) - at.x
    np.testing.assert_allclose(mfx.ConsistencyTraining(STAGES).residual(field(), at), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("step", "gap"), [(99, 1.0), (100, 0.5), (399, 0.125)])
def test_stages_halve_the_gap(step, gap):
    found = mfx.ConsistencyTraining(STAGES).residual(field(), row(step=step))
    np.testing.assert_allclose(found, mfx.ConsistencyTraining(gap).residual(field(), row()), rtol=0, atol=1e-14)


def test_no_gradient_passes_through_the_earlier_end():
    def loss(u):
        return mfx.ConsistencyTraining(0.25).residual_and_loss(u, row())[1]

    class Scaled(mfx.AbstractField):
        scale: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.scale * z

    at, s = row(), mfx.ect_earlier_time(jnp.asarray(0.7), 0.25)
    c = 0.00054 * np.sqrt(3)
    residual, _ = mfx.ConsistencyTraining(0.25).residual_and_loss(Scaled(jnp.asarray(0.4)), at)
    expected = np.sum(residual * -0.7 * at.z) / np.sqrt(np.sum(residual**2) + c**2) / (0.7 / 0.3 - s / (1 - s))
    np.testing.assert_allclose(jax.grad(loss)(Scaled(jnp.asarray(0.4))).scale, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "time_pairs", [pytest.param(mfx.TimePairs(), marks=pytest.mark.slow), mfx.TimePairs(equal=0.5)]
)
def test_rows_have_r_zero_and_the_weight_of_the_objective_counts_for_the_boundary_alone(time_pairs):
    method = mfx.ConsistencyTraining(0.25)
    objectives = [
        mfx.Objective(method, time_pairs=time_pairs, identity_share=share, weight=mfx.ConstantWeight(weight))
        for share, weight in ((1, 1.0), (1, 2.0), (0.5, 1.0), (0.5, 2.0))
    ]
    batch = mfx.Batch(jr.normal(jr.key(1), (32, 3)))
    found = [eqx.filter_jit(objective)(field(), batch, key=jr.key(2)) for objective in objectives]
    assert found[0][0] == found[1][0] and found[2][0] != found[3][0]
    assert found[0][1]["boundary_error"].count == 0 and found[0][1]["identity_error"].count == 32


@pytest.mark.parametrize("method", [mfx.ConsistencyTraining(0.25), mfx.InductiveMomentMatching()])
def test_guidance_and_a_given_velocity_are_refused_by_name(method):
    name = type(method).__name__
    dropout = mfx.LabelDropout(0.1, 2)
    with pytest.raises(ValueError, match=f"guidance must be None for {name}, which learns from x and eps alone"):
        mfx.Objective(method, guidance=mfx.Guidance(2.0), label_dropout=dropout)
    with pytest.raises(ValueError, match=f"velocity must be None for {name}, which learns from x and eps alone"):
        mfx.Objective(method, velocity=lambda z, t, c: z)
    with pytest.raises(ValueError, match=f"stable_target must be None for {name}, which learns from x and eps alone"):
        mfx.Objective(method, stable_target=mfx.StableTarget(jnp.zeros((1, 3))))
    mfx.Objective(method, label_dropout=dropout)


def test_a_row_that_knows_no_pair_is_refused():
    at = mfx.Row(jnp.zeros(3), jnp.zeros(3), 0.0, 0.7)
    with pytest.raises(ValueError, match="x, eps and path must be given for the state at another time"):
        mfx.ConsistencyTraining(0.25).residual(field(), at)


@pytest.mark.parametrize("gap", [0.0, -0.5, 1.5, float("nan")])
def test_a_gap_that_is_none_is_refused(gap):
    for method in (mfx.ConsistencyTraining, mfx.InductiveMomentMatching):
        with pytest.raises(ValueError, match="gap must"):
            method(gap)


def test_a_gap_that_falls_to_nothing_stays_large_enough_to_learn_from():
    falling = optax.exponential_decay(1.0, 100, 0.5, staircase=True)
    at_end = mfx.ConsistencyTraining(falling).residual(field(), row())  # where nothing trains: the last step
    np.testing.assert_array_equal(at_end, mfx.ConsistencyTraining(1 / 2048).residual(field(), row()))
    assert (at_end != 0).all()


def test_ect_lowers_the_noise_level_by_a_part_of_it_that_is_larger_where_there_is_little_noise():
    t = np.array([0.1, 0.5, 0.9])
    level, gap = t / (1 - t), 1 / 64
    earlier = level * (1 - gap * (1 + 8 / (1 + np.exp(level))))
    found = [mfx.ect_earlier_time(time, gap) for time in t]
    np.testing.assert_allclose(found, earlier / (1 + earlier), rtol=1e-12)


def test_ict_goes_one_step_back_on_its_grid():
    steps = 40
    levels = (0.002 ** (1 / 7) + np.arange(steps + 1) / steps * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    times = levels / (1 + levels)
    found = [mfx.ict_earlier_time(time, 1 / steps) for time in times[1:]]
    np.testing.assert_allclose(found, times[:-1], rtol=1e-9)


@pytest.mark.parametrize("earlier", [mfx.ect_earlier_time, mfx.ict_earlier_time, mfx.imm_earlier_time])
@pytest.mark.parametrize("gap", [1.0, 1 / 16, 1 / 1024])
def test_earlier_times_are_earlier_and_finite(earlier, gap):
    for t in (1e-6, 0.01, 0.3, 0.7, 0.999, 1.0):
        assert 0 <= earlier(t, gap) < t


def test_settings_of_both_papers_over_a_training():
    easy, improved = mfx.ConsistencyTraining.for_training(800), mfx.ConsistencyTraining.improved(800)
    np.testing.assert_allclose(
        [easy.gap(step) for step in (0, 99, 100, 799, 5000)], [1 / 2, 1 / 2, 1 / 4, 1 / 256, 1 / 256]
    )
    np.testing.assert_allclose([improved.gap(step) for step in (0, 99, 100, 799)], [0.1, 0.1, 0.05, 1 / 1280])
