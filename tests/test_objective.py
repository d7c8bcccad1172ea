"""The objective against loops over its rows, written out by hand in float64.

A loop needs the numbers that the objective drew. They are read off from outside, through gradients: see `draws`.

Nearly everything runs without jit: operations on few and equal shapes are compiled once for the whole file, while each
jitted objective would take seconds. So most batches have four rows of either kind.
"""

import dataclasses
import math
import re
from fractions import Fraction
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
import scipy.stats
from fields import GaussianField

from mf_eqx import (
    AbstractField,
    AbstractFieldWithVelocity,
    AbstractGuidance,
    AbstractIdentity,
    AbstractIdentityWithLoss,
    AbstractIdentityWithVelocity,
    AbstractTimes,
    AbstractWeight,
    AdaptiveWeight,
    Batch,
    ConstantWeight,
    Context,
    ContinuousConsistency,
    DrawnGuidance,
    Facts,
    Guidance,
    GuidanceRange,
    ImprovedMeanFlow,
    LabelDropout,
    LogitNormalTimes,
    Mean,
    MeanFlow,
    MLP,
    Objective,
    PowerLawScales,
    Row,
    Shortcut,
    SplitMeanFlow,
    TimePairs,
    Trained,
    TrigonometricInterpolant,
    UniformTimes,
)
from mf_eqx.exact import GaussianMixture, MarginalVelocity

pytestmark = pytest.mark.usefixtures("x64")

LABELS = 4
SIZE = 3
KEY_SEED = 7
PLAIN = ConstantWeight()


# Fields


class Network(AbstractField):
    """A small nonlinear field with labels, times 1 + n / 2 with n drawn from the key."""

    matrix: jax.Array
    r_rate: jax.Array
    t_rate: jax.Array
    table: jax.Array
    out: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.at(z, r, t, condition, 0.0 if key is None else jr.normal(key))

    def at(self, z, r, t, label, n):
        """The field, given the number that its key would draw."""
        inner = self.matrix @ z + jnp.sin(2 * r) * self.r_rate + t**2 * self.t_rate
        inner = inner if label is None else inner + self.table[label]
        return self.out @ jnp.tanh(inner) * (1 + n / 2)


def network(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((SIZE, SIZE), SIZE, SIZE, (LABELS + 1, SIZE), (SIZE, SIZE))
    return Network(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))


class Zero(AbstractField):
    """u = 0, with a parameter nevertheless."""

    scale: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.scale * z


class Counting(AbstractField):
    """Counts how often it is called, which under jit is how often it is traced."""

    field: AbstractField
    calls: list = eqx.field(static=True)

    def __call__(self, z, r, t, condition=None, *, key=None):
        self.calls.append(1)
        return self.field(z, r, t, condition, key=key)


# Draws


class Fixed(AbstractTimes):
    """Always the same time."""

    time: float

    def __call__(self, *, key):
        return jnp.asarray(self.time)


class Regression(AbstractIdentity):
    """u(z, r, t) = v: no method, but the simplest thing to ask of a row with r < t."""

    facts = Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.r, row.t) - row.v


class Probe(AbstractField):
    """u = a_i + b_i z + c_i r + d_i t + e_i n for the row with label i, all parameters zero.

    The gradient of |u - v|^2 with respect to them is -2 v, -2 v z, -2 v r, ...: it tells what was drawn.
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array
    e: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        a, b, c, d, e = (leaf[condition] for leaf in (self.a, self.b, self.c, self.d, self.e))
        return a + b * z + c * r + d * t + e * jr.normal(key)


class Draws(NamedTuple):
    """What each row of a batch drew; `n` from the key that its field gets. NaN where a row's label was dropped."""

    v: np.ndarray
    z: np.ndarray
    r: np.ndarray
    t: np.ndarray
    n: np.ndarray


def draws(objective, x, index=None, *, keep_dropout=False):
    """What the rows of a batch with data `x` draw, in the order of the rows."""
    rows, dim = x.shape
    # One more row of parameters, for the rows whose label is dropped.
    label_dropout = LabelDropout(objective.label_dropout.rate, rows) if keep_dropout else None
    field = Probe(*jnp.zeros((5, rows + 1, dim)))
    objective = dataclasses.replace(
        objective,
        identity=None if objective.identity is None else Regression(),
        weight=PLAIN,
        guidance=None,
        label_dropout=label_dropout,
    )
    _, _, gradient = run(objective, field, Batch(x, jnp.arange(rows), index))
    gradient = jax.tree.map(lambda leaf: np.asarray(leaf)[:-1], gradient)
    with np.errstate(invalid="ignore"):
        z, r, t, n = (leaf / gradient.a for leaf in (gradient.b, gradient.c, gradient.d, gradient.e))
    return Draws(-rows / 2 * gradient.a, z, r[:, 0], t[:, 0], n[:, 0])


def data(rows, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, SIZE)))


def labels(rows):
    return jnp.arange(rows) % LABELS


def run(objective, field, rows, context=None):
    """Loss, metrics and gradient."""
    value_and_grad = eqx.filter_value_and_grad(objective, has_aux=True)
    (loss, metrics), gradient = value_and_grad(field, rows, key=jr.key(KEY_SEED), context=context)
    return loss, metrics, gradient


# By hand


def constant(array):
    return jax.lax.stop_gradient(array)


def mean_flow_residual(field, z, v, r, t, label, n):
    """u - sg(u_tgt), Eq. 10 and 11."""
    u, dudt = jax.jvp(lambda z, r, t: field.at(z, r, t, label, n), (z, r, t), (v, jnp.zeros(()), jnp.ones(())))
    return u - constant(v - (t - r) * dudt)


def boundary_residual(field, z, v, r, t, label, n):
    return field.at(z, t, t, label, n) - v


def guided(field, z, v, t, label, n, scale, mix):
    """Eq. 21, constant."""
    u, free = (field.at(z, t, t, c, n) for c in (label, LABELS))
    return constant(scale * v + mix * u + (1 - scale - mix) * free)


def by_hand(residuals, weight=lambda error: 1.0):
    """Loss and gradient of the mean over rows of sg(w(error)) error; `residuals(field)` yields one per row."""

    def loss(field):
        errors = [jnp.sum(residual**2) for residual in residuals(field)]
        return sum(weight(constant(error)) * error for error in errors) / len(errors)

    return eqx.filter_value_and_grad(loss)(network())


