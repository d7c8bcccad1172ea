import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.stats

from mf_eqx.metrics import mode_coverage, total_variation

pytestmark = pytest.mark.usefixtures("x64")


def quantiles(distribution, number):
    """Points of equal mass that stand for a distribution in one dimension."""
    return np.asarray(distribution.ppf((np.arange(number) + 0.5) / number))[:, None]


# Mode coverage

MEAN, STD, WEIGHT = np.array([[-4.0, 0.0], [4.0, 1.0], [0.0, -5.0]]), np.array([0.3, 0.5, 0.2]), np.array([5.0, 2, 3])


def coverage(x, label=None, mean=MEAN, std=STD, weight=WEIGHT, **options):
    return mode_coverage(x, mean, std, weight, label, **options)


def at_the_modes(*counts):
    return np.repeat(MEAN, counts, axis=0)


def test_modes_with_their_mass_are_covered_whole():
    np.testing.assert_allclose(coverage(at_the_modes(50, 20, 30)), 1, rtol=1e-14)


@pytest.mark.parametrize("counts", [(50, 0, 30), (70, 0, 30), (50, 0, 50)], ids=str)
def test_lost_mode_costs_its_weight_wherever_its_mass_went(counts):
    x = np.concatenate([at_the_modes(*counts), np.zeros((100 - sum(counts), 2))])
    np.testing.assert_allclose(coverage(x), 0.8, rtol=1e-14)


def test_mass_of_a_mode_above_its_weight_does_not_count():
    np.testing.assert_allclose(coverage(at_the_modes(30, 40, 30)), 0.3 + 0.2 + 0.3, rtol=1e-14)


def test_point_between_the_modes_costs_its_share_of_the_sample():
    x = at_the_modes(50, 20, 30)
    x[7] = 0
    np.testing.assert_allclose(coverage(x), 0.99, rtol=1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("place", "name"), [*enumerate(("x", "mean", "std", "weight"))])
def test_coverage_of_what_is_not_finite_is_refused_by_name(place, name, value):
    arguments = [at_the_modes(50, 20, 30), MEAN.copy(), STD.copy(), WEIGHT.copy()]
    arguments[place][1] = value
    with pytest.raises(ValueError, match=f"`{name}` must be finite, got [12] values that are not"):
        mode_coverage(*arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", range(4))
def test_coverage_of_what_is_not_finite_is_nan_inside_another_jit(place, value):
    arguments = [at_the_modes(50, 20, 30), MEAN.copy(), STD.copy(), WEIGHT.copy()]
    arguments[place][1] = value
    assert jnp.isnan(jax.jit(mode_coverage)(*arguments))


@pytest.mark.parametrize("radius", [1.0, 3.0])
def test_radius_is_in_standard_deviations_of_each_component(radius):
    direction = np.array([0.6, 0.8])
    near, far = (
        np.repeat(MEAN + factor * radius * STD[:, None] * direction, (50, 20, 30), axis=0) for factor in (0.999, 1.001)
    )
    np.testing.assert_allclose(coverage(near, radius=radius), 1, rtol=1e-14)
    assert coverage(far, radius=radius) == 0


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_exact_samples_within_the_radius_are_those_of_the_chi_distribution(dim):
    number = 50_000
    x = np.random.default_rng(0).normal(size=(number, dim))
    found = coverage(x, mean=np.zeros((1, dim)), std=np.ones(1), weight=np.ones(1), radius=2.0)
    inside = scipy.stats.chi(dim).cdf(2.0)
    np.testing.assert_allclose(found, inside, atol=4 * np.sqrt(inside * (1 - inside) / number))


def test_one_percent_of_exact_samples_in_two_dimensions_lie_outside_of_the_default_radius():
    angle = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    radius = np.asarray(quantiles(scipy.stats.rayleigh(), 1000))
    x = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(coverage(x, mean=np.zeros((1, 2)), std=np.ones(1), weight=np.ones(1)), 0.989, atol=1e-12)


@pytest.mark.parametrize("modes", [3, 40])
def test_points_belong_to_the_nearest_component_as_a_tree_finds_it(modes):
    rng = np.random.default_rng(1)
    mean, x = rng.uniform(-1, 1, (40, 3)), rng.uniform(-1, 1, (2500, 3))  # some in several radii, some in none
    label, weight = rng.permutation(np.arange(40) % modes), rng.uniform(0.5, 2.0, 40)
    distance, nearest = scipy.spatial.cKDTree(mean).query(x)
    found = label[nearest[distance <= 3 * 0.15]]
    assert 0.2 < len(found) / len(x) < 0.9
    share = np.bincount(found, minlength=modes) / len(x)
    expected = np.minimum(share, np.bincount(label, weight) / weight.sum()).sum()
    np.testing.assert_allclose(coverage(x, label, mean, np.full(40, 0.15), weight), expected, rtol=1e-12)


def test_nearest_is_meant_in_standard_deviations():
    mean, std = np.array([[0.0], [1.0]]), np.array([1.0, 0.1])
    x = np.array([[0.8]])  # 0.8 of the one, 2 of the other
    found = [coverage(x, mean=mean, std=std, weight=np.array(weight)) for weight in ([0.9, 0.1], [0.1, 0.9])]
    np.testing.assert_allclose(found, [0.9, 0.1], rtol=1e-14)


def test_components_of_one_label_are_one_mode():
    # As modes of their own the first would have 30 too many, and the last as many too few.
    np.testing.assert_allclose(coverage(at_the_modes(80, 20, 0)), 0.7, rtol=1e-14)
    np.testing.assert_allclose(coverage(at_the_modes(80, 20, 0), np.array([2, 0, 2])), 1, rtol=1e-14)


def test_coverage_is_the_same_inside_another_jit():
    x = at_the_modes(50, 10, 40)
    np.testing.assert_allclose(jax.jit(coverage)(x), coverage(x), rtol=1e-14)


@pytest.mark.parametrize("radius", [0.0, -1.0, np.nan])
def test_radius_that_is_not_positive_is_refused(radius):
    with pytest.raises(ValueError, match=f"radius must be > 0 and finite, got {radius}"):
        coverage(at_the_modes(1, 1, 1), radius=radius)


# Total variation

NORMAL = scipy.stats.norm


def normal_log_density(x):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x))


