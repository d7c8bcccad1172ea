"""What the package uses of JAX that no promise of compatibility covers: names outside of the public modules, and what
programs call their parts. conftest.py runs these tests before all others, which a JAX without one of them would fail by
the hundred."""

import functools
import inspect

import jax
import jax.numpy as jnp


@functools.cache
def primitives():
    """An equation of each kind in a program with products, convolutions, loops, branches and a `jax.custom_vjp`."""
    from mf_eqx._engine_guards import _equations

    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    def function(x):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
        x = jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)
        x = jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x + 1, x)
        return jax.lax.conv(x[None, None], x[None, None], (1, 1), "SAME") + twice(x)

    x = jnp.ones((4, 4))
    program = jax.make_jaxpr(lambda x: jax.jvp(function, (x,), (x,)))(x)
    return {equation.primitive.name: equation for equation in _equations(program.jaxpr)}


def test_programs_can_be_called_as_functions():
    from jax.extend.core import jaxpr_as_fun

    assert jaxpr_as_fun(jax.make_jaxpr(jnp.sin)(0.0))(0.0) == [0.0]


def test_products_and_convolutions_tell_what_they_contract():
    product, convolution = primitives()["dot_general"], primitives()["conv_general_dilated"]
    assert len(product.params["dimension_numbers"][0]) == 2 and product.invars[0].aval.shape == (4, 4)
    assert len(convolution.params["dimension_numbers"].rhs_spec) == 4 and convolution.outvars[0].aval.size == 16


def test_loops_and_branches_have_their_names():
    assert {"scan", "while", "cond"} <= primitives().keys()
    assert primitives()["scan"].params["length"] == 3


def test_a_function_without_forward_mode_has_its_name():
    assert "custom_lin" in primitives()


def test_a_backward_loop_adds_to_arrays_that_are_there():
    @jax.jit
    def gradients(weights, x):
        sums = jax.new_ref(jnp.ones_like(weights))
        loss = jax.vjp(lambda weights, x: jax.lax.scan(lambda x, w: (x * w, None), x, weights)[0], weights, x)[1]
        return loss.with_refs(sums, jax.ad.GradValue())(1.0)[1], sums[...]

    of_x, of_weights = gradients(jnp.array([2.0, 3.0]), 5.0)
    assert of_x == 6 and of_weights.tolist() == [16, 11]


def test_compiled_programs_tell_bytes_and_operations():
    compiled = jax.jit(jnp.matmul).lower(jnp.ones((4, 4)), jnp.ones((4, 4))).compile()
    assert {"flops", "bytes accessed"} <= compiled.cost_analysis().keys()
    memory = compiled.memory_analysis()
    for kind in ("argument", "output", "alias", "temp"):
        assert isinstance(getattr(memory, f"{kind}_size_in_bytes"), int)


def test_compiling_is_told_by_its_names():
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert any(event.startswith("/jax/core/compile/") for event in events)


def test_processes_can_meet_and_agree():
    from jax.experimental import multihost_utils

    wanted = {"heartbeat_timeout_seconds", "initialization_timeout", "coordinator_bind_address"}
    assert wanted <= inspect.signature(jax.distributed.initialize).parameters.keys()
    for name in ("broadcast_one_to_all", "process_allgather", "reached_preemption_sync_point"):
        assert callable(getattr(multihost_utils, name))


def test_errors_have_their_names():
    assert issubclass(jax.errors.JaxRuntimeError, RuntimeError)
    assert issubclass(jax.errors.TracerArrayConversionError, TypeError)


def test_meshes_may_leave_sharding_to_the_compiler():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
