"""The authors' networks of improved and pixel MeanFlow: every tensor finds its place, and the network computes what
`in_context_reference.py` does."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

pytest.importorskip("msgpack")
from in_context_reference import in_context_dit
from released_files import (
    CHANNELS,
    HEIGHT,
    in_context_shapes,
    in_context_tensors,
    LABELS,
    nested,
    PIXELS,
    WIDTH,
)

import mf_eqx as mfx
from mf_eqx import nn, released

SIZE = mfx.InContextDiTSize(depth=4, width=16, heads=2, patch=2, head_depth=2)
SIZES = {"iMF": SIZE, "pMF": SIZE._replace(bottleneck=6, learned_positions=True, grid=True)}
OPTIONS = {"iMF": {}, "pMF": PIXELS}
COUNTS = mfx.TokenCounts(3, 2, 1, 1, 2)
both = pytest.mark.parametrize("kind", SIZES)


def shapes(kind="iMF", data_shape=(CHANNELS, HEIGHT, WIDTH), size=None, **options):
    """A field without numbers."""
    options = {"labels": LABELS, "guidance": True, "tokens": COUNTS, "velocity_head": True} | options
    make = functools.partial(mfx.InContextDiT, data_shape, size or SIZES[kind], **options)
    return eqx.filter_eval_shape(lambda key: make(key=key), jr.key(0))


def filled(tensors, kind="iMF", **options):
    return released.fill_in_context_dit(shapes(kind, **options), tensors, "file")


def tensors_of(kind):
    return in_context_tensors(kind, **OPTIONS[kind])


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# What it computes


@both
def test_u_and_v_are_those_of_the_reference(kind, x64):
    tensors, z = tensors_of(kind), np.random.default_rng(0).standard_normal((CHANNELS, HEIGHT, WIDTH))
    plain = {name[4:]: np.float64(tensor[0] if tensor.ndim == 3 else tensor) for name, tensor in tensors.items()}
    expected = in_context_dit(plain, z, 0.25, 0.75, 3, (2.5, 0.2, 0.7), heads=SIZE.heads, patch=SIZE.patch)
    condition = mfx.GuidanceCondition(jnp.asarray(3), 2.5, 0.2, 0.7)
    field = nn.cast(filled(tensors, kind, dtype=jnp.float64, unroll=1), jnp.float64)
    found = eqx.filter_jit(lambda field, z: field.with_velocity(z, 0.25, 0.75, condition))(field, jnp.asarray(z))
    for ours, theirs in zip(found, expected, strict=True):
        size = np.abs(theirs).max()
        assert size > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * size)


# What is read


@both
def test_every_number_of_the_tree_is_in_the_network(kind):
    tensors = tensors_of(kind)
    leaves = jax.tree.leaves(filled(nested(tensors), kind))
    found, held = (np.sort(np.concatenate([np.ravel(x) for x in some])) for some in (leaves, tensors.values()))
    np.testing.assert_array_equal(found, held)


def test_tokens_may_have_a_further_first_axis():
    tensors = tensors_of("iMF")
    more = {name: tensor[None] if name.endswith("_tokens") else tensor for name, tensor in tensors.items()}
    assert_equal(filled(more), filled(tensors))
    assert released.measure_in_context_dit(more, "file", heads=2).tokens == COUNTS


@both
def test_field_without_velocity_head_is_filled_with_or_without_the_tensors_of_one(kind):
    tensors = tensors_of(kind)
    expected = filled(tensors, kind).without_velocity_head()
    without_blocks = {name: tensor for name, tensor in tensors.items() if "/v_heads_" not in name}
    without_all = {name: tensor for name, tensor in without_blocks.items() if "/v_final_layer/" not in name}
    for tree in (tensors, without_blocks, without_all):
        assert_equal(filled(tree, kind, velocity_head=False), expected)
        has_head = released.measure_in_context_dit(tree, "file", heads=2).velocity_head
        assert has_head == (tree is tensors)


PAPER = {"head": 8, "labels": 1000, "tokens": {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}}
LATENT = PAPER | {"patch": 2, "channels": 4}
PUBLISHED = {
    "IMF_B2": (145_596_960, LATENT | {"trunk": 4, "width": 768, "heads": 12, "mlp": 2048}),
    "IMF_XL2": (711_113_760, LATENT | {"trunk": 40, "width": 1024, "heads": 16, "mlp": 2730}),
    "PMF_H16": (
        1_113_259_520,
        PAPER
        | {"patch": 16, "channels": 3, "trunk": 40, "width": 1280, "heads": 16, "mlp": 3413}
        | {"bottleneck": 256, "length": 276},
    ),
}


def measured(options):
    """One number stands for all, so that nothing is as large as it says."""
    wide = {name: np.broadcast_to(np.float32(0), shape) for name, shape in in_context_shapes(**options).items()}
    return released.measure_in_context_dit(wide, "file")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_measured_and_have_the_tensors_that_they_should(name):
    count, options = PUBLISHED[name]
    tensors, found = in_context_shapes(**options), measured(options)
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == count
    assert found == (options["channels"], getattr(mfx, name), 1000, mfx.TokenCounts(), True)
    side = 256 if "length" in options else 32
    field = shapes(size=found.size, data_shape=(found.channels, side, side), labels=1000, tokens=found.tokens)
    asked = {tensor for _, origin in released._in_context_dit.origins(field) for tensor in origin.names}
    assert asked == tensors.keys()


def test_width_of_the_mlps_is_measured():
    assert measured(PUBLISHED["PMF_H16"][1] | {"mlp": 3416}).size == mfx.PMF_H16._replace(mlp=3416)


# What is refused

Q, BIAS = "net/v_heads_1/attn/q_proj/_flax_linear/kernel", "net/u_final_layer/linear/_flax_linear/bias"


def rename(old, new):
    return lambda held: held.update({new: held.pop(old)})


def replace(name, tensor):
    return lambda held: held.update({name: tensor})


MISFITS = {
    "missing": (lambda held: held.pop(Q), f"it lacks {Q}$"),
    "renamed": (rename(BIAS, "net/u_bias"), f"it lacks {BIAS}; has the unexpected net/u_bias$"),
    "another block": (
        replace("net/shared_blocks_2/attn_scale", np.zeros(16)),
        "unexpected net/shared_blocks_2/attn_scale$",
    ),
    "transposed": (
        replace("net/u_heads_0/mlp/w2/_flax_linear/kernel", np.zeros((16, 42), np.float32)),
        r"it differs: net/u_heads_0/mlp/w2/_flax_linear/kernel is \(16, 42\), not \(42, 16\)$",
    ),
    "nan": (replace(BIAS, np.full(16, np.nan, np.float32)), f"no finite real numbers in {BIAS}$"),
    "positions": (replace("net/pos_embed", np.zeros((1, 33, 16), np.float32)), "unexpected net/pos_embed$"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(case):
    (change, message), tensors = MISFITS[case], tensors_of("iMF")
    change(tensors)
    with pytest.raises(ValueError, match=f"^file: must hold the tensors of the network, but .*{message}"):
        filled(tensors)


@pytest.mark.parametrize("name", ["net/v_heads_2/attn_scale", "net/v_final_layer/scale", "net/v_embedder/bias"])
def test_field_without_velocity_head_ignores_nothing_else(name):
    with pytest.raises(ValueError, match=rf"it has the unexpected {name}$"):
        filled(tensors_of("iMF") | {name: np.zeros(16, np.float32)}, velocity_head=False)


@pytest.mark.parametrize(
    "name", ["net/x_embedder/proj/kernel", "net/time_tokens", "net/u_heads_0/mlp/w1/_flax_linear/kernel"]
)
def test_a_tree_that_does_not_tell_its_size_is_refused(name):
    tensors = tensors_of("iMF")
    del tensors[name]
    with pytest.raises(ValueError, match=f"^file: must hold the tensors of the network, but it lacks {name}$"):
        released.measure_in_context_dit(tensors, "file", heads=2)


def test_heads_that_are_not_known_must_be_given():
    with pytest.raises(ValueError, match=r"^file: heads must be given, as no published network has width 16, got none"):
        released.measure_in_context_dit(tensors_of("iMF"), "file")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"guidance": False}, "field must have labels and guidance"),
        ({"labels": None, "condition": 3}, "field must have labels and guidance"),
        ({"time_variables": nn.end_duration}, "field must embed t - r at scale 1"),
        ({"time_scale": 2.0}, "field must embed t - r at scale 1"),
        ({"size": SIZE._replace(grid=True)}, "field must have bottleneck, learned_positions and grid, or none of them"),
    ],
)
def test_a_field_that_sees_something_else_is_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        filled(tensors_of("iMF"), **options)
