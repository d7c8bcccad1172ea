"""Numbers of Python and NumPy wherever a time is asked for: as arrays in the precision of the data."""

import contextlib
import functools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled, GaussianField
from methods import ONE_ROW, taught_by

import mf_eqx as mfx
from mf_eqx import exact, nn
from mf_eqx._custom_types import as_scalar

R, T = 0.25, 0.75
NUMBERS = {
    "float": (R, T),
    "int": (0, 1),
    "numpy": (np.asarray(R, np.float32), np.float32(T)),
}
MODES = {"float32": (False, jnp.float32), "float32 in x64": (True, jnp.float32), "float64": (True, jnp.float64)}

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
# Each kind of number and each mode once: how they combine is the affair of `as_scalar` alone.
numbers_and_modes = pytest.mark.parametrize(
    ("numbers", "mode"), [*zip(NUMBERS.values(), [*MODES.values()][::-1], strict=True)], ids=NUMBERS
)


# Fields


@functools.cache
def network(make):
    with jax.enable_x64(False):
        return filled(lambda: make(key=jr.key(0)))


def dit(key):
    return mfx.DiT((1, 4, 4), mfx.DiTSize(1, 8, 2, 2), labels=2, key=key)


def in_context(key):
    return mfx.InContextDiT((1, 4, 4), mfx.InContextDiTSize(2, 8, 2, 2, 1), labels=2, key=key)


def mlp(key):
    return mfx.MLP(2, width=8, depth=1, labels=2, key=key)


def unet(key):
    return mfx.UNet((1, 4, 4), mfx.UNetSize(8, (1,), 1, ()), key=key)


def mixture(dtype):
    return exact.GaussianMixture(jnp.array([[-1.0, 0.5], [1.0, 0.0]], dtype), 0.3, label=np.arange(2))


def integrated(dtype):
    return exact.AverageVelocity(exact.MarginalVelocity(mixture(dtype)), rtol=1e-5, atol=1e-5)


FIELDS = {
    "MLP": lambda dtype: (network(mlp), 1),
    "DiT": lambda dtype: (network(dit), 1),
    "InContextDiT": lambda dtype: (network(in_context), 1),
    "UNet": lambda dtype: (network(unet), None),
    "GuidedField": lambda dtype: (mfx.GuidedField(network(mlp), 2, 2), 1),
    "guided field of a user": lambda dtype: (mfx.GuidedField(Strict(), 2, None), None),
    "AverageVelocity": lambda dtype: (integrated(dtype), None),
    "GaussianAverageVelocity": lambda dtype: (exact.GaussianAverageVelocity(jnp.ones(2, dtype), 0.5), None),
    "PointMassAverageVelocity": lambda dtype: (exact.PointMassAverageVelocity(jnp.ones(2, dtype)), None),
}


def quick(names, slow):
    """The names, of which some are tested by slow tests alone."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


every_field = pytest.mark.parametrize("name", quick(FIELDS, slow=("InContextDiT",)))


class Strict(mfx.AbstractField):
    """A user's field that takes it that times are arrays in the precision of the data."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        assert r.dtype == t.dtype == z.dtype and r.shape == t.shape == ()
        return jnp.sin(2 * z) + r.astype(z.dtype) * t


def data(field, dtype):
    is_image = isinstance(field, mfx.DiT | mfx.InContextDiT | mfx.UNet)
    return jnp.linspace(-1, 1, 16, dtype=dtype).reshape(1, 4, 4) if is_image else jnp.ones(2, dtype)


