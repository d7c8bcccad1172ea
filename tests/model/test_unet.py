import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import FusedAttention

import mf_eqx as mfx
from mf_eqx import measure, nn

SMALL = mfx.UNetSize(width=8, multipliers=(1, 2), blocks=2, attention=(4,))
FLAT = mfx.UNetSize(width=8, multipliers=(1,), blocks=2, attention=())  # one resolution, with stacks of 2 and 3 blocks
PLAIN = SMALL._replace(blocks=1)
FRESH = mfx.UNetSize(width=32, multipliers=(1, 2), blocks=1, attention=(4,))
SHAPE = (3, 8, 4)  # height and width differ, so that neither can stand for the other
LINE = (3, 8)
R, T, LABEL, NULL = 0.3, 0.8, 1, 4


def shapes(shape=SHAPE, size=SMALL, **options):
    return eqx.filter_eval_shape(lambda key: mfx.UNet(shape, size, **options, key=key), jr.key(0))


def is_kernel(name):
    """Whether a parameter is the weight of a convolution."""
    return name.endswith("weight") and any(layer in name for layer in (".first", ".last", ".conv_", ".skip"))


@functools.cache
def small(shape=SHAPE, size=SMALL, *, labels=NULL, augmentation=6, unroll=1, **options):
    """Without the initialisation, which takes long to compile, and of whose branches nothing would be seen; with a loop
    over the blocks of a stack unless `unroll` says otherwise."""
    draws = np.random.default_rng(0)

    def draw(path, leaf):
        if not hasattr(leaf, "dtype"):
            return leaf
        numbers = draws.standard_normal(leaf.shape)
        name = jax.tree_util.keystr(path)
        if is_kernel(name):
            numbers /= np.sqrt(np.prod(leaf.shape[-len(shape) :]))
        elif name.endswith(("weight", "table", "augmentation")) and "norm" not in name:
            numbers /= np.sqrt(leaf.shape[-2])
        else:
            numbers = 0.1 * numbers + name.endswith("weight")
        return jax.device_put(numbers.astype(np.float32))

    made = shapes(shape, size, labels=labels, augmentation=augmentation, unroll=unroll, **options)
    return jax.tree_util.tree_map_with_path(draw, made)


@functools.cache
def fresh():
    build = jax.jit(lambda key: eqx.filter(mfx.UNet(SHAPE, FRESH, augmentation=6, key=key), eqx.is_array))
    rest = eqx.filter(shapes(size=FRESH, augmentation=6), lambda leaf: not hasattr(leaf, "dtype"))
    return eqx.combine(build(jr.key(0)), rest)


def small64(*arguments, **options):
    """To be built inside float64."""
    field = small(*arguments, dtype=jnp.float64, **options)
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float64)), field)


def inputs(rows=(), shape=SHAPE):
    """(z, r, t, condition), or as many of them as `rows` says, in the default precision."""
    r, t = np.sort(np.random.default_rng(3).uniform(size=(2, *rows)), axis=0) if rows else (R, T)
    label = np.arange(rows[0]) % (NULL + 1) if rows else np.asarray(LABEL)
    condition = mfx.UNetCondition(jnp.asarray(label), normal(4, *rows, 6))
    return normal(2, *rows, *shape), jnp.asarray(r), jnp.asarray(t), condition


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


@functools.cache
def evaluator(size=FLAT, **options):
    """A small field as a compiled function of its inputs, all of one row."""
    field = small(SHAPE, size, **options)
    return jax.jit(lambda *inputs, key=None: field(*inputs, key=key))


def compiled(function, field):
    """`function(field)`, compiled with the arrays of `field` as inputs."""
    arrays, rest = eqx.partition(field, eqx.is_array)
    return jax.jit(lambda arrays: function(eqx.combine(arrays, rest)))(arrays)


def parameters(field):
    """Arrays by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(field)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


def largest_difference(a, b):
    """Relative to the largest value."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()


