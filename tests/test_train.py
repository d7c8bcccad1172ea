import functools
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled, refilled
from methods import guidance, METHODS

import mf_eqx as mfx
from mf_eqx._train import _DRAW

ROWS, DIM = 8, 3
SLOW = pytest.mark.slow
OPTIMIZER = optax.adam(1e-2)
AVERAGES = (mfx.ExponentialAverage(0.9), mfx.ExponentialAverage(0.5, interval=2))


class Affine(mfx.AbstractField):
    """The smallest field that depends on everything."""

    weight: jax.Array
    rates: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight @ z + self.rates[0] * r + self.rates[1] * t


class Probe(mfx.AbstractMeanObjective):
    """Mean squared output on the data themselves; reports what it was given, and counts how often it is traced."""

    traces: list = eqx.field(static=True, default_factory=list)

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other

    def __call__(self, field, batch, *, key, context=None):
        self.traces.append(None)
        time = jnp.ones(())
        losses = jax.vmap(lambda x: jnp.sum(field(x, time, time) ** 2))(batch.x)
        loss = jnp.mean(losses)
        seen = {"loss": loss, "draw": jr.uniform(key), "step": context.step.astype(float)}
        seen["x"] = batch.x
        seen["teacher"] = jnp.zeros(()) if context.teacher is None else context.teacher.weight
        return loss, {name: mfx.Mean(value, jnp.ones_like(value)) for name, value in seen.items()}


