import jax
import jax.numpy as jnp

from mf_eqx import nn


def test_cast_changes_inexact_arrays_and_nothing_else():
    tree = {"weight": jnp.ones(2), "index": jnp.arange(2), "name": "block", "rate": 0.5}
    result = nn.cast(tree, jnp.bfloat16)
    assert result["weight"].dtype == jnp.bfloat16
    assert result["index"].dtype == tree["index"].dtype
    assert (result["name"], result["rate"]) == ("block", 0.5)


def test_gradients_through_a_cast_arrive_in_the_precision_of_the_parameters():
    gradient = jax.grad(lambda w: jnp.sum(nn.cast(w, jnp.bfloat16) ** 2).astype(jnp.float32))(jnp.ones(3))
    assert gradient.dtype == jnp.float32