# Size and start. (Parity with torch is in tests/parity.)


def cifar10(**options):
    """Shapes of the paper's network."""
    return shapes((3, 32, 32), mfx.UNET_CIFAR10, dropout=0.2, **options)


@pytest.mark.parametrize(("augmentation", "count"), [(6, 55_932_419), (0, 55_929_347)])
def test_preset_has_exactly_the_parameters_of_the_paper(augmentation, count):
    assert sum(leaf.size for leaf in parameters(cifar10(augmentation=augmentation)).values()) == count


def test_lists_in_a_size_become_tuples_which_jit_can_compare():
    size = mfx.UNetSize(4, [1, 2], 1, [8])  # pyright: ignore[reportArgumentType]
    field = eqx.filter_eval_shape(lambda: mfx.UNet((1, 8, 8), size, key=jr.key(0)))
    assert field.size == mfx.UNetSize(4, (1, 2), 1, (8,)) and hash(field.size)


def test_preset_is_the_paper_s():
    assert tuple(mfx.UNET_CIFAR10) == (128, (2, 2, 2), 4, (16,))


def products_by_hand():
    """Multiply-adds of one pass of `UNET_CIFAR10`, from the paper's list of its blocks."""
    width, wide, embedded = 128, 256, 512

    def block(inputs, pixels, *, resampled=False, attention=False):
        first_skip = wide * inputs if inputs != wide or resampled else 0
        products = pixels * (9 * inputs * wide + first_skip + 9 * wide * wide) + embedded * wide
        return products + attention * (4 * pixels * wide**2 + 2 * pixels**2 * wide)

    going_down = [block(width, 1024), *3 * [block(wide, 1024)]]
    going_down += [block(wide, 256, resampled=True), *4 * [block(wide, 256, attention=True)]]
    going_down += [block(wide, 64, resampled=True), *4 * [block(wide, 64)]]
    middle = [block(wide, 64, attention=True), block(wide, 64)]
    going_up = 5 * [block(2 * wide, 64)]
    going_up += [block(wide, 256, resampled=True), *4 * [block(2 * wide, 256)], block(2 * wide, 256, attention=True)]
    going_up += [block(wide, 1024, resampled=True), *4 * [block(2 * wide, 1024)], block(wide + width, 1024)]
    ends = 1024 * 9 * 3 * (width + wide)
    return sum(going_down + middle + going_up) + ends + 2 * embedded**2


def test_preset_costs_the_multiply_adds_of_its_blocks():
    time = jax.ShapeDtypeStruct((), jnp.float32)
    z = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32)
    flops = measure.product_flops(lambda field, *inputs: field(*inputs), cifar10(), z, time, time)
    assert products_by_hand() == pytest.approx(21.17e9, rel=1e-3)
    assert flops / 2 == pytest.approx(products_by_hand(), rel=1e-3)


def test_fresh_field_outputs_almost_zero_but_not_zero():
    field = fresh()
    largest = float(jnp.abs(jax.jit(lambda *inputs: field(*inputs))(*inputs()[:3])).max())
    assert 1e-7 < largest < 1e-4


def fans(path, shape):
    """Numbers in and out of a layer."""
    if ".conv" in path or "skip" in path or path in (".first.weight", ".last.weight"):
        outputs, inputs, *kernel = shape[-4:]
        return inputs * np.prod(kernel), outputs * np.prod(kernel)
    return shape[-2:]


def test_fresh_weights_are_xavier_uniform_and_small_where_branches_end():
    layers = (".weight", ".augmentation")
    found = {p: leaf for p, leaf in parameters(fresh()).items() if p.endswith(layers) and "norm" not in p}
    for path, leaf in found.items():
        bound = np.sqrt(6 / np.sum(fans(path, leaf.shape)))
        bound *= 1e-5 if ".conv_2." in path or "attention.out." in path or path == ".last.weight" else 1
        bound *= np.sqrt(0.2) if ".qkv." in path else 1
        leaf = np.asarray(leaf)
        assert 0.95 * bound < np.abs(leaf).max() <= 1.0001 * bound, path
        assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.1), path
    assert len(found) > 20


