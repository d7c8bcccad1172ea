"""Guidance as an input of the field: what is drawn, what a row learns from it, and sampling at any scale."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.stats
from fields import refilled

import mf_eqx as mfx
from mf_eqx import exact, metrics

pytestmark = pytest.mark.usefixtures("x64")

LABELS, SIZE, ROWS = 3, 3, 8
DROPOUT = mfx.LabelDropout(0.2, LABELS)
PAPER = {"guidance": mfx.DrawnGuidance(), "label_dropout": DROPOUT, "identity_share": 0.5}


class Headed(mfx.AbstractFieldWithVelocity):
    """A small field of everything that the paper's gets, with a velocity head. It notes which pass was asked for."""

    trunk: jax.Array
    table: jax.Array
    numbers: jax.Array
    heads: jax.Array
    asked: list = eqx.field(static=True, default_factory=list)
    has_velocity_head = True

    def __call__(self, z, r, t, condition=None, *, key=None):
        self.asked.append("u")
        return self.both(z, r, t, condition)[0]

    def velocity(self, z, t, condition=None, *, key=None):
        self.asked.append("v")
        return self.both(z, t, t, condition)[1]

    def with_velocity(self, z, r, t, condition=None, *, key=None):
        self.asked.append("both")
        return self.both(z, r, t, condition)

    def both(self, z, r, t, condition):
        label, *numbers = condition
        inputs = jnp.append(z, t - r) + self.table[label] + self.numbers @ jnp.stack(numbers)
        hidden = jnp.tanh(self.trunk @ inputs)
        return self.heads[0] @ hidden, self.heads[1] @ hidden


class Headless(mfx.AbstractField):
    """The same without its head."""

    field: Headed

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field.both(z, r, t, condition)[0]


def headed():
    rng = np.random.default_rng(0)
    shapes = (5, SIZE + 1), (LABELS + 1, SIZE + 1), (SIZE + 1, 3), (2, SIZE, 5)
    return Headed(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))


def batch(rows=ROWS):
    return mfx.Batch(jr.normal(jr.key(1), (rows, SIZE)), jnp.arange(rows) % LABELS)


KEY = jr.key(2)


@functools.cache
def drawn(guidance, rows=ROWS):
    """The rows that an objective with this guidance draws: those with r = t, then the others."""
    return [*_drawn(mfx.Objective(**PAPER | {"guidance": guidance}), rows)]


def _drawn(objective, rows):
    identity_rows, boundary_rows = mfx.split_rows(batch(rows), objective.identity_share)
    for boundary, examples in ((True, boundary_rows), (False, identity_rows)):
        draw = objective._drawing(boundary)
        yield jax.vmap(lambda example, draw=draw: draw(example, KEY, None))(examples)


# What is drawn


@pytest.mark.parametrize(
    ("scales", "cdf"),
    [
        (mfx.PowerLawScales(), lambda s: np.log(s) / np.log(8)),
        (mfx.PowerLawScales(0, 2, 4), lambda s: (s - 2) / 2),
        (mfx.PowerLawScales(2.5, largest=7.5), lambda s: (1 - s**-1.5) / (1 - 7.5**-1.5)),
    ],
)
def test_scales_have_a_density_that_is_a_power(scales, cdf):
    values = jax.vmap(lambda key: scales(key=key))(jr.split(jr.key(0), 4000))
    assert scales.smallest <= values.min() and values.max() <= scales.largest
    assert scipy.stats.kstest(np.asarray(values), cdf).pvalue > 0.01


def test_equal_bounds_are_a_constant_scale():
    assert mfx.PowerLawScales(2.0, 3.0, 3.0)(key=jr.key(0)) == 3


def test_intervals_are_uniform_in_two_halves_and_independent():
    draw = functools.partial(mfx.DrawnGuidance().condition, None, jnp.zeros(()), jnp.ones(()))
    _, scale, start, end = jax.vmap(lambda key: draw(key=key))(jr.split(jr.key(0), 1000))
    assert scipy.stats.kstest(np.asarray(start), scipy.stats.uniform(0, 0.5).cdf).pvalue > 0.01
    assert scipy.stats.kstest(np.asarray(end), scipy.stats.uniform(0.5, 0.5).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef([scale, start, end]) - np.eye(3)).max() < 0.1


