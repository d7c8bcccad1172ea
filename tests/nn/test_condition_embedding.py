import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import nn

R, T = 0.25, 0.75


def silu(x):
    return x / (1 + np.exp(-x))


# Labels


IMAGE = jnp.asarray(np.ones((1, 4, 4), np.float32))


@functools.cache
def mlp(labels=3):
    field = filled(lambda: mfx.MLP(2, width=4, depth=1, labels=labels, key=jr.key(0)))
    return field, jnp.asarray(np.ones(2, np.float32)), lambda label: label


@functools.cache
def dit(labels=3):
    field = filled(lambda: mfx.DiT((1, 4, 4), mfx.DiTSize(1, 4, 1, 2), labels=labels, key=jr.key(0)))
    return field, IMAGE, lambda label: label


@functools.cache
def unet(labels=3):
    field = filled(lambda: mfx.UNet((1, 4, 4), mfx.UNetSize(4, (1,), 1, ()), labels=labels, key=jr.key(0)))
    return field, IMAGE, lambda label: label


def unet_condition(labels=3):
    return *unet(labels)[:2], lambda label: mfx.UNetCondition(label)


def test_label_reads_its_row_and_no_label_the_last():
    layer = nn.LabelEmbedding(10, 4, key=jr.key(0))
    assert layer.table.shape == (11, 4)
    assert layer.null_label == 10
    for label in (0, 7, 10):
        np.testing.assert_array_equal(layer(jnp.asarray(label)), layer.table[label])


def test_label_rows_have_standard_deviation_two_hundredths():
    np.testing.assert_allclose(nn.LabelEmbedding(1000, 100, key=jr.key(0)).table.std(), 0.02, rtol=0.02)


def test_condition_embedding_adds_the_label_to_the_times():
    times = nn.TimePairEmbedding(4, key=jr.key(0))
    labels = nn.LabelEmbedding(3, 4, key=jr.key(1))
    r, t, label = jnp.asarray(R), jnp.asarray(T), jnp.asarray(2)
    expected = times(r, t) + labels.table[2]
    np.testing.assert_array_equal(nn.ConditionEmbedding(times, labels)(r, t, label), expected)
    np.testing.assert_array_equal(nn.ConditionEmbedding(times)(r, t, None), times(r, t))


def test_label_missing_or_given_in_vain_is_refused():
    times = nn.TimePairEmbedding(4, key=jr.key(0))
    r, t = jnp.asarray(R), jnp.asarray(T)
    with pytest.raises(ValueError, match="condition must be a label for a field with labels, got None"):
        nn.ConditionEmbedding(times, nn.LabelEmbedding(3, 4, key=jr.key(1)))(r, t, None)
    with pytest.raises(ValueError, match="condition must be None for a field made without labels and condition, got 1"):
        nn.ConditionEmbedding(times)(r, t, jnp.asarray(1))