def test_only_biases_start_at_zero():
    found = parameters(fresh())
    assert {path for path, leaf in found.items() if not np.asarray(leaf).any()} == {
        p for p in found if p.endswith(".bias")
    }


# Conditions


def test_unconditional_field_takes_none():
    z, r, t, _ = inputs()
    field = small(SHAPE, FLAT, labels=None, augmentation=0)
    programs = [jax.make_jaxpr(lambda *times, c=c: field(z, *times, c))(r, t) for c in (None, mfx.UNetCondition())]
    assert str(programs[0]) == str(programs[1]) and programs[0].out_avals[0].shape == SHAPE


def test_label_and_null_label_change_the_output():
    z, r, t, condition = inputs()
    assert small().null_label == NULL
    labels = (jnp.asarray(label) for label in (0, 3, NULL))
    outputs = [evaluator()(z, r, t, condition._replace(label=label)) for label in labels]
    for i in range(3):
        assert largest_difference(outputs[i], outputs[i - 1]) > 0.01


def test_label_alone_is_a_condition_without_augmentation():
    z, r, t, condition = inputs()
    alone, zeros = (
        evaluator()(z, r, t, form) for form in (condition.label, condition._replace(augmentation=jnp.zeros(6)))
    )
    np.testing.assert_allclose(zeros, alone, rtol=1e-5, atol=1e-6)
    assert largest_difference(evaluator()(*inputs()), alone) > 0.01
    embedding = small().embedding
    forms = condition.label, mfx.UNetCondition(condition.label)
    np.testing.assert_array_equal(*(embedding(r, t, form) for form in forms))


def test_each_number_of_the_augmentation_changes_the_output():
    z, r, t, condition = inputs()
    before = evaluator()(*inputs())
    for one in np.eye(6, dtype=np.float32):
        other = condition._replace(augmentation=jnp.asarray(np.asarray(condition.augmentation) + one))
        assert largest_difference(evaluator()(z, r, t, other), before) > 1e-3


@pytest.mark.parametrize("variables", [nn.end_start, nn.end_duration, nn.end_start_duration, nn.duration])
def test_every_embedding_of_table_1c_can_be_chosen(variables):
    embedding = small(time_variables=variables).embedding
    _, r, t, condition = inputs()
    assert largest_difference(embedding(jnp.asarray(R + 0.1), t, condition), embedding(r, t, condition)) > 1e-3
    assert embedding.hidden.weight.shape[0] == len(variables(r, t)) * 2 * SMALL.width


# Geometry


def test_image_and_weights_turned_over_give_the_result_turned_over(x64):
    # Height and width play the same part; attention is placed by rows.
    field, other = (
        small64(shape, SMALL._replace(blocks=1, attention=rows)) for shape, rows in ((SHAPE, (4,)), ((3, 4, 8), (2,)))
    )
    z, r, t, condition = inputs()

    def evaluate(field):
        kernels = jax.tree.map(lambda leaf: leaf.mT if eqx.is_array(leaf) and leaf.ndim >= 4 else leaf, field)
        turned = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(kernels))
        return field(z, r, t, condition), turned(z.mT, r, t, condition).mT

    expected, found = compiled(evaluate, field)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert float(jnp.abs(expected).max()) > 0.1


