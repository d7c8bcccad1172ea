import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from mf_eqx import AbstractTimes, check_batch_size, LogitNormalTimes, split_rows, TimePairs, UniformTimes
from mf_eqx._times import as_share

DRAWS = 40_000
# Kolmogorov-Smirnov statistic that a right sampler exceeds with probability 2 exp(-2 n d^2) = 1e-3.
KS_BOUND = np.sqrt(np.log(2 / 1e-3) / (2 * DRAWS))
LOGIT_NORMALS = [(-0.4, 1.0), (-2.0, 2.0), (-4.0, 1.6)]  # ImageNet, CIFAR-10 of the paper, r of the later code
V1 = TimePairs(LogitNormalTimes(-0.6, 1.6), LogitNormalTimes(-4.0, 1.6), equal=0.25)
PAIRS = {
    "sorted": TimePairs(),
    "sorted, uniform": TimePairs(UniformTimes()),
    "sorted, wide": TimePairs(LogitNormalTimes(-2.0, 2.0)),
    "minimum": TimePairs(LogitNormalTimes(-0.6, 1.6), LogitNormalTimes(-4.0, 1.6)),
    "minimum, r mostly above t": TimePairs(LogitNormalTimes(-4.0, 1.6), UniformTimes()),
    "coin": TimePairs(equal=0.5),
    "minimum and coin": V1,
    "sorted, a tenth uniform": TimePairs(LogitNormalTimes(0.8, 0.8), uniform=0.1),
    "gap": TimePairs(gap_times=LogitNormalTimes(-0.8, 1.0)),
    "gap, uniform": TimePairs(UniformTimes(), gap_times=LogitNormalTimes(-0.8, 1.0)),
    "gap, mostly long": TimePairs(LogitNormalTimes(4.0, 1.6), gap_times=LogitNormalTimes(4.0, 1.6)),
}


@functools.cache
def draw(sampler, seed=0):
    keys = jr.split(jr.key(seed), DRAWS)
    return jax.tree.map(np.asarray, jax.vmap(lambda key: sampler(key=key))(keys))


def logit_normal_cdf(mean, std, times):
    with np.errstate(divide="ignore"):
        return scipy.stats.norm.cdf(scipy.special.logit(times), mean, std)


def test_uniform_times_are_uniform():
    assert scipy.stats.kstest(draw(UniformTimes()), "uniform").statistic < KS_BOUND


@pytest.mark.parametrize(("mean", "std"), LOGIT_NORMALS)
def test_logit_normal_times_follow_the_distribution_function(mean, std):
    draws = draw(LogitNormalTimes(mean, std))
    assert scipy.stats.kstest(draws, functools.partial(logit_normal_cdf, mean, std)).statistic < KS_BOUND


@pytest.mark.parametrize(("mean", "std"), LOGIT_NORMALS)
@pytest.mark.parametrize("power", [1, 2])
def test_logit_normal_times_have_the_exact_moments(mean, std, power):
    def moment(power):
        return scipy.integrate.quad(
            lambda n: scipy.special.expit(mean + std * n) ** power * scipy.stats.norm.pdf(n), -10, 10
        )[0]

    expected, variance = moment(power), moment(2 * power) - moment(power) ** 2
    assert abs((draw(LogitNormalTimes(mean, std)) ** power).mean() - expected) < 4 * np.sqrt(variance / DRAWS)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
def test_default_times_have_the_quantiles_of_the_papers_lognorm(level):
    times = np.quantile(draw(LogitNormalTimes()), level)
    density = scipy.stats.norm.pdf(scipy.stats.norm.ppf(level))
    deviation = np.sqrt(level * (1 - level) / DRAWS) / density  # of the empirical quantile of n
    np.testing.assert_allclose(scipy.special.logit(times), -0.4 + scipy.stats.norm.ppf(level), atol=4 * deviation)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_logit_normal_refuses_a_std_that_is_not_positive(std):
    with pytest.raises(ValueError, match=f"std must be > 0 and finite, got {std}"):
        LogitNormalTimes(0.0, std)