LABELS = {
    "one of a batch": (lambda: jnp.ones(1, int), r"int\d+ of shape \(1,\)"),
    "several": (lambda: np.arange(3), r"int64 of shape \(3,\)"),
    "a list": (lambda: [1], r"int64 of shape \(1,\)"),
    "True": (lambda: True, r"bool of shape \(\)"),
    "a boolean array": (lambda: jnp.asarray(False), r"bool of shape \(\)"),
    "a float": (lambda: 1.0, r"float64 of shape \(\)"),
    "a float array": (lambda: jnp.ones(()), r"float32 of shape \(\)"),
    "a dictionary": (lambda: {"a": jnp.ones(3)}, r"\['a'\] float32 of shape \(3,\)"),
    "a one-hot vector": (lambda: jnp.eye(3)[1], r"float32 of shape \(3,\)"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("make", [mlp, dit, unet, unet_condition], ids=lambda make: make.__name__)
def test_label_that_is_not_one_integer_is_refused_with_its_shape_and_dtype(make, name):
    label, got = LABELS[name]
    field, z, condition = make()
    message = rf"condition must be one integer label of shape \(\) \(.*jax.vmap.*\), got {got}$"
    with pytest.raises(ValueError, match=message):
        field(z, 0.0, 1.0, condition(label()))


@pytest.mark.slow
@pytest.mark.parametrize("label", [2, np.int8(2), np.asarray(2), jnp.asarray(2, jnp.uint8)], ids=repr)
@pytest.mark.parametrize("make", [mlp, dit, unet, unet_condition], ids=lambda make: make.__name__)
def test_label_may_be_any_integer(make, label):
    field, z, condition = make()
    np.testing.assert_array_equal(
        field(z, 0.0, 1.0, condition(label)), field(z, 0.0, 1.0, condition(jnp.asarray(2, jnp.int32)))
    )


@pytest.mark.parametrize("label", [-1, 4, np.int64(2**32), jnp.asarray(4)], ids=repr)
def test_label_out_of_range_is_refused_where_its_value_is_known(label):
    with pytest.raises(ValueError, match=rf"condition must be a label in \[0, 3\], got {int(label)}"):
        nn.LabelEmbedding(3, 4, key=jr.key(0))(label)


def test_label_out_of_range_gives_no_row_of_another_where_it_is_traced():
    layer = nn.LabelEmbedding(3, 4, key=jr.key(0))
    rows = jax.vmap(layer)(jnp.asarray([0, 3, -1, 4, 2**31 - 1]))
    np.testing.assert_array_equal(rows[:2], layer.table[np.array([0, 3])])
    assert np.isnan(rows[2:]).all()


@pytest.mark.parametrize("make", [mlp, dit, unet, unet_condition], ids=lambda make: make.__name__)
def test_label_missing_or_in_vain_is_refused_by_every_network(make):
    field, z, condition = make()
    with pytest.raises(ValueError, match="condition must be a label for a field with labels, got None"):
        field(z, 0.0, 1.0)
    field, z, condition = make(labels=None)
    with pytest.raises(ValueError, match="condition must be None for a field made without labels and condition, got 1"):
        field(z, 0.0, 1.0, condition(jnp.asarray(1)))


def test_null_label_needs_labels():
    with pytest.raises(ValueError, match="labels must be given for a null label to exist"):
        _ = nn.ConditionEmbedding(nn.TimePairEmbedding(4, key=jr.key(0))).null_label


def test_zero_labels_are_refused():
    with pytest.raises(ValueError, match="labels must be an integer >= 1, got 0"):
        nn.LabelEmbedding(0, 4, key=jr.key(0))


# Other conditions


def mlp_of(condition, *, key=jr.key(0), **options):
    return mfx.MLP(2, width=4, depth=1, condition=condition, key=key, **options)


def dit_of(condition, *, key=jr.key(0), **options):
    return mfx.DiT((1, 4, 4), mfx.DiTSize(1, 4, 1, 2), condition=condition, key=key, **options)


def unet_of(condition, *, key=jr.key(0), **options):
    size = mfx.UNetSize(4, (1,), 1, ())
    variables = nn.duration  # of which the embedding has two values for each of the width
    return mfx.UNet((1, 4, 4), size, condition=condition, time_variables=variables, key=key, **options)


EVERY = pytest.mark.parametrize("make", [mlp_of, dit_of, unet_of], ids=lambda make: make.__name__)


def lively(make, condition, **options):
    """A field with numbers in all parameters, of which some start at almost zero; and a state."""
    field = filled(lambda: make(condition, **options))
    return field, jnp.asarray(np.ones(field.data_shape, np.float32))


@functools.cache
def of_vectors(make):
    return lively(make, 5)


@eqx.filter_jit
def evaluate(field, z, condition):
    return field(z, 0.2, 0.9, condition)


VECTOR = np.linspace(-1, 1, 5, dtype=np.float32)


class Pooled(nn.AbstractConditionEmbedding):
    """Of a vector and tokens, whose rows of a table are averaged."""

    joints: nn.VectorEmbedding
    words: jax.Array

    def __init__(self, width, *, key):
        self.joints = nn.VectorEmbedding(5, width, key=key)
        self.words = jr.normal(key, (20, width))

    def __call__(self, condition):
        return self.joints(condition["joints"]) + self.words[condition["words"]].mean(axis=0)


def test_vector_goes_through_linear_silu_linear(x64):
    layer = nn.cast(nn.VectorEmbedding(5, 7, key=jr.key(0)), jnp.float64)
    expected = silu(VECTOR @ layer.hidden.weight + layer.hidden.bias) @ layer.out.weight + layer.out.bias
    np.testing.assert_allclose(layer(jnp.asarray(VECTOR, float)), expected, rtol=1e-12)
    assert expected.shape == (7,)


def test_vector_weights_have_standard_deviation_two_hundredths():
    layer = nn.VectorEmbedding(200, 300, key=jr.key(0))
    for part in (layer.hidden, layer.out):
        np.testing.assert_allclose(part.weight.std(), 0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint8, bool])
def test_vector_of_few_bits_is_embedded_in_float32(dtype):
    layer, vector = nn.VectorEmbedding(5, 4, key=jr.key(0)), jnp.asarray([1, 0, 1, 1, 0], dtype)
    assert layer(vector).dtype == jnp.float32
    np.testing.assert_array_equal(layer(vector), layer(vector.astype(jnp.float32)))


@EVERY
def test_vector_changes_the_output_and_is_added_to_the_times(make):
    outputs = [np.asarray(evaluate(*of_vectors(make), vector)) for vector in (VECTOR, -VECTOR, 0 * VECTOR)]
    for i in range(3):
        assert (outputs[i] != outputs[i - 1]).any()


@EVERY
def test_size_of_a_vector_is_short_for_its_embedding(make):
    field, z = of_vectors(make)
    embedding = field.embedding.condition
    again, _ = lively(make, embedding)
    assert isinstance(embedding, nn.VectorEmbedding) and jax.tree.structure(again) == jax.tree.structure(field)
    np.testing.assert_array_equal(evaluate(again, z, VECTOR), evaluate(field, z, VECTOR))


@EVERY
def test_condition_of_any_structure_goes_through_an_embedding_of_ones_own(make):
    width = 8 if make is unet_of else 4
    field, z = lively(make, filled(lambda: Pooled(width, key=jr.key(1))))
    conditions = [{"joints": VECTOR, "words": np.array(words)} for words in ([3, 3, 19], [3, 4, 19])]
    outputs = [np.asarray(evaluate(field, z, condition)) for condition in conditions]
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize("make", [mlp_of, dit_of], ids=lambda make: make.__name__)
def test_every_parameter_of_an_embedding_gets_a_gradient(make):
    field, z = of_vectors(make)
    draws = np.random.default_rng(1)
    batch = mfx.Batch(*(jnp.asarray(draws.standard_normal((8, *shape)), jnp.float32) for shape in (z.shape, (5,))))
    objective = mfx.Objective(identity_share=1, label_dropout=mfx.LabelDropout(0.3, np.zeros(5, np.float32)))
    loss = eqx.filter_jit(eqx.filter_grad(lambda field: objective(field, batch, key=jr.key(3))[0]))
    found = loss(field).embedding.condition
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        leaf = np.asarray(leaf)
        assert (np.isfinite(leaf) & (leaf != 0)).all(), jax.tree_util.keystr(path)


@EVERY
def test_field_without_a_condition_has_the_parameters_that_it_had_before(make):
    field, other = eqx.filter_jit(lambda key: (make(5, key=key), make(None, key=key)))(jr.key(0))
    expected = eqx.tree_at(lambda field: field.embedding.condition, field, None)
    assert jax.tree.structure(expected) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(expected), jax.tree.leaves(other)))