def test_three_resolutions_and_attention_nowhere_but_in_the_middle():
    field = small((2, 4, 12), SMALL._replace(multipliers=(1, 2, 1), blocks=1, attention=()), labels=None)
    attentions = [path for path in parameters(field) if "qkv.weight" in path]
    assert len(attentions) == 1 and attentions[0].startswith(".middle[0]")
    state, time = jax.ShapeDtypeStruct((2, 4, 12), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    assert jax.eval_shape(lambda *inputs: field(*inputs), state, time, time).shape == (2, 4, 12)


# Sequences


def widened(field):
    """The field of images of two columns that treats equal columns as `field` treats the sequence in each of them."""
    image = shapes((*LINE, 2), PLAIN, labels=NULL, augmentation=6, dtype=jnp.float64)
    stacks = {f".{part}[{i}]": stack for part in ("down", "up") for i, stack in enumerate(getattr(field, part))}

    def widen(path, leaf):
        name = jax.tree_util.keystr(path)
        if is_kernel(name):
            # Of each row of the kernel, the middle. Resampling along the second axis multiplies equal columns by 3/4.
            resamples = (stack := stacks.get(name.partition(".blocks")[0])) and stack.blocks.plan.factor != 1
            factor = 4 / 3 if resamples and (".conv_1" in name or ".skip" in name) else 1
            middle = leaf.shape[-1] // 2
            return jnp.zeros((*leaf.shape, leaf.shape[-1])).at[..., middle].set(factor * leaf)
        is_bias = is_kernel(name.replace("bias", "weight"))
        return leaf[..., None] if is_bias else leaf

    leaves = jax.tree.leaves(jax.tree_util.tree_map_with_path(widen, field))
    return jax.tree.unflatten(jax.tree.structure(image), leaves)


@pytest.mark.slow
def test_sequence_gives_the_columns_of_an_image_of_two_equal_columns(x64):
    z, r, t, condition = inputs(shape=LINE)
    field = small64(LINE, PLAIN)
    expected = compiled(lambda field: field(z, r, t, condition), field)
    found = compiled(lambda field: field(jnp.stack([z, z], axis=-1), r, t, condition), widened(field))
    np.testing.assert_allclose(found, jnp.stack([expected] * 2, axis=-1), rtol=1e-9, atol=1e-12)
    assert float(jnp.abs(expected).max()) > 0.1


def test_sequence_has_attention_where_its_length_says():
    size = mfx.UNetSize(width=8, multipliers=(1, 1, 1), blocks=1, attention=(64,))
    field = small((1, 128), size, labels=None)
    attentions = [path.partition(".blocks")[0] for path in parameters(field) if "qkv.weight" in path]
    assert attentions == [".down[2]", ".middle[0]", ".up[3]"]
    state, time = jax.ShapeDtypeStruct((1, 128), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    assert jax.eval_shape(lambda *inputs: field(*inputs), state, time, time).shape == (1, 128)


# Derivatives


@pytest.mark.slow
def test_scan_unrolled_and_remat_agree_in_values_and_gradients(x64):
    rows = inputs((2,))

    def everything(field):
        def loss(field):
            derivative = functools.partial(mfx.total_derivative, field, key=jr.key(7))
            u, dudt = jax.vmap(lambda z, r, t, c: derivative(z, z, r, t, c))(*rows)
            return jnp.mean(jnp.sin(u)), (u, dudt)

        (_, values), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(field)
        return values, jax.tree.leaves(gradient)

    forms = ({}, {"unroll": True}, {"remat": True})
    results = [compiled(everything, small64(SHAPE, FLAT, dropout=0.5, **form)) for form in forms]
    for result in results[1:]:
        for leaf, expected in zip(jax.tree.leaves(result), jax.tree.leaves(results[0]), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPE, LINE], ids=["image", "sequence"])
def test_total_derivative_with_dropout_and_that_in_r_equal_central_finite_differences(x64, shape):
    # Only if the mask is the same in u and in du/dt. (Without dropout, tests/parity compares with torch.)
    key, step = jr.key(7), 1e-5
    z, r, t, condition = inputs(shape=shape)
    v = normal(5, *shape)

    def both(field):
        def moved(move):
            return field(z + move[0] * v, r + move[1], t + move[0], condition, key=key)

        near = jax.lax.map(moved, jnp.asarray([(0, 0), (-step, 0), (step, 0), (0, -step), (0, step)]))
        _, in_r = jax.jvp(lambda r: field(z, r, t, condition, key=key), (r,), (jnp.ones(()),))
        found = *mfx.total_derivative(field, z, v, r, t, condition, key=key), in_r
        return found, (near[0], (near[2] - near[1]) / (2 * step), (near[4] - near[3]) / (2 * step))

    (u, dudt, in_r), (value, difference, in_r_difference) = compiled(both, small64(shape, FLAT, dropout=0.5))
    np.testing.assert_allclose(dudt, difference, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(u, value, rtol=1e-12)
    np.testing.assert_allclose(in_r, in_r_difference, rtol=1e-6, atol=1e-9)
    assert np.abs(dudt).max() > 0.1 and np.abs(in_r).max() > 1e-3


@pytest.mark.slow
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(x64):
    z, r, t, condition = inputs((NULL + 1,))

    def gradient(field):
        rows = jax.vmap(lambda field, *row: field(*row), (None, 0, 0, 0, 0))
        return eqx.filter_grad(lambda field: jnp.mean(jnp.sin(rows(field, z, r, t, condition))))(field)

    found = parameters(compiled(gradient, small64(SHAPE, FRESH._replace(width=8))))
    for path, leaf in found.items():
        if path.endswith("qkv.bias"):
            # A bias of the keys shifts all logits of a query alike, which the softmax takes away again.
            queries, keys, values = jnp.split(leaf, 3, axis=-1)
            assert float(jnp.abs(keys).max()) < 1e-12 * float(jnp.abs(values).max())
            leaf = jnp.stack([queries, values])
        assert bool(jnp.isfinite(leaf).all() & (leaf != 0).all()), path


@pytest.mark.slow
def test_derivative_with_a_fused_kernel_is_that_with_xla_attention(x64):
    z, r, t, condition = inputs()

    def derivative(**options):
        field = small64(SHAPE, FLAT, **options)
        return compiled(lambda field: mfx.total_derivative(field, z, z, r, t, condition), field)

    expected = derivative()
    np.testing.assert_allclose(derivative(attention=FusedAttention()), expected, rtol=1e-9, atol=1e-12)
    assert largest_difference(derivative(attention=FusedAttention(2.0))[0], expected[0]) > 1e-3


# Dropout


def test_no_key_is_no_dropout():
    np.testing.assert_array_equal(evaluator(dropout=0.5)(*inputs()), evaluator()(*inputs()))


def test_same_key_drops_the_same_and_another_key_something_else():
    evaluate = evaluator(dropout=0.5)
    first, again, other = (evaluate(*inputs(), key=jr.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert largest_difference(other, first) > 0.01
    assert largest_difference(evaluate(*inputs()), first) > 0.01


def test_without_a_rate_a_key_changes_nothing():
    np.testing.assert_allclose(evaluator()(*inputs(), key=jr.key(1)), evaluator()(*inputs()), rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_drop_by_their_own_keys():
    keys, evaluate = jr.split(jr.key(1), 2), evaluator(dropout=0.5)
    rows = jax.jit(jax.vmap(lambda key: evaluate(*inputs(), key=key)))(keys)
    for row, key in zip(rows, keys, strict=True):
        np.testing.assert_allclose(row, evaluate(*inputs(), key=key), rtol=1e-4, atol=1e-5)
    assert largest_difference(*rows) > 0.01


def test_every_block_draws_a_mask_of_its_own_at_the_rate_that_was_given(monkeypatch):
    seen, rates = [], set()

    def drop(self, x, *, key, inference):
        rates.add(self.p)
        jax.debug.callback(lambda numbers: seen.append(tuple(numbers.tolist())), jr.key_data(key))
        return x

    monkeypatch.setattr(eqx.nn.Dropout, "__call__", drop)
    field = small(SHAPE, FLAT, dropout=0.2)
    jax.block_until_ready(jax.jit(lambda *inputs: field(*inputs, key=jr.key(0)))(*inputs()))
    jax.effects_barrier()
    going_down, middle, going_up = 2, 2, 3
    assert len(set(seen)) == len(seen) == going_down + middle + going_up
    assert rates == {0.2}


# Precision


def test_bfloat16_compute_leaves_the_output_and_the_gradients_in_float32():
    field = small(SHAPE, PLAIN, dtype=jnp.bfloat16)
    z, r, t, condition = inputs()

    def loss(field):
        u, dudt = mfx.total_derivative(field, z, z, r, t, condition)
        return jnp.sum((u - jax.lax.stop_gradient(dudt)) ** 2), (u, dudt)

    found = eqx.filter_eval_shape(eqx.filter_value_and_grad(loss, has_aux=True), field)
    for leaf in parameters((field, found)).values():
        assert leaf.dtype == jnp.float32


def test_bfloat16_compute_computes_its_products_in_bfloat16_and_the_times_in_float32():
    field = small(dtype=jnp.bfloat16, unroll=True)
    text = str(jax.make_jaxpr(lambda *inputs: field(*inputs))(*inputs())).split("\n")
    products, convolutions = (
        [line.split(":")[1].split("=")[0].strip() for line in text if f"= {name}" in line]
        for name in ("dot_general", "conv_general")
    )
    assert len(convolutions) >= 20 and all(result.startswith("bf16") for result in convolutions)
    wide = [result for result in products if result.startswith("f32")]
    # In float32: three for times and augmentation, and the logits of attention.
    assert 4 <= len(wide) <= 7 and len(products) - len(wide) >= 6
    assert field.embedding(*inputs()[1:]).dtype == jnp.float32


def test_bfloat16_compute_is_near_float32():
    found, expected = (evaluator(PLAIN, **how)(*inputs()) for how in ({"dtype": jnp.bfloat16}, {}))
    assert 1e-5 < largest_difference(found, expected) < 0.05


def test_scanned_and_unrolled_give_the_same():
    z, r, t, condition = inputs()
    found = evaluator(dropout=0.5, unroll=True)(z, r, t, condition, key=jr.key(1))
    expected = evaluator(dropout=0.5)(z, r, t, condition, key=jr.key(1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def value_and_derivative(compute, precision):
    """Of 8 rows."""
    with jax.enable_x64(False):
        field = small(SHAPE, FRESH, labels=None, augmentation=0, dtype=compute)
    field = nn.cast(field, precision)
    z, v = jr.normal(jr.key(2), (2, 8, *SHAPE), jnp.float32).astype(precision)
    r, t = jnp.sort(jr.uniform(jr.key(3), (2, 8), jnp.float32), axis=0).astype(precision)
    rows = jax.vmap(lambda field, *row: mfx.total_derivative(field, *row), (None, 0, 0, 0, 0))
    both = compiled(lambda field: rows(field, z, v, r, t), field)
    return np.asarray(both, np.float64).reshape(2, 8, -1)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)], ids=["float32", "bfloat16"])
def test_low_precision_is_accurate_in_value_and_derivative(x64, dtype, bound):
    exact = value_and_derivative(jnp.float64, jnp.float64)
    error = value_and_derivative(dtype, jnp.float32) - exact
    error = np.linalg.norm(error, axis=2) / np.linalg.norm(exact, axis=2)
    assert (np.median(error, axis=1) <= bound).all(), np.median(error, axis=1)
    assert (np.abs(exact).max((1, 2)) > 0.1).all()


# Errors


@pytest.mark.parametrize("shape", [(8,), (1, 2, 2, 2), (), 8])
def test_data_that_are_no_image_and_no_sequence_are_refused(unchecked, shape):
    with pytest.raises(
        ValueError, match=r"data_shape must be \(channels, height, width\) or \(channels, length\), got"
    ):
        mfx.UNet(shape, SMALL, key=jr.key(0))


@pytest.mark.parametrize("shape", [(3, 6, 8), (3, 8, 6), (3, 6)])
def test_image_that_cannot_be_halved_often_enough_is_refused(shape):
    with pytest.raises(ValueError, match=r"sides of data_shape divisible by 4, got 3 multipliers and \(3, "):
        mfx.UNet(shape, SMALL._replace(multipliers=(1, 1, 1), attention=()), key=jr.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 6}, "width must be a positive multiple of 4, got 6"),
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"multipliers": ()}, r"multipliers must be at least one number >= 1, got \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers must be of integers >= 1, got \(1, 0\)"),
        ({"blocks": 0}, "blocks must be an integer >= 1, got 0"),
        ({"width": 8.0}, "width must be an integer >= 1, got 8.0"),
        ({"blocks": True}, "blocks must be an integer >= 1, got True"),
        ({"multipliers": (1, 1.5)}, r"multipliers must be of integers >= 1, got \(1, 1.5\)"),
        ({"attention": (8.0,)}, r"attention must be of integers >= 1, got \(8.0,\)"),
        ({"attention": (16,)}, r"attention must be among the resolutions \[8, 4\] of data_shape \(3, 8, 4\), got .16"),
    ],
)
def test_size_that_makes_no_network_is_refused(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        mfx.UNet(SHAPE, SMALL._replace(**change), key=jr.key(0))


@pytest.mark.filterwarnings("error")
def test_sizes_of_numpy_make_the_same_network_as_those_of_python(unchecked):
    size = mfx.UNetSize(np.int64(4), (np.int32(1), np.int64(1)), np.int64(1), (np.int64(4),))
    network, of_python = (
        eqx.filter_eval_shape(lambda given=given: mfx.UNet(*given, key=jr.key(0)))
        for given in ((tuple(np.array(SHAPE)), size), (SHAPE, mfx.UNetSize(4, (1, 1), 1, (4,))))
    )
    assert repr(network.size) == repr(of_python.size) and network.data_shape == SHAPE
    assert jax.tree.structure(network) == jax.tree.structure(of_python)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"augmentation": -1}, "augmentation must be >= 0, got -1"),
        ({"labels": 0}, "labels must be an integer >= 1, got 0"),
        ({"dtype": jnp.int32}, "dtype must be floating point, got"),
    ],
)
def test_option_out_of_its_range_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        mfx.UNet(SHAPE, SMALL, **option, key=jr.key(0))


