from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import AbstractField
from mf_eqx._field import check_field, stopped

pytestmark = pytest.mark.usefixtures("x64")


class Affine(AbstractField):
    """A user's field: u = activation(matrix z) + t, with leaves of every kind."""

    matrix: jax.Array
    offset: jax.Array
    activation: Callable

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.activation(self.matrix @ z) + t + self.offset[0]


def affine():
    return Affine(jnp.asarray(np.random.default_rng(0).normal(size=(2, 2))), jnp.array([3, 4]), jnp.tanh)


def point():
    return jnp.array([0.3, -1.2]), jnp.asarray(0.2), jnp.asarray(0.7)


def test_field_without_a_call_cannot_be_made():
    class Nothing(AbstractField):
        pass

    with pytest.raises(TypeError, match="__call__"):
        Nothing()


def test_stopped_field_has_the_same_values():
    np.testing.assert_array_equal(stopped(affine())(*point()), affine()(*point()))


def test_no_gradient_reaches_the_parameters_of_a_stopped_field():
    def norm(field, stop):
        return jnp.sum((stopped(field) if stop else field)(*point()) ** 2)

    gradient, control = (eqx.filter_grad(norm)(affine(), stop) for stop in (True, False))
    assert (control.matrix != 0).all()
    np.testing.assert_array_equal(gradient.matrix, 0)


def test_stopped_field_is_still_differentiable_in_its_state():
    z, r, t = point()
    derivatives = [jax.jacfwd(lambda z, field=field: field(z, r, t))(z) for field in (stopped(affine()), affine())]
    assert (derivatives[1] != 0).all()
    np.testing.assert_array_equal(*derivatives)


def test_stopping_keeps_leaves_that_are_no_parameters():
    field = affine()
    assert stopped(field).activation is field.activation
    assert stopped(field).offset is field.offset


# What is trained


class Constants(AbstractField):
    """A user's field: u = weight z + t, beside constants of every kind."""

    weight: jax.Array
    stopped: jax.Array
    unused: jax.Array
    host: np.ndarray
    integer: jax.Array
    boolean: jax.Array
    number: float
    static: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, z, r, t, condition=None, *, key=None):
        computed = jnp.asarray(np.full(2, 0.5))
        return self.weight * z + t + jax.lax.stop_gradient(self.stopped) + computed + jnp.asarray(self.static)


def constants():
    weight, idle, unused = jnp.full((3, 2), 0.5)
    return Constants(weight, idle, unused, np.full(2, 0.5), jnp.ones(2, int), jnp.ones(2, bool), 0.5, (0.5, 0.5))


def trained(optimizer):
    """The field after three steps with weight decay, and its average."""
    step = mfx.TrainStep(mfx.Objective(), optimizer, [mfx.ExponentialAverage(0.5)])
    state = mfx.init_state(constants(), optimizer, [mfx.ExponentialAverage(0.5)], key=jr.key(0))
    for _ in range(3):
        state, _ = step(state, mfx.Batch(jnp.ones((4, 2))))
    return state.field, state.averages[0]


@pytest.fixture(scope="module")
def decayed():
    with jax.enable_x64(True):
        return trained(optax.adamw(0.1, weight_decay=0.5))


@pytest.mark.parametrize("name", ["stopped", "unused", "host"])
def test_floating_point_array_that_no_gradient_reaches_is_decayed_and_averaged(decayed, name):
    np.testing.assert_allclose(getattr(decayed[0], name), 0.5 * 0.95**3, rtol=1e-12)
    assert (getattr(decayed[1], name) > 0.5 * 0.95**3).all() and (getattr(decayed[1], name) < 0.5).all()


@pytest.mark.parametrize("name", ["integer", "boolean", "number", "static"])
def test_what_is_no_floating_point_array_is_left_alone(decayed, name):
    for field in decayed:
        np.testing.assert_array_equal(getattr(field, name), getattr(constants(), name))


