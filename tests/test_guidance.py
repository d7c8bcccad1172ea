import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mf_eqx import AbstractField, Guidance, GuidedField, LabelDropout

pytestmark = pytest.mark.usefixtures("x64")


def passes():
    """The velocity of the path, the conditional and the unconditional pass."""
    return tuple(jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3))) for seed in range(3))


def half():
    return jnp.asarray(0.5)


@pytest.mark.parametrize(("scale", "mix"), [(1.0, 0.5), (0.2, 0.92), (2.0, 0.0), (3.0, 0.25)])
def test_guided_velocity_is_equation_21(scale, mix):
    v, conditional, unconditional = passes()
    guided = Guidance(scale, mix).velocity(v, conditional, unconditional, half())
    expected = scale * v + mix * conditional + (1 - scale - mix) * unconditional
    np.testing.assert_allclose(guided, expected, rtol=0, atol=1e-15)


def test_guided_velocity_of_round_numbers():
    guided = Guidance(2.0, 0.5).velocity(*(jnp.asarray([x]) for x in (1.0, 10.0, 100.0)), half())
    assert guided == 2 * 1 + 0.5 * 10 - 1.5 * 100


def test_without_mix_the_conditional_pass_may_be_missing():
    v, _, unconditional = passes()
    guided = Guidance(3.0).velocity(v, None, unconditional, half())
    np.testing.assert_allclose(guided, 3 * v - 2 * unconditional, rtol=0, atol=1e-15)


def test_without_mix_the_conditional_pass_does_not_enter():
    v, conditional, unconditional = passes()
    with_pass, without = (Guidance(3.0).velocity(v, c, unconditional, half()) for c in (conditional, None))
    np.testing.assert_array_equal(with_pass, without)


def test_with_mix_a_missing_conditional_pass_is_refused():
    v, _, unconditional = passes()
    with pytest.raises(ValueError, match=r"conditional must be given unless mix is 0, got None with mix = 0\.5"):
        Guidance(1.0, 0.5).velocity(v, None, unconditional, half())


def test_scale_one_and_mix_zero_is_no_guidance():
    v, conditional, unconditional = passes()
    np.testing.assert_array_equal(Guidance(1.0).velocity(v, conditional, unconditional, half()), v)


@pytest.mark.parametrize(("t", "guides"), [(0.29, False), (0.3, True), (0.5, True), (0.8, True), (0.81, False)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_guidance_applies_on_the_closed_interval(t, guides, dtype):
    v, conditional, unconditional = passes()
    guided = Guidance(2.0, 0.5, (0.3, 0.8)).velocity(v, conditional, unconditional, jnp.asarray(t, dtype))
    assert bool((guided == v).all()) is not guides


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_guidance_applies_at_both_ends_of_time_by_default(t):
    v, conditional, unconditional = passes()
    assert (Guidance(2.0).velocity(v, conditional, unconditional, jnp.asarray(t)) != v).all()


@pytest.mark.parametrize(("scale", "mix", "effective"), [(2.0, 0.0, 2.0), (1.0, 0.5, 2.0), (0.2, 0.92, 2.5)])
def test_effective_scale_is_that_of_the_papers_table(scale, mix, effective):
    assert Guidance(scale, mix).effective_scale == pytest.approx(effective, rel=1e-12)


@pytest.mark.parametrize(("scale", "mix"), [(2.0, 0.0), (1.0, 0.5), (0.2, 0.92)])
def test_effective_scale_is_that_of_the_fixed_point(scale, mix):
    v, _, unconditional = passes()
    guidance = Guidance(scale, mix)
    fixed = guidance.effective_scale * v + (1 - guidance.effective_scale) * unconditional
    np.testing.assert_allclose(guidance.velocity(v, fixed, unconditional, half()), fixed, rtol=0, atol=1e-13)


@pytest.mark.parametrize("t", [0.2, 0.5])
@pytest.mark.parametrize(("scale", "mix"), [(1.0, 0.5), (0.2, 0.92), (2.0, 0.0)])
def test_fixed_point_stays_where_it_is_if_the_field_has_learnt_it(scale, mix, t):
    conditional, _, unconditional = passes()
    guidance, t = Guidance(scale, mix, interval=(0.4, 1.0)), jnp.asarray(t)
    found = guidance.fixed_point(conditional, unconditional, t)
    again = guidance.velocity(conditional, found, unconditional, t)
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale must be > 0 and finite, got {scale}"):
        Guidance(scale)


@pytest.mark.parametrize("mix", [-0.1, 1.0, float("nan")])
def test_mix_outside_its_range_is_refused(mix):
    with pytest.raises(ValueError, match=rf"mix must lie in \[0, 1\), got {mix}"):
        Guidance(1.0, mix)


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.5, 1.1), (0.8, 0.3)])
def test_impossible_interval_is_refused(interval):
    with pytest.raises(ValueError, match=rf"interval must .* got \({interval[0]}, {interval[1]}\)"):
        Guidance(1.0, 0.0, interval)