def assert_same(found, expected):
    """Up to rounding, and in the same precision beside the data's."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12 if b.dtype == jnp.float64 else 2e-5, atol=1e-5 * (b.dtype != "f8"))


@contextlib.contextmanager
def mode_of(mode):
    enabled, dtype = mode
    with jax.enable_x64(enabled):
        yield dtype


@pytest.mark.parametrize("name", quick(FIELDS, slow=("DiT", "InContextDiT", "UNet")))
@numbers_and_modes
def test_field_takes_numbers_for_times_in_the_precision_of_the_data(name, numbers, mode):
    with mode_of(mode) as dtype:
        field, condition = FIELDS[name](dtype)
        z = data(field, dtype)
        times = [jnp.asarray(time, dtype) for time in numbers]
        expected, found = field(z, *times, condition), field(z, *numbers, condition)
        assert found.dtype == expected.dtype == dtype
        assert_same(found, expected)


@functools.cache
def value(name):
    """Of a field for arrays, in float32."""
    field, condition = FIELDS[name](jnp.float32)
    return field(data(field, jnp.float32), jnp.asarray(R), jnp.asarray(T), condition)


@every_field
def test_numbers_for_times_may_be_traced(name):
    field, condition = FIELDS[name](jnp.float32)
    z = data(field, jnp.float32)
    assert_same(jax.jit(lambda r, t: field(z, r, t, condition))(R, T), value(name))


@every_field
@pytest.mark.usefixtures("unchecked")
def test_times_of_several_rows_are_refused_by_name(name):
    field, condition = FIELDS[name](jnp.float32)
    with pytest.raises(ValueError, match=r"t must be one number of shape \(\), got shape \(3,\).*jax.vmap"):
        field(data(field, jnp.float32), 0.0, jnp.ones(3), condition)


@every_field
@pytest.mark.usefixtures("unchecked")
def test_field_takes_numpy_data(name):
    field, condition = FIELDS[name](jnp.float32)
    assert_same(field(np.asarray(data(field, jnp.float32)), R, T, condition), value(name))


# Functions of one example


def gaussian(z):
    return GaussianField(jnp.ones_like(z), 0.5)


def residual(identity):
    def function(z, r, t):
        pair = {"x": z, "eps": z + 1, "path": mfx.LinearInterpolant()}
        pair |= taught_by(identity, Strict())
        return identity.residual(Strict(), mfx.Row(z, jnp.cos(z), r, t, key=jr.key(0), **pair))

    return function


def engine(derivative):
    return lambda z, r, t: derivative(Strict(), z, r, t, None, tangent=(jnp.cos(z), 0.0, 1.0), key=None)


FUNCTIONS = {
    "semigroup_residual": lambda z, r, t: mfx.semigroup_residual(Strict(), z, r, t, 0.5),
    "split": lambda z, r, t: mfx.semigroup_residual(Strict(), z, r, jnp.ones((), z.dtype), t),
    **{name: residual(identity) for name, identity in ONE_ROW.items()},
    "total_derivative": lambda z, r, t: mfx.total_derivative(Strict(), z, jnp.cos(z), r, t),
    **{type(d).__name__: engine(d) for d in (mfx.FusedJVP(), mfx.StoppedJVP(), mfx.CentralDifference(0.125))},
    "Guidance": lambda z, r, t: mfx.Guidance(2.0, 0.5, (0.5, 1.0)).velocity(z, z + 1, z - 1, t),
    "state_and_velocity": lambda z, r, t: mfx.TrigonometricInterpolant().state_and_velocity(z, z + 1, t),
    "MarginalVelocity": lambda z, r, t: exact.MarginalVelocity(mixture(z.dtype))(z, t),
    "GuidedVelocity": lambda z, r, t: exact.GuidedVelocity(lambda z, t, c: z * t.astype(z.dtype), 2.0)(z, t),
    "WeightedVelocity": lambda z, r, t: exact.WeightedVelocity(mixture(z.dtype), mfx.AdaptiveWeight())(z, t),
    "posterior": lambda z, r, t: mixture(z.dtype).posterior(mfx.LinearInterpolant(), z, t, 1),
    "PointSet": lambda z, r, t: exact.PointSet(jnp.eye(2, dtype=z.dtype)).velocity(mfx.LinearInterpolant(), z, t),
    "StackedMixture": lambda z, r, t: exact.StackedMixture(mixture(z.dtype), 2).velocity(
        mfx.LinearInterpolant(), jnp.tile(z, 2), t
    ),
    "TimePairEmbedding": lambda z, r, t: nn.cast(nn.TimePairEmbedding(4, size=8, key=jr.key(0)), z.dtype)(r, t),
}


@pytest.mark.parametrize("name", quick(FUNCTIONS, slow=ONE_ROW.keys() - {"MeanFlow", "Shortcut", "SoFlow"}))
@numbers_and_modes
def test_function_takes_numbers_for_times_in_the_precision_of_the_data(name, numbers, mode):
    with mode_of(mode) as dtype:
        z = jnp.asarray([0.3, -0.7], dtype)
        times = [jnp.asarray(time, dtype) for time in numbers]
        expected, found = (FUNCTIONS[name](z, *given) for given in (times, numbers))
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]
        assert_same(found, expected)


@pytest.mark.parametrize("number", [0.5, 1, np.float32(0.5), np.int32(1)], ids=repr)
@pytest.mark.parametrize(
    "function", [lambda n: nn.sinusoidal_embedding(n, 8), mfx.ConstantWeight(0.25)], ids=["embedding", "weight"]
)
def test_function_of_a_number_alone_gives_an_array_in_floating_point(function, number):
    found = function(number)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, function(jnp.asarray(number, jnp.float32)))


PATHS = (mfx.LinearInterpolant(), mfx.TrigonometricInterpolant())
OF_NUMBERS_ALONE = {
    **{f"{type(path).__name__}.{name}": getattr(path, name) for path in PATHS for name in ("alpha", "sigma", "rates")},
    "AdaptiveWeight": mfx.AdaptiveWeight(),
    **{
        variables.__name__: lambda t, variables=variables: variables(0.0, t)
        for variables in (nn.end_start, nn.end_duration, nn.end_start_duration, nn.duration)
    },
}


@pytest.mark.parametrize("name", OF_NUMBERS_ALONE)
@pytest.mark.parametrize("number", [0.75, 1])
@every_mode
def test_what_is_made_of_a_number_takes_the_precision_of_the_data_that_it_meets(name, number, mode):
    with mode_of(mode) as dtype:
        z, function = jnp.asarray([0.3, -0.7], dtype), OF_NUMBERS_ALONE[name]
        for found, expected in zip(
            *(jax.tree.leaves(function(n)) for n in (number, jnp.asarray(number, dtype))), strict=True
        ):
            assert found.shape == () and (found * z).dtype == dtype
            assert_same(found * z, expected * z)


# Users' parts


class Fixed(mfx.AbstractTimes):
    def __call__(self, *, key):
        return 0.5


def test_a_distribution_of_times_may_return_a_number_of_python():
    objective = mfx.Objective(mfx.SplitMeanFlow(Fixed()), boundary_times=Fixed(), time_pairs=mfx.TimePairs(Fixed()))
    field = network(lambda key: mfx.MLP(2, width=8, depth=1, key=key))
    loss, _ = eqx.filter_jit(objective)(field, mfx.Batch(jnp.ones((4, 2))), key=jr.key(0))
    assert jnp.isfinite(loss)


class Stated(mfx.AbstractField):
    """A user's field whose arguments are annotated as those of `AbstractField` are."""

    needs: ClassVar = None

    def __call__(self, z: jax.Array, r: jax.Array, t: jax.Array, condition=None, *, key=None) -> jax.Array:
        assert all(isinstance(leaf, jax.Array) for leaf in (z, r, t))
        return z * (t - r)


