"""Images that are seen in part: what is seen of them, what is measured, and runs from the command line."""

import json
import re

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import checkpoint, exact, run

SHAPE = (2, 4, 6)
TINY = ["--images", "5", "--samples", "2", "--evaluations", "1", "--scales", "1"]


@pytest.fixture(scope="module")
def inverse(experiment):
    return experiment("inverse")


@pytest.fixture(scope="module")
def inverse_problems(experiment):
    return experiment("inverse_problems")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a network that was never trained, as digits.py leaves it, but for changes of what it says."""
    folder = tmp_path_factory.mktemp("weights")
    field = filled(lambda: mfx.DiT((1, 8, 8), mfx.DiTSize(1, 8, 2, 4), labels=10, key=jr.key(0)))

    def save(name, trained=True, ends_at_data=False, **about):
        learnt = mfx.Trained(trained, False, False, ends_at_data=ends_at_data)
        notes = checkpoint.Notes(pixels=(-1, 1), trained=learnt)
        path = folder / f"{name}.safetensors"
        checkpoint.save_weights(path, field, {"data": "digits", "holdout": 0.2, "seed": 0, **about}, notes)
        return str(path)

    return save


def images(rows=3):
    return np.clip(np.asarray(jr.normal(jr.key(0), (rows, *SHAPE))), -1, 1)


def test_an_observation_is_a_projection_of_the_image(inverse_problems):
    values = dict(zip(("half", "squares", "noise"), inverse_problems.problems(SHAPE, 0.5), strict=True))
    for problem, rank in zip(values.values(), (24, 12, 48), strict=True):
        np.testing.assert_allclose(problem.projection @ problem.projection, problem.projection, atol=1e-15)
        np.testing.assert_array_equal(problem.projection, problem.projection.T)
        np.testing.assert_allclose(np.trace(problem.projection), rank)


def test_half_of_an_image_is_hidden_four_pixels_are_one_and_noise_is_added(inverse_problems):
    x = images()
    half, squares, noise = (problem.observe(x) for problem in inverse_problems.problems(SHAPE, 0.5))
    np.testing.assert_allclose(half[:, :, :2], x[:, :, :2], rtol=1e-6)
    assert not half[:, :, 2:].any()
    means = x.reshape(3, 2, 2, 2, 3, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(squares, means.repeat(2, 2).repeat(2, 3), rtol=1e-5, atol=1e-7)
    assert 0.4 < np.std(noise - x) < 0.6


def test_ways_take_the_evaluations_that_they_say(inverse_problems):
    found = inverse_problems.ways((1, 2, 4))
    assert len(found) == len(set(found))
    for through_field in (False, True):
        straight = [way.steps for way in found if way.straight and way.through_field == through_field]
        along = [
            (way.evaluations, way.steps) for way in found if not way.straight and way.through_field == through_field
        ]
        assert straight == [1, 2, 4, 1, 2, 4] and along == [(3, 2)]


def make_judge(inverse_problems, number):
    problem, x = inverse_problems.problems(SHAPE, 0.5)[number], images()
    reference = np.asarray(jr.normal(jr.key(3), (60, 48)))
    return inverse_problems.Judge(problem, inverse_problems.Images(x, None), problem.observe(x), reference)


@pytest.mark.parametrize("number", [0, 1])
def test_errors_are_told_apart_by_what_was_seen(inverse_problems, number):
    judge = make_judge(inverse_problems, number)
    seen = judge.problem.projection
    draws = np.asarray(jr.normal(jr.key(1), (40, 3, 48)))
    off = judge.images.x.reshape(3, 48) + draws @ (0.1 * seen + 0.2 * (np.eye(48) - seen))
    figures = judge.figures(off.reshape(40, 3, *SHAPE))
    np.testing.assert_allclose(figures.observed, 0.1, rtol=0.05)
    np.testing.assert_allclose(figures.psnr, 20 * np.log10(2 / 0.2), rtol=0.05)
    np.testing.assert_allclose(figures.spread, 0.2, rtol=0.05)
    truth = judge.figures(judge.images.x[None])
    assert truth.observed < 1e-6 and truth.psnr > 100 and truth.spread == 0


def test_the_reward_makes_a_restoration_agree_with_what_was_seen(inverse_problems):
    judge = make_judge(inverse_problems, 0)
    field = exact.GaussianAverageVelocity(jnp.zeros(SHAPE), 1.0)
    for way in inverse_problems.ways((2,)):
        unguided, guided = (judge.figures(judge.restored(field, way, scale, 2)).observed for scale in (0.0, 1.0))
        assert guided < 0.9 * unguided, way


def run_in(folder, monkeypatch, inverse, *arguments):
    monkeypatch.chdir(folder)
    run.main(inverse.main, inverse.Config(), argv=[*TINY, *arguments])
    (directory,) = (folder / "runs").glob("*/*")
    return directory


@pytest.mark.rehearsal
def test_restorations_of_saved_weights_leave_a_table_and_a_picture(inverse, weights, tmp_path, monkeypatch):
    directory = run_in(tmp_path, monkeypatch, inverse, "--weights", weights("digits"))
    rows = json.loads((directory / "results.json").read_text())
    assert len(rows) == 3 * (2 + 4)
    assert all(np.isfinite([row["figures"][name] for name in ("observed", "spread", "frechet")]).all() for row in rows)
    assert (directory / "restored.png").stat().st_size > 0
    assert "lower half hidden" in (directory / "results.md").read_text()


@pytest.mark.slow
def test_without_weights_a_network_is_trained_first(inverse, tmp_path, monkeypatch):
    directory = run_in(tmp_path, monkeypatch, inverse, "--test-run")
    assert [*directory.glob("meanflow/*.safetensors")] and (directory / "restored.png").exists()


def test_a_dry_run_of_weights_leaves_nothing(inverse, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run.main(inverse.main, inverse.Config(), argv=["--weights", weights("dry"), "--dry-run"])
    assert "150 images in 20 ways" in "".join(capsys.readouterr())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scales 2 4", r"--scales must be > 0, and one of them below 2, got \(2.0, 4.0\)"),
        ("--scales 1 0", "--scales must be > 0, and one of them below 2"),
        ("--noise 0", r"--noise must lie in \(0, 100\], got 0.0"),
        ("--samples 1", "--samples must be >= 2, got 1"),
        ("--evaluations 0", "--evaluations must be >= 1, got 0"),
        ("--data photos", "--data must be left out without weights, got photos"),
        ("--weights none.safetensors", "none.safetensors"),
    ],
)
def test_bad_input_ends_in_one_line(inverse, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, inverse.main, inverse.Config(), argv=arguments.split())
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        ([], {"trained": False}, "--weights must be of a network with u trained at all r <= t, got"),
        ([], {"ends_at_data": True}, "--weights must be of a network with u trained at all r <= t, got"),
        ([], {"data": None}, "--data must be given for .* which does not name its data, got none"),
        (["--images", "400"], {}, "--images must be at most 360, the number of held-out digits, got 400"),
    ],
)
def test_weights_that_cannot_restore_are_refused(
    inverse, weights, arguments, changed, message, refusal_of, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = ["--weights", weights("refused", **changed), *arguments]
    line = refusal_of(run.main, inverse.main, inverse.Config(), argv=given)
    assert re.search(message, line), line
