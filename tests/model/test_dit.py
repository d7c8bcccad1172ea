import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled, FusedAttention, refilled

import mf_eqx as mfx
from mf_eqx import nn

SMALL = mfx.DiTSize(depth=2, width=16, heads=2, patch=2)
SHAPE = (3, 4, 6)  # height and width differ, so that neither can stand for the other
R, T, LABEL = 0.3, 0.8, 1


@functools.lru_cache(None, typed=True)  # 1 is not True
def small(shape=SHAPE, *, labels=4, unroll=1, **options):
    """With a loop over the blocks unless `unroll` says otherwise."""
    with jax.enable_x64(False):
        return filled(lambda: mfx.DiT(shape, SMALL, labels=labels, unroll=unroll, **options, key=jr.key(0)))


def small64(*arguments, **options):
    """To be built inside float64."""
    return in_float64(small(*arguments, dtype=jnp.float64, **options))


def in_float64(field):
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float64)), field)


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


def inputs(rows=(), shape=SHAPE):
    """(z, r, t, label), or as many of them as `rows` says, in the default precision."""
    r, t = np.sort(np.random.default_rng(3).uniform(size=(2, *rows)), axis=0) if rows else (R, T)
    return normal(2, *rows, *shape), jnp.asarray(r), jnp.asarray(t), jnp.asarray(np.full(rows, LABEL))


@eqx.filter_jit
def evaluate(field, z, r, t, label=None):
    return field(z, r, t, label)


# An independent forward pass, written for the eye and not for speed


def reference_linear(layer, x):
    return x @ np.asarray(layer.weight) + np.asarray(layer.bias)


def reference_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def reference_silu(x):
    return x / (1 + np.exp(-x))


def reference_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference_attention(layer, x):
    tokens, width = x.shape
    size = width // layer.heads
    query, key, value = np.split(reference_linear(layer.qkv, x), 3, axis=1)
    mixed = np.zeros_like(x)
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(tokens):
            weights = np.exp([query[i, part] @ key[j, part] / np.sqrt(size) for j in range(tokens)])
            mixed[i, part] = sum(w * value[j, part] for j, w in enumerate(weights / weights.sum()))
    return reference_linear(layer.out, mixed)


def reference_position(row, column, width):
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    halves = [(np.sin(place * frequencies), np.cos(place * frequencies)) for place in (column, row)]
    return np.concatenate([part for half in halves for part in half])


def reference_times(embedding, r, t):
    total = 0
    for value, hidden, out in zip((t, t - r), embedding.hidden, embedding.out, strict=True):
        angles = value * 10_000.0 ** (-np.arange(128) / 128)
        sinusoid = np.concatenate([np.cos(angles), np.sin(angles)])
        total = total + reference_linear(out, reference_silu(reference_linear(hidden, sinusoid)))
    return total


