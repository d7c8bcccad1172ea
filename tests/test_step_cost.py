"""What a training step of the paper's networks costs, as far as XLA says without running it: memory and program size.

Nothing is allocated: networks, states and batches are shapes. `test_flops.py` beside this file counts operations.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import measure

SHAPE, LABELS = (4, 32, 32), 1000
DROPOUT = mfx.LabelDropout(0.1, LABELS)
OBJECTIVES = {
    "Flow Matching": mfx.Objective(identity=None, identity_share=0, label_dropout=DROPOUT),
    "MeanFlow": mfx.Objective(label_dropout=DROPOUT),
    "guided": mfx.Objective(guidance=mfx.Guidance(1.0, 0.5), label_dropout=DROPOUT),
}
PARAMETERS = 4 * 131_165_248  # bytes of B/4


def step_and_inputs(name, size, batch, **options):
    """A training step with Adam and one average, its blocks in a loop unless `options` say otherwise, and the shapes of
    what it takes."""
    step = mfx.TrainStep(OBJECTIVES[name], optax.adam(1e-4), [mfx.ExponentialAverage(0.9999)])

    def make(key):
        field = mfx.DiT(SHAPE, size, labels=LABELS, **{"unroll": 1, **options}, key=key)
        return mfx.init_state(field, step.optimizer, step.averages, key=key)

    rows = jax.ShapeDtypeStruct((batch, *SHAPE), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    return lambda state, x, label: step(state, mfx.Batch(x, label)), (eqx.filter_eval_shape(make, jr.key(0)), *rows)


@functools.cache
def cost(name, batch, **options):
    step, inputs = step_and_inputs(name, mfx.DIT_B4, batch, **options)
    return measure.compile_program(step, *inputs, donate=(0,)).cost


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 256])
@pytest.mark.parametrize("name", ["MeanFlow", "guided"])
def test_tangents_cost_no_memory_and_the_split_at_most_one_more_gradient(name, batch):
    # On a GPU it is less than Flow Matching's, since the kinds of rows share memory: XLA:CPU gives each kind its own.
    assert cost(name, batch).temporary_bytes <= cost("Flow Matching", batch).temporary_bytes + PARAMETERS


def test_a_small_step_holds_no_second_state():
    # A gradient of each stack of blocks, what one block works on, and no updated copy of parameters or averages.
    assert cost("Flow Matching", 16).temporary_bytes <= 2.8 * PARAMETERS


@functools.cache
def moved(depth, unroll):
    """Bytes that a gradient of so many blocks of B/4 accesses at batch 16."""
    objective, size = OBJECTIVES["Flow Matching"], mfx.DIT_B4._replace(depth=depth)

    def gradient(field, x, label, key):
        return eqx.filter_grad(lambda field: objective(field, mfx.Batch(x, label), key=key)[0])(field)

    _, (state, *rows) = step_and_inputs("Flow Matching", size, 16, unroll=unroll)
    return measure.compile_program(gradient, state.field, *rows, jr.key(0)).cost.bytes_accessed


def test_gradient_moves_no_more_bytes_than_one_in_plain_flax():
    # That one moves 969 MB for each block of B/4 at batch 16 (benchmarks/README.md), counted by XLA as here. Since JAX
    # 0.11, XLA:CPU keeps `jax.checkpoint` in programs without loops too: 50 MB more, for GELU's argument, which is
    # written by itself, and the norms, which are computed again. Flax has no such thing, and moves what it moved.
    assert moved(3, True) - moved(2, True) <= 969e6 + 51e6 * (jax.__version_info__ >= (0, 11))


@pytest.mark.slow
def test_blocks_without_a_loop_move_two_thirds_of_what_they_move_in_a_loop():
    # XLA counts the body of a loop once, so that one more block in the body is one block. In a loop every block's
    # weights, gradients and what is kept for the backward pass are copied out of stacks and into them.
    assert moved(3, True) - moved(2, True) <= 2 / 3 * (moved(4, 2) - moved(4, 1))


def kept(**options):
    """Numbers held per token, feature and block, of which a network of 12 blocks has 64 x 768 in each."""
    more = cost("Flow Matching", 256, **options).temporary_bytes - cost("Flow Matching", 16, **options).temporary_bytes
    return more / (4 * 240 * 12 * 64 * 768)


def test_backward_pass_keeps_little_beyond_the_factors_of_products():
    # Those are 15: inputs of qkv and out (1 each), both products of attention (3, weights 1), hidden (1) and out (4 and
    # the 4 that GELU is differentiated at). Beyond: the block's input, what gates multiply, one turn's own values.
    assert kept() <= 22


@pytest.mark.slow
def test_remat_keeps_a_sixth():
    assert kept(remat=True) <= 22 / 6


@pytest.mark.slow
def test_remat_of_all_but_products_lies_between():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    full, some, none = (cost("Flow Matching", 256, remat=remat).temporary_bytes for remat in (True, policy, False))
    assert full < some < none


def test_every_buffer_of_the_state_is_donated():
    (state, *_) = step_and_inputs("Flow Matching", mfx.DIT_B4, 256)[1]
    numbers = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype")]
    keys = [leaf for leaf in numbers if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    plain = sum(leaf.size * leaf.dtype.itemsize for leaf in numbers if leaf not in keys)
    assert cost("Flow Matching", 256).donated_bytes == plain + 8 * len(keys)


def test_program_of_the_largest_network_is_as_long_as_that_of_a_small_one():
    def lines(size):
        step, (state, *rows) = step_and_inputs("MeanFlow", size, 16)
        arrays, rest = eqx.partition((state, *rows), lambda leaf: hasattr(leaf, "dtype"))
        return (
            jax.jit(lambda arrays: eqx.filter(step(*eqx.combine(arrays, rest)), eqx.is_array))
            .lower(arrays)
            .as_text()
            .count("\n")
        )

    assert lines(mfx.DIT_XL2) <= 1.05 * lines(mfx.DIT_B4)


@pytest.mark.slow
def test_drawn_guidance_and_the_velocity_head_cost_no_memory_but_what_the_head_keeps():
    """Of rows with r < t, whose predicted velocity and guidance are passes that keep nothing."""
    size = mfx.InContextDiTSize(6, 128, 4, 2, head_depth=3)

    def temporary_bytes(identity, *, head, boundary=False):
        objective = mfx.Objective(
            identity, guidance=mfx.DrawnGuidance(), label_dropout=mfx.LabelDropout(0.1, 10), identity_share=0.5
        )

        def gradient(field, x, label, key):
            part, rows = objective.parts(mfx.Batch(x, label))[0 if boundary else 1]
            return eqx.filter_grad(lambda field: part.evaluate(field, rows, None, key=key)[0])(field)

        make = functools.partial(mfx.InContextDiT, (4, 16, 16), size, labels=10, guidance=True, velocity_head=head)
        rows = jax.ShapeDtypeStruct((64, 4, 16, 16), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
        field = eqx.filter_eval_shape(lambda: make(key=jr.key(0)))
        return measure.compile_program(gradient, field, *rows, jr.key(0)).cost.temporary_bytes

    with_head, without = (temporary_bytes(mfx.MeanFlow(), head=head, boundary=True) for head in (True, False))
    mean_flow = temporary_bytes(mfx.MeanFlow(), head=False)
    paper = temporary_bytes(mfx.ImprovedMeanFlow(), head=True)
    assert paper <= 1.01 * (mean_flow + with_head - without)
