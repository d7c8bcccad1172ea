"""What holds for every identity, whatever its equation."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from methods import ONE_ROW, taught_by
from points import Fixed, point

from mf_eqx import (
    AbstractField,
    AbstractIdentity,
    AbstractIdentityWithLoss,
    ImprovedMeanFlow,
    LinearInterpolant,
    MeanFlow,
    Row,
    SplitMeanFlow,
)

pytestmark = pytest.mark.usefixtures("x64")

IDENTITIES = {**ONE_ROW, "wrong tangent": MeanFlow(1.0, 0.0), "SplitMeanFlow at 0.3": SplitMeanFlow(Fixed(0.3))}


def own_loss(identity):
    return isinstance(identity, AbstractIdentityWithLoss)


def that(condition):
    return [pytest.param(identity, id=name) for name, identity in IDENTITIES.items() if condition(identity.facts)]


class Network(AbstractField):
    """tanh(A z + r b + t c + condition), plus another such term at r = t, all of it under a dropout mask."""

    matrix: jax.Array
    r_rate: jax.Array
    t_rate: jax.Array
    boundary: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        inner = self.matrix @ z + r * self.r_rate + t * self.t_rate + (0.0 if condition is None else condition)
        u = jnp.tanh(inner) + jnp.where(r == t, self.boundary @ z, 0.0)
        return u if key is None else u * (1 + jr.normal(key, z.shape, z.dtype))


class Frozen(AbstractField):
    """A field under one dropout mask, whatever key it is given."""

    field: AbstractField
    key: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, r, t, condition, key=self.key)


class Zero(AbstractField):
    """u = 0."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.zeros_like(z)


def network():
    rng = np.random.default_rng(0)
    return Network(*(jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), 3, 3, (3, 3))))


def row(identity, *, v=None, condition=None, seed=3, gap=1.0):
    """A row of the method's kind at `point()`, with its x and eps."""
    z, given, r, t = point()
    r = jnp.zeros(()) if identity.facts.ends_at_data else t - gap * (t - r)
    v = given if v is None else v
    x, path = jnp.array([0.2, 0.9, -0.4]), LinearInterpolant()
    taught = taught_by(identity, Network(*(leaf / 2 for leaf in jax.tree.leaves(network()))))
    pair = {"x": x, "eps": (z - (1 - t) * x) / t, "path": path}
    return Row(z, v, r, t, condition, key=jr.key(seed), **taught, **pair)


def residual(identity, field, **options):
    return identity.residual(field, row(identity, **options))


def half_square(identity, field, **options):
    return 0.5 * jnp.sum(residual(identity, field, **options) ** 2)


LEARN_BY_U = [case for case in that(lambda facts: not facts.learns_through_derivative) if not own_loss(*case.values)]
WITHOUT_VELOCITY = that(lambda facts: not facts.uses_velocity and not facts.uses_pair)


