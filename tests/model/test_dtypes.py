"""Every network under strict promotion of dtypes, for computations of any precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import mf_eqx as mfx

NETWORKS = {
    "MLP": (lambda dtype: mfx.MLP(3, width=8, depth=1, dtype=dtype, key=jr.key(0)), (3,)),
    "DiT": (lambda dtype: mfx.DiT((1, 4, 4), mfx.DiTSize(1, 8, 2, 2), dtype=dtype, key=jr.key(0)), (1, 4, 4)),
    "InContextDiT": (
        lambda dtype: mfx.InContextDiT(
            (1, 4, 4), mfx.InContextDiTSize(2, 8, 2, 2, 1), velocity_head=True, dtype=dtype, key=jr.key(0)
        ),
        (1, 4, 4),
    ),
    "UNet": (lambda dtype: mfx.UNet((1, 4, 4), mfx.UNetSize(4, (1,), 1, ()), dtype=dtype, key=jr.key(0)), (1, 4, 4)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("network", NETWORKS)
def test_network_of_any_dtype_promotes_nothing_by_itself(network, dtype, x64):
    make, shape = NETWORKS[network]
    precision = "float64" if dtype == "float64" else "float32"

    def with_precision(leaf):
        is_float = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, precision) if is_float else leaf

    field = jax.tree.map(with_precision, eqx.filter_eval_shape(make, dtype))
    state, time = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), precision)
    with jax.numpy_dtype_promotion("strict"):
        u = eqx.filter_eval_shape(lambda field, *at: field(*at), field, state, time, time)
    assert u.dtype == precision
