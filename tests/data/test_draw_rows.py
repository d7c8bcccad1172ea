"""Rows drawn on the device."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import data


def test_rows_keep_their_labels_and_all_are_drawn_in_the_end():
    draw = data.DrawRows(jnp.arange(6.0)[:, None], 10 * jnp.arange(6), 5)
    batches = [draw(jr.key(seed)) for seed in range(20)]
    x = np.concatenate([batch.x for batch in batches])
    np.testing.assert_array_equal(10 * x[:, 0], np.concatenate([batch.condition for batch in batches]))
    assert set(x[:, 0].tolist()) == set(range(6)) and len(x) == 100


def test_rows_without_labels_are_drawn_without():
    batch = data.DrawRows(jnp.arange(6.0)[:, None], None, 5)(jr.key(0))
    assert batch.condition is None and batch.x.shape == (5, 1)


def test_same_rows_are_drawn_with_labels_and_without():
    x = jnp.arange(6.0)[:, None]
    with_label, without = (data.DrawRows(x, label, 5)(jr.key(0)).x for label in (jnp.arange(6), None))
    np.testing.assert_array_equal(with_label, without)


def test_batch_may_be_an_integer_of_numpy():
    assert len(data.DrawRows(jnp.arange(6.0), None, np.int8(5))(jr.key(0)).x) == 5


@pytest.mark.parametrize(
    ("x", "label", "batch", "message"),
    [
        (jnp.zeros((6, 1)), None, 0, "batch must be an integer >= 1, got 0"),
        (jnp.zeros((6, 1)), None, 2.5, "batch must be an integer >= 1, got 2.5"),
        (jnp.zeros((6, 1)), None, True, "batch must be an integer >= 1, got True"),
        (
            jnp.zeros((6, 1)),
            jnp.zeros(3, int),
            2,
            r"condition must have a leading axis of the 6 rows, got shape \(3,\)",
        ),
        (jnp.zeros((0, 1)), None, 2, r"x must have at least one row, got shape \(0, 1\)"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused_when_it_is_made(unchecked, x, label, batch, message):
    with pytest.raises(ValueError, match=message):
        data.DrawRows(x, label, batch)
