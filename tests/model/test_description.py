"""Networks as values that JSON can hold: the same network comes back, and what cannot come back is refused by name."""

import functools
import inspect
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from fields import FusedAttention, GaussianField

import mf_eqx as mfx
from mf_eqx import nn

SIZE, UNET_SIZE = mfx.DiTSize(2, 8, 2, 2), mfx.UNetSize(4, (1, 2), 1, ())
NETWORKS = {
    "MLP": lambda **how: mfx.MLP(3, width=8, depth=2, **how),
    "MLP with labels": lambda **how: mfx.MLP(2, width=8, depth=1, labels=3, condition_width=4, **how),
    "MLP with vectors": lambda **how: mfx.MLP(
        2, width=8, condition=5, fourier_features=6, fourier_scale=2.0, time_scale=3.0, **how
    ),
    "DiT": lambda **how: mfx.DiT((3, 4, 8), SIZE, time_scale=2.0, **how),
    "DiT with labels": lambda **how: mfx.DiT((3, 4, 4), SIZE, labels=3, time_variables=nn.end_start, **how),
    "DiT with vectors": lambda **how: mfx.DiT((1, 8), SIZE, condition=5, early_blocks=1, qk_norm=True, **how),
    "DiT with an embedding of vectors": lambda **how: mfx.DiT(
        (1, 8), SIZE, condition=nn.VectorEmbedding(5, 8, key=jr.key(1)), **how
    ),
    "InContextDiT": lambda **how: mfx.InContextDiT(
        (3, 4, 8), mfx.InContextDiTSize(3, 8, 2, 2, 1), labels=3, guidance=True, velocity_head=True, **how
    ),
    "InContextDiT with vectors": lambda **how: mfx.InContextDiT(
        (1, 8), mfx.InContextDiTSize(2, 8, 2, 2, 1), condition=5, tokens=mfx.TokenCounts(time=2), time_scale=2.0, **how
    ),
    "InContextDiT of pixels": lambda **how: mfx.InContextDiT(
        (3, 8, 8), mfx.InContextDiTSize(2, 8, 2, 4, 1, bottleneck=3, learned_positions=True, grid=True), **how
    ),
    "UNet": lambda **how: mfx.UNet((3, 8, 8), UNET_SIZE, augmentation=6, dropout=0.25, **how),
    "UNet with labels": lambda **how: mfx.UNet((1, 8, 8), UNET_SIZE, labels=3, time_variables=nn.duration, **how),
    "UNet with vectors": lambda **how: mfx.UNet((3, 8, 16), UNET_SIZE, condition=5, **how),
}


@functools.cache
def shapes(make):
    """A network without numbers: nothing is compiled."""
    return eqx.filter_eval_shape(lambda: make(key=jr.key(0)))


def same(a, b):
    """Whether two networks have equal arrays, by shape and dtype, and all else equal."""
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.leaves(a) == jax.tree.leaves(b)


# Types are checked by other tests: to check them here takes half of the time.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_network_is_made_from_its_description_as_json(name):
    field = shapes(NETWORKS[name])
    described = mfx.describe(field)
    description = json.loads(json.dumps(described))
    assert description == described
    assert same(shapes(lambda key: mfx.make_network(description, key=key)), field)


@pytest.mark.parametrize("name", ["MLP with vectors", "DiT with labels", "InContextDiT", "UNet with labels"])
def test_arguments_of_a_network_make_it(name):
    field = shapes(NETWORKS[name])
    assert same(shapes(lambda key: type(field)(**field.arguments, key=key)), field)


@pytest.mark.parametrize("name", ["MLP", "DiT", "InContextDiT", "UNet"])
def test_every_argument_is_described_or_says_how_a_network_computes(name):
    described = mfx.describe(shapes(NETWORKS[name])).keys() - {"network"}
    known = inspect.signature(getattr(mfx, name)).parameters.keys()
    assert known - described == {"dtype", "key"} | (
        {"fourier_scale"} if name == "MLP" else {"attention", "remat", "unroll"}
    )


HOW = {"dtype": jnp.bfloat16, "attention": FusedAttention(), "remat": True, "unroll": 2}