def test_users_fields_are_handed_arrays():
    z = jnp.ones(2)
    mfx.sample(Stated(), z)
    mfx.semigroup_residual(Stated(), z, 0.0, 1.0, 0.5)
    mfx.total_derivative(Stated(), z, z, 0, 1)
    mfx.GuidedField(Stated(), 2, None)(z, 0.0, 1.0)


# The conversion itself


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_an_array_keeps_its_precision(dtype):
    time = jnp.asarray(0.5, dtype)
    assert as_scalar("t", time, jnp.ones(2)) is time


@pytest.mark.parametrize("number", [R, 1, np.asarray(R, np.float32), np.float32(T)], ids=repr)
@every_mode
def test_a_number_takes_the_precision_of_the_data(number, mode):
    with mode_of(mode) as dtype:
        found = as_scalar("t", number, jnp.ones(2, dtype))
        assert found.dtype == dtype and found == number


def test_a_number_is_float32_beside_data_of_lower_precision():
    assert as_scalar("t", 0.1, jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def test_a_number_without_data_takes_the_precision_of_what_it_meets(x64):
    for number in (0.5, 1):
        assert (as_scalar("t", number) * jnp.ones(2, jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_conversion_does_not_mind_strict_promotion(x64, dtype):
    with jax.numpy_dtype_promotion("strict"):
        assert as_scalar("t", 0.5, jnp.ones(2, dtype)).dtype == dtype


def test_a_step_gains_no_operation_by_it():
    def operations(time):
        return len(jax.make_jaxpr(lambda t, z: time(t, z) * z)(jnp.ones(()), jnp.ones(2)).eqns)

    assert operations(lambda t, z: as_scalar("t", t, z)) == operations(lambda t, z: t) == 1
