"""Dress rehearsals: from images to numbers and pictures by the command lines of all scripts, with tiny networks.

CIFAR-10:   its files -> cifar10.py -> evaluate.py
ImageNet:   folders of images -> prepare_latents.py -> imagenet_latents.py -> evaluate.py
            the same with improved MeanFlow, whose weights are sampled at several scales of guidance

Inception has random weights; its whole size for ImageNet, whose protocol `test_evaluate.py` leaves to this file.
"""

import json
import os
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import checkpoint, data, metrics, run, vae

TESTS = pathlib.Path(__file__).parents[1]
DRAWS = np.random.default_rng(3)
JUDGED = "--inception random --samples 10 --batch 10"
NUMBERS = ("fid", "inception_score", "kid", "precision_recall")


class Brightness(eqx.Module):
    """A network in place of Inception that is cheap: features are brightnesses of three strips of each channel."""

    weight: jax.Array

    def __init__(self, *, key):
        self.weight = jnp.ones(())

    def __call__(self, x):
        strips = [part.mean(axis=(2, 3)) for part in jnp.split(x, [100, 200], axis=2)]
        pooled = self.weight * jnp.concatenate(strips, axis=1)
        return metrics.Features(pooled, 10 * pooled[:, :4])


@pytest.fixture(scope="module")
def command(experiment):
    """A script by its name, from a command line in a folder; returns the directory of the run, if it makes one."""
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)

    def command(folder, name, arguments, **replaced):
        script = experiment(name)
        presets = getattr(script, "PRESETS", None) or script.Config()
        before = set(folder.glob("runs/*/*"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", [f"{name}.py"])
            for attribute, value in replaced.items():
                patch.setattr(script, attribute, value)
            run.main(script.main, presets, argv=arguments.split())
        return next(iter(set(folder.glob("runs/*/*")) - before), None)

    return command


def kept_states(script):
    """Its function `save`, and a list that it leaves the last state in."""
    states, save = [], script.save
    return states, lambda *given: states.append(given[2]) or save(*given)


def load(path):
    """The field of a file, and what the file says of it."""
    weights = checkpoint.read_weights(path)
    return weights.fill(weights.make_network), weights


def check_training(directory, state, steps):
    """It took all its steps, and every part of the network moved without a fault."""
    records = run.RunDirectory(directory).records()
    assert [record["step"] for record in records] == list(range(2, steps + 1, 2))
    assert all(np.isfinite(record["loss"]) for record in records)
    assert (int(state.step), int(state.faults.total)) == (steps, 0)
    assert checkpoint.Checkpoints(directory / "checkpoints").steps() == [steps]


def check_numbers(directory, protocol, pictures):
    """One row of finite numbers that are marked as no real ones, and pictures."""
    (row,) = json.loads((directory / "results.json").read_text())
    assert np.isfinite([number for name in NUMBERS for number in np.ravel(row[name])]).all()
    assert row["fid"] > 0 and (row["protocol"], row["samples"]) == (protocol, 10)
    table = (directory / "results.md").read_text()
    assert "RANDOM" in table and f"{row['fid']:.4g}"[:4] in table
    assert sorted(path.name for path in directory.glob("*.png")) == pictures
    return row


def size_of(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def square(count, side):
    """Side of a picture of count x count images: borders of 8 pixels, gaps of 4."""
    return 16 + count * side + 4 * (count - 1)


# CIFAR-10

PIXELS = DRAWS.integers(0, 256, (20, 3, 32, 32), np.uint8)
CIFAR10 = (
    "--data cifar --width 4 --multipliers 1 --blocks 1 --attention --decays 0.9 0.5 --average-every 1 --batch 8 "
    "--warmup 2 --steps 4 --save-every 4 --preview-every 0 --log-every 2"
)


@pytest.fixture(scope="module")
def trained_on_cifar10(command, experiment, tmp_path_factory):
    """Folder, run directory, and the last state."""
    root = tmp_path_factory.mktemp("cifar10")
    os.makedirs(root / "cifar")
    records = np.concatenate([DRAWS.integers(0, 10, (20, 1), np.uint8), PIXELS.reshape(20, -1)], axis=1)
    for number, part in enumerate(np.split(records, 5)):
        part.tofile(root / f"cifar/data_batch_{number + 1}.bin")
    states, save = kept_states(experiment("cifar10"))
    directory = command(root, "cifar10", CIFAR10, save=save)
    return root, directory, states[0]


@pytest.mark.slow
def test_cifar10_trains_on_files_of_cifar10(trained_on_cifar10):
    _, directory, state = trained_on_cifar10
    assert directory.parent.name == "cifar10"
    check_training(directory, state, 4)


@pytest.mark.slow
def test_weights_on_disk_are_the_averages_and_tell_what_they_are_of(trained_on_cifar10):
    _, directory, state = trained_on_cifar10
    for decay, average in zip((0.9, 0.5), state.averages, strict=True):
        field, weights = load(directory / f"ema_{decay}.safetensors")
        assert bool(eqx.tree_equal(field, average))
        notes, network = weights.notes, weights.network
        assert (notes.decay, notes.steps, weights.config["data"], network["dropout"]) == (decay, 4, "cifar", 0.2)
    assert not eqx.tree_equal(*state.averages)


@pytest.mark.slow
def test_cifar10_leaves_squares_of_64_samples(trained_on_cifar10):
    _, directory, _ = trained_on_cifar10
    for name in ("samples_1.png", "samples_2.png"):
        scale = round(48 / 32)
        assert size_of(directory / name) == (square(8, 32 * scale),) * 2
    assert (directory / "curves.png").stat().st_size > 0


@pytest.mark.slow
def test_cifar10_weights_are_judged(trained_on_cifar10, command, monkeypatch):
    monkeypatch.setattr(metrics, "Inception", Brightness)
    root, directory, _ = trained_on_cifar10
    weights = (directory / "ema_0.9.safetensors").relative_to(root)
    judged = command(root, "evaluate", f"--weights {weights} --protocol cifar_train --reference cifar {JUDGED}")
    row = check_numbers(judged, "CIFAR-train", ["samples_1.png"])
    assert row["reference_images"] == 20 and row["notes"]["decay"] == 0.9


# ImageNet

TINY_VAE = vae.AutoencoderSize(widths=(4, 8, 8), blocks=1, latent=4, groups=2)
TOKENIZER = "--vae vae --size 16"
DIT = (
    "--preset B/2 --data latents --vae vae --depth 1 --width 16 --heads 2 --batch 8 --epochs 2.6 "
    "--decay 0.9 --learning-rate 1e-2 --save-every 4 --preview-every 4 --log-every 2"
)


IMPROVED = (
    "--preset iMF-tiny --data latents --vae vae --depth 2 --width 16 --heads 2 --batch 8 --epochs 2.6 "
    "--decay 0.9 --learning-rate 1e-2 --save-every 4 --preview-every 4 --log-every 2"
)


@pytest.fixture(scope="module")
def encoded(command, room, tmp_path_factory):
    """A folder with images of three classes, a small tokenizer, and the latents that the script makes of them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("imagenet")
    for number in range(12):
        path = root / f"images/class_{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DRAWS.integers(0, 256, (16 + number, 40, 3), np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "vae")
        import diffusers_files

        diffusers_files.write_folder(root / "vae", TINY_VAE)
    command(root, "prepare_latents", f"--images images --to latents --parts 2 --batch 6 {TOKENIZER}")
    return root


@pytest.fixture(scope="module")
def trained_on_latents(encoded, command, experiment):
    states, save = kept_states(experiment("imagenet_latents"))
    return encoded, command(encoded, "imagenet_latents", DIT, save=save), states[0]


@pytest.mark.slow
def test_images_become_latents(encoded):
    assert sorted(path.name for path in (encoded / "latents").iterdir()) == ["latents.json", "part_0000", "part_0001"]
    parts = [data.ShardSource(encoded / f"latents/part_000{number}", verify=True) for number in range(2)]
    assert [(len(part), part.row_shape, part.labels) for part in parts] == [(6, (8, 4, 4), 3)] * 2


@pytest.mark.slow
def test_imagenet_trains_with_guidance_on_latents(trained_on_latents):
    _, directory, state = trained_on_latents
    check_training(directory, state, 4)  # 2.6 epochs of 12 latents in batches of 8, rounded up
    config = json.loads((directory / "config.json").read_text())["config"]
    assert (config["scale"], config["mix"]) == (1.0, 0.5)


@pytest.mark.slow
def test_average_on_disk_is_the_average_and_tells_what_it_is_of(trained_on_latents):
    _, directory, state = trained_on_latents
    field, weights = load(directory / "ema_0.9.safetensors")
    assert bool(eqx.tree_equal(field, state.averages[0]))
    notes, learnt = weights.notes, {"data": "latents", "guidance": [1.0, 0.5, [0.0, 1.0]]}
    assert (notes.decay, notes.steps, weights.network["labels"], weights.config) == (0.9, 4, 3, learnt)
    assert notes.tokenizer.size == TINY_VAE and notes.class_names == ("class_0", "class_1", "class_2")
    assert notes.trained == mfx.Trained(average=True, null_velocity=True, null_average=False)


@pytest.mark.slow
def test_imagenet_leaves_squares_of_16_decoded_samples(trained_on_latents):
    _, directory, _ = trained_on_latents
    for name in ("samples.png", "previews/00000004.png"):
        assert size_of(directory / name) == (square(4, 16 * round(48 / 16)),) * 2
    assert (directory / "curves.png").stat().st_size > 0


@pytest.mark.slow
def test_imagenet_weights_are_judged(trained_on_latents, command):
    root, directory, _ = trained_on_latents
    weights = (directory / "ema_0.9.safetensors").relative_to(root)
    flags = "--vae vae --protocol adm --reference images --reference-count 10 --decode-batch 10"
    judged = command(root, "evaluate", f"--weights {weights} {flags} {JUDGED}")
    row = check_numbers(judged, "ADM", ["samples_1.png"])
    assert row["reference_images"] == 10 and row["vae"] == row["notes"]["tokenizer"]["digest"]


# Improved MeanFlow


@pytest.fixture(scope="module")
def improved(encoded, command, experiment):
    states, save = kept_states(experiment("imagenet_latents"))
    return encoded, command(encoded, "imagenet_latents", IMPROVED, save=save), states[0]


@pytest.mark.rehearsal
def test_improved_mean_flow_trains_on_latents(improved):
    _, directory, state = improved
    check_training(directory, state, 4)
    assert all(np.isfinite(record["velocity_error"]) for record in run.RunDirectory(directory).records())
    assert size_of(directory / "samples.png") == (square(4, 16 * round(48 / 16)),) * 2


@pytest.mark.rehearsal
def test_weights_of_improved_mean_flow_have_no_velocity_head_and_know_the_scales_of_their_training(improved):
    _, directory, state = improved
    field, weights = load(directory / "ema_0.9.safetensors")
    assert bool(eqx.tree_equal(field, state.averages[0].without_velocity_head()))
    expected = mfx.Trained(True, null_velocity=True, null_average=False, guidance=mfx.GuidanceRange(1.0, 8.0, 0.5))
    assert weights.notes.trained == expected
    assert (weights.network["network"], weights.network["guidance"]) == ("InContextDiT", True)


@pytest.mark.rehearsal
def test_improved_mean_flow_is_shown_over_scales_and_intervals(improved, command):
    root, directory, _ = improved
    weights = (directory / "ema_0.9.safetensors").relative_to(root)
    sweep = "--guidance-scale 1 6 --guidance-interval 0 1 0.4 0.65"
    judged = command(root, "evaluate", f"--weights {weights} --vae vae --grid-only --decode-batch 8 --batch 8 {sweep}")
    names = ["samples_1.png", "samples_1_guidance_6.png", "samples_1_guidance_6_in_0.4_0.65.png"]
    assert sorted(path.name for path in judged.glob("*.png")) == sorted([*names, "samples_1_in_0.4_0.65.png"])


@pytest.mark.rehearsal
def test_pictures_of_improved_mean_flow_show_one_noise_over_the_scales(improved, command, experiment, monkeypatch):
    (root, directory, _), grids = improved, []
    picture = experiment("generate").picture
    monkeypatch.setattr(picture, "save_image_grid", lambda path, grid, *others, **names: grids.append(grid))
    weights = (directory / "ema_0.9.safetensors").relative_to(root)
    flags = "--vae vae --guidance-scale 1 2 4 8 --guidance-interval 0.4 0.6"
    command(root, "generate", f"--weights {weights} --to row.png {flags}")
    (grid,) = grids
    assert grid.shape[:3] == (4, 3, 3) and np.isfinite(grid).all()
    apart, along = (np.abs(np.diff(grid, axis=axis)).mean() for axis in (0, 1))
    assert along > 10 * apart  # after four steps scales differ by little, noises by much


@pytest.mark.slow
def test_improved_mean_flow_goes_on_from_the_directory_of_its_run(improved, command, experiment):
    root, directory, _ = improved
    states, save = kept_states(experiment("imagenet_latents"))
    command(root, "imagenet_latents", f"{IMPROVED} --seed 1 --start {directory} --epochs 0.6", save=save)
    assert int(states[0].step) == 1 and states[0].field.has_velocity_head
