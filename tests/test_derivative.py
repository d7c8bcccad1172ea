import functools
import itertools
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg
from fields import FusedAttention

import mf_eqx as mfx
from mf_eqx import AbstractField, CentralDifference, FusedJVP, MeanFlow, nn, StoppedJVP, total_derivative

pytestmark = pytest.mark.usefixtures("x64")

STEP = 1e-5
# Central differences with this step: truncation STEP^2 / 6 times a third derivative below 500, rounding near 1e-11.
TOLERANCE = 1e-8

# The last one's step differs from STEP, so that no test compares it with itself.
ENGINES = [FusedJVP(), StoppedJVP(), CentralDifference(5e-6)]
JVP_ENGINES = ENGINES[:2]


def every(engines):
    return pytest.mark.parametrize("engine", engines, ids=lambda engine: type(engine).__name__)


class Curved(AbstractField):
    """Nonlinear in everything: tanh(A z + sin(3 r) a + t^2 b + c) (1 + z . z r t), plus noise z if a key is given."""

    matrix: jax.Array
    r_weight: jax.Array
    t_weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        inner = self.matrix @ z + jnp.sin(3 * r) * self.r_weight + t**2 * self.t_weight
        inner = inner if condition is None else inner + condition
        noise = 0.0 if key is None else jr.normal(key, z.shape, z.dtype) * z
        return jnp.tanh(inner) * (1 + z @ z * r * t) + noise


def curved():
    rng = np.random.default_rng(0)
    return Curved(*(jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), 3, 3)))


def point():
    return jnp.array([0.3, -1.2, 0.5]), jnp.asarray(0.2), jnp.asarray(0.7)


def direction():
    return jnp.array([1.1, 0.4, -0.6])


class Given(AbstractField):
    """A function of (z, r, t, condition) as a field."""

    function: Callable = eqx.field(static=True)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.function(z, r, t, condition)


# Values


@pytest.mark.parametrize("condition", [None, (0.3, -0.2, 0.9)])
@pytest.mark.parametrize("seed", [None, 1])
def test_total_derivative_is_the_finite_difference_along_the_trajectory(condition, seed):
    field, (z, r, t) = curved(), point()
    condition = None if condition is None else jnp.asarray(condition)
    key = None if seed is None else jr.key(seed)
    generator = np.array([[0.1, -2.0, 0.3], [1.5, 0.2, 0.0], [0.4, -0.7, -0.5]])  # of dz/dt = generator z

    def along(time):
        return field(scipy.linalg.expm((time - t) * generator) @ z, r, jnp.asarray(time), condition, key=key)

    expected = (along(t + STEP) - along(t - STEP)) / (2 * STEP)
    _, dudt = total_derivative(field, z, generator @ z, r, t, condition, key=key)
    np.testing.assert_allclose(dudt, expected, rtol=0, atol=TOLERANCE)


@every(ENGINES)
@pytest.mark.parametrize(("dr", "dt"), [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (-0.5, 2.0)])
def test_engine_differentiates_in_the_direction_it_is_given(engine, dr, dt):
    field, (z, r, t), dz = curved(), point(), direction()

    def moved(step):
        return field(z + step * dz, r + step * dr, t + step * dt)

    _, derivative = engine(field, z, r, t, None, tangent=(dz, dr, dt), key=None)
    expected = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    np.testing.assert_allclose(derivative, expected, rtol=0, atol=TOLERANCE)