def test_each_row_has_a_scale_of_its_own_and_an_interval_for_r_below_t_alone():
    boundary, others = (rows.condition for rows in drawn(mfx.DrawnGuidance()))
    assert len(np.unique([boundary.scale, others.scale])) == ROWS
    assert (boundary.start == 0).all() and (boundary.end == 1).all()
    assert len(np.unique([others.start, others.end])) == ROWS


def test_the_draws_change_neither_noise_nor_times_nor_dropout():
    for with_draws, without in zip(drawn(mfx.DrawnGuidance()), drawn(mfx.Guidance(2.0)), strict=True):
        for name in ("z", "r", "t", "dropped"):
            np.testing.assert_array_equal(getattr(with_draws, name), getattr(without, name))
        np.testing.assert_array_equal(with_draws.condition.condition, without.condition)


# What is learnt


def weighted(error):
    total = jnp.sum(error**2)
    return total / jax.lax.stop_gradient(total + 0.01)


def recipe(field, row, *, unconditional_scale, head=True):
    """The paper's loss of a row, with all passes on every row: three for guidance, and the JVP."""

    def both(z, r, t, condition):
        return field.both(z, r, t, condition) if head else (u := field.both(z, r, t, condition)[0], u)

    label, scale, start, end = row.condition
    scale = jnp.where((start <= row.t) & (row.t <= end), scale, 1.0)
    null = mfx.GuidanceCondition(LABELS, scale if unconditional_scale else 1.0, 0.0, 1.0)
    with_label = both(row.z, row.t, row.t, mfx.GuidanceCondition(label, scale, 0.0, 1.0))[1]
    without = both(row.z, row.t, row.t, null)[1]
    target = row.v + jnp.where(row.dropped, 0.0, 1 - 1 / scale) * (with_label - without)
    with_label, target = jax.lax.stop_gradient((with_label, target))
    tangent = (with_label, jnp.zeros(()), jnp.ones(()))
    (u, v), (dudt, _) = jax.jvp(lambda *at: both(*at, row.condition), (row.z, row.r, row.t), tangent)
    compound = u + (row.t - row.r) * jax.lax.stop_gradient(dudt)
    return weighted(compound - target) + (weighted(v - target) if head else 0)


@pytest.mark.parametrize("unconditional_scale", [False, True])
@pytest.mark.parametrize("head", [True, False])
def test_loss_and_gradient_are_those_of_the_recipe_written_out(head, unconditional_scale):
    guidance = mfx.DrawnGuidance(unconditional_scale=unconditional_scale)
    objective = mfx.Objective(mfx.ImprovedMeanFlow(), **PAPER | {"guidance": guidance})

    def ours(field):
        return objective(field if head else Headless(field), batch(), key=KEY)[0]

    def theirs(field):
        of_row = functools.partial(recipe, field, unconditional_scale=unconditional_scale, head=head)
        return jnp.mean(jnp.concatenate([jax.vmap(of_row)(rows) for rows in drawn(mfx.DrawnGuidance())]))

    (found, gradient), (expected, slopes) = (eqx.filter_value_and_grad(loss)(headed()) for loss in (ours, theirs))
    assert any(rows.dropped.any() for rows in drawn(mfx.DrawnGuidance()))
    of_identity = drawn(mfx.DrawnGuidance())[1]
    inside = (of_identity.condition.start <= of_identity.t) & (of_identity.t <= of_identity.condition.end)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


def asked(objective, rows):
    """The passes of a `Headed` that an objective asks for."""
    field = headed()
    eqx.filter_eval_shape(lambda rows: objective(field, rows, key=KEY), rows)
    return field.asked


def test_no_pass_is_made_twice_and_none_for_u_where_v_is_enough():
    # r = t: the loss's own pass, and without a label. r < t: with a label (tangent and guidance), without, u and v.
    assert asked(mfx.Objective(mfx.ImprovedMeanFlow(), **PAPER), batch()) == ["both", "v", "v", "v", "both"]


def test_a_given_guidance_takes_the_values_of_the_velocity_head():
    condition = mfx.GuidanceCondition(batch().condition, *(jnp.full(ROWS, number) for number in (2.0, 0.0, 1.0)))
    dropout = mfx.LabelDropout(0.1, mfx.GuidanceCondition(LABELS))
    objective = mfx.Objective(guidance=mfx.Guidance(1.0, 0.5), label_dropout=dropout, identity_share=0.5)
    assert asked(objective, mfx.Batch(batch().x, condition)) == ["both", "v", "v", "v", "u"]