def test_unet_takes_a_vector_beside_its_augmentation():
    field, z = lively(unet_of, 5, augmentation=6)
    conditions = VECTOR, mfx.UNetCondition(VECTOR), mfx.UNetCondition(VECTOR, np.ones(6, np.float32))
    alone, without, beside = (np.asarray(evaluate(field, z, condition)) for condition in conditions)
    np.testing.assert_array_equal(alone, without)
    assert (alone != beside).any()


VECTORS = {
    "one of a batch": (VECTOR[None], r"float32 of shape \(1, 5\)"),
    "another size": (VECTOR[:4], r"float32 of shape \(4,\)"),
    "a label": (3, "3"),
    "a list": ([0.5], r"\[0\] 0\.5"),
    "a dictionary": ({"a": VECTOR}, r"\['a'\] float32 of shape \(5,\)"),
    "complex": (VECTOR.astype(np.complex64), r"complex64 of shape \(5,\)"),
    "text": ("joints", "str"),
}


@pytest.mark.parametrize(("condition", "got"), VECTORS.values(), ids=VECTORS)
@EVERY
def test_what_is_no_vector_of_the_size_is_refused(make, condition, got):
    field, z = of_vectors(make)
    message = rf"condition must be one vector of shape \(5,\) \(.*jax.vmap.*\), got {got}$"
    with pytest.raises(ValueError, match=message):
        field(z, 0.0, 1.0, condition)


