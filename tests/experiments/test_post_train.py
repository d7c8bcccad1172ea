"""Post-training from its command line: from tiny weights on drawn data to better ones that other scripts read."""

import json
import os
import re
import struct

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import checkpoint, data, run

DRAWS = np.random.default_rng(5)
X = DRAWS.integers(64, 192, (80, 1, 8, 8), np.uint8)
LABEL = (np.arange(80) % 3).astype(np.uint8)
SMALL = "--start base.safetensors --batch 16 --holdout 0.25 --warmup 1 --log-every 1 --preview-every 0"
LEARNS = f"{SMALL} --steps 40 --learning-rate 0.02 --decay 0.5"


def save_idx(path, values):
    with open(path, "wb") as file:
        file.write(bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes())


def network(labels=3, **options):
    return mfx.DiT((1, 8, 8), mfx.DiTSize(1, 16, 2, 4), labels=labels, key=jr.key(0), **options)


def save(path="base.safetensors", field=None, about=None, **notes):
    notes = {"pixels": (-1, 1), "trained": mfx.Trained(True, True, False), "steps": 7, **notes}
    about = {"data": ["idx", "labels"]} if about is None else about
    checkpoint.save_weights(path, network() if field is None else field, about, checkpoint.Notes(**notes))


@pytest.fixture(scope="module")
def post_train(experiment):
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    return experiment("post_train")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_idx("idx", X[:, 0])
    save_idx("labels", LABEL)
    save()
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def small(post_train):
    """A judge of pixels and of a classifier of three steps."""
    judging = post_train.image_judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(post_train.image_classifier, "STEPS", 3)
        patch.setattr(judging, "feature_spaces", lambda: [judging.FeatureSpace("pixels", judging.pixels)])
        yield


def only(pattern, folder):
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def finished(post_train, room, tmp_path_factory):
    """The directory of a finished run with the Frechet distance of pixels."""
    root = tmp_path_factory.mktemp("post_train")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_idx("idx", X[:, 0])
        save_idx("labels", LABEL)
        save()
        run.main(post_train.main, post_train.PRESETS, argv=f"{LEARNS} --features pixels".split())
    return only("runs/*/*/config.json", root).parent


# A run


def test_the_frechet_distance_of_the_average_falls(finished):
    floor, _, before, after = json.loads((finished / "results.json").read_text())
    assert [before["what"], after["what"]] == ["before", "after"]
    assert before["evaluations"] == after["evaluations"] == 1
    assert floor["frechet"]["pixels"] < after["frechet"]["pixels"] < before["frechet"]["pixels"] / 2


def test_scores_outside_of_the_space_that_was_trained_in_are_told(finished):
    (text,) = re.findall(r"Not trained in:(.*)", (finished / "results.md").read_text(), re.DOTALL)
    assert "Frechet distance, classifier" in text and "Frechet distance, pixels" not in text
    assert "right class read" in text and "covered, pixels" in text


def test_weights_say_what_was_trained_and_what_they_come_from(finished):
    weights = checkpoint.read_weights(finished / "ema.safetensors")
    start = run.sha256_of_file(finished.parents[2] / "base.safetensors")
    assert weights.config["data"] == ["idx", "labels"]
    assert weights.config["post_training"] == {"loss": "frechet", "features": ["pixels"], "start": start}
    assert weights.notes.trained == mfx.Trained(True, False, False, velocity=False, ends_at_data=True)
    assert (weights.notes.steps, weights.notes.decay, weights.notes.pixels) == (40, 0.5, (-1, 1))


def test_other_scripts_read_the_weights(finished, experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate = experiment("generate")
    flags = f"--weights {finished}/ema.safetensors --number 4 --to made.npy"
    run.main(generate.main, generate.Config(), argv=flags.split())
    assert np.load("made.npy").shape == (4, 1, 8, 8)
    with pytest.raises(SystemExit):  # one step is all that was trained
        run.main(generate.main, generate.Config(), argv=[*flags.split(), "--evaluations", "2"])


def test_pictures_and_metrics_are_left(finished):
    assert [name for name in ("samples_before.png", "samples_after.png") if not (finished / name).exists()] == []
    records = run.RunDirectory(finished).records()
    assert [record["step"] for record in records] == [*range(1, 41)]
    assert all(np.isfinite(record["frechet_distance"]) for record in records)


@pytest.mark.slow
def test_the_same_command_finds_the_finished_run_and_refuses_other_weights_at_its_path(finished, post_train, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.parents[2])
        argv = f"{LEARNS} --features pixels".split()
        run.main(post_train.main, post_train.PRESETS, argv=argv)
        assert "finished step 40 of 40" in capsys.readouterr().out
        save("base.safetensors", jax.tree.map(lambda leaf: leaf + 0.0, network()), steps=8)
        with pytest.raises(SystemExit):
            run.main(post_train.main, post_train.PRESETS, argv=argv)
        assert "training must be that of the run so far" in capsys.readouterr().err
        save()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--feature-weights 1 0.5 --evaluations 2",
        "--preset drifting --batch 16",
        "--features pixels --queue 64",
    ],
)
def test_every_loss_trains(flags, post_train, here):
    run.main(post_train.main, post_train.PRESETS, argv=f"{SMALL} {flags} --test-run".split())
    *_, before, after = json.loads(only("runs/*/*/results.json", here).read_text())
    assert np.isfinite([*before["frechet"].values(), *after["frechet"].values()]).all()


@pytest.mark.slow
def test_drifting_learns(post_train, here):
    run.main(post_train.main, post_train.PRESETS, argv=f"{LEARNS} --loss drifting --features pixels".split())
    *_, before, after = json.loads(only("runs/*/*/results.json", here).read_text())
    assert after["frechet"]["pixels"] < before["frechet"]["pixels"] / 2