@pytest.mark.parametrize(
    "identity",
    [
        mfx.MeanFlow(),
        mfx.LagrangianSelfDistillation(),
        *(pytest.param(identity, marks=pytest.mark.slow) for identity in (mfx.SplitMeanFlow(), None)),
    ],
)
def test_every_method_trains_the_head_on_rows_with_equal_times(identity):
    share = 0.5 if identity is not None else 0
    objective = mfx.Objective(identity, **PAPER | {"identity_share": share}, weight=mfx.ConstantWeight())

    def loss(field):
        return objective(field, batch(), key=KEY)

    gradient, metrics = eqx.filter_grad(loss, has_aux=True)(headed())
    assert metrics["velocity_error"].count == ROWS * (1 - share)
    assert all((leaf != 0).any() for leaf in gradient.heads)


# The fixed point


PATH = mfx.LinearInterpolant()


def mixture():
    mean = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    return exact.GaussianMixture(mean, np.array([0.3, 0.5, 0.2]), label=np.arange(LABELS))


def velocity(z, t, label):
    """Of the data with a label; of all data for the label that means none."""
    with_label, without = (mixture().velocity(PATH, z, t, c) for c in (jnp.minimum(label, LABELS - 1), None))
    return jnp.where(label == LABELS, without, with_label)


def guided(z, t, condition):
    """The velocity that guidance asks for: Eq. 13 at the scale which holds at t."""
    scale = condition.at(t, t).scale
    return scale * velocity(z, t, condition.condition) + (1 - scale) * velocity(z, t, LABELS)


class AtScale(mfx.AbstractField):
    """A field at `factor` times the scale."""

    field: mfx.AbstractField
    factor: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, r, t, condition._replace(scale=self.factor * condition.scale))


@eqx.filter_jit
def errors(objective, field, rows):
    metrics = objective(field, rows, key=KEY)[1]
    return [metrics[name].value for name in ("boundary_error", "identity_error") if name in metrics]


def labelled(rows):
    label = jnp.arange(rows) % LABELS
    x = jax.vmap(lambda key, label: mixture().sample(key=key, condition=label))(jr.split(jr.key(0), rows), label)
    return mfx.Batch(x, label)


@pytest.mark.parametrize("identity", [None, pytest.param(mfx.ImprovedMeanFlow(), marks=pytest.mark.slow)])
def test_exact_guided_field_is_the_fixed_point_at_every_scale(identity):
    """Over scales from 1 to 8; a scale that is wrong by 1% leaves an error at least 1000 times as large."""
    share, field = (0.5, exact.AverageVelocity(guided)) if identity else (0, Velocity())
    objective = mfx.Objective(
        identity,
        velocity=velocity,
        weight=mfx.ConstantWeight(),
        time_pairs=mfx.TimePairs(mfx.UniformTimes()),
        **PAPER | {"identity_share": share, "guidance": mfx.DrawnGuidance(middle=None)},
    )
    rows = labelled(128)
    right, wrong = (np.array(errors(objective, AtScale(field, jnp.asarray(by)), rows)) for by in (1.0, 1.01))
    assert (right < (1e-26, 1e-13)[: len(right)]).all()
    assert (np.sqrt(wrong) > 1000 * np.sqrt(right)).all() and (wrong > 1e-5).all()


class Velocity(mfx.AbstractFieldWithVelocity):
    """The exact guided velocity as a field with a velocity head: right at equal times alone."""

    has_velocity_head = True

    def __call__(self, z, r, t, condition=None, *, key=None):
        return guided(z, t, condition)

    def velocity(self, z, t, condition=None, *, key=None):
        return guided(z, t, condition)

    def with_velocity(self, z, r, t, condition=None, *, key=None):
        return guided(z, t, condition), guided(z, t, condition)


# Learning