def rows_of(drawn, condition=None):
    """One tuple (z, v, r, t, label, n) per row."""
    condition = [None] * len(drawn.t) if condition is None else condition
    return [
        (*map(jnp.asarray, (z, v, r, t)), label, n)
        for z, v, r, t, label, n in zip(drawn.z, drawn.v, drawn.r, drawn.t, condition, drawn.n, strict=True)
    ]


def carries_identity(row, share):
    return row % share.denominator < share.numerator


def assert_same(found, expected):
    loss, _, gradient = found
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
    for leaf, by_hand in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(leaf, by_hand, rtol=1e-12, atol=1e-12)


# What is drawn

MANY = 4096
# Kolmogorov-Smirnov statistic that the right distribution exceeds with probability 1e-3.
KS_BOUND = np.sqrt(np.log(2 / 1e-3) / (2 * MANY))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_state_and_velocity_belong_to_one_path_with_standard_normal_noise(share):
    x = data(2 * MANY if share == 0.5 else MANY)
    drawn = draws(Objective(interpolant=TrigonometricInterpolant(), identity_share=share), x)
    angle = np.pi / 2 * drawn.t[:, None]
    eps = np.sin(angle) * drawn.z + 2 / np.pi * np.cos(angle) * drawn.v
    np.testing.assert_allclose(np.cos(angle) * x + np.sin(angle) * eps, drawn.z, rtol=0, atol=1e-11)
    for component in eps.T:
        assert scipy.stats.kstest(component, "norm").statistic < KS_BOUND


@pytest.mark.parametrize(
    "objective", [Objective(identity_share=1.0), Objective(None, boundary_times=UniformTimes(), identity_share=0.0)]
)
def test_noise_depends_on_neither_the_data_nor_the_times(objective):
    x = data(MANY)
    drawn = draws(objective, x)
    columns = np.column_stack([drawn.v + x, x, drawn.r, drawn.t])
    assert np.abs(np.corrcoef(columns.T)[:SIZE, SIZE:]).max() < 4 / np.sqrt(MANY)


def test_identity_rows_follow_the_time_pairs():
    drawn = draws(Objective(time_pairs=TimePairs(LogitNormalTimes(0.3, 1.2)), identity_share=1.0), data(MANY))
    cdf = scipy.stats.norm(0.3, 1.2).cdf
    assert scipy.stats.kstest(scipy.special.logit(drawn.t), lambda x: cdf(x) ** 2).statistic < KS_BOUND
    assert scipy.stats.kstest(scipy.special.logit(drawn.r), lambda x: 1 - (1 - cdf(x)) ** 2).statistic < KS_BOUND


def test_boundary_rows_keep_the_larger_time_of_the_pair():
    x = data(12)
    boundary, identity = (draws(Objective(identity_share=share), x) for share in (0.0, 1.0))
    np.testing.assert_allclose(boundary.t, identity.t, rtol=1e-14)
    np.testing.assert_array_equal(boundary.r, boundary.t)
    assert (identity.r < identity.t).all()


def test_boundary_rows_follow_boundary_times_where_given():
    objective = Objective(None, boundary_times=LogitNormalTimes(0.5, 0.7), identity_share=0.0)
    drawn = draws(objective, data(MANY))
    assert scipy.stats.kstest(scipy.special.logit(drawn.t), scipy.stats.norm(0.5, 0.7).cdf).statistic < KS_BOUND
    np.testing.assert_array_equal(drawn.r, drawn.t)


def test_boundary_times_change_no_identity_row():
    x = data(16)
    given, default = (draws(Objective(boundary_times=times), x) for times in (Fixed(0.3), None))
    carries = np.arange(16) % 4 < 1
    np.testing.assert_allclose(given.t[~carries], 0.3, rtol=1e-14)
    np.testing.assert_array_equal(given.t[carries], default.t[carries])
    np.testing.assert_array_equal(given.r[carries], default.r[carries])


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(3, 4)], ids=str)
def test_the_first_rows_of_every_group_carry_the_identity(share):
    drawn = draws(Objective(identity_share=share), data(4 * share.denominator))
    assert (drawn.r < drawn.t).tolist() == [carries_identity(row, share) for row in range(len(drawn.t))]


def test_rows_draw_by_their_index_alone():
    x, index = data(12), np.random.default_rng(0).permutation(12)
    everywhere = Objective(identity_share=1.0)
    ordered, permuted = draws(everywhere, x), draws(everywhere, x[index], jnp.asarray(index))
    for one, other in zip(ordered, permuted, strict=True):
        np.testing.assert_allclose(one[index], other, rtol=1e-13)


def test_rows_of_different_index_draw_differently():
    drawn = draws(Objective(identity_share=1.0), jnp.tile(data(1), (12, 1)))
    for values in (drawn.v[:, 0], drawn.r, drawn.t, drawn.n):
        assert len(np.unique(values)) == 12


# Flow Matching


@pytest.mark.parametrize("boundary_times", [None, UniformTimes()])
def test_no_identity_is_textbook_flow_matching(boundary_times):
    objective = Objective(None, boundary_times=boundary_times, identity_share=0.0, weight=PLAIN)
    x = data(4)
    drawn = draws(objective, x)
    eps, t = drawn.v + x, drawn.t

    def flow_matching(field):
        loss = 0.0
        for i in range(4):
            z_t = (1 - t[i]) * x[i] + t[i] * eps[i]
            v_t = eps[i] - x[i]
            loss += jnp.sum((field.at(z_t, t[i], t[i], None, drawn.n[i]) - v_t) ** 2)
        return loss / 4

    assert_same(run(objective, network(), Batch(x)), eqx.filter_value_and_grad(flow_matching)(network()))


def test_identity_with_share_zero_is_flow_matching():
    expected, found = (
        run(Objective(identity, identity_share=0.0), network(), Batch(data(4))) for identity in (None, MeanFlow())
    )
    assert eqx.tree_equal(found, expected)


# The split


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(3, 4), Fraction(1)], ids=str)
def test_split_loss_and_gradient_are_those_of_a_loop_over_the_rows(share):
    objective = Objective(identity_share=share, weight=AdaptiveWeight(0.75, 1e-3))
    rows = 16 if share < 1 else 4
    x, condition = data(rows), labels(rows)
    drawn = draws(objective, x)

    def residuals(field):
        for i, row in enumerate(rows_of(drawn, condition)):
            yield (mean_flow_residual if carries_identity(i, share) else boundary_residual)(field, *row)

    expected = by_hand(residuals, lambda error: 1 / (error + 1e-3) ** 0.75)
    assert_same(run(objective, network(), Batch(x, condition)), expected)


