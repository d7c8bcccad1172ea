import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import refilled

from mf_eqx import nn


def reference_attention(layer, x):
    """softmax(q k^T / sqrt(d)) v, head by head, in numpy."""
    x, (tokens, width) = np.asarray(x), x.shape
    joint = x @ np.asarray(layer.qkv.weight) + np.asarray(layer.qkv.bias)
    query, key, value = joint[:, :width], joint[:, width : 2 * width], joint[:, 2 * width :]
    size = width // layer.heads
    mixed = np.zeros((tokens, width))
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(tokens):
            weights = np.exp([query[i, part] @ key[j, part] / np.sqrt(size) for j in range(tokens)])
            mixed[i, part] = sum(w * value[j, part] for j, w in enumerate(weights / weights.sum()))
    return mixed @ np.asarray(layer.out.weight) + np.asarray(layer.out.bias)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_a_softmax_over_tokens_in_every_head(x64, heads):
    layer = nn.cast(refilled(nn.SelfAttention(12, heads, key=jr.key(0))), jnp.float64)
    x = jr.normal(jr.key(2), (5, 12))
    np.testing.assert_allclose(layer(x), reference_attention(layer, x), rtol=1e-10, atol=1e-12)


def test_attention_passes_a_jvp_that_equals_finite_differences(x64):
    layer = nn.cast(refilled(nn.SelfAttention(8, 2, key=jr.key(0))), jnp.float64)
    x, dx = jr.normal(jr.key(2), (2, 5, 8))
    # Jitted: some attention kernels refuse forward mode only when lowered.
    _, derivative = jax.jit(lambda x, dx: jax.jvp(layer, (x,), (dx,)))(x, dx)
    difference = (layer(x + 1e-5 * dx) - layer(x - 1e-5 * dx)) / 2e-5
    np.testing.assert_allclose(derivative, difference, rtol=1e-7, atol=1e-9)


def test_tokens_have_no_order_of_their_own():
    layer = nn.SelfAttention(8, 2, key=jr.key(0))
    x = jr.normal(jr.key(2), (6, 8))
    np.testing.assert_allclose(layer(x[::-1]), layer(x)[::-1], rtol=1e-5, atol=1e-6)


def test_joint_qkv_matrix_is_initialised_as_one():
    layer = nn.SelfAttention(200, 2, key=jr.key(0))
    np.testing.assert_allclose(abs(layer.qkv.weight).max(), np.sqrt(6 / 800), rtol=1e-3)  # fans 200 and 600


@pytest.mark.parametrize("heads", [5, 0])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(ValueError, match=f"width must be a multiple of heads, got width 12 and heads {heads}"):
        nn.SelfAttention(12, heads, key=jr.key(0))
