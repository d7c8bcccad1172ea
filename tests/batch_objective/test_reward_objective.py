"""Fine-tuning towards a reward: the loss by hand, its known minimum, and that rewards rise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from affine_field import affine
from fields import GaussianField
from jax.scipy.special import ndtr, ndtri

import mf_eqx as mfx

BATCH = mfx.Batch(np.zeros((64, 2)))
BOUNDARY = mfx.TimePairs(mfx.UniformTimes(), equal=1)


def first(x, condition):
    return x[0]


def given(x, condition):
    return condition


@eqx.filter_jit
def evaluated(objective, field, old, batch=BATCH):
    context = mfx.Context(jnp.zeros((), jnp.int32), old)
    return objective.evaluate(field, batch, None, key=jr.key(0), context=context)


def test_loss_is_that_of_its_formula(x64):
    field, old = affine(jnp.float64), GaussianField(jnp.array([0.5, -0.3]), 0.6)
    objective = mfx.RewardObjective(first, strength=0.3, largest_advantage=2.0)
    loss, (metrics, _) = evaluated(objective, field, old)
    eps = jax.vmap(lambda i: jr.normal(jr.fold_in(jr.fold_in(jr.key(0), i), 0), (2,)))(BATCH.index)
    x = jax.vmap(lambda eps: mfx.sample(old, eps))(eps)
    share = 0.5 + 0.5 * np.clip((x[:, 0] - x[:, 0].mean()) / x[:, 0].std() / 2, -1, 1)

    @jax.jit
    @jax.vmap
    def by_hand(x, share, i):
        time_key, noise_key, _ = jr.split(jr.fold_in(jr.fold_in(jr.key(0), i), 1), 3)
        r, t = objective.time_pairs(key=time_key)
        eps = jr.normal(noise_key, (2,))
        z, v = (1 - t) * x + t * eps, eps - x
        u_old, rate = mfx.total_derivative(old, z, v, r, t)
        average, past = (u + (t - r) * rate for u in (field(z, r, t), u_old))
        good, bad = (z - t * (past + sign * 0.3 * (average - past)) - x for sign in (1, -1))
        terms = [
            share * jnp.mean(good**2) / jnp.mean(jnp.abs(good)),
            (1 - share) * jnp.mean(bad**2) / jnp.mean(jnp.abs(bad)),
        ]
        return 2.0 / 0.3 * sum(terms), jnp.mean((average - past) ** 2)

    losses, changes = by_hand(x, share, BATCH.index)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-10)
    np.testing.assert_allclose(metrics["change"].value, np.mean(changes), rtol=1e-10)
    np.testing.assert_allclose(metrics["reward"].value, x[:, 0].mean(), rtol=1e-10)


class TwoSides(mfx.AbstractField):
    """Samples near 3 and -3, which a positive and a negative noise become, and their velocity at r = t; on one side of
    them, the velocity is that of the samples of this side alone."""

    side: float | None = None

    def posterior(self, z, t):
        """For each side the probability that z at t comes from it, and its velocity."""
        variance = (0.3 * (1 - t)) ** 2 + t**2
        means = jnp.array([-3.0, 3.0])
        offset = z - (1 - t) * means
        velocity = -means + (t - (1 - t) * 0.09) / variance * offset
        return jax.nn.softmax(-(offset**2) / (2 * variance)), velocity

    def __call__(self, z, r, t, condition=None, *, key=None):
        share, velocity = self.posterior(z, t)
        p = ndtr(jnp.abs(z)) * 2 - 1
        sample = jnp.sign(z) * 3 + 0.3 * ndtri(jnp.where(z > 0, p, 1 - p))
        return jnp.where(r == t, (share * velocity).sum(keepdims=True), z - sample)


class Towards(mfx.AbstractField):
    """`scale` times the change at which the loss without its weights is least, for a reward of the upper side."""

    scale: jax.Array
    strength: float

    def __call__(self, z, r, t, condition=None, *, key=None):
        share, velocity = TwoSides().posterior(z, t)
        old = TwoSides()(z, r, t)
        return old + self.scale * 2 / self.strength * share[1] * (velocity[1] - old)


def test_loss_without_its_weights_is_least_where_the_theorem_says(x64):
    objective = mfx.RewardObjective(
        lambda x, condition: jnp.sign(x[0]), largest_advantage=1, strength=0.4, time_pairs=BOUNDARY, adaptive=False
    )
    batch = mfx.Batch(np.zeros((200_000, 1)))
    fields = [Towards(jnp.asarray(scale), 0.4) for scale in (0.0, 1.0, 2.0)]
    found = [evaluated(objective, field, TwoSides(), batch)[0] for field in fields]
    low, middle, high = map(float, found)
    least = 1 + (low - high) / (2 * (low - 2 * middle + high))  # of the parabola through three points
    assert abs(least - 1) < 0.02  # the standard error is 0.006


def test_a_reference_adds_the_square_of_the_difference_from_it():
    def loss(field, **options):
        objective = mfx.RewardObjective(first, time_pairs=BOUNDARY, **options)
        return evaluated(objective, field, affine())[0]

    moved = eqx.tree_at(lambda field: field.shift, affine(), affine().shift + jnp.array([0.3, 0.1]))
    for field, square in ((affine(), 0.0), (moved, (0.3**2 + 0.1**2) / 2)):
        added = loss(field, reference=affine(), anchor=4.0) - loss(field)
        np.testing.assert_allclose(added, 4 * square, atol=2e-5)
    assert not jnp.any(eqx.filter_grad(lambda other: loss(moved, reference=other, anchor=4.0))(affine()).shift)


def test_old_velocity_has_no_gradient_if_all_rewards_are_equal():
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(field, rewards, **options):
        return evaluated(mfx.RewardObjective(given, **options), field, affine(), mfx.Batch(BATCH.x, rewards))[0]

    rewards = np.repeat(np.arange(16.0), 4)
    np.testing.assert_allclose(gradient(affine(), np.full(64, 0.1)).shift, 0, atol=1e-5)  # their mean is not 0.1
    np.testing.assert_allclose(gradient(affine(), rewards / 10, group=4).shift, 0, atol=1e-5)
    assert np.abs(gradient(affine(), rewards).shift).max() > 0.01


def test_rows_of_a_group_have_the_condition_of_the_first():
    condition = np.arange(64, dtype=np.float32)
    _, (metrics, _) = evaluated(mfx.RewardObjective(given, group=4), affine(), affine(), mfx.Batch(BATCH.x, condition))
    assert metrics["reward"].value == condition[::4].mean()


@pytest.mark.parametrize("reward", [lambda x, c: x[0] > 0, lambda x, c: (x[0] > 0).astype(int), first])
def test_a_reward_may_be_any_number(reward):
    loss, (metrics, _) = evaluated(mfx.RewardObjective(reward), affine(), affine())
    assert np.isfinite(loss) and metrics["reward"].value.dtype == jnp.float32


def test_weights_of_both_terms_have_no_gradient(x64):
    """The slope in the direction of the change: with frozen weights it is that of the two squares."""
    objective = mfx.RewardObjective(lambda x, c: jnp.sign(x[0]), largest_advantage=1, strength=0.5, time_pairs=BOUNDARY)
    old, batch = GaussianField(jnp.zeros(1), 1.0), mfx.Batch(np.zeros((2, 1)))

    @jax.value_and_grad
    def loss(shift):
        moved = eqx.tree_at(lambda field: field.mean, old, jnp.full(1, shift))
        return evaluated(objective, moved, old, batch)[0]

    @jax.jit
    @jax.value_and_grad
    def by_hand(shift, frozen):
        total = 0.0
        for i in range(2):
            first_key = jr.fold_in(jr.fold_in(jr.key(0), i), 0)
            x = mfx.sample(old, jr.normal(first_key, (1,)))
            time_key, noise_key, _ = jr.split(jr.fold_in(jr.fold_in(jr.key(0), i), 1), 3)
            _, t = objective.time_pairs(key=time_key)
            eps = jr.normal(noise_key, (1,))
            z, v = (1 - t) * x + t * eps, eps - x
            before = old(z, t, t)
            change = GaussianField(jnp.full(1, shift), 1.0)(z, t, t) - before
            held = GaussianField(jnp.full(1, frozen), 1.0)(z, t, t) - before
            for sign, share in zip((1, -1), shares[i], strict=True):
                difference, size = (t * (before + sign * 0.5 * part - v) for part in (change, held))
                total += share / 0.5 * jnp.mean(difference**2) / jnp.mean(jnp.abs(size)) / 2
        return total

    rewards = [
        float(jnp.sign(mfx.sample(old, jr.normal(jr.fold_in(jr.fold_in(jr.key(0), i), 0), (1,)))[0])) for i in (0, 1)
    ]
    above = np.array(rewards) - np.mean(rewards)
    rho = 0.5 + 0.5 * np.clip(above / max(np.std(rewards), 1e-300), -1, 1)
    shares = [(share, 1 - share) for share in rho]
    (found, slope), (expected, slope_by_hand) = jax.jit(loss)(0.3), by_hand(0.3, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(slope, slope_by_hand, rtol=1e-6)


@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.5, 0.0)])
def test_training_raises_the_reward_and_leaves_the_rest(times):
    def reward(x, condition):
        return -jnp.abs(x[0] - 1)

    objective = mfx.RewardObjective(reward, times=times)
    step = mfx.TrainStep(objective, optax.adam(0.01), [mfx.ExponentialAverage(0.9)], teacher=0)
    field = GaussianField(jnp.array([0.0, -0.5]), 0.5)
    state = mfx.init_state(field, step.optimizer, step.averages, objective, key=jr.key(0))
    for _ in range(150):
        state, metrics = step(state, mfx.Batch(np.zeros((256, 2), np.float32)))
    np.testing.assert_allclose(state.field.mean, [1.0, -0.5], atol=0.12)
    assert state.faults.total == 0 and metrics["reward"].value > -0.5


def test_samples_are_those_of_the_old_field():
    reward = evaluated(mfx.RewardObjective(first), GaussianField(jnp.zeros(2), 1.0), affine())[1][0]["reward"].value
    eps = jax.vmap(lambda i: jr.normal(jr.fold_in(jr.fold_in(jr.key(0), i), 0), (2,)))(BATCH.index)
    np.testing.assert_allclose(reward, jax.vmap(lambda eps: mfx.sample(affine(), eps))(eps)[:, 0].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("pairs", "trained"),
    [
        (mfx.TimePairs(equal=0.25), (True, False, False, True, False)),
        (mfx.TimePairs(equal=1), (False, False, False, True, False)),
        (mfx.TimePairs(at_data=1), (True, False, False, False, True)),
        (mfx.TimePairs(at_noise=1), (True, False, False, False, False, True)),
    ],
)
def test_what_is_trained_is_known(pairs, trained):
    assert mfx.RewardObjective(first, time_pairs=pairs).trained == mfx.Trained(*trained)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mfx.RewardObjective(3.0), "reward must be a function of a sample and its condition, got 3.0"),
        (lambda: mfx.RewardObjective(first, strength=0), "strength must be > 0"),
        (lambda: mfx.RewardObjective(first, largest_advantage=-1), "largest_advantage must be > 0"),
        (lambda: mfx.RewardObjective(first, anchor=1), "anchor must be > 0 if and only if .* got 1.0 and none"),
        (
            lambda: mfx.RewardObjective(first, reference=affine()),
            "anchor must be > 0 if and only .* got 0.0 and Affine",
        ),
        (lambda: mfx.RewardObjective(first, group=1), "group must be an integer >= 2, got 1"),
        (lambda: mfx.RewardObjective(first, times=(0, 1)), "times must be a strictly decreasing"),
        (
            lambda: evaluated(mfx.RewardObjective(first), affine(), None),
            "context must have a teacher for RewardObjective, got none",
        ),
        (lambda: evaluated(mfx.RewardObjective(first, group=5), affine(), affine()), "group must divide the 64 rows"),
        (lambda: evaluated(mfx.RewardObjective(lambda x, c: x), affine(), affine()), "the reward of a sample must be"),
        (
            lambda: evaluated(mfx.RewardObjective(first), affine(), affine(), mfx.Batch(BATCH.x, eps=BATCH.x)),
            "eps must be None for samples of the field itself",
        ),
        (lambda: mfx.TrainStep(mfx.RewardObjective(first), optax.sgd(0.1)), "teacher must be one of the averages or"),
        (
            lambda: mfx.TrainStep(mfx.RewardObjective(first), optax.sgd(0.1), teacher=affine(), accumulation=2),
            "accumulation must be 1 for a loss that is no mean over rows, got 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