def test_share_one_with_a_coin_is_the_papers_algorithm():
    objective = Objective(time_pairs=TimePairs(equal=0.5), identity_share=1.0, weight=AdaptiveWeight(1.0, 0.01))
    x = data(12)
    drawn = draws(objective, x)
    assert 0 < (drawn.r == drawn.t).sum() < 12
    eps, n = drawn.v + x, drawn.n

    def algorithm_1(field):
        loss = 0.0
        for i in range(12):
            r, t = jnp.asarray(drawn.r[i]), jnp.asarray(drawn.t[i])
            z = (1 - t) * x[i] + t * eps[i]
            v = eps[i] - x[i]

            def fn(z, r, t, i=i):
                return field.at(z, r, t, None, n[i])

            u, dudt = jax.jvp(fn, (z, r, t), (v, jnp.zeros(()), jnp.ones(())))
            u_tgt = v - (t - r) * dudt
            error = jnp.sum((u - constant(u_tgt)) ** 2)
            loss += constant(1 / (error + 0.01)) * error
        return loss / 12

    assert_same(run(objective, network(), Batch(x)), eqx.filter_value_and_grad(algorithm_1)(network()))


@pytest.mark.parametrize("identity", [ImprovedMeanFlow(), SplitMeanFlow(Fixed(0.3)), Shortcut()])
def test_every_identity_is_averaged_over_its_own_rows(identity):
    objective = Objective(identity, identity_share=0.5, weight=PLAIN)
    x = data(8)
    drawn = draws(objective, x)

    class Given(AbstractField):
        """The network under the noise that a row drew."""

        network: Network
        n: float

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.network.at(z, r, t, condition, self.n)

    def residuals(field):
        for i, (z, v, r, t, label, n) in enumerate(rows_of(drawn)):
            if carries_identity(i, Fraction(1, 2)):
                yield identity.residual(Given(field, n), Row(z, v, r, t, label, key=jr.key(0)))
            else:
                yield boundary_residual(field, z, v, r, t, label, n)

    assert_same(run(objective, network(), Batch(x)), by_hand(residuals))


def test_no_gradient_passes_through_a_users_weight():
    class Careless(AbstractWeight):
        """Eq. 22 without stop-gradient."""

        def __call__(self, error, row):
            return 1 / (error + 0.01)

    careless, careful = (run(Objective(weight=w), network(), Batch(data(16))) for w in (Careless(), AdaptiveWeight()))
    assert_same(careless, (careful[0], careful[2]))


@pytest.mark.parametrize(
    ("batch", "got"), [(np.zeros((8, 2)), r"an array of shape \(8, 2\)"), ([1, 2], "list"), (None, "NoneType")]
)
def test_what_is_no_batch_is_refused_in_one_line(unchecked, batch, got):
    with pytest.raises(ValueError, match=f"^batch must be a Batch, such as mfx.Batch.x., got {got}$"):
        Objective(MeanFlow())(network(), batch, key=jr.key(0))


def test_default_identity_share_is_a_quarter():
    assert Objective().identity_share == Fraction(1, 4)


def test_jit_changes_nothing():
    loss, _, gradient = run(Objective(), network(), Batch(data(16), labels(16)))
    assert_same(eqx.filter_jit(run)(Objective(), network(), Batch(data(16), labels(16))), (loss, gradient))


def test_data_below_float32_are_computed_in_float32():
    class Precise(AbstractField):
        scale: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            assert {z.dtype, r.dtype, t.dtype} == {jnp.dtype(jnp.float32)}
            return (self.scale * z).astype(jnp.bfloat16)

    class Float32Weight(AbstractWeight):
        def __call__(self, error, row):
            assert error.dtype == jnp.float32
            return jnp.ones_like(error)

    objective, rows = Objective(weight=Float32Weight()), Batch(data(4).astype(jnp.bfloat16))
    loss, metrics = jax.eval_shape(lambda: objective(Precise(jnp.ones((), jnp.float32)), rows, key=jr.key(0)))
    assert metrics["identity_error"].total.dtype == metrics["boundary_error"].total.dtype == jnp.float32
    assert loss.shape == ()


def test_context_reaches_the_identity():
    class Scheduled(AbstractIdentity):
        """A residual of size `step`."""

        facts = Facts()

        def residual(self, field, row):
            return row.context.step + 0 * row.evaluate(field, row.z, row.r, row.t)

    objective = Objective(Scheduled(), identity_share=1.0, weight=PLAIN)
    loss, _, _ = run(objective, network(), Batch(data(4)), Context(jnp.asarray(5)))
    assert loss == 5**2 * SIZE


# A known velocity


def known_velocity(z, t, condition):
    """Any function of all its arguments."""
    return jnp.sin(3 * z) + t + (0.0 if condition is None else condition / 2)


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 2), Fraction(1)], ids=str)
def test_known_velocity_takes_the_place_of_the_conditional_one_and_of_nothing_else(share):
    plain = Objective(identity_share=share)
    x = data(8 if share == Fraction(1, 2) else 4)
    expected, found = draws(plain, x), draws(dataclasses.replace(plain, velocity=known_velocity), x)
    for name in ("z", "r", "t", "n"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    v = jax.vmap(known_velocity)(expected.z, expected.t, jnp.arange(len(x)))
    np.testing.assert_allclose(found.v, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 2), Fraction(1)], ids=str)
def test_known_velocity_is_target_and_tangent(share):
    objective = Objective(identity_share=share, weight=PLAIN)
    rows = 8 if share == Fraction(1, 2) else 4
    x, condition = data(rows), labels(rows)
    drawn = draws(objective, x)

    def residuals(field):
        for i, (z, _, r, t, label, n) in enumerate(rows_of(drawn, condition)):
            residual = mean_flow_residual if carries_identity(i, share) else boundary_residual
            yield residual(field, z, known_velocity(z, t, label), r, t, label, n)

    found = run(dataclasses.replace(objective, velocity=known_velocity), network(), Batch(x, condition))
    assert_same(found, by_hand(residuals))


@pytest.mark.parametrize("head", [False, True])
def test_a_field_in_the_place_of_the_velocity_is_read_at_equal_times(head):
    class Head(AbstractFieldWithVelocity):
        field: Network
        has_velocity_head = True

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.field(z, r, t, condition)

        def velocity(self, z, t, condition=None, *, key=None):
            return -self.field(z, t, t, condition)

        def with_velocity(self, z, r, t, condition=None, *, key=None):
            return self(z, r, t, condition), self.velocity(z, t, condition)

    teacher = network(1)
    given = Head(teacher) if head else teacher
    sign = -1 if head else 1
    objective, batch = Objective(identity_share=0.5), Batch(data(8), labels(8))
    found, expected = (
        run(dataclasses.replace(objective, velocity=velocity), network(), batch)
        for velocity in (given, lambda z, t, condition: sign * teacher(z, t, t, condition))
    )
    assert eqx.tree_equal(found, expected)