@EVERY
def test_shape_of_a_traced_condition_is_told(make):
    with pytest.raises(ValueError, match=r"got float32 of shape \(7,\)"):
        evaluate(*of_vectors(make), np.ones(7, np.float32))


@EVERY
def test_vector_missing_or_in_vain_is_refused_by_every_network(make):
    field, z = of_vectors(make)
    with pytest.raises(ValueError, match="condition must be given for a field with VectorEmbedding, got None"):
        field(z, 0.0, 1.0)
    field, z = lively(make, None)
    message = r"condition must be None for a field made without labels and condition, got float32 of shape \(5,\)"
    with pytest.raises(ValueError, match=message):
        evaluate(field, z, VECTOR)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (0, "condition must be an integer >= 1, got 0"),
        (True, "condition must be an integer >= 1, got True"),
        (2.5, "condition must be the size of a vector, an nn.AbstractConditionEmbedding, or None, got float"),
        (VECTOR, "condition must be the size of a vector, an nn.AbstractConditionEmbedding, or None, got ndarray"),
    ],
)
@EVERY
def test_what_stands_for_no_embedding_is_refused(make, condition, message):
    with pytest.raises(ValueError, match=message):
        lively(make, condition)


@EVERY
def test_labels_and_another_condition_are_refused_together(make):
    with pytest.raises(ValueError, match=r"labels must be None with a condition, .*; got 3"):
        lively(make, 5, labels=3)


@pytest.mark.usefixtures("unchecked")
@EVERY
def test_embedding_of_another_width_is_refused(make):
    field, z = lively(make, filled(lambda: Pooled(3, key=jr.key(1))))
    with pytest.raises(ValueError, match=r"condition must be embedded as shape \([48],\), got \(3,\) of Pooled"):
        eqx.filter_eval_shape(field, z, 0.0, 1.0, {"joints": VECTOR, "words": np.array([3, 3, 19])})


def test_label_embedding_of_another_width_is_refused_by_its_name():
    embedding = nn.ConditionEmbedding(nn.TimePairEmbedding(8, key=jr.key(0)), nn.LabelEmbedding(3, 4, key=jr.key(1)))
    with pytest.raises(ValueError, match=r"condition must be embedded as shape \(8,\), got \(4,\) of LabelEmbedding"):
        embedding(0.0, 1.0, 1)