@every(ENGINES)
@pytest.mark.parametrize("condition", [None, (0.3, -0.2, 0.9)])
@pytest.mark.parametrize("seed", [None, 1])
def test_engine_hands_condition_and_key_to_every_evaluation(engine, condition, seed):
    field, (z, r, t), dz = curved(), point(), direction()
    condition = None if condition is None else jnp.asarray(condition)
    key = None if seed is None else jr.key(seed)

    def moved(step):
        return field(z + step * dz, r, t + step, condition, key=key)

    u, dudt = engine(field, z, r, t, condition, tangent=(dz, 0.0, 1.0), key=key)
    np.testing.assert_array_equal(u, moved(0))
    np.testing.assert_allclose(dudt, (moved(STEP) - moved(-STEP)) / (2 * STEP), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", [None, 1])
def test_value_beside_the_derivative_is_the_field_itself(seed):
    field, (z, r, t), key = curved(), point(), None if seed is None else jr.key(seed)
    u, _ = total_derivative(field, z, direction(), r, t, jnp.ones(3), key=key)
    np.testing.assert_array_equal(u, field(z, r, t, jnp.ones(3), key=key))


def test_derivative_is_the_same_under_jit():
    results = [
        function(field, z, direction(), r, t)
        for field, (z, r, t) in [(curved(), point())]
        for function in (total_derivative, jax.jit(total_derivative))
    ]
    np.testing.assert_allclose(*results, rtol=1e-14)


class Constant(AbstractField):
    """Depends on nothing."""

    value: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.value


class Timeless(AbstractField):
    """Depends on the state alone."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.sin(z)


class Stateless(AbstractField):
    """Depends on the times alone."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.full_like(z, 3 * r + t**2)


@every(ENGINES)
def test_derivative_of_a_field_that_depends_on_nothing_is_zero(engine):
    (z, r, t), value = point(), jnp.array([1.0, 2.0, 3.0])
    u, dudt = engine(Constant(value), z, r, t, None, tangent=(direction(), 0.0, 1.0), key=None)
    np.testing.assert_array_equal(u, value)
    np.testing.assert_array_equal(dudt, jnp.zeros(3))


def test_field_without_time_changes_only_as_its_state_moves():
    z, r, t = point()
    _, dudt = total_derivative(Timeless(), z, direction(), r, t)
    np.testing.assert_allclose(dudt, np.cos(z) * direction(), rtol=1e-15)


def test_field_without_time_has_derivative_zero_where_nothing_moves():
    z, r, t = point()
    _, dudt = total_derivative(Timeless(), z, jnp.zeros(3), r, t)
    np.testing.assert_array_equal(dudt, jnp.zeros(3))


def test_field_without_state_changes_only_with_t():
    z, r, t = point()
    _, dudt = total_derivative(Stateless(), z, direction(), r, t)
    np.testing.assert_allclose(dudt, jnp.full(3, 2 * t), rtol=1e-15)


@every(ENGINES)
def test_velocity_of_another_precision_is_cast_to_that_of_the_state(engine):
    z, r, t = (value.astype(jnp.float32) for value in point())
    u, dudt = engine(Timeless(), z, r, t, None, tangent=(direction(), 0.0, 1.0), key=None)
    assert (u.dtype, dudt.dtype) == (jnp.float32, jnp.float32)


@every(ENGINES)
@pytest.mark.parametrize("shape", [(2,), (1, 3), ()], ids=str)
def test_field_of_another_shape_than_the_state_is_refused(engine, shape):
    z, r, t = point()
    refusal = re.escape(f"field must return the shape of z, (3,), got {shape}")
    with pytest.raises(ValueError, match=refusal):
        engine(Given(lambda z, *_: jnp.full(shape, z[0])), z, r, t, None, tangent=(direction(), 0.0, 1.0), key=None)


class Tripled(mfx.AbstractDerivative):
    """An engine of a user's own: three times the derivative of another."""

    engine: mfx.AbstractDerivative
    passes = None

    def __call__(self, field, z, r, t, condition, *, tangent, key):
        u, dudt = self.engine(field, z, r, t, condition, tangent=tangent, key=key)
        return u, 3 * dudt


@pytest.mark.parametrize("identity", [mfx.MeanFlow, mfx.ImprovedMeanFlow])
def test_identity_takes_its_derivative_from_an_engine_of_the_user(identity):
    field, (z, r, t), v = curved(), point(), direction()
    found = identity(derivative=Tripled(mfx.StoppedJVP())).residual(field, mfx.Row(z, v, r, t))
    along = v if identity is mfx.MeanFlow else field(z, t, t)
    u, dudt = mfx.total_derivative(field, z, along, r, t)
    np.testing.assert_allclose(found, u - v + (t - r) * 3 * dudt, rtol=1e-13)


# Central differences


def test_error_of_a_central_difference_falls_with_the_square_of_its_step():
    field, (z, r, t) = curved(), point()
    _, exact = total_derivative(field, z, direction(), r, t)

    def error(step):
        tangent = (direction(), 0.0, 1.0)
        _, dudt = CentralDifference(step)(field, z, r, t, None, tangent=tangent, key=None)
        return np.linalg.norm(dudt - exact)

    np.testing.assert_allclose(error(2e-3) / error(1e-3), 4, rtol=1e-3)


@pytest.mark.parametrize("step", [0.0, -1e-3, float("nan")])
def test_step_that_is_not_positive_is_refused(step):
    with pytest.raises(ValueError, match=f"step must be > 0 and finite, got {step}"):
        CentralDifference(step)


def test_default_step_leaves_about_four_digits_in_float32():
    field, (z, r, t), v = nn.cast(curved(), jnp.float32), *nn.cast((point(), direction()), jnp.float32)
    _, dudt = CentralDifference()(field, z, r, t, None, tangent=(v, 0.0, 1.0), key=None)
    _, exact = total_derivative(field, z, v, r, t)
    assert dudt.dtype == jnp.float32
    assert np.linalg.norm(dudt - exact) < 3e-4 * np.linalg.norm(exact)


def low(dtype):
    """z in `dtype` somewhere inside the field, as a network does that computes in it."""

    def scanned(z, r, t, condition):
        return jax.lax.scan(lambda x, _: (jnp.sin(x.astype(dtype)).astype(x.dtype), None), z, None, length=2)[0]

    return {"open": lambda z, *_: jnp.sin(z.astype(dtype)).astype(z.dtype), "scanned": scanned}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", ["open", "scanned"])
@pytest.mark.parametrize("rows", [False, True], ids=["one", "vmap"])
def test_central_difference_refuses_less_than_float32(dtype, form, rows):
    _, r, t = point()

    def evaluate(z):
        return CentralDifference()(Given(low(dtype)[form]), z, r, t, None, tangent=(z, 0.0, 1.0), key=None)

    name = jnp.dtype(dtype).name
    with pytest.raises(
        ValueError, match=f"field must compute in float32 or better for a finite difference, got {name}"
    ):
        jax.eval_shape(jax.vmap(evaluate), jnp.ones((2, 3))) if rows else jax.eval_shape(evaluate, jnp.ones(3))


# Gradients


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def residual_gradient(engine):
    """Of the squared MeanFlow residual of the curved field."""
    (z, r, t), v = point(), direction()

    def loss(field):
        return jnp.sum(
            MeanFlow(derivative=engine).residual(field, mfx.Row(z, v, r, t, jnp.ones(3), key=jr.key(1))) ** 2
        )

    return flat(jax.jit(jax.grad(loss))(curved()))


def test_gradient_of_the_residual_is_the_same_with_a_stopped_jvp():
    np.testing.assert_allclose(residual_gradient(StoppedJVP()), residual_gradient(FusedJVP()), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_residual_with_a_central_difference_is_off_by_no_more_than_the_difference():
    (z, r, t), v, engine = point(), direction(), CentralDifference(1e-3)

    def off():
        tangent = (v, 0.0, 1.0)
        pairs = [e(curved(), z, r, t, jnp.ones(3), tangent=tangent, key=jr.key(1)) for e in (engine, FusedJVP())]
        return np.linalg.norm(pairs[0][1] - pairs[1][1])

    jacobian = jax.jacobian(lambda field: field(z, r, t, jnp.ones(3)))(curved())
    # The gradient is 2 J^T residual, and the residual is off by (t - r) times the error of du/dt.
    bound = 2 * np.linalg.norm(flat(jacobian)) * (t - r) * off()
    error = np.linalg.norm(residual_gradient(engine) - residual_gradient(FusedJVP()))
    assert 0 < error <= bound < 1e-3 * np.linalg.norm(residual_gradient(FusedJVP()))


def test_gradient_through_the_derivative_is_the_finite_difference_in_the_parameters():
    field, (z, r, t), v = curved(), point(), direction()
    rng = np.random.default_rng(1)
    change = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), field)

    def loss(field):
        return jnp.sum(jnp.sin(total_derivative(field, z, v, r, t)[1]))

    gradient = jax.jit(jax.grad(loss))(field)
    up, down = (jax.jit(loss)(jax.tree.map(lambda leaf, d, s=s: leaf + s * d, field, change)) for s in (STEP, -STEP))
    np.testing.assert_allclose(flat(gradient) @ flat(change), (up - down) / (2 * STEP), rtol=1e-7)