def test_velocity_equal_to_the_conditional_one_changes_nothing():
    x = jnp.broadcast_to(data(1), (8, SIZE))  # one point of data: (z - x) / t is the only velocity there is
    loss, _, gradient = run(Objective(identity_share=0.5), network(), Batch(x))
    known = Objective(identity_share=0.5, velocity=lambda z, t, condition: (z - x[0]) / t)
    assert_same(run(known, network(), Batch(x)), (loss, gradient))


def test_exact_field_has_no_error_against_the_marginal_velocity():
    mean, std = jnp.array([1.0, -0.5, 0.2]), 0.4
    field, x = GaussianField(mean, std), mean + std * data(8)
    marginal = MarginalVelocity(GaussianMixture(mean[None], std))
    _, known, _ = run(Objective(identity_share=0.5, velocity=marginal), field, Batch(x))
    _, conditional, _ = run(Objective(identity_share=0.5), field, Batch(x))
    for name in ("boundary_error", "identity_error"):
        assert known[name].value < 1e-28
        assert conditional[name].value > 0.1  # the variance of the conditional velocity


def test_no_gradient_enters_a_known_velocity():
    class Teacher(eqx.Module):
        field: Network

        def __call__(self, z, t, condition):
            return self.field(z, t, t, condition)

    def loss(teacher):
        return Objective(identity_share=0.5, velocity=teacher)(network(), Batch(data(8)), key=jr.key(0))[0]

    gradient = eqx.filter_grad(loss)(Teacher(network(1)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert loss(Teacher(network(1))) != loss(Teacher(network(2)))


def test_known_velocity_of_a_dropped_row_is_that_of_the_null_condition():
    objective = Objective(None, identity_share=0.0, weight=PLAIN)
    x = data(4)
    drawn = draws(objective, x)

    def residuals(field):
        for z, _, r, t, _, n in rows_of(drawn):
            yield boundary_residual(field, z, known_velocity(z, t, LABELS), r, t, LABELS, n)

    dropping = dataclasses.replace(objective, label_dropout=LabelDropout(1.0, LABELS), velocity=known_velocity)
    assert_same(run(dropping, network(), Batch(x, labels(4))), by_hand(residuals))


def test_guidance_takes_a_known_velocity():
    objective = Objective(None, identity_share=0.0, weight=PLAIN)
    x, condition = data(4), labels(4)
    drawn = draws(objective, x)

    def residuals(field):
        for z, _, r, t, label, n in rows_of(drawn, condition):
            target = guided(field, z, known_velocity(z, t, label), t, label, n, 2.5, 0.5)
            yield boundary_residual(field, z, target, r, t, label, n)

    guiding = dataclasses.replace(
        objective, guidance=Guidance(2.5, 0.5), label_dropout=LabelDropout(0.0, LABELS), velocity=known_velocity
    )
    assert_same(run(guiding, network(), Batch(x, condition)), by_hand(residuals))


# Metrics


def test_raw_errors_fall_while_the_weighted_loss_stays_at_one():
    objective, field = Objective(weight=AdaptiveWeight(1.0, 0.01)), Zero(jnp.zeros(()))
    (far, before, _), (near, after, _) = (run(objective, field, Batch(scale * data(16))) for scale in (100, 10))
    np.testing.assert_allclose([far, near], 1, atol=2e-3)
    for name in ("boundary_error", "identity_error"):
        assert before[name].value > 50 * after[name].value


@pytest.mark.parametrize("weight", [PLAIN, AdaptiveWeight()])
def test_raw_errors_are_mean_squares_per_dimension_whatever_the_weight(weight):
    x = data(16)
    drawn = draws(Objective(), x)
    # u = 0: both kinds of rows are left with -v.
    _, metrics, _ = run(Objective(weight=weight), Zero(jnp.zeros(())), Batch(x))
    carries = np.arange(16) % 4 < 1
    np.testing.assert_allclose(metrics["identity_error"].value, np.mean(drawn.v[carries] ** 2), rtol=1e-12)
    np.testing.assert_allclose(metrics["boundary_error"].value, np.mean(drawn.v[~carries] ** 2), rtol=1e-12)


def test_identity_error_by_gap_sorts_rows_into_four_equal_bins():
    x = data(MANY)
    objective = Objective(time_pairs=TimePairs(UniformTimes()), identity_share=1.0)
    drawn = draws(objective, x)
    _, metrics, _ = run(objective, Zero(jnp.zeros(())), Batch(x))
    bins, errors = np.floor(4 * (drawn.t - drawn.r)), np.mean(drawn.v**2, axis=1)
    members = [errors[bins == i] for i in range(4)]
    np.testing.assert_array_equal(metrics["identity_error_by_gap"].count, [len(part) for part in members])
    np.testing.assert_allclose(metrics["identity_error_by_gap"].total, [part.sum() for part in members], rtol=1e-12)


def test_the_whole_interval_lies_in_the_last_bin():
    class Whole(AbstractTimes):
        def __call__(self, *, key):
            return jnp.ones(())

    objective = Objective(time_pairs=TimePairs(Whole(), Fixed(0.0)), identity_share=1.0)
    _, metrics, _ = run(objective, Zero(jnp.zeros(())), Batch(data(4)))
    np.testing.assert_array_equal(metrics["identity_error_by_gap"].count, [0, 0, 0, 4])


def test_loss_metric_is_the_loss():
    loss, metrics, _ = run(Objective(), network(), Batch(data(16)))
    assert metrics["loss"].value == loss


def test_flow_matching_has_no_metric_of_an_identity():
    _, metrics, _ = run(Objective(identity_share=0.0), network(), Batch(data(4)))
    assert metrics.keys() == {"loss", "boundary_error"}


def test_rows_that_a_coin_sets_to_r_equal_t_count_as_boundary_rows():
    x = data(MANY)
    objective = Objective(time_pairs=TimePairs(equal=0.25), identity_share=1.0)
    drawn = draws(objective, x)
    _, metrics, _ = run(objective, Zero(jnp.zeros(())), Batch(x))
    equal, errors = drawn.r == drawn.t, np.mean(drawn.v**2, axis=1)
    np.testing.assert_allclose(metrics["boundary_error"].value, np.mean(errors[equal]), rtol=1e-12)
    np.testing.assert_allclose(metrics["identity_error"].value, np.mean(errors[~equal]), rtol=1e-12)
    assert np.sum(metrics["identity_error_by_gap"].count) == np.sum(~equal)


def test_dropout_of_any_row_drops_identity_rows_too():
    objective = Objective(identity_share=0.5, label_dropout=LabelDropout(0.3, LABELS, boundary_only=False))
    seen = []

    class Listening(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            jax.debug.callback(lambda r, t, c: seen.append((bool(r < t), int(c))), r, t, condition)
            return jnp.zeros_like(z)

    eqx.filter_jit(objective)(Listening(), Batch(data(128), labels(128)), key=jr.key(0))
    jax.effects_barrier()
    for carries in (True, False):
        dropped = [label == LABELS for identity, label in seen if identity == carries]
        # 64 rows of either kind: 0.2 is 3.5 standard deviations, and none dropped would be 0.3 away.
        assert abs(np.mean(dropped) - 0.3) < 0.2


def micro_batches(objective, x):
    index = jnp.arange(len(x))
    return [run(objective, network(), Batch(x[rows], None, index[rows])) for rows in np.split(np.arange(len(x)), 3)]


def test_metrics_of_micro_batches_add_up_to_those_of_the_batch():
    objective, x = Objective(identity_share=0.5), data(24)
    _, whole, _ = run(objective, network(), Batch(x))
    (_, first, _), (_, second, _), (_, third, _) = micro_batches(objective, x)
    assert whole.keys() == first.keys()
    for name in whole:
        added = first[name] + second[name] + third[name]
        np.testing.assert_allclose(added.total, whole[name].total, rtol=1e-13, atol=1e-15)
        np.testing.assert_array_equal(added.count, whole[name].count)


def test_gradients_of_micro_batches_average_to_that_of_the_batch():
    objective, x = Objective(identity_share=0.5), data(24)
    mean = jax.tree.map(
        lambda *leaves: sum(leaves) / 3, *((loss, gradient) for loss, _, gradient in micro_batches(objective, x))
    )
    assert_same(run(objective, network(), Batch(x)), mean)


def test_groups_of_rows_may_stand_anywhere_in_the_batch():
    objective, x, condition = Objective(identity_share=0.5), data(24), labels(24)
    groups = np.random.default_rng(0).permutation(12)
    order = (2 * groups[:, None] + np.arange(2)).ravel()
    loss, _, gradient = run(objective, network(), Batch(x, condition))
    found = run(objective, network(), Batch(x[order], condition[order], jnp.asarray(order)))
    assert_same(found, (loss, gradient))


def test_sum_of_means_is_the_mean_of_all_values():
    total = Mean(jnp.asarray(6.0), jnp.asarray(3.0)) + Mean(jnp.asarray(10.0), jnp.asarray(1.0))
    assert total.value == 4


def test_mean_of_nothing_is_nan():
    assert jnp.isnan(Mean(jnp.zeros(()), jnp.zeros(())).value)


# Dropped labels


def dropped_rows(objective, rows):
    return np.isnan(draws(objective, data(rows), keep_dropout=True).t)


def test_boundary_rows_lose_their_label_so_often_that_the_rate_holds_for_the_batch():
    objective = Objective(identity_share=0.5, label_dropout=LabelDropout(0.15, LABELS))
    dropped = dropped_rows(objective, 2 * MANY)
    assert not dropped[::2].any()
    assert abs(dropped[1::2].mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / MANY)


def test_identity_rows_keep_their_label_while_there_are_boundary_rows():
    dropped = dropped_rows(Objective(label_dropout=LabelDropout(0.75, LABELS)), 16)
    np.testing.assert_array_equal(dropped, np.arange(16) % 4 >= 1)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_any_row_may_lose_its_label_where_there_is_one_kind_of_rows(share):
    objective = Objective(identity_share=share, label_dropout=LabelDropout(0.15, LABELS))
    dropped = dropped_rows(objective, MANY)
    assert abs(dropped.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / MANY)


def test_dropping_labels_changes_no_other_draw():
    objective, x = Objective(identity_share=0.5, label_dropout=LabelDropout(0.3, LABELS)), data(24)
    dropping, plain = draws(objective, x, keep_dropout=True), draws(objective, x)
    kept = ~np.isnan(dropping.t)
    assert 12 < kept.sum() < 24
    for some, every in zip(dropping, plain, strict=True):
        np.testing.assert_allclose(some[kept], every[kept], rtol=1e-14)


def test_dropped_rows_regress_the_unconditional_field_on_plain_velocity():
    guidance = Guidance(3.0, 0.5)
    # Every boundary row is dropped, no identity row.
    objective = Objective(identity_share=0.5, weight=PLAIN, guidance=guidance, label_dropout=LabelDropout(0.5, LABELS))
    x, condition = data(8), labels(8)
    drawn = draws(objective, x)

    def residuals(field):
        for i, (z, v, r, t, label, n) in enumerate(rows_of(drawn, condition)):
            if carries_identity(i, Fraction(1, 2)):
                yield mean_flow_residual(field, z, guided(field, z, v, t, label, n, 3.0, 0.5), r, t, label, n)
            else:
                yield boundary_residual(field, z, v, r, t, LABELS, n)

    assert_same(run(objective, network(), Batch(x, condition)), by_hand(residuals))


def test_dropped_identity_rows_use_plain_velocity_as_target_and_tangent():
    objective = Objective(
        identity_share=1.0, weight=PLAIN, guidance=Guidance(3.0, 0.5), label_dropout=LabelDropout(1.0, LABELS)
    )
    x, condition = data(4), labels(4)
    drawn = draws(objective, x)

    def residuals(field):
        for z, v, r, t, _, n in rows_of(drawn):
            yield mean_flow_residual(field, z, v, r, t, LABELS, n)

    assert_same(run(objective, network(), Batch(x, condition)), by_hand(residuals))


def test_null_condition_may_be_any_tree_that_broadcasts_to_a_condition():
    class Tree(AbstractField):
        """u = scale (label + sum(image))."""

        scale: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            assert condition["label"].dtype == jnp.int32
            return jnp.full_like(z, self.scale * (condition["label"] + jnp.sum(condition["image"])))

    field, x = Tree(jnp.ones(())), data(4)
    plain = Objective(None, identity_share=0.0, weight=PLAIN)
    dropping = dataclasses.replace(plain, label_dropout=LabelDropout(1.0, {"label": np.int64(100), "image": 0.5}))
    given = {"label": jnp.arange(4, dtype=jnp.int32), "image": jnp.ones((4, 2, 2))}
    null = {"label": jnp.full(4, 100, jnp.int32), "image": jnp.full((4, 2, 2), 0.5)}
    loss, _, gradient = run(plain, field, Batch(x, null))
    assert_same(run(dropping, field, Batch(x, given)), (loss, gradient))


# Guidance


@pytest.mark.parametrize(
    ("scale", "mix", "interval"), [(2.5, 0.0, (0.0, 1.0)), (1.0, 0.5, (0.0, 1.0)), (0.2, 0.9, (0.3, 0.7))]
)
@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 2), Fraction(1)], ids=str)
def test_guided_targets_are_the_formula_by_hand(scale, mix, interval, share):
    objective = Objective(
        MeanFlow() if share else None,
        time_pairs=TimePairs(UniformTimes()),
        identity_share=share,
        weight=PLAIN,
        guidance=Guidance(scale, mix, interval),
        label_dropout=LabelDropout(0.0, LABELS),
    )
    rows = 8 if share == Fraction(1, 2) else 4
    x, condition = data(rows), labels(rows)
    drawn = draws(objective, x)
    inside = (drawn.t >= interval[0]) & (drawn.t <= interval[1])
    assert inside.all() if interval == (0.0, 1.0) else 0 < inside.sum() < rows

    def residuals(field):
        for i, (z, v, r, t, label, n) in enumerate(rows_of(drawn, condition)):
            target = guided(field, z, v, t, label, n, scale, mix) if inside[i] else v
            residual = mean_flow_residual if carries_identity(i, share) else boundary_residual
            yield residual(field, z, target, r, t, label, n)

    assert_same(run(objective, network(), Batch(x, condition)), by_hand(residuals))


