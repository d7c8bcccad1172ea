"""Post-training from its command line: from tiny weights on drawn data to better ones that other scripts read."""

import json
import os
import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from image_files import save_idx

import mf_eqx as mfx
from mf_eqx import checkpoint, data, metrics, run

DRAWS = np.random.default_rng(5)
X = DRAWS.integers(64, 192, (200, 1, 8, 8), np.uint8)
LABEL = (np.arange(200) % 3).astype(np.uint8)
SMALL = "--start base.safetensors --batch 16 --warmup 1 --log-every 1 --preview-every 0"
LEARNS = f"{SMALL} --steps 40 --save-every 20 --learning-rate 0.02 --decay 0.5"
ABOUT = {"data": ["idx", "labels"], "test": [], "holdout": 0.25}


def network(labels=3, **options):
    return mfx.DiT((1, 8, 8), mfx.DiTSize(1, 16, 2, 4), labels=labels, key=jr.key(0), **options)


def save(path="base.safetensors", field=None, about=None, **notes):
    notes = {"pixels": (-1, 1), "trained": mfx.Trained(True, True, False), "steps": 7, **notes}
    about = ABOUT if about is None else about
    checkpoint.save_weights(path, network() if field is None else field, about, checkpoint.Notes(**notes))


def save_inputs():
    """Images with labels, and weights to start from, in the working directory."""
    save_idx("idx", X[:, 0])
    save_idx("labels", LABEL)
    save()


@pytest.fixture(scope="module")
def post_train(experiment):
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    return experiment("post_train")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_inputs()
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
        save_inputs()
        run.main(post_train.main, post_train.PRESETS, argv=f"{LEARNS} --features pixels".split())
    return only("runs/*/*/config.json", root).parent


# A run


@pytest.mark.rehearsal
def test_the_frechet_distance_of_the_average_falls(finished):
    floor, _, before, after = json.loads((finished / "results.json").read_text())
    assert [before["what"], after["what"]] == ["before", "after"]
    assert before["evaluations"] == after["evaluations"] == 1
    assert floor["frechet"]["pixels"] < after["frechet"]["pixels"] < before["frechet"]["pixels"] / 2


@pytest.mark.rehearsal
def test_scores_outside_of_the_space_that_was_trained_in_are_told(finished):
    (text,) = re.findall(r"Not trained in:(.*)", (finished / "results.md").read_text(), re.DOTALL)
    assert [line.split("|")[1].strip() for line in text.strip().splitlines()[2:]] == [
        "Frechet distance, classifier",
        "covered, classifier",
        "right class read",
        "right class read, lowest",
    ]


def test_of_all_scores_those_of_the_trained_spaces_are_left_out(post_train):
    def result(distance):
        spaces = dict.fromkeys(("pixels", "lite0", "classifier"), distance)
        return post_train.image_judge.Result("", 1, spaces, spaces, spaces, [distance, 1.0], distance, [0.125, None])

    def told(*features):
        text = post_train.change(post_train.Config(features=features), [result(0.5), result(0.25), result(0.375)])
        return [part.splitlines() for part in text.split("\n\n")]

    judged = ["Frechet distance, lite0", "covered, lite0", "covered, lowest class"]
    read = ["Frechet distance, classifier", "covered, classifier", "right class read", "right class read, lowest"]

    def names(lines):
        return [line.split("|")[1].strip() for line in lines[2:]]

    title, rows = told("pixels")
    assert title == ["Not trained in:"] and names(rows) == judged + read
    assert [cell.strip() for cell in rows[2].split("|")[2:5]] == ["0.25", "0.375", "+50%"]
    title, rows, apart, of_classifier = told("pixels", "classifier")
    assert "classifier of the same kind" in apart[0]
    assert names(rows) == judged and names(of_classifier) == read
    title, rows = told("lite0")
    assert names(rows) == ["Frechet distance, pixels", "covered, pixels", *read]
    title, apart, _ = told("pixels", "lite0", "classifier")
    assert title == ["Not trained in: nothing judged."]


@pytest.mark.rehearsal
def test_weights_say_what_was_trained_and_what_they_come_from(finished):
    weights = checkpoint.read_weights(finished / "ema.safetensors")
    start = run.sha256_of_file(finished.parents[2] / "base.safetensors")
    history = [{"loss": "frechet", "features": ["pixels"], "evaluations": 1, "start": start}]
    assert weights.config == {**ABOUT, "post_training": history}
    ends = {"ends_at_data": True, "one_step": True}
    assert weights.notes.trained == mfx.Trained(True, False, False, velocity=False, **ends)
    assert (weights.notes.steps, weights.notes.decay, weights.notes.pixels) == (40, 0.5, (-1, 1))