def flat_log_density(x):
    return jnp.zeros(())


def test_total_variation_in_one_dimension_is_that_of_cell_masses_and_histogram():
    x, edges = np.random.default_rng(0).normal(0.3, 1.2, size=500), np.linspace(-2, 2.5, 10)
    mass, share = np.diff(NORMAL.cdf(edges)), np.histogram(x, edges)[0] / 500
    expected = (np.abs(mass - share).sum() + abs(mass.sum() - share.sum())) / 2
    found = total_variation(x[:, None], normal_log_density, low=[-2], high=[2.5], bins=9, nodes=64)
    # The midpoint rule with nodes h = 0.008 apart misses h²/24 of the second derivative: 2e-6 of the mass.
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("dim", [2, 3])
def test_axes_keep_their_order_and_their_corners(dim):
    rng, bins = np.random.default_rng(1), 6
    mean, std = np.array([0.2, -0.5, 1.0])[:dim], np.array([0.3, 1.0, 2.0])[:dim]
    low, high = mean - [0.5, 1.5, 4.0][:dim], mean + [0.7, 1.0, 3.0][:dim]
    x = mean + std * rng.normal(size=(800, dim))
    edges = [np.linspace(a, b, bins + 1) for a, b in zip(low, high, strict=True)]
    share = np.histogramdd(x, edges)[0] / 800
    each = [np.diff(NORMAL(m, s).cdf(e)) for m, s, e in zip(mean, std, edges, strict=True)]
    mass = each[0]
    for other in each[1:]:
        mass = mass[..., None] * other
    expected = (np.abs(mass - share).sum() + abs(mass.sum() - share.sum())) / 2

    def log_density(x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, std))

    found = total_variation(x, log_density, low=list(low), high=list(high), bins=bins, nodes=10)
    # Nodes are at most 0.07 standard deviations apart: 0.07²/24 = 2e-4 of the second derivative per dimension.
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_error_of_the_midpoint_rule_falls_with_the_square_of_the_nodes():
    def missing(nodes):
        """All of the sample in the only cell scores 1 minus its mass, p of the midpoint rule."""
        x = np.full((10, 1), 0.5)
        return total_variation(x, normal_log_density, low=[0], high=[1], bins=1, nodes=nodes) - 1 + mass

    mass = NORMAL.cdf(1) - NORMAL.cdf(0)
    np.testing.assert_allclose(missing(4) / missing(8), 4, rtol=0.01)


def test_exact_samples_score_the_formula_of_the_docstring():
    number, runs = 5000, 8
    rng, edges = np.random.default_rng(2), np.linspace(-3, 3, 33)
    found = [
        total_variation(x[:, None], normal_log_density, low=[-3], high=[3]) for x in rng.normal(size=(runs, number))
    ]
    expected = np.sqrt(2 / np.pi / number) * np.sqrt(np.diff(NORMAL.cdf(edges))).sum() / 2
    # |N(0, s²)| has a variance of (1 - 2 / pi) s², so that of the score is at most 0.36 / 4 n.
    np.testing.assert_allclose(np.mean(found), expected, atol=4 * np.sqrt(0.36 / 4 / number / runs))


def test_equal_masses_at_quantiles_score_nearly_zero():
    x = quantiles(NORMAL, 4096)
    # At each of the 31 inner edges rounding moves at most one point by half of its mass to either side.
    assert total_variation(x, normal_log_density, low=[-6], high=[6], nodes=16) < 1e-3 + 32 / 4096 / 2


def test_lost_mode_costs_its_weight():
    modes, weight = (NORMAL(-2, 0.4), NORMAL(2, 0.5)), (0.7, 0.3)

    def log_density(x):
        each = [w * jnp.exp(jax.scipy.stats.norm.logpdf(x[0], *m.args)) for m, w in zip(modes, weight, strict=True)]
        return jnp.log(sum(each))

    found = total_variation(quantiles(modes[0], 4096), log_density, low=[-5], high=[5], nodes=16)
    np.testing.assert_allclose(found, 0.3, atol=5e-3)  # as for all quantiles above