def test_guided_improved_mean_flow_regresses_on_the_guided_velocity():
    objective = Objective(
        ImprovedMeanFlow(),
        identity_share=0.5,
        weight=PLAIN,
        guidance=Guidance(1.0, 0.5),
        label_dropout=LabelDropout(0.0, LABELS),
    )
    x, condition = data(8), labels(8)
    drawn = draws(objective, x)

    def residuals(field):
        for i, (z, v, r, t, label, n) in enumerate(rows_of(drawn, condition)):
            target = guided(field, z, v, t, label, n, 1.0, 0.5)
            if carries_identity(i, Fraction(1, 2)):
                tangent = (constant(field.at(z, t, t, label, n)), jnp.zeros(()), jnp.ones(()))
                u, dudt = jax.jvp(lambda z, r, t, label=label, n=n: field.at(z, r, t, label, n), (z, r, t), tangent)
                yield u - constant(target - (t - r) * dudt)
            else:
                yield boundary_residual(field, z, target, r, t, label, n)

    assert_same(run(objective, network(), Batch(x, condition)), by_hand(residuals))


def test_guided_velocity_is_a_constant_for_every_identity():
    # `Regression` does not stop the velocity's gradient, as a user's identity might not.
    objective = Objective(
        Regression(),
        identity_share=1.0,
        weight=PLAIN,
        guidance=Guidance(1.0, 0.5),
        label_dropout=LabelDropout(0.0, LABELS),
    )
    x, condition = data(4), labels(4)
    drawn = draws(objective, x)

    def residuals(field):
        for z, v, r, t, label, n in rows_of(drawn, condition):
            yield field.at(z, r, t, label, n) - guided(field, z, v, t, label, n, 1.0, 0.5)

    assert_same(run(objective, network(), Batch(x, condition)), by_hand(residuals))


