import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.spatial
import scipy.stats

from mf_eqx.exact import (
    checkerboard,
    eight_gaussians,
    pinwheel,
    swiss_roll,
    three_gaussians,
    two_moons,
    two_spirals,
)
from mf_eqx.metrics import total_variation

PARTS = {eight_gaussians: 8, two_moons: 2, checkerboard: 8, swiss_roll: 1, pinwheel: 5, two_spirals: 2}
TOYS = [*PARTS, three_gaussians]

pytestmark = pytest.mark.usefixtures("x64")

every_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.__name__)


@pytest.fixture
def datasets():
    return pytest.importorskip("sklearn.datasets")


@eqx.filter_jit
def log_density(mixture, x, condition=None):
    return jax.lax.map(lambda x: mixture.log_density(x, condition), jnp.asarray(x), batch_size=256)


@eqx.filter_jit
def samples(mixture, number):
    return jax.vmap(lambda key: mixture.sample(key=key))(jr.split(jr.key(0), number))


def part(mixture, label):
    return np.asarray(mixture.mean)[np.asarray(mixture.label) == label]


def turn(x, angle):
    """The points turned counter-clockwise about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(x) @ np.array([[cos, sin], [-sin, cos]])


def angle_of(x):
    return np.unwrap(np.arctan2(x[:, 1], x[:, 0]))


# All


@every_toy
def test_samples_fill_the_density_of_the_same_object(toy):
    mixture, number, bins = toy(), 20_000, 32
    distance = total_variation(
        samples(mixture, number), mixture.log_density, low=(-2.5, -2.5), high=(2.5, 2.5), bins=bins
    )
    # Exact samples score sqrt(2 / pi n) sum(sqrt(p)) / 2 of n, and the sum over N cells is at most sqrt(N): 0.090. The
    # scatter is below 0.3 / sqrt(n) = 0.002, and the midpoint rule, with nodes a blur apart, adds less.
    assert distance < np.sqrt(2 / np.pi / number) * bins / 2 + 0.01


@pytest.mark.parametrize(("toy", "parts"), PARTS.items(), ids=lambda toy: getattr(toy, "__name__", ""))
def test_every_label_has_an_equal_share_of_the_mass(toy, parts):
    mixture = toy()
    share = np.bincount(mixture.label, weights=mixture.weight) / np.sum(mixture.weight)
    np.testing.assert_allclose(share, np.full(parts, 1 / parts), rtol=1e-12)


@every_toy
def test_unit_noise_covers_the_components(toy):
    assert np.linalg.norm(toy().mean, axis=1).max() < 2


@every_toy
def test_two_calls_give_the_same_data_set(toy):
    jax.tree.map(np.testing.assert_array_equal, toy(), toy())


@pytest.mark.parametrize("toy", PARTS, ids=lambda toy: toy.__name__)
def test_std_is_that_of_every_component(toy):
    np.testing.assert_array_equal(toy(0.02).std, 0.02)


@every_toy
def test_arrays_are_float32_by_default(toy):
    with jax.enable_x64(False):
        mixture = toy()
    assert mixture.mean.dtype == mixture.std.dtype == mixture.weight.dtype == jnp.float32


@pytest.mark.parametrize(
    ("toy", "points", "message"),
    [
        (two_moons, 511, "points must be a positive multiple of 2, got 511"),
        (two_moons, 0, "points must be a positive multiple of 2, got 0"),
        (two_spirals, 3, "points must be a positive multiple of 2, got 3"),
        (pinwheel, 512, "points must be a positive multiple of 5, got 512"),
        (pinwheel, -5, "points must be a positive multiple of 5, got -5"),
        (checkerboard, 20, "points must be a positive multiple of 8, got 20"),
        (checkerboard, 24, "points must be 8 times a square, got 24"),
    ],
)
def test_numbers_of_points_that_do_not_fit_the_shape_are_refused(toy, points, message):
    with pytest.raises(ValueError, match=message):
        toy(points=points)


@pytest.mark.parametrize(
    ("toy", "points"), [(two_moons, 64), (checkerboard, 8 * 9), (swiss_roll, 7), (pinwheel, 55), (two_spirals, 10)]
)
def test_mixture_has_as_many_components_as_points_are_asked_for(toy, points):
    assert toy(points=points).mean.shape == (points, 2)


# Gaussians


def test_eight_gaussians_stand_on_the_circle_counter_clockwise_from_the_right():
    s = np.sqrt(0.5)
    expected = [[1, 0], [s, s], [0, 1], [-s, s], [-1, 0], [-s, -s], [0, -1], [s, -s]]
    mixture = eight_gaussians()
    np.testing.assert_allclose(mixture.mean, expected, atol=1e-15)
    np.testing.assert_array_equal(mixture.label, np.arange(8))


def test_three_gaussians_differ_in_mass_and_in_width():
    mixture, centre = three_gaussians(), np.array([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]])
    x = np.random.default_rng(0).normal(size=(20, 2))
    expected = sum(
        weight * scipy.stats.multivariate_normal(mean, std**2).pdf(x)
        for weight, mean, std in zip((0.5, 0.2, 0.3), centre, (0.3, 0.5, 0.2), strict=True)
    )
    np.testing.assert_allclose(log_density(mixture, x), np.log(expected), rtol=1e-12)
    np.testing.assert_array_equal(mixture.label, [0, 1, 2])


# Moons


def test_two_moons_are_those_of_scikit_learn_centred(datasets):
    x, label = datasets.make_moons(512, shuffle=False, noise=None)
    mixture = two_moons()
    np.testing.assert_allclose(mixture.mean, x - [0.5, 0.25], atol=1e-15)
    np.testing.assert_array_equal(mixture.label, label)


def test_two_moons_are_centred_at_the_origin():
    mixture = two_moons()
    np.testing.assert_allclose((np.max(mixture.mean, 0) + np.min(mixture.mean, 0)) / 2, 0, atol=1e-4)  # 256 points
    np.testing.assert_allclose(log_density(mixture, [[0.3, 0.2]]), log_density(mixture, [[-0.3, -0.2]]), rtol=1e-12)


# Checkerboard


def cells():
    """Row, column and centre of the 16 cells, from below."""
    row, column = np.divmod(np.arange(16), 4)
    return row, column, np.stack([column, row], axis=1) / 2 - 0.75


def test_checkerboard_has_its_points_in_the_dark_cells_alone():
    column, row = np.floor(2 * (np.asarray(checkerboard().mean) + 1)).astype(int).T
    assert set(np.unique([row, column])) == {0, 1, 2, 3}
    assert not ((row + column) % 2).any()


def test_labels_of_the_checkerboard_count_the_dark_cells_row_by_row_from_below():
    row, column, centre = cells()
    dark = centre[(row + column) % 2 == 0]
    np.testing.assert_allclose([part(checkerboard(), label).mean(0) for label in range(8)], dark, atol=1e-15)


def test_checkerboard_is_dark_in_one_cell_out_of_two():
    row, column, centre = cells()
    density = np.exp(log_density(checkerboard(), centre))
    # Area 2 of the board is dark; at 5 standard deviations from the next dark cell the density is below 1e-5.
    np.testing.assert_allclose(density, np.where((row + column) % 2 == 0, 0.5, 0), atol=1e-5)


# Gaussians a distance d apart add up to 1 + 2 exp(-2 pi² (std / d)²) cos(2 pi x / d) in each dimension: 1.4% of ripple
# at half the distance, 1/32, and 1e-5 at the default. At 3 standard deviations from the edges 0.3% are missing.
@pytest.mark.parametrize(("std", "ripple"), [(0.05, 0.01), (1 / 32, 0.03)])
def test_checkerboard_is_flat_inside_a_cell_from_a_blur_of_half_the_distance_of_points_on(std, ripple):
    inside = np.linspace(0.15, 0.35, 15)
    x = np.stack(np.meshgrid(inside, inside), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(log_density(checkerboard(std), x), np.log(0.5), atol=ripple)


def test_points_outside_of_the_board_are_improbable():
    outside = [[1.25, 0.75], [0.75, 1.25], [-1.25, -0.75], [1.5, 1.5], [0.0, -2.0]]
    assert log_density(checkerboard(), outside).max() < np.log(1e-5)  # 5 standard deviations and more


# Rolls and spirals


def test_swiss_roll_lies_on_the_curve_of_scikit_learn(datasets):
    x, _ = datasets.make_swiss_roll(2000, noise=0.0, random_state=0)
    distance, _ = scipy.spatial.cKDTree(swiss_roll().mean).query(x[:, [0, 2]] / 10)
    # Outside, where the radius is 0.45 pi, neighbours are 0.45 pi * 3 pi / 512 = 0.026 apart.
    assert distance.max() < 0.014


def test_swiss_roll_has_the_angles_of_scikit_learn(datasets):
    _, angle = datasets.make_swiss_roll(2000, noise=0.0, random_state=0)
    found = 10 * np.linalg.norm(swiss_roll().mean, axis=1)
    # 2000 angles of the right distribution exceed the root with probability 1e-3; 512 quantiles stand for it.
    assert scipy.stats.ks_2samp(found, angle).statistic < np.sqrt(np.log(2 / 1e-3) / (2 * 2000)) + 1 / 512


def test_arms_of_the_spirals_are_point_reflections_of_each_other():
    mixture = two_spirals()
    np.testing.assert_array_equal(part(mixture, 1), -part(mixture, 0))


def test_spirals_turn_one_and_a_half_times_out_to_radius_three_halves():
    arm = part(two_spirals(points=4096), 0)
    angle = angle_of(arm)
    np.testing.assert_allclose(np.linalg.norm(arm, axis=1), angle / (2 * np.pi), rtol=1e-12)
    np.testing.assert_allclose(angle[-1], 3 * np.pi, rtol=1e-3)  # the last of 2048 quantiles


def test_mass_lies_about_evenly_along_a_spiral():
    arm = part(two_spirals(), 0)
    outer = arm[angle_of(arm) > 3]
    spacing = np.linalg.norm(np.diff(outer, axis=0), axis=1)
    # The length per quantile is 9 pi / 4 sqrt(1 + 1 / angle²): 5.4% more than at infinity where the angle is 3.
    np.testing.assert_allclose(spacing * 256, 9 * np.pi / 4, rtol=0.055)


# Pinwheel


def test_pinwheel_has_five_fold_symmetry():
    mixture = pinwheel()
    for label in range(5):
        np.testing.assert_allclose(
            part(mixture, (label + 1) % 5), turn(part(mixture, label), 2 * np.pi / 5), atol=1e-14
        )


def test_arms_of_the_pinwheel_bend_with_the_radius():
    arm = part(pinwheel(), 0)
    radius = np.linalg.norm(arm, axis=1)
    np.testing.assert_allclose(arm[:, 0], radius * np.cos(np.exp(radius) / 4), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(arm[:, 1], radius * np.sin(np.exp(radius) / 4), rtol=1e-10, atol=1e-12)


def test_radii_of_the_pinwheel_are_quantiles_of_a_gaussian():
    quantile = (np.arange(102) + 0.5) / 102
    radius = np.linalg.norm(part(pinwheel(), 0), axis=1)
    np.testing.assert_allclose(radius, scipy.stats.norm(1, 0.3).ppf(quantile), rtol=1e-10)
