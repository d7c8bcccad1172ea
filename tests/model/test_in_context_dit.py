import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled, FusedAttention
from in_context_reference import in_context_dit, total_derivative

import mf_eqx as mfx
from mf_eqx import checkpoint, nn
from mf_eqx._model import check_labels_fit

SMALL = mfx.InContextDiTSize(depth=3, width=16, heads=2, patch=2, head_depth=1)
COUNTS = mfx.TokenCounts(condition=3, scale=2, start=1, end=1, time=2)
SHAPE = (3, 4, 6)  # height and width differ, so that neither can stand for the other
R, T, LABEL, GUIDANCE = 0.3, 0.8, 1, (2.5, 0.2, 0.7)


def shapes(*, shape=SHAPE, size=SMALL, labels=4, guidance=True, velocity_head=True, **options):
    options |= {"labels": labels, "guidance": guidance, "velocity_head": velocity_head, "tokens": COUNTS}
    make = functools.partial(mfx.InContextDiT, shape, size, **options)
    return eqx.filter_eval_shape(lambda key: make(key=key), jr.key(0))


known_shapes = functools.cache(shapes)


def named(field):
    """Arrays, or their shapes, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(field)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


@functools.cache
def numbers(**options):
    """A parameter for every path, in float64: none is zero, and none so small that its part could not be seen."""
    draws = np.random.default_rng(0)

    def draw(name, leaf):
        offset = 1.0 if "norm" in name else 0.0
        return offset + 0.3 * draws.standard_normal(leaf.shape)

    return {name: draw(name, leaf) for name, leaf in named(known_shapes(**options)).items()}


def small(*, dtype=jnp.float32, how=None, **options):
    """A network with these parameters in `dtype`, computing in it unless `how`, further options, says otherwise."""
    values = numbers(**options)
    network = known_shapes(**{"dtype": dtype, **options, **(how or {})})

    def fill(path, leaf):
        return jax.device_put(np.asarray(values[jax.tree_util.keystr(path)], dtype)) if hasattr(leaf, "dtype") else leaf

    return jax.tree_util.tree_map_with_path(fill, network)


def drawn(shape=SHAPE):
    return np.random.default_rng(1).standard_normal(shape)


def inputs(dtype=float, *, guidance=True):
    """(z, r, t, condition)."""
    z = jnp.asarray(drawn(), dtype)
    label = jnp.asarray(LABEL)
    condition = mfx.GuidanceCondition(label, *GUIDANCE) if guidance else label
    return z, jnp.asarray(R, dtype), jnp.asarray(T, dtype), condition


# Parity with the reference

EMBEDDERS = {"scale": "omega_embedder", "start": "cfg_t_start_embedder", "end": "cfg_t_end_embedder"}
TOKENS = {"scale": "omega_tokens", "start": "t_min_tokens", "end": "t_max_tokens"}
BLOCK = {
    "norm1/kernel": ".norm_1.weight",
    "norm2/kernel": ".norm_2.weight",
    "attn_scale": ".gate_1",
    "mlp_scale": ".gate_2",
    "attn/q_norm/kernel": ".attention.query_norm.weight",
    "attn/k_norm/kernel": ".attention.key_norm.weight",
    **{
        f"attn/{theirs}_proj/_flax_linear/kernel": f".attention.{ours}.weight"
        for theirs, ours in {"q": "queries", "k": "keys", "v": "values", "out": "out"}.items()
    },
    **{
        f"mlp/{theirs}/_flax_linear/kernel": f".mlp.{ours}.weight"
        for theirs, ours in {"w1": "gate", "w2": "out", "w3": "hidden"}.items()
    },
}


def tokens_of(values, ours, tokens, embedder):
    """The parameters of one number."""
    layers = {"layers_0": "hidden", "layers_2": "out"}
    found = {tokens: values[f"{ours}.vectors"]}
    for theirs, layer in layers.items():
        for part, name in {"kernel": "weight", "bias": "bias"}.items():
            found[f"{embedder}/mlp/{theirs}/_flax_linear/{part}"] = values[f"{ours}.embedding.{layer}.{name}"]
    return found


def patches_of(values, shape, size):
    """The parameters that make tokens of patches, and the positions."""
    patch = (size.patch, size.patch, shape[0])
    if size.bottleneck is None:
        layers = {"proj": (".patches", patch)}
    else:
        layers = {"proj1": (".bottleneck", patch), "proj2": (".patches", (1, 1, size.bottleneck))}
    found = {"pos_embed": values[".positions"]} if size.learned_positions else {}
    for theirs, (ours, inputs) in layers.items():
        found[f"x_embedder/{theirs}/kernel"] = values[f"{ours}.weight"].reshape(*inputs, -1)
        found[f"x_embedder/{theirs}/bias"] = values[f"{ours}.bias"]
    return found


def tree(values, guidance, shape, size):
    """The same numbers under the names of the authors' files."""
    table = "y_embedder/embedding_table/" + ("embedding" if size.grid else "_flax_embedding/embedding")
    found = {
        **patches_of(values, shape, size),
        "class_tokens": values[".embedding.condition.vectors"],
        table: values[".embedding.condition.embedding.table"],
        **tokens_of(values, ".embedding.times[0]", "time_tokens", "h_embedder"),
    }
    for name in EMBEDDERS if guidance else ():
        found |= tokens_of(values, f".embedding.guidance.{name}", TOKENS[name], EMBEDDERS[name])
    stacks = {"shared_blocks": ".trunk", "u_heads": ".average_head.stack", "v_heads": ".velocity_head.stack"}
    for theirs, ours in stacks.items():
        for part, name in BLOCK.items():
            for i, value in enumerate(values[f"{ours}.blocks{name}"]):
                found[f"{theirs}_{i}/{part}"] = value
    for head, ours in {"u": ".average_head", "v": ".velocity_head"}.items():
        found[f"{head}_final_layer/norm/kernel"] = values[f"{ours}.norm.weight"]
        found[f"{head}_final_layer/linear/_flax_linear/kernel"] = values[f"{ours}.out.weight"]
        found[f"{head}_final_layer/linear/_flax_linear/bias"] = values[f"{ours}.out.bias"]
    return found