def test_guidance_with_scale_one_and_mix_zero_is_no_guidance():
    plain, guided = (
        run(
            Objective(identity_share=0.5, guidance=guidance, label_dropout=LabelDropout(0.1, LABELS)),
            network(),
            Batch(data(8), labels(8)),
        )
        for guidance in (None, Guidance(1.0, 0.0))
    )
    assert_same(guided, (plain[0], plain[2]))


NONE = None
BOTH = Guidance(1.0, 0.5)
FREE = Guidance(2.0, 0.0)


@pytest.mark.parametrize(
    ("identity", "share", "guidance", "calls"),
    [
        # boundary rows alone
        (None, 0.0, NONE, 1),
        (None, 0.0, FREE, 2),
        (None, 0.0, BOTH, 2),
        # identity rows alone
        (MeanFlow(), 1.0, NONE, 1),
        (MeanFlow(), 1.0, FREE, 2),
        (MeanFlow(), 1.0, BOTH, 3),
        # both kinds
        (MeanFlow(), 0.5, NONE, 1 + 1),
        (MeanFlow(), 0.5, FREE, 2 + 2),
        (MeanFlow(), 0.5, BOTH, 2 + 3),
        (ImprovedMeanFlow(), 0.5, NONE, 1 + 2),
        (ImprovedMeanFlow(), 0.5, FREE, 2 + 3),
        (SplitMeanFlow(), 0.5, NONE, 1 + 3),
        (SplitMeanFlow(), 0.5, FREE, 2 + 3),
        (SplitMeanFlow(), 0.5, BOTH, 2 + 3),
        (Shortcut(), 0.5, NONE, 1 + 3),
        (Shortcut(), 0.5, BOTH, 2 + 3),
    ],
)
def test_no_evaluation_of_the_field_is_wasted(identity, share, guidance, calls):
    objective = Objective(identity, identity_share=share, guidance=guidance, label_dropout=LabelDropout(0.1, LABELS))
    field = Counting(network(), [])
    rows = Batch(data(8), labels(8))
    jax.eval_shape(lambda: objective(field, rows, key=jr.key(0))[0])
    assert len(field.calls) == calls


# Refusals


@pytest.mark.parametrize("share", [-0.25, 1.25])
def test_share_outside_the_unit_interval_is_refused(share):
    with pytest.raises(ValueError, match=rf"identity_share must lie in \[0, 1\], got {share}"):
        Objective(identity_share=share)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_share_without_an_identity_is_refused(share):
    with pytest.raises(ValueError, match=rf"identity_share must be 0 without an identity .* got {Fraction(share)}"):
        Objective(identity=None, identity_share=share)


@pytest.mark.parametrize("identity", [ImprovedMeanFlow(), SplitMeanFlow(), Shortcut()])
def test_share_one_is_refused_for_an_identity_that_needs_the_boundary(identity):
    with pytest.raises(ValueError, match=rf"identity_share must be below 1 for {type(identity).__name__}.* got 1"):
        Objective(identity, identity_share=1.0)