@pytest.mark.slow
def test_weights_without_labels_are_trained_on_data_with_labels(post_train, here):
    save(field=network(None))
    run.main(post_train.main, post_train.PRESETS, argv=f"{SMALL} --features pixels --test-run".split())
    *_, after = json.loads(only("runs/*/*/results.json", here).read_text())
    assert after["agreement"] is None and np.isfinite(after["frechet"]["pixels"])


# What it computes


def test_spaces_are_those_of_the_judge(post_train):
    features, judging, source = post_train.post_features, post_train.image_judge, data.ArraySource(X, LABEL)
    x = jnp.asarray(X / np.float32(127.5) - 1)
    np.testing.assert_allclose(jax.vmap(features.Pixels())(x), judging.pixels(X), atol=1e-6)
    averaged = features.Averaged(16)(x[0])
    np.testing.assert_allclose(127.5 * (averaged + 1), post_train.image_sources.means_over_squares(X, 16)[0], rtol=1e-4)
    classifier = post_train.image_classifier.make(source, features.CLASSIFIER_SEED)
    found, _ = post_train.image_classifier.read(classifier, X)
    np.testing.assert_allclose(jax.vmap(features.OfClassifier(classifier))(x), found, atol=1e-4)


def test_moments_are_those_of_the_features(post_train):
    features, source = post_train.post_features, data.ArraySource(X, LABEL)
    found = features.moments(features.Space("pixels", features.Pixels()), source, 40)
    known = post_train.image_judge.pixels(X[::2])
    np.testing.assert_allclose(found.mean, known.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.cov, np.cov(known.T), atol=1e-5)


def test_the_classifier_that_is_trained_with_is_another_one_than_the_judge(post_train, tmp_path):
    source, classifying = data.ArraySource(X, LABEL), post_train.image_classifier
    found = [classifying.trained(source, tmp_path, steps=2, seed=seed) for seed in (0, 1)]
    assert not np.array_equal(found[0].last.weight, found[1].last.weight)
    assert len(os.listdir(tmp_path)) == 2
    again = classifying.trained(source, tmp_path, steps=2, seed=1)
    np.testing.assert_array_equal(again.last.weight, found[1].last.weight)


def test_digits_are_divided_as_they_were_for_the_weights(post_train):
    config = post_train.digits.Config(seed=3, holdout=0.3)
    known = post_train.digits.load(config)
    parts = post_train.digits_as_images(config)
    for part, source in ((parts.train, known.train), (parts.test, known.holdout)):
        rows = part.take(np.arange(len(part)))
        np.testing.assert_allclose(rows.x / 127.5 - 1, source.x, atol=1 / 250)
        np.testing.assert_array_equal(rows.label, source.label)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--start must be given, got none"),
        ("--start nowhere", "--start: No such file or directory: 'nowhere'|nowhere"),
        ("--start idx", "idx: must be a file of save_weights"),
        ("--start latents.safetensors", r"latents.safetensors: must be of images in \[-1, 1\], .*, got"),
        ("--start guided.safetensors", "guided.safetensors: must be of a network that takes labels or nothing, got"),
        ("--start flow.safetensors", "flow.safetensors: must be of a network with u trained at r < t, got one of Flow"),
        ("--accumulation 2", "--accumulation must be 1 for losses that are no means over rows, got 2"),
        ("--start unknown.safetensors", "--data must be given for unknown.safetensors, which does not name its data"),
        ("--start large.safetensors", r"images must have the shape \(1, 16, 16\) of the network, got \(1, 8, 8\)"),
        ("--start two.safetensors", "labels must be the 2 of the network, got 3"),
        ("--start base.safetensors --data idx", "labels must be the 3 of the network, got None"),
        ("--start plain.safetensors --data idx", "--features must be without classifier for .*, without labels"),
        ("--start base.safetensors --batch 100", r"batch must lie in \[1, 72\], the rows of training images"),
        ("--holdout 0", r"--holdout must lie in \(0, 1\), got 0.0"),
        ("--learning-rate 2", r"--learning-rate must lie in \(0, 1\), got 2.0"),
        ("--features pixels pixels", "--features must be at least one space, and no space twice"),
        ("--feature-weights 1", "--feature-weights must be 2, one for each space, got 1"),
        ("--feature-weights 1 0", r"--feature-weights must be > 0, got \(1.0, 0.0\)"),
        ("--queue 100", "--queue must be 0 or at least the batch of 128, got 100"),
        ("--scales 0", "--scales must be > 0 and finite"),
        ("--population-decay 1", r"--population-decay must lie in \[0, 1\), got 1.0"),
        ("--decay 1", r"--decay must lie in \[0, 1\), got 1.0"),
        ("--evaluations 0", "--evaluations must be >= 1, got 0"),
        ("--features inception", "--features"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(post_train, arguments, message, capsys, here):
    save("latents.safetensors", pixels=None)
    save("guided.safetensors", network(guidance=True))
    save("unknown.safetensors", about={})
    save("flow.safetensors", trained=mfx.Trained(False, True, False))
    save("large.safetensors", mfx.DiT((1, 16, 16), mfx.DiTSize(1, 16, 2, 4), labels=3, key=jr.key(0)))
    save("two.safetensors", network(2))
    save("plain.safetensors", network(None))
    with pytest.raises(SystemExit) as ended:
        run.main(post_train.main, post_train.PRESETS, argv=arguments.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert re.search(message, line), line
    assert not list(here.glob("runs/*/*/config.json"))