def reference_dit(field, z, r, t, label):
    """Peebles and Xie 2023, one token and one head at a time."""
    (channels, height, width), p = z.shape, field.patch
    c = reference_times(field.embedding.times, r, t) + np.asarray(field.embedding.label.table)[label]
    c = reference_silu(c)
    places = [(row, column) for row in range(height // p) for column in range(width // p)]
    x = []
    for row, column in places:
        pixels = [(i, j, k) for i in range(p) for j in range(p) for k in range(channels)]
        patch = np.array([z[k, row * p + i, column * p + j] for i, j, k in pixels])
        x.append(reference_linear(field.patches, patch) + reference_position(row, column, c.size))
    values = reference_blocks(field, np.stack(x), c)
    image = np.zeros(z.shape)
    for (row, column), patch in zip(places, values, strict=True):
        for i in range(p):
            for j in range(p):
                image[:, row * p + i, column * p + j] = patch.reshape(p, p, channels)[i, j]
    return image


def reference_line(field, z, r, t, label):
    """The same for a sequence."""
    (channels, length), p = z.shape, field.patch
    c = reference_silu(reference_times(field.embedding.times, r, t) + np.asarray(field.embedding.label.table)[label])
    frequencies = 10_000.0 ** (-np.arange(c.size // 2) / (c.size // 2))
    x = []
    for place in range(length // p):
        patch = np.array([z[k, place * p + i] for i in range(p) for k in range(channels)])
        position = np.concatenate([np.sin(place * frequencies), np.cos(place * frequencies)])
        x.append(reference_linear(field.patches, patch) + position)
    values = reference_blocks(field, np.stack(x), c)
    return np.concatenate([patch.reshape(p, channels).T for patch in values], axis=1)


def reference_blocks(field, x, c):
    """The values of patches, from their tokens and the embedded condition."""
    for i in range(SMALL.depth):
        block = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], field.stack.blocks)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = np.split(reference_linear(block.modulation, c), 6)
        x = x + gate_1 * reference_attention(block.attention, (1 + scale_1) * reference_norm(x) + shift_1)
        hidden = reference_gelu(reference_linear(block.hidden, (1 + scale_2) * reference_norm(x) + shift_2))
        x = x + gate_2 * reference_linear(block.out, hidden)
    shift, scale = np.split(reference_linear(field.modulation, c), 2)
    return reference_linear(field.out, (1 + scale) * reference_norm(x) + shift)


def test_forward_pass_equals_an_independent_one(x64):
    field = small64()
    z, r, t, label = inputs()
    expected = reference_dit(field, np.asarray(z), R, T, LABEL)
    # Positions are constants in float32.
    np.testing.assert_allclose(evaluate(field, z, r, t, label), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 0.1


# Sequences

LINE = (3, 10)


def test_forward_pass_of_a_sequence_equals_an_independent_one(x64):
    field = small64(LINE)
    z, r, t, label = inputs(shape=LINE)
    expected = reference_line(field, np.asarray(z), R, T, LABEL)
    np.testing.assert_allclose(evaluate(field, z, r, t, label), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 0.1


def test_sequence_in_bfloat16_keeps_a_float32_output():
    found, expected = (evaluate(small(LINE, **how), *inputs(shape=LINE)) for how in ({"dtype": jnp.bfloat16}, {}))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.abs(expected).max()))


def test_sequence_trains_with_a_vector_for_its_condition():
    field = small(LINE, labels=None, condition=5)
    batch = mfx.Batch(normal(1, 8, *LINE), normal(2, 8, 5))
    step = mfx.TrainStep(mfx.Objective(identity_share=1), optax.sgd(1e-3))
    state, metrics = step(mfx.init_state(field, step.optimizer, key=jr.key(3)), batch)
    assert np.isfinite(metrics["loss"].value) and int(state.faults.total) == 0


@pytest.mark.parametrize("shape", [(8,), (1, 2, 2, 2), ()])
def test_data_that_are_no_image_and_no_sequence_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"data_shape must be \(channels, height, width\) or \(channels, length\), got"
    ):
        mfx.DiT(shape, SMALL, key=jr.key(0))


def test_patch_that_does_not_divide_the_length_is_refused():
    with pytest.raises(ValueError, match=r"patch must divide the sides of data_shape \(3, 9\), got 2"):
        mfx.DiT((3, 9), SMALL, key=jr.key(0))


# Size and start


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        (mfx.DIT_S4, 33_142_336),
        (mfx.DIT_S2, 33_105_424),
        (mfx.DIT_B4, 131_165_248),
        (mfx.DIT_B2, 131_091_472),
        (mfx.DIT_M2, 308_019_216),
        (mfx.DIT_L2, 459_137_040),
        (mfx.DIT_XL2, 676_440_592),
    ],
    ids=["S/4", "S/2", "B/4", "B/2", "M/2", "L/2", "XL/2"],
)
def test_presets_have_exactly_the_parameters_of_the_paper(size, parameters):
    field = eqx.filter_eval_shape(lambda key: mfx.DiT((4, 32, 32), size, labels=1000, key=key), jr.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(field)) == parameters


@functools.cache
def fresh():
    return eqx.filter_jit(lambda key: mfx.DiT(SHAPE, SMALL, labels=4, unroll=1, key=key))(jr.key(0))


def test_fresh_field_outputs_zero():
    np.testing.assert_array_equal(evaluate(fresh(), *inputs()), np.zeros(SHAPE))


def test_only_modulations_the_last_layer_and_biases_start_at_zero():
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh())}
    zero = {path for path, leaf in leaves.items() if not np.asarray(leaf).any()}
    biases = {path for path in leaves if path.endswith(".bias")}
    assert zero == biases | {".stack.blocks.modulation.weight", ".modulation.weight", ".out.weight"}


def test_unconditional_field_takes_no_label():
    field = small(labels=None)
    assert field.embedding.label is None
    assert eqx.filter_eval_shape(field, *inputs()[:3]).shape == SHAPE