class Attentive(AbstractField):
    """Attention over the three components of z, alone or in a stack."""

    layer: nn.SelfAttention | nn.Stack
    form: str = eqx.field(static=True)

    def __init__(self, form, attention):
        def make(key):
            return nn.SelfAttention(2, 1, attention=attention, key=key)

        self.form = form
        self.layer = make(jr.key(0)) if form == "alone" else nn.Stack(make, 2, remat=form == "remat", key=jr.key(0))

    def __call__(self, z, r, t, condition=None, *, key=None):
        x = jnp.stack([z + r, z * t], axis=1)
        x = self.layer(x) if self.form == "alone" else self.layer(lambda layer, x: layer(x), x)
        return x[:, 0]


def gradient_in(mode, engine, attention, form, how):
    """The gradient of a loss of u and `how(dudt)`, evaluated in one of several ways."""
    _, r, t = point()

    def loss(field, z):
        u, dudt = engine(field, z, r, t, None, tangent=(jnp.cos(z), 0.0, 1.0), key=None)
        return jnp.sum(u + how(dudt))

    def mean(field, rows):
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(field, rows))

    field, z = Attentive(form, attention), point()[0]
    if mode == "eager":
        return jax.grad(loss)(field, z)
    if mode == "jit":
        return jax.eval_shape(jax.jit(jax.grad(loss)), field, z)
    return jax.eval_shape(jax.grad(mean), field, jnp.stack([z, 2 * z]))


