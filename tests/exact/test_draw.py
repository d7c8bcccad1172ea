"""Batches of fresh data."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mf_eqx import exact

MIXTURE = exact.GaussianMixture(jnp.array([[-5.0, 0.0], [5.0, 0.0]]), 0.1, label=jnp.array([0, 1]))


def test_rows_are_samples_by_keys_of_their_own():
    found = exact.draw(MIXTURE, 8, jr.key(0))
    sample = jax.jit(lambda key: MIXTURE.sample(key=key))
    np.testing.assert_allclose(found, [np.asarray(sample(key)) for key in jr.split(jr.key(0), 8)], rtol=1e-6)
    np.testing.assert_array_equal(exact.Draw(MIXTURE, 8)(jr.key(0)).x, found)


def test_labels_are_those_of_the_rows():
    batch = exact.DrawLabelled(MIXTURE, 64)(jr.key(1))
    np.testing.assert_array_equal(batch.condition, (batch.x[:, 0] > 0).astype(np.int32))
    assert 0 < batch.condition.sum() < 64
