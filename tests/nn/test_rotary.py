"""Rotary positions as complex numbers, and the attention that uses them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import refilled

from mf_eqx import nn


def as_complex(x):
    """Neighbouring features as real and imaginary parts."""
    return np.asarray(x[..., 0::2]) + 1j * np.asarray(x[..., 1::2])


def test_pairs_are_complex_numbers_that_are_turned_by_position_times_frequency(x64):
    x = jr.normal(jr.key(0), (5, 2, 6))
    frequencies = np.array([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    turns = np.exp(1j * np.arange(5)[:, None] * frequencies)
    found = nn.rotate(x, nn.rotary_line_angles(5, 6))
    np.testing.assert_allclose(as_complex(found), as_complex(x) * turns[:, None], rtol=1e-12)


def test_products_depend_on_the_difference_of_positions_alone(x64):
    query, key = jr.normal(jr.key(0), (2, 1, 1, 8))
    angles = nn.rotary_line_angles(9, 8, base=50.0)
    turned = [nn.rotate(jnp.tile(part, (9, 1, 1)), angles)[:, 0] for part in (query, key)]
    products = np.asarray(turned[0] @ turned[1].T)
    np.testing.assert_allclose(products[3:, 3:], products[:-3, :-3], rtol=1e-10)
    assert np.ptp(products[0]) > 0.1


def test_positions_in_a_grid_turn_the_first_half_by_the_row_and_the_second_by_the_column():
    angles = nn.rotary_angles(2, 3, 8)
    rows, columns = nn.rotary_line_angles(2, 4), nn.rotary_line_angles(3, 4)
    np.testing.assert_array_equal(angles, [[*rows[i], *columns[j]] for i in range(2) for j in range(3)])


def test_angles_of_bfloat16_features_are_not_rounded():
    # In bfloat16 the angle 257 would be 256.
    x = jnp.zeros((258, 1, 2), jnp.bfloat16).at[:, :, 0].set(1)
    found = nn.rotate(x, nn.rotary_line_angles(258, 2))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[257, 0], [np.cos(257), np.sin(257)], atol=2**-8)


@pytest.mark.parametrize("sizes", [(4, 3), (4, 0), (0, 4)])
def test_a_line_of_no_length_and_heads_of_odd_size_are_refused(sizes):
    with pytest.raises(ValueError, match=r"size must be a positive multiple of 2, got|length must be an integer >= 1"):
        nn.rotary_line_angles(*sizes)


@pytest.mark.parametrize("sizes", [(2, 2, 6), (0, 2, 4)])
def test_grids_of_no_size_and_heads_without_quarters_are_refused(sizes):
    with pytest.raises(
        ValueError, match=r"size must be a positive multiple of 4, got 6|height must be an integer >= 1"
    ):
        nn.rotary_angles(*sizes)


# Attention


class First(nn.AbstractAttention):
    """Recognisable: the value of the first token, plus queries and keys of every token."""

    def __call__(self, query, key, value):
        return value[:1] + query + key

    def forward_mode(self):
        return self


def test_queries_and_keys_are_normalised_in_every_head_and_then_turned(x64):
    layer = refilled(nn.RotarySelfAttention(8, 2, attention=First(), key=jr.key(0)))
    x, angles, gate = jr.normal(jr.key(1), (3, 8)), nn.rotary_line_angles(3, 4), jnp.arange(8.0)
    query, key, value = ((x @ part.weight).reshape(3, 2, 4) for part in (layer.queries, layer.keys, layer.values))
    query, key = nn.rotate(layer.query_norm(query), angles), nn.rotate(layer.key_norm(key), angles)
    expected = (value[:1] + query + key).reshape(3, 8) @ layer.out.weight * gate
    np.testing.assert_allclose(layer(x, angles, gate), expected, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(query**2, axis=-1), np.ones((3, 2)), rtol=1e-3)  # turning keeps the length


def test_rotary_attention_has_no_biases():
    shapes = jax.eval_shape(lambda: nn.RotarySelfAttention(8, 2, attention=First(), key=jr.key(0)))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(shapes)) == [(4,)] * 2 + [(8, 8)] * 4


@pytest.mark.parametrize(("width", "rule"), [(7, "width must be a multiple of heads"), (6, "heads of even size")])
def test_widths_that_do_not_make_even_heads_are_refused(width, rule):
    with pytest.raises(ValueError, match=rule):
        nn.RotarySelfAttention(width, 2, key=jr.key(0))