STOPPING = [
    pytest.param(StoppedJVP(), nn.XLAAttention(), id="StoppedJVP"),
    pytest.param(CentralDifference(), nn.XLAAttention(), id="CentralDifference"),
    pytest.param(FusedJVP(), FusedAttention(), id="FusedJVP of a fused kernel"),
    pytest.param(StoppedJVP(), FusedAttention(), id="StoppedJVP of a fused kernel"),
]
# Eager evaluation compiles every operation, so that one form must do.
WAYS = [
    pytest.param(mode, form, id=f"{mode} {form}")
    for mode, form in [("eager", "alone"), *itertools.product(("jit", "vmap"), ("alone", "scan", "remat"))]
]


@pytest.mark.parametrize(("engine", "attention"), STOPPING)
@pytest.mark.parametrize(("mode", "form"), WAYS)
def test_gradient_through_a_stopped_derivative_is_refused(engine, attention, mode, form):
    with pytest.raises(ValueError, match=r"du/dt must be behind stop_gradient here.*use FusedJVP and XLAAttention"):
        gradient_in(mode, engine, attention, form, lambda dudt: dudt)


@pytest.mark.parametrize(("engine", "attention"), STOPPING)
@pytest.mark.parametrize(("mode", "form"), WAYS)
def test_stopped_derivative_behind_stop_gradient_is_accepted(engine, attention, mode, form):
    gradient = gradient_in(mode, engine, attention, form, jax.lax.stop_gradient)
    assert jax.tree.structure(gradient) == jax.tree.structure(Attentive(form, attention))


