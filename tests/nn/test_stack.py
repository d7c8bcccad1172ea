import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

from mf_eqx import nn

DEPTH = 4
FORMS = {
    "unrolled": {"unroll": True},
    "two per iteration": {"unroll": 2},
    "remat": {"remat": True},
    "remat unrolled": {"remat": True, "unroll": True},
    "remat of all but products": {"remat": jax.checkpoint_policies.dots_saveable},
}


class Block(eqx.Module):
    linear: nn.Linear
    name: str = "block"  # not an array: a stack must carry it along

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


@functools.lru_cache(None, typed=True)  # 1 is not True
def stack(**form):
    made = filled(lambda: nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), DEPTH, **form, key=jr.key(0)))
    return nn.cast(made, jnp.float64)


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


def run(stack, x):
    return stack(lambda block, x: block(x), x)


def test_stack_applies_its_blocks_in_order(x64):
    built, x = stack(), normal(1, 3, 6)
    expected = np.asarray(x)
    for weight, bias in zip(*map(np.asarray, (built.blocks.linear.weight, built.blocks.linear.bias)), strict=True):
        expected = expected + np.tanh(expected @ weight + bias)
    np.testing.assert_allclose(run(built, x), expected, rtol=1e-12)


def test_every_block_has_weights_of_its_own():
    weight = nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), DEPTH, key=jr.key(0)).blocks.linear.weight
    assert weight.shape == (DEPTH, 6, 6)
    assert len(np.unique(weight[:, 0, 0])) == DEPTH
    assert abs(weight).max() <= np.sqrt(6 / 12)  # fans of one block, not of the stack


@eqx.filter_jit
def everything(stack, run):
    """The value, the tangent, and the gradient of a function of the value."""
    x, dx = normal(1, 2, 3, 6)
    value, tangent = jax.jvp(lambda x: run(stack, x), (x,), (dx,))
    return value, tangent, jax.tree.leaves(eqx.filter_grad(lambda stack: jnp.sum(jnp.sin(run(stack, x))))(stack))


@functools.cache
def plain():
    return everything(stack(), run)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_unrolling_and_remat_change_neither_values_nor_derivatives(x64, form):
    for result, expected in zip(*map(jax.tree.leaves, (everything(stack(**form), run), plain())), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


def weight(tree):
    return tree.linear.weight


def part(**form):
    """A stack of which the first row of each weight is there, and is repeated when it is gathered."""
    first = jnp.asarray(np.asarray(weight(stack().blocks))[:, :1])
    return eqx.tree_at(lambda stack: weight(stack.blocks), stack(**form), first)


def run_gathering(part, x):
    return run(part.gathering(lambda block: eqx.tree_at(weight, block, jnp.broadcast_to(weight(block), (6, 6)))), x)


@functools.cache
def of_whole_ones():
    def whole(part, x):
        weights = jnp.broadcast_to(weight(part.blocks), (DEPTH, 6, 6))
        return run(eqx.tree_at(lambda stack: weight(stack.blocks), part, weights), x)

    return everything(part(), whole)


@pytest.mark.parametrize("form", [*FORMS.values(), {}], ids=[*FORMS, "scanned"])
def test_blocks_that_are_gathered_from_parts_give_the_values_and_derivatives_of_whole_ones(x64, form):
    found = everything(part(**form), run_gathering)
    for result, expected in zip(*map(jax.tree.leaves, (found, of_whole_ones())), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


def test_jit_does_not_take_an_unrolled_stack_for_a_scanned_one(x64):
    # True == 1 in Python, and jit looks programs up by equality of what is static.
    run_jitted = eqx.filter_jit(run)
    scanned, unrolled = (run_jitted.lower(stack(unroll=n), jnp.ones(6)).as_text() for n in (1, True))
    assert "while" in scanned
    assert "while" not in unrolled


def temporary_bytes(**form):
    built = filled(lambda: nn.Stack(lambda key: Block(nn.Linear(64, 64, key=key)), 32, **form, key=jr.key(0)))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda stack, x: jnp.sum(run(stack, x))))
    return gradient.lower(built, jnp.ones((256, 64))).compile().compiled.memory_analysis().temp_size_in_bytes


def test_remat_saves_memory():
    # Kept: per block its input and the tanh, against the input alone.
    assert temporary_bytes(remat=True) < 0.75 * temporary_bytes()


def test_program_does_not_grow_with_depth():
    def lines(depth):
        built = filled(lambda: nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), depth, key=jr.key(0)))
        return eqx.filter_jit(run).lower(built, jnp.ones(6)).as_text().count("\n")

    assert lines(40) == lines(2)


def test_empty_stack_is_refused():
    with pytest.raises(ValueError, match="depth must be an integer >= 1, got 0"):
        nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), 0, key=jr.key(0))


# What blocks give besides


def turn(block, x, given):
    """One block with an input of its own: its output is another number than the state that goes on."""
    x = block(x) * given["scale"]
    return x, {"sum": jnp.sum(x), "first": x[..., 0]}


def turns(built, x, given):
    return built.scan(turn, x, given)


