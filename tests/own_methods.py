"""Files of a user's own, as text: with two methods, one that any batch can have, and one that takes rows by threes;
and with a network of images."""

OWN = """
import mf_eqx as mfx

class Mine(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.r, row.t) - row.v

class Triples(mfx.AbstractIdentityWithLoss):
    facts = mfx.Facts(group=3)

    def residual_and_loss(self, field, rows):
        return rows.v, 0.0
"""

OWN_NETWORK = """
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mf_eqx as mfx

class Net(mfx.AbstractField):
    table: eqx.nn.Embedding
    first: eqx.nn.Conv2d
    last: eqx.nn.Conv2d

    def __init__(self, shape, labels=0, *, key):
        keys = jr.split(key, 3)
        self.table = eqx.nn.Embedding(labels + 1, 8, key=keys[0])
        self.first = eqx.nn.Conv2d(shape[0] + 2, 8, 3, padding=1, key=keys[1])
        self.last = eqx.nn.Conv2d(8, shape[0], 3, padding=1, key=keys[2])

    def __call__(self, z, r, t, condition=None, *, key=None):
        times = [jnp.broadcast_to(time, (1, *z.shape[1:])) for time in (t, t - r)]
        h = self.first(jnp.concatenate([z, *times]))
        h = h if condition is None else h + self.table(condition)[:, None, None]
        return self.last(jax.nn.silu(h))
"""