@pytest.mark.parametrize(("mode", "form"), WAYS)
def test_gradient_through_the_derivative_of_a_plain_field_is_accepted(mode, form):
    gradient = gradient_in(mode, FusedJVP(), nn.XLAAttention(), form, lambda dudt: dudt)
    assert jax.tree.structure(gradient) == jax.tree.structure(Attentive(form, nn.XLAAttention()))


# Functions that forward mode cannot pass


@jax.custom_vjp
def opaque(x):
    """sin(x), with a backward pass of its own."""
    return jnp.sin(x)


opaque.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (cotangent * jnp.cos(x),))


def scanned(step, z):
    return jax.lax.scan(lambda x, _: (step(x), None), z, None, length=2)[0]


# Each takes the function and is a field.
IN_THE_WAY = {
    "of z": lambda f, z, r, t, c: f(z),
    "of r": lambda f, z, r, t, c: z * f(r),
    "of t": lambda f, z, r, t, c: z * f(t),
    "in jit": lambda f, z, r, t, c: jax.jit(f)(z),
    "in vmap": lambda f, z, r, t, c: jax.vmap(f)(z),
    "in cond": lambda f, z, r, t, c: jax.lax.cond(t > r, f, lambda z: z, z),
    "in scan": lambda f, z, r, t, c: scanned(f, z),
    "in checkpoint in scan": lambda f, z, r, t, c: scanned(jax.checkpoint(f), z),
}
ASIDE = {
    "of the condition": lambda f, z, r, t, c: z * t * f(c),
    "of the condition, in scan": lambda f, z, r, t, c: scanned(lambda x: x * t * f(c), z),
    "of the condition, in checkpoint in scan": lambda f, z, r, t, c: scanned(jax.checkpoint(lambda x: x * t * f(c)), z),
    "of a stopped z": lambda f, z, r, t, c: z * t * f(jax.lax.stop_gradient(z)),
}


def evaluation(engine, form, function, rows):
    """(z, condition) -> (u, dudt) of a field with `function` in it, for one row or for two."""
    _, r, t = point()

    def evaluate(z, c):
        field = Given(functools.partial(form, function))
        return engine(field, z, r, t, c, tangent=(direction(), 0.0, 1.0), key=None)

    return jax.vmap(evaluate) if rows else evaluate


def state_and_condition(rows):
    z, c = point()[0], jnp.array([0.4, 1.0, -0.3])
    return (jnp.stack([z, 2 * z]), jnp.stack([c, -c])) if rows else (z, c)


@every(JVP_ENGINES)
@pytest.mark.parametrize("form", IN_THE_WAY)
@pytest.mark.parametrize("rows", [False, True], ids=["one", "vmap"])
def test_custom_vjp_in_the_way_of_a_jvp_is_refused_while_tracing(engine, form, rows):
    remedy = r"forward mode, got a jax.custom_vjp.*mf_eqx.nn.AbstractAttention.*CentralDifference"
    with pytest.raises(ValueError, match=remedy):
        jax.eval_shape(evaluation(engine, IN_THE_WAY[form], opaque, rows), *state_and_condition(rows))