def drawn(*shape, seed=0):
    """Standard normal numbers, for which nothing is compiled."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def field():
    return Affine(jnp.asarray(drawn(DIM, DIM)), jnp.array([0.5, -1.0]))


def state(averages=AVERAGES, *, seed=1):
    return mfx.init_state(field(), OPTIMIZER, averages, key=jr.key(seed))


def batch(seed=2):
    return mfx.Batch(jnp.asarray(drawn(ROWS, DIM, seed=seed)))


def leaves(tree):
    return [np.asarray(jr.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in arrays(tree)]


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


# What a step does


def test_step_follows_the_optimizer_along_the_gradient():
    step = mfx.TrainStep(Probe(), OPTIMIZER)
    expected, opt_state = field(), OPTIMIZER.init(field())
    current = state(())

    @jax.jit
    def follow(expected, opt_state, rows):
        gradient = jax.grad(lambda field: Probe()(field, rows, key=jr.key(0), context=CONTEXT)[0])(expected)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, expected)
        return optax.apply_updates(expected, updates), opt_state, gradient

    for seed in range(3):
        expected, opt_state, gradient = follow(expected, opt_state, batch(seed))
        current, metrics = step(current, batch(seed))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves(gradient)))
        np.testing.assert_allclose(metrics["gradient_norm"].value, norm, rtol=1e-5)
    for result, leaf in zip(leaves(current.field), leaves(expected), strict=True):
        np.testing.assert_allclose(result, leaf, rtol=1e-5)
    assert current.step == 3


class Loop(mfx.AbstractField):
    """A field of blocks in a loop."""

    blocks: mfx.nn.Stack

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.blocks(lambda block, x: x + jnp.tanh(block(x) + r - t), z)


def in_a_loop(seed=0):
    return filled(lambda: Loop(mfx.nn.Stack(lambda key: mfx.nn.Linear(DIM, DIM, key=key), 3, key=jr.key(0))), seed)


CONTEXT = mfx.Context(jnp.zeros((), jnp.int32))
KINDS = [pytest.param(0.25, field, marks=SLOW), (0.25, in_a_loop), pytest.param(0.75, field, marks=SLOW), (1, field)]


@functools.cache
def one_step(share, make, accumulation):
    """Start, objective and rows of a step of size 1 along the gradient, and the field and the metrics after it."""
    objective, sgd = mfx.Objective(identity_share=share), optax.sgd(1.0)
    start = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, float)) if eqx.is_array(leaf) else leaf, make())
    rows = mfx.Batch(jnp.asarray(drawn(2 * ROWS, DIM, seed=2).astype(float)))
    step = mfx.TrainStep(objective, sgd, accumulation=accumulation)
    after, metrics = step(mfx.init_state(start, sgd, key=jr.key(1)), rows)
    return start, objective, rows, after.field, metrics


def assert_same_metrics(found, expected):
    for name, mean in expected.items():
        np.testing.assert_allclose(found[name].total, mean.total, rtol=1e-12)
        np.testing.assert_array_equal(found[name].count, mean.count)


@pytest.mark.parametrize(("share", "make"), KINDS)
def test_kinds_of_rows_one_after_the_other_give_the_gradient_and_metrics_of_all_together(x64, share, make):
    start, objective, rows, after, found = one_step(share, make, 1)
    key = jr.split(jr.fold_in(jr.key(1), 0))[1]
    value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(objective, has_aux=True))
    (_, metrics), gradient = value_and_grad(start, rows, key=key, context=CONTEXT)
    for result, before, slope in zip(*map(leaves, (after, start, gradient)), strict=True):
        np.testing.assert_allclose(before - result, slope, rtol=1e-12, atol=1e-12)
    assert_same_metrics(found, metrics)


@pytest.mark.parametrize(("share", "make"), [(0.25, in_a_loop), (1, field)])
def test_rows_in_turn_have_the_gradient_and_metrics_of_all_together(x64, share, make):
    (start, *_, whole, together), (*_, found, in_turn) = (one_step(share, make, parts) for parts in (1, 4))
    for after, expected, before in zip(*map(leaves, (found, whole, start)), strict=True):
        np.testing.assert_allclose(before - after, before - expected, rtol=1e-12, atol=1e-12)
    assert in_turn.keys() == together.keys()
    assert_same_metrics(in_turn, together)


def test_steps_of_several_networks_are_one_step_under_vmap():
    step = mfx.TrainStep(mfx.Objective(), OPTIMIZER)
    networks = [in_a_loop(seed) for seed in range(2)]

    def loss(network):
        return step(mfx.init_state(network, OPTIMIZER, key=jr.key(1)), batch())[1]["loss"].total

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *networks)
    np.testing.assert_allclose(eqx.filter_vmap(loss)(stacked), [loss(network) for network in networks], rtol=1e-5)


def test_step_does_not_choose_between_kinds_of_rows_while_it_runs():
    # What it chooses while it runs is whether the state is updated. A choice in a loop keeps a GPU's host busy.
    program = jax.jit(mfx.TrainStep(mfx.Objective(), OPTIMIZER, AVERAGES)).lower(state(), batch()).as_text()
    assert program.count("stablehlo.case") == 1
    assert program.count("optimization_barrier") == 1


def trained(accumulation, rows=256, steps=20):
    """Field, average and the last step's metrics after training on a noisy circle in float32, by SGD: Adam would hide a
    wrong scale of the gradients."""
    sgd, averages = optax.sgd(0.1), AVERAGES[:1]
    start = refilled(mfx.MLP(2, width=32, depth=2, key=jr.key(0)))
    step = jax.jit(mfx.TrainStep(mfx.Objective(), sgd, averages, accumulation=accumulation))
    current, draws = mfx.init_state(start, sgd, averages, key=jr.key(1)), np.random.default_rng(2)
    for _ in range(steps):
        angle = draws.uniform(0, 2 * np.pi, rows)
        x = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.1 * draws.standard_normal((rows, 2))
        current, metrics = step(current, mfx.Batch(x.astype(np.float32)))
    values = {name: mean.value for name, mean in metrics.items()}
    return leaves(start), leaves((current.field, current.averages)), jax.tree.map(np.asarray, values)


@SLOW
def test_four_times_64_rows_train_as_256_rows_do():
    (start, whole, metrics), (_, found, in_turn) = trained(1), trained(4)
    for result, expected in zip(found, whole, strict=True):
        assert np.abs(result - expected).max() <= 1e-6 * np.abs(expected).max()
    # Twenty steps of any size but theirs would be seen: every array moved by far more than that.
    for before, expected in zip(start, whole[: len(start)], strict=True):
        assert np.abs(expected - before).max() > 1e-3 * np.abs(expected).max()
    for name, expected in metrics.items():
        np.testing.assert_allclose(in_turn[name], expected, rtol=1e-6)


def test_micro_batches_of_parameters_in_low_precision_are_summed_in_float32():
    """Of 512 equal gradients, whose sum in bfloat16 would stop growing at half of them."""
    rows = mfx.Batch(jnp.ones((512, DIM)))

    def norm(dtype):
        sgd, start = optax.sgd(0.1), mfx.nn.cast(field(), dtype)
        step = mfx.TrainStep(Probe(), sgd, accumulation=512)
        after, metrics = step(mfx.init_state(start, sgd, key=jr.key(1)), rows)
        assert after.field.weight.dtype == dtype
        return float(metrics["gradient_norm"].value)

    np.testing.assert_allclose(norm(jnp.bfloat16), norm(jnp.float32), rtol=0.005)


class Pair(mfx.AbstractField):
    """A complex parameter, as one array or as its two parts."""

    weight: jax.Array | tuple[jax.Array, jax.Array]

    def __call__(self, z, r, t, condition=None, *, key=None):
        real, imaginary = self.weight if isinstance(self.weight, tuple) else (self.weight.real, self.weight.imag)
        return real * z - imaginary * jnp.tanh(z)


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [
        (mfx.Objective(), optax.sgd(0.1)),
        (Probe(), optax.contrib.split_real_and_imaginary(optax.adam(0.1))),
    ],
)
def test_complex_parameters_are_trained_as_their_two_parts_are(objective, optimizer):
    parts = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.7, 0.5, 0.0])
    step = mfx.TrainStep(objective, optimizer)
    found, expected = (
        mfx.init_state(Pair(weight), optimizer, key=jr.key(1)) for weight in (jax.lax.complex(*parts), parts)
    )
    for seed in range(3):
        found, expected = step(found, batch(seed))[0], step(expected, batch(seed))[0]
    np.testing.assert_allclose(found.field.weight, jax.lax.complex(*expected.field.weight), rtol=1e-5)


def test_averages_follow_the_parameters():
    step = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES)
    current = state()
    fast, slow = (np.asarray(average.weight) for average in current.averages)
    for number in (1, 2, 3, 4):
        current, _ = step(current, batch(number))
        fast = 0.9 * fast + 0.1 * np.asarray(current.field.weight)
        if number % 2 == 0:
            slow = 0.25 * slow + 0.75 * np.asarray(current.field.weight)
        np.testing.assert_allclose(current.averages[0].weight, fast, rtol=1e-5)
        np.testing.assert_allclose(current.averages[1].weight, slow, rtol=1e-5)


@pytest.mark.parametrize("number", range(len(AVERAGES)))
def test_objective_is_given_the_step_and_the_average_that_teaches(number):
    step = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES, teacher=number)
    current, teacher = state(), np.asarray(field().weight)
    for finished in range(3):
        current, metrics = step(current, batch())
        assert metrics["step"].value == finished
        np.testing.assert_array_equal(metrics["teacher"].value, teacher)
        teacher = np.asarray(current.averages[number].weight)


def test_a_frozen_teacher_stays_as_it_is_and_is_no_part_of_the_state():
    teacher = Affine(jnp.full((DIM, DIM), 3.0), jnp.zeros(2))
    step = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES, teacher=teacher)
    current = state()
    size = len(arrays(current))
    for _ in range(2):
        current, metrics = step(current, batch())
        np.testing.assert_array_equal(metrics["teacher"].value, teacher.weight)
    assert len(arrays(current)) == size


def test_there_is_no_teacher_unless_one_is_given():
    _, metrics = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES)(state(), batch())
    assert metrics["teacher"].value == 0


def test_an_objective_with_a_state_must_take_the_whole_batch():
    class Counting(Probe):
        def init(self):
            return jnp.zeros(())

    with pytest.raises(ValueError, match="objective must have divisor None if it has a state"):
        mfx.TrainStep(Counting(), OPTIMIZER)


@pytest.mark.parametrize("number", [-1, len(AVERAGES)])
def test_a_teacher_that_is_none_of_the_averages_is_refused(number):
    with pytest.raises(ValueError, match=f"teacher must be the number of one of {len(AVERAGES)} averages"):
        mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES, teacher=number)


@pytest.mark.usefixtures("unchecked")
def test_an_objective_that_learns_one_kind_of_field_is_given_that_kind_and_a_field():
    class Odd(mfx.AbstractField):
        weight: jax.Array

        def __call__(self, z):
            return self.weight * z

    class OfOdd(Probe):
        learns = Odd

    with pytest.raises(ValueError, match="field must be an instance of Odd, got Affine"):
        mfx.init_state(field(), OPTIMIZER, objective=OfOdd(), key=jr.key(1))
    with pytest.raises(
        ValueError, match=r"field must be callable as field\(z, r, t, condition, key=key\), got Odd, which"
    ):
        mfx.init_state(Odd(jnp.ones(())), OPTIMIZER, objective=OfOdd(), key=jr.key(1))


def test_a_method_that_wants_a_teacher_is_refused_without_one():
    objective = mfx.Objective(mfx.TerminalVelocityMatching())
    with pytest.raises(ValueError, match="teacher must be one of the averages or a frozen field"):
        mfx.TrainStep(objective, OPTIMIZER, AVERAGES)
    mfx.TrainStep(objective, OPTIMIZER, AVERAGES, teacher=1)


def test_steps_reduce_the_raw_error_of_an_objective():
    objective = mfx.Objective(weight=mfx.ConstantWeight())
    step, current, errors = mfx.TrainStep(objective, OPTIMIZER), state(()), []
    for _ in range(200):
        current, metrics = step(current, mfx.Batch(jnp.zeros((ROWS, DIM))))
        errors.append(float(metrics["boundary_error"].value))
    assert np.mean(errors[-50:]) < 0.5 * np.mean(errors[:50])


# One trace, donated memory


def test_step_is_traced_once():
    objective = Probe()
    step, current = mfx.TrainStep(objective, OPTIMIZER, AVERAGES), state()
    for seed in range(4):
        current, _ = step(current, batch(seed))
    assert len(objective.traces) == 1


def test_equal_step_built_again_is_not_traced_again():
    objective = Probe()
    current, _ = mfx.TrainStep(objective, OPTIMIZER, AVERAGES)(state(), batch())
    mfx.TrainStep(objective, OPTIMIZER, (mfx.ExponentialAverage(0.9), AVERAGES[1]))(current, batch())
    assert len(objective.traces) == 1


def test_every_buffer_of_the_old_state_is_donated():
    old = state()
    mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES)(old, batch())
    assert all(leaf.is_deleted() for leaf in arrays(old))


def test_old_state_raises_when_used_again():
    step, old = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES), state()
    step(old, batch())
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(old, batch())


def test_batch_is_not_donated():
    rows = batch()
    rows = mfx.Batch(rows.x, jnp.arange(ROWS), jnp.arange(ROWS))
    mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES)(state(), rows)
    assert not any(leaf.is_deleted() for leaf in arrays(rows))
    assert bool(jnp.isfinite(rows.x).all())


def test_numbers_inside_the_step_are_not_donated():
    class Scaled(mfx.AbstractMeanObjective):
        scale: jax.Array

        def __call__(self, field, batch, *, key, context=None):
            loss = self.scale * jnp.mean(field.weight**2)
            return loss, {"loss": mfx.Mean(loss, jnp.ones(()))}

    step, current = mfx.TrainStep(Scaled(jnp.asarray(2.0)), OPTIMIZER, AVERAGES), state()
    for _ in range(2):
        current, _ = step(current, batch())
    assert not step.objective.scale.is_deleted()


# Randomness


def test_same_state_and_batch_give_bitwise_the_same_result():
    objective = mfx.Objective()
    step = mfx.TrainStep(objective, OPTIMIZER, AVERAGES)
    runs = [step(state(), batch()) for _ in range(2)]
    for first, again in zip(*map(leaves, runs), strict=True):
        np.testing.assert_array_equal(first, again)


def test_restored_state_continues_as_if_nothing_had_happened():
    step, current = mfx.TrainStep(mfx.Objective(), OPTIMIZER, AVERAGES), state()
    for number in range(4):
        if number == 2:
            saved = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True) if eqx.is_array(leaf) else leaf, current)
        current, _ = step(current, batch(number))
    for number in (2, 3):
        saved, _ = step(saved, batch(number))
    for result, expected in zip(leaves(saved), leaves(current), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_randomness_of_a_step_comes_from_the_run_and_the_number_of_the_step():
    def draws(seed, steps):
        step, current, found = mfx.TrainStep(Probe(), OPTIMIZER), state((), seed=seed), []
        for _ in range(steps):
            current, metrics = step(current, batch())
            found.append(float(metrics["draw"].value))
        return found

    first = draws(1, 3)
    assert len({*first, *draws(2, 3)}) == 6
    later = eqx.tree_at(lambda s: s.step, state((), seed=1), jnp.asarray(2, jnp.int32))
    _, metrics = mfx.TrainStep(Probe(), OPTIMIZER)(later, batch())
    assert metrics["draw"].value == first[2]


def test_key_of_the_run_is_never_changed():
    current, _ = mfx.TrainStep(Probe(), OPTIMIZER)(state((), seed=5), batch())
    assert current.key == jr.key(5)


# Faults


class Cliff(mfx.AbstractMeanObjective):
    """sqrt(mean of the data) in value, but its gradient is 1 / (2 sqrt): finite and infinite at zero."""

    def __call__(self, field, batch, *, key, context=None):
        nothing = jnp.sum(field.rates - jax.lax.stop_gradient(field.rates))
        loss = jnp.sqrt(jnp.mean(batch.x) + nothing)
        return loss, {"loss": mfx.Mean(loss, jnp.ones(()))}


def good():
    return mfx.Batch(jnp.ones((ROWS, DIM)))


def nan_row(row=5):
    return mfx.Batch(jnp.ones((ROWS, DIM)).at[row, 1].set(jnp.nan))


def zeros():
    return mfx.Batch(jnp.zeros((ROWS, DIM)))


def learnt(current):
    """Bits of everything that a bad step must leave alone, on the host."""
    return [leaf.tobytes() for leaf in leaves((current.field, current.opt_state, current.averages))]


def counters(current):
    return [int(current.faults.total), int(current.faults.in_row), int(current.faults.last), int(current.step)]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("objective", "bad"), [(Probe, nan_row), (Cliff, zeros)])
def test_bad_step_changes_no_bit_of_field_optimizer_and_averages(objective, bad, accumulation):
    step = mfx.TrainStep(objective(), OPTIMIZER, AVERAGES, accumulation=accumulation)
    current, _ = step(state(), good())
    before = learnt(current)
    current, metrics = step(current, bad())
    assert not np.isfinite(metrics["gradient_norm"].value)
    assert learnt(current) == before
    assert learnt(step(current, good())[0]) != before


def test_loss_at_the_cliff_is_finite_and_its_gradient_is_not():
    _, metrics = mfx.TrainStep(Cliff(), OPTIMIZER)(state(()), zeros())
    assert metrics["loss"].value == 0 and metrics["gradient_norm"].value == np.inf


def test_loss_that_is_not_finite_is_a_fault_even_if_its_gradient_is():
    class Lost(mfx.AbstractMeanObjective):
        def __call__(self, field, batch, *, key, context=None):
            loss = jnp.sum(field.weight**2) + jnp.sum(batch.x)
            return loss, {"loss": mfx.Mean(loss, jnp.ones(()))}

    current = state()
    before = learnt(current)
    current, metrics = mfx.TrainStep(Lost(), OPTIMIZER, AVERAGES)(current, nan_row())
    assert np.isfinite(metrics["gradient_norm"].value)
    assert learnt(current) == before and counters(current) == [1, 1, 1, 1]


def test_update_that_is_not_finite_is_a_fault_even_if_its_gradient_is():
    overflowing = optax.chain(optax.scale(-1e38), optax.scale(1e3))
    current = mfx.init_state(field(), overflowing, key=jr.key(1))
    before = learnt(current)
    current, metrics = mfx.TrainStep(Probe(), overflowing)(current, good())
    assert np.isfinite(metrics["gradient_norm"].value)
    assert learnt(current) == before and current.faults.total == 1


def test_parameters_keep_their_precision():
    optimizer = optax.adam(0.1, mu_dtype=jnp.float32)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf, field())
    after, _ = mfx.TrainStep(Probe(), optimizer)(mfx.init_state(low, optimizer, key=jr.key(1)), good())
    assert {str(leaf.dtype) for leaf in arrays(after.field)} == {"bfloat16"}
    assert after.faults.total == 0


def test_optimizer_that_changes_its_state_is_refused_by_name():
    changing = optax.GradientTransformation(
        lambda parameters: {"count": jnp.zeros((), jnp.int32)},
        lambda updates, state, parameters=None: (updates, {"count": state["count"] + 1.0}),
    )
    with pytest.raises(ValueError, match=r"optimizer must keep structure, .* but it changes .*count"):
        mfx.TrainStep(Probe(), changing)(mfx.init_state(field(), changing, key=jr.key(1)), good())


class Returning(mfx.AbstractMeanObjective):
    """Returns what a function makes of the errors of the rows."""

    result: Callable = eqx.field(static=True)

    def __call__(self, field, batch, *, key, context=None):
        return self.result(jnp.sum(jax.vmap(lambda x: field(x, 0.0, 1.0))(batch.x) ** 2, axis=1))


def mean(errors):
    return {"loss": mfx.Mean(jnp.sum(errors), jnp.asarray(float(ROWS)))}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda e: (e, mean(e)),
            "the loss of Returning must be a real floating-point scalar, got float32",
        ),
        (lambda e: (jnp.mean(e).astype(int), mean(e)), "the loss of Returning .* scalar, got int32 of shape"),
        (lambda e: (jnp.mean(e) * 1j, mean(e)), "the loss of Returning .* scalar, got complex64 of shape"),
        (lambda e: jnp.mean(e), r"Returning must return a loss and metrics, got float32 of shape \(\)"),
        (lambda e: None, "Returning must return a loss and metrics, got None"),
        (lambda e: (jnp.mean(e), {}), "the metrics of Returning must have the loss as a Mean of one total, got {}"),
        (lambda e: (jnp.mean(e), {"loss": jnp.mean(e)}), "the metrics of Returning must be a dictionary of Mean, got"),
        (
            lambda e: (jnp.mean(e), mean(e) | {"x": jnp.mean(e)}),
            "the metrics of Returning must be a dictionary of Mean",
        ),
        (lambda e: (jnp.mean(e), {"loss": mfx.Mean(e, jnp.ones(ROWS))}), "must have the loss as a Mean of one total"),
    ],
    ids=["loss of each row", "integer", "complex", "loss alone", "nothing", "no loss", "no mean", "another", "several"],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_own_objective_that_returns_no_loss_and_metrics_is_refused(result, message, accumulation):
    """The gradient of a loss for each row would be that of their sum, and of an integer zero."""
    with pytest.raises(ValueError, match=message):
        mfx.TrainStep(Returning(result), OPTIMIZER, AVERAGES, accumulation=accumulation)(state(), batch())


class Stateful(mfx.AbstractObjective):
    """Whose state becomes another one at the first step."""

    after: Any = None
    divisor = None
    needs_teacher = False

    def parts(self, batch):
        return [(self, batch)]

    def init(self):
        return jnp.zeros(())

    def evaluate(self, field, batch, state, *, key, context=None):
        errors = jnp.sum(jax.vmap(lambda x: field(x, 0.0, 1.0))(batch.x) ** 2, axis=1)
        return jnp.mean(errors), (mean(errors), self.after)


@pytest.mark.parametrize("after", [None, jnp.zeros(2), jnp.zeros((), int), 1.0], ids=str)
def test_objective_that_changes_the_kind_of_its_state_is_named(after):
    objective = Stateful(after)
    before = mfx.init_state(field(), OPTIMIZER, key=jr.key(0), objective=objective)
    with pytest.raises(ValueError, match=r"objective must keep structure, .* but it changes state\.objective"):
        mfx.TrainStep(objective, OPTIMIZER)(before, batch())


def test_faults_are_counted_in_all_and_in_a_row_and_the_last_is_named():
    step, current, seen = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES), state(), []
    for rows in (good(), nan_row(), nan_row(0), good(), nan_row(), good()):
        current, _ = step(current, rows)
        seen.append(counters(current))
    assert seen == [[0, 0, 0, 1], [1, 1, 2, 2], [2, 2, 3, 3], [2, 0, 3, 4], [3, 1, 5, 5], [3, 0, 5, 6]]


def test_step_after_a_bad_one_is_the_step_of_its_number_from_the_state_before():
    step = mfx.TrainStep(Probe(), OPTIMIZER)
    current, bad = step(state(()), nan_row())
    after, found = step(current, good())
    late = eqx.tree_at(lambda s: s.step, state(()), jnp.asarray(1, jnp.int32))
    expected_after, expected = step(late, good())
    assert found["draw"].value == expected["draw"].value != bad["draw"].value
    assert learnt(after) == learnt(expected_after)


# What a state is made of


def pointers(tree):
    keys = [jr.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in arrays(tree)]
    return [leaf.unsafe_buffer_pointer() for leaf in keys]


def twice(parameters):
    """Whatever a state may share: the parameters, one array in two places, NumPy's arrays."""
    one, host = jnp.zeros(3), np.ones(3, np.float32)
    return {"first": parameters, "second": parameters, "one": (one, one), "host": (host, host)}