@pytest.mark.parametrize("variables", [nn.end_start, nn.end_duration, nn.end_start_duration, nn.duration])
def test_every_embedding_of_table_1c_can_be_chosen(variables):
    embedding = small(time_variables=variables).embedding
    _, r, t, label = inputs()
    assert np.any(np.asarray(embedding(r, t, label)) != embedding(jnp.asarray(R + 0.1), t, label))
    assert len(embedding.times.hidden) == len(variables(r, t))


def test_label_and_null_label_change_the_output():
    field = small()
    z, r, t, _ = inputs()
    outputs = [np.asarray(evaluate(field, z, r, t, jnp.asarray(label))) for label in (0, 3, field.null_label)]
    assert field.null_label == 4
    for i in range(3):
        assert (outputs[i] != outputs[i - 1]).any()


# Derivatives


def test_scan_unrolled_and_remat_agree_in_values_and_gradients(x64):
    rows = inputs((2,))

    @jax.jit
    def everything(field):
        def loss(field):
            u, dudt = jax.vmap(lambda z, r, t, label: mfx.total_derivative(field, z, z, r, t, label))(*rows)
            return jnp.mean(jnp.sin(u)), (u, dudt)

        (_, values), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(field)
        return values, jax.tree.leaves(gradient)

    expected = jax.tree.leaves(everything(small64(unroll=1)))
    for form in ({"unroll": True}, {"remat": True}):
        for result, leaf in zip(jax.tree.leaves(everything(small64(**form))), expected, strict=True):
            np.testing.assert_allclose(result, leaf, rtol=1e-9, atol=1e-12)


@eqx.filter_jit
def derivatives(field, z, v, r, t, label):
    """u and its derivatives along (v, 0, 1) and in r, and the same from values nearby."""
    step = 1e-5
    _, in_r = jax.jvp(lambda r: field(z, r, t, label), (r,), (jnp.ones(()),))
    moves = jnp.asarray([(0, 0), (-step, 0), (step, 0), (0, -step), (0, step)])
    near = jax.lax.map(lambda move: field(z + move[0] * v, r + move[1], t + move[0], label), moves)
    found = *mfx.total_derivative(field, z, v, r, t, label), in_r
    return found, (near[0], (near[2] - near[1]) / (2 * step), (near[4] - near[3]) / (2 * step))