def in_a_loop(built, x, given):
    """The same in Python, block by block."""
    outputs = []
    for number in range(built.depth):
        block = jax.tree.map(lambda leaf, number=number: leaf[number] if eqx.is_array(leaf) else leaf, built.blocks)
        x, output = turn(block, x, {"scale": given["scale"][number]})
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


SCANS = {"scanned": {}, **{name: FORMS[name] for name in ("unrolled", "remat")}}


@eqx.filter_jit
def outputs_and_gradient(built, run):
    given, x = {"scale": jnp.asarray(np.random.default_rng(2).uniform(0.5, 1.5, DEPTH))}, normal(1, 3, 6)

    def loss(arguments):
        state, outputs = run(*arguments)
        weights = jnp.arange(1.0, DEPTH + 1)
        return jnp.sum(state**2) + weights @ (jnp.sin(outputs["sum"]) + outputs["first"].sum(axis=1))

    return run(built, x, given), eqx.filter_grad(loss)((built, x, given))


@functools.cache
def expected_outputs():
    return outputs_and_gradient(stack(), in_a_loop)


@pytest.mark.parametrize("form", SCANS.values(), ids=SCANS)
def test_outputs_of_all_blocks_are_stacked_as_by_a_loop_in_value_and_gradient(x64, form):
    found = outputs_and_gradient(stack(**form), turns)
    assert found[0][1]["first"].shape == (DEPTH, 3)
    for result, reference in zip(*map(jax.tree.leaves, (found, expected_outputs())), strict=True):
        if eqx.is_array(result):
            np.testing.assert_allclose(result, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", SCANS.values(), ids=SCANS)
def test_stack_of_one_may_change_the_shape(form):
    built = nn.Stack(lambda key: nn.Linear(6, 2, key=key), 1, **form, key=jr.key(0))
    x = jr.normal(jr.key(1), (3, 6))
    found, outputs = built.scan(lambda layer, x, given: (layer(x), x + given), x, jnp.ones((1, 6)))
    expected = x @ built.blocks.weight[0] + built.blocks.bias[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(outputs, (x + 1)[None])


# The form that is known to be fastest


@pytest.mark.parametrize(
    ("backend", "devices", "depth", "remat", "expected"),
    [
        ("cpu", 1, 2, False, 2),
        ("cpu", 1, 12, False, 12),
        ("cpu", 1, 16, False, 1),  # M/2 and larger, whose programs would compile for a minute
        ("cpu", 1, 12, True, 1),  # of which XLA:CPU would keep everything without a loop
        ("cpu", 8, 12, False, 1),
        ("gpu", 1, 12, False, 12),
        ("gpu", 1, 12, True, 1),
        ("gpu", 4, 12, False, 1),
        ("tpu", 1, 12, False, 1),
    ],
)
def test_known_form_is_no_loop_on_one_device_up_to_the_depth_of_b(
    monkeypatch, backend, devices, depth, remat, expected
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)

    def called(gather=None, **form):
        stack = nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), DEPTH, **form, key=jr.key(0))
        stack = stack if gather is None else stack.gathering(gather)
        text = str(jax.make_jaxpr(lambda x: stack(lambda block, x: block.linear(x), x))(jnp.ones(6)))
        return int(re.search(r"unroll=(\d+)", text)[1])

    assert nn.known_unroll(depth, remat) == expected
    assert called(unroll=None, remat=remat) == nn.known_unroll(DEPTH, remat)
    assert called(lambda block: block, unroll=None, remat=remat) == 1
    assert [called(unroll=n, remat=remat) for n in (1, 2, True)] == [1, 2, DEPTH]  # a choice of one's own


def test_names_of_remat_keep_less_and_less():
    def kept(remat):
        """Numbers that a backward pass needs."""
        stack = nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), DEPTH, remat=remat, key=jr.key(0))

        def backward(stack, x):
            def apply(block, x):
                return jnp.sin(jnp.exp(jnp.tanh(block.linear(x))))

            return eqx.filter_vjp(lambda stack: stack(apply, x), stack)[1]

        found = eqx.filter_eval_shape(backward, stack, jnp.ones((100, 6)))
        return sum(leaf.size for leaf in jax.tree.leaves(found) if hasattr(leaf, "size"))

    none, products, full = (kept(remat) for remat in nn.REMATS.values())
    assert list(nn.REMATS) == ["none", "products", "full"]
    assert none > products > full


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("remat", [None, "full"])
def test_remat_that_is_no_policy_is_refused(remat):
    with pytest.raises(ValueError, match=f"remat must be True, False or a policy of jax.checkpoint, got {remat!r}"):
        nn.Stack(lambda key: Block(nn.Linear(6, 6, key=key)), 2, remat=remat, key=jr.key(0))


@pytest.mark.parametrize("unroll", [2.5, 0, -1, "all"])
def test_unroll_that_is_no_number_of_blocks_is_refused(unchecked, unroll):
    with pytest.raises(ValueError, match=f"unroll must be an integer >= 1, got {unroll!r}"):
        nn.Stack(lambda key: nn.Linear(2, 2, key=key), 2, unroll=unroll, key=jr.key(0))