@pytest.mark.parametrize("identity", LEARN_BY_U)
def test_gradient_of_the_error_treats_the_target_as_a_constant(identity):
    field, at = network(), row(identity)
    gradient = jax.grad(lambda field: half_square(identity, field))(field)
    _, transpose = jax.vjp(lambda field: field(at.z, at.r, at.t, key=at.key), field)
    (expected,) = transpose(residual(identity, field))
    assert (gradient.matrix != 0).all()
    assert eqx.tree_equal(gradient, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("identity", that(lambda facts: True))
def test_no_gradient_flows_into_the_velocity(identity):
    field = network()
    np.testing.assert_array_equal(jax.grad(lambda v: half_square(identity, field, v=v))(point()[1]), 0)


@pytest.mark.parametrize("identity", that(lambda facts: True))
def test_every_evaluation_gets_the_same_key(identity):
    # The key also draws the split of SplitMeanFlow, so it stays the same here too.
    expected = residual(identity, Frozen(network(), jr.key(3)))
    np.testing.assert_array_equal(residual(identity, network()), expected)
    assert (residual(identity, Frozen(network(), jr.key(4))) != expected).all()


@pytest.mark.parametrize("identity", that(lambda facts: not (facts.needs_teacher or facts.needs_velocity)))
def test_every_evaluation_gets_the_condition(identity):
    class Shifted(AbstractField):
        field: AbstractField
        condition: jax.Array

        def __call__(self, z, r, t, condition=None, *, key=None):
            return self.field(z, r, t, self.condition, key=key)

    condition = jnp.array([0.7, -0.1, 0.4])
    expected = residual(identity, Shifted(network(), condition))
    np.testing.assert_array_equal(residual(identity, network(), condition=condition), expected)
    assert (residual(identity, network()) != expected).all()


@pytest.mark.parametrize("identity", that(lambda facts: True))
def test_velocity_enters_exactly_if_the_identity_says_so(identity):
    field, (_, v, _, _) = network(), point()
    enters = bool((residual(identity, field, v=v) != residual(identity, field, v=2 * v)).any())
    assert enters is identity.facts.uses_velocity


@pytest.mark.parametrize("identity", that(lambda facts: facts.degenerate and not facts.uses_velocity))
def test_degenerate_identity_without_velocity_is_solved_by_zero(identity):
    context = taught_by(identity, Zero())["context"]
    at = eqx.tree_at(lambda row: row.context, row(identity), context, is_leaf=lambda node: node is None)
    np.testing.assert_array_equal(identity.residual(Zero(), at), 0)


@pytest.mark.parametrize("identity", that(lambda facts: not facts.degenerate))
def test_other_identities_are_not_solved_by_zero(identity):
    assert (residual(identity, Zero()) != 0).all()


@pytest.mark.parametrize("identity", that(lambda facts: not facts.trains_velocity))
def test_rows_of_an_identity_that_does_not_train_the_velocity_leave_it_alone(identity):
    gradient = jax.grad(lambda field: half_square(identity, field))(network())
    np.testing.assert_array_equal(gradient.boundary, 0)


def test_improved_mean_flow_depends_on_the_velocity_that_it_does_not_train():
    moved = eqx.tree_at(lambda field: field.boundary, network(), replace_fn=lambda leaf: 2 * leaf)
    assert (residual(ImprovedMeanFlow(), network()) != residual(ImprovedMeanFlow(), moved)).all()
    assert ImprovedMeanFlow().facts.degenerate


def test_mean_flow_is_not_solved_by_zero_and_needs_no_boundary():
    np.testing.assert_array_equal(residual(MeanFlow(), Zero()), -point()[1])
    assert not MeanFlow().facts.degenerate


@pytest.mark.parametrize("identity", that(lambda facts: facts.uses_velocity and not facts.ends_at_data))
def test_residual_at_equal_times_is_that_of_flow_matching_if_the_velocity_enters(identity):
    field, at = network(), row(identity, gap=0.0)
    expected = row(identity).evaluate(field, at.z, at.t, at.t) - at.v
    np.testing.assert_allclose(identity.residual(field, at), expected, rtol=1e-13)


@pytest.mark.parametrize("identity", WITHOUT_VELOCITY)
def test_residual_at_equal_times_is_that_between_field_and_teacher_if_no_velocity_enters(identity):
    field, at = network(), row(identity, gap=0.0)
    teacher = at.velocity if at.context is None else at.context.teacher
    expected = 0 if teacher is None else at.evaluate(field, at.z, at.t, at.t) - teacher(at.z, at.t, at.t)
    np.testing.assert_allclose(identity.residual(field, at), expected, rtol=0, atol=1e-15)


@functools.cache
def compiled():
    """The residuals of all identities as one program."""
    return jax.jit(lambda field: {name: residual(each, field) for name, each in IDENTITIES.items()})(network())


@pytest.mark.parametrize("name", IDENTITIES)
def test_residual_is_the_same_under_jit(name):
    expected = residual(IDENTITIES[name], network())
    np.testing.assert_allclose(compiled()[name], expected, rtol=1e-14, atol=1e-14)  # some are above 10


def test_identity_that_states_no_facts_cannot_be_made():
    class Silent(AbstractIdentity):
        def residual(self, field, row):
            return row.z

    with pytest.raises(TypeError, match="facts"):
        Silent()