FIELDS = {
    "image": small64,
    "sequence": lambda: small64(LINE, unroll=None, remat=True),
    "early blocks": lambda: in_float64(decoupled(dtype=jnp.float64, unroll=1)[0]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_total_derivative_and_that_in_r_equal_central_finite_differences(x64, name):
    field = FIELDS[name]()
    z, *rest = inputs(shape=field.data_shape)
    (u, dudt, in_r), (value, difference, in_r_difference) = derivatives(field, z, normal(4, *z.shape), *rest)
    np.testing.assert_allclose(dudt, difference, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(u, value, rtol=1e-12)
    np.testing.assert_allclose(in_r, in_r_difference, rtol=1e-6, atol=1e-9)
    assert np.abs(dudt).max() > 0.1 and np.abs(in_r).max() > 1e-4


GUIDED = mfx.Guidance(0.7, mix=0.2)  # with a pass for the condition and one without it


def gradients(field, engine=mfx.FusedJVP(), guidance=None):
    """Of a training loss with every label in the batch: of rows with the identity, or, if guided, of a quarter of such
    rows and others with r = t."""
    objective = mfx.Objective(
        mfx.MeanFlow(derivative=engine),
        identity_share=1 if guidance is None else "1/4",
        guidance=guidance,
        label_dropout=mfx.LabelDropout(0.4, field.null_label),
    )
    batch = mfx.Batch(normal(5, 16, *SHAPE), jnp.asarray(np.arange(16) % 4))
    return jax.grad(lambda field: objective(field, batch, key=jr.key(6))[0])(field)


@functools.cache
def gradients64(*, engine=mfx.FusedJVP(), attention=nn.XLAAttention(), guidance=None, **form):
    return jax.jit(functools.partial(gradients, engine=engine, guidance=guidance))(small64(attention=attention, **form))


def training_gradient(**options):
    """As one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients64(**options))])


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(x64):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients64()):
        leaf, name = np.asarray(leaf), jax.tree_util.keystr(path)
        if name.endswith("qkv.bias"):
            # A bias of the keys shifts all logits of a query alike, which the softmax takes away again.
            queries, keys, values = np.split(leaf, 3, axis=-1)
            assert np.abs(keys).max() < 1e-12 * np.abs(leaf).max()
            leaf = np.stack([queries, values])
        assert (np.isfinite(leaf) & (leaf != 0)).all(), name


# Engines and attention


@pytest.mark.slow
def test_stopped_jvp_gives_the_training_gradient_of_the_fused_one(x64):
    expected = training_gradient()
    np.testing.assert_allclose(training_gradient(engine=mfx.StoppedJVP()), expected, rtol=1e-12, atol=1e-12)
    assert np.linalg.norm(expected) > 0.1


@pytest.mark.slow
def test_central_difference_gives_the_training_gradient_up_to_the_square_of_its_step(x64):
    expected = training_gradient()
    error = np.linalg.norm(training_gradient(engine=mfx.CentralDifference(1e-4)) - expected)
    assert error < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("guidance", "form"),
    [
        (None, {}),
        pytest.param(GUIDED, {}, marks=pytest.mark.slow),
        pytest.param(None, {"unroll": True}, marks=pytest.mark.slow),
        pytest.param(None, {"remat": True}, marks=pytest.mark.slow),
    ],
    ids=["scanned", "scanned, guided", "unrolled", "remat"],
)
def test_training_gradient_with_a_fused_kernel_is_that_with_xla_attention(x64, guidance, form):
    found = training_gradient(attention=FusedAttention(), guidance=guidance, **form)
    np.testing.assert_allclose(found, training_gradient(guidance=guidance), rtol=1e-12, atol=1e-12)


class Doubled(nn.AbstractAttention):
    """Recognisable: twice the attention."""

    def __call__(self, query, key, value):
        return 2 * nn.XLAAttention()(query, key, value)

    def forward_mode(self):
        return self


class TwoFaced(nn.AbstractAttention):
    """Plain attention, which becomes twice itself in forward mode."""

    def __call__(self, query, key, value):
        return nn.XLAAttention()(query, key, value)

    def forward_mode(self):
        return Doubled()


class Pair(mfx.AbstractDerivative):
    """u of one field and du/dt of another, whatever field it is given."""

    value: mfx.AbstractField
    derivative: mfx.AbstractField
    passes = None

    def __call__(self, field, z, r, t, condition, *, tangent, key):
        u = self.value(z, r, t, condition, key=key)
        return u, mfx.FusedJVP()(self.derivative, z, r, t, condition, tangent=tangent, key=key)[1]


class Mixer(mfx.AbstractField):
    """Attention alone, of all inputs."""

    attention: nn.AbstractAttention

    def __call__(self, z, r, t, condition=None, *, key=None):
        tokens = z.reshape(12, 2, 3)
        return self.attention((1 + r) * tokens, t * tokens, tokens + condition).reshape(z.shape)


# One field, with attention that is plain, that is doubled, and that has both faces.
FACES = Mixer(nn.XLAAttention()), Mixer(Doubled()), Mixer(TwoFaced())


def test_engine_replaces_the_attention_only_where_it_differentiates(x64):
    z, r, t, label = inputs()

    @jax.jit
    def compare(z):
        def evaluate(engine, field):
            return engine(field, z, r, t, label, tangent=(jnp.cos(z), 0.0, 1.0), key=None)

        plain, doubled, two_faced = FACES
        found = [evaluate(e, two_faced) for e in (mfx.FusedJVP(), mfx.StoppedJVP(), mfx.CentralDifference(1e-4))]
        return found, [evaluate(mfx.FusedJVP(), field) for field in (plain, doubled)]

    (fused, stopped, central), (plain, doubled) = compare(z)
    assert np.linalg.norm(plain[0] - doubled[0]) > 0.01 and np.linalg.norm(plain[1] - doubled[1]) > 0.01
    np.testing.assert_allclose(fused, doubled, rtol=1e-12)
    np.testing.assert_allclose(stopped, (plain[0], doubled[1]), rtol=1e-12)
    np.testing.assert_allclose(central[0], plain[0], rtol=1e-12)
    np.testing.assert_allclose(central[1], plain[1], atol=1e-6)


def test_boundary_rows_teachers_and_guidance_keep_the_plain_attention(x64):
    batch = mfx.Batch(normal(5, 4, *SHAPE), jnp.asarray(np.arange(4)))

    def errors(field, engine):
        # The predicted velocity of the improved identity is a pass that teaches, too.
        objective = mfx.Objective(
            mfx.ImprovedMeanFlow(derivative=engine), guidance=GUIDED, label_dropout=mfx.LabelDropout(0.1, 4)
        )
        _, metrics = objective(field, batch, key=jr.key(6))
        return metrics["boundary_error"].value, metrics["identity_error"].value

    @jax.jit
    def compare():
        plain, doubled, two_faced = FACES
        return errors(two_faced, mfx.FusedJVP()), errors(plain, Pair(doubled, doubled))

    np.testing.assert_allclose(*compare(), rtol=1e-12)


def test_norms_of_queries_and_keys_are_an_option_that_adds_nothing_but_their_scales():
    shapes = [eqx.filter_eval_shape(lambda q=q: mfx.DiT(SHAPE, SMALL, qk_norm=q, key=jr.key(0))) for q in (False, True)]
    plain, with_norms = ({jax.tree_util.keystr(p): leaf for p, leaf in jax.tree.leaves_with_path(s)} for s in shapes)
    added = {name: with_norms[name].shape for name in with_norms.keys() - plain.keys()}
    of_attention = ".stack.blocks.attention"
    assert plain.keys() < with_norms.keys()
    assert added == {f"{of_attention}.{name}_norm.weight": (2, 8) for name in ("query", "key")}
    field, (z, r, t, _) = small(qk_norm=True, labels=None), inputs()
    qkv = field.stack.blocks.attention.qkv
    factors = np.repeat(np.float32([9, 9, 1]), SMALL.width)  # of queries, keys and values
    larger = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) * factors), qkv)
    scaled = eqx.tree_at(lambda field: field.stack.blocks.attention.qkv, field, larger)
    np.testing.assert_allclose(evaluate(field, z, r, t), evaluate(scaled, z, r, t), rtol=1e-3, atol=1e-4)


# Precision


def test_bfloat16_compute_leaves_the_output_and_the_gradients_in_float32():
    field = small(dtype=jnp.bfloat16)
    z, r, t, label = inputs()
    u, dudt = eqx.filter_eval_shape(mfx.total_derivative, field, z, z, r, t, label)
    assert u.dtype == dudt.dtype == jnp.float32
    for leaf in jax.tree.leaves((field, eqx.filter_eval_shape(gradients, field))):
        assert leaf.dtype == jnp.float32


def test_bfloat16_compute_computes_its_products_in_bfloat16_and_the_times_in_float32():
    field = small(dtype=jnp.bfloat16)
    products = str(jax.make_jaxpr(lambda *inputs: field(*inputs))(*inputs())).split("\n")
    products = [line.split(":")[1].split("=")[0].strip() for line in products if "dot_general" in line]
    wide = [result for result in products if result.startswith("f32")]
    # In float32: two products for each of the two time variables, and the logits of attention.
    assert len(wide) == 5 and len(products) - len(wide) >= 6
    assert field.embedding(*(jnp.asarray(x) for x in (R, T, LABEL))).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)], ids=["float32", "bfloat16"])
def test_derivative_in_low_precision_is_accurate(x64, dtype, bound):
    size = mfx.DiTSize(depth=4, width=64, heads=4, patch=2)

    def derivatives(compute, parameters):
        field = mfx.DiT((4, 8, 8), size, dtype=compute, key=jr.key(0))
        field = nn.cast(refilled(nn.cast(field, jnp.float32)), parameters)
        z, v = jr.normal(jr.key(2), (2, 32, 4, 8, 8), jnp.float32).astype(parameters)
        r, t = jnp.sort(jr.uniform(jr.key(3), (2, 32), jnp.float32), axis=0).astype(parameters)
        both = jax.jit(jax.vmap(lambda z, v, r, t: mfx.total_derivative(field, z, v, r, t)))(z, v, r, t)
        return np.asarray(both[1], np.float64).reshape(32, -1)

    exact = derivatives(jnp.float64, jnp.float64)
    error = np.linalg.norm(derivatives(dtype, jnp.float32) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.median(error) <= bound


# Errors


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 4, 7)])
def test_patch_that_does_not_divide_the_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"patch must divide the sides of data_shape \(3, "):
        mfx.DiT(shape, SMALL, key=jr.key(0))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width 16 and heads 3"):
        eqx.filter_eval_shape(lambda: mfx.DiT(SHAPE, SMALL._replace(heads=3), key=jr.key(0)))


@pytest.mark.parametrize(("name", "value"), [("depth", 2.0), ("width", True), ("heads", 1.5), ("patch", 0)])
def test_size_that_is_no_count_is_refused(unchecked, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {value}"):
        mfx.DiT(SHAPE, SMALL._replace(**{name: value}), key=jr.key(0))


@pytest.mark.filterwarnings("error")
def test_sizes_of_numpy_make_the_same_network_as_those_of_python(unchecked):
    shape, size = tuple(np.array(SHAPE)), mfx.DiTSize(*np.array(SMALL))
    network, of_python = (
        eqx.filter_eval_shape(lambda given=given: mfx.DiT(*given, key=jr.key(0)))
        for given in ((shape, size), (SHAPE, SMALL))
    )
    assert repr(network.arguments) == repr(of_python.arguments)
    assert jax.tree.structure(network) == jax.tree.structure(of_python)


def test_width_without_quarters_is_refused():
    with pytest.raises(ValueError, match=r"width must be a multiple of 4.*got 6"):
        mfx.DiT(SHAPE, SMALL._replace(width=6), key=jr.key(0))


def test_label_missing_or_given_in_vain_is_refused():
    z, r, t, label = inputs()
    with pytest.raises(ValueError, match="condition must be a label for a field with labels, got None"):
        small()(z, r, t)
    with pytest.raises(ValueError, match="condition must be None for a field made without labels and condition, got 1"):
        small(labels=None)(z, r, t, label)


def test_state_of_another_shape_is_refused():
    _, r, t, label = inputs()
    with pytest.raises(ValueError, match=r"z must have the data_shape \(3, 4, 6\), got \(3, 6, 4\)"):
        small()(jnp.zeros((3, 6, 4)), r, t, label)


def test_null_label_needs_labels():
    with pytest.raises(ValueError, match="labels must be given for a null label to exist"):
        _ = small(labels=None).null_label


# Decoupled MeanFlow: early blocks see t, late ones r


@functools.lru_cache(None, typed=True)  # 1 is not True
def decoupled(**options):
    """Three blocks, of which two are early; and the same weights without the option."""
    size = SMALL._replace(depth=3)
    make = functools.partial(mfx.DiT, SHAPE, size, labels=4, key=jr.key(0), **options)
    with jax.enable_x64(False):
        return tuple(filled(functools.partial(make, early_blocks=early)) for early in (2, None))


@pytest.mark.parametrize("unroll", [1, True])
def test_decoupled_field_is_the_plain_one_at_equal_times_and_another_elsewhere(unroll):
    z, r, t, label = inputs()
    field, plain = decoupled(unroll=unroll)[0], decoupled(unroll=1)[1]
    np.testing.assert_allclose(evaluate(field, z, t, t, label), evaluate(plain, z, t, t, label), rtol=1e-5, atol=1e-6)
    assert (np.asarray(evaluate(field, z, r, t, label)) != evaluate(plain, z, r, t, label)).all()


def test_early_blocks_see_t_alone_and_late_ones_r_alone():
    z, _, _, label = inputs()
    field, _ = decoupled(unroll=1)

    def moves(field, *, r_step=0.0, t_step=0.0):
        values = [evaluate(field, z, *map(jnp.asarray, times), label) for times in ((R, T), (R + r_step, T + t_step))]
        return np.any(np.asarray(values[0]) != values[1])

    def without(blocks, last_layer):
        """The field whose `blocks`, and last layer, are modulated by constants."""
        weights, last = (np.array(part.weight) for part in (field.stack.blocks.modulation, field.modulation))
        weights[blocks] = 0
        changed = jnp.asarray(weights), jnp.asarray(0 * last if last_layer else last)
        return eqx.tree_at(lambda f: (f.stack.blocks.modulation.weight, f.modulation.weight), field, changed)

    early_alone, late_alone = without([2], True), without([0, 1], False)
    assert moves(early_alone, t_step=0.1) and not moves(early_alone, r_step=0.1)
    assert moves(late_alone, r_step=0.1) and not moves(late_alone, t_step=0.1)


@pytest.mark.parametrize("early", [0, 2, 5])
def test_early_blocks_that_leave_no_others_are_refused(early):
    with pytest.raises(ValueError, match=rf"early_blocks must lie in \[1, depth - 1 = 1\], got {early}"):
        mfx.DiT(SHAPE, SMALL, early_blocks=early, key=jr.key(0))


@pytest.mark.parametrize(("options", "expected"), [({}, None), ({"remat": True}, None), ({"unroll": 1}, 1)])
def test_blocks_take_the_form_that_is_known_to_be_fastest_unless_it_is_given(options, expected):
    field = eqx.filter_eval_shape(lambda key: mfx.DiT((4, 32, 32), mfx.DIT_S4, **options, key=key), jr.key(0))
    assert field.stack.unroll == expected