def test_array_without_an_update_stays_while_others_learn(x64):
    def labels(field):
        def label(path, _):
            return "learnt" if jax.tree_util.keystr(path) == ".weight" else "constant"

        return jax.tree_util.tree_map_with_path(label, field)

    rules = {"learnt": optax.adamw(0.1, weight_decay=0.5), "constant": optax.set_to_zero()}
    for field in trained(optax.partition(rules, labels)):
        for name in ("stopped", "unused", "host"):
            np.testing.assert_array_equal(getattr(field, name), 0.5)
        assert (field.weight != 0.5).all()


# Batches


class Normalised(AbstractField):
    norm: eqx.nn.BatchNorm
    state: eqx.nn.State

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.norm(z, self.state)[0] + t


def normalised():
    with jax.enable_x64(False):
        return Normalised(*eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode="ema"))


@pytest.mark.parametrize("sampler", [mfx.sample, mfx.sample_euler, mfx.sample_heun])
def test_sampler_refuses_batch_norm_with_what_to_take_instead(sampler):
    with pytest.raises(
        ValueError, match=r"field must be a function of one example, got an eqx\.nn\.BatchNorm.*GroupNorm"
    ):
        sampler(normalised(), jnp.ones(2), times=(1.0, 0.0))


def test_objective_refuses_batch_norm_with_what_to_take_instead():
    with pytest.raises(
        ValueError, match=r"field must be a function of one example, got an eqx\.nn\.BatchNorm.*GroupNorm"
    ):
        mfx.Objective()(normalised(), mfx.Batch(jnp.ones((4, 2))), key=jr.key(0))


def test_batch_norm_in_inference_mode_is_a_function_of_one_example():
    check_field(eqx.nn.inference_mode(normalised()))


# Networks that are called in another way

OPTIMIZER = optax.sgd(0.1)


class WithoutKey(AbstractField):
    def __call__(self, z, r, t, condition=None):
        return z


class Narrow(AbstractField):
    """Returns one value less than it gets."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z[1:]


USES = {
    "init_state": lambda field: mfx.init_state(field, OPTIMIZER, key=jr.key(0)),
    "Objective": lambda field: mfx.Objective()(field, mfx.Batch(jnp.ones((4, 2))), key=jr.key(0)),
    "sample": lambda field: mfx.sample(field, jnp.ones(2)),
    "sample_heun": lambda field: mfx.sample_heun(field, jnp.ones(2), times=(1.0, 0.5, 0.0)),
    "Generator": lambda field: mfx.Generator(field, jr.key(0), (2,)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: eqx.nn.MLP(4, 2, 8, 1, key=jr.key(0)), r"MLP, which takes \(x, key\)"),
        (WithoutKey, r"WithoutKey, which takes \(z, r, t, condition\)"),
        (lambda: jnp.ones(2), "ArrayImpl"),
    ],
    ids=["eqx.nn.MLP", "no key", "array"],
)
def test_network_that_is_called_in_another_way_is_refused_with_the_way(use, make, found):
    rule = r"field must be callable as field\(z, r, t, condition, key=key\)"
    with pytest.raises(ValueError, match=f"{rule}, got {found}: call it from a subclass of mf_eqx.AbstractField"):
        use(make())


class Pair(AbstractField):
    """Returns more than the average velocity."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return z, {"velocity": z}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "use",
    [
        USES["Objective"],
        USES["sample"],
        lambda field: mfx.total_derivative(field, jnp.ones(2), jnp.ones(2), 0.1, 0.9),
        lambda field: mfx.Objective(velocity=field)(
            mfx.MLP(2, key=jr.key(0)), mfx.Batch(jnp.ones((4, 2))), key=jr.key(0)
        ),
    ],
    ids=["loss", "sample", "derivative", "velocity"],
)
def test_network_that_returns_more_than_one_array_is_refused_with_what_it_returns(use):
    with pytest.raises(ValueError, match=r"must return one array of the shape of z, \(2,\), got \(f\d\d\[2\], {"):
        use(Pair())


@pytest.mark.parametrize("use", [USES["Objective"], USES["sample"], USES["sample_heun"]])
def test_network_that_returns_another_shape_is_refused_with_both(use):
    with pytest.raises(ValueError, match=r"field must return the shape of z, \(2,\), got \(1,\)"):
        use(Narrow())
