"""Targets from references: exact over a whole point set, and with the promised statistics over a part of it."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import Cubic, filled

import mf_eqx as mfx
from mf_eqx import exact

PATHS = [mfx.LinearInterpolant(), mfx.TrigonometricInterpolant()]
TIMES = (1e-3, 1e-2, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0)


def points(number=24, dim=2):
    return jr.normal(jr.key(0), (number, dim))


@eqx.filter_jit
def velocities(target, path, x, eps, t, key=None):
    """Of every row at every time."""
    key = jr.key(0) if key is None else key
    at = jax.vmap(lambda x, eps, t: target.velocity(path, x, eps, t, key=key), (None, None, 0))
    return jax.vmap(at, (0, 0, None))(x, eps, t)


@pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
@pytest.mark.parametrize("dim", [2, 20], ids=["differences", "products"])
def test_over_a_whole_point_set_it_is_that_sets_velocity(path, dim, x64):
    x, t = points(dim=dim), jnp.array(TIMES)
    eps = jr.normal(jr.key(1), x.shape)

    @jax.jit
    def expected(x, eps, t):
        def one(x, eps, t):
            z, v = path.state_and_velocity(x, eps, t)
            return exact.PointSet(points(dim=dim)).velocity(path, z, t), v

        return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(x, eps, t)

    marginal, conditional = expected(x, eps, t)
    found = velocities(mfx.StableTarget(x), path, x, eps, t)
    # Relative to the largest term, since the point set divides by sigma.
    assert float(jnp.abs(found - marginal).max()) < 1e-12 * float(jnp.abs(marginal).max() + 1 / TIMES[0])
    assert float(jnp.abs(found - marginal)[:, 1:].max()) < 1e-12
    assert float(jnp.abs(found - conditional)[:, 4:].max()) > 0.5


@pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
def test_at_time_0_it_is_the_conditional_velocity(path, x64):
    x = points()
    eps = jr.normal(jr.key(1), x.shape)
    found = velocities(mfx.StableTarget(x), path, x, eps, jnp.zeros(1))[:, 0]
    rate = path.rates(jnp.zeros(()))
    np.testing.assert_allclose(found, rate[2] * x + rate[3] * eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "atol"), [(2, 2e-6), (20, 2e-4)], ids=["differences", "products"])
def test_float32_is_near_float64(dim, atol, x64):
    x, t = points(dim=dim), jnp.array((0.0, *TIMES))
    eps = jr.normal(jr.key(1), x.shape)
    expected = velocities(mfx.StableTarget(x), PATHS[0], x, eps, t)
    x, eps, t = (value.astype(jnp.float32) for value in (x, eps, t))
    found = velocities(mfx.StableTarget(x), PATHS[0], x, eps, t)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("t", [1e-4, 1e-3, 1e-2])
def test_of_many_points_in_a_plane_float32_tells_the_nearest_apart(t, x64):
    x = points(20_000)
    eps, t = jr.normal(jr.key(1), x[:32].shape), jnp.array([t])
    x, eps, t = (value.astype(jnp.float32) for value in (x, eps, t))
    found = velocities(mfx.StableTarget(x), PATHS[0], x[:32], eps, t)
    x, eps, t = (value.astype(jnp.float64) for value in (x, eps, t))
    expected = velocities(mfx.StableTarget(x), PATHS[0], x[:32], eps, t)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_own_x_counts_once_whether_or_not_it_is_a_reference_and_twice_if_the_data_have_it_twice(x64):
    x, t = points(), jnp.array(TIMES)
    eps = jr.normal(jr.key(1), x.shape)
    row = x[:1], eps[:1], t
    with_own = velocities(mfx.StableTarget(x), PATHS[0], *row)
    without = velocities(mfx.StableTarget(x[1:]), PATHS[0], *row)
    twice = velocities(mfx.StableTarget(jnp.concatenate([x[:1], x])), PATHS[0], *row)
    weighted = exact.PointSet(x, np.array([2.0] + [1.0] * 23))
    z = jax.vmap(lambda t: PATHS[0].state_and_velocity(x[0], eps[0], t)[0])(t)
    expected = jax.vmap(lambda z, t: weighted.velocity(PATHS[0], z, t))(z, t)
    np.testing.assert_allclose(without, with_own, rtol=0, atol=1e-12)
    np.testing.assert_allclose(twice[0, 1:], expected[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 20], ids=["differences", "products"])
def test_references_of_uncentred_data_are_told_apart(dim, x64):
    x, t = points(dim=dim), jnp.array(TIMES)
    eps = jr.normal(jr.key(1), x.shape)
    near = velocities(mfx.StableTarget(x), PATHS[0], x, eps, t)
    moved, eps, t = (value.astype(jnp.float32) for value in (x + 100, eps, t))
    far = velocities(mfx.StableTarget(moved), PATHS[0], moved, eps, t)
    np.testing.assert_allclose(far[:, 2:] + 100, near[:, 2:], rtol=0, atol=1e-2)


def test_row_sees_references_of_its_label_only_and_all_when_dropped(x64):
    x, label = points(), jnp.arange(24) % 3
    eps = jr.normal(jr.key(1), (2,))
    t, key = jnp.asarray(0.7), jr.key(0)

    @jax.jit
    def labelled(condition, dropped):
        return mfx.StableTarget(x, label).velocity(PATHS[0], x[1], eps, t, condition, dropped, key=key)

    @jax.jit
    def of(references):
        return mfx.StableTarget(references).velocity(PATHS[0], x[1], eps, t, key=key)

    one, everything = of(x[label == 1]), of(x)
    np.testing.assert_allclose(labelled(jnp.asarray(1), False), one, rtol=0, atol=1e-12)
    np.testing.assert_allclose(labelled(jnp.asarray(3), True), everything, rtol=0, atol=1e-12)
    assert float(jnp.abs(one - everything).max()) > 0.01


class Last(mfx.AbstractTimes):
    """Always 1."""

    def __call__(self, *, key):
        return jnp.ones(())


class Difference(mfx.AbstractIdentity):
    """z - v, which at time 1 is the mean of the row's own x and the references."""

    facts = mfx.Facts(degenerate=True)

    def residual(self, field, row):
        return row.z - row.v