@pytest.mark.parametrize(("low", "expected"), [(0.0, 0.5), (4.0, 1.0)], ids=["half", "all"])
def test_mass_outside_of_the_grid_counts(low, expected):
    """The sample is inside, of the density half or all is not."""
    x = low + np.abs(quantiles(NORMAL, 4096))
    found = total_variation(x, normal_log_density, low=[low], high=[low + 6], nodes=16)
    np.testing.assert_allclose(found, expected, atol=5e-3)


@pytest.mark.parametrize("place", [-5.0, 5.0])
def test_points_outside_of_the_grid_count(place):
    x = np.full((10, 1), place)
    found = total_variation(x, flat_log_density, low=[0], high=[1], bins=4)
    np.testing.assert_allclose(found, 1, rtol=1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_total_variation_of_what_is_not_finite_is_refused_and_nan_inside_another_jit(value):
    x = np.zeros((10, 1))
    x[3] = value

    def distance(x):
        return total_variation(x, flat_log_density, low=[0], high=[1], bins=4)

    with pytest.raises(ValueError, match="`x` must be finite, got 1 values that are not"):
        distance(x)
    assert jnp.isnan(jax.jit(distance)(x))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(5,), (0, 1), (5, 0)])
def test_total_variation_of_what_is_no_sample_is_refused(shape):
    with pytest.raises(ValueError, match=r"`x` must have shape \(sample, dim\) with at least one point, got \("):
        total_variation(np.zeros(shape), flat_log_density, low=[0], high=[1])


def test_edges_belong_to_the_cell_above_them_and_the_last_to_the_last_cell():
    x = np.array([[0.0], [0.25], [0.5], [1.0]])
    np.testing.assert_allclose(total_variation(x, flat_log_density, low=[0], high=[1], bins=2), 0, atol=1e-15)
    # Thirds: two points in the first, one in each of the others.
    found = total_variation(x, flat_log_density, low=[0], high=[1], bins=3)
    np.testing.assert_allclose(found, 1 / 2 - 1 / 3, rtol=1e-12)


def test_total_variation_in_float32_is_that_in_float64():
    x = np.random.default_rng(3).normal(size=(1000, 2))
    double, single = (
        total_variation(x, normal_log_density, low=[-3, -3], high=[3, 3]) for x in (x, x.astype(np.float32))
    )
    np.testing.assert_allclose(single, double, atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high"), [([0], [1, 1]), ([0, 0, 0], [1, 1, 1]), ([0, 1], [1, 1]), ([0, 2], [1, 1]), ([0, np.nan], [1, 1])]
)
def test_corners_that_span_no_box_are_refused(low, high):
    with pytest.raises(ValueError, match=r"`low` and `high` must be 2 numbers each, with low < high, got \["):
        total_variation(np.zeros((3, 2)), flat_log_density, low=low, high=high)


@pytest.mark.parametrize(("name", "value"), [("bins", 0), ("bins", -1), ("bins", 8.0), ("nodes", 0), ("nodes", 2.5)])
def test_cells_and_nodes_that_are_no_counts_are_refused(unchecked, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {value}"):
        total_variation(np.zeros((3, 1)), flat_log_density, low=[0], high=[1], **{name: value})


@pytest.mark.parametrize(
    ("x", "label", "message"),
    [
        (np.zeros((5, 1)), None, r"`x` must have shape \(sample, 2\)"),
        (np.zeros((0, 2)), None, r"`x` must have shape \(sample, 2\)"),
        (np.zeros((5, 2)), np.array([0, 2]), r"`label` must lie in \[0, 2\), got 0 to 2"),
        (np.zeros((5, 2)), np.array([-1, 0]), r"`label` must lie in \[0, 2\), got -1 to 0"),
        (np.zeros((5, 2)), np.array([0.0, 1.0]), "`label` must be integers, got float64"),
        (np.zeros((5, 2)), np.array([0]), r"`label` must be 2 numbers, one for each component, got shape \(1,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_samples_and_labels_that_do_not_fit_the_modes_are_refused(x, label, message):
    with pytest.raises(ValueError, match=message):
        mode_coverage(x, np.zeros((2, 2)), np.ones(2), np.ones(2), label)


@pytest.mark.parametrize(("name", "value"), [("std", np.array([1.0, 0])), ("weight", np.array([1.0, -1]))])
def test_modes_of_no_width_or_negative_weight_are_refused(name, value):
    of_modes = {"std": np.ones(2), "weight": np.ones(2)} | {name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be >"):
        mode_coverage(np.zeros((5, 2)), np.zeros((2, 2)), **of_modes)


def test_low_precision_samples_are_held_against_an_exact_grid():
    x = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    coarse = x.astype(jnp.bfloat16)

    def distance(x):
        return total_variation(x, lambda x: -jnp.sum(x**2) / 2 - jnp.log(2 * jnp.pi), low=(-4, -4), high=(4, 4), bins=8)

    np.testing.assert_allclose(distance(coarse), distance(coarse.astype(np.float32)), rtol=1e-6)
