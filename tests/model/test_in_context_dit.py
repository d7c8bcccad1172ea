import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import FusedAttention
from in_context_reference import in_context_dit, total_derivative

import mf_eqx as mfx
from mf_eqx import checkpoint, nn

SMALL = mfx.InContextDiTSize(depth=3, width=16, heads=2, patch=2, head_depth=1)
COUNTS = mfx.TokenCounts(condition=3, scale=2, start=1, end=1, time=2)
SHAPE = (3, 4, 6)  # height and width differ, so that neither can stand for the other
R, T, LABEL, GUIDANCE = 0.3, 0.8, 1, (2.5, 0.2, 0.7)


def shapes(*, shape=SHAPE, size=SMALL, labels=4, guidance=True, **options):
    make = functools.partial(mfx.InContextDiT, shape, size, labels=labels, guidance=guidance, tokens=COUNTS, **options)
    return eqx.filter_eval_shape(lambda key: make(key=key), jr.key(0))


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

    return {name: draw(name, leaf) for name, leaf in named(shapes(**options)).items()}


def small(*, dtype=jnp.float32, form=(), **options):
    """A network with these parameters in `dtype`, computing in it; `form` has further options that say how."""
    values = numbers(**options)
    made = shapes(dtype=dtype, **options, **dict(form))

    def fill(path, leaf):
        return jnp.asarray(values[jax.tree_util.keystr(path)], dtype) if hasattr(leaf, "dtype") else leaf

    return jax.tree_util.tree_map_with_path(fill, made)


def inputs(dtype=float, *, guidance=True):
    """(z, r, t, condition)."""
    z = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), dtype)
    label = jnp.asarray(LABEL)
    condition = mfx.GuidanceCondition(label, GUIDANCE[0], GUIDANCE[1:]) if guidance else label
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


def tree(values, guidance):
    """The same numbers under the names of the authors' files."""
    width = SMALL.width
    found = {
        "x_embedder/proj/kernel": values[".patches.weight"].reshape(SMALL.patch, SMALL.patch, SHAPE[0], width),
        "x_embedder/proj/bias": values[".patches.bias"],
        "class_tokens": values[".embedding.condition.vectors"],
        "y_embedder/embedding_table/_flax_embedding/embedding": values[".embedding.condition.embedding.table"],
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
def reference(guidance=True):
    """u, v and du/dt along v."""
    p, (z, *_) = tree(numbers(guidance=guidance), guidance), inputs(np.float32)
    where = (R, T, LABEL, GUIDANCE if guidance else None)
    how = {"heads": SMALL.heads, "patch": SMALL.patch}
    z = np.random.default_rng(1).standard_normal(SHAPE)
    u, v = in_context_dit(p, z, *where, **how)
    return u, v, total_derivative(p, z, v, *where, **how)[0]


@jax.jit
def evaluated(field, z, r, t, condition):
    """u, v by the head, and du/dt along it, in one evaluation and one JVP."""
    v = field.with_velocity(z, r, t, condition)[1]
    (u, both_v), (dudt, _) = mfx.FusedJVP()(
        mfx.WithVelocity(field), z, r, t, condition, tangent=(v, 0.0, 1.0), key=None
    )
    return u, both_v, dudt


@pytest.mark.parametrize("guidance", [True, False], ids=["with guidance", "labels alone"])
def test_u_and_v_and_the_derivative_equal_those_of_an_independent_network(x64, guidance):
    field = small(dtype=jnp.float64, guidance=guidance)
    for found, expected in zip(evaluated(field, *inputs(guidance=guidance)), reference(guidance), strict=True):
        size = np.abs(expected).max()
        assert size > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * size)