SHARING = optax.GradientTransformation(
    twice, lambda updates, state, parameters=None: (jax.tree.map(lambda g: -0.1 * g, updates), state)
)


@pytest.mark.parametrize("make", [lambda f: f(), lambda f: eqx.filter_jit(f)(), mfx.Parallelism().make])
def test_no_two_arrays_of_a_state_share_memory(make):
    shared = field()
    current = make(eqx.Partial(mfx.init_state, shared, SHARING, AVERAGES, key=jr.key(1)))
    found = pointers((current, shared))
    assert len(set(found)) == len(found)
    for _ in range(2):
        current, _ = mfx.TrainStep(Probe(), SHARING, AVERAGES)(current, batch())
    assert current.step == 2


def test_scanned_steps_take_optimisers_that_hold_the_parameters():
    current, _ = mfx.scan_steps(
        mfx.TrainStep(Probe(), SHARING), mfx.init_state(field(), SHARING, key=jr.key(1)), Draw(), 2
    )
    assert current.step == 2


class Tied(mfx.AbstractField):
    """Two layers, of one weight if they are tied."""

    layers: tuple | eqx.nn.Shared

    def __call__(self, z, r, t, condition=None, *, key=None):
        first, second = self.layers() if isinstance(self.layers, eqx.nn.Shared) else self.layers
        return second(jnp.tanh(first(z)))


