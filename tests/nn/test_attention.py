import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled, FusedAttention, refilled

import mf_eqx as mfx
from mf_eqx import nn
from mf_eqx.nn._attention import _weights


def reference_mix(query, key, value):
    """softmax(q k^T / sqrt(d)) v, head by head and token by token, in numpy."""
    query, key, value = (np.asarray(part) for part in (query, key, value))
    tokens, heads, size = value.shape
    mixed = np.zeros_like(value)
    for head, i in itertools.product(range(heads), range(tokens)):
        weights = np.exp([query[i, head] @ key[j, head] / np.sqrt(size) for j in range(tokens)])
        mixed[i, head] = sum(w * value[j, head] for j, w in enumerate(weights / weights.sum()))
    return mixed


def reference_attention(layer, x):
    x, (tokens, width) = np.asarray(x), x.shape
    joint = x @ np.asarray(layer.qkv.weight) + np.asarray(layer.qkv.bias)
    parts = [part.reshape(tokens, layer.heads, -1) for part in np.split(joint, 3, axis=1)]
    for i, norm in enumerate((layer.query_norm, layer.key_norm)):
        if norm is not None:
            root = np.sqrt((parts[i] ** 2).mean(axis=-1, keepdims=True) + 1e-6)
            parts[i] = parts[i] / root * np.asarray(norm.weight)
    mixed = reference_mix(*parts).reshape(tokens, width)
    return mixed @ np.asarray(layer.out.weight) + np.asarray(layer.out.bias)


@pytest.mark.parametrize(("heads", "qk_norm"), [(1, False), (3, False), (3, True)])
def test_attention_is_a_softmax_over_tokens_in_every_head(x64, heads, qk_norm):
    layer = nn.cast(filled(lambda: nn.SelfAttention(12, heads, qk_norm=qk_norm, key=jr.key(0))), jnp.float64)
    if qk_norm:
        scales = lambda layer: (layer.query_norm.weight, layer.key_norm.weight)  # noqa: E731
        layer = eqx.tree_at(scales, layer, (jnp.arange(1.0, 5.0), jnp.arange(-2.0, 2.0)))
    x = jr.normal(jr.key(2), (5, 12))
    np.testing.assert_allclose(eqx.filter_jit(layer)(x), reference_attention(layer, x), rtol=1e-10, atol=1e-12)


def test_attention_passes_a_jvp_that_equals_finite_differences(x64):
    layer = nn.cast(filled(lambda: nn.SelfAttention(8, 2, key=jr.key(0))), jnp.float64)

    @jax.jit  # some attention kernels refuse forward mode only when lowered
    def both(x, dx):
        return jax.jvp(layer, (x,), (dx,))[1], (layer(x + 1e-5 * dx) - layer(x - 1e-5 * dx)) / 2e-5

    derivative, difference = both(*jr.normal(jr.key(2), (2, 5, 8)))
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


class OnlyValues(nn.AbstractAttention):
    """Every token minds itself alone."""

    def __call__(self, query, key, value):
        return value

    def forward_mode(self):
        return self


def test_layer_mixes_by_the_attention_it_is_given():
    layer = nn.SelfAttention(8, 2, attention=OnlyValues(), key=jr.key(0))
    x = jr.normal(jr.key(2), (5, 8))
    np.testing.assert_allclose(layer(x), layer.out(layer.qkv(x)[:, 16:]), rtol=1e-6)


# Attention as an object

KERNEL = FusedAttention(value_factor=3.0, gradient_factor=5.0)  # so that its value and its backward pass can be told


@functools.cache
def triples():
    """(query, key, value) and a tangent of each, in float64."""
    return tuple(tuple(jr.normal(jr.key(seed), (3, 5, 2, 4), jnp.float64)) for seed in (0, 1))


def low_precision(sharpness):
    """The same in bfloat16, with logits of about `sharpness`."""
    inputs, tangents = nn.cast(triples(), jnp.float32)
    return nn.cast(((sharpness * inputs[0], *inputs[1:]), tangents), jnp.bfloat16)


