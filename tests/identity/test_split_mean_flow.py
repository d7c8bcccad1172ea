import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
import scipy.stats
from fields import PointMassField
from points import curved, Fixed, point

from mf_eqx import AbstractField, AbstractTimes, LogitNormalTimes, Row, semigroup_residual, SplitMeanFlow

pytestmark = pytest.mark.usefixtures("x64")

SPLITS = [0.0, 0.3, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("split", SPLITS)
def test_residual_times_the_interval_is_the_papers_equation(split):
    field, (z, v, r, t) = curved(), point()
    s = t - split * (t - r)
    z_s = z - (t - s) * field(z, s, t)
    expected = (t - r) * field(z, r, t) - (t - s) * field(z, s, t) - (s - r) * field(z_s, r, s)
    found = SplitMeanFlow(Fixed(split)).residual(field, Row(z, v, r, t, key=jr.key(0)))
    np.testing.assert_allclose((t - r) * found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("split", SPLITS)
def test_identity_with_a_fixed_split_is_the_public_semigroup_residual(split):
    field, (z, v, r, t) = curved(), point()
    found = SplitMeanFlow(Fixed(split)).residual(field, Row(z, v, r, t, key=jr.key(0)))
    np.testing.assert_array_equal(found, semigroup_residual(field, z, r, t, jnp.asarray(split)))


@pytest.mark.parametrize("split", SPLITS)
def test_data_at_one_point_leave_no_residual(split):
    z, v, r, t = point()
    field = PointMassField(jnp.array([2.0, -1.0, 0.5]))
    found = SplitMeanFlow(Fixed(split)).residual(field, Row(z, v, r, t, key=jr.key(0)))
    np.testing.assert_allclose(found, 0, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("identity", "cdf"),
    [
        (SplitMeanFlow(), lambda share: share),
        (
            SplitMeanFlow(LogitNormalTimes(1.0, 0.5)),
            lambda share: scipy.stats.norm.cdf(scipy.special.logit(share), 1, 0.5),
        ),
    ],
)
def test_split_is_drawn_from_its_distribution_for_each_key(identity, cdf):
    class Start(AbstractField):
        """1 where r > 0, else 0: on [0, 1] the residual is minus the share of the interval above s."""

        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.where(r > 0, jnp.ones_like(z), 0.0)

    z, zero, one = jnp.zeros(()), jnp.asarray(0.0), jnp.asarray(1.0)
    keys = jr.split(jr.key(0), 5000)
    shares = -jax.vmap(lambda key: identity.residual(Start(), Row(z, z, zero, one, key=key)))(keys)
    # Kolmogorov-Smirnov statistic that the right distribution exceeds with probability 1e-3.
    assert scipy.stats.kstest(np.asarray(shares), cdf).statistic < np.sqrt(np.log(2 / 1e-3) / (2 * 5000))


def test_split_is_not_drawn_from_the_key_of_the_dropout_mask():
    class Noise(AbstractField):
        """A field that draws a uniform number from its key, as a split would."""

        def __call__(self, z, r, t, condition=None, *, key=None):
            return jnp.where(r > 0, jnp.full_like(z, jr.uniform(key)), 0.0)

    z, zero, one = jnp.zeros(()), jnp.asarray(0.0), jnp.asarray(1.0)
    keys = jr.split(jr.key(0), 2000)
    noise = jax.vmap(jr.uniform)(keys)
    found = jax.vmap(lambda key: SplitMeanFlow().residual(Noise(), Row(z, z, zero, one, key=key)))(keys)
    assert abs(np.corrcoef(-found / noise, noise)[0, 1]) < 4 / np.sqrt(2000)


def test_missing_key_is_refused():
    z, v, r, t = point()
    with pytest.raises(ValueError, match="key must be given, since SplitMeanFlow draws s from it; got None"):
        SplitMeanFlow().residual(curved(), Row(z, v, r, t))


def test_split_does_not_use_a_key_that_the_field_may_split_off():
    class Splitting(AbstractField):
        """Reports the first of the numbers that a network with dropout would draw."""

        def __call__(self, z, r, t, condition=None, *, key=None):
            return z

    seen = []

    class Recording(AbstractTimes):
        def __call__(self, *, key):
            seen.append(jr.key_data(key))
            return jnp.asarray(0.5)

    key, zero = jr.key(0), jnp.zeros(())
    SplitMeanFlow(Recording()).residual(Splitting(), Row(jnp.zeros(2), jnp.zeros(2), zero, zero + 1, key=key))
    for n in (2, 4, 64):
        assert not any(np.array_equal(seen[0], other) for other in jr.key_data(jr.split(key, n)))
