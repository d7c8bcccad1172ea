"""The recipe for images of one's own: what it reads, refuses and leaves, with a network that shows that all runs."""

import dataclasses
import json
import os
import re
import sys

import equinox as eqx
import image_files
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from own_methods import OWN, OWN_NETWORK

import mf_eqx as mfx
from mf_eqx import checkpoint, data, run

DRAWS = np.random.default_rng(5)
X = DRAWS.integers(0, 256, (40, 1, 8, 8), np.uint8)
LABEL = (np.arange(40) % 3).astype(np.uint8)
DATA = "--data idx labels --holdout 0.25 --width 8 --batch 8"
SMALL = f"{DATA} --depth 1 --heads 2"
SHORT = "--steps 3 --warmup 1 --decay 0.5 --save-every 2 --log-every 1 --preview-every 2"


class Known(mfx.AbstractField):
    """One step gives a tenth of the noise, minus the label."""

    data_shape = (1, 8, 8)

    def __call__(self, z, r, t, condition=None, *, key=None):
        return 0.9 * z + condition


def save_inputs():
    image_files.save_idx("idx", X[:, 0])
    image_files.save_idx("labels", LABEL)


def save_mnist(folder, suffix=""):
    """Files as of MNIST, with other test images."""
    image_files.save_mnist(folder, (X[:, 0], LABEL), (255 - X[:6, 0], LABEL[:6]), suffix)


def pixels_alone(judging):
    return [judging.FeatureSpace("pixels", judging.pixels)]


def save_folder(folder, classes=("cat", "dog")):
    from PIL import Image

    for number, x in enumerate(X[:10, 0]):
        path = f"{folder}/{classes[number % 2]}/{number:02}.png" if classes else f"{folder}/{number:02}.png"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(x).save(path)


@pytest.fixture(scope="module")
def images(experiment):
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    return experiment("images")