@every(JVP_ENGINES)
@pytest.mark.parametrize("form", ASIDE)
@pytest.mark.parametrize("rows", [False, True], ids=["one", "vmap"])
def test_custom_vjp_that_does_not_meet_the_jvp_is_accepted(engine, form, rows):
    found, expected = (
        jax.jit(evaluation(engine, ASIDE[form], function, rows))(*state_and_condition(rows))
        for function in (opaque, jnp.sin)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("form", IN_THE_WAY)
@pytest.mark.parametrize("rows", [False, True], ids=["one", "vmap"])
def test_central_difference_passes_a_custom_vjp(form, rows):
    values = state_and_condition(rows)
    found = jax.jit(evaluation(CentralDifference(STEP), IN_THE_WAY[form], opaque, rows))(*values)
    exact = jax.jit(evaluation(FusedJVP(), IN_THE_WAY[form], jnp.sin, rows))(*values)
    np.testing.assert_allclose(found, exact, rtol=0, atol=TOLERANCE)


# A field that gives more than u


class TwoHeaded(mfx.AbstractFieldWithVelocity):
    """Both heads on one hidden layer."""

    trunk: jax.Array
    u_head: jax.Array
    v_head: jax.Array
    has_velocity_head = True

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.with_velocity(z, r, t)[0]

    def velocity(self, z, t, condition=None, *, key=None):
        return self.with_velocity(z, t, t)[1]

    def with_velocity(self, z, r, t, condition=None, *, key=None):
        hidden = jnp.tanh(self.trunk @ jnp.concatenate([z, jnp.stack([r, t])]))
        return self.u_head @ hidden, self.v_head @ hidden


class Head(mfx.AbstractField):
    """One head of a `TwoHeaded` alone."""

    field: TwoHeaded
    which: int

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field.with_velocity(z, r, t, condition, key=key)[self.which]


def two_headed(width=5, dim=3):
    rng = np.random.default_rng(1)
    return TwoHeaded(*(jnp.asarray(rng.normal(size=shape)) for shape in ((width, dim + 2), (dim, width), (dim, width))))


def at(dim=3):
    z, v = jnp.linspace(-1, 1, dim), jnp.linspace(2, 0.5, dim)
    return (z, jnp.asarray(0.2), jnp.asarray(0.7), None), {"tangent": (v, 0.0, 1.0), "key": None}


@pytest.mark.parametrize("engine", [mfx.FusedJVP(), mfx.StoppedJVP(), mfx.CentralDifference(1e-4)])
def test_an_engine_carries_a_second_output_along(engine):
    field, (where, how) = two_headed(), at()
    values, rates = engine(mfx.WithVelocity(field), *where, **how)
    np.testing.assert_array_equal(field(*where[:3]), values[0])
    for which in (0, 1):
        value, rate = mfx.FusedJVP()(Head(field, which), *where, **how)
        np.testing.assert_allclose(values[which], value, rtol=1e-13)
        np.testing.assert_allclose(rates[which], rate, rtol=1e-6)


def test_a_second_output_costs_no_second_pass():
    """Of two wide layers and two small heads, u and du/dt with v cost a head more than without."""
    wide, (where, how) = two_headed(512, 8), at(8)

    def flops(field):
        def both(field):
            values, rates = mfx.FusedJVP()(field, *where, **how)
            return values, rates[0] if isinstance(rates, tuple) else rates

        return eqx.filter_jit(both).lower(field).compile().compiled.cost_analysis()["flops"]

    with_v, without = flops(mfx.WithVelocity(wide)), flops(Head(wide, 0))
    head = 2 * 512 * 8
    assert without < with_v < without + 1.2 * head


class Distilled(mfx.AbstractIdentityWithLoss):
    """MeanFlow along the velocity that the head predicts, which learns beside it."""

    facts = mfx.Facts(needs_velocity_head=True)

    def residual_and_loss(self, field, row):
        tangent = (mfx.instantaneous_velocity(mfx.stopped(field), row.z, row.t), 0.0, 1.0)
        (u, v), (dudt, _) = mfx.FusedJVP()(
            mfx.WithVelocity(field), row.z, row.r, row.t, None, tangent=tangent, key=None
        )
        residual = u - jax.lax.stop_gradient(row.v - (row.t - row.r) * dudt)
        return residual, jnp.sum(residual**2) + jnp.sum((v - row.v) ** 2)


def test_a_method_that_wants_a_second_output_trains_it_and_refuses_fields_without():
    objective = mfx.Objective(Distilled(), identity_share=0.5)
    batch = mfx.Batch(jr.normal(jr.key(0), (8, 3)))
    gradient = eqx.filter_grad(lambda field: objective(field, batch, key=jr.key(1))[0])(two_headed())
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match=r"field must have a velocity head .* for Distilled, got Head without one"):
        objective(Head(two_headed(), 0), batch, key=jr.key(1))
