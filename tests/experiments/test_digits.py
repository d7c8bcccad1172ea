"""The digits script from its command line, with a network and a budget that only show that everything runs."""

import json
import re

import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import checkpoint, run

SMALL = [
    *("--steps", "6", "--batch", "16", "--width", "8", "--depth", "1", "--heads", "2"),
    *("--warmup", "2", "--preview-every", "3", "--save-every", "4", "--log-every", "2"),
]


@pytest.fixture(scope="module")
def digits(experiment):
    return experiment("digits")


@pytest.fixture(scope="module")
def judged(digits):
    """All digits in their two parts, and what they are held against."""
    rows = digits.load(digits.Config())
    return rows, digits.Judge(rows)


def keep_hundred(digits, patch):
    """There are only the first hundred digits."""
    load = digits.load_digits
    patch.setattr(digits, "load_digits", lambda **options: [values[:100] for values in load(**options)])


@pytest.fixture(scope="module")
def finished(digits, room, tmp_path_factory):
    """The directory of a finished run with guidance and the comparison, on a hundred digits."""
    root = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        keep_hundred(digits, patch)
        run.main(digits.main, digits.PRESETS, argv=["--preset", "guided", "--compare", *SMALL])
    (directory,) = (root / "runs").glob("*/*")
    return directory


@pytest.mark.rehearsal
def test_a_run_leaves_config_metrics_pictures_and_results(finished):
    for name in ("config.json", "starts.jsonl", "comparison.png"):
        assert (finished / name).stat().st_size > 0
    for method in ("meanflow", "flow_matching"):
        for name in ("metrics.jsonl", "summary.json", "samples.png", "curves.png"):
            assert (finished / method / name).stat().st_size > 0


@pytest.mark.rehearsal
def test_each_method_has_checkpoints_previews_and_metrics_of_its_own(finished):
    for method in ("meanflow", "flow_matching"):
        assert [record["step"] for record in run.RunDirectory(finished / method).records()] == [2, 4, 6]
        assert sorted(path.name for path in (finished / method / "previews").iterdir()) == [
            "00000003.png",
            "00000006.png",
        ]
        assert checkpoint.Checkpoints(finished / method / "checkpoints").steps() == [4, 6]


@pytest.mark.rehearsal
def test_each_method_leaves_weights_that_say_what_they_are(finished):
    for method, average in (("meanflow", True), ("flow_matching", False)):
        weights = checkpoint.read_weights(finished / method / "ema_0.997.safetensors")
        field, notes = weights.fill(weights.make_network), weights.notes
        trained = mfx.Trained(average=average, null_velocity=True, null_average=False)
        assert (notes.pixels, notes.class_names, notes.trained) == ((-1, 1), tuple("0123456789"), trained)
        assert (notes.steps, notes.decay, field.data_shape, field.null_label) == (6, 0.997, (1, 8, 8), 10)


