import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from affine_field import affine, noise

import mf_eqx as mfx
from mf_eqx._batch_objective.drifting import drift

DRAWS = np.random.default_rng(0)


def draws(rows, shift=0.0):
    """Two Gaussians."""
    centre = np.where(DRAWS.random((rows, 1)) < 0.5, -1.0, 1.0) * np.array([1.0, 0.5]) + shift
    return (centre + 0.2 * DRAWS.standard_normal((rows, 2))).astype(np.float32)


def all_act(rows, columns):
    return jnp.ones((rows, columns), bool)


def by_hand(y, positives, negatives, scale, positive_acts, negative_acts):
    """V by its definition, a sum over all pairs."""

    def kernel(a, b):
        return np.exp(-np.linalg.norm(a - b) / (scale * np.sqrt(y.shape[1])))

    others, acts = [*positives, *negatives], np.concatenate([positive_acts, negative_acts], axis=1)
    k = np.array([[kernel(a, b) for b in others] for a in y]) * acts
    with np.errstate(invalid="ignore"):
        a = np.nan_to_num(np.sqrt(k / k.sum(axis=1, keepdims=True) * k / k.sum(axis=0)))
    plus, minus = a[:, : len(positives)], a[:, len(positives) :]
    return np.einsum(
        "ij,ik,ijkd->id",
        plus,
        minus,
        np.broadcast_to(
            positives[None, :, None] - negatives[None, None], (len(y), len(positives), len(negatives), y.shape[1])
        ),
    )


def test_drift_is_the_sum_over_all_pairs():
    y, positives, negatives = draws(5), draws(4), draws(6)
    acts = DRAWS.random((5, 4)) < 0.7, DRAWS.random((5, 6)) < 0.7
    found = drift(*map(jnp.asarray, (y, positives, negatives)), 0.3, *map(jnp.asarray, acts))
    np.testing.assert_allclose(found, by_hand(y, positives, negatives, 0.3, *acts), rtol=1e-3, atol=1e-5)


def test_drift_changes_its_sign_where_data_and_samples_are_exchanged():
    y, positives, negatives = map(jnp.asarray, (draws(8), draws(16), draws(16, 0.3)))
    acts = all_act(8, 16)
    there = drift(y, positives, negatives, 0.2, acts, acts)
    np.testing.assert_allclose(there, -drift(y, negatives, positives, 0.2, acts, acts), atol=1e-5)
    assert float(jnp.abs(there).max()) > 0.05
    assert not drift(y, positives, positives, 0.2, acts, acts).any()


@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_expected_drift_is_zero_at_the_distribution_of_the_data_and_not_elsewhere(scale):
    others = ~jnp.eye(64, dtype=bool)

    @jax.jit
    @jax.vmap
    def mean_drift(y, positives):
        """Of the samples right of the middle, for each repetition."""
        right = y[:, :1] > 0
        v = drift(y, positives, y, scale, all_act(64, 64), others)
        return jnp.sum(jnp.where(right, v, 0), axis=0) / jnp.sum(right)

    def found(shift):
        repeated = mean_drift(*(draws(64 * 400, s).reshape(400, 64, 2) for s in (shift, 0.0)))
        return np.mean(repeated, axis=0), np.std(repeated, axis=0) / 20

    mean, error = found(0.0)
    assert np.all(np.abs(mean) < 4 * error), (mean, error)
    mean, error = found(0.1)  # samples lie to the upper right of the data
    assert np.all(mean < -8 * error), (mean, error)


@eqx.filter_jit
def evaluated(field, batch, key=jr.key(0), **options):
    loss = mfx.SampleObjective(mfx.Drifting(**options))
    value, (metrics, _) = loss.evaluate(field, batch, loss.init(), key=key)
    return value, metrics


def test_gradient_moves_samples_along_the_drift():
    """In float64: the loss is |y - sg(y + V)|^2 over D, so that its gradient in y is -2 V / (D rows)."""
    with jax.enable_x64(True):
        field, batch = affine(jnp.float64), mfx.Batch(np.float64(draws(32)))
        eps = noise(jr.key(0), 32, jnp.float64)
        y = eps @ np.asarray(field.matrix).T + np.asarray(field.shift)
        others = ~np.eye(32, dtype=bool)
        both = np.concatenate([batch.x, y])
        apart = np.linalg.norm(y[:, None] - both, axis=-1)[np.concatenate([np.ones((32, 32), bool), others], axis=1)]
        unit = apart.mean() / np.sqrt(2)
        v = by_hand(y / unit, batch.x / unit, y / unit, 0.2, np.ones((32, 32), bool), others)
        size = np.sqrt(np.mean(v**2))
        gradient = eqx.filter_grad(lambda field: evaluated(field, batch, scales=(0.2,))[0])(field)
        value, metrics = evaluated(field, batch, scales=(0.2,))
    np.testing.assert_allclose(gradient.shift, -2 * (v / size).sum(axis=0) / (2 * 32 * unit), rtol=1e-6)
    np.testing.assert_allclose(gradient.matrix, -2 * (v / size).T @ eps / (2 * 32 * unit), rtol=1e-6)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)  # forces are divided by their size
    np.testing.assert_allclose(metrics["drift"].value, size, rtol=1e-6)


def test_forces_of_all_scales_are_added_with_the_same_size():
    batch = mfx.Batch(draws(32))
    slopes = {
        scales: eqx.filter_grad(lambda field, scales=scales: evaluated(field, batch, scales=scales)[0])(affine()).shift
        for scales in ((0.05,), (0.2,), (0.05, 0.2))
    }
    np.testing.assert_allclose(slopes[0.05, 0.2], slopes[(0.05,)] + slopes[(0.2,)], rtol=1e-4)


def test_the_unit_of_features_makes_no_difference():
    batch = mfx.Batch(draws(32))
    metrics = [evaluated(affine(), batch, features=lambda x, unit=unit: unit * x)[1] for unit in (1, 1000)]
    np.testing.assert_allclose(*(found["drift"].value for found in metrics), rtol=1e-4)


def test_samples_move_towards_the_data_of_their_own_label_alone():
    label = np.repeat(np.arange(2, dtype=np.int32), 16)
    x = draws(32) * 0.1 + np.where(label[:, None] == 0, 5.0, -5.0)

    def slope(condition):
        def loss(shift):
            field = eqx.tree_at(lambda field: field.shift, affine(), jnp.zeros(2))
            return evaluated(Shifted(field, shift), mfx.Batch(x, condition))[0]

        return jax.grad(loss)(jnp.zeros((2, 2)))

    moved = -slope(label)
    assert np.all(moved[0] > 0) and np.all(moved[1] < 0)


class Shifted(mfx.AbstractField):
    """A field with a shift of the samples of each label."""

    field: mfx.AbstractField
    shift: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, r, t) - self.shift[condition]


def test_a_label_with_one_row_does_not_move():
    batch = mfx.Batch(draws(2), np.arange(2, dtype=np.int32))
    field = Shifted(affine(), jnp.zeros((2, 2)))
    value, gradient = eqx.filter_value_and_grad(lambda field: evaluated(field, batch)[0])(field)
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_features_that_are_all_equal_do_not_move():
    def loss(field):
        return evaluated(field, mfx.Batch(draws(8)), features=lambda x: 0 * x + 0.3)[0]

    value, gradient = eqx.filter_value_and_grad(loss)(affine())
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("scales", "message"),
    [((), "scales must be at least one, got none"), ((0.0, 0.1), "scales must be > 0 and finite"), (0.1, "a tuple")],
)
def test_scales_that_are_none_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        mfx.Drifting(scales=scales)
