"""Conditions that are no labels, through all that trains and samples: vectors, and several arrays at once."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from devices import run_on_devices

import mf_eqx as mfx
from mf_eqx import data, exact, nn

LABELS, ROWS = 3, 24
PATH = mfx.LinearInterpolant()


# Guidance: the exact average of the guided velocity is the fixed point of its target, whatever the condition is


def mixture():
    mean = np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    return exact.GaussianMixture(mean, np.array([0.3, 0.5, 0.2]), label=np.arange(3))


def of_label(z, t, label):
    """The velocity of a mixture with labels, `LABELS` being none."""
    with_label, without = (mixture().velocity(PATH, z, t, c) for c in (jnp.minimum(label, LABELS - 1), None))
    return jnp.where(label == LABELS, without, with_label)


def of_one_hot(z, t, vector):
    """The same for a vector of zeros and a one, or zeros alone for none."""
    return of_label(z, t, jnp.where(vector.any(), jnp.argmax(vector), LABELS))


SLOPE, STD = 2.0, 0.4


def of_mean(z, t, condition):
    """Given the standard normal vector m, data are N(2 m, 0.4^2 I); so all data are N(0, (2^2 + 0.4^2) I)."""
    mean = jnp.where(condition["given"], SLOPE * condition["mean"], 0.0)
    variance = jnp.where(condition["given"], STD**2, SLOPE**2 + STD**2)
    offset = z - (1 - t) * mean
    return -mean + (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2) * offset


class Guided(mfx.AbstractField):
    """The exact average of the guided velocity."""

    velocity: object = eqx.field(static=True)
    null: object
    scale: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        def guided(z, t, condition):
            null = jax.tree.map(
                lambda null, c: jnp.broadcast_to(jnp.asarray(null, c.dtype), c.shape), self.null, condition
            )
            return self.scale * self.velocity(z, t, condition) + (1 - self.scale) * self.velocity(z, t, null)

        return exact.AverageVelocity(guided)(z, r, t, condition)


def draw(kind):
    """Data with conditions of a kind, their velocity, and the null condition."""
    label = jnp.arange(ROWS) % LABELS
    if kind == "mean":
        mean, noise = jr.normal(jr.key(0), (2, ROWS, 2))
        condition = {"mean": mean, "given": jnp.ones(ROWS, bool)}
        return SLOPE * mean + STD * noise, condition, of_mean, {"mean": 0.0, "given": False}
    x = jax.vmap(lambda key, label: mixture().sample(key=key, condition=label))(jr.split(jr.key(0), ROWS), label)
    if kind == "label":
        return x, label, of_label, LABELS
    return x, jnp.eye(LABELS)[label], of_one_hot, np.zeros(LABELS)


@eqx.filter_jit
def evaluated(objective, field, batch):
    return objective(field, batch, key=jr.key(1))[1]


def errors(kind, guidance, scale):
    """The raw errors of the exact field of this effective scale."""
    x, condition, velocity, null = draw(kind)
    objective = mfx.Objective(
        guidance=guidance,
        label_dropout=mfx.LabelDropout(0.3, null),
        velocity=velocity,
        weight=mfx.ConstantWeight(),
        time_pairs=mfx.TimePairs(mfx.UniformTimes()),
    )
    metrics = evaluated(objective, Guided(velocity, null, jnp.asarray(scale)), mfx.Batch(x, condition))
    return np.array([metrics["boundary_error"].value, metrics["identity_error"].value])


@pytest.mark.slow
def test_exact_guided_field_leaves_no_error_whatever_its_condition(x64):
    guidance = mfx.Guidance(1.25, 0.5)  # of effective scale 2.5
    assert np.max(errors("mean", guidance, 2.5)) < 1e-12
    one_hot, label = errors("one-hot", guidance, 2.5), errors("label", guidance, 2.5)
    assert np.max([one_hot, label]) < 1e-12
    wrong = errors("one-hot", guidance, 1.5)
    assert np.min(wrong) > 1e-2
    np.testing.assert_allclose(wrong, errors("label", guidance, 1.5), rtol=1e-9)


# Training: what is a label for one network is a vector for another


class Table(mfx.AbstractField):
    """Reads a table by a label or by a vector of zeros and a one."""

    table: jax.Array
    matrix: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        is_label = jnp.issubdtype(condition.dtype, jnp.integer)
        row = (
            self.table[condition] if is_label else condition @ self.table[:-1] + (1 - condition.sum()) * self.table[-1]
        )
        return jnp.tanh(self.matrix @ z + row + r - t**2)


def table():
    return Table(jr.normal(jr.key(5), (LABELS + 1, 2)), jr.normal(jr.key(6), (2, 2)))


def test_one_hot_vectors_train_as_labels_do(x64):
    label, x = jnp.arange(ROWS) % LABELS, jr.normal(jr.key(0), (ROWS, 2))
    found = []
    for condition, null in ((label, LABELS), (jnp.eye(LABELS)[label], 0.0)):
        objective = mfx.Objective(guidance=mfx.Guidance(2.0, 0.5), label_dropout=mfx.LabelDropout(0.4, null))
        step = mfx.TrainStep(objective, optax.sgd(0.1))
        state = mfx.init_state(table(), step.optimizer, key=jr.key(1))
        for _ in range(2):
            state, metrics = step(state, mfx.Batch(x, condition))
        found.append((state.field, metrics["loss"].value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *found)


def robot():
    """A network for observations of several arrays, and rows for it."""

    class Observation(nn.AbstractConditionEmbedding):
        joints: nn.VectorEmbedding
        words: jax.Array

        def __call__(self, condition):
            return self.joints(condition["joints"]) + self.words[condition["words"]].mean(axis=0)

    embedding = Observation(nn.VectorEmbedding(5, 16, key=jr.key(0)), jr.normal(jr.key(1), (20, 16)))
    field = mfx.MLP(6, width=16, depth=1, condition=embedding, key=jr.key(2))
    observation = {"joints": jr.normal(jr.key(3), (64, 5)), "words": jr.randint(jr.key(4), (64, 4), 0, 20)}
    return field, mfx.Batch(jr.normal(jr.key(5), (64, 6)), observation)


def trained(devices=1, accumulation=1, steps=3):
    """The losses of a few steps on several devices, or with micro-batches."""
    parallelism = mfx.Parallelism(devices=jax.devices()[:devices])
    null = {"joints": np.zeros(5, np.float32), "words": np.zeros(4, np.int32)}
    objective = mfx.Objective(guidance=mfx.Guidance(2.0, 0.5), label_dropout=mfx.LabelDropout(0.2, null))
    step = mfx.TrainStep(objective, optax.sgd(0.1), accumulation=accumulation, parallelism=parallelism)
    field, batch = robot()
    state = parallelism.make(lambda: mfx.init_state(field, step.optimizer, key=jr.key(7)))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, parallelism.place(jax.tree.map(np.asarray, batch)))
        losses.append(float(metrics["loss"].value))
    return losses


@pytest.mark.slow
def test_micro_batches_have_the_conditions_of_their_rows():
    np.testing.assert_allclose(trained(accumulation=4), trained(), rtol=1e-5)


@pytest.mark.slow
def test_devices_have_the_conditions_of_their_rows():
    found = run_on_devices("conditions_on_devices.py")
    assert found["devices"] == 8
    np.testing.assert_allclose(found["losses"], trained(), rtol=1e-5)


# Label dropout


class Dropped(mfx.AbstractField):
    """Its gradient tells which arrays of the condition were replaced in a row."""

    parameter: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        is_null = jnp.stack([(condition["a"] == 7).all(), (condition["b"][0] == 5).all(), ~condition["b"][1]])
        return z + (self.parameter * jnp.concatenate([is_null, is_null.all()[None], (~is_null).all()[None]])).sum()


def test_arrays_of_a_condition_are_dropped_together():
    condition = {"a": jnp.zeros((ROWS, 4)), "b": (jnp.zeros(ROWS, jnp.int8), jnp.ones(ROWS, bool))}
    dropout = mfx.LabelDropout(0.5, {"a": np.full(4, 7.0), "b": (5, False)})
    objective = mfx.Objective(None, identity_share=0, label_dropout=dropout, weight=mfx.ConstantWeight())

    def loss(field):
        return objective(field, mfx.Batch(jnp.ones((ROWS, 1)), condition), key=jr.key(0))[0]

    a, b, c, all_of_them, none = eqx.filter_jit(eqx.filter_grad(loss))(Dropped(jnp.zeros(5))).parameter
    assert a == b == c == all_of_them != 0 and none not in (0, a)


NULLS = {
    "structure": ({"a": 0.0}, r"condition must have the structure of label_dropout.null, .*'a': \*\}.*; got "),
    "shape": (
        {"a": np.zeros(3), "b": 0},
        r"label_dropout.null\['a'\] must be a number or of shape \(4,\) as the condition is, got shape \(3,\)",
    ),
    "axes": (
        {"a": np.zeros((1, 4)), "b": 0},
        r"label_dropout.null\['a'\] must be a number or of shape \(4,\) as the condition is, got shape \(1, 4\)",
    ),
    "float": ({"a": 0.0, "b": 0.5}, r"label_dropout.null\['b'\] must be an integer like the condition, got 0.5"),
    "range": ({"a": 0.0, "b": 300}, r"label_dropout.null\['b'\] must be representable in .* int8, got 300"),
    "infinite": ({"a": 1e39, "b": 0}, r"label_dropout.null\['a'\] must be representable in .* float32, got 1e\+39"),
}


@pytest.mark.parametrize(("null", "message"), NULLS.values(), ids=NULLS)
def test_null_that_does_not_fit_the_condition_is_refused_by_name(null, message):
    condition = {"a": jnp.zeros((4, 4)), "b": jnp.zeros(4, jnp.int8)}
    objective = mfx.Objective(None, identity_share=0, label_dropout=mfx.LabelDropout(0.1, null))
    with pytest.raises(ValueError, match=message):
        objective(Dropped(jnp.zeros(5)), mfx.Batch(jnp.ones((4, 1)), condition), key=jr.key(0))


# Sampling


def lively_robot():
    field, batch = robot()
    return jax.tree.map(lambda leaf: leaf + 0.1 if eqx.is_inexact_array(leaf) else leaf, field), batch.condition


@pytest.mark.slow
def test_samples_from_noise_follow_their_conditions():
    field, condition = lively_robot()
    eps = jr.normal(jr.key(1), (64, 6))
    generator = mfx.Generator(field, jr.key(0), (6,))
    expected = jax.vmap(lambda eps, condition: mfx.sample(field, eps, condition))(eps, condition)
    np.testing.assert_allclose(generator.from_noise(eps, condition), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        generator.from_noise(np.asarray(eps), jax.tree.map(np.asarray, condition)), expected, rtol=1e-6, atol=1e-6
    )


def test_numbered_samples_take_the_conditions_in_turn():
    field, condition = lively_robot()
    few = jax.tree.map(lambda leaf: np.asarray(leaf[:3]), condition)
    generator = mfx.Generator(field, jr.key(0), (6,), condition=few)
    eps = jax.vmap(lambda i: generator.inputs(i)[0])(jnp.arange(8))
    expected = generator.from_noise(eps, jax.tree.map(lambda leaf: leaf[np.arange(8) % 3], few))
    np.testing.assert_allclose(generator(range(8)), expected, rtol=1e-6, atol=1e-6)
    several = np.concatenate([*generator.batches(8, 4, mfx.Parallelism(devices=jax.devices()[:1]))])
    np.testing.assert_allclose(several, expected, rtol=1e-6, atol=1e-6)


def test_guided_samples_extrapolate_from_the_null_condition():
    field, condition = lively_robot()
    one = jax.tree.map(lambda leaf: leaf[0], condition)
    eps, null = jnp.ones(6), {"joints": np.zeros(5, np.float32), "words": np.zeros(4, np.int32)}
    found = mfx.sample(mfx.GuidedField(field, 3, null), eps, one)
    with_condition, without = (mfx.sample(field, eps, c) for c in (one, null))
    np.testing.assert_allclose(found, without + 3 * (with_condition - without), rtol=1e-5, atol=1e-5)
    numbers = {"joints": 0.0, "words": 0}
    np.testing.assert_array_equal(mfx.sample(mfx.GuidedField(field, 3, numbers), eps, one), found)
    with pytest.raises(ValueError, match=r"null\['joints'\] must be a number or of shape \(5,\) as the condition is"):
        mfx.sample(mfx.GuidedField(field, 3, {"joints": np.zeros(4), "words": 0}), eps, one)


def generator(**options):
    return mfx.Generator(lively_robot()[0], jr.key(0), (6,), **options)


@pytest.mark.parametrize(
    ("options", "condition", "message"),
    [
        (
            {},
            {"joints": np.zeros((3, 5))},
            r"condition\['joints'\] must have a leading axis of 2 rows, got shape \(3, 5",
        ),
        ({}, [2, 0], r"condition\[0\] must have a leading axis of 2 rows, got shape \(\)"),
        ({"labels": 3}, [0, 4], r"condition must be labels in \[0, 3\], where 3 means no label, got 4"),
        ({"labels": 3}, [-1, 0], r"condition must be labels in \[0, 3\], where 3 means no label, got -1"),
        (
            {"labels": 3},
            np.zeros(2),
            r"condition must be one integer label for each of 2 samples, got float64 of shape",
        ),
        ({"labels": 3}, [0], r"condition must be one integer label for each of 2 samples, got int32 of shape \(1,\)"),
        ({"labels": 3}, {"a": np.zeros(2)}, r"condition must be one integer label for each of 2 samples, got \['a'\]"),
    ],
)
def test_conditions_that_fit_no_noise_are_refused(options, condition, message):
    with pytest.raises(ValueError, match=message):
        generator(**options).from_noise(jnp.zeros((2, 6)), condition)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 3, "condition": np.zeros(3)}, "labels must be None with a condition, got 3"),
        ({"condition": np.zeros(())}, r"condition must have a leading axis of at least one row, got shape \(\)"),
        (
            {"condition": np.zeros((0, 2))},
            r"condition must have a leading axis of at least one row, got shape \(0, 2\)",
        ),
        (
            {"condition": (np.zeros(3), np.zeros(2))},
            r"condition\[1\] must have a leading axis of 3 rows, got shape \(2,",
        ),
    ],
)
def test_conditions_that_no_samples_have_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        generator(**options)


# A robot from end to end


def training(x, observation):
    """A stream of actions given observations, a step, and a fresh state."""
    source = data.ArraySource(x, condition=observation)
    objective = mfx.Objective(weight=mfx.ConstantWeight(), time_pairs=mfx.TimePairs(mfx.UniformTimes()))
    step = mfx.TrainStep(objective, optax.adam(3e-3))
    field = mfx.MLP(2, width=48, depth=2, condition=3, key=jr.key(0))
    return data.Stream(source, 128), step, mfx.init_state(field, step.optimizer, key=jr.key(1))


@pytest.mark.slow
def test_one_step_samples_follow_the_observation_and_training_goes_on_where_it_was():
    pytest.importorskip("grain")
    draws = np.random.default_rng(0)
    observation = draws.uniform(-1, 1, (2048, 3)).astype(np.float32)
    slope = np.array([[1.0, 0.0], [0.5, -1.0], [0.0, 1.5]], np.float32)
    x = observation @ slope + 0.1 * draws.standard_normal((2048, 2)).astype(np.float32)
    stream, step, state = training(x, observation)
    middle = None
    for number, batch in enumerate(stream.batches(0, 500)):
        if number == 490:
            middle = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, state)
        state, _ = step(state, batch)
    wanted = observation[:64]
    generator = mfx.Generator(state.field, jr.key(2), (2,), condition=np.repeat(wanted, 16, axis=0))
    mean = np.asarray(generator(np.arange(64 * 16))).reshape(64, 16, 2).mean(axis=1)
    assert np.mean((mean - wanted @ slope) ** 2) < 0.02 * np.var(x)

    again = training(x, observation)[0]
    assert again.fingerprint() == stream.fingerprint()
    for batch in itertools.islice(again.batches(int(middle.step)), 10):
        middle, _ = step(middle, batch)
    assert eqx.tree_equal(eqx.filter(middle.field, eqx.is_array), eqx.filter(state.field, eqx.is_array))