@functools.cache
def reference(*, r=R, t=T, guidance=True, shape=SHAPE, size=SMALL):
    """u, v and du/dt along v."""
    p = tree(numbers(guidance=guidance, shape=shape, size=size), guidance, shape, size)
    where, how = (r, t, LABEL, GUIDANCE if guidance else None), {"heads": size.heads, "patch": size.patch}
    z = drawn(shape)
    u, v = in_context_dit(p, z, *where, **how)
    return u, v, total_derivative(p, z, v, *where, **how)[0]


def assert_close(found, expected, tolerance):
    """Relative to the largest number."""
    size = np.abs(expected).max()
    assert size > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


PIXELS = SMALL._replace(bottleneck=5, learned_positions=True, grid=True)


@pytest.mark.parametrize("size", [SMALL, PIXELS], ids=["iMF", "pMF"])
def test_u_and_v_and_the_derivative_equal_those_of_an_independent_network(size, x64):
    expected = reference(size=size)
    tangent = (jnp.asarray(expected[1]), 0.0, 1.0)

    @jax.jit
    def evaluate(field, *inputs):
        (u, v), (dudt, _) = mfx.FusedJVP()(mfx.WithVelocity(field), *inputs, tangent=tangent, key=None)
        return u, v, dudt

    for found, exact in zip(evaluate(small(dtype=jnp.float64, size=size), *inputs()), expected, strict=True):
        assert_close(found, exact, 1e-11)


@pytest.mark.slow
def test_velocity_alone_is_that_of_both_at_equal_times_in_the_accuracy_of_float32():
    z, _, t, condition = inputs(jnp.float32)
    found = jax.jit(lambda field, *inputs: field.velocity(*inputs))(small(), z, t, condition)
    assert found.dtype == jnp.float32
    assert_close(found, reference(r=T)[1], 1e-5)