def drawn_references(accumulation):
    """The mean squares of the residual in six steps; own x is 0, references are 1 to 64, a step draws one."""
    target = mfx.StableTarget(jnp.arange(1.0, 65.0)[:, None], number=1)
    objective = mfx.Objective(
        Difference(), time_pairs=mfx.TimePairs(Last()), identity_share=Fraction(1, 2), stable_target=target
    )
    step = mfx.TrainStep(objective, optax.sgd(0.0), accumulation=accumulation)
    state, found = mfx.init_state(Cubic(jnp.ones(())), step.optimizer, key=jr.key(1)), []
    for _ in range(6):
        state, metrics = step(state, mfx.Batch(jnp.zeros((16, 1))))
        found.append(float(metrics["identity_error"].value))
    return found


def test_rows_and_micro_batches_of_a_step_share_the_drawn_references_and_the_next_step_draws_others():
    found = drawn_references(1)
    numbers = 2 * np.sqrt(found)
    np.testing.assert_allclose(numbers, np.round(numbers), atol=1e-3)  # the same one for all rows
    assert len(set(np.round(numbers))) > 3
    np.testing.assert_allclose(drawn_references(2), found, rtol=1e-5)


def test_mean_over_drawn_references_is_the_marginal_velocity_and_the_variance_falls_as_their_number_rises():
    """Against the exact velocity of a mixture, summed up by the mean of (v* - v) v, which is 0 without bias."""
    mixture, path, rows = exact.GaussianMixture(jnp.array([[-1.0], [0.5], [1.0]]), 0.1), PATHS[0], 20_000
    x = exact.draw(mixture, rows, jr.key(1))
    eps, t, keys = jr.normal(jr.key(2), x.shape), jnp.asarray(0.6), jr.split(jr.key(3), rows)
    references = exact.draw(mixture, rows, jr.key(4))

    @eqx.filter_jit
    def statistics(number):
        target = mfx.StableTarget(references, number=number)

        def one(x, eps, key):
            v = mixture.velocity(path, path.state_and_velocity(x, eps, t)[0], t)
            error = target.velocity(path, x, eps, t, key=key) - v
            return jnp.sum(error * v), jnp.sum(error**2)

        bias, square = jax.vmap(one)(x, eps, keys)
        return jnp.mean(bias), jnp.std(bias) / rows**0.5, jnp.mean(square)

    variances = []
    for number in (4, 16):
        bias, deviation, variance = map(float, statistics(number))
        assert abs(bias) < 4 * deviation + 0.003, number  # the references are a finite draw themselves: 0.001
        variances.append(variance)
    assert 3 < variances[0] / variances[1] < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": jnp.zeros((0, 2))}, "x must be at least one reference, floating point; got 0 of float32"),
        ({"number": 0}, "number must be an integer >= 1, got 0"),
        ({"number": True}, "number must be an integer >= 1, got True"),
        ({"number": 4}, "number must be at most 3, the number of references, got 4"),
    ],
)
def test_references_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mfx.StableTarget(**({"x": jnp.zeros((3, 2))} | options))