@pytest.mark.parametrize(
    ("name", "how"), [("MLP", {"dtype": jnp.bfloat16}), ("DiT", HOW), ("InContextDiT", HOW), ("UNet", HOW)]
)
def test_how_a_network_computes_is_chosen_anew(name, how):
    other = shapes(lambda key: NETWORKS[name](**how, key=key))
    description = mfx.describe(other)
    assert description == mfx.describe(shapes(NETWORKS[name]))
    assert same(shapes(lambda key: mfx.make_network(description, **how, key=key)), other)


def test_arguments_that_a_description_lacks_have_their_defaults():
    description = {"network": "UNet", "data_shape": [3, 8, 8], "size": UNET_SIZE._asdict()}
    assert same(
        shapes(lambda key: mfx.make_network(description, key=key)),
        shapes(lambda key: mfx.UNet((3, 8, 8), UNET_SIZE, key=key)),
    )


# What has no description


class Sum(nn.AbstractConditionEmbedding):
    """An embedding that is no part of the package."""

    table: jax.Array

    def __call__(self, condition):
        return self.table[condition["words"]].sum(axis=0)


class Squared(nn.VectorEmbedding):
    """One of the package's with another function."""

    def __call__(self, condition):
        return nn.VectorEmbedding.__call__(self, condition**2)


def own_times(r, t):
    return (t * r,)


OTHERS = {
    r"field must be an MLP, a DiT, an InContextDiT or a UNet to be described, got GaussianField": lambda: GaussianField(
        jnp.ones(2), 1.0
    ),
    r"condition must be a vector or None for a network to be described, got the embedding Sum": lambda: shapes(
        lambda key: mfx.DiT((1, 8), SIZE, condition=Sum(jnp.ones((4, 8))), key=key)
    ),
    r"condition must be a vector or None for a network to be described, got the embedding Squared": lambda: shapes(
        lambda key: mfx.MLP(2, width=8, condition=Squared(3, 8, key=key), key=key)
    ),
    r"time_variables must be among end_duration, .* to be described, got own_times": lambda: shapes(
        lambda key: mfx.MLP(2, time_variables=own_times, key=key)
    ),
    r"field must have the arrays of its arguments to be described, got others: .embedding.times": lambda: eqx.tree_at(
        lambda field: field.embedding.times,
        shapes(NETWORKS["MLP"]),
        shapes(lambda key: nn.TimePairEmbedding(8, size=4, time_scale=10.0, key=key)),
    ),
    r"field must be made by MLP to be described, but 'Linear' object has no attribute": lambda: eqx.tree_at(
        lambda field: field.embedding, shapes(NETWORKS["MLP"]), nn.Linear(8, 8, key=jr.key(0))
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_cannot_be_made_again_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        mfx.describe(OTHERS[message]())


DIT = {"network": "DiT", "data_shape": [3, 4, 4], "size": SIZE._asdict()}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "network must be one of MLP, DiT, InContextDiT, UNet, got None"),
        ({"network": ["DiT"]}, r"network must be one of MLP, DiT, InContextDiT, UNet, got \['DiT'\]"),
        ({"network": "DiT"}, "description must be that of a DiT, but none can be made: 'size'"),
        ({**DIT, "size": {"depth": 2}}, "description must be that of a DiT, but none can be made"),
        ({**DIT, "data_shape": 7}, "description must be that of a DiT, but none can be made"),
        ({**DIT, "data_shape": [3, 4, 5]}, "patch must divide the sides of data_shape"),
        ({**DIT, "time_variables": "start"}, "description must be that of a DiT, but none can be made: 'start'"),
        ({**DIT, "dtype": "bfloat16"}, "description of a DiT has unknown arguments: dtype"),
        (
            {**DIT, "network": "InContextDiT", "tokens": {"wings": 2}},
            "description must be that of a InContextDiT, but none can be made",
        ),
        ({**DIT, "wings": 2}, "description of a DiT has unknown arguments: wings"),
    ],
    ids=range(10),
)
def test_what_describes_no_network_is_refused(description, message):
    with pytest.raises(ValueError, match=message):
        shapes(lambda key: mfx.make_network(description, key=key))


def test_choices_that_a_network_does_not_have_are_refused():
    with pytest.raises(ValueError, match="attention, remat must be None for MLP, which has no such choice"):
        mfx.make_network({"network": "MLP", "size": 2}, attention=nn.XLAAttention(), remat=True, key=jr.key(0))