def distance(found, exact):
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@functools.cache
def derivatives(attention):
    """Value, and reverse-mode gradient of a function of it, at the triple."""

    def loss(*inputs):
        value = attention(*inputs)
        return jnp.sum(jnp.sin(value)), value

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*triples()[0])


def test_xla_attention_equals_one_in_numpy(x64):
    np.testing.assert_allclose(nn.XLAAttention()(*triples()[0]), reference_mix(*triples()[0]), rtol=1e-12)


def test_stand_in_for_a_kernel_is_attention_with_a_right_backward_pass(x64):
    (_, value), gradient = derivatives(FusedAttention())
    (_, expected), expected_gradient = derivatives(nn.XLAAttention())
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-13)


def test_stand_in_for_a_kernel_refuses_forward_mode(x64):
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(KERNEL, *triples())


def jvp_in(attention, moving, inputs, tangents):
    """The JVP with tangents on those of (query, key, value) that are in `moving`."""

    def along(*moved):
        full = list(inputs)
        for i, part in zip(moving, moved, strict=True):
            full[i] = part
        return attention(*full)

    return jax.jvp(along, tuple(inputs[i] for i in moving), tuple(tangents[i] for i in moving))


SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(range(3), size)]


@pytest.mark.parametrize("moving", SUBSETS, ids=["".join("qkv"[i] for i in subset) for subset in SUBSETS])
def test_stopped_tangent_has_the_value_of_its_kernel_and_the_tangent_of_attention(x64, moving):
    value, tangent = jvp_in(nn.StoppedTangent(KERNEL), moving, *triples())
    expected, expected_tangent = jvp_in(nn.XLAAttention(), moving, *triples())
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-12)
    np.testing.assert_allclose(tangent, expected_tangent, rtol=1e-12, atol=1e-12)


def two_rows():
    return tuple(tuple(jnp.stack([part, part / 2]) for part in parts) for parts in triples())


def gradient_beside(how):
    """In q, k, v, of a function of value and tangent of a JVP, for two rows, in one compiled program."""
    inputs, tangents = two_rows()

    def loss(*inputs):
        both = jax.vmap(lambda *row: jax.jvp(nn.StoppedTangent(KERNEL), row[:3], row[3:]))(*inputs, *tangents)
        return jnp.sum(how(*both))

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)


def test_gradient_of_the_value_beside_a_stopped_tangent_is_the_backward_pass_of_the_kernel(x64):
    def plain(*inputs):
        value, backward = jax.vjp(jax.vmap(nn.XLAAttention()), *inputs)
        return backward(jnp.cos(KERNEL.value_factor * value))

    found = gradient_beside(lambda value, tangent: jnp.sin(value))
    expected = jax.jit(plain)(*two_rows()[0])
    for gradient, part in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, KERNEL.gradient_factor * part, rtol=1e-12, atol=1e-12)


def test_stopped_tangent_passes_reverse_mode_alone(x64):
    # As where attention depends on the condition and not on what forward mode moves.
    inputs = jr.normal(jr.key(5), (3, 4, 2, 3))

    def gradient(attention):
        return jax.jit(jax.grad(lambda inputs: jnp.sum(jnp.sin(attention(*inputs)))))(inputs)

    found = gradient(nn.StoppedTangent(FusedAttention()))
    np.testing.assert_allclose(found, gradient(nn.XLAAttention()), rtol=1e-10, atol=1e-12)


ATTENTIONS = [nn.XLAAttention(), nn.StoppedTangent(FusedAttention())]


# Logits of about 30 are off by up to 0.1 in bfloat16: they must be taken in float32.
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=["XLA", "stopped tangent"])
def test_bfloat16_inputs_give_bfloat16_values_and_tangents_near_those_of_float32(x64, attention, sharpness):
    inputs, tangents = low_precision(sharpness)
    found = jax.jvp(attention, inputs, tangents)
    exact = jax.jvp(nn.XLAAttention(), *nn.cast((inputs, tangents), jnp.float64))
    for result, expected in zip(found, exact, strict=True):
        assert result.dtype == jnp.bfloat16
        # Weights, products and their sum are rounded to eight bits, each by at most 2^-9 of itself.
        assert distance(result, expected) < 3 * 2**-9


