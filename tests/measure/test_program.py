import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx.measure import compile_program, product_flops


class Model(eqx.Module):
    """A matrix, and a number that is no array."""

    weight: jax.Array
    power: int = 2

    def __call__(self, x):
        return (self.weight @ x) ** self.power


def model(size=64):
    return Model(jr.normal(jr.key(0), (size, size)))


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf, tree)


# Programs


def test_program_computes_what_the_function_computes():
    x = jnp.arange(64.0)
    program = compile_program(lambda model, x: model(x), model(), x)
    np.testing.assert_allclose(program(model(), x), model()(x), rtol=1e-6)
    np.testing.assert_allclose(program(model(), 2 * x), model()(2 * x), rtol=1e-6)


def test_program_returns_modules_whole():
    program = compile_program(lambda model: eqx.tree_at(lambda m: m.weight, model, 2 * model.weight), model())
    result = program(model())
    assert result.power == 2
    np.testing.assert_array_equal(result.weight, 2 * model().weight)


def test_program_compiled_from_shapes_alone_runs_on_arrays():
    program = compile_program(lambda model, x: model(x), shapes(model()), jax.ShapeDtypeStruct((64,), jnp.float32))
    np.testing.assert_allclose(program(model(), jnp.ones(64)), model()(jnp.ones(64)), rtol=1e-6)


def test_program_refuses_other_shapes_than_it_was_compiled_for():
    program = compile_program(lambda x: x + 1, jnp.ones(4))
    with pytest.raises(TypeError, match=r"float32\[4\]"):
        program(jnp.ones(5))


def test_donated_inputs_are_reused_and_no_others():
    state, x = jnp.ones((64, 64)), jnp.ones((64, 64))
    program = compile_program(lambda state, x: state + x, state, x, donate=(0,))
    assert program.cost.donated_bytes == state.nbytes
    program(state, x)
    assert state.is_deleted()
    assert not x.is_deleted()


def test_cost_counts_bytes_and_operations():
    x = jnp.ones((64, 32))
    cost = compile_program(lambda weight, x: weight @ x, jnp.ones((64, 64)), x).cost
    assert cost.argument_bytes == 4 * (64 * 64 + 64 * 32)
    assert cost.output_bytes == 4 * 64 * 32
    assert cost.donated_bytes == 0
    assert cost.flops == 2 * 64 * 64 * 32
    assert cost.program_lines > 0
    assert min(cost.trace_seconds, cost.lower_seconds, cost.compile_seconds) > 0


def test_temporary_bytes_are_those_of_intermediate_results():
    def extent(x):
        ordered = jnp.sort(x)  # in memory: a library's kernel for products holds what is between them by itself
        return ordered[-1] - ordered[0]

    cost = compile_program(extent, jnp.ones(1 << 15)).cost
    assert 4 << 15 <= cost.temporary_bytes < 12 << 15


# Operations


def rows(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (jnp.matmul, [rows(3, 5), rows(5, 7)], 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [rows(2, 3, 5), rows(2, 5, 7)], 2 * 2 * 3 * 5 * 7),
        (lambda a: jnp.sin(a) + a**2, [rows(3, 5)], 0),
        (jax.jit(jnp.matmul), [rows(3, 5), rows(5, 7)], 2 * 3 * 5 * 7),
        (jax.checkpoint(jnp.matmul), [rows(3, 5), rows(5, 7)], 2 * 3 * 5 * 7),
        (lambda w, x: jax.lax.scan(lambda x, w: (w @ x, None), x, w)[0], [rows(4, 5, 5), rows(5)], 4 * 2 * 25),
        (jax.vmap(jnp.matmul), [rows(6, 3, 5), rows(6, 5, 7)], 6 * 2 * 3 * 5 * 7),
        (lambda w, x: jax.jvp(lambda x: w @ x, (x,), (x,)), [rows(3, 5), rows(5)], 2 * 2 * 3 * 5),
        (jax.grad(lambda w, x: jnp.sum((w @ x) ** 2), argnums=(0, 1)), [rows(3, 5), rows(5)], 3 * 2 * 3 * 5),
        # 3 x 3 kernel from 4 to 8 channels at 6 x 6 places; the same in two groups; strided to 3 x 3 places.
        (lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"), [rows(1, 4, 6, 6), rows(8, 4, 3, 3)], 2 * 36 * 8 * 4 * 9),
        (
            lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", feature_group_count=2),
            [rows(1, 4, 6, 6), rows(8, 2, 3, 3)],
            2 * 36 * 8 * 2 * 9,
        ),
        (lambda x, k: jax.lax.conv(x, k, (2, 2), "SAME"), [rows(1, 4, 6, 6), rows(8, 4, 3, 3)], 2 * 9 * 8 * 4 * 9),
        (
            lambda p, x: jax.lax.cond(p[0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x),
            [rows(1), rows(5, 5)],
            2 * 2 * 125,
        ),
    ],
    ids=[
        "product", "batched product", "no product", "jitted", "checkpointed", "scan", "vmap", "jvp", "gradient",
        "convolution", "convolution in groups", "strided convolution", "the dearer branch",
    ],
)  # fmt: skip
def test_products_are_counted(function, inputs, expected):
    assert product_flops(function, *inputs) == expected


def test_products_of_a_module_are_counted():
    assert product_flops(lambda model, x: model(x), model(), jnp.ones(64)) == 2 * 64 * 64


def test_loop_of_unknown_length_with_products_is_refused():
    with pytest.raises(ValueError, match="a fixed number of iterations in all loops"):
        product_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x), rows(3, 3))