def test_guidance_without_label_dropout_is_refused():
    with pytest.raises(ValueError, match=r"label_dropout must be given with guidance.* got None"):
        Objective(guidance=Guidance(2.0))


@pytest.mark.parametrize(("share", "rate"), [(0.25, 0.8), (0.75, 0.3)])
def test_rate_that_boundary_rows_cannot_reach_is_refused(share, rate):
    message = rf"label_dropout.rate must be at most 1 - identity_share = {1 - Fraction(share)}, .* got {rate}"
    with pytest.raises(ValueError, match=message):
        Objective(identity_share=share, label_dropout=LabelDropout(rate, LABELS))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, (True, False, False, True, False)),
        ({"label_dropout": LabelDropout(0.0, LABELS, boundary_only=False)}, (True, False, False, True, False)),
        ({"label_dropout": LabelDropout(0.1, LABELS)}, (True, True, False, True, False)),
        ({"label_dropout": LabelDropout(0.1, LABELS, boundary_only=False)}, (True, True, True, True, False)),
        ({"label_dropout": LabelDropout(0.1, LABELS), "identity_share": 1}, (True, True, True, True, False)),
        ({"identity": None, "identity_share": 0}, (False, False, False, True, False)),
        (
            {"identity": None, "identity_share": 0, "label_dropout": LabelDropout(0.1, LABELS, boundary_only=False)},
            (False, True, False, True, False),
        ),
        ({"time_pairs": TimePairs(at_data=1.0)}, (True, False, False, True, True)),
        ({"identity": ContinuousConsistency()}, (True, False, False, True, True)),
        ({"identity": ContinuousConsistency(), "identity_share": 0}, (False, False, False, True, False)),
        (
            {"identity": ContinuousConsistency(), "identity_share": 1, "label_dropout": LabelDropout(0.1, LABELS)},
            (True, False, True, False, True),
        ),
    ],
    ids=range(11),
)
def test_what_is_trained_follows_from_method_share_times_and_dropout(parts, expected):
    assert Objective(**parts).trained == Trained(*expected)


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(2.0), None),
        (DrawnGuidance(), GuidanceRange(1.0, 8.0, 0.5)),
        (DrawnGuidance(PowerLawScales(0.0, 2.0, 3.0), None), GuidanceRange(2.0, 3.0, None)),
        (DrawnGuidance(lambda *, key: jr.uniform(key) + 1), None),
    ],
)
def test_range_of_drawn_guidance_is_known_if_its_scales_are(guidance, expected):
    objective = Objective(guidance=guidance, label_dropout=LabelDropout(0.1, LABELS))
    assert objective.trained.guidance == expected


def test_range_contains_its_scales_and_the_intervals_around_its_middle():
    drawn, whole = GuidanceRange(1.0, 8.0, 0.5), GuidanceRange(1.0, 8.0)
    assert drawn.contains(1, (0.2, 0.5)) and drawn.contains(8.0, (0, 1)) and whole.contains(2.0, (0, 1))
    assert not drawn.contains(0.9, (0, 1)) and not drawn.contains(8.1, (0, 1))
    assert not drawn.contains(2.0, (0.6, 0.8)) and not drawn.contains(2.0, (0.2, 0.4))
    assert not whole.contains(2.0, (0.2, 0.8))
    assert not drawn.contains(2.0, (0.2, 1.5)) and not drawn.contains(2.0, (-0.1, 0.7))


@pytest.mark.parametrize(("share", "rate"), [(0.25, 0.75), (0.0, 1.0), (1.0, 1.0)])
def test_rate_that_drops_every_possible_row_is_accepted(share, rate):
    Objective(identity_share=share, label_dropout=LabelDropout(rate, LABELS))


@pytest.mark.parametrize(("rows", "share"), [(6, 0.25), (8, 0.3333)])
def test_batch_that_the_split_does_not_divide_is_refused(rows, share):
    denominator = round(1 / share)
    with pytest.raises(ValueError, match=rf"multiple of {denominator} .* = 1/{denominator}\).* got {rows}"):
        Objective(identity_share=share)(network(), Batch(data(rows)), key=jr.key(0))


@pytest.mark.parametrize("condition", [None, {"label": 0}])
def test_condition_that_null_does_not_resemble_is_refused(condition):
    rows = Batch(data(4), jax.tree.map(lambda _: jnp.zeros(4), condition))
    objective = Objective(label_dropout=LabelDropout(0.1, LABELS))
    structure = "None" if condition is None else r"\{'label': \*\}"
    message = rf"condition must have the structure of label_dropout.null, PyTreeDef\(\*\); got PyTreeDef\({structure}\)"
    with pytest.raises(ValueError, match=message):
        objective(network(), rows, key=jr.key(0))


@pytest.mark.parametrize("jit", [lambda function: function, eqx.filter_jit])
def test_null_label_that_the_network_lacks_is_refused(jit):
    field = MLP(SIZE, width=4, depth=1, labels=3, key=jr.key(0))
    objective, batch = Objective(label_dropout=LabelDropout(0.1, 4)), Batch(data(4), jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"label_dropout.null must lie in \[0, 3\] for a network with 3 labels, got 4"):
        jit(objective)(field, batch, key=jr.key(0))


@pytest.mark.parametrize(
    ("x", "got"), [(jnp.zeros((4, SIZE), jnp.uint8), "uint8"), ({"image": jnp.zeros((4, SIZE))}, "None")]
)
def test_data_that_are_no_array_of_floats_are_refused(x, got):
    with pytest.raises(ValueError, match=rf"x must be one floating-point array here .* got {got}"):
        Objective()(network(), Batch(x, None, jnp.arange(4)), key=jr.key(0))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_field_that_does_not_return_the_shape_of_its_state_is_refused(share):
    class Sum(AbstractField):
        """Would broadcast, silently, to a wrong loss."""

        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.sum(z)

    with pytest.raises(ValueError, match=r"field must return the shape of z, \(3,\), got \(\)"):
        Objective(identity_share=share)(Sum(), Batch(data(4)), key=jr.key(0))


class OuterIdentity(AbstractIdentity):
    """Whose residual is a matrix, as after a product of a column and a row."""

    facts = Facts()

    def residual(self, field, row):
        return row.z[:, None] * row.v