def layers(seeds):
    return tuple(eqx.nn.Linear(DIM, DIM, use_bias=False, key=jr.key(seed)) for seed in seeds)


def test_field_without_a_parameter_is_refused():
    class OfFunction(mfx.AbstractField):
        function: object

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.function(z)

    weight = field().weight
    with pytest.raises(ValueError, match=r"field must hold a parameter, .* got .*OfFunction\("):
        mfx.init_state(OfFunction(lambda z: weight @ z), OPTIMIZER, key=jr.key(1))


def test_parameter_in_two_places_is_refused_by_name():
    def make():
        first, second = layers((0, 1))
        tied = Tied((first, eqx.tree_at(lambda layer: layer.weight, second, first.weight)))
        return mfx.init_state(tied, OPTIMIZER, key=jr.key(1))

    rule = r"field must hold each parameter once, got the same array at .layers\[0\].weight and .layers\[1\].weight"
    for call in (lambda: make(), eqx.filter_jit(make), lambda: eqx.filter_eval_shape(make)):
        with pytest.raises(ValueError, match=rule):
            call()


def test_parameter_tied_by_equinox_stays_tied():
    tied = Tied(eqx.nn.Shared(layers((0, 1)), lambda pair: pair[1].weight, lambda pair: pair[0].weight))
    step = mfx.TrainStep(mfx.Objective(identity=None, identity_share=0), OPTIMIZER)
    current, _ = step(mfx.init_state(tied, OPTIMIZER, key=jr.key(1)), batch())
    first, second = current.field.layers()
    np.testing.assert_array_equal(first.weight, second.weight)
    assert np.abs(first.weight - layers((0,))[0].weight).max() > 0