@pytest.mark.rehearsal
def test_other_scripts_read_the_weights(finished, experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate = experiment("generate")
    flags = f"--weights {finished}/ema.safetensors --number 4 --to made.npy"
    run.main(generate.main, generate.Config(), argv=flags.split())
    assert np.load("made.npy").shape == (4, 1, 8, 8)
    with pytest.raises(SystemExit):  # one step is all that was trained
        run.main(generate.main, generate.Config(), argv=[*flags.split(), "--evaluations", "2"])


@pytest.mark.rehearsal
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
def test_a_run_that_was_stopped_ends_with_the_same_weights(finished, post_train, tmp_path, capsys):
    shutil.copytree(finished.parents[2], tmp_path, dirs_exist_ok=True)
    copy = tmp_path / finished.relative_to(finished.parents[2])
    wanted = (copy / "ema.safetensors").read_bytes()
    (copy / "ema.safetensors").unlink()
    for path in (copy / "checkpoints").glob("00000040*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run.main(post_train.main, post_train.PRESETS, argv=f"{LEARNS} --features pixels".split())
    assert "continues after step 20 of 40" in capsys.readouterr().out
    assert (copy / "ema.safetensors").read_bytes() == wanted


@pytest.mark.slow
def test_weights_are_trained_on_again_and_other_numbers_of_evaluations_are_refused(post_train, experiment, here):
    small = f"{SMALL} --features pixels --test-run"
    run.main(post_train.main, post_train.PRESETS, argv=small.split())
    shutil.copy(only("runs/*/*/ema.safetensors", here), "again.safetensors")
    shutil.rmtree("runs")
    again = f"{small} --start again.safetensors --evaluations 2 --data idx labels --holdout 0.5 --relative"
    run.main(post_train.main, post_train.PRESETS, argv=again.split())
    path = only("runs/*/*/ema.safetensors", here)
    about = checkpoint.read_weights(path).config
    assert about["holdout"] == 0.5 and [each["evaluations"] for each in about["post_training"]] == [1, 2]
    generate = experiment("generate")
    flags = ["--weights", str(path), "--number", "4", "--to", "made.npy"]
    run.main(generate.main, generate.Config(), argv=flags)  # in two evaluations, without a flag
    with pytest.raises(SystemExit):
        run.main(generate.main, generate.Config(), argv=[*flags, "--evaluations", "1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--feature-weights 1 0.5 --evaluations 2",
        "--preset drifting --batch 16",
        "--features pixels --queue 64",
        "--preset reward --batch 16 --evaluations 2 --anchor 0.5",
    ],
)
def test_every_loss_runs_to_the_end_and_moves_the_network(flags, post_train, here):
    run.main(post_train.main, post_train.PRESETS, argv=f"{SMALL} {flags} --test-run".split())
    *_, before, after = json.loads(only("runs/*/*/results.json", here).read_text())
    assert np.isfinite([*before["frechet"].values(), *after["frechet"].values()]).all()
    moved = checkpoint.load_weights(only("runs/*/*/ema.safetensors", here))
    assert not eqx.tree_equal(moved, network())


@pytest.mark.slow
def test_drifting_learns(post_train, here):
    run.main(
        post_train.main,
        post_train.PRESETS,
        argv=f"{LEARNS} --loss drifting --features pixels --batch 64 --steps 80".split(),
    )
    *_, before, after = json.loads(only("runs/*/*/results.json", here).read_text())
    assert after["frechet"]["pixels"] < before["frechet"]["pixels"] / 2


@pytest.mark.slow
def test_weights_of_a_reward_take_any_number_of_evaluations(post_train, experiment, here):
    run.main(post_train.main, post_train.PRESETS, argv=f"{SMALL} --preset reward --test-run".split())
    generate, weights = experiment("generate"), only("runs/*/*/ema.safetensors", here)
    for number in "12":
        flags = ["--weights", str(weights), "--number", "2", "--to", "x.npy", "--evaluations", number]
        run.main(generate.main, generate.Config(), argv=flags)


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
    found = features.moments(features.Space("pixels", features.Pixels()), source, 100)
    known = post_train.image_judge.pixels(X[::2])
    np.testing.assert_allclose(found.mean, known.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.cov, np.cov(known.T), atol=1e-5)


def test_the_classifier_that_is_trained_with_is_another_one_than_the_judge(post_train, tmp_path):
    source, features = data.ArraySource(X, LABEL), post_train.post_features
    judge = post_train.image_classifier.trained(source, tmp_path, steps=2)  # as main does
    space = features.make_space("classifier", source, tmp_path, steps=2)
    assert not np.array_equal(judge.last.weight, space.features.classifier.last.weight)
    assert len(os.listdir(tmp_path)) == 2
    again = features.make_space("classifier", source, tmp_path, steps=2)
    np.testing.assert_array_equal(again.features.classifier.last.weight, space.features.classifier.last.weight)
    as_judge = features.Space("classifier", features.OfClassifier(judge))
    assert features.digest(again) == features.digest(space) != features.digest(as_judge)


def test_populations_are_filled_with_images_of_the_start_under_labels_of_the_data(post_train):
    source, features = data.ArraySource(X, LABEL), post_train.post_features
    config = post_train.Config(batch=16, queue=100, features=("pixels",))
    space = features.Space("pixels", features.Pixels())
    loss = post_train.sample_objective(config, [space], source, None, unroll=False)
    parts, field = data.InTurn((data.FromPixels(),)), network()
    state, again = (post_train.filled_state(config, loss, field, source, parts, lambda tree: tree) for _ in range(2))
    assert state[0].population.count == 100
    jax.tree.map(np.testing.assert_array_equal, state, again)
    # A queue has the newest first: here the first rows of the seventh batch.
    key = jr.fold_in(jr.key(1), 6)
    row = data.Stream(source, 16, seed=1)[6]
    eps = jr.normal(jr.fold_in(key, row.index[0]), (1, 8, 8))
    made = features.Pixels()(mfx.sample(field, eps, jnp.asarray(row.condition[0])))
    np.testing.assert_allclose(state[0].population.features[0], made - loss.losses[0].mean, atol=1e-5)


@pytest.mark.slow
def test_training_begins_with_a_full_population(finished, post_train):
    """The first distance is near that of the population before, and far from that of a batch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.parents[2])
        weights = checkpoint.read_weights("base.safetensors")
        config = post_train.Config(start="base.safetensors", batch=16, features=("pixels",), refresh=1)
        source = post_train.open_data(config, weights, (1, 8, 8)).train
    pixels = post_train.post_features.make_space("pixels", source, finished, steps=0)
    loss = post_train.sample_objective(config, [pixels], source, None, unroll=False)
    parts = data.InTurn((data.FromPixels(),))
    (state,) = post_train.filled_state(config, loss, network(), source, parts, lambda tree: tree)
    batch = jax.vmap(lambda row: parts(row, jr.key(0)))(data.Stream(source, 16, seed=0)[0])
    _, (found, _) = loss.evaluate(network(), batch, loss.init(), key=jr.key(0))
    mean, covariance = state.mean / state.weight, state.product / state.weight
    covariance = covariance - jnp.outer(mean, mean)
    factor = np.asarray(loss.losses[0].factor)
    full = metrics.frechet_distance_of_moments(mean, covariance, 0 * np.asarray(mean), factor @ factor.T)
    first, alone = run.RunDirectory(finished).records()[0]["frechet_distance"], float(found["frechet_distance"].value)
    assert abs(first - full) < abs(first - alone) / 5, (first, full, alone)


def test_what_was_held_out_for_the_weights_is_held_out_again(post_train, here):
    def parts(share=None, **about):
        save("held.safetensors", about={"data": ["idx", "labels"], "test": [], **about})
        config = post_train.Config(start="held.safetensors", holdout=share)
        return post_train.open_data(config, checkpoint.read_weights("held.safetensors"), (1, 8, 8))

    known = post_train.image_sources.open_parts(("idx", "labels"), (), size=(8, 8), holdout=0.4)
    found = parts(holdout=0.4)
    np.testing.assert_array_equal(found.test.rows, known.test.rows)
    assert len(parts(0.1, holdout=0.4).test) == 20
    shutil.copy("idx", "others")
    assert len(parts(test=["others", "labels"], holdout=0.4).test) == 200
    with pytest.raises(ValueError, match=r"holdout must be left out where there are test images, got 0\.1"):
        parts(0.1, test=["others", "labels"])


def test_digits_are_divided_as_they_were_for_the_weights(post_train):
    config = post_train.digits.Config(seed=3, holdout=0.3)
    known = post_train.digits.load(config)
    parts = post_train.digits_as_images(config)
    for part, source in ((parts.train, known.train), (parts.test, known.holdout)):
        rows = part.take(np.arange(len(part)))
        np.testing.assert_allclose(rows.x / 127.5 - 1, source.x, atol=1 / 250)
        np.testing.assert_array_equal(rows.label, source.label)


# Bad input


@pytest.fixture(scope="module")
def refused(post_train, tmp_path_factory):
    """A directory with data and weights of every kind that post-training refuses."""
    root = tmp_path_factory.mktemp("refused")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_inputs()
        save("latents.safetensors", pixels=None)
        save("guided.safetensors", network(guidance=True))
        save("unknown.safetensors", about={})
        save("flow.safetensors", trained=mfx.Trained(False, True, False))
        save("average.safetensors", trained=mfx.Trained(True, True, False, ends_at_data=True))
        save("large.safetensors", mfx.DiT((1, 16, 16), mfx.DiTSize(1, 16, 2, 4), labels=3, key=jr.key(0)))
        save("two.safetensors", network(2))
        save("plain.safetensors", network(None))
        save("old.safetensors", about={"data": ["idx", "labels"]})
        save("digits.safetensors", about={"data": "digits", "holdout": 0.3, "seed": 1})
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--start must be given, got none"),
        ("--start nowhere", "--start: No such file or directory: 'nowhere'|nowhere"),
        ("--start idx", "--start: idx: must be a file of save_weights"),
        ("--start latents.safetensors", r"--start must be of images in \[-1, 1\], .*, got"),
        ("--start guided.safetensors", "--start must be of a network that takes labels or nothing, got"),
        ("--start flow.safetensors", "--start must be of a network with u trained at r < t, got one of Flow Matching"),
        ("--accumulation 2", "--accumulation must be 1 for losses that are no means over rows, got 2"),
        ("--start unknown.safetensors", "--data must be given for unknown.safetensors, which does not name its data"),
        (
            "--start large.safetensors",
            r"--data must be images of the shape \(1, 16, 16\) of the network, got \(1, 8, 8\)",
        ),
        ("--start two.safetensors", "--data must be images with the 2 labels of the network, got 3"),
        (
            "--start base.safetensors --data idx --holdout 0.2",
            "--data must be images with the 3 labels of .*, got None",
        ),
        (
            "--start base.safetensors --data idx",
            "--holdout or --test must be given: nothing says what base.safetensors",
        ),
        (
            "--start old.safetensors",
            "--holdout or --test must be given: nothing says what old.safetensors never saw of idx",
        ),
        ("--start digits.safetensors --holdout 0.2", "--holdout must be left out for the digits, .*, got 0.2"),
        (
            "--start plain.safetensors --data idx --holdout 0.2",
            "--features must be without classifier for .*, without labels",
        ),
        ("--start base.safetensors --batch 160", r"batch must lie in \[1, 150\], the rows of training images"),
        ("--holdout 0", r"--holdout must lie in \(0, 1\), got 0.0"),
        ("--learning-rate 2", r"--learning-rate must lie in \(0, 1\), got 2.0"),
        ("--features pixels pixels", "--features must be at least one space, and no space twice"),
        ("--feature-weights 1", "--feature-weights must be 2, one for each space, got 1"),
        ("--feature-weights 1 0", r"--feature-weights must be > 0, got \(1.0, 0.0\)"),
        ("--queue 100", "--queue must be 0 or at least the batch of 128, got 100"),
        ("--loss drifting --scales 0", "--scales must be > 0 and finite"),
        ("--population-decay 1", r"--population-decay must lie in \[0, 1\), got 1.0"),
        ("--decay 1", r"--decay must lie in \[0, 1\), got 1.0"),
        ("--queue 200 --population-decay 0.5", "--population-decay must be left out with --queue, .*, got 0.5"),
        (
            "--loss drifting --queue 200",
            "--queue must be left out with --loss drifting, which does not use it, got 200",
        ),
        ("--loss drifting --relative", "--relative must be left out with --loss drifting"),
        ("--anchor 1", "--anchor must be left out with --loss frechet, which does not use it"),
        ("--loss reward --anchor -1", "--anchor must be >= 0 and finite, got -1.0"),
        ("--start average.safetensors --loss reward", "--start must be of a network with u trained at all r < t for"),
        ("--loss reward --features pixels", "--features must be left out with --loss reward, which does not use it"),
        (
            "--start plain.safetensors --data idx --holdout 0.2 --loss reward",
            "--loss must not be reward for plain.*, a",
        ),
        ("--scales 0.1", "--scales must be left out with --loss frechet, which does not use it"),
        (
            "--start base.safetensors --batch 8",
            r"--batch / \(1 - population_decay\) must be .* 128 features .*, got 80",
        ),
        (
            "--start base.safetensors --features pixels --batch 16 --queue 60",
            "--queue must be at least the 64 features of pixels, got 60",
        ),
        (
            "--start base.safetensors --features pixels --batch 16 --reference 50",
            "--reference, and the training images, must be at least the 64 features of pixels, got 50",
        ),
        (
            "--start base.safetensors --loss drifting --batch 11",
            "--batch must be at least 12 for drifting, 4 rows for each of 3 labels, got 11",
        ),
        ("--evaluations 0", "--evaluations must be >= 1, got 0"),
        ("--features inception", "--features"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(post_train, arguments, message, refusal_of, refused, monkeypatch):
    monkeypatch.chdir(refused)
    line = refusal_of(run.main, post_train.main, post_train.PRESETS, argv=arguments.split())
    assert re.search(message, line), line
    assert not list(refused.glob("runs/*/*/config.json"))