class OuterLoss(AbstractIdentityWithLoss):
    """Whose residual or loss has an axis too many, of one row or of a group."""

    group: int = 1
    wrong: str = "residual"

    @property
    def facts(self):
        return Facts(group=self.group)

    def residual_and_loss(self, field, row):
        if self.wrong == "residual":
            return row.v[..., None] * row.z[..., None, :], jnp.zeros(())
        return row.v, jnp.sum(row.v**2, axis=-1, keepdims=self.group == 1)


class OuterValues(AbstractIdentityWithVelocity):
    """Whose u, for the perceptual terms, has an axis too many."""

    facts = Facts()

    def residual_and_values(self, field, row):
        return row.v, row.v[None], None


class TwoResiduals(AbstractIdentity):
    facts = Facts()

    def residual(self, field, row):
        return row.v, row.z


class ByDimension(AbstractWeight):
    def __call__(self, error, row):
        return jnp.full(row.z.shape, 1.0)


class PairOfTimes(AbstractTimes):
    def __call__(self, *, key):
        return jr.uniform(key, (2,))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"identity": OuterIdentity()}, r"OuterIdentity must return the shape of z, (3,), got (3, 3)"),
        ({"identity": OuterLoss()}, r"OuterLoss must return the shape of z, (3,), got (3, 3)"),
        ({"identity": OuterLoss(group=2)}, r"OuterLoss must return the shape of z, (2, 3), got (2, 3, 3)"),
        (
            {"identity": OuterLoss(wrong="loss")},
            r"the loss of OuterLoss must be a real floating-point scalar, got",
        ),
        (
            {"identity": OuterLoss(2, "loss")},
            r"the loss of OuterLoss must be a real floating-point scalar, got",
        ),
        ({"identity": OuterValues()}, r"OuterValues must return the shape of z, (3,), got (1, 3)"),
        (
            {"identity": TwoResiduals()},
            r"TwoResiduals must return one array of the shape of z, (3,), got (f64[3], f64[3])",
        ),
        ({"weight": ByDimension()}, r"a weight of ByDimension must be a real scalar, got float64 of shape (3,)"),
        (
            {"time_pairs": TimePairs(PairOfTimes())},
            r"a time of PairOfTimes must be a real scalar, got float64",
        ),
        ({"boundary_times": PairOfTimes()}, r"a time of PairOfTimes must be a real scalar, got float64"),
    ],
    ids=[
        "residual",
        "with loss",
        "of a group",
        "loss",
        "loss of a group",
        "values",
        "two",
        "weight",
        "times",
        "boundary",
    ],
)
def test_own_parts_that_return_another_shape_are_refused_by_name(parts, message):
    """They would broadcast, silently, to a wrong loss."""
    objective = Objective(**{"identity_share": 0.5, **parts})
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(network(), Batch(data(4)), key=jr.key(0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_own_guidance_that_returns_another_shape_is_refused_by_name(share):
    class Mean(AbstractGuidance):
        needs_conditional = False

        def condition(self, condition, r, t, *, key):
            return condition

        def null(self, condition, t, dropout):
            return dropout.null_like(condition)

        def velocity(self, v, conditional, unconditional, t, condition=None):
            return jnp.mean(v)

        def fixed_point(self, conditional, unconditional, t, condition=None):
            return jnp.mean(conditional)

    objective = Objective(identity_share=share, guidance=Mean(), label_dropout=LabelDropout(0.0, LABELS))
    rows = Batch(data(4), jnp.zeros(4, int), jnp.arange(4))
    with pytest.raises(ValueError, match=r"Mean must return the shape of z, \(3,\), got \(\)"):
        objective(network(), rows, key=jr.key(0))


def test_batch_without_conditions_is_refused_where_conditions_are_dropped():
    objective = Objective(label_dropout=LabelDropout(0.1, None))
    with pytest.raises(ValueError, match="condition must be given with label_dropout, got None"):
        objective(network(), Batch(data(4)), key=jr.key(0))


@pytest.mark.parametrize(("condition", "index"), [(5, None), (None, 5), (3, 4)])
def test_batch_of_unequal_lengths_is_refused(condition, index):
    condition, index = (None if length is None else jnp.arange(length) for length in (condition, index))
    with pytest.raises(
        ValueError, match=r"x, condition, index and eps must share their leading batch axis, got .*\(4,\)"
    ):
        Batch(data(4), condition, index)


def test_batch_without_a_batch_axis_is_refused():
    with pytest.raises(ValueError, match=r"eps must share their leading batch axis, got \[\(\)\]"):
        Batch(jnp.zeros(()))


def test_rows_are_numbered_from_zero_by_default():
    np.testing.assert_array_equal(Batch(data(4)).index, [0, 1, 2, 3])


class Shown(AbstractField):
    """The condition itself as velocity."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.full_like(z, condition.astype(z.dtype))


def loss_of(condition, null=None):
    """Of rows with this condition, or with `null` in its place."""
    dropout = None if null is None else LabelDropout(1.0, null)
    objective = Objective(identity=None, identity_share=0, weight=PLAIN, label_dropout=dropout)
    return eqx.filter_jit(objective)(Shown(), Batch(data(2), condition), key=jr.key(0))[0]


NULLS = {
    "2^32 in int32": (2**32, jnp.int32, "int32, got 4294967296"),
    "300 in uint8": (300, jnp.uint8, "uint8, got 300"),
    "-1 in uint8": (-1, jnp.uint8, "uint8, got -1"),
    "-1 in uint32": (-1, jnp.uint32, "uint32, got -1"),
    "5 in bool": (5, bool, "bool, got 5"),
    "infinite in float16": (70_000.0, jnp.float16, "float16, got 70000.0"),
    "an array, whose values no program knows": (jnp.asarray(300), jnp.uint8, "uint8, .* got an array of int32"),
}


@pytest.mark.parametrize(("null", "dtype", "message"), NULLS.values(), ids=NULLS)
def test_null_condition_that_a_cast_would_change_is_refused(null, dtype, message):
    with pytest.raises(ValueError, match=f"label_dropout.null must be .*the condition's dtype {message}"):
        loss_of(jnp.zeros(2, dtype), null)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("null", "dtype"),
    [
        (255, jnp.uint8),
        (np.uint8(255), jnp.int32),
        (-(2**31), jnp.int32),
        (2**32 - 1, jnp.uint32),
        (True, bool),
        (65_504.0, jnp.float16),
        (math.inf, jnp.float32),
    ],
)
def test_null_condition_at_the_end_of_its_dtype_is_used_as_it_is(null, dtype):
    assert loss_of(jnp.zeros(2, dtype), null) == loss_of(jnp.full(2, null, dtype))
