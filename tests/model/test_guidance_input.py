"""Guidance as an input of the networks without tokens for it; `test_in_context_dit.py` has those with."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from fields import filled

import mf_eqx as mfx

MAKERS = {
    "MLP": functools.partial(mfx.MLP, 2, width=8, depth=1),
    "DiT": functools.partial(mfx.DiT, (1, 4, 4), mfx.DiTSize(2, 8, 2, 4)),
    "UNet": functools.partial(mfx.UNet, (1, 4, 4), mfx.UNetSize(4, (1,), 1, ())),
    "DiT of early blocks": functools.partial(mfx.DiT, (1, 4, 4), mfx.DiTSize(2, 8, 2, 4), early_blocks=1),
}
EACH = pytest.mark.parametrize("name", MAKERS)


def shapes(name, **options):
    return eqx.filter_eval_shape(lambda: MAKERS[name](**options, key=jr.key(0)))


@EACH
def test_result_depends_on_label_scale_start_and_end(name):
    field = filled(lambda: MAKERS[name](labels=3, guidance=True, key=jr.key(0)))
    changes = ({}, {"condition": 2}, {"scale": 3.0}, {"start": 0.3}, {"end": 0.6})
    rows = [mfx.GuidanceCondition(1, 2.0, 0.1, 0.9)._replace(**change) for change in changes]
    condition = jax.tree.map(lambda *numbers: jnp.asarray(numbers), *rows)
    z = jnp.ones(field.data_shape)
    values = jax.jit(jax.vmap(lambda condition: field(z, 0.2, 0.7, condition)))(condition).reshape(len(rows), -1)
    assert all((values[i] != values[j]).any() for i in range(len(rows)) for j in range(i))


@EACH
def test_description_makes_the_same_network(name):
    field = shapes(name, labels=3, guidance=True)
    made = eqx.filter_eval_shape(lambda: mfx.make_network(mfx.describe(field), key=jr.key(1)))
    assert jax.tree.structure(made) == jax.tree.structure(field)
    assert mfx.describe(shapes(name, labels=3))["guidance"] is False


@pytest.mark.slow
@EACH
def test_a_network_without_guidance_has_the_parameters_that_it_had(name):
    """They start the same, so that guidance adds arrays and changes none."""
    plain, guided = (MAKERS[name](labels=3, guidance=guidance, key=jr.key(0)) for guidance in (False, True))
    without = eqx.tree_at(lambda field: (field.embedding if name == "UNet" else field).guidance, guided, None)
    assert eqx.tree_equal(without, plain)


@EACH
@pytest.mark.parametrize(
    ("options", "condition", "message"),
    [
        ({"labels": 3, "guidance": True}, 1, "condition must be a GuidanceCondition for a field with guidance, got 1"),
        (
            {"labels": 3},
            mfx.GuidanceCondition(1),
            "condition must be no GuidanceCondition for a field without",
        ),
        ({"labels": 3, "guidance": True}, mfx.GuidanceCondition(5), r"condition must be a label in \[0, 3\], got 5"),
        ({"labels": 3, "guidance": True}, mfx.GuidanceCondition(1, 0.0), "scale must be > 0 and finite, got 0.0"),
        ({"labels": 3, "guidance": True}, mfx.GuidanceCondition(1, 2.0, 0.5, 0.2), "start and end must .* got 0.5 and"),
        ({"guidance": True}, None, "guidance must be False for a field without labels and condition, got True"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, condition, message):
    with pytest.raises(ValueError, match=message):
        field = shapes(name, **options)
        eqx.filter_eval_shape(lambda field: field(jnp.ones(field.data_shape), 0.2, 0.7, condition), field)


def test_a_unet_that_is_told_of_augmentation_takes_guidance_beside_it():
    make = functools.partial(MAKERS["UNet"], labels=3, guidance=True, augmentation=2, key=jr.key(0))
    field, z = filled(make), jnp.ones((1, 4, 4))
    told, zeros = (mfx.UNetCondition(1, jnp.asarray(numbers)) for numbers in ([1.0, -2.0], [0.0, 0.0]))
    conditions = told, zeros, mfx.UNetCondition(1), 1
    evaluate = jax.jit(lambda condition: field(z, 0.2, 0.7, condition))
    made = [evaluate(mfx.GuidanceCondition(condition, 2.0)) for condition in conditions]
    assert (made[0] != made[1]).any()
    assert jnp.array_equal(made[1], made[2]) and jnp.array_equal(made[1], made[3])