def learnt(steps=3000):
    """An `MLP` after this many steps on the mixture, in float32."""
    objective = mfx.Objective(
        mfx.ImprovedMeanFlow(),
        velocity=velocity,
        weight=mfx.ConstantWeight(),
        time_pairs=mfx.TimePairs(mfx.UniformTimes(), at_data=0.1),
        **PAPER | {"guidance": mfx.DrawnGuidance(middle=None)},
    )
    step = mfx.TrainStep(
        objective, optax.adam(optax.cosine_decay_schedule(2e-3, steps)), [mfx.ExponentialAverage(0.995)]
    )
    field = mfx.MLP(2, condition_width=64, labels=LABELS, guidance=True, key=jr.key(0))
    state = mfx.init_state(field, step.optimizer, step.averages, key=jr.key(1))
    state, _ = mfx.scan_steps(step, state, exact.DrawLabelled(mixture(), 256), steps)
    return state.averages[0]


@pytest.mark.slow
def test_a_small_network_follows_the_exact_field_over_all_scales():
    """Relative errors of u(z, 0, 1), as measured: 0.016, 0.013, 0.016, 0.026."""
    with jax.enable_x64(False):
        field, truth = learnt(), exact.AverageVelocity(guided, rtol=1e-5, atol=1e-5)
        z, label = jr.normal(jr.key(9), (200, 2)), jnp.arange(200) % LABELS
        r, t = jnp.zeros(200), jnp.ones(200)
        for scale, bound in {1.0: 0.03, 2.0: 0.03, 4.0: 0.03, 8.0: 0.05}.items():
            condition = mfx.GuidanceCondition(label, *(jnp.full(200, number) for number in (scale, 0.0, 1.0)))
            assert metrics.relative_error(field, truth, z, r, t, condition).value < bound, scale


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_training_step_changes_every_parameter_of_the_papers_network(dtype):
    size = mfx.InContextDiTSize(3, 16, 2, 2, head_depth=1)
    options = {"labels": LABELS, "guidance": True, "velocity_head": True, "dtype": dtype}
    with jax.enable_x64(False):
        field = refilled(mfx.InContextDiT((1, 8, 8), size, **options, key=jr.key(0)))
        step = mfx.TrainStep(mfx.Objective(mfx.ImprovedMeanFlow(), **PAPER), optax.adam(1e-3), [], accumulation=2)
        state = mfx.init_state(field, step.optimizer, step.averages, key=jr.key(1))
        images = mfx.Batch(jr.normal(jr.key(2), (16, 1, 8, 8)), jnp.arange(16) % LABELS)
        state, found = step(state, images)
    changed = jax.tree.map(
        lambda old, new: (old != new).any(), *(eqx.filter(f, eqx.is_array) for f in (field, state.field))
    )
    assert all(jax.tree.leaves(changed))
    assert found["velocity_error"].count == 16 and np.isfinite(found["velocity_error"].value)


# Sampling


def test_with_guidance_is_the_field_at_this_scale_and_interval():
    field = Headless(headed())
    eps, label = jr.normal(KEY, (SIZE,)), jnp.asarray(1)
    expected = mfx.sample(field, eps, mfx.GuidanceCondition(label, 3.0, 0.2, 0.7), times=(1, 0.5, 0))
    found = mfx.sample(mfx.WithGuidance(field, 3.0, (0.2, 0.7)), eps, label, times=(1, 0.5, 0))
    np.testing.assert_array_equal(found, expected)


def test_no_gradient_reaches_scale_and_interval():
    def total(guided):
        return guided(jnp.ones(SIZE), 0.1, 0.5, jnp.asarray(1)).sum()

    found = eqx.filter_grad(total)(mfx.WithGuidance(Headless(headed()), 3.0, (0.2, 0.7)))
    assert (found.scale, *found.interval) == (0, 0, 0)
    assert jnp.abs(found.field.field.numbers).max() > 0


