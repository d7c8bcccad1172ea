"""Rows drawn on the device."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mf_eqx import data


def test_rows_keep_their_labels_and_all_are_drawn_in_the_end():
    draw = data.DrawRows(jnp.arange(6.0)[:, None], 10 * jnp.arange(6), 5)
    batches = [draw(jr.key(seed)) for seed in range(20)]
    x = np.concatenate([batch.x for batch in batches])
    np.testing.assert_array_equal(10 * x[:, 0], np.concatenate([batch.condition for batch in batches]))
    assert set(x[:, 0].tolist()) == set(range(6)) and len(x) == 100