@pytest.mark.slow
def test_a_sequence_is_an_image_of_one_row():
    line, row, plain = (3, 6), (3, 1, 6), {"size": SMALL._replace(depth=2, patch=1), "guidance": False}
    z = jnp.asarray(drawn(row)[:, 0], jnp.float32)
    found = jax.jit(lambda field, *inputs: field(*inputs))(small(shape=line, **plain), z, R, T, LABEL)
    assert_close(found, reference(shape=row, **plain)[0][:, 0], 1e-5)


# Size and start


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


PRESETS = {
    "B2": (145_596_960, 88_948_256),
    "M2": (230_570_016, 173_921_312),
    "L2": (509_752_352, 409_071_648),
    "XL2": (711_113_760, 610_433_056),
}


@pytest.mark.parametrize("name", ["B2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("M2", "L2")), "XL2"])
def test_presets_have_exactly_the_parameters_of_the_authors(name):
    size, options = getattr(mfx, f"IMF_{name}"), {"labels": 1000, "guidance": True, "velocity_head": True}
    field = eqx.filter_eval_shape(lambda key: mfx.InContextDiT((4, 32, 32), size, **options, key=key), jr.key(0))
    head = field.velocity_head
    # The authors leave out the blocks of the head alone, not its last layer.
    without = parameters(field.without_velocity_head()) + parameters((head.norm, head.out))
    assert (parameters(field), without) == PRESETS[name]


PIXEL_PRESETS = {"B16": 175_474_304, "L16": 511_789_696, "H16": 1_113_259_520}


@pytest.mark.parametrize("name", PIXEL_PRESETS)
def test_presets_for_pixels_have_exactly_the_parameters_of_the_authors(name):
    make = made(getattr(mfx, f"PMF_{name}"), (3, 256, 256), labels=1000, guidance=True, velocity_head=True)
    assert parameters(make()) == PIXEL_PRESETS[name]


FRESH = mfx.InContextDiTSize(depth=2, width=32, heads=2, patch=2, head_depth=1, bottleneck=16, learned_positions=True)


@functools.cache
def fresh():
    make = functools.partial(mfx.InContextDiT, (1, 4, 4), FRESH, labels=4)
    return eqx.filter_jit(make)(key=jr.key(0))


@pytest.mark.slow  # to compile the generators of so many shapes
def test_parameters_start_as_in_the_authors_code():
    def std(name, shape):
        if name.endswith((".bias", ".gate_1", ".gate_2", "_head.out.weight")):
            return 0.0
        if ".blocks." in name:
            return 0.32 * shape[1] ** -0.5
        if name == ".positions":
            return 0.02
        if name.endswith(("vectors", "table")):
            return FRESH.width**-0.5
        xavier = name in (".patches.weight", ".bottleneck.weight")
        return (2 / sum(shape)) ** 0.5 if xavier else shape[0] ** -0.5

    for name, leaf in named(fresh()).items():
        if "norm" in name:
            np.testing.assert_array_equal(leaf, np.ones(leaf.shape), err_msg=name)
        else:  # within four standard errors
            np.testing.assert_allclose(np.std(leaf), std(name, leaf.shape), rtol=4 * (2 * leaf.size) ** -0.5)


# The passes


def program(function):
    """As text."""
    return str(jax.make_jaxpr(function)(*inputs(jnp.float32)))


def test_field_without_its_velocity_head_has_the_same_u_and_no_v():
    z, r, t, condition = inputs(jnp.float32)
    whole, without = small(), small().without_velocity_head()
    assert mfx.has_velocity_head(whole) and not mfx.has_velocity_head(without)
    plain = made(labels=4, guidance=True, tokens=COUNTS)()
    assert jax.tree.structure(without) == jax.tree.structure(plain) == jax.tree.structure(plain.without_velocity_head())
    assert program(lambda *inputs: without(*inputs)) == program(lambda *inputs: whole(*inputs))
    for ask in (lambda: without.velocity(z, t, condition), lambda: without.with_velocity(z, r, t, condition)):
        with pytest.raises(ValueError, match="velocity_head must be True for a field that is asked for its velocity"):
            ask()


def test_instantaneous_velocity_is_that_of_the_head_or_u_at_equal_times():
    whole, without = small(), small().without_velocity_head()
    by_head, by_u = (program(lambda z, r, t, c, f=f: mfx.instantaneous_velocity(f, z, t, c)) for f in (whole, without))
    assert by_head == program(lambda z, r, t, condition: whole.velocity(z, t, condition))
    assert by_u == program(lambda z, r, t, condition: whole(z, t, t, condition))


@pytest.mark.slow
def test_tokens_depend_on_the_duration_alone_unless_more_variables_are_given():
    _, r, t, condition = inputs(jnp.float32)
    embeddings = [small(time_variables=variables).embedding for variables in (nn.duration, nn.end_duration)]
    embed = jax.jit(lambda r, t: [embedding(r, t, condition) for embedding in embeddings])
    moved = [np.abs(a - b).max() for a, b in zip(embed(r - 0.25, t - 0.25), embed(r, t), strict=True)]
    assert moved[0] < 1e-5 and moved[1] > 0.1


# Gradients


class BothHeads(mfx.AbstractIdentity):
    """MeanFlow, and the regression of the velocity head, in one residual."""

    derivative: mfx.AbstractDerivative = mfx.FusedJVP()
    facts = mfx.Facts(needs_velocity_head=True)

    def residual(self, field, row):
        tangent = (row.v, 0.0, 1.0)
        (u, v), (dudt, _) = self.derivative(
            mfx.WithVelocity(field), row.z, row.r, row.t, row.condition, tangent=tangent, key=row.key
        )
        return u + (v - row.v) - jax.lax.stop_gradient(row.v - (row.t - row.r) * dudt)


def rows(dtype):
    """A batch with every label."""
    condition = mfx.GuidanceCondition(jnp.arange(8) % 5, jnp.linspace(1.0, 4.0, 8), jnp.full(8, 0.1), jnp.full(8, 0.9))
    return mfx.Batch(jnp.asarray(drawn((8, *SHAPE)), dtype), condition)


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero():
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(field, batch):
        u, v = jax.vmap(lambda z, condition: field.with_velocity(z, R, T, condition))(batch.x, batch.condition)
        return jnp.mean(jnp.sin(u) + v**2)

    field = small(size=SMALL._replace(depth=2), how={"unroll": True})
    for name, leaf in named(gradient(field, rows(jnp.float32))).items():
        assert np.isfinite(leaf).all() and (leaf != 0).all(), name


@functools.cache
def training_gradient(form):
    """Of rows of `BothHeads`, as arrays by their paths."""
    objective, batch = mfx.Objective(BothHeads(), identity_share=1), rows(jnp.float64)
    field = small(dtype=jnp.float64, how=FORMS[form])
    return named(eqx.filter_jit(eqx.filter_grad(lambda field: objective(field, batch, key=jr.key(6))[0]))(field))


FORMS = {
    "plain": {},
    "remat": {"remat": True},
    "unrolled": {"unroll": True},
    "fused attention": {"attention": FusedAttention()},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.keys() - {"plain"})
def test_how_a_field_computes_does_not_change_its_gradient(x64, form):
    for name, expected in training_gradient("plain").items():
        np.testing.assert_allclose(training_gradient(form)[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


# Precision


def test_bfloat16_computes_its_products_in_bfloat16_and_the_embeddings_in_float32():
    field = small(how={"dtype": jnp.bfloat16})
    text = program(lambda *inputs: field(*inputs)).split("\n")
    products = [line.split(":")[1].split("=")[0].strip() for line in text if "dot_general" in line]
    # In float32: two products for each of the four numbers, and the logits of attention in trunk and head.
    assert sum(product.startswith("f32") for product in products) == 10
    assert sum(product.startswith("bf16") for product in products) == 2 + 2 * 8
    assert eqx.filter_eval_shape(field, *inputs(jnp.float32)).dtype == jnp.float32


def test_guidance_in_bfloat16_becomes_tokens_in_the_accuracy_of_float32():
    low, high = (
        [jnp.asarray(number, dtype) for number in (7.0, 0.25, 0.75)]  # 1 - 1 / 7 needs more than 8 bits
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    tokens = small().embedding.guidance
    low, high = jax.jit(lambda *both: [tokens(mfx.GuidanceCondition(None, *numbers)) for numbers in both])(low, high)
    np.testing.assert_allclose(low, high, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_near_to_the_independent_network():
    found = eqx.filter_jit(small(how={"dtype": jnp.bfloat16}))(*inputs(jnp.float32))
    assert_close(found, reference()[0], 0.05)


# Conditions


class Caption(nn.AbstractConditionTokens):
    """A text as vectors of its words, and several labels, each a token."""

    words: nn.Linear
    table: jax.Array

    def __call__(self, condition):
        return jnp.concatenate([self.words(condition["text"]), self.table[condition["labels"]]])


def test_conditions_of_any_structure_become_any_number_of_tokens():
    tokens = filled(lambda: Caption(nn.Linear(5, 16, key=jr.key(0)), jnp.ones((9, 16))))
    embedding = shapes(labels=None, condition=tokens).embedding
    for words in (3, 7):
        caption = {"text": np.ones((words, 5), np.float32), "labels": np.asarray([8, 0])}
        found = eqx.filter_eval_shape(embedding, jnp.asarray(R), jnp.asarray(T), mfx.GuidanceCondition(caption, 2.0))
        assert found.shape == (words + 2 + 4 + 2, 16)


def test_a_vector_is_a_condition():
    field = shapes(labels=None, condition=5, guidance=False)
    found = eqx.filter_eval_shape(lambda field: field(*inputs(jnp.float32)[:3], jnp.ones(5)), field)
    assert found.shape == SHAPE and field.embedding.condition.vectors.shape == (3, 16)


def test_null_guidance_condition_is_the_null_label_with_the_default_guidance():
    row = mfx.GuidanceCondition(np.int32(1), *np.float32(GUIDANCE))
    null = mfx.LabelDropout(0.1, mfx.GuidanceCondition(4)).null_like(row)
    assert jax.tree.structure(null) == jax.tree.structure(row)
    assert jax.tree.leaves(null) == [4, 1.0, 0.0, 1.0]


def asked(condition, **options):
    z, r, t, _ = inputs(jnp.float32)
    return lambda: eqx.filter_eval_shape(lambda field: field(z, r, t, condition), known_shapes(**options))


def guided(*arguments):
    return asked(mfx.GuidanceCondition(*arguments))


def made(size=SMALL, shape=SHAPE, **options):
    return lambda: eqx.filter_eval_shape(lambda: mfx.InContextDiT(shape, size, **options, key=jr.key(0)))


class Narrow(nn.AbstractConditionTokens):
    def __call__(self, condition):
        return jnp.zeros((2, 15))


REFUSED = {
    "condition must be a GuidanceCondition for a field with guidance, got 1": asked(1),
    "condition must be a GuidanceCondition for a field with guidance, got None": asked(None),
    "condition must be no GuidanceCondition for a field without guidance": asked(
        mfx.GuidanceCondition(1), guidance=False
    ),
    "condition must be given for this field, got None": guided(None),
    "condition must be None for a field without labels and condition, got 1": asked(1, labels=None, guidance=False),
    r"condition must be a label in \[0, 4\], got 5": guided(5),
    "scale must be > 0 and finite, got 0": guided(1, 0),
    r"scale must be one number of shape \(\), got shape \(2,\)": guided(1, np.ones(2)),
    r"end must be one number of shape \(\), got shape \(3,\)": guided(1, 2.0, 0.0, np.ones(3)),
    r"start and end must satisfy 0 <= start <= end <= 1, got 0\.5 and 0\.2": guided(1, 2.0, 0.5, 0.2),
    "head_depth must be below the depth 3, got 3": made(SMALL._replace(head_depth=3)),
    "head_depth must be an integer >= 1, got 0": made(SMALL._replace(head_depth=0)),
    "bottleneck must be an integer >= 1, got 0": made(SMALL._replace(bottleneck=0)),
    "grid must be False for sequences, got True": made(SMALL._replace(grid=True), (3, 6)),
    "width must give heads whose size is a multiple of 4": made(SMALL._replace(width=12, grid=True)),
    "condition must be labels, a vector, an embedding or None for learned positions, got Narrow": made(
        SMALL._replace(learned_positions=True), condition=Narrow()
    ),
    "size must be an instance of InContextDiTSize": made(mfx.DiTSize(2, 16, 2, 2)),
    "tokens must be of integers >= 1": made(tokens=mfx.TokenCounts(time=0)),
    r"patch must divide the sides of data_shape \(3, 4, 5\), got 2": made(shape=(3, 4, 5)),
    r"data_shape must be \(channels, height, width\) or \(channels, length\), got": made(shape=(8,)),
    "width must give heads of even size": made(SMALL._replace(width=6)),
    "width must be a multiple of heads": made(SMALL._replace(heads=3)),
    "width must be an integer >= 1, got 8.0": made(SMALL._replace(width=8.0)),
    "mlp must be an integer >= 1, got True": made(SMALL._replace(mlp=True)),
    "head_depth must be an integer >= 1, got 1.5": made(SMALL._replace(head_depth=1.5)),
    "dtype must be floating point, got": made(dtype=jnp.int32),
    "labels must be None with a condition, whose tokens may hold a LabelEmbedding; got 3": made(labels=3, condition=2),
    "guidance must be False for a field without labels and condition, got True": made(guidance=True),
    "labels must be given for a null label to exist, got None": lambda: shapes(labels=None, guidance=False).null_label,
    r"z must have the data_shape \(3, 4, 6\), got \(3, 6, 4\)": lambda: known_shapes()(jnp.ones((3, 6, 4)), R, T, 1),
    r"condition must become tokens of shape \(tokens, 16\), got shape \(2, 15\)": lambda: eqx.filter_eval_shape(
        made(condition=Narrow())().embedding, R, T, 1
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize("condition", [jnp.asarray([0, 5]), mfx.GuidanceCondition(jnp.asarray([0, 5]))])
def test_a_generator_refuses_labels_that_the_field_lacks(condition):
    field = known_shapes(guidance=isinstance(condition, mfx.GuidanceCondition))
    with pytest.raises(ValueError, match=r"condition must lie in \[0, 4\] for a network with 4 labels, got 5"):
        check_labels_fit("condition", condition, field)


# From training to a sampler


@pytest.mark.slow
@pytest.mark.parametrize("identity", [mfx.MeanFlow(), mfx.ImprovedMeanFlow()])
def test_field_of_labels_alone_learns(identity):
    batch = mfx.Batch(jr.normal(jr.key(1), (64, 1, 4, 4)) + 2, jnp.arange(64) % 4)
    objective = mfx.Objective(identity, identity_share=0.5, label_dropout=mfx.LabelDropout(0.1, fresh().null_label))
    step = mfx.TrainStep(objective, optax.adam(1e-2))
    state, errors = mfx.init_state(fresh(), step.optimizer, key=jr.key(2)), []
    for _ in range(40):
        state, metrics = step(state, batch)
        errors.append(metrics["boundary_error"].value)
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:2])
    generator = mfx.Generator(state.field, jr.key(4), state.field.data_shape, labels=4)
    assert np.mean(generator(range(64))) > 1  # of data around 2


@pytest.mark.slow
def test_a_saved_field_of_labels_alone_becomes_a_sampler_that_equals_an_independent_network(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("flatbuffers")
    checkpoint.save_weights(tmp_path / "weights", small(guidance=False).without_velocity_head())
    field = checkpoint.load_weights(tmp_path / "weights")
    checkpoint.export_sampler(tmp_path / "sampler", field, SHAPE, jnp.asarray(0), platforms=("cpu",))
    sampler = jax.export.deserialize(bytearray((tmp_path / "sampler").read_bytes()))
    found = sampler.call(np.float32(drawn())[None], np.asarray([LABEL], np.int32))[0]
    assert_close(found, drawn() - reference(r=0.0, t=1.0, guidance=False)[0], 1e-5)