@pytest.mark.rehearsal
def test_a_class_is_generated_from_the_file_of_weights_alone(finished, experiment, tmp_path, monkeypatch):
    generate, file = experiment("generate"), "ema_0.997.safetensors"
    (tmp_path / file).write_bytes((finished / "meanflow" / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    run.main(generate.main, generate.Config(), argv=f"--weights {file} --label 3 --number 2 --to x.npy".split())
    x = np.load("x.npy")
    assert x.shape == (2, 1, 8, 8) and np.isfinite(x).all()


@pytest.mark.slow
def test_the_same_command_again_judges_the_same_networks_and_trains_nothing(finished, digits, capsys, monkeypatch):
    def results():
        return json.loads((finished / "results.json").read_text())

    before, kept = results(), {path: path.read_bytes() for path in finished.rglob("metrics.jsonl")}
    monkeypatch.chdir(finished.parents[2])
    keep_hundred(digits, monkeypatch)
    run.main(digits.main, digits.PRESETS, argv=["--preset", "guided", "--compare", *SMALL, "--save-every", "5"])
    assert capsys.readouterr().out.count(": finished step 6 of 6") == 2
    assert results() == before
    assert {path: path.read_bytes() for path in finished.rglob("metrics.jsonl")} == kept


@pytest.mark.rehearsal
def test_results_have_references_and_every_number_of_evaluations(finished):
    rows = json.loads((finished / "results.json").read_text())
    assert [row["evaluations"] for row in rows] == [None, None, None, 1, 2, 4, 1, 4, 32]
    assert all(np.isfinite(row["frechet"]) for row in rows if row["evaluations"])
    assert all(len(row["read"]) == 10 for row in rows if row["evaluations"])
    assert "Frechet" in (finished / "results.md").read_text()


def test_noise_floor_is_that_of_the_data_and_the_classifier_reads_digits_that_it_never_saw(digits, judged):
    halves, _, holdout = digits.references(*judged, seed=0)
    assert holdout.what == "data: hold-out" and np.mean(holdout.read) > 0.95
    assert 10 < halves.frechet < 25


def test_splits_are_disjoint_and_stratified(judged):
    split, _ = judged
    rows = {name: {row.tobytes() for row in getattr(split, name).x} for name in ("train", "holdout")}
    assert not rows["train"] & rows["holdout"]
    shares = np.bincount(split.holdout.label) / np.bincount(split.every.label)
    np.testing.assert_allclose(shares, 0.2, atol=0.005)


def test_pixels_undo_the_scaling_of_the_data(digits, judged):
    pixels = digits.pixels(judged[0].every.x)
    assert (pixels.min(), pixels.max()) == (0, 16)
    np.testing.assert_array_equal(pixels, np.round(pixels))


def test_no_scale_is_judged_that_was_not_drawn(digits):
    assert digits.Config(guidance_input=True).judged_scales == (1, 2)
    assert digits.Config(guidance_input=True, largest_scale=1.5).judged_scales == (1, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps -3", "--steps must be >= 0, got -3"),
        ("--batch 131", "--batch must be a positive multiple of"),
        ("--batch 2000", "batch must be at most the 1437 digits that are trained on, got 2000"),
        ("--identity-share 1.5", r"--identity-share must lie in \[0, 1\], got 1.5"),
        ("--heads 5", "--width must be a multiple of heads"),
        ("--holdout 0", r"--holdout must lie in \[0.02, 0.49\], got 0.0"),
        ("--holdout 0.5", r"--holdout must lie in \[0.02, 0.49\], got 0.5"),
        ("--identity-share 1 --label-dropout 1.5", r"--label-dropout must lie in \[0, 1\], got 1.5"),
        ("--patch 0", "--patch must be >= 1, got 0"),
        ("--label-dropout 0 --preset guided", "--label-dropout must be > 0 with guidance"),
        ("--label-dropout 0 --preset any-guidance", "--label-dropout must be > 0 with guidance"),
        ("--mix 0.5 --preset any-guidance", "--scale must be 1, and mix 0, with guidance_input, .*; got mix = 0.5"),
        ("--sample-scale 1 5 --preset any-guidance", r"--sample-scale must lie in \[1, 4\], got 5"),
        ("--largest-scale 1 --preset any-guidance", r"--largest-scale must lie in \(1, 100\], got 1.0"),
        ("--largest-scale 3", r"--largest-scale must be left out without guidance_input, got 3.0"),
        ("--sample-scale 2", r"--sample-scale must be left out without guidance_input, got \(2.0,\)"),
        ("--sample-interval 0 0.5", r"--sample-interval must be left out without guidance_input, got \(0.0, 0.5\)"),
        (
            "--sample-interval 0.5 0.2 --preset any-guidance",
            "--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1, got",
        ),
        ("--mix 1", r"--mix must lie in \[0, 1\), got 1.0"),
        ("--save-every 0", "--save-every must be >= 1, got 0"),
        ("--name ../elsewhere", "name must be a path below"),
        ("--stepz 3", "unknown argument --stepz, did you mean --steps"),
    ],
)
def test_bad_input_ends_in_one_line(digits, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, digits.main, digits.PRESETS, argv=arguments.split())
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_digits_that_are_not_finite_score_nan_in_the_table(digits, judged, value):
    rows, judge = judged
    x, label = np.array(rows.every.x), digits.label_of(rows.every)
    x[3, 0, 4, 4] = value
    x = digits.pixels(x)
    assert np.isnan([judge.frechet(x), *judge.read(x, label), judge.nearer_to_training(x)]).all()
