"""Saved weights are judged by one command: its numbers, pictures and refusals, and that nothing is computed twice."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from image_files import save_cifar10
from random_tensors import random_tensor

import mf_eqx as mfx
from mf_eqx import checkpoint, data, metrics, picture, run, vae

TESTS = pathlib.Path(__file__).parents[1]
TINY_VAE = vae.AutoencoderSize(widths=(4, 4), blocks=1, latent=4, groups=2)
IMAGES = np.random.default_rng(7).integers(0, 256, (20, 3, 32, 32), np.uint8)
ARGUMENTS = "--weights dit.safetensors --inception random --protocol cifar_train --reference cifar"
ARGUMENTS += " --samples 16 --batch 16"
INCEPTION = metrics.Inception
LATENT = "--weights latent.safetensors --vae vae.safetensors --inception random --protocol adm --reference images"


class Means(eqx.Module):
    """A network that is cheap: features are means of three strips of each channel."""

    weight: jax.Array

    def __init__(self, *, key):
        self.weight = jnp.ones(())

    def __call__(self, x):
        ends = [64 * x.shape[2] // 299, 150 * x.shape[2] // 299]
        strips = [part.mean(axis=(2, 3)) for part in jnp.split(x, ends, axis=2)]
        pooled = self.weight * jnp.concatenate(strips, axis=1)
        return metrics.Features(pooled, 10 * pooled[:, :4])


@pytest.fixture(scope="module")
def evaluate(experiment):
    pytest.importorskip("safetensors")
    return experiment("evaluate")


def save_network(path, make, start="", notes=None):
    """Random weights that nothing had to be compiled for."""

    def fill(path, leaf):
        shape = getattr(leaf, "shape", None)
        return leaf if shape is None else jax.device_put(random_tensor(start + jax.tree_util.keystr(path), shape, 1.5))

    field = jax.tree_util.tree_map_with_path(fill, eqx.filter_eval_shape(make))
    checkpoint.save_weights(
        path, field, {"data": "drawn"}, notes or checkpoint.Notes(pixels=(-1, 1), decay=0.99, steps=7)
    )
    return field


def dit(shape=(3, 32, 32), labels=None):
    return lambda: mfx.DiT(shape, mfx.DiTSize(1, 8, 2, 8), labels=labels, key=jr.key(0))


LATENTS = checkpoint.Notes(
    pixels=(-1, 1),
    tokenizer=checkpoint.Tokenizer(TINY_VAE),
    trained=mfx.Trained(average=True, null_velocity=True, null_average=True),
)


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """The folder of what is judged, and the networks in it."""
    root = tmp_path_factory.mktemp("files")
    unet = eqx.Partial(mfx.UNet, (3, 32, 32), mfx.UNetSize(4, (1,), 1, ()), key=jr.key(0))
    made = {"unet": unet, "dit": dit(), "small": dit((3, 16, 16)), "grey": dit((1, 32, 32))}
    found = {name: save_network(root / f"{name}.safetensors", make) for name, make in made.items()}
    found["latent"] = save_network(root / "latent.safetensors", dit((4, 16, 16), labels=3), notes=LATENTS)
    save_cifar10(root / "cifar", IMAGES)
    data.write_shards(data.ArraySource(IMAGES), root / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "vae")
        import diffusers_files

        diffusers_files.write_file(root / "vae.safetensors", diffusers_files.tensors(TINY_VAE))
    return root, found


@pytest.fixture
def judge(evaluate, fields, tmp_path, monkeypatch):
    """The command, in a folder of its own, with the cheap network in place of Inception."""
    for entry in fields[0].iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "Inception", Means)

    def judge(arguments):
        run.main(evaluate.main, evaluate.Config(), argv=arguments.split())
        directories = list(pathlib.Path("runs").glob("*/*"))
        return max(directories, key=lambda path: path.stat().st_mtime_ns, default=None)

    return judge


def results(directory):
    return json.loads((directory / "results.json").read_text())


def drawn(field, numbers, seed=0, label=lambda i: None):
    """Samples in one evaluation: the noise of sample i follows from the seed and i."""

    @jax.jit
    def one(i):
        eps = jr.normal(jr.split(jr.fold_in(jr.key(seed), i))[0], field.data_shape)
        return eps - field(eps, jnp.zeros(()), jnp.ones(()), label(i))

    return jnp.stack([one(jnp.asarray(i)) for i in range(numbers)])


def features_of(pixels):
    """What `Means` says of images under a CIFAR protocol, and its moments, in NumPy."""
    x = np.asarray(metrics.CIFAR_TRAIN(jnp.asarray(pixels)))
    strips = [part.mean(axis=(2, 3)) for part in np.split(x.astype(np.float64), [64, 150], axis=2)]
    features = np.concatenate(strips, axis=1)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet(a, b):
    linalg = pytest.importorskip("scipy.linalg")
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = linalg.sqrtm(cov_a @ cov_b).real
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)


@pytest.fixture
def seen(monkeypatch):
    """The images of each set of which features are taken: those of the reference, then those of each row."""
    sets, original = [], metrics.collect_features

    def collect_features(extractor, batches, count):
        held = [np.asarray(x) for x in batches]
        sets.append(np.concatenate(held)[:count])
        return original(extractor, held, count)

    monkeypatch.setattr(metrics, "collect_features", collect_features)
    return sets


# Numbers


def check_rehearsal(directory, out):
    """Numbers, a picture and a warning are there."""
    (row,) = results(directory)
    numbers = [row["fid"], *row["inception_score"], *row["kid"], *row["precision_recall"]]
    assert np.isfinite(numbers).all() and row["fid"] > 0
    assert (directory / "samples_1.png").read_bytes().startswith(b"\x89PNG")
    assert "RANDOM weights: these numbers rehearse" in out and out.startswith((directory / "results.md").read_text())


def test_a_rehearsal_leaves_numbers_pictures_and_a_warning(judge, capsys):
    check_rehearsal(judge(ARGUMENTS), capsys.readouterr().out)


def test_samples_in_grey_are_held_against_images_in_grey(judge, capsys):
    data.write_shards(data.ArraySource(IMAGES[:, :1]), "in_grey")
    directory = judge(f"{ARGUMENTS} --weights grey.safetensors --protocol adm --reference in_grey")
    check_rehearsal(directory, capsys.readouterr().out)


@pytest.mark.slow
def test_a_rehearsal_with_the_whole_inception(judge, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "Inception", INCEPTION)
    arguments = f"{ARGUMENTS} --weights unet.safetensors --samples 10 --batch 10 --reference-count 10"
    check_rehearsal(judge(arguments), capsys.readouterr().out)


def test_numbers_tell_all_that_they_depend_on(judge):
    (row,) = results(judge(f"{ARGUMENTS} --reference-count 10"))
    assert row["weights"] == hashlib.sha256(pathlib.Path(row["files"]["weights"]).read_bytes()).hexdigest()
    assert len(row["inception"]) == len(row["reference"]) == 64 and row["weights"] != row["inception"]
    assert (row["notes"]["decay"], row["notes"]["steps"], row["network"]["network"]) == (0.99, 7, "DiT")
    assert (row["protocol"], row["samples"], row["seed"], row["times"]) == ("CIFAR-train", 16, 0, [1.0, 0.0])
    assert (row["batch"], row["reference_count"], row["reference_images"], row["vae"]) == (16, 10, 10, None)
    assert row["files"]["reference"] == "cifar" and row["versions"]["jax"] == jax.__version__
    assert row["device"]["count"] == jax.device_count() and row["samples_per_second"] > 0


def test_distance_is_that_of_samples_zero_to_n_from_all_training_images(judge, seen, fields):
    (row,) = results(judge(f"{ARGUMENTS} --batch 6 --seed 3"))
    reference, samples = seen
    np.testing.assert_array_equal(reference, IMAGES)
    x = np.asarray(drawn(fields[1]["dit"], 16, seed=3))
    np.testing.assert_allclose(samples, x, rtol=1e-5, atol=2e-5)  # float32, values of about 5
    pixels = np.floor(255 * np.clip(x / 2 + 0.5, 0, 1)).astype(np.uint8)
    assert row["fid"] == pytest.approx(frechet(features_of(pixels), features_of(IMAGES)), rel=1e-3)


def test_pixels_of_another_range_reach_inception_and_pictures_as_those_from_minus_one_to_one(
    evaluate, judge, seen, fields, monkeypatch
):
    os.unlink("dit.safetensors")
    checkpoint.save_weights("dit.safetensors", fields[1]["dit"], notes=checkpoint.Notes(pixels=(-3, 5)))
    shown = []
    monkeypatch.setattr(picture, "save_image_grid", lambda path, *given, **_: shown.append(given))
    judge(ARGUMENTS)
    x = np.asarray(drawn(fields[1]["dit"], 16))
    np.testing.assert_allclose(seen[1], (x - 1) / 4, rtol=1e-5, atol=2e-5)  # float32, values of about 5
    eps = jr.normal(jr.key(evaluate.PICTURE_SEED), (64, 3, 32, 32))
    x = eps - jax.jit(jax.vmap(lambda z: fields[1]["dit"](z, jnp.zeros(()), jnp.ones(()))))(eps)
    ((images, *shown_range),) = shown
    assert shown_range == [-1, 1]
    np.testing.assert_allclose(images.reshape(x.shape), (x - 1) / 4, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_latents_are_decoded_at_their_scale_with_balanced_labels_and_guided(judge, seen, fields):
    arguments = "--samples 12 --batch 8 --decode-batch 4 --labels balanced --guidance-scale 1 2"
    directory = judge(f"{LATENT} {arguments}")
    tokenizer = vae.load_autoencoder("vae.safetensors", TINY_VAE)
    decode = jax.jit(lambda z: jax.vmap(tokenizer.decode)(z / 0.18215))
    labelled, plain = (drawn(fields[1]["latent"], 12, label=label) for label in (lambda i: i % 3, lambda i: i - i + 3))
    _, *samples = seen
    for x, z in zip(samples, [labelled, 2 * labelled - plain], strict=True):  # in one step, samples combine like u
        np.testing.assert_allclose(x, decode(z), atol=1e-4)
    assert np.abs(samples[0] - samples[1]).max() > 2e-3
    found = [(row["guidance_scale"], row["labels"], len(row["vae"])) for row in results(directory)]
    assert found == [(1, "balanced", 64), (2, "balanced", 64)]
    assert re.search(r"^\| 1 x 2 +\| +2 \|", (directory / "results.md").read_text(), re.MULTILINE)
    assert (directory / "samples_1_guidance_2.png").exists()


def test_a_sweep_has_a_row_for_each_grid_and_scale(evaluate):
    config = evaluate.Config(evaluations=(1, 2), times=(1, 0.3, 0), guidance_scale=(1, 2))
    grids = {"1": (1, 0), "2": (1, 0.5, 0), "2_at_1_0.3_0": (1, 0.3, 0)}
    expected = [(f"{name}{end}", t) for name, t in grids.items() for end in ("", "_guidance_2")]
    assert [(row.name, row.times) for row in evaluate.rows_of(config)] == expected


def test_a_sweep_of_guidance_has_a_row_for_each_scale_and_interval(evaluate):
    flags = "--guidance-scale 1 6 --guidance-interval 0 1 0.4 0.65"
    rows = run.main(evaluate.rows_of, evaluate.Config(), argv=flags.split())
    assert [(row.name, row.guidance) for row in rows] == [
        ("1", "1"),
        ("1_in_0.4_0.65", "1 in [0.4, 0.65]"),
        ("1_guidance_6", "6"),
        ("1_guidance_6_in_0.4_0.65", "6 in [0.4, 0.65]"),
    ]


def test_steps_along_the_velocity_are_those_of_euler(judge, seen, fields):
    judge(f"{ARGUMENTS} --evaluations 2 --euler --samples 10 --batch 10")
    field = fields[1]["dit"]

    def one(i):
        eps = jr.normal(jr.split(jr.fold_in(jr.key(0), i))[0], field.data_shape)
        half = eps - 0.5 * field(eps, jnp.ones(()), jnp.ones(()))
        return half - 0.5 * field(half, jnp.asarray(0.5), jnp.asarray(0.5))

    expected = jax.lax.map(one, jnp.arange(10))
    np.testing.assert_allclose(seen[1], expected, rtol=1e-5, atol=2e-5)  # float32, values of about 5


def test_new_noise_is_drawn_and_is_part_of_what_a_row_is_found_by(judge, seen, fields):
    for flags in ("", "--new-noise 0.5"):  # in one folder, which has a table of both
        judge(f"{ARGUMENTS} --evaluations 2 --samples 10 --batch 10 {flags}")
    method = functools.partial(mfx.sample_consistency, new_noise=0.5)
    field = fields[1]["dit"]
    generator = mfx.Generator(field, jr.key(0), field.data_shape, (1.0, 0.5, 0.0), method=method)
    (expected,) = generator.batches(10, 10, mfx.Parallelism())  # the program that the script has compiled
    np.testing.assert_allclose(seen[-1], expected, rtol=1e-5, atol=2e-5)
    assert not np.allclose(seen[1], seen[-1])


# What was done is not done again


def test_finished_rows_are_found_and_only_new_ones_are_computed(evaluate, judge, monkeypatch):
    before = results(judge(ARGUMENTS))
    computed, original = [], evaluate.judge
    monkeypatch.setattr(evaluate, "judge", lambda *given: computed.append(given[3].name) or original(*given))
    assert results(judge(f"{ARGUMENTS} --batch 8")) == before and computed == []
    after = results(judge(f"{ARGUMENTS} --evaluations 1 2"))
    assert after[:1] == before and computed == ["2"]


def test_features_of_another_network_need_no_inception(judge, monkeypatch, capsys, refused):
    monkeypatch.setattr(metrics, "load_efficientnet_lite0", lambda: Means(key=jr.key(0)))
    flags = "--weights dit.safetensors --protocol lite0 --reference cifar --samples 16 --batch 16"
    (row,) = results(judge(flags))
    assert row["protocol"] == metrics.LITE0.name and np.isfinite(row["fid"])
    assert "with the features of EfficientNet-Lite0" in capsys.readouterr().out
    line = refused(f"{flags} --inception random")
    assert "--inception must be left out with --protocol lite0, got random" in line


def test_a_killed_sweep_keeps_its_finished_rows(evaluate, judge, monkeypatch):
    original = evaluate.judge

    def killed(*given):
        if given[3].name == "2":
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "judge", killed)
        with pytest.raises(SystemExit):
            judge(f"{ARGUMENTS} --evaluations 1 2")
    monkeypatch.setattr(evaluate, "judge", lambda *given: {**original(*given), "fid": 5.0})
    assert [row["fid"] == 5.0 for row in results(judge(f"{ARGUMENTS} --evaluations 1 2"))] == [False, True]


def test_other_weights_are_judged_anew(judge, fields):
    first = judge(ARGUMENTS)
    os.unlink("dit.safetensors")
    save_network("dit.safetensors", dit(), "other")
    second = judge(ARGUMENTS)
    assert first != second and results(first)[0]["fid"] != results(second)[0]["fid"]


# References


def test_saved_moments_give_the_same_distance_and_nothing_that_needs_images(judge, capsys):
    (whole,) = results(judge(f"{ARGUMENTS} --save-reference moments.npz"))
    moments = metrics.load_moments("moments.npz")
    assert (moments.count, moments.protocol) == (20, "CIFAR-train")
    metrics.save_moments("moments.npz", dataclasses.replace(moments, mean=0 * moments.mean))
    judge(f"{ARGUMENTS} --save-reference moments.npz")  # of a finished evaluation, over a file of other moments
    np.testing.assert_array_equal(metrics.load_moments("moments.npz").mean, moments.mean)
    (row,) = results(judge(ARGUMENTS.replace("--reference cifar", "--reference moments.npz")))
    assert row["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    assert row["kid"] is None and row["precision_recall"] is None and whole["kid"] is not None
    assert "No KID, precision and recall (-): they need images" in capsys.readouterr().out


def test_images_behind_links_are_part_of_the_digest_and_other_files_are_told(evaluate, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for number, pixels in enumerate(IMAGES[:10]):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "elsewhere" / f"{number}.png")
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "a" / "notes.txt").write_text("text")
    config = evaluate.Config(reference=str(tmp_path / "images"))
    subject = types.SimpleNamespace(shape=(3, 32, 32))
    before = evaluate.digest_of_images(evaluate.open_images(config, subject))
    assert "images: 10 images, resized and cropped to 32 x 32; passed over: 1 .txt\n" in capsys.readouterr().out
    os.utime(tmp_path / "elsewhere" / "7.png", (0, 0))
    assert evaluate.digest_of_images(evaluate.open_images(config, subject)) != before


def test_moments_of_another_protocol_are_refused(refused):
    np.savez("other.npz", mu=np.zeros(9), sigma=np.eye(9), protocol="ADM")
    line = refused(ARGUMENTS.replace("--reference cifar", "--reference other.npz"))
    assert "other.npz: protocol must be 'CIFAR-train' as for the samples, got 'ADM'" in line


def test_moments_of_another_inception_are_refused(refused):
    np.savez("other.npz", mu=np.zeros(9), sigma=np.eye(9), protocol="CIFAR-train", weights="abc")
    line = refused(ARGUMENTS.replace("--reference cifar", "--reference other.npz"))
    assert re.search(
        r"other.npz: weights of the network of features must be '\w{64}' as for the samples, got 'abc'", line
    )


def test_moments_of_other_features_are_refused(refused):
    np.savez("other.npz", mu=np.zeros(8), sigma=np.eye(8))
    line = refused(ARGUMENTS.replace("--reference cifar", "--reference other.npz"))
    assert "other.npz: moments must be of 9 features, got 8" in line


def test_images_of_another_size_are_refused(refused):
    data.write_shards(data.ArraySource(IMAGES[..., :16, :16]), "small")
    line = refused(ARGUMENTS.replace("--reference cifar", "--reference small"))
    assert "small: images must be uint8 of shape (3, 32, 32) as the samples, got uint8 of shape (3, 16, 16)" in line


# Without numbers


def test_pictures_need_no_inception(judge, room):
    directory = judge("--weights unet.safetensors --grid-only")
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "starts.jsonl", "samples_1.png"}


def test_a_dry_run_tells_the_plan_and_leaves_nothing(judge, capsys):
    before = set(os.listdir())
    judge(f"{ARGUMENTS} --evaluations 1 2 --dry-run")
    assert set(os.listdir()) == before
    out = capsys.readouterr().out
    assert re.search(r"DiT of [\d,]+ parameters, images of shape \(3, 32, 32\); 16 samples for each row", out)
    assert len(re.findall("to do", out)) == 2


# Refusals


@pytest.fixture
def refused(judge, refusal_of):
    """The only line of a command that leaves nothing."""

    def refused(arguments):
        before = set(os.listdir())
        line = refusal_of(judge, arguments)
        assert set(os.listdir()) == before
        return line

    return refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--weights must be given, got none"),
        (
            "--weights dit.safetensors",
            "--inception must be given, or --protocol lite0, which .*, or --grid-only, got none",
        ),
        ("--weights dit.safetensors --inception random", "--protocol must be given, or --grid-only"),
        (f"{ARGUMENTS} --protocol fid", "--protocol"),
        (f"{ARGUMENTS} --samples 0", "--samples must be >= 10, got 0"),
        (f"{ARGUMENTS} --evaluations 1 0", r"--evaluations must be >= 1, got \(1, 0\)"),
        (f"{ARGUMENTS} --times 1 0.5", "--times must fall strictly from 1 to 0"),
        (f"{ARGUMENTS} --guidance-scale 2", "--guidance-scale must be 1 for dit.safetensors, without labels"),
        (f"{ARGUMENTS} --reference-count 21", "cifar: must hold at least 21 images, got 20"),
        (
            f"{ARGUMENTS} --vae vae.safetensors",
            "--vae must be left out for dit.safetensors, whose values are no latents",
        ),
        (f"{ARGUMENTS} --weights latent.safetensors", "--vae must be given for a network of latents"),
        (f"{ARGUMENTS} --weights vae.safetensors", "vae.safetensors: must be a file of save_weights"),
        (f"{ARGUMENTS} --weights missing", "--weights: No such file or directory: 'missing'"),
        (f"{ARGUMENTS} --inception vae.safetensors", "vae.safetensors: "),
        (f"{ARGUMENTS} --reference missing", "missing"),
        (f"{ARGUMENTS} --save-reference x.txt", "--save-reference must end in .npz, got x.txt"),
        (f"{ARGUMENTS} --reference runs.npz --save-reference x.npz", "--save-reference must be given with images"),
        (f"{ARGUMENTS} --weights grey.safetensors", r"grey.*: --protocol cifar_train is for .* got \(1, 32, 32\)"),
        (
            f"{ARGUMENTS} --weights grey.safetensors --protocol adm --reference images",
            r"images: images must be uint8 of shape \(1, 32, 32\) as the samples, got uint8 of shape \(3, 32, 32\)",
        ),
        (f"{ARGUMENTS} --save-reference dit.safetensors/x.npz", "Not a directory: '.*dit.safetensors'"),
        (f"{ARGUMENTS} --weights small.safetensors", r"small.*: --protocol cifar_train is for .* got \(3, 16, 16\)"),
        (f"{LATENT} --batch 9 --decode-batch 6", "--decode-batch must divide the batch, 9, got 6"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, refused):
    assert re.search(message, refused(arguments))


def test_weights_of_no_known_network_are_refused_by_name(refused):
    checkpoint.save_weights("own.safetensors", mfx.GuidedField(mfx.MLP(2, width=4, depth=1, key=jr.key(0)), 1, None))
    line = refused("--weights own.safetensors --grid-only")
    assert "own.safetensors: must describe its network" in line and "or --network mine.py:Net be given" in line


@pytest.mark.parametrize(
    ("trained", "flags", "message"),
    [
        ((True, True, False), "--guidance-scale 1 2", "--guidance-scale must be 1, or --euler be given, for latent.s"),
        (
            (True, False, False),
            "--guidance-scale 2 --euler",
            "--guidance-scale must be 1 for latent.*, trained with labels",
        ),
        ((False, True, False), "", "--euler must be given for latent.safetensors, whose u was trained at r = t alone"),
        (
            (True, True, True, True, True, True),
            "--evaluations 1 2",
            "--evaluations must be 1, or --euler be given, for latent.*, whose averages .* one step alone, got 2",
        ),
        (
            (True, False, True, False, True),
            "--euler --guidance-scale 2",
            "--euler must be left out for latent.safetensors, whose u was not trained at r = t, got --euler",
        ),
    ],
    ids=range(5),
)
def test_samples_that_the_network_was_not_trained_for_are_refused(trained, flags, message, refused):
    os.unlink("latent.safetensors")
    notes = dataclasses.replace(LATENTS, trained=mfx.Trained(*trained))
    save_network("latent.safetensors", dit((4, 16, 16), labels=3), notes=notes)
    assert re.search(message, refused(f"{LATENT} --samples 12 --batch 6 {flags}"))
