"""Conditions as tokens."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

from mf_eqx import nn


def embedding(width=3):
    return filled(lambda: nn.ScalarEmbedding(width, size=4, key=jr.key(0)))


def test_number_is_embedded_by_two_layers_on_its_sinusoidal_embedding():
    layers = embedding()
    x = nn.sinusoidal_embedding(0.7, 4) @ layers.hidden.weight + layers.hidden.bias
    expected = jax.nn.silu(x) @ layers.out.weight + layers.out.bias
    np.testing.assert_allclose(layers(0.7), expected, rtol=1e-6)


def test_every_token_is_its_own_vector_plus_the_same_embedding():
    tokens = filled(lambda: nn.ConditionTokens(5, 3, embedding(), key=jr.key(0)))
    np.testing.assert_allclose(tokens(0.7), tokens.vectors + tokens.embedding(0.7), rtol=1e-6)
    assert len(np.unique(tokens.vectors)) == 15


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_several_rows_are_refused():
    with pytest.raises(ValueError, match=r"condition must be one number of shape \(\), got shape \(2,\)"):
        embedding()(jnp.ones(2))


def test_embedding_of_another_width_is_refused():
    tokens = filled(lambda: nn.ConditionTokens(5, 4, embedding(), key=jr.key(0)))
    with pytest.raises(ValueError, match=r"condition must be embedded as shape \(4,\), got \(3,\) of ScalarEmbedding"):
        tokens(0.7)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: nn.ConditionTokens(0, 4, embedding(), key=jr.key(0)), "count must be an integer >= 1, got 0"),
        (lambda: nn.ScalarEmbedding(4, size=3, key=jr.key(0)), "size must be even and positive, got 3"),
    ],
    ids=["no token", "odd size"],
)
def test_sizes_that_make_no_sense_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()
