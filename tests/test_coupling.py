"""Batches whose rows bring both ends of their path: data and what belongs to them in the place of noise."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.optimize
from methods import METHODS, taught_by

import mf_eqx as mfx
from mf_eqx import data

pytestmark = pytest.mark.usefixtures("x64")


class Stretch(mfx.AbstractField):
    """The flow along z = (1 + t) x, of pairs with eps = 2 x: straight lines that never cross, on which v = x."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z / (1 + t)


class Learning(mfx.AbstractField):
    """A multiple of that flow, which is to learn that it is 1."""

    factor: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.factor * Stretch()(z, r, t)


def pairs(rows=16):
    x = np.random.default_rng(0).normal(size=(rows, 2))
    return mfx.Batch(jnp.asarray(x), eps=jnp.asarray(2 * x))


def found(objective, batch):
    context = mfx.Context(jnp.zeros((), jnp.int32), Stretch())
    return objective(Stretch(), batch, key=jr.key(1), context=context)[1]


OBJECTIVE, OPTIMIZER = mfx.Objective(None, identity_share=0), optax.sgd(0.1)


def factor_after(batch, **options):
    """What a step makes of the factor 3."""
    step = mfx.TrainStep(OBJECTIVE, OPTIMIZER, **options)
    state = mfx.init_state(Learning(jnp.asarray(3.0)), OPTIMIZER, key=jr.key(1))
    return step(state, batch)[0].field.factor


@pytest.mark.parametrize("method", METHODS)
def test_each_pair_moves_along_the_flow_where_paths_do_not_cross(method):
    """Then every method has no residual, also those that are exact only in the mean or in a limit."""
    identity = METHODS[method]
    velocity = taught_by(identity, Stretch())["velocity"]
    objective = mfx.Objective(identity, identity_share=0.5, velocity=velocity, weight=mfx.ConstantWeight())
    metrics = found(objective, pairs())
    assert metrics["boundary_error"].value < 1e-28
    assert metrics["identity_error"].value < 1e-26


@pytest.mark.parametrize("eps", [np.ones((16, 2)), None], ids=["the same end", "noise of its own"])
def test_no_row_moves_along_it_with_another_end(eps):
    assert found(mfx.Objective(identity_share=0.5), mfx.Batch(pairs().x, eps=eps))["boundary_error"].value > 0.1


def test_parts_of_a_batch_keep_their_ends():
    whole, parts = (factor_after(pairs(), accumulation=number) for number in (1, 2))
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
    assert whole < 2.99


def test_samples_are_made_of_the_ends():
    seen = []

    class Mean(mfx.AbstractSampleLoss):
        def init(self):
            return None

        def batches_to_fill(self, rows):
            return 0

        def __call__(self, x, batch, state):
            seen.append(x)
            return jnp.mean(x), {}, None

    mfx.SampleObjective(Mean()).evaluate(Stretch(), pairs(), (None,), key=jr.key(0))
    np.testing.assert_allclose(seen[0], pairs().x, rtol=1e-14)


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (np.ones((16, 3)), r"eps must be floating-point numbers of the shape of x, \(16, 2\), got float64 of shape"),
        (np.ones((16, 2), np.int32), r"eps must be floating-point .* got int32 of shape \(16, 2\)"),
        (np.ones((15, 2)), "x, condition, index and eps must share their leading batch axis"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_ends_that_are_no_partners_are_refused(eps, message):
    with pytest.raises(ValueError, match=message):
        found(mfx.Objective(), mfx.Batch(pairs().x, eps=eps))


def test_a_stable_target_is_for_gaussian_noise():
    objective = mfx.Objective(stable_target=mfx.StableTarget(pairs().x))
    with pytest.raises(ValueError, match="stable_target must be None for batches with eps"):
        found(objective, pairs())


# How ends come into a batch


def row(condition, eps=None):
    x = jnp.arange(6.0).reshape(1, 2, 3)
    return mfx.Batch(x, condition, jnp.asarray(3), eps)


def test_ends_in_the_condition_become_eps():
    parts = {"eps": jnp.ones((1, 2, 3)), "label": jnp.asarray(2), "text": jnp.zeros(4)}
    alone = data.TakeEps()(row({"eps": parts["eps"]}), jr.key(0))
    labelled = data.TakeEps(keep="label")(row(parts), jr.key(0))
    rest = data.TakeEps()(row(parts), jr.key(0))
    assert all(found.eps is parts["eps"] and found.index == 3 for found in (alone, labelled, rest))
    assert (alone.condition, labelled.condition) == (None, 2)
    assert rest.condition.keys() == {"label", "text"}


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        (data.TakeEps(), row(jnp.asarray(2)), "condition must be a dictionary with eps for TakeEps, got "),
        (data.TakeEps("end"), row({"eps": 1}), r"dictionary with end for TakeEps, got \['eps'\]"),
        (data.TakeEps(keep="label"), row({"eps": 1}), r"with eps and label for TakeEps, got \['eps'\]"),
        (data.TakeEps(), row({"eps": 1}, jnp.ones((1, 2, 3))), "eps must be None for TakeEps, got an array"),
        (data.EDMAugmentation(), row(None, jnp.ones((1, 2, 3))), "eps must be None for EDMAugmentation"),
    ],
)
def test_rows_without_such_a_part_are_refused(part, given, message):
    with pytest.raises(ValueError, match=message):
        part(given, jr.key(0))


def test_both_ends_of_a_pair_are_mirrored():
    found = data.RandomFlip(1.0)(row(jnp.asarray(2), 2 * row(None).x), jr.key(0))
    np.testing.assert_array_equal(found.x, row(None).x[..., ::-1])
    np.testing.assert_array_equal(found.eps, 2 * found.x)
    assert data.RandomFlip(1.0)(row(None), jr.key(0)).eps is None


def test_a_stream_of_pairs_trains_a_field():
    """From source to state, with the eps of a row in the order of its data."""
    x = np.random.default_rng(0).normal(size=(64, 2))
    stream = data.Stream(data.ArraySource(x, condition={"eps": 2 * x}), batch=16)
    found = factor_after(stream[0], prepare=data.TakeEps())
    assert found == factor_after(mfx.Batch(stream[0].x, eps=2 * stream[0].x)) != 3


def test_optimal_pairs_are_the_nearest_of_all_orders():
    x, eps = np.random.default_rng(0).normal(size=(2, 40, 3))
    found = data.optimal_pairs(x, eps)
    cost = ((x[:, None] - eps[None]) ** 2).sum(-1)
    _, columns = scipy.optimize.linear_sum_assignment(cost)
    np.testing.assert_array_equal(found, eps[columns])
    assert ((x - found) ** 2).sum() < 0.7 * ((x - eps) ** 2).sum()
    shuffled = (x + 1e-3)[np.random.default_rng(1).permutation(40)]
    np.testing.assert_allclose(data.optimal_pairs(x, shuffled), x + 1e-3)


@pytest.mark.parametrize(
    ("x", "eps", "message"),
    [
        (np.ones((4, 2)), np.ones((3, 2)), r"eps must have the shape of x, with at least one row, got \(3, 2\)"),
        (np.ones((0, 2)), np.ones((0, 2)), "with at least one row"),
        (np.ones((4, 2)), np.full((4, 2), np.nan), "x and eps must be finite, got values that are not"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_rows_that_cannot_be_paired_are_refused(x, eps, message):
    with pytest.raises(ValueError, match=message):
        data.optimal_pairs(x, eps)