def test_attention_in_xla_is_its_own_form_for_forward_mode():
    attention = nn.XLAAttention()
    assert attention.forward_mode() is attention


def test_stopped_tangent_is_its_own_form_for_forward_mode():
    attention = nn.StoppedTangent(KERNEL)
    assert attention.forward_mode() is attention


# cuDNN


def test_cudnn_attention_differentiates_forwards_by_a_stopped_tangent_of_itself():
    assert nn.CudnnAttention().forward_mode() == nn.StoppedTangent(nn.CudnnAttention())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_cudnn_attention_refuses_other_precisions(x64, dtype):
    inputs = nn.cast(triples()[0], dtype)
    remedy = rf"must be given bfloat16 or float16 \(dtype of the field\), got {jnp.dtype(dtype).name}"
    with pytest.raises(ValueError, match=remedy):
        nn.CudnnAttention()(*inputs)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it runs there")
def test_cudnn_attention_refuses_other_devices(x64):
    with pytest.raises(ValueError, match=r"must run on an NVIDIA GPU, got \w+: use XLAAttention"):
        nn.CudnnAttention()(*low_precision(1.0)[0])


def value_and_gradient(attention, inputs):
    value, backward = jax.vjp(attention, *inputs)
    return value, jnp.stack(backward(jnp.cos(value)))


def meanflow_gradient(attention, dtype):
    """Of the loss of four rows, one with the identity, of a DiT with 256 tokens and heads of size 64."""
    size = mfx.DiTSize(depth=2, width=128, heads=2, patch=2)
    field = refilled(mfx.DiT((4, 32, 32), size, attention=attention, dtype=dtype, key=jr.key(0)))
    batch = mfx.Batch(jr.normal(jr.key(1), (4, 4, 32, 32)))

    @jax.jit
    def gradient(field):
        return jax.grad(lambda field: mfx.Objective()(field, batch, key=jr.key(2))[0])(field)

    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(field))])


def no_worse(found, usual, exact):
    """No further from float32 than XLA's attention in bfloat16 is, up to a factor.

    The two round to bfloat16 in different places, so that their errors are of one size, but not equal: 2.
    """
    return distance(found, exact) <= 2 * distance(usual, exact) < 0.1


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN")
def test_cudnn_attention_is_as_near_to_float32_as_xla_attention_in_bfloat16():
    inputs = tuple(jr.normal(jr.key(0), (3, 256, 2, 64), jnp.bfloat16))
    with jax.default_matmul_precision("highest"):  # float32 and not TF32
        exact = value_and_gradient(nn.XLAAttention(), nn.cast(inputs, jnp.float32))
    found, usual = (value_and_gradient(attention, inputs) for attention in (nn.CudnnAttention(), nn.XLAAttention()))
    for parts in zip(found, usual, exact, strict=True):
        assert no_worse(*parts)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN")
def test_meanflow_gradient_with_cudnn_attention_is_as_near_to_float32_as_with_xla_attention_in_bfloat16():
    with jax.default_matmul_precision("highest"):
        exact = meanflow_gradient(nn.XLAAttention(), jnp.float32)
    found, usual = (meanflow_gradient(a, jnp.bfloat16) for a in (nn.CudnnAttention(), nn.XLAAttention()))
    assert no_worse(found, usual, exact)


def test_weights_have_the_derivatives_of_softmax_and_keep_only_themselves(x64):
    query, key = jr.normal(jr.key(0), (2, 3, 2, 4))

    def plain(query):
        return jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key) / 2, axis=-1)

    def weights(query):
        return _weights(query, key)

    @jax.jit
    def derivatives(query):
        kinds = (jax.jacfwd, jax.jacrev, lambda f: jax.jacrev(jax.jacfwd(f)))
        return [[derivative(function)(query) for function in (weights, plain)] for derivative in kinds]

    for found, expected in derivatives(query):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    kept = jax.tree.leaves(jax.vjp(weights, query)[1])
    assert sum(leaf.size == 2 * 3 * 3 for leaf in kept) == 1