def test_a_sampler_is_compiled_once_for_all_scales_and_intervals():
    traced = []

    class Scale(mfx.AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            traced.append(condition)
            return z * condition.scale + condition.start

    for guidance in ((1.0,), (3.0,), (3.0, (0.2, 0.7))):
        mfx.Generator(mfx.WithGuidance(Scale(), *guidance), KEY, (SIZE,), labels=LABELS)(jnp.arange(2))
    assert len(traced) == 1


@pytest.mark.parametrize("sampler", [mfx.sample_euler, mfx.sample_heun])
def test_solvers_follow_the_velocity_that_is_guided_inside_the_interval_alone(sampler):
    class Scale(mfx.AbstractField):
        """u is the scale that it gets, or NaN if it gets an interval that it never learnt at equal times."""

        def __call__(self, z, r, t, condition=None, *, key=None):
            _, scale, start, end = condition
            return jnp.where((start == 0) & (end == 1), scale, jnp.nan) * jnp.ones_like(z)

    times, eps = mfx.uniform_times(64), jnp.zeros(1)
    by_condition = sampler(Scale(), eps, mfx.GuidanceCondition(0, 3.0, 0.25, 0.5), times=times)
    by_field = sampler(mfx.WithGuidance(Scale(), 3.0, (0.25, 0.5)), eps, jnp.asarray(0), times=times)
    np.testing.assert_allclose([by_condition, by_field], -(1 + 2 * 0.25), atol=2 * 2 / 64)


def test_generator_refuses_labels_that_a_network_with_guidance_lacks():
    field = eqx.filter_eval_shape(lambda: mfx.MLP(2, width=8, depth=1, labels=LABELS, guidance=True, key=KEY))
    mfx.Generator(mfx.WithGuidance(field, 2.0), KEY, (2,), labels=LABELS)
    with pytest.raises(ValueError, match=f"labels must lie in .*, got {LABELS + 2}"):
        mfx.Generator(mfx.WithGuidance(field, 2.0), KEY, (2,), labels=LABELS + 2)


# The interval


class AtOneTime(mfx.AbstractField):
    """NaN if it is asked at r = t for an interval that it never learns there."""

    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        known = (r < t) | ((condition.start == 0) & (condition.end == 1))
        return jnp.where(known, 1.0, jnp.nan) * self.weight * z


@pytest.mark.parametrize(
    "identity",
    [
        mfx.MeanFlow(),
        mfx.ImprovedMeanFlow(),
        mfx.LagrangianSelfDistillation(),
        mfx.EulerianSelfDistillation(),
        mfx.TerminalVelocityMatching(),
        mfx.AlphaFlow(0.5),
    ],
)
def test_a_method_asks_for_velocities_with_what_holds_at_one_time(identity):
    field = AtOneTime(jnp.asarray(0.7))
    context = mfx.Context(jnp.asarray(0), field)
    loss, _ = mfx.Objective(identity, **PAPER)(field, batch(), context=context, key=KEY)
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("r", "t", "expected"),
    [
        (0.1, 0.3, (3.0, 0.2, 0.7)),
        (0.3, 0.3, (3.0, 0.0, 1.0)),
        (0.2, 0.2, (3.0, 0.0, 1.0)),
        (0.7, 0.7, (3.0, 0.0, 1.0)),
        (0.1, 0.1, (1.0, 0.0, 1.0)),
        (0.8, 0.8, (1.0, 0.0, 1.0)),
    ],
)
def test_at_equal_times_the_condition_is_the_scale_that_holds_there(r, t, expected):
    assert mfx.GuidanceCondition(1, 3.0, 0.2, 0.7).at(r, t)[1:] == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mfx.PowerLawScales(smallest=0.5), "smallest and largest must satisfy 1 <= smallest .* got 0.5 and 8"),
        (lambda: mfx.PowerLawScales(smallest=9), "got 9.0 and 8.0"),
        (lambda: mfx.PowerLawScales(float("nan")), "power must be finite"),
        (lambda: mfx.PowerLawScales(largest=float("inf")), "largest must be finite"),
        (lambda: mfx.PowerLawScales(-60.0), r"power must satisfy .* <= 80, got -60.0"),
        (lambda: mfx.DrawnGuidance(middle=1.5), r"middle must lie in \[0, 1\] or be None, got 1.5"),
        (lambda: mfx.WithGuidance(Velocity(), 0.0), "scale must be > 0 and finite, got 0.0"),
        (lambda: mfx.WithGuidance(Velocity(), 2.0, (0.8, 0.3)), r"interval must satisfy .* got \(0.8, 0.3\)"),
        (lambda: mfx.GuidanceCondition(1, -1.0).at(0.1, 0.2), "scale must be > 0 and finite, got -1.0"),
        (lambda: mfx.Objective(guidance=mfx.DrawnGuidance()), "label_dropout must be given with guidance"),
        (
            lambda: mfx.Objective(mfx.ConsistencyTraining(0.1), **PAPER),
            "guidance must be None for ConsistencyTraining",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