@pytest.fixture(scope="module")
def sources(images):
    return images.image_sources


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with images and labels, in which a test works."""
    monkeypatch.chdir(tmp_path)
    save_inputs()
    return tmp_path


@pytest.fixture(scope="module")
def finished(images, room, tmp_path_factory):
    """The directory of a finished run."""
    root = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(images, "EVALUATIONS", (1, 2))
        patch.setattr(images.image_classifier, "STEPS", 3)
        patch.setattr(images.image_judge, "feature_spaces", lambda: pixels_alone(images.image_judge))
        save_inputs()
        run.main(images.main, images.PRESETS, argv=f"{SMALL} {SHORT}".split())
    (config,) = (root / "runs").glob("*/*/config.json")
    return config.parent


# A run


@pytest.mark.rehearsal
def test_a_run_leaves_pictures_results_and_weights(finished):
    names = ("samples.png", "comparison.png", "curves.png", "results.md", "ema.safetensors", "previews/00000002.png")
    assert [name for name in names if not (finished / name).exists()] == []
    assert [record["step"] for record in run.RunDirectory(finished).records()] == [1, 2, 3]


@pytest.mark.rehearsal
def test_training_images_and_every_number_of_evaluations_are_judged(finished):
    rows = json.loads((finished / "results.json").read_text())
    assert [row["what"] for row in rows] == ["training images", "test images", "MeanFlow", "MeanFlow"]
    assert [row["evaluations"] for row in rows] == [None, None, 1, 2]
    for row in rows[2:]:  # a network that has learnt nothing
        assert row["frechet"]["pixels"] > rows[0]["frechet"]["pixels"] > 0
        assert 0 <= row["agreement"] <= 1 and len(row["agreement_by_class"]) == len(row["coverage_by_class"]) == 3
    assert "10 images each" in (finished / "results.md").read_text()


@pytest.mark.rehearsal
def test_weights_tell_of_what_network_and_data_they_are(finished):
    weights = checkpoint.read_weights(finished / "ema.safetensors")
    field = checkpoint.load_weights(finished / "ema.safetensors")
    assert (field.data_shape, field.null_label) == ((1, 8, 8), 3)
    assert weights.config == {"data": ["idx", "labels"], "test": [], "holdout": 0.25}
    assert (weights.notes.steps, weights.notes.decay, weights.notes.pixels) == (3, 0.5, (-1, 1))


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(finished, images, monkeypatch, capsys):
    monkeypatch.chdir(finished.parents[2])
    run.main(images.main, images.PRESETS, argv=f"{SMALL} {SHORT} --steps 5".split())
    assert "continues after step 3 of 5" in capsys.readouterr().out
    assert run.RunDirectory(finished).records()[-1]["step"] == 5


@pytest.mark.rehearsal
def test_a_run_by_a_method_of_ones_own_goes_on_with_the_same_file_alone(images, here, refusal_of, room, monkeypatch):
    monkeypatch.setattr(images, "finish", lambda *given, **options: None)
    (here / "mine.py").write_text(OWN)
    flags = f"{SMALL} --identity mine.py:Mine --steps 1 --warmup 1".split()
    run.main(images.main, images.PRESETS, argv=flags)
    (config,) = here.glob("runs/*/*/config.json")
    run.main(images.main, images.PRESETS, argv=[*flags, "--steps", "2"])
    assert run.RunDirectory(config.parent).records()[-1]["step"] == 2
    (here / "mine.py").write_text(OWN + "# changed\n")
    run._own._read.cache_clear()
    line = refusal_of(run.main, images.main, images.PRESETS, argv=[*flags, "--steps", "3"], progress=True)
    assert re.search(r"training must be that of the run so far, but training was mine.py:Mine \(\w+\), now mine", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--network unet --width 4 --multipliers 1 --blocks 1 --no-labels --augmentation 0.5 --flips",
        "--depth 1 --heads 2 --references 16 --flips --identity-share 0",
        "--network unet --width 4 --multipliers 1 2 --blocks 1 --dropout 0.1 --bfloat16 --mix 0.5",
        "--preset quick --network unet --width 4",
        "--preset any-guidance --depth 1 --heads 2 --sample-scale 1 6 --sample-interval 0.2 0.8",
        "--preset any-guidance --network unet --width 4 --multipliers 1 --blocks 1 --sample-scale 3",
        "--depth 1 --heads 2 --method TerminalVelocityMatching --mix 0.5",
        "--depth 1 --heads 2 --method InductiveMomentMatching",
        "--depth 1 --heads 2 --method ContinuousConsistency",
        "--depth 1 --heads 2 --identity mine.py:Mine --guidance-input --sample-scale 3",
    ],
)
def test_every_kind_of_network_and_target_trains(flags, images, here):
    (here / "mine.py").write_text(OWN)
    run.main(images.main, images.PRESETS, argv=f"{DATA} {flags} --test-run".split())
    (row, *_, last) = json.loads(next(here.glob("runs/*/*/results.json")).read_text())
    assert np.isfinite(row["frechet"]["pixels"])
    expected = ("Flow Matching", 16) if "--identity-share 0" in flags else ("MeanFlow", 4)
    if "--method" in flags:
        expected = flags.split("--method ")[1].split()[0], 4
    if "mine.py" in flags:
        expected = "Mine, guidance 3", 4
    if "any-guidance" in flags:
        expected = f"ImprovedMeanFlow, guidance {6 if '6' in flags else 3}", 4
        (weights,) = here.glob("runs/*/*/ema.safetensors")
        assert checkpoint.read_weights(weights).notes.trained.guidance == mfx.GuidanceRange(1.0, 8.0, 0.5)
    assert (last["what"], last["evaluations"]) == expected


# What it reads


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_mnist_has_its_own_test_images(suffix, sources, here):
    save_mnist("mnist", suffix)
    train, test, names = sources.open_parts(["mnist"], [], size=(), holdout=0.1)
    np.testing.assert_array_equal(train.take(np.arange(40)).x, X)
    np.testing.assert_array_equal(test.take(np.arange(6)).x, 255 - X[:6])
    assert (train.labels, test.labels, names) == (3, 3, None)


def test_fashion_mnist_is_known_by_its_place_and_has_names_of_its_classes(sources, here, monkeypatch):
    save_mnist("mnist")
    assert sources.open_images(["mnist"]).class_names is None
    monkeypatch.setattr(sources, "FASHION_MNIST", "mnist")
    images, labels = sources.mnist_files(here / "mnist", "train")
    for paths in (["mnist"], ["mnist/"], [f"mnist/{images.name}", f"mnist/{labels.name}"]):
        assert sources.open_images(paths).class_names[9] == "boot"
    assert sources.open_images([f"mnist/{images.name}"]).class_names is None
    assert sources.open_images([f"mnist/{images.name}", "labels"]).class_names is None


def test_folders_beside_the_files_of_mnist_are_passed_over(sources, here):
    """Archives of MNIST have each file twice, once in a folder of nearly its name."""
    save_mnist("mnist")
    os.makedirs(here / "mnist" / "train-images-(idx3-ubyte)")
    assert [path.name for path in sources.mnist_files(here / "mnist", "train")] == [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]


def test_shards_keep_the_names_of_classes_and_test_images_must_not_have_others(sources, here):
    for folder, names in (("named", ("a", "b", "c")), ("other", ("a", "c", "b")), ("unnamed", None)):
        data.write_shards(data.ArraySource(X, LABEL, class_names=names), folder)
    assert sources.open_parts(["named"], ["unnamed"], size=(), holdout=0.1).class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"other: class_names must be \('a', 'b', 'c'\) as in named, got"):
        sources.open_parts(["named"], ["other"], size=(), holdout=0.1)


def test_cifar10_has_its_own_test_images(sources, here):
    x, label = DRAWS.integers(0, 256, (12, 3, 32, 32), np.uint8), np.arange(12) % 10
    image_files.save_cifar10("cifar", x[:10], label[:10], test=(x[10:], label[10:]))
    train, test, _ = sources.open_parts(["cifar"], [], size=(), holdout=0.1)
    np.testing.assert_array_equal(train.take(np.arange(10)).x, x[:10])
    np.testing.assert_array_equal(test.take(np.arange(2)).x, x[10:])


def test_folders_give_their_names_to_the_classes(sources, here):
    save_folder("pets")
    train, test, names = sources.open_parts(["pets"], [], size=(8,), holdout=0.2)
    assert names == ("cat", "dog") and (len(train), len(test)) == (8, 2)
    assert train.row_shape == (3, 8, 8) and train.labels == 2


def test_grey_images_in_files_of_three_colours_become_what_they_were(sources, here):
    save_folder("plain", classes=None)
    train, _, names = sources.open_parts(["plain"], [], size=(8,), holdout=0.2, grey=True)
    found = train.take(np.arange(8))
    assert names is None and found.label is None
    assert {x.tobytes() for x in found.x} < {x.tobytes() for x in X[:10]}


def test_files_that_are_no_images_are_told(sources, here, capsys):
    save_folder("plain", classes=None)
    (here / "plain" / "notes.txt").write_text("")
    sources.open_images(["plain"], size=(8,))
    assert capsys.readouterr().out == "plain: 10 images, resized and cropped to 8 x 8; passed over: 1 .txt\n"


def test_images_may_have_two_sides(sources, here):
    save_folder("plain", classes=None)
    assert sources.open_parts(["plain"], [], size=(4, 6), holdout=0.2).train.row_shape == (3, 4, 6)


def test_held_out_images_are_no_training_images(sources, here):
    train, test, _ = sources.open_parts(["idx"], [], size=(), holdout=0.25)
    rows = [{x.tobytes() for x in part.take(np.arange(len(part))).x} for part in (train, test)]
    assert [*map(len, rows)] == [30, 10] and not rows[0] & rows[1]
    again = sources.open_parts(["idx"], [], size=(), holdout=0.25).test
    np.testing.assert_array_equal(again.take(np.arange(10)).x, test.take(np.arange(10)).x)


def test_shards_are_read_and_other_test_images_may_be_given(sources, here):
    data.write_shards(data.ArraySource(X, LABEL), "shards")
    save_mnist("mnist")
    train, test, _ = sources.open_parts(["shards"], ["mnist"], size=(), holdout=0.1)
    assert (len(train), len(test), train.labels) == (40, 6, 3)


# What it computes


def test_references_are_the_training_images_and_their_mirror_images(images):
    source = data.ArraySource(X, LABEL)
    target = images.stable_target(images.Config(references=16, flips=True), source, 3, None)
    row = jax.vmap(images.prepare(images.Config(), 3), in_axes=(0, None))
    x = row(mfx.Batch(jnp.asarray(X), jnp.asarray(LABEL), jnp.arange(40)), jr.key(0)).x
    np.testing.assert_allclose(target.x, np.concatenate([x, x[..., ::-1]]), atol=1e-6)
    np.testing.assert_array_equal(target.label, np.tile(LABEL, 2))
    assert target.number == 16


def test_samples_do_not_depend_on_how_many_are_generated_at_once(images, monkeypatch):
    (sampler,), label = images.make_samplers(images.Config(), 3, None), LABEL[:7].astype(np.int32)
    whole = sampler(Known(), label, 1, 0)
    monkeypatch.setattr(images.image_samples, "GENERATED_AT_ONCE", 3)
    np.testing.assert_array_equal(sampler(Known(), label, 1, 0), whole)
    np.testing.assert_array_equal(np.round(whole.mean(axis=(1, 2, 3))), -label)
    assert len({x.tobytes() for x in whole}) == 7


@pytest.mark.parametrize("preset", ["default", "quick", "guided", "any-guidance", "gpu"])
def test_every_preset_has_a_unet(images, preset):
    config = dataclasses.replace(images.PRESETS[preset][1], network="unet")
    field = eqx.filter_eval_shape(lambda: images.make_field(config, (1, 28, 28), 10, jr.key(0)))
    assert isinstance(field, mfx.UNet)


def test_flow_matching_draws_one_time_and_mean_flow_the_larger_of_two(images):
    assert images.objective(images.Config(identity_share=0.0), 3).boundary_times == mfx.LogitNormalTimes(-0.4, 1)
    assert images.objective(images.Config(), 3).boundary_times is None


def test_every_method_is_made_for_the_steps_of_the_run_and_sampled_by_its_name(images):
    known = mfx.identities_in(vars(mfx), 100)
    for name, identity in known.items():
        config = images.Config(method=name, steps=100)
        assert repr(images.objective(config, 3).identity) == repr(identity)
        (sampler,) = images.make_samplers(config, 3, None)
        expected = mfx.sample_consistency if identity.facts.ends_at_data else mfx.sample
        assert (sampler.name, sampler.method) == (name, expected)
    assert repr(known["AlphaFlow"]) != repr(mfx.AlphaFlow.for_training(200))


def test_methods_whose_rows_do_not_use_the_velocity_of_the_data_get_no_weight_unless_it_is_asked_for(images):
    powers = {
        name: images.objective(images.Config(method=name), 3).weight.power for name in mfx.identities_in(vars(mfx), 1)
    }
    assert {name: powers[name] for name in ("MeanFlow", "AlphaFlow", "Shortcut", "InductiveMomentMatching")} == {
        "MeanFlow": 0.5,
        "AlphaFlow": 0.5,
        "Shortcut": 0.0,
        "InductiveMomentMatching": 0.0,
    }
    assert images.objective(images.Config(identity_share=0.0), 3).weight.power == 0
    assert images.objective(images.Config(method="Shortcut", power=0.5), 3).weight.power == 0.5


def test_guidance_as_an_input_trains_improved_mean_flow_unless_another_method_is_asked_for(images):
    given = [images.objective(images.Config(guidance_input=True, method=name), 3) for name in (None, "MeanFlow")]
    assert [type(loss.identity) for loss in given] == [mfx.ImprovedMeanFlow, mfx.MeanFlow]
    assert all(isinstance(loss.guidance, mfx.DrawnGuidance) for loss in given)


def test_more_steps_are_another_training_of_a_method_with_a_schedule_alone(images):
    def name(**options):
        return images.training_name(images.Config(**options))

    assert name(steps=100) == name(steps=200) == ""
    assert name(method="AlphaFlow", steps=100) == "AlphaFlow for 100 steps" != name(method="AlphaFlow", steps=200)


def test_a_class_without_test_images_is_white_in_the_comparison(images, monkeypatch):
    drawn, samples = [], images.image_samples
    monkeypatch.setattr(samples.picture, "save_image_grid", lambda path, x, *others, **options: drawn.append(x))
    rows = data.ArraySource(X[:2], np.array([2, 0], np.int32), labels=3).take(np.arange(2))
    samples.save_comparison([samples.Sampler("", mfx.sample, (), 1, 3)], Known(), rows, "comparison.png")
    np.testing.assert_allclose(drawn[0][0], [X[1] / 127.5 - 1, np.ones((1, 8, 8)), X[0] / 127.5 - 1], atol=1e-6)


def test_a_share_that_leaves_no_room_for_dropped_labels_is_allowed_without_labels(images):
    images.Config(identity_share=0.95, batch=160, labels=False)
    with pytest.raises(ValueError, match="label"):
        images.Config(identity_share=0.95, batch=160)


# Bad input


@pytest.fixture(scope="module")
def refused(images, tmp_path_factory):
    """A directory with data of every kind."""
    root = tmp_path_factory.mktemp("refused")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_inputs()
        save_folder("pets")
        save_mnist("mnist")
        image_files.save_idx("others", X[:, 0])
        (root / "mine.py").write_text(OWN)
        (root / "net.py").write_text(OWN_NETWORK)
        os.makedirs("empty")
        data.write_shards(data.ArraySource(X.astype(np.float32)), "floats")
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data", "--data must be one path, or IDX files of images and of labels, got 0 paths"),
        (
            "--data mnist --test mnist/train-images-idx3-ubyte",
            "test must be other images than those that are trained on",
        ),
        ("--test missing --data pets --holdout 0.2", "--test must be files or folders that exist, got missing"),
        ("--data missing", "--data must be files or folders that exist, got missing"),
        ("--data pets", "size must be given for a folder of images, in pixels, got none for pets"),
        (
            "--data pets/cat/00.png",
            "error: pets/cat/00.png: must be a folder of images, got one image: give the folder that it is in",
        ),
        (
            "--data pets --test pets/ --size 8",
            "test must be other images than those that are trained on, got pets/ for both",
        ),
        (
            "--data idx --size 4",
            "size must be left out, or 8 8 for training images of idx, which are not resized, got 4",
        ),
        (
            "--data idx labels --test mnist --holdout 0.2",
            "holdout must be left out where there are test images, got 0.2",
        ),
        ("--data empty --size 8", "empty: must hold images, .* got none"),
        ("--data idx labels labels", "data must be one path, or IDX files of images and of labels, got 3 paths"),
        ("--data floats", r"floats: must hold images of uint8 .* got float32 of shape \(1, 8, 8\)"),
        (
            "--data idx labels --test others",
            "test must have labels as the training images have, got none in test images",
        ),
        ("--data idx --test pets --size 8", r"pets: row_shape must be \(1, 8, 8\) as in idx, got \(3, 8, 8\)"),
        ("--data idx --batch 48", r"batch must lie in \[1, 36\], the rows of training images of idx, got 48"),
        ("--data idx --batch 8 --mix 0.5", "scale must be 1 and mix 0 without labels, got 1.0 and 0.5"),
        ("--data idx --batch 8 --patch 3", r"patch must divide the sides of data_shape \(1, 8, 8\), got 3"),
        ("--data idx --batch 8 --start nowhere", "--start: No such file or directory: 'nowhere'"),
        ("--data idx --batch 8 --network unet --attention 7", r"attention must be among the resolutions \[8, 4, 2\]"),
        ("--data idx --batch 8 --network unet --width 6", "width must be a positive multiple of 4, got 6"),
        ("--size 8 8 8", "--size must be a side, or height and width, got 3 numbers"),
        ("--size 8 0", "--size must be >= 1, got 0"),
        ("--heads 5", "--width must be a multiple of heads"),
        ("--batch 7", "--batch must be a positive multiple of 2"),
        ("--holdout 1", r"--holdout must lie in \(0, 1\), got 1.0"),
        ("--network mlp", "--network must be dit, unet or a class as mine.py:Net, got mlp"),
        (
            "--network net.py:Other",
            "--network must name a subclass of AbstractField in net.py, which has Net; got Other",
        ),
        ("--network net.py:Net --width 8", "--width must be left out with --network net.py:Net, a network of your own"),
        ("--network net.py --preset gpu", "--bfloat16 must be left out with --network net.py, a network of your own"),
        ("--network net.py --preset any-guidance", "--guidance-input must be left out with --network net.py"),
        ("--network net.py --augmentation 0.1", "--augmentation must be 0 for a network of your own"),
        ("--samples 1", "--samples must be 0 or at least 2, got 1"),
        ("--method Mean", "--method must be among AlignYourFlow, .*; got Mean"),
        ("--identity mine.py", "--identity must be FILE.py:CLASS .*; got mine.py, which defines Mine, Triples"),
        ("--identity mine.py:Mine --method MeanFlow", "--method must be left out with identity, which is one, got Mea"),
        ("--method Shortcut --identity-share 0", "--identity-share must be > 0 for Shortcut, got 0, which is Flow Mat"),
        ("--method Shortcut --identity-share 1", "--identity-share must be below 1 for Shortcut"),
        ("--identity mine.py:Triples", "--batch must be a positive multiple of 6 .* for groups of 3 rows.*, got 16"),
        (
            "--identity mine.py:Triples --batch 18 --mix 0.5",
            "--scale must be 1 and mix 0 for Triples, whose rows share times, got 1.0 and 0.5",
        ),
        (
            "--method ConsistencyTraining --guidance-input",
            "--guidance-input must be left out for Cons.*, which learns from pairs of an image and noise, got True",
        ),
        (
            "--method InductiveMomentMatching --references 8",
            "--references must be 0 for Ind.*, which learns from pairs of an image and noise, got 8",
        ),
        ("--learning-rate 2", r"--learning-rate must lie in \(0, 1\), got 2.0"),
        ("--label-dropout 0 --mix 0.5", "--label-dropout must be > 0 with guidance"),
        ("--augmentation 0.1", "--augmentation must be 0 for a DiT"),
        ("--network unet --augmentation 0.1", "--augmentation must be 0 with label_dropout"),
        ("--network unet --no-labels --augmentation 2", r"--augmentation must lie in \[0, 1\], got 2.0"),
        (
            "--network unet --no-labels --augmentation 0.1 --references 8",
            "--references must be 0 with augmentation, got 8",
        ),
        ("--dropout 0.2", "--dropout must be left out with --network dit, which has none, got 0.2"),
        ("--attention 16", r"--attention must be left out with --network dit, which has none, got \(16,\)"),
        (
            "--network unet --depth 4",
            "--depth must be left out with --network unet, which has none, got 4",
        ),
        ("--no-labels --guidance-input", "--guidance-input must be left out without labels, got True"),
        ("--data idx --batch 8 --guidance-input", "guidance.input must be left out without labels, got True"),
        ("--guidance-input --mix 0.5", "scale, mix and interval must be 1, 0 and .* with guidance_input, got 1, 0.5"),
        ("--guidance-input --identity-share 0", "--identity-share must lie between 0 and 1 with guidance_input"),
        ("--guidance-input --label-dropout 0", "--label-dropout must be > 0 with guidance"),
        ("--guidance-input --sample-scale 1 9", r"--sample-scale must lie in \[1, 8\], got 9"),
        (
            "--guidance-input --sample-interval 0.6 1",
            r"--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1, got",
        ),
        (
            "--guidance-input --sample-interval 0.2 1.5",
            r"--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1, got 0.2 1.5",
        ),
        ("--sample-scale 3", r"--sample-scale must be left out without guidance_input, got \(3.0,\)"),
        ("--sample-interval 0 0.5", r"--sample-interval must be left out without guidance_input, got \(0.0, 0.5\)"),
        ("--interval 0 0.5", r"--interval must be left out without guidance, got \(0.0, 0.5\)"),
        ("--label-dropout 0.6", r"--label-dropout must lie in \[0, 1 - identity_share = 0.5\], got 0.6"),
        ("--guidance-input --label-dropout 0.6", r"--label-dropout must lie in \[0, 1 - identity_share = 0.5\]"),
        ("--no-labels --mix 0.5", "--scale must be 1 and mix 0 without labels, got 1.0 and 0.5"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(images, arguments, message, refusal_of, refused, monkeypatch):
    monkeypatch.chdir(refused)
    before = {*os.listdir(), "runs"}
    line = refusal_of(run.main, images.main, images.PRESETS, argv=arguments.split())
    assert re.search(message, line), line
    assert {*os.listdir(), "runs"} == before and not list(refused.glob("runs/*/*"))


@pytest.mark.parametrize("package", ["matplotlib", "safetensors"])
def test_a_missing_package_is_refused_before_anything_is_read(images, package, refusal_of, here, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    line = refusal_of(run.main, images.main, images.PRESETS, argv=["--data", "missing"])
    assert f"error: {package} is not installed" in line
