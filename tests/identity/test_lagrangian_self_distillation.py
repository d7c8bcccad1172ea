import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fields import filled, FusedAttention
from methods import trainer
from points import Quadratic

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")


def field():
    return Quadratic(*map(jnp.asarray, (0.7, -1.3, 0.4)))


def row(**options):
    return mfx.Row(jnp.array([0.3, -1.2]), jnp.full(2, jnp.nan), 0.2, 0.7, **options)


def by_hand(a, b, c, teacher):
    """The residual, from which terms stop-gradient takes the teacher and the end."""
    z, r, t = row().z, 0.2, 0.7
    left = a * z + b * r**2 + c * t - (t - r) * 2 * b * r
    end = jax.lax.stop_gradient(z - (t - r) * (a * z + b * r**2 + c * t))
    return left - (teacher.a * end + teacher.b * r**2 + teacher.c * r)


def test_residual_is_the_lagrangian_equation():
    found = mfx.LagrangianSelfDistillation().residual(field(), row())
    np.testing.assert_allclose(found, by_hand(0.7, -1.3, 0.4, field()), rtol=0, atol=1e-15)


def test_gradient_goes_through_the_derivative_and_not_through_the_end():
    def loss(parts):
        return jnp.sum(mfx.LagrangianSelfDistillation().residual(Quadratic(*parts), row()) ** 2)

    expected = jax.grad(lambda parts: jnp.sum(by_hand(*parts, field()) ** 2))((0.7, -1.3, 0.4))
    found = jax.grad(loss)((field().a, field().b, field().c))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    through = jax.grad(lambda b: jnp.sum((by_hand(0.7, b, 0.4, field()) + 0.5 * 2 * b * 0.2) ** 2))(-1.3)
    assert abs(through - expected[1]) > 0.01  # without the derivative's part


def test_teacher_is_evaluated_at_the_end_without_a_key():
    teacher = Quadratic(*map(jnp.asarray, (0.2, 0.5, -0.6)))
    context = mfx.Context(jnp.zeros((), int), teacher)
    found = mfx.TerminalVelocityMatching().residual(field(), row(context=context))
    np.testing.assert_allclose(found, by_hand(0.7, -1.3, 0.4, teacher), rtol=0, atol=1e-15)


def test_teacher_gets_the_condition_and_learns_nothing():
    class Labelled(mfx.AbstractField):
        shift: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            assert key is None
            return z + condition * self.shift

    def loss(teacher):
        options = {"key": jax.random.key(0), "context": mfx.Context(jnp.zeros((), int), teacher)}
        row = mfx.Row(jnp.array([0.3, -1.2]), jnp.zeros(2), 0.2, 0.7, jnp.asarray(3.0), **options)
        return jnp.sum(mfx.TerminalVelocityMatching().residual(Fixed(), row) ** 2)

    class Fixed(mfx.AbstractField):
        def __call__(self, z, r, t, condition=None, *, key=None):
            return z

    assert loss(Labelled(jnp.ones(()))) != loss(Labelled(jnp.zeros(())))
    np.testing.assert_array_equal(jax.grad(loss)(Labelled(jnp.ones(()))).shift, 0)


def test_without_a_teacher_terminal_velocity_matching_is_refused():
    with pytest.raises(ValueError, match="context must have a teacher for TerminalVelocityMatching, got none"):
        mfx.TerminalVelocityMatching().residual(field(), row())


def test_attention_whose_derivative_has_no_gradient_is_refused():
    size = mfx.DiTSize(depth=1, width=8, heads=2, patch=2)
    dit = filled(lambda: mfx.DiT((1, 4, 4), size, attention=FusedAttention(), key=jax.random.key(0)))
    step = trainer(mfx.LagrangianSelfDistillation(), optax.sgd(0.1), [])
    state = mfx.init_state(dit, step.optimizer, key=jax.random.key(1))
    with pytest.raises(ValueError, match="du/dt must be behind stop_gradient here"):
        eqx.filter_eval_shape(step, state, mfx.Batch(jnp.zeros((8, 1, 4, 4))))
