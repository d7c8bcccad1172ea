"""Terms in features of a network: their value and gradient written out, and what an objective makes of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx

pytestmark = pytest.mark.usefixtures("x64")

SHAPE, ROWS = (2, 6, 4), 8


def double(image):
    """Features whose differences are twice those of the pixels, in two parts."""
    return 2 * image[:1], {"rest": 2 * image[1:]}


WHOLE = mfx.PerceptualTerm(double, (6, 4), smallest_crop=1.0)


def row(t=0.5, seed=0):
    x, eps = jr.normal(jr.key(seed), (2, *SHAPE))
    z, v = mfx.LinearInterpolant().state_and_velocity(x, eps, t)
    return mfx.Row(z, v, 0.2, t, x=x, key=jr.key(seed + 1))


def test_term_is_the_weighted_distance_of_the_data_and_the_estimate_in_features():
    given, u = row(), jr.normal(jr.key(5), SHAPE)
    squares = 4 * float(jnp.sum((given.x - (given.z - 0.5 * u)) ** 2))
    np.testing.assert_allclose(WHOLE(given, u), 0.4 * squares / (squares + 0.01), rtol=1e-12)


def test_gradient_is_that_of_the_distance_with_a_constant_weight():
    given, u = row(), jr.normal(jr.key(5), SHAPE)
    difference = given.x - (given.z - 0.5 * u)
    expected = 0.4 / (4 * jnp.sum(difference**2) + 0.01) * 2 * 4 * 0.5 * difference
    np.testing.assert_allclose(jax.grad(lambda u: WHOLE(given, u))(u), expected, rtol=1e-10)


def test_velocity_of_the_row_itself_leaves_no_distance():
    given = row()
    assert WHOLE(given, given.v) < 1e-24


@pytest.mark.parametrize(("t", "has_term"), [(0.79, True), (0.8, False), (1.0, False)])
def test_rows_from_a_time_on_have_no_term(t, has_term):
    term = mfx.PerceptualTerm(double, (6, 4))
    assert (float(term(row(t), jnp.ones(SHAPE))) > 0) == has_term


def test_both_images_are_cropped_and_resized_alike_within_the_image():
    """Images that are their own coordinates show where a crop lies."""
    rows, columns = jnp.asarray(np.mgrid[:8, :8] + 0.5)
    seen = []
    term = mfx.PerceptualTerm(lambda image: seen.append(image) or image, (4, 2), smallest_crop=0.5)
    scales = []
    for seed in range(40):
        x = jnp.stack([rows, columns])
        term(mfx.Row(x, x, 0.2, 0.5, x=x, key=jr.key(seed)), jnp.zeros_like(x))
        np.testing.assert_array_equal(*seen[-2:])
        (down, right) = np.asarray(seen[-1])
        # The pixels of a crop lie in its four rows and two columns, in equal distances.
        height, width = 4 * np.diff(down[:, 0]).mean(), 2 * np.diff(right[0]).mean()
        scales.append(height / 8)
        assert down.min() >= 0.5 and down.max() <= 7.5 and right.min() >= 0.5 and right.max() <= 7.5
        np.testing.assert_allclose(height, width, rtol=0.25)  # filters end at the borders
    assert 0.45 < min(scales) < 0.65 and 0.8 < max(scales) < 1.05


class Images(mfx.AbstractFieldWithVelocity):
    """A field of images with a velocity head, linear in its parameters."""

    weight: jax.Array
    has_velocity_head = True

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.with_velocity(z, r, t)[0]

    def velocity(self, z, t, condition=None, *, key=None):
        return self.with_velocity(z, t, t)[1]

    def with_velocity(self, z, r, t, condition=None, *, key=None):
        return self.weight[0] * z * jnp.cos(t + r), self.weight[1] * z


class Watched(eqx.Module):
    """A term that counts the rows whose x it was given."""

    seen: list = eqx.field(static=True)

    def __call__(self, image):
        self.seen.append(image.shape)
        return image


def test_objective_adds_the_terms_of_all_rows_to_its_loss():
    field, batch = Images(jnp.array([0.7, -0.3])), mfx.Batch(jr.normal(jr.key(3), (ROWS, *SHAPE)))
    options = {"time_pairs": mfx.TimePairs(mfx.UniformTimes()), "identity_share": 0.5}
    terms = mfx.PerceptualTerm(jnp.tanh, (6, 4), 0.4), mfx.PerceptualTerm(double, (3, 3), 0.1, before=1.0)
    plain = mfx.Objective(mfx.ImprovedMeanFlow(), **options)
    losses = {}
    for name, some in {"none": (), "first": terms[:1], "second": terms[1:], "both": terms}.items():
        objective = mfx.Objective(mfx.ImprovedMeanFlow(), **options, perceptual=some)
        losses[name], metrics = objective(field, batch, key=jr.key(4))
        found = float(metrics["perceptual_loss"].value) if some else 0.0
        np.testing.assert_allclose(losses[name], losses["none"] + found, rtol=1e-12)
        assert metrics["loss"].count == ROWS
    assert losses["none"] == plain(field, batch, key=jr.key(4))[0]
    assert losses["none"] < losses["second"] < losses["both"]
    np.testing.assert_allclose(losses["both"] - losses["first"], losses["second"] - losses["none"], rtol=1e-10)


@pytest.mark.slow
def test_objective_gives_terms_the_data_also_with_guidance():
    field, batch = Labelled(Images(jnp.array([0.7, -0.3]))), mfx.Batch(jnp.ones((4, *SHAPE)), jnp.zeros(4, int))
    watched = Watched([])
    objective = mfx.Objective(
        mfx.ImprovedMeanFlow(),
        identity_share=0.5,
        guidance=mfx.DrawnGuidance(),
        label_dropout=mfx.LabelDropout(0.1, 1),
        perceptual=[mfx.PerceptualTerm(watched, (5, 3))],
    )
    gradient = eqx.filter_grad(lambda field: objective(field, batch, key=jr.key(0))[0])(field)
    assert set(watched.seen) == {(2, 5, 3)}
    assert abs(gradient.field.weight[0]) > 0


class Labelled(mfx.AbstractField):
    field: Images

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, r, t) / condition.scale


def loss_of(field, smallest_time):
    objective = mfx.Objective(mfx.ImprovedMeanFlow(), identity_share=0.5, smallest_time=smallest_time)
    return objective(field, mfx.Batch(jnp.ones((2, *SHAPE))), key=jr.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mfx.PerceptualTerm(double, (4, 0)), "size must be of integers >= 1"),
        (lambda: mfx.PerceptualTerm(double, (4, 4), -1), "coefficient must be >= 0 and finite, got -1.0"),
        (lambda: mfx.PerceptualTerm(double, (4, 4), before=0.0), r"before must lie in \(0, 1\], got 0.0"),
        (lambda: mfx.PerceptualTerm(double, (4, 4), smallest_crop=2), r"smallest_crop must lie in \(0, 1\], got 2.0"),
        (lambda: mfx.Objective(perceptual=[WHOLE]), "perceptual must be empty for an identity .* 1 terms for MeanFlow"),
        (lambda: WHOLE(mfx.Row(jnp.ones(3), jnp.ones(3), 0, 1), jnp.ones(3)), "data must be images, channels first"),
        (lambda: mfx.Objective(smallest_time=1.0), r"smallest_time must lie in \[0, 1\), got 1.0"),
        (
            lambda: mfx.Objective(smallest_time=0.05, interpolant=mfx.TrigonometricInterpolant()),
            "smallest_time must be 0 for any path but LinearInterpolant, got 0.05 and Trigonom",
        ),
        (
            lambda: mfx.Objective(mfx.ConsistencyTraining(0.25), smallest_time=0.05),
            "smallest_time must be 0 for ConsistencyTraining, which learns from x and eps",
        ),
        (lambda: loss_of(mfx.XPrediction(Images(jnp.ones(2)), 0.1), 0.05), "smallest_time must be 0.1, .*, got 0.05"),
        (lambda: loss_of(mfx.XPrediction(Images(jnp.ones(2)), 0.1), 0.0), "smallest_time must be 0.1, .*, got 0.0"),
    ],
    ids=range(11),
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_terms_that_are_no_terms_are_refused():
    with pytest.raises(ValueError, match="perceptual must be a list of PerceptualTerm, got"):
        mfx.Objective(mfx.ImprovedMeanFlow(), perceptual=[double])