def test_references_of_integers_and_labels_of_another_number_are_refused(unchecked):
    with pytest.raises(ValueError, match="x must be at least one reference, floating point; got 3 of int32"):
        mfx.StableTarget(jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"label must be one for each of 3 references, got shape \(2,\)"):
        mfx.StableTarget(jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="label must be integers, got float32"):
        mfx.StableTarget(jnp.zeros((3, 2)), jnp.zeros(3))


def test_row_that_does_not_fit_is_refused():
    row = {"eps": jnp.zeros(3), "t": jnp.asarray(0.5), "key": jr.key(0)}
    with pytest.raises(ValueError, match=r"x must have the shape of a reference, \(2,\), got \(3,\)"):
        mfx.StableTarget(points()).velocity(PATHS[0], jnp.zeros(3), **row)
    labelled = mfx.StableTarget(points(), jnp.zeros(24, jnp.int32))
    with pytest.raises(ValueError, match="label must be given for the references of rows that have a condition"):
        mfx.StableTarget(points()).velocity(
            PATHS[0], jnp.zeros(2), condition=jnp.asarray(1), **row | {"eps": jnp.zeros(2)}
        )
    with pytest.raises(ValueError, match="condition must be one integer label where references have labels, got None"):
        labelled.velocity(PATHS[0], jnp.zeros(2), **row | {"eps": jnp.zeros(2)})


@pytest.mark.parametrize("target", [mfx.StableTarget(np.ones((3, 2))), mfx.StableTarget(np.ones((3, 2)), np.arange(3))])
@pytest.mark.parametrize(
    ("condition", "got"),
    [
        (1.0, r"1\.0"),
        (np.zeros(2, np.int32), r"int32 of shape \(2,\)"),
        ({"a": np.zeros(12, np.float32), "b": np.asarray(1)}, r"\['a'\] float32 of shape \(12,\), \['b'\] 1"),
    ],
)
def test_condition_that_is_no_label_is_refused(target, condition, got):
    def velocity(condition):
        return target.velocity(PATHS[0], jnp.zeros(2), jnp.zeros(2), jnp.asarray(0.5), condition, key=jr.key(0))

    condition = jax.tree.map(jnp.asarray, condition)
    with pytest.raises(ValueError, match=f"condition must be one integer label or None for a StableTarget, got {got}"):
        velocity(condition)
    with pytest.raises(ValueError, match=r"condition must be one integer label or None for .*, got .*of shape"):
        jax.jit(velocity)(condition)


def test_velocity_beside_it_and_methods_of_pairs_are_refused():
    target = mfx.StableTarget(points())
    with pytest.raises(ValueError, match="stable_target must be None with a velocity, which replaces it; got both"):
        mfx.Objective(velocity=lambda z, t, condition: z, stable_target=target)
    with pytest.raises(ValueError, match="stable_target must be None for ConsistencyTraining, which learns from x and"):
        mfx.Objective(mfx.ConsistencyTraining(0.25), stable_target=target)


@pytest.mark.slow
def test_objective_learns_from_it_and_meets_less_error():
    mixture = exact.eight_gaussians()
    target = mfx.StableTarget(exact.draw(mixture, 256, jr.key(0)), number=64)

    def mean_error(stable_target):
        objective = mfx.Objective(None, identity_share=0, weight=mfx.ConstantWeight(), stable_target=stable_target)
        step = mfx.TrainStep(objective, optax.adam(3e-3))
        field = mfx.MLP(2, width=16, depth=1, key=jr.key(1))
        state = mfx.init_state(field, step.optimizer, key=jr.key(2))
        state, metrics = mfx.scan_steps(step, state, exact.Draw(mixture, 128), 200)
        assert int(state.faults.total) == 0
        assert not np.array_equal(state.field.out.weight, field.out.weight)
        return float(metrics["boundary_error"].value)

    assert mean_error(target) < 0.7 * mean_error(None)