def test_nothing_of_a_state_is_weakly_typed():
    weak = Affine(jax.lax.broadcast(jnp.asarray(0.5), (DIM, DIM)), field().rates)
    assert weak.weight.weak_type
    optimizer = optax.GradientTransformation(lambda parameters: (jnp.asarray(1.0), 2.0), OPTIMIZER.update)
    current = mfx.init_state(weak, optimizer, AVERAGES, key=jr.key(1))
    assert not [leaf for leaf in arrays(current) if getattr(leaf, "weak_type", False)]


# Strict promotion


@pytest.fixture
def strict():
    """No implicit promotion of dtypes for one test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


STRICT = {
    "Flow Matching": mfx.Objective(identity=None, identity_share=0),
    **{
        name: mfx.Objective(identity, identity_share=0.5, **guidance(identity, 4)) for name, identity in METHODS.items()
    },
    "StoppedJVP": mfx.Objective(mfx.MeanFlow(derivative=mfx.StoppedJVP())),
    "CentralDifference": mfx.Objective(mfx.MeanFlow(derivative=mfx.CentralDifference())),
    "other parts": mfx.Objective(
        time_pairs=mfx.TimePairs(mfx.UniformTimes()),
        boundary_times=mfx.LogitNormalTimes(),
        interpolant=mfx.TrigonometricInterpolant(),
        weight=mfx.ConstantWeight(),
    ),
}


def labelled(shape=(2,)):
    return mfx.Batch(jr.normal(jr.key(2), (ROWS, *shape)), jnp.arange(ROWS, dtype=jnp.int32) % 4)


def small():
    return mfx.MLP(2, width=8, depth=2, labels=4, key=jr.key(0))


@functools.cache
def smallest():
    """The shapes of a state of two parameters: a network is in the tests of a step in parts and in low precision."""
    return start_of(lambda: Affine(jnp.ones((2, 2)), jnp.ones(2)))


def start_of(make_field):
    """The shapes of a state."""
    return eqx.filter_eval_shape(lambda: mfx.init_state(make_field(), OPTIMIZER, AVERAGES, key=jr.key(1)))


def trace(objective, start, rows, **how):
    """A step as far as dtypes go, which are known without a number."""
    eqx.filter_eval_shape(mfx.TrainStep(objective, OPTIMIZER, AVERAGES, teacher=0, **how), start, rows)


@pytest.mark.parametrize("name", STRICT)
def test_step_of_every_identity_passes_strict_promotion(strict, name):
    trace(STRICT[name], smallest(), labelled())


@pytest.mark.parametrize("how", [{"accumulation": 2}, {"parallelism": mfx.Parallelism()}])
def test_step_in_parts_passes_strict_promotion(strict, how):
    trace(STRICT["MeanFlow"], start_of(small), labelled(), **how)


def test_bad_step_passes_strict_promotion_and_is_counted(strict):
    current, _ = mfx.TrainStep(Probe(), OPTIMIZER)(state(()), nan_row())
    assert counters(current) == [1, 1, 1, 1]


def test_scanned_steps_pass_strict_promotion(strict):
    current, _ = mfx.scan_steps(mfx.TrainStep(mfx.Objective(), OPTIMIZER, AVERAGES), state(), Draw(), 2)
    assert current.faults.total == 0


NETWORKS = {
    "InContextDiT": lambda dtype: mfx.InContextDiT(
        (1, 4, 4), mfx.InContextDiTSize(3, 16, 2, 2, 1), labels=4, dtype=dtype, key=jr.key(0)
    ),
    "DiT": lambda dtype: mfx.DiT((1, 4, 4), mfx.DiTSize(2, 16, 2, 2), labels=4, dtype=dtype, key=jr.key(0)),
    "U-Net": lambda dtype: mfx.UNet((1, 4, 4), mfx.UNetSize(8, (1, 2), 1, (2,)), labels=4, dtype=dtype, key=jr.key(0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_step_of_networks_passes_strict_promotion_in_every_precision(strict, name, dtype):
    trace(STRICT["MeanFlow"], start_of(lambda: NETWORKS[name](dtype)), labelled((1, 4, 4)))


def test_step_of_an_mlp_in_low_precision_passes_strict_promotion(strict):
    def make_field():
        return mfx.MLP(2, width=8, depth=2, labels=4, dtype=jnp.bfloat16, key=jr.key(0))

    trace(STRICT["MeanFlow"], start_of(make_field), labelled())


def test_parameters_of_low_precision_pass_strict_promotion(strict):
    optimizer = optax.adamw(0.1, mu_dtype=jnp.float32)
    low = mfx.nn.cast(field(), jnp.bfloat16)
    rows = mfx.Batch(jnp.ones((ROWS, DIM), jnp.bfloat16))

    class Low(mfx.AbstractMeanObjective):
        def __call__(self, field, batch, *, key, context=None):
            loss = jnp.mean(jax.vmap(lambda x: jnp.sum((field.weight @ x) ** 2))(batch.x)).astype(jnp.float32)
            return loss, {"loss": mfx.Mean(loss, jnp.ones(()))}

    current, _ = mfx.TrainStep(Low(), optimizer, AVERAGES)(
        mfx.init_state(low, optimizer, AVERAGES, key=jr.key(1)), rows
    )
    assert current.faults.total == 0 and current.averages[0].weight.dtype == jnp.float32


# Preparation of rows


def test_prepare_is_applied_to_each_row():
    def prepare(row, key):
        return eqx.tree_at(lambda row: row.x, row, row.x / 255)

    raw = mfx.Batch(np.arange(ROWS * DIM, dtype=np.uint8).reshape(ROWS, DIM))
    _, metrics = mfx.TrainStep(Probe(), OPTIMIZER, prepare=prepare)(state(()), raw)
    np.testing.assert_allclose(metrics["x"].value, raw.x / 255, rtol=1e-6)


def prepare_noise(row, key):
    return eqx.tree_at(lambda row: row.x, row, jr.normal(key, row.x.shape))


def prepared(rows, current=None):
    step = mfx.TrainStep(Probe(), OPTIMIZER, prepare=prepare_noise)
    current, metrics = step(state(()) if current is None else current, rows)
    return current, np.asarray(metrics["x"].value)


def test_every_row_and_every_step_is_prepared_with_a_key_of_its_own():
    current, first = prepared(batch())
    _, second = prepared(batch(), current)
    assert len(np.unique(np.concatenate([first, second])[:, 0])) == 2 * ROWS


def test_key_of_a_row_follows_its_index_wherever_it_stands():
    order = np.random.default_rng(0).permutation(ROWS).astype(np.int32)
    _, expected = prepared(batch())
    _, shuffled = prepared(mfx.Batch(batch().x[order], index=order))
    np.testing.assert_array_equal(shuffled, expected[order])


def test_preparation_and_objective_draw_from_different_keys():
    draw = prepared(batch())[1]
    _, metrics = mfx.TrainStep(Probe(), OPTIMIZER)(state(()), batch())
    step_key = jr.fold_in(jr.key(1), 0)
    assert metrics["draw"].value != draw.ravel()[0]
    assert metrics["draw"].value not in (jr.uniform(step_key), jr.uniform(jr.key(1)))


# Several steps as one program


class Draw(eqx.Module):
    """Standard normal rows."""

    def __call__(self, key):
        return mfx.Batch(jr.normal(key, (ROWS, DIM)))


def one_by_one(step, current, steps):
    """The state and the metrics of all steps, taken one at a time on the batches of `scan_steps`."""
    found = []
    for _ in range(steps):
        key = jr.fold_in(jr.fold_in(current.key, current.step), _DRAW)
        current, metrics = step(current, Draw()(key))
        found.append(metrics)
    return current, found


def test_scanned_steps_are_the_steps_one_by_one():
    step = mfx.TrainStep(mfx.Objective(), OPTIMIZER, AVERAGES)
    expected, each = one_by_one(step, state(), 5)
    found, metrics = mfx.scan_steps(step, state(), Draw(), 5)
    assert found.step == 5
    # The two programs may add in another order, and Adam's quotient of two small numbers enlarges that.
    for result, leaf in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(result, leaf, rtol=1e-4, atol=1e-6)
    summed = mfx.total(each)
    assert metrics.keys() == summed.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name].total, summed[name].total, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(metrics[name].count, summed[name].count)


def test_two_chunks_of_steps_are_one_chunk():
    step = mfx.TrainStep(mfx.Objective(None, identity_share=0.0), OPTIMIZER, AVERAGES)
    whole, _ = mfx.scan_steps(step, state(), Draw(), 6)
    half, _ = mfx.scan_steps(step, state(), Draw(), 3)
    halves, _ = mfx.scan_steps(step, half, Draw(), 3)
    # Equal bodies of a loop; only a compiler that unrolls one of the two could tell them apart.
    for result, leaf in zip(leaves(halves), leaves(whole), strict=True):
        np.testing.assert_allclose(result, leaf, rtol=1e-6, atol=1e-7)


def test_metrics_of_scanned_steps_are_means_over_all_of_them():
    _, metrics = mfx.scan_steps(mfx.TrainStep(Probe(), OPTIMIZER), state(()), Draw(), 4)
    assert metrics["step"].value == np.mean([0, 1, 2, 3])
    assert metrics["gradient_norm"].count == 4


def test_every_scanned_step_draws_a_batch_of_its_own():
    step = mfx.TrainStep(Probe(), OPTIMIZER)
    drawn, current = [], state(())
    for _ in range(3):
        current, metrics = mfx.scan_steps(step, current, Draw(), 1)
        drawn.append(np.asarray(metrics["x"].value))
    assert len(np.unique(drawn)) == 3 * ROWS * DIM


def test_data_are_drawn_from_another_key_than_preparation_and_objective():
    _, metrics = mfx.scan_steps(mfx.TrainStep(Probe(), OPTIMIZER), state(()), Draw(), 1)
    step_key = jr.fold_in(jr.key(1), 0)
    for key in (jr.key(1), step_key, *jr.split(step_key)):
        assert not np.isin(metrics["x"].value, jr.normal(key, (ROWS, DIM))).any()


def test_scanned_steps_are_traced_once():
    objective = Probe()
    step, current = mfx.TrainStep(objective, OPTIMIZER, AVERAGES), state()
    for _ in range(3):
        current, _ = mfx.scan_steps(step, current, Draw(), 2)
    assert len(objective.traces) == 1


def test_scanned_steps_donate_the_old_state():
    old = state()
    mfx.scan_steps(mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES), old, Draw(), 2)
    assert all(leaf.is_deleted() for leaf in arrays(old))


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_scanned_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be >= 1, got {steps}"):
        mfx.scan_steps(mfx.TrainStep(Probe(), OPTIMIZER), state(()), Draw(), steps)


# Errors


def test_averages_that_do_not_match_the_state_are_refused():
    step = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES)
    with pytest.raises(ValueError, match="averages must be as many as the state's 1, got 2"):
        step(state(AVERAGES[:1]), batch())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("averages", [mfx.ExponentialAverage(0.9), 0.9, [0.9], None])
@pytest.mark.parametrize("use", [state, lambda averages: mfx.TrainStep(Probe(), OPTIMIZER, averages)])
def test_averages_that_are_no_list_of_averages_are_refused(use, averages):
    rule = r"averages must be a list of ExponentialAverage, such as \[ExponentialAverage\(0\.999\)\], got"
    with pytest.raises(ValueError, match=rf"{rule} {re.escape(repr(averages))}"):
        use(averages)


def test_batch_that_the_split_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch must be a positive multiple of 4 .* = 4, got 6"):
        mfx.TrainStep(mfx.Objective(), OPTIMIZER)(state(()), mfx.Batch(jnp.zeros((6, DIM))))


def test_batch_that_the_accumulation_steps_do_not_divide_is_refused():
    step = mfx.TrainStep(Probe(), OPTIMIZER, AVERAGES, accumulation=3)
    with pytest.raises(ValueError, match=r"x 1 \(data shards\) x 3 \(accumulation steps\) = 3, got 8"):
        step(state(), mfx.Batch(jnp.zeros((ROWS, DIM))))


def test_an_array_in_place_of_a_batch_is_refused_in_one_line(unchecked):
    optimizer = optax.sgd(0.1)
    state = mfx.init_state(mfx.MLP(2, width=4, depth=1, key=jr.key(0)), optimizer, key=jr.key(1))
    step = mfx.TrainStep(mfx.Objective(mfx.MeanFlow()), optimizer)
    with pytest.raises(
        ValueError, match=r"^batch must be a Batch, such as mfx.Batch\(x\), got an array of shape \(8, 2\)"
    ):
        step(state, jnp.zeros((8, 2)))