@pytest.mark.parametrize("limit", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("times", [UniformTimes(), *(LogitNormalTimes(*pair) for pair in LOGIT_NORMALS)], ids=str)
def test_times_below_a_limit_follow_the_truncated_distribution_function(times, limit):
    draws = draw(functools.partial(times.below, jnp.asarray(limit)))
    assert (draws <= limit).all()
    uniform = isinstance(times, UniformTimes)
    cdf = scipy.stats.uniform.cdf if uniform else functools.partial(logit_normal_cdf, times.mean, times.std)
    assert scipy.stats.kstest(draws, lambda x: cdf(x) / cdf(limit)).statistic < KS_BOUND


@pytest.mark.parametrize("times", [UniformTimes(), LogitNormalTimes()], ids=str)
def test_times_below_zero_are_zero(times):
    np.testing.assert_array_equal(draw(functools.partial(times.below, jnp.asarray(0.0))), 0)


# Pairs


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
def test_r_never_exceeds_t(pairs):
    r, t = draw(pairs)
    assert (r <= t).all()


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_stay_inside_the_unit_interval(pairs):
    r, t = draw(pairs)
    assert (r >= 0).all() and (t <= 1).all()


@pytest.mark.parametrize(("mean", "std"), LOGIT_NORMALS)
def test_sorted_pairs_are_the_order_statistics_of_two_independent_draws(mean, std):
    r, t = draw(TimePairs(LogitNormalTimes(mean, std)))
    assert scipy.stats.kstest(t, lambda x: logit_normal_cdf(mean, std, x) ** 2).statistic < KS_BOUND
    assert scipy.stats.kstest(r, lambda x: 1 - (1 - logit_normal_cdf(mean, std, x)) ** 2).statistic < KS_BOUND


def test_with_its_own_distribution_r_does_not_change_that_of_t():
    _, t = draw(PAIRS["minimum"])
    assert scipy.stats.kstest(t, functools.partial(logit_normal_cdf, -0.6, 1.6)).statistic < KS_BOUND


def test_with_its_own_distribution_r_is_the_minimum_with_an_independent_t():
    r, _ = draw(PAIRS["minimum"])

    def cdf(x):
        return 1 - (1 - logit_normal_cdf(-4.0, 1.6, x)) * (1 - logit_normal_cdf(-0.6, 1.6, x))

    assert scipy.stats.kstest(r, cdf).statistic < KS_BOUND


@pytest.mark.parametrize("equal", [0.0, 0.25, 0.75, 1.0])
def test_coin_sets_r_to_t_with_its_probability(equal):
    r, t = draw(TimePairs(UniformTimes(), equal=equal))
    # Two float32 uniforms agree by chance once in 2^23.
    assert abs((r == t).mean() - equal) <= 4 * np.sqrt(equal * (1 - equal) / DRAWS) + 1e-4


def test_both_draws_are_uniform_with_their_probability():
    r, t = draw(PAIRS["sorted, a tenth uniform"])
    normal = functools.partial(logit_normal_cdf, 0.8, 0.8)
    assert scipy.stats.kstest(t, lambda x: 0.9 * normal(x) ** 2 + 0.1 * x**2).statistic < KS_BOUND
    assert scipy.stats.kstest(r, lambda x: 1 - 0.9 * (1 - normal(x)) ** 2 - 0.1 * (1 - x) ** 2).statistic < KS_BOUND
    # A logit-normal draw below 0.05 has probability 1e-6: such pairs are uniform, and as often as their areas say.
    assert abs((t < 0.05).mean() - 0.1 * 0.05**2) < 4 * np.sqrt(0.1 * 0.05**2 / DRAWS)


def test_uniform_pairs_of_two_distributions_keep_the_minimum():
    r, t = draw(TimePairs(LogitNormalTimes(-4.0, 0.1), LogitNormalTimes(4.0, 0.1), uniform=1.0))
    assert scipy.stats.kstest(t, "uniform").statistic < KS_BOUND
    assert scipy.stats.kstest(r, lambda x: 1 - (1 - x) ** 2).statistic < KS_BOUND
    assert abs((r == t).mean() - 0.5) < 4 * np.sqrt(0.25 / DRAWS)


@pytest.mark.parametrize("name", ["gap", "gap, uniform"])
def test_gap_follows_its_distribution(name):
    r, t = draw(PAIRS[name])
    assert scipy.stats.kstest(t - r, functools.partial(logit_normal_cdf, -0.8, 1.0)).statistic < KS_BOUND


@pytest.mark.parametrize("name", ["gap", "gap, uniform"])
def test_r_follows_its_distribution_below_the_complement_of_the_gap(name):
    """Its distribution function at r, over that at the limit, is then uniform, whatever the gap."""
    r, t = (time.astype(float) for time in draw(PAIRS[name]))
    cdf = functools.partial(logit_normal_cdf, -0.4, 1.0) if name == "gap" else scipy.stats.uniform.cdf
    for part in (t - r < 0.3, t - r >= 0.3):
        level = (cdf(r) / cdf(1 - (t - r)))[part]
        assert scipy.stats.kstest(level, "uniform").statistic < KS_BOUND * np.sqrt(DRAWS / len(level))


def test_gap_takes_only_times_with_a_limit():
    class Half(AbstractTimes):
        def __call__(self, *, key):
            return jnp.asarray(0.5)

    r, t = draw(TimePairs(gap_times=Half()))
    np.testing.assert_allclose(t - r, 0.5, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="times with gap_times must be an instance of AbstractLimitedTimes, got "):
        TimePairs(Half(), gap_times=UniformTimes())


@pytest.mark.parametrize("options", [{"r_times": UniformTimes()}, {"uniform": 0.1}], ids=["r_times", "uniform"])
def test_gap_excludes_other_rules(options):
    with pytest.raises(ValueError, match="gap_times must be None with r_times or uniform, got r_times="):
        TimePairs(gap_times=UniformTimes(), **options)


def test_coin_keeps_t():
    np.testing.assert_array_equal(draw(TimePairs(equal=0.5))[1], draw(TimePairs())[1])


def test_coin_does_not_depend_on_the_times():
    r, t = draw(TimePairs(equal=0.5))
    shares = [(r == t)[part].mean() for part in (t < np.median(t), t >= np.median(t))]
    np.testing.assert_allclose(shares, 0.5, atol=4 * np.sqrt(0.25 / (DRAWS / 2)))


def test_cifar_v1_collapses_thirty_percent_of_the_pairs():
    # By the coin, or because the r of a normal logit lies above t.
    above = scipy.stats.norm.cdf((-4.0 + 0.6) / np.hypot(1.6, 1.6))
    expected = 0.25 + 0.75 * above
    assert expected == pytest.approx(0.30, abs=0.001)
    r, t = draw(V1)
    assert abs((r == t).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / DRAWS)


def test_pairs_take_a_users_distribution():
    class Two(AbstractTimes):
        def __call__(self, *, key):
            return jnp.where(jr.bernoulli(key), 0.25, 0.75)

    r, t = draw(TimePairs(Two()))
    assert set(zip(r.tolist(), t.tolist(), strict=True)) == {(0.25, 0.25), (0.25, 0.75), (0.75, 0.75)}


@pytest.mark.parametrize("equal", [-0.1, 1.5, float("nan")])
def test_pairs_refuse_an_impossible_coin(equal):
    with pytest.raises(ValueError, match=rf"equal .* in \[0, 1\], got {equal}"):
        TimePairs(equal=equal)


# The split


@pytest.mark.parametrize(
    ("given", "meant"),
    [(0.25, (1, 4)), (0.3333, (1, 3)), (0.6667, (2, 3)), (0.1, (1, 10)), ("3/4", (3, 4)), (0.0, (0, 1)), (1.0, (1, 1))],
)
def test_share_is_the_fraction_that_the_float_means(given, meant):
    assert as_share(given) == Fraction(*meant)


@pytest.mark.parametrize("share", [0.004, 0.996, 0.33])
def test_share_that_is_no_simple_fraction_is_refused(share):
    with pytest.raises(ValueError, match=rf"identity_share must be within 0.001 of a fraction .* got {share}"):
        as_share(share)


@pytest.mark.parametrize("share", [float("nan"), float("inf"), "a quarter", "1/0"])
def test_share_that_is_no_number_is_refused(share):
    with pytest.raises(ValueError, match=rf"identity_share must be a number or a fraction .* got {share}"):
        as_share(share)


@pytest.mark.parametrize("share", [-0.25, -0.001, 1.001, 1.25, Fraction(5, 4)])
def test_share_outside_the_unit_interval_is_refused(share):
    with pytest.raises(ValueError, match=rf"identity_share must lie in \[0, 1\], got {share}"):
        as_share(share)


@pytest.mark.parametrize(
    ("batch", "share", "shards", "accumulation"),
    [(8, (1, 4), 1, 1), (8, (1, 4), 2, 1), (8, (1, 4), 1, 2), (96, (2, 3), 8, 4), (7, (0, 1), 1, 1), (7, (1, 1), 7, 1)],
)
def test_divisible_batch_is_accepted(batch, share, shards, accumulation):
    check_batch_size(batch, Fraction(*share), shards=shards, accumulation=accumulation)


@pytest.mark.parametrize(
    ("batch", "share", "shards", "accumulation"),
    [
        (6, (1, 4), 1, 1),
        (12, (1, 4), 2, 1),
        (20, (1, 4), 1, 3),
        (48, (2, 3), 8, 4),
        (7, (0, 1), 2, 1),
        (0, (1, 4), 1, 1),
    ],
)
def test_refused_batch_is_told_all_numbers(batch, share, shards, accumulation):
    n, k = share
    message = (
        rf"batch must be a positive multiple of {k} \(denominator of identity_share = {Fraction(n, k)}\) "
        rf"x {shards} \(data shards\) x {accumulation} \(accumulation steps\) = "
        rf"{k * shards * accumulation}, got {batch}$"
    )
    with pytest.raises(ValueError, match=message):
        check_batch_size(batch, Fraction(n, k), shards=shards, accumulation=accumulation)


SHARES = [Fraction(1, 4), Fraction(3, 4), Fraction(2, 3), Fraction(1, 2), Fraction(0), Fraction(1)]


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_split_takes_the_first_rows_of_every_group(share):
    identity, boundary = split_rows(jnp.arange(24), share)
    n, k = share.numerator, share.denominator
    assert identity.tolist() == [i for i in range(24) if i % k < n]
    assert boundary.tolist() == [i for i in range(24) if i % k >= n]


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_split_keeps_every_row_exactly_once(share):
    parts = split_rows(jnp.arange(24), share)
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert len(parts[0]) == 24 * share


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_split_keeps_the_leaves_of_a_row_together(share):
    rows = {"x": jnp.arange(24 * 6).reshape(24, 2, 3), "label": jnp.arange(24)}
    for part in split_rows(rows, share):
        assert part["x"].shape[1:] == (2, 3)
        np.testing.assert_array_equal(part["x"], rows["x"][part["label"]])


def test_split_takes_numpy_rows():
    identity, boundary = split_rows(np.arange(8), Fraction(1, 4))
    assert (identity.tolist(), boundary.tolist()) == ([0, 4], [1, 2, 3, 5, 6, 7])


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_split_of_a_contiguous_shard_is_the_shard_of_the_split(share):
    rows = jnp.arange(48)
    shards = [split_rows(shard, share) for shard in jnp.split(rows, 4)]
    for whole, *parts in zip(split_rows(rows, share), *shards, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_share_may_be_a_number_of_python():
    for found, expected in zip(split_rows(np.arange(8), 0.25), split_rows(np.arange(8), Fraction(1, 4)), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="batch must be a positive multiple of 4"):
        check_batch_size(6, 0.25)


def test_a_part_of_the_pairs_starts_at_the_data_and_pairs_of_equal_times_stay():
    keys = jr.split(jr.key(8), 4000)
    r, t = jax.vmap(lambda key: TimePairs(UniformTimes(), at_data=0.25)(key=key))(keys)
    plain_r, plain_t = jax.vmap(lambda key: TimePairs(UniformTimes())(key=key))(keys)
    assert 0.22 < np.mean(r == 0) < 0.28
    np.testing.assert_array_equal(t, plain_t)
    np.testing.assert_array_equal(r[r > 0], plain_r[r > 0])
    r, t = jax.vmap(lambda key: TimePairs(UniformTimes(), equal=1.0, at_data=0.5)(key=key))(keys)
    np.testing.assert_array_equal(r, t)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_pairs_starts_at_the_noise_and_the_others_are_as_before(share):
    keys = jr.split(jr.key(0), 2000)
    r, t = jax.vmap(lambda key: TimePairs(UniformTimes(), at_noise=share)(key=key))(keys)
    plain_r, plain_t = jax.vmap(lambda key: TimePairs(UniformTimes())(key=key))(keys)
    assert abs(np.mean(t == 1) - share) < 0.03
    np.testing.assert_array_equal(r, plain_r)
    np.testing.assert_array_equal(t[t < 1], plain_t[t < 1])


@pytest.mark.parametrize("name", ["at_data", "at_noise"])
def test_a_probability_of_an_end_outside_of_its_range_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is a probability and must lie in \[0, 1\], got 1.5"):
        TimePairs(**{name: 1.5})
