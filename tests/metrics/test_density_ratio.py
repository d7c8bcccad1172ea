import numpy as np
import pytest
import scipy.stats

from mf_eqx.metrics import reverse_kullback_leibler


def normal(mean=0.0, std=1.0):
    return scipy.stats.norm(mean, std)


def drawn(model, truth, number=200_000):
    x = model.rvs(number, random_state=np.random.default_rng(0))
    return reverse_kullback_leibler(model.logpdf(x), truth.logpdf(x))


def test_divergence_from_itself_is_zero_whatever_the_sample():
    assert drawn(normal(), normal(), 5) == (0, 0, 1, 1)


def test_figures_of_two_ratios_by_hand():
    found = reverse_kullback_leibler(np.log([0.5, 0.25]), np.log([0.5, 0.5]))
    np.testing.assert_allclose(found.divergence, -np.log(2) / 2)
    np.testing.assert_allclose(found.standard_error, np.log(2) / 2)
    np.testing.assert_allclose(found.effective_share, 3**2 / (2 * (1 + 2**2)))
    np.testing.assert_allclose(found.mean_weight, 1.5)


@pytest.mark.parametrize("std", [0.8, 1.3])
def test_divergence_of_gaussians_is_that_in_closed_form_within_its_error(std):
    found = drawn(normal(0.2, std), normal())
    expected = (std**2 + 0.2**2 - 1) / 2 - np.log(std)
    assert abs(found.divergence - expected) < 4 * found.standard_error < 0.02
    np.testing.assert_allclose(found.mean_weight, 1, atol=0.02)


def test_standard_error_is_the_spread_of_repetitions():
    model, truth = normal(0.2, 1.3), normal()
    x = model.rvs((500, 400), random_state=np.random.default_rng(1))
    found = [reverse_kullback_leibler(model.logpdf(row), truth.logpdf(row)) for row in x]
    spread = np.std([each.divergence for each in found])
    np.testing.assert_allclose(np.mean([each.standard_error for each in found]), spread, rtol=0.1)


@pytest.mark.parametrize("shift", [0.3, 0.7])
def test_effective_share_of_a_shifted_gaussian_is_that_in_closed_form(shift):
    np.testing.assert_allclose(drawn(normal(), normal(shift)).effective_share, np.exp(-(shift**2)), rtol=0.02)


def test_lost_part_of_the_data_shows_in_the_mean_weight_and_hardly_in_the_divergence():
    x = scipy.stats.halfnorm.rvs(size=1000, random_state=np.random.default_rng(0))
    found = reverse_kullback_leibler(scipy.stats.halfnorm.logpdf(x), normal().logpdf(x))
    np.testing.assert_allclose(found.mean_weight, 0.5)
    np.testing.assert_allclose(found.divergence, np.log(2))
    np.testing.assert_allclose(found.effective_share, 1)


def test_large_ratios_do_not_overflow():
    found = reverse_kullback_leibler(np.array([-5000.0, 0.0]), np.array([0.0, -5000.0]))
    assert found.divergence == 0 and found.effective_share == 0.5 and found.mean_weight == np.inf
    assert reverse_kullback_leibler(np.array([5000.0, 5000.0]), np.zeros(2)) == (5000, 0, 1, 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((1,), (1,)), ((3, 1), (3, 1)), ((), ())], ids=str)
def test_vectors_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="must be vectors of the same length >= 2, got shapes"):
        reverse_kullback_leibler(*map(np.zeros, shapes))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("place", "name"), [(0, "log_density"), (1, "true_log_density")])
def test_what_is_not_finite_is_refused_by_name(place, name, value):
    arguments = [np.zeros(3), np.zeros(3)]
    arguments[place][1] = value
    with pytest.raises(ValueError, match=f"^{name} must be finite, got 1 values that are not"):
        reverse_kullback_leibler(*arguments)