def test_guidance_composes_with_it():
    """With the row's own x as the only reference nothing changes; with others the guided target does."""
    field = filled(lambda: mfx.MLP(2, width=8, depth=1, labels=2, key=jr.key(0)))
    batch = mfx.Batch(jnp.ones((32, 2)), jnp.arange(32) % 2)
    dropout = mfx.LabelDropout(0.1, field.null_label)

    @eqx.filter_jit
    def loss(stable_target):
        objective = mfx.Objective(
            guidance=mfx.Guidance(2.0, 0.5),
            label_dropout=dropout,
            stable_target=stable_target,
            weight=mfx.ConstantWeight(),
        )
        return objective(field, batch, key=jr.key(3))[0]

    labels = jnp.array([0, 1, 0, 1])
    alone, own = loss(None), loss(mfx.StableTarget(jnp.ones((4, 2)), labels))
    others = loss(mfx.StableTarget(points(4), labels))
    np.testing.assert_allclose(own, alone, rtol=1e-5)
    assert bool(jnp.isfinite(others)) and abs(float(others - alone)) > 0.01


class Guided(mfx.AbstractField):
    """The guided velocity of a labelled point set, whose point i has the label i mod 2; NaN without a label."""

    points: jax.Array
    scale: float

    def __call__(self, z, r, t, condition=None, *, key=None):
        label, scale = condition, self.scale
        if isinstance(condition, mfx.GuidanceCondition):
            label, scale = condition.condition, condition.scale
        x = self.points[jnp.where(label == 1, 1, 0)]
        target = mfx.StableTarget(self.points, jnp.arange(len(self.points)) % 2)
        of_label, of_all = (
            target.velocity(PATHS[0], x, (z - (1 - t) * x) / t, t, label, dropped, key=jr.key(0))
            for dropped in (False, True)
        )
        return jnp.where(label == 2, jnp.nan, scale * of_label + (1 - scale) * of_all)


class Velocity(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.t, row.t) - row.v


class LateTimes(mfx.AbstractTimes):
    def __call__(self, *, key):
        return jr.uniform(key, minval=0.2)


GUIDANCE = {
    "mix": mfx.Guidance(1.0, 0.5),
    "scale": mfx.Guidance(2.0),
    "drawn": mfx.DrawnGuidance(mfx.PowerLawScales(smallest=2, largest=2), middle=None),
}


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_exact_guidance_is_its_fixed_point_and_evaluates_no_field(guidance, x64):
    x = points()
    batch = mfx.Batch(x, jnp.arange(len(x)) % 2)
    objective = mfx.Objective(
        Velocity(),
        time_pairs=mfx.TimePairs(LateTimes()),
        identity_share=0.5,
        guidance=guidance,
        label_dropout=mfx.LabelDropout(0.0, 2),
        stable_target=mfx.StableTarget(x, batch.condition),
        exact_guidance=True,
    )

    def errors(scale):
        metrics = objective(Guided(x, scale), batch, key=jr.key(1))[1]
        return np.asarray([metrics[name].value for name in ("boundary_error", "identity_error")])

    assert (errors(2.0) < 1e-20).all()
    if guidance is not GUIDANCE["drawn"]:  # whose field is given the scale
        assert (errors(1.98) > 1e-8).all()


def test_exact_guidance_is_refused_without_all_it_needs():
    x, label, dropout = points(), jnp.zeros(24, jnp.int32), mfx.LabelDropout(0.1, 2)

    def make(guidance, target):
        return mfx.Objective(guidance=guidance, label_dropout=dropout, stable_target=target, exact_guidance=True)

    cases = {
        "guidance must be given with exact_guidance": (None, mfx.StableTarget(x, label)),
        "stable_target must be given with exact_guidance": (mfx.Guidance(2.0), None),
        "must be of all references, with labels, for exact_guidance; got no": (mfx.Guidance(2.0), mfx.StableTarget(x)),
        "got number = 5": (mfx.Guidance(2.0), mfx.StableTarget(x, label, 5)),
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            make(*given)


@pytest.mark.usefixtures("unchecked")
def test_references_that_are_not_finite_and_labels_that_jax_would_change_are_refused():
    with pytest.raises(ValueError, match="largest value of x must be finite"):
        mfx.StableTarget(jnp.array([[1.0, jnp.nan]]))
    with jax.enable_x64(False), pytest.raises(ValueError, match="label must be representable in int32"):
        mfx.StableTarget(np.ones((2, 2), np.float32), np.array([0, 2**40]))