def test_interval_may_be_any_two_numbers():
    assert Guidance(1.0, 0.0, [0, 1]).interval == (0.0, 1.0)


@pytest.mark.parametrize("interval", [(0.5,), (0.0, 0.5, 1.0)])
def test_interval_of_more_or_fewer_than_two_ends_is_refused(interval):
    with pytest.raises(ValueError, match="interval must have two ends"):
        Guidance(1.0, 0.0, interval)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_dropout_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=rf"rate must lie in \[0, 1\], got {rate}"):
        LabelDropout(rate, 10)


class Conditioned(AbstractField):
    def __call__(self, z, r, t, condition=None, *, key=None):
        return condition * z + r - t + (0 if key is None else 5)


@pytest.mark.parametrize("key", [None, jr.key(0)])
def test_guided_field_extrapolates_from_the_null_condition(key):
    z, r, t = jnp.asarray([1.0, -2.0]), jnp.asarray(0.25), jnp.asarray(0.5)
    field = GuidedField(Conditioned(), 3, null=7.0)
    with_label, without = (Conditioned()(z, r, t, condition, key=key) for condition in (2.0, 7.0))
    np.testing.assert_allclose(field(z, r, t, 2.0, key=key), without + 3 * (with_label - without), rtol=1e-14)


@pytest.mark.parametrize("scale", [-1, math.nan, math.inf])
def test_guided_field_refuses_a_scale_that_makes_no_samples(scale):
    with pytest.raises(ValueError, match=r"scale must be >= 0 and finite, got"):
        GuidedField(Conditioned(), scale, null=7.0)


def test_guided_field_of_scale_one_is_the_field():
    z, r, t = jnp.asarray([1.0, -2.0]), jnp.asarray(0.25), jnp.asarray(0.5)
    np.testing.assert_allclose(GuidedField(Conditioned(), 1, null=7.0)(z, r, t, 2.0), Conditioned()(z, r, t, 2.0))


# NumPy's integers, which JAX takes as int32

MAKE = pytest.mark.parametrize(
    "make", [lambda null: LabelDropout(0.1, null), lambda null: GuidedField(Conditioned(), 2, null)]
)


@MAKE
@pytest.mark.parametrize("null", [np.int64(2**32), {"label": np.array([1, 2**32])}])
def test_null_that_jax_would_take_as_another_number_is_refused(make, null):
    message = "null must be representable in int32, to which JAX converts it, got 4294967296"
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        make(null)


@MAKE
@pytest.mark.parametrize(("null", "has_64_bits"), [(2**31 - 1, False), (2**32, True)])
def test_null_that_jax_takes_as_it_is_is_accepted(make, null, has_64_bits):
    with jax.enable_x64(has_64_bits):
        assert make(np.int64(null)).null == null
