import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fields import filled, FusedAttention
from methods import trainer
from points import Quadratic

import mf_eqx as mfx
from mf_eqx.exact import GaussianAverageVelocity

pytestmark = pytest.mark.usefixtures("x64")


Z, R, T, PARTS = np.array([0.3, -1.2]), 0.2, 0.7, (0.7, -1.3, 0.4)


def velocity(z, t, condition):
    return jnp.sin(z) - t + condition


def row(**options):
    return mfx.Row(jnp.asarray(Z), jnp.full(2, jnp.nan), R, T, jnp.asarray(3.0), **{"velocity": velocity, **options})


def by_hand(a, b, c, slope):
    """The residual; the end is behind stop-gradient."""
    end = jax.lax.stop_gradient(Z - (T - R) * (a * Z + b * R**2 + c * T))
    return a * Z + b * R**2 + c * T - (T - R) * slope - velocity(end, R, 3.0)


def square(residual):
    return jnp.sum(residual**2)


@pytest.mark.parametrize("stop_derivative", [False, True])
def test_residual_and_gradient_are_those_of_the_lagrangian_equation(stop_derivative):
    identity, parts = mfx.LagrangianDistillation(stop_derivative), tuple(map(jnp.asarray, PARTS))

    def expected(parts):
        slope = 2 * parts[1] * R
        return by_hand(*parts, jax.lax.stop_gradient(slope) if stop_derivative else slope)

    def found(parts):
        return identity.residual(Quadratic(*parts), row())

    np.testing.assert_allclose(found(parts), expected(parts), rtol=0, atol=1e-15)
    gradients = [jax.grad(lambda parts, each=each: square(each(parts)))(parts) for each in (found, expected)]
    np.testing.assert_allclose(*gradients, rtol=1e-13)


def test_a_field_gives_its_instantaneous_velocity():
    teacher = Quadratic(*map(jnp.asarray, (0.2, 0.5, -0.6)))
    field = Quadratic(*map(jnp.asarray, PARTS))
    given = [lambda z, t, condition: teacher(z, t, t), teacher]
    found = [mfx.LagrangianDistillation().residual(field, row(velocity=each)) for each in given]
    np.testing.assert_array_equal(*found)


def test_without_a_velocity_it_is_refused():
    with pytest.raises(ValueError, match="velocity must be given for LagrangianDistillation, which learns"):
        mfx.Objective(mfx.LagrangianDistillation())
    with pytest.raises(ValueError, match="velocity must be given for its value at another state"):
        mfx.LagrangianDistillation().residual(Quadratic(*map(jnp.asarray, PARTS)), row(velocity=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guidance": mfx.Guidance(2.0), "label_dropout": mfx.LabelDropout(0.1, 3)},
            "guidance must be None for LagrangianDistillation; guide the velocity itself, by a GuidedField",
        ),
        ({"smallest_time": 0.05}, "smallest_time must be 0 for LagrangianDistillation, which learns from a known"),
    ],
)
def test_what_would_change_the_velocity_in_one_place_alone_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mfx.Objective(mfx.LagrangianDistillation(), velocity=velocity, **options)


@pytest.mark.parametrize("stop_derivative", [False, True])
def test_attention_whose_derivative_has_no_gradient_needs_the_stopped_one(stop_derivative):
    size = mfx.DiTSize(depth=1, width=8, heads=2, patch=2)
    dit = filled(lambda: mfx.DiT((1, 4, 4), size, attention=FusedAttention(), key=jr.key(0)))
    step = trainer(mfx.LagrangianDistillation(stop_derivative), optax.sgd(0.1), [])
    state, batch = mfx.init_state(dit, step.optimizer, key=jr.key(1)), mfx.Batch(jnp.zeros((8, 1, 4, 4)))
    if stop_derivative:
        assert np.isfinite(step(state, batch)[1]["loss"].value)
    else:
        with pytest.raises(ValueError, match="du/dt must be behind stop_gradient here"):
            step(state, batch)


# Without data


def data_free(velocity):
    return mfx.Objective(
        mfx.LagrangianDistillation(stop_derivative=True),
        time_pairs=mfx.TimePairs(mfx.UniformTimes(), at_noise=1),
        identity_share=1,
        weight=mfx.ConstantWeight(),
        velocity=velocity,
    )


def test_from_noise_alone_the_data_do_not_matter():
    field, objective = mfx.MLP(2, width=8, depth=1, key=jr.key(0)), data_free(lambda z, t, condition: z)
    one, other = (objective(field, mfx.Batch(x * jnp.ones((8, 2))), key=jr.key(1))[0] for x in (0.0, 1e3))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_from_noise_alone_a_network_learns_where_the_velocity_leads():
    """A Gaussian N(m, s^2) without one example of it: x = m + s eps."""
    mean, std = jnp.array([0.7, -1.2]), 0.4
    truth = GaussianAverageVelocity(np.asarray(mean), std)
    step = mfx.TrainStep(data_free(truth), optax.adam(optax.cosine_decay_schedule(1e-2, 800)))
    field = mfx.MLP(2, width=32, depth=1, key=jr.key(0))
    state = mfx.init_state(field, step.optimizer, key=jr.key(1))
    state, _ = mfx.scan_steps(step, state, lambda key: mfx.Batch(jnp.zeros((64, 2))), 800)
    eps = jr.normal(jr.key(2), (1000, 2))
    x = jax.vmap(lambda eps: mfx.sample(state.field, eps))(eps)
    assert jnp.sqrt(jnp.mean((x - mean - std * eps) ** 2)) < 0.05


def test_what_was_trained_from_noise_alone_takes_one_step():
    trained = data_free(lambda z, t, condition: z).trained
    assert trained.average and trained.one_step and not trained.velocity
