"""The authors' JAX DiT: every tensor finds its place, and the network computes what `dit_reference.py` does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

pytest.importorskip("msgpack")
from dit_reference import Reference
from random_tensors import random_tensor
from released_files import (
    CHANNELS,
    DEPTH,
    FEATURES,
    flax_shapes,
    flax_tensors,
    HEADS,
    HEIGHT,
    LABELS,
    nested,
    PATCH,
    WIDTH,
)

import mf_eqx as mfx
from mf_eqx import nn, released
from mf_eqx.released import _dit

SIZE = mfx.DiTSize(DEPTH, FEATURES, HEADS, PATCH)
PATCHES, OUT = "net/x_embedder/proj/kernel", "net/final_layer/linear/_flax_linear/kernel"
QKV = "net/blocks/layers_1/attn/qkv/_flax_linear/kernel"
XL2 = {"depth": 28, "width": 1152, "patch": 2, "channels": 4, "labels": 1000}


def shapes(data_shape=(CHANNELS, HEIGHT, WIDTH), size=SIZE, **options):
    """A field without numbers."""
    options = {"labels": LABELS} | options
    return eqx.filter_eval_shape(lambda key: mfx.DiT(data_shape, size, key=key, **options), jr.key(0))


def filled(tensors=None, dtype=jnp.float32):
    options = {"dtype": dtype, "unroll": 1}
    return nn.cast(released.fill_dit(shapes(**options), flax_tensors() if tensors is None else tensors, "dit"), dtype)


def inputs():
    """z and v, H W C."""
    shape = (1, HEIGHT, WIDTH, CHANNELS)
    return tuple(random_tensor(name, shape, scale=np.sqrt(np.prod(shape)))[0] for name in ("z", "v"))


def inside(image, dtype):
    """C H W."""
    return jnp.asarray(image.transpose(2, 0, 1), dtype)


def of_ours(field, r, t, label, dtype=jnp.float32):
    """u and du/dt, H W C."""
    z, v = (inside(image, dtype) for image in inputs())
    times = (jnp.asarray(time, dtype) for time in (r, t))
    both = jax.jit(mfx.total_derivative)(field, z, v, *times, jnp.asarray(label))
    return [np.asarray(image).transpose(1, 2, 0) for image in both]


def relative_error(found, expected):
    """To the largest value."""
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


# What it computes

POINTS = [(0.25, 0.75, 3), (0.0, 1.0, 0), (0.5, 0.5, LABELS)]
"""r, t and label, exact in float32; the last label is none."""


@pytest.mark.parametrize(("r", "t", "label"), POINTS)
def test_u_and_its_derivative_are_those_of_the_reference(r, t, label, x64):
    reference, (z, v) = Reference(flax_tensors(), HEADS), (x.astype(np.float64) for x in inputs())
    u, dudt = of_ours(filled(dtype=jnp.float64), r, t, label, jnp.float64)
    assert relative_error(u, reference(z, r, t, label)) < 1e-12
    # The error of the differences: step^2 u''' / 6, and 1e-16 / step.
    assert relative_error(dudt, reference.derivative(z, v, r, t, label)) < 1e-7


def test_u_and_its_derivative_are_those_of_the_reference_in_float32():
    (r, t, label), (z, v), reference = POINTS[0], inputs(), Reference(flax_tensors(), HEADS)
    u, dudt = of_ours(filled(), r, t, label)
    assert relative_error(u, reference(z, r, t, label)) < 1e-5
    assert relative_error(dudt, reference.derivative(z.astype(np.float64), v, r, t, label)) < 1e-5


def test_what_is_compared_depends_on_every_input():
    reference, (z, v) = Reference(flax_tensors(), HEADS), inputs()
    first = reference(z, 0.25, 0.75, 3)
    assert np.abs(reference.derivative(z.astype(np.float64), v, 0.25, 0.75, 3)).max() > 0.1
    for other in ((z, 0.3, 0.75, 3), (z, 0.25, 0.7, 3), (z, 0.25, 0.75, 4), (z[::-1], 0.25, 0.75, 3)):
        assert relative_error(reference(*other), first) > 1e-3


def transposed_patches(kernel):
    return kernel.swapaxes(0, 1)


def channels_first(kernel):
    """The outputs of a patch as (channel, row, column)."""
    return np.ascontiguousarray(kernel.reshape(-1, PATCH, PATCH, CHANNELS).transpose(0, 3, 1, 2).reshape(kernel.shape))


def rolled(kernel):
    return np.roll(kernel, FEATURES, axis=1)


@pytest.mark.parametrize(
    ("name", "change"), [(PATCHES, transposed_patches), (OUT, channels_first), (QKV, rolled)], ids=["in", "out", "qkv"]
)
def test_an_order_that_no_shape_shows_is_seen_in_the_result(name, change):
    (r, t, label), tensors = POINTS[0], flax_tensors()
    tensors[name] = change(tensors[name])
    u, _ = of_ours(filled(tensors), r, t, label)
    assert relative_error(u, Reference(flax_tensors(), HEADS)(inputs()[0], r, t, label)) > 1e-2


def test_reference_embeds_patches_as_the_convolution_of_flax():
    linen = pytest.importorskip("flax.linen")
    tensors, (z, _) = flax_tensors(), inputs()
    variables = {"params": {kind: tensors[f"net/x_embedder/proj/{kind}"] for kind in ("kernel", "bias")}}
    strides = (PATCH, PATCH)
    found = linen.Conv(FEATURES, strides, strides, "VALID", precision="highest").apply(variables, z[None])[0]
    reference = Reference(tensors, HEADS)
    expected = [[reference.embedded(z, i, j) for j in range(WIDTH // PATCH)] for i in range(HEIGHT // PATCH)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_reference_is_linear_as_the_layer_of_flax():
    linen = pytest.importorskip("flax.linen")
    reference, x = Reference(flax_tensors(), HEADS), random_tensor("x", (3, FEATURES))
    name = "final_layer/linear"
    variables = {kind: flax_tensors()[f"net/{name}/_flax_linear/{kind}"] for kind in ("kernel", "bias")}
    found = linen.Dense(PATCH**2 * CHANNELS, precision="highest").apply({"params": variables}, x)
    np.testing.assert_allclose(found, reference.dense(name, x), atol=1e-5)


# What is read


def test_every_number_of_the_tree_is_in_the_network():
    found, held = (
        np.sort(np.concatenate([np.ravel(value) for value in values]))
        for values in (jax.tree.leaves(filled()), flax_tensors().values())
    )
    np.testing.assert_array_equal(found, held)


def test_nested_and_flat_names_give_the_same_network():
    for a, b in zip(jax.tree.leaves(filled()), jax.tree.leaves(filled(nested(flax_tensors()))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_paper_network_has_the_tensors_that_it_should():
    field = shapes((4, 32, 32), mfx.DIT_XL2, labels=1000)
    asked = {
        name: origin.shape
        for _, origin in _dit.origins(field, _dit.flax_name, _dit._converted)
        for name in origin.names
    }
    assert asked == flax_shapes(**XL2)
    assert sum(int(np.prod(shape)) for shape in asked.values()) == 676_440_592


def test_size_of_the_paper_network_is_seen_in_its_tensors():
    # One number stands for all, so that nothing is as large as it says.
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in flax_shapes(**XL2).items()}
    assert released.measure_dit(tensors, "dit") == (4, mfx.DIT_XL2, 1000)


def test_heads_are_taken_as_given():
    assert released.measure_dit(flax_tensors(), "dit", heads=HEADS) == (CHANNELS, SIZE, LABELS)


# What is refused


@pytest.mark.parametrize(
    ("heads", "rule"),
    [
        (None, "heads must be given, as no published network has width 16, got none"),
        (3, "heads must divide the width 16, got 3"),
    ],
)
def test_heads_that_cannot_be_are_refused(heads, rule):
    with pytest.raises(ValueError, match=f"^dit: {rule}$"):
        released.measure_dit(flax_tensors(), "dit", heads=heads)


def rename(old, new):
    return lambda held: held.update({new: held.pop(old)})


def replace(name, tensor):
    return lambda held: held.update({name: tensor})


FC1 = "net/blocks/layers_2/mlp/fc1/_flax_linear"
MISFITS = {
    "missing": (lambda held: held.pop(f"{FC1}/bias"), f"it lacks {FC1}/bias$"),
    "renamed": (
        rename(f"{FC1}/kernel", f"{FC1}/weight"),
        f"it lacks {FC1}/kernel; has the unexpected {FC1}/weight$",
    ),
    "extra": (replace("net/new", np.zeros(1)), "it has the unexpected net/new$"),
    "another block": (
        lambda held: held.update({name.replace("_2", "_3"): held[name] for name in list(held) if FC1 in name}),
        "it has the unexpected net/blocks/layers_3/mlp/fc1/_flax_linear/bias, ",
    ),
    "transposed": (
        replace(f"{FC1}/kernel", np.zeros((64, 16), np.float32)),
        rf"it differs: {FC1}/kernel is \(64, 16\), not \(16, 64\)$",
    ),
    "flat patches": (
        replace(PATCHES, np.zeros((16, 16), np.float32)),
        rf"it differs: {PATCHES} is \(16, 16\), not \(2, 2, 4, 16\)$",
    ),
    "nan": (
        replace(f"{FC1}/bias", np.full(64, np.nan, np.float32)),
        f"it has values that are no finite real numbers in {FC1}/bias$",
    ),
    "integers": (
        replace(f"{FC1}/bias", np.zeros(64, np.int32)),
        f"it has values that are no finite real numbers in {FC1}/bias$",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(kind):
    (change, message), tensors = MISFITS[kind], flax_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=f"^dit: must hold the tensors of the network, but {message}"):
        filled(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"net": {"step": 3}}, "net/step must be an array, got int"),
        ({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, "must hold one tensor of each name, got two named a/b"),
    ],
)
def test_a_tree_of_something_else_is_refused(tensors, message):
    with pytest.raises(ValueError, match=f"^dit: {message}$"):
        filled(tensors)


@pytest.mark.parametrize("name", [PATCHES, "net/y_embedder/embedding_table/_flax_embedding/embedding"])
def test_a_tree_that_does_not_tell_its_size_is_refused(name):
    tensors = flax_tensors()
    del tensors[name]
    with pytest.raises(ValueError, match=f"^dit: must hold the tensors of the network, but it lacks {name}$"):
        released.measure_dit(tensors, "dit", heads=HEADS)
    tensors[name] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=f"^dit: {name} must have . axes, none of them empty, got shape"):
        released.measure_dit(tensors, "dit", heads=HEADS)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"labels": None}, "field must have labels"),
        ({"time_variables": nn.end_start}, r"field must embed \(t, t - r\) at scale 1"),
        ({"time_scale": 1000.0}, r"field must embed \(t, t - r\) at scale 1"),
        ({"guidance": True}, "field must have no guidance and no qk_norm"),
        ({"qk_norm": True}, "field must have no guidance and no qk_norm"),
    ],
)
def test_a_field_that_sees_something_else_is_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        released.fill_dit(shapes(**options), flax_tensors(), "dit")