def test_label_missing_or_given_in_vain_is_refused():
    z, r, t, condition = inputs()
    for missing in (None, mfx.UNetCondition(augmentation=condition.augmentation)):
        with pytest.raises(ValueError, match="condition must be a label for a field with labels, got None"):
            small()(z, r, t, missing)
    for label in (condition.label, condition):
        with pytest.raises(
            ValueError, match=r"condition must be None for a field made without labels and cond.*, got 1"
        ):
            small(labels=None)(z, r, t, label)


@pytest.mark.parametrize(("numbers", "given"), [(6, 5), (0, 6)])
def test_augmentation_of_another_length_or_given_in_vain_is_refused(numbers, given):
    z, r, t, condition = inputs()
    with pytest.raises(ValueError, match=rf"augmentation must have shape \({numbers},\), got \({given},\)"):
        small(augmentation=numbers)(z, r, t, condition._replace(augmentation=jnp.zeros(given)))


@pytest.mark.parametrize("label", [1.0, (1, 2)], ids=["float", "pair"])
def test_label_that_is_no_integer_is_refused(unchecked, label):
    z, r, t, _ = inputs()
    with pytest.raises((TypeError, ValueError)):
        small()(z, r, t, jnp.asarray(label))


def test_state_of_another_shape_is_refused():
    _, r, t, condition = inputs()
    with pytest.raises(ValueError, match=r"z must have the data_shape \(3, 8, 4\), got \(3, 4, 8\)"):
        small()(jnp.zeros((3, 4, 8)), r, t, condition)


def test_null_label_needs_labels():
    with pytest.raises(ValueError, match="labels must be given for a null label to exist"):
        _ = small(labels=None).null_label
