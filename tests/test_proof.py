"""The proof: every shipped equation holds on fields whose average velocity is known, and on nothing else.

The exact fields know nothing of the identities: `AverageVelocity` only integrates v, and its derivatives go through the
solver. The v handed to an identity is the *marginal* velocity, for with a conditional one the residual is noise.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from methods import EXACT, METHODS, taught_by

from mf_eqx import (
    AbstractField,
    AlignYourFlow,
    AlphaFlow,
    Batch,
    ConsistencyTraining,
    Context,
    ContinuousConsistency,
    Guidance,
    InductiveMomentMatching,
    LinearInterpolant,
    MeanFlow,
    Objective,
    RecursiveConsistency,
    Row,
    SoFlow,
    TrigonometricInterpolant,
    UniformTimes,
    XPrediction,
)
from mf_eqx.exact import (
    AverageVelocity,
    GaussianAverageVelocity,
    GaussianMixture,
    GuidedVelocity,
    MarginalVelocity,
    PointMassAverageVelocity,
    PointSet,
)

pytestmark = pytest.mark.usefixtures("x64")

PATHS = (LinearInterpolant(), TrigonometricInterpolant())
MEAN = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
STD, WEIGHT, LABEL = np.array([0.3, 0.5, 0.2]), np.array([0.5, 0.2, 0.3]), np.array([0, 1, 1])
NUMBER = 256


def by_name(value):
    return value if isinstance(value, str) else type(value).__name__


def mixture():
    return GaussianMixture(MEAN, STD, WEIGHT, LABEL)


@eqx.filter_jit
def draw(path):
    """States of the true marginal and times, with t - r spread over (0, 1)."""
    x_key, eps_key, r_key = jr.split(jr.key(0), 3)
    gap = (jnp.arange(NUMBER) + 0.5) / NUMBER
    r = jr.uniform(r_key, (NUMBER,)) * (1 - gap)
    x = jax.vmap(lambda key: mixture().sample(key=key))(jr.split(x_key, NUMBER))
    z, _ = jax.vmap(path.state_and_velocity)(x, jr.normal(eps_key, x.shape), r + gap)
    return z, r, r + gap


@functools.cache
def marginal(path):
    """The marginal velocity, its exact average, and the points (z, r, t)."""
    velocity = MarginalVelocity(mixture(), path)
    return velocity, AverageVelocity(velocity), draw(path)


@eqx.filter_jit
def residuals(identity, field, velocity, z, r, t, step=None):
    """Of many points at once, at a training step if one is given; each row has a key of its own, as in an objective."""
    keys = jr.split(jr.key(1), len(z))
    taught = taught_by(identity, field) | {"velocity": velocity}
    if step is not None:
        taught["context"] = Context(step, field if identity.facts.needs_teacher else None)

    def residual(z, r, t, key):
        return identity.residual(field, Row(z, velocity(z, t, None), r, t, key=key, **taught))

    return jax.vmap(residual)(z, r, t, keys)


@eqx.filter_jit
def evaluate(field, z, r, t, condition=None):
    return jax.vmap(lambda z, r, t: field(z, r, t, condition))(z, r, t)


@eqx.filter_jit
def velocities(velocity, z, t, condition=None):
    return jax.vmap(lambda z, t: velocity(z, t, condition))(z, t)


def largest(values):
    """The largest magnitude, where NaN counts as infinite."""
    return np.max(np.nan_to_num(np.abs(values), nan=np.inf))


# Every identity on the exact field.


class AtFactor(AbstractField):
    """A field at a multiple of r: itself where the factor is 1."""

    field: AbstractField
    factor: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, self.factor * r, t)


@functools.cache
def flagship(method, path, factor=1.0):
    velocity, field, points = marginal(path)
    return residuals(METHODS[method], AtFactor(field, jnp.asarray(factor)), velocity, *points)


# An identity is given z and v, never the path: on the second one, the field and v are tested.
@pytest.mark.parametrize(
    ("method", "path"),
    [*((method, PATHS[0]) for method in EXACT), ("MeanFlow", PATHS[1]), ("SplitMeanFlow", PATHS[1])],
    ids=by_name,
)
def test_exact_field_satisfies_identity(method, path):
    assert flagship(method, path).shape == (NUMBER, 2)
    assert largest(flagship(method, path)) < 1e-6


@pytest.mark.parametrize("method", EXACT)
def test_a_field_with_wrong_times_leaves_a_residual_a_thousand_times_larger(method):
    wrong = flagship(method, PATHS[0], factor=0.9)
    typical = np.median(np.linalg.norm(wrong, axis=1))
    assert typical > 1_000 * largest(flagship(method, PATHS[0]))
    assert typical > 1e-3


@pytest.mark.parametrize("method", EXACT)
def test_exact_field_satisfies_identity_outside_of_jit(method):
    velocity, field, (z, r, t) = marginal(PATHS[0])
    taught = taught_by(METHODS[method], field)
    for i in (NUMBER // 3, NUMBER - 1):
        row = Row(z[i], velocity(z[i], t[i]), r[i], t[i], key=jr.key(2), **taught)
        assert largest(METHODS[method].residual(field, row)) < 1e-6


FINITE_STEPS = {
    "AlphaFlow": AlphaFlow,
    "SoFlow": SoFlow,
    **{f"RecursiveConsistency of order {n}": functools.partial(RecursiveConsistency, n) for n in (1, 4)},
    "RecursiveConsistency along its own velocity": functools.partial(RecursiveConsistency, 2, conditional=0.0),
}


@pytest.mark.parametrize("method", FINITE_STEPS)
def test_a_method_of_finite_steps_leaves_a_residual_of_first_order_in_them(method):
    velocity, field, points = marginal(PATHS[0])
    identity = FINITE_STEPS[method](lambda step: 0.04 / 2.0**step)
    coarse, fine = (residuals(identity, field, velocity, *points, jnp.asarray(step)) for step in (0, 1))
    ratio = np.linalg.norm(coarse, axis=1) / np.linalg.norm(fine, axis=1)
    assert 1.9 < np.median(ratio) < 2.1


@pytest.mark.parametrize("method", [AlignYourFlow, ContinuousConsistency])
def test_a_part_of_the_derivative_leaves_the_other_part_of_u_minus_v(method):
    velocity, field, (z, r, t) = marginal(PATHS[0])
    expected = 0.01 * (evaluate(field, z, r, t) - velocities(velocity, z, t))
    assert largest(residuals(method(0.99), field, velocity, z, r, t) - expected) < 1e-6
    assert largest(expected) > 1e-3


# Methods that learn from pairs of data and noise: exact where the path of each pair is the flow, of first order
# elsewhere.


def pair_residuals(identity, field, path, x):
    """Of one row for each x, with noise and times of its own, r where the method wants it."""
    group = identity.facts.group
    eps = jr.normal(jr.key(6), x.shape)
    t = jnp.repeat(jr.uniform(jr.key(7), (len(x) // group,), minval=0.2, maxval=0.9), group)
    r = jnp.zeros_like(t) if identity.facts.ends_at_data else t / 3

    def make(x, eps, r, t):
        return Row(*path.state_and_velocity(x, eps, t), r, t, x=x, eps=eps)

    def residual(rows):
        rows = eqx.tree_at(lambda row: row.path, rows, path, is_leaf=lambda node: node is None)
        return identity.residual(field, rows)

    rows = jax.vmap(make)(x, eps, r, t)
    if group > 1:
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), rows)
    return jax.vmap(residual)(rows).reshape(x.shape)


PAIRS = [ConsistencyTraining, InductiveMomentMatching]


@pytest.mark.parametrize("method", PAIRS)
def test_method_of_pairs_holds_on_a_point_where_each_pair_moves_along_the_flow(method):
    point = np.array([0.7, -1.2])
    x = jnp.broadcast_to(point, (NUMBER, 2))

    class Earlier(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return PointMassAverageVelocity(point)(z, r, 0.9 * t)

    right, wrong = (
        pair_residuals(method(0.125), field, PATHS[0], x) for field in (PointMassAverageVelocity(point), Earlier())
    )
    assert largest(right) < 1e-12
    assert np.median(np.linalg.norm(wrong, axis=1)) > 1e-3


@pytest.mark.parametrize("method", PAIRS)
def test_mean_residual_of_pairs_through_one_state_is_of_second_order_in_the_gap(method):
    """Each pair moves along its own straight line, and only their mean along the flow."""
    mean, std, t = jnp.array([0.7, -1.2]), 0.4, 0.6
    z = jnp.array([0.3, 0.5])
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    middle = mean + gain * (z - (1 - t) * mean)  # of x given z; its deviation enters u of a Gaussian linearly
    x = middle + jnp.array([[0.2, 0.1], [-0.2, -0.1], [0.3, -0.4], [-0.3, 0.4]])

    class Wrong(AbstractField):
        field: AbstractField

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.field(z, r, t) + 0.5 * jnp.sin(z)

    def mean_residual(field, gap):
        identity = method(gap, earlier_time=lambda t, gap: t - gap)
        group = identity.facts.group

        def row(x):
            return Row(z, z, 0.0, t, x=x, eps=(z - (1 - t) * x) / t)

        rows = eqx.tree_at(lambda row: row.path, jax.vmap(row)(x), PATHS[0], is_leaf=lambda node: node is None)
        if group > 1:
            return jnp.mean(identity.residual(field, rows), axis=0)
        return jnp.mean(rows.map(lambda row: identity.residual(field, row)), axis=0)

    exact = GaussianAverageVelocity(np.asarray(mean), std)
    coarse, fine = (jnp.linalg.norm(mean_residual(exact, gap)) / gap for gap in (0.002, 0.001))
    assert 1.9 < coarse / fine < 2.1
    assert jnp.linalg.norm(mean_residual(Wrong(exact), 0.001)) / 0.001 > 30 * fine


def test_exact_field_of_a_point_set_satisfies_identity_down_to_its_earliest_time():
    _, _, (z, r, t) = marginal(PATHS[0])
    velocity = MarginalVelocity(PointSet(np.random.default_rng(0).standard_normal((20, 2))))
    r = r.at[::2].set(0.0) + PointSet.earliest
    t = jnp.maximum(t, r)
    assert largest(residuals(MeanFlow(), AverageVelocity(velocity), velocity, z, r, t)) < 1e-6


@pytest.mark.parametrize(("tangent_r", "tangent_t"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_wrong_tangent_leaves_a_residual_a_thousand_times_larger(tangent_r, tangent_t):
    velocity, field, points = marginal(PATHS[0])
    wrong = residuals(MeanFlow(tangent_r, tangent_t), field, velocity, *points)
    typical = np.median(np.linalg.norm(wrong, axis=1))
    assert typical > 1_000 * largest(flagship("MeanFlow", PATHS[0]))  # the worst right one
    assert typical > 1e-2


def test_identity_holds_with_finite_differences_along_the_trajectory():
    velocity, field, (z, r, t) = marginal(PATHS[0])
    inside = (t > r + 0.02) & (t < 0.98)
    z, r, t, step = z[inside], r[inside], t[inside], 1e-4

    def moved(dt):
        """z on its own trajectory at time t + dt: the field runs forward too."""
        return z + dt * evaluate(field, z, t + dt, t)

    u = evaluate(field, z, r, t)
    ahead, behind = (evaluate(field, moved(dt), r, t + dt) for dt in (step, -step))
    dudt = (ahead - behind) / (2 * step)
    v = velocities(velocity, z, t)
    # Truncation: step^2 / 6 times a third derivative that reaches some hundreds where trajectories part. Smaller steps
    # would show the solver's error, 1e-10 / step.
    assert largest(u + (t - r)[:, None] * dudt - v) < 5e-6


CLOSED_FORMS = (
    (lambda: GaussianAverageVelocity(np.array([0.7, -1.2]), 0.4), 0.0),
    (lambda: PointMassAverageVelocity(np.array([0.7, -1.2])), 0.05),
)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("make", "earliest"), CLOSED_FORMS, ids=["gaussian", "point_mass"])
def test_closed_form_field_satisfies_identity_to_rounding(make, earliest, method):
    field = make()
    z = jr.normal(jr.key(3), (NUMBER, 2))
    r, t = jnp.sort(jr.uniform(jr.key(4), (2, NUMBER), minval=earliest), axis=0)
    assert largest(residuals(METHODS[method], field, lambda z, t, _: field(z, t, t), z, r, t)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in EXACT if METHODS[name].facts.uses_velocity])
def test_average_velocity_of_a_teacher_is_the_fixed_point_of_distillation(method):
    field = GaussianAverageVelocity(np.array([0.7, -1.2]), 0.4)
    batch = Batch(jr.normal(jr.key(9), (16, 2)))

    @eqx.filter_jit
    def errors(velocity):
        objective = Objective(METHODS[method], identity_share=0.5, velocity=velocity)
        _, metrics = objective(field, batch, key=jr.key(10))
        return [metrics[name].value for name in ("boundary_error", "identity_error")]

    assert max(errors(lambda z, t, _: field(z, t, t))) < 1e-24
    assert min(errors(lambda z, t, _: field(z, t, 0.9 * t))) > 1e-3


# The exact field itself, against anchors that were found another way.


def test_average_of_one_gaussian_is_the_closed_form():
    _, _, points = marginal(PATHS[0])
    field = AverageVelocity(MarginalVelocity(GaussianMixture(np.array([[0.7, -1.2]]), 0.4)))
    expected = evaluate(GaussianAverageVelocity(np.array([0.7, -1.2]), 0.4), *points)
    assert largest(evaluate(field, *points) - expected) < 1e-9


def test_average_of_one_point_is_the_closed_form():
    _, _, (z, r, t) = marginal(PATHS[0])
    r, t = (jnp.maximum(times, PointSet.earliest) for times in (r, t))
    field = AverageVelocity(MarginalVelocity(PointSet(np.array([[0.7, -1.2]]))))
    expected = evaluate(PointMassAverageVelocity(np.array([0.7, -1.2])), z, r, t)
    assert largest((evaluate(field, z, r, t) - expected) * t[:, None]) < 1e-9  # u itself grows as 1 / t


@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_flow_in_one_dimension_is_the_quantile_map(path):
    line = GaussianMixture(MEAN[:, :1], STD, WEIGHT)
    z = np.linspace(-2.0, 2.0, 9)
    r, t = np.linspace(0.0, 0.5, 9), np.linspace(1.0, 0.6, 9)

    def cdf(x, time):
        alpha, sigma, *_ = path.rates(jnp.asarray(time))
        return WEIGHT @ scipy.stats.norm.cdf(x, alpha * MEAN[:, 0], np.sqrt((alpha * STD) ** 2 + sigma**2))

    def quantile(probability, time):
        return scipy.optimize.brentq(lambda x: cdf(x, time) - probability, -20, 20, xtol=1e-14, rtol=1e-14)

    u = evaluate(AverageVelocity(MarginalVelocity(line, path)), z[:, None], r, t)
    expected = [quantile(cdf(z[i], t[i]), r[i]) for i in range(9)]
    np.testing.assert_allclose(z - (t - r) * u[:, 0], expected, rtol=0, atol=1e-9)


def test_independent_coordinates_stack():
    path = PATHS[1]
    _, _, (z, r, t) = marginal(path)
    first, second = MEAN[:, 0], MEAN[:, 1]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(first, second, indexing="ij")], axis=1)
    joint = GaussianMixture(grid, 0.3, np.outer(WEIGHT, WEIGHT[::-1]).ravel())
    parts = GaussianMixture(first[:, None], 0.3, WEIGHT), GaussianMixture(second[:, None], 0.3, WEIGHT[::-1])
    fields = [AverageVelocity(MarginalVelocity(part, path)) for part in parts]
    stacked = [evaluate(field, z[:, i : i + 1], r, t) for i, field in enumerate(fields)]
    together = evaluate(AverageVelocity(MarginalVelocity(joint, path)), z, r, t)
    assert largest(together - jnp.concatenate(stacked, axis=1)) < 1e-9


# Guidance inside the target.


EFFECTIVE_SCALE, CLASS = 2.5, 1


def guided():
    """The conditional marginal velocity, the guided one, and the exact average of the latter."""
    velocity, _, points = marginal(PATHS[0])
    target = GuidedVelocity(velocity, EFFECTIVE_SCALE)
    return velocity, target, AverageVelocity(target), points


def guided_target_minus_guided_velocity(guidance):
    """Eq. 21, with the conditional velocity replaced by its mean given z and the label, minus Eq. 13."""
    velocity, target, field, (z, _, t) = guided()
    label = jnp.asarray(CLASS)
    passes = evaluate(field, z, t, t, label), evaluate(field, z, t, t, None)
    v, expected = velocities(velocity, z, t, label), velocities(target, z, t, label)
    return jax.vmap(guidance.velocity)(v, *passes, t) - expected


@pytest.mark.parametrize("mix", [0.0, 0.5, 0.9])
def test_exact_average_of_the_guided_velocity_is_the_fixed_point_of_its_target(mix):
    guidance = Guidance(scale=EFFECTIVE_SCALE * (1 - mix), mix=mix)
    assert largest(guided_target_minus_guided_velocity(guidance)) < 1e-8


@pytest.mark.parametrize("mix", [0.0, 0.5, 0.9])
def test_another_effective_scale_has_another_fixed_point(mix):
    guidance = Guidance(scale=(EFFECTIVE_SCALE - 1) * (1 - mix), mix=mix)
    assert largest(guided_target_minus_guided_velocity(guidance)) > 1e-2


def test_exact_average_of_the_guided_velocity_satisfies_identity():
    _, target, field, points = guided()

    class Labelled(AbstractField):
        field: AbstractField
        label: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.field(z, r, t, self.label)

    label = jnp.asarray(CLASS)
    left = residuals(MeanFlow(), Labelled(field, label), lambda z, t, _: target(z, t, label), *points)
    assert largest(left) < 1e-6


# The marginal velocity is what regression on the conditional one finds.


@functools.cache
def data():
    keys = jr.split(jr.key(5), 100_000)
    x, label = jax.jit(jax.vmap(lambda key: mixture().labelled_sample(key=key)))(keys)
    return np.asarray(x), np.asarray(label)


@pytest.mark.parametrize("label", [None, CLASS])
@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_marginal_velocity_is_the_mean_of_the_conditional_one_given_the_state(path, label):
    x, labels = data()
    x = x if label is None else x[labels == label]
    for z, t in (((0.3, -0.2), 0.4), ((-0.8, 0.1), 0.6), ((0.5, 1.0), 0.9)):
        alpha, sigma, alpha_rate, sigma_rate = (float(rate) for rate in path.rates(jnp.asarray(t)))
        eps = (np.array(z) - alpha * x) / sigma
        weight = np.exp(-np.sum(eps**2, axis=1) / 2)  # the density of z given x
        weight /= weight.sum()
        v = alpha_rate * x + sigma_rate * eps
        mean = weight @ v
        error = np.sqrt(weight**2 @ (v - mean) ** 2)  # standard error of a self-normalised mean
        found = mixture().velocity(path, jnp.array(z), jnp.asarray(t), label)
        assert (error < 0.03).all()
        assert (np.abs(found - mean) < 4 * error).all()


# Limits, on a smooth field that is not an average velocity of anything.


class Smooth(AbstractField):
    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.sin(2 * z[::-1] + r) * jnp.exp(-t) + z * (t - 0.5 * r**2)


@functools.cache
def left_at(method, gap):
    """Points, and the residual of `Smooth` at t - r = gap."""
    velocity, _, (z, _, t) = marginal(PATHS[0])
    t = 0.1 + 0.9 * t
    return z, t, residuals(METHODS[method], Smooth(), velocity, z, t - gap, t)


def learns_velocity(method):
    """Whether rows with r < t hold u against a velocity that is given, so that they hold u(z, t, t) against it, too."""
    facts = METHODS[method].facts
    return facts.uses_velocity or facts.needs_velocity


@pytest.mark.parametrize("method", [name for name in EXACT if learns_velocity(name)])
def test_residual_of_a_velocity_identity_tends_to_u_minus_v(method):
    velocity, *_ = marginal(PATHS[0])
    z, t, exact = left_at(method, 0.0)
    boundary = evaluate(Smooth(), z, t, t) - velocities(velocity, z, t)
    far, near = (largest(left_at(method, gap)[2] - boundary) for gap in (1e-2, 1e-4))
    assert largest(boundary) > 1 and far > 1e-3
    assert near < 0.02 * far  # of first order in t - r
    assert largest(exact - boundary) < 1e-14


@pytest.mark.parametrize("method", [name for name in EXACT if not learns_velocity(name)])
def test_residual_of_an_identity_without_velocity_tends_to_zero_whatever_the_field(method):
    far, near = (largest(left_at(method, gap)[2]) for gap in (1e-2, 1e-4))
    assert far > 1e-3
    assert near < 0.02 * far
    assert largest(left_at(method, 0.0)[2]) < 1e-14


# Velocities that are bounded at small times: exact for their own flow, whose equations are the others above that time.


SMALLEST = 0.6


class Bounded(eqx.Module):
    """The marginal velocity that rows of an objective with this smallest time learn."""

    velocity: MarginalVelocity

    def __call__(self, z, t, condition=None):
        return jnp.minimum(1, t / SMALLEST) * self.velocity(z, t, condition)


class Below(eqx.Module):
    """The same below the smallest time, where it has no kink."""

    velocity: MarginalVelocity

    def __call__(self, z, t, condition=None):
        return t / SMALLEST * self.velocity(z, t, condition)


class AverageOfBounded(AbstractField):
    """The exact average of a bounded velocity, of two parts: a solver is inexact across the kink."""

    velocity: MarginalVelocity

    def __call__(self, z, r, t, condition=None, *, key=None):
        middle = jnp.clip(SMALLEST, r, t)
        moved = (t - middle) * AverageVelocity(self.velocity)(z, middle, t)
        moved = moved + (middle - r) * AverageVelocity(Below(self.velocity))(z - moved, r, middle)
        return moved / (t - r)


def of_bounded_rows(field):
    """Residuals where v is bounded, and the times of the rows."""
    velocity, _, (z, r, t) = marginal(PATHS[0])
    rows = slice(None, None, 4)
    return residuals(MeanFlow(), field, Bounded(velocity), z[rows], r[rows], t[rows]), t[rows]


def test_average_of_a_bounded_velocity_satisfies_the_identity_at_all_times():
    found, t = of_bounded_rows(AverageOfBounded(marginal(PATHS[0])[0]))
    assert min(t) < SMALLEST / 2
    assert largest(found) < 1e-6


def test_true_average_satisfies_it_above_the_smallest_time_alone():
    found, t = of_bounded_rows(marginal(PATHS[0])[1])
    is_above = np.asarray(t) >= SMALLEST
    assert 10 < is_above.sum() < len(t) - 5
    assert largest(found[is_above]) < 1e-6
    assert np.median(np.linalg.norm(found[~is_above], axis=1)) > 0.1


def test_rows_learn_velocities_that_are_bounded_as_those_of_x_prediction():
    point = np.array([0.7, -1.2])

    class Point(AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.asarray(point)

    class Velocity(AbstractField):  # the XPrediction itself would be refused by the plain objective
        def __call__(self, z, r, t, condition=None, *, key=None):
            return XPrediction(Point(), SMALLEST)(z, r, t, condition, key=key)

    rows, field = Batch(jnp.broadcast_to(point, (64, 2))), Velocity()
    options = {"boundary_times": UniformTimes(), "identity_share": 0}
    bounded, plain = (
        Objective(None, smallest_time=time, **options)(field, rows, key=jr.key(0))[1]["boundary_error"].value
        for time in (SMALLEST, 0.0)
    )
    assert bounded < 1e-28 and plain > 1e-2


def test_flow_of_a_bounded_velocity_leaves_a_part_of_the_noise():
    point, eps = jnp.array([0.7, -1.2]), jnp.array([0.4, 2.0])

    def velocity(z, t, condition):
        return (z - point) / jnp.maximum(t, SMALLEST)

    x = eps - AverageVelocity(velocity)(eps, 0.0, 1.0)
    np.testing.assert_allclose(x, point + SMALLEST / np.e * (eps - point), atol=1e-8)
