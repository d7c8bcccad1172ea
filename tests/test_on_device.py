"""Is it right on the device at hand? Networks and kernels against float64 on the CPU. There this says that the tests
work; on an accelerator it is the first thing to know, before anything is timed.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import nn

SMALL_DIT = (4, 16, 16), lambda: mfx.DiT((4, 16, 16), mfx.DiTSize(2, 64, 2, 4), labels=3, key=jr.key(0))
SMALL_UNET = (3, 8, 8), lambda: mfx.UNet((3, 8, 8), mfx.UNetSize(16, (1, 2), 1, (4,)), labels=3, key=jr.key(0))
SLOW = [pytest.mark.slow] if jax.default_backend() == "cpu" else []
NETWORKS = [pytest.param(SMALL_DIT, id="DiT"), pytest.param(SMALL_UNET, id="U-Net", marks=SLOW)]


def distance(found, exact):
    """Of two trees, relative to the norm of the second."""
    found, exact = ([np.asarray(leaf, float) for leaf in jax.tree.leaves(tree)] for tree in (found, exact))
    squares = [(np.sum((f - e) ** 2), np.sum(e**2)) for f, e in zip(found, exact, strict=True)]
    return float(np.sqrt(sum(error for error, _ in squares) / sum(norm for _, norm in squares)))


@eqx.filter_jit
def derivatives(field, z, v):
    """Value, du/dt and a gradient of a network in one row."""

    def value(field):
        return field(z, 0.3, 0.8, jnp.asarray(1))

    total = mfx.total_derivative(field, z, v, 0.3, 0.8, jnp.asarray(1))
    gradient = eqx.filter_grad(lambda field: jnp.sum(jnp.sin(value(field))))(field)
    return value(field), total, gradient.embedding


@pytest.fixture
def cpu():
    """Which has to be there beside an accelerator."""
    try:
        jax.devices("cpu")
    except RuntimeError as error:
        pytest.skip(f"JAX_PLATFORMS must name cpu as well: {error}")


def errors(network, precision):
    """Of the three, in float32 with products of this precision here, against float64 on the CPU."""
    data_shape, make = network
    z, v = jnp.asarray(np.random.default_rng(1).standard_normal((2, *data_shape)), jnp.float32)
    field = filled(make)
    with jax.default_matmul_precision(precision):
        found = derivatives(field, z, v)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        # From the host: an array that lies on a device is used there.
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, float) if eqx.is_inexact_array(leaf) else leaf, (field, z, v))
        exact = derivatives(*jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf, wide))
    return [distance(*pair) for pair in zip(found, exact, strict=True)]


@pytest.mark.parametrize("network", NETWORKS)
def test_with_exact_products_value_tangent_and_gradient_are_those_of_float64(unchecked, cpu, network):
    assert max(errors(network, "highest")) < 1e-5


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="all products are exact there")
@pytest.mark.parametrize("network", NETWORKS)
def test_with_the_products_of_the_device_value_tangent_and_gradient_are_near_those_of_float64(unchecked, cpu, network):
    # TF32 rounds factors to 11 bits, bfloat16, which TPUs take, to 8.
    assert max(errors(network, "default")) < (1e-2 if jax.default_backend() == "gpu" else 0.05)


# cuDNN's attention


def along(attention, inputs, tangents):
    """Value, tangent and gradient of an attention in bfloat16, all jitted."""

    @jax.jit
    def all_three(inputs, tangents):
        value, tangent = jax.jvp(jax.vmap(attention.forward_mode()), inputs, tangents)
        gradient = jax.grad(lambda inputs: jnp.sum(jnp.sin(jax.vmap(attention)(*inputs).astype(jnp.float32))))(inputs)
        return value, tangent, gradient

    return nn.cast(all_three(inputs, tangents), jnp.float32)


def errors_and_those_of_xla(attention, dtype, tokens, size):
    """Of value, tangent and the three gradients, against float32 with exact products."""
    inputs, tangents = jr.normal(jr.key(0), (2, 3, 4, tokens, 2, size), dtype)
    inputs, tangents = tuple(inputs), tuple(tangents)
    with jax.default_matmul_precision("highest"):
        exact = along(nn.XLAAttention(), *nn.cast((inputs, tangents), jnp.float32))
    pairs = zip(*(along(kind, inputs, tangents) for kind in (attention, nn.XLAAttention())), exact, strict=True)
    return [(distance(found, expected), distance(usual, expected)) for found, usual, expected in pairs]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN")
@pytest.mark.parametrize("size", [64, 72])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_cudnn_attention_is_as_near_to_float32_as_that_of_xla(tokens, size):
    for error, usual in errors_and_those_of_xla(nn.CudnnAttention(), jnp.bfloat16, tokens, size):
        # Both round to bfloat16, in different places: errors are of one size, and not equal.
        assert error <= 2 * usual < 0.1


# Kernels in Pallas


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="kernels for GPUs")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("size", [64, 72])
@pytest.mark.parametrize("tokens", [64, 100, 256, 1024])
def test_attention_in_pallas_is_as_near_to_float32_as_that_of_xla(tokens, size):
    for error, usual in errors_and_those_of_xla(nn.PallasAttention(), jnp.bfloat16, tokens, size):
        assert error <= 2 * usual < 0.1


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="kernels for GPUs")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("size", [64, 72])
def test_attention_in_pallas_in_float32_is_that_of_xla(size):
    with jax.default_matmul_precision("highest"):
        errors = errors_and_those_of_xla(nn.PallasAttention(), jnp.float32, 100, size)
    assert max(error for error, _ in errors) < 1e-5
