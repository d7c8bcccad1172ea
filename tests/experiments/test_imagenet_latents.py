"""The ImageNet script: presets with the paper's numbers, and its refusals. `test_rehearsal.py` trains by it."""

import dataclasses
import math
import os
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled, VelocityAlone
from latent_files import save_latents

import mf_eqx as mfx
from mf_eqx import checkpoint, data, run, vae


@pytest.fixture(scope="module")
def latents(experiment):
    pytest.importorskip("safetensors")
    return experiment("imagenet_latents")


# Presets: depth, width, heads, patch; epochs; omega, kappa, interval; parameters with 1000 labels

PRESETS = {
    "B/4": ((12, 768, 12, 4), 80, (1.0, 0.0), (0.0, 1.0), 131_165_248),
    "B/2": ((12, 768, 12, 2), 240, (1.0, 0.5), (0.0, 1.0), 131_091_472),
    "M/2": ((16, 1024, 16, 2), 240, (1.0, 0.5), (0.0, 1.0), 308_019_216),
    "L/2": ((24, 1024, 16, 2), 240, (0.2, 0.92), (0.0, 0.8), 459_137_040),
    "XL/2": ((28, 1152, 16, 2), 240, (0.2, 0.92), (0.0, 0.75), 676_440_592),
    "XL/2+": ((28, 1152, 16, 2), 1000, (1.0, 0.5), (0.3, 0.8), 676_440_592),
}
EFFECTIVE = {"B/4": 1, "B/2": 2, "M/2": 2, "L/2": 2.5, "XL/2": 2.5, "XL/2+": 2}
COMMON = {
    "batch": 256,
    "learning_rate": 1e-4,
    "betas": (0.9, 0.95),
    "decay": 0.9999,
    "identity_share": 0.25,
    "times": (-0.4, 1.0),
    "power": 1.0,
    "offset": 0.01,
    "label_dropout": 0.1,
}


# Improved MeanFlow: depth, width, heads, patch, blocks of a head; interval of samples; parameters with and without v

IMPROVED = {
    "iMF-B/2": ((12, 768, 12, 2, 8), (0.4, 0.65), 145_596_960, 88_935_184),
    "iMF-M/2": ((24, 768, 12, 2, 8), (0.4, 0.6), 230_570_016, 173_908_240),
    "iMF-L/2": ((32, 1024, 16, 2, 8), (0.4, 0.6), 509_752_352, 409_054_224),
    "iMF-XL/2": ((48, 1024, 16, 2, 8), (0.42, 0.62), 711_113_760, 610_415_632),
}
COMMON_OF_IMPROVED = COMMON | {
    "improved": True,
    "batch": 1024,
    "epochs": 640.0,
    "warmup_epochs": 10.0,
    "identity_share": 0.5,
    "scale": 1.0,
    "mix": 0.0,
    "interval": (0.0, 1.0),
    "largest_scale": 8.0,
    "scale_power": 1.0,
    "sample_scale": 8.0,
}


JUDGED = {"images", "test", "samples"}
"""What is not trained but judged."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_numbers_of_the_paper(latents, name):
    config = run.main(lambda config: config, latents.PRESETS, argv=["--preset", name])
    size, epochs, guidance, interval, _ = PRESETS[name]
    assert (config.depth, config.width, config.heads, config.patch) == size
    assert (config.epochs, (config.scale, config.mix), config.interval) == (epochs, guidance, interval)
    assert {field: getattr(config, field) for field in COMMON} == COMMON


def test_quick_is_the_quick_preset_of_images(latents, experiment):
    images = experiment("images")
    ours, theirs = latents.PRESETS["quick"][1], images.PRESETS["quick"][1]
    same = ("batch", "learning_rate", "decay", "identity_share", "times", "offset", "label_dropout", "samples")
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    assert latents.mfx.AdaptiveWeight(ours.power, ours.offset) == images.objective(theirs, 10).weight
    assert (ours.depth, ours.width, ours.heads) == images.size_of(theirs)[:3]
    steps, warmup = (60_000 / ours.batch * epochs for epochs in (ours.epochs, ours.warmup_epochs))
    assert (round(steps), round(warmup)) == (theirs.steps, theirs.warmup)


def test_no_number_of_the_recipe_was_left_out_above(latents):
    ours, common = ({field.name for field in dataclasses.fields(kind)} for kind in (latents.Config, run.Settings))
    seen = {*COMMON_OF_IMPROVED, "depth", "width", "heads", "patch", "head_depth", "sample_interval"}
    assert ours - common - seen == {"data", "start", "vae", "bfloat16", "cudnn", "remat", "seed", *JUDGED}


@pytest.mark.parametrize("name", PRESETS)
def test_objectives_are_those_of_the_paper(latents, name):
    objective = latents.objective(latents.PRESETS[name][1], 1000)
    _, _, (scale, mix), interval, _ = PRESETS[name]
    assert isinstance(objective.identity, mfx.MeanFlow) and float(objective.identity_share) == 0.25
    assert objective.time_pairs == mfx.TimePairs(mfx.LogitNormalTimes(-0.4, 1.0))
    assert objective.boundary_times is None and objective.weight == mfx.AdaptiveWeight(1.0, 0.01)
    assert (objective.label_dropout.rate, objective.label_dropout.null) == (0.1, 1000)
    if EFFECTIVE[name] == 1:
        assert objective.guidance is None
    else:
        assert objective.guidance == mfx.Guidance(scale, mix, interval)
        assert objective.guidance.effective_scale == pytest.approx(EFFECTIVE[name])


def test_flow_matching_draws_the_times_of_all_rows_from_the_distribution_itself(latents):
    objective = latents.objective(latents.Config(identity_share=0.0), 1000)
    assert objective.identity is None and objective.boundary_times == mfx.LogitNormalTimes(-0.4, 1.0)


# Images of latents


class Blocks(eqx.Module):
    """A tokenizer whose latents have two channels: means over blocks of 2 x 2 pixels, and their negatives."""

    def encode(self, x):
        mean = x.reshape(-1, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean(axis=(0, 2, 4))
        mean = jnp.stack([mean, -mean])
        return vae.Moments(mean, jnp.full_like(mean, 0.1))


def of_images(x, label):
    """Sources of images, and of their latents."""
    moments = [Blocks().encode(row / 127.5 - 1) for row in x]
    stored = np.stack([np.concatenate([row.mean, row.std]) for row in moments]).astype(np.float16)
    return data.ArraySource(x, label, labels=3), data.ArraySource(stored, label, labels=3)


def test_latents_are_those_of_the_same_images_in_the_same_order_and_of_no_others(latents):
    draws = np.random.default_rng(1)
    x, label = draws.integers(0, 256, (12, 1, 8, 8), np.uint8), np.arange(12) % 3
    images, stored = of_images(x, label)
    assert latents.are_latents(stored, images, Blocks())
    other, _ = of_images(draws.integers(0, 256, (12, 1, 8, 8), np.uint8), label)
    moved, _ = of_images(np.roll(x, 3, axis=0), label)
    labelled, _ = of_images(x, (label + 1) % 3)
    assert not any(latents.are_latents(stored, each, Blocks()) for each in (other, moved, labelled))


def test_decoded_samples_are_latents_restored_by_the_statistics_of_the_data(latents):
    size = vae.AutoencoderSize(widths=(4,), blocks=1, latent=2, groups=2, channels=1)
    network = filled(lambda: vae.Autoencoder(size, key=jr.key(0)))
    statistics = vae.LatentStatistics((1.0, -2.0), (3.0, 0.5))
    z = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 4, 4)), jnp.float32)
    restored = z * np.array([3.0, 0.5])[:, None, None] + np.array([1.0, -2.0])[:, None, None]
    decode = eqx.filter_jit(lambda z: jax.vmap(network.decode)(z))
    found = latents.Decoder(network, statistics)(z)
    np.testing.assert_allclose(found, decode(restored), atol=1e-5)
    assert np.abs(found - decode(z)).max() > 0.01


def test_samples_are_decoded_few_at_once(latents, monkeypatch):
    sizes = []

    def decode(tokenizer, statistics, z):
        sizes.append(len(z))
        return z

    monkeypatch.setattr(latents.saved, "decode", decode)
    z = jnp.arange(50.0).reshape(50, 1, 1, 1)
    found = latents.Decoder(None, vae.LatentStatistics())(z)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(found, z)
    assert max(sizes) <= 10 and sum(sizes) == 50


# Parameters


MOMENTS = data.ArraySource(np.zeros((1, 8, 32, 32), np.float16), np.zeros(1, int), labels=1000)


def count(field):
    arrays = [leaf for leaf in jax.tree.leaves(field) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.shape) for leaf in arrays)


@pytest.mark.parametrize("name", PRESETS)
def test_networks_have_the_numbers_of_parameters_of_the_paper(latents, name):
    field = eqx.filter_eval_shape(latents.make_field, latents.PRESETS[name][1], MOMENTS, jr.key(0))
    assert count(field) == PRESETS[name][-1]
    assert field.data_shape == (4, 32, 32) and field.null_label == 1000


@pytest.mark.parametrize("name", IMPROVED)
def test_presets_of_improved_mean_flow_are_the_numbers_of_its_paper(latents, name):
    config = run.main(lambda config: config, latents.PRESETS, argv=["--preset", name])
    size, interval, _, _ = IMPROVED[name]
    assert (config.depth, config.width, config.heads, config.patch, config.head_depth) == size
    assert config.sample_interval == interval
    assert {field: getattr(config, field) for field in COMMON_OF_IMPROVED} == COMMON_OF_IMPROVED


@pytest.mark.parametrize("name", IMPROVED)
def test_networks_of_improved_mean_flow_have_its_numbers_of_parameters(latents, name):
    field = eqx.filter_eval_shape(latents.make_field, latents.PRESETS[name][1], MOMENTS, jr.key(0))
    assert (field.data_shape, field.null_label, field.has_velocity_head) == ((4, 32, 32), 1000, True)
    assert (count(field), count(latents.for_sampling(field))) == IMPROVED[name][2:]


def test_objective_of_improved_mean_flow_is_that_of_its_paper(latents):
    objective = latents.objective(latents.PRESETS["iMF-B/2"][1], 1000)
    assert objective.identity == mfx.ImprovedMeanFlow() and float(objective.identity_share) == 0.5
    assert objective.time_pairs == mfx.TimePairs(mfx.LogitNormalTimes(-0.4, 1.0))
    assert objective.guidance == mfx.DrawnGuidance(mfx.PowerLawScales(1.0, 1.0, 8.0), 0.5)
    assert objective.weight == mfx.AdaptiveWeight(1.0, 0.01)
    assert objective.label_dropout == mfx.LabelDropout(0.1, 1000) and objective.boundary_times is None
    assert objective.trained.guidance == mfx.GuidanceRange(1.0, 8.0, 0.5)


def test_learning_rate_rises_over_the_warm_up_and_then_stays(latents):
    config = dataclasses.replace(latents.PRESETS["iMF-tiny"][1], batch=4, warmup_epochs=2.0, learning_rate=0.1)
    optimizer = latents.optimizer(config, rows=8)  # 4 steps of warm-up
    state, rates = optimizer.init(np.zeros(1, np.float32)), []
    for _ in range(6):
        update, state = optimizer.update(np.ones(1, np.float32), state)
        rates.append(-float(update[0]))
    np.testing.assert_allclose(rates, [0, 0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-5)


def test_documented_sweeps_of_guidance_are_those_of_the_training(latents, experiment):
    saved, evaluate, generate = experiment("saved"), experiment("evaluate"), experiment("generate")
    readme = pathlib.Path(latents.__file__).with_name("README.md").read_text()
    texts = [script.__doc__ for script in (latents, evaluate, generate)] + [readme]
    numbers = r"((?: +[0-9.]+)+)"
    lines = re.findall(
        rf"--guidance-scale{numbers}(?:\s+--guidance-interval{numbers})?", "".join(texts).replace("\\\n", "")
    )
    trained = latents.objective(latents.PRESETS["iMF-B/2"][1], 1000).trained
    subject = saved.Subject("imf.safetensors", None, {"guidance": True}, {}, checkpoint.Notes(trained=trained), None)
    assert len(lines) > 5 and sum(bool(interval) for _, interval in lines) >= 4
    for scales, interval in lines:
        flags = f"--guidance-scale {scales}" + (f" --guidance-interval {interval}" if interval else "")
        config = run.main(lambda config: config, evaluate.Config(), argv=flags.split())
        how = {"euler": False, "untrained": False}
        saved.check_guidance(subject, config.guidance_scale, config.guidance_interval, **how)
    with pytest.raises(ValueError, match="--guidance-scale must lie in"):
        saved.check_guidance(subject, (10.0,), (saved.ALWAYS,), euler=False, untrained=False)


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_pictures_read_u_where_it_was_trained(latents, share, monkeypatch):
    pictures, network = [], type("Network", (), {"data_shape": (4, 2, 2), "null_label": 3})()
    monkeypatch.setattr(latents.picture, "save_image_grid", lambda path, x, *given: pictures.append(x))
    generate = latents.generate
    monkeypatch.setattr(latents, "for_sampling", lambda field: field)
    monkeypatch.setattr(latents, "generate", lambda field, _, *given: generate(field, network, *given))
    config = dataclasses.replace(latents.PRESETS["B/4"][1], identity_share=share)
    latents.save_samples(config, VelocityAlone(), lambda x: x, "picture.png")
    assert np.isnan(pictures[0]).all() == bool(share)


# Bad input


def save_weights(path):
    make = eqx.Partial(mfx.DiT, (4, 4, 4), mfx.DiTSize(1, 8, 2, 2), labels=3, key=jr.key(0))
    checkpoint.save_weights(path, filled(make))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data missing", "--data: No such file or directory: 'missing/latents.json'"),
        ("--data images", "images/latents.json: must be the notes of prepare_latents.py, but cannot be read"),
        ("--data begun", "begun: must have all 2 parts, lacks part_0001"),
        ("--data bare --batch 8", "data must have labels, a folder of images for each class, got none in bare"),
        ("--data latents --batch 16", "batch must be at most the 12 latents in latents, got 16"),
        ("--data latents --batch 10", "--batch must be a positive multiple of 4"),
        ("--data latents --batch 8 --heads 5", "width must be a multiple of heads"),
        ("--data latents --batch 8 --depth 0", "--depth must be an integer >= 1, got 0"),
        ("--data latents --batch 8 --patch 3", "patch must divide the sides of data_shape"),
        ("--data latents --batch 8 --vae missing.safetensors", "missing.safetensors"),
        (
            "--data latents --batch 8 --start missing.safetensors",
            "--start: No such file or directory: 'missing.safetensors'",
        ),
        (
            "--data latents --batch 8 --depth 2 --width 8 --heads 2 --patch 2 --start other.safetensors",
            "start must be of size {'depth': 2, .*}, got {'depth': 1, .*} in other.safetensors",
        ),
        ("--epochs 0", "--epochs must be > 0 and finite, got 0.0"),
        ("--epochs inf", "--epochs must be finite, got inf"),
        ("--seed -1", "--seed must be >= 0, got -1"),
        ("--learning-rate 1", r"--learning-rate must lie in \(0, 1\), got 1.0"),
        ("--betas 1 0.95", r"--betas must lie in \[0, 1\), got \(1.0, 0.95\)"),
        ("--decay 1", r"--decay must lie in \[0, 1\), got 1.0"),
        ("--mix 1", r"--mix must lie in \[0, 1\), got 1.0"),
        ("--preset B/2 --interval 0.8 0.2", "--interval must"),
        ("--identity-share 0.33", "--identity-share must be within 0.001 of a fraction"),
        ("--label-dropout 0.8", r"--label-dropout must lie in \[0, 1 - identity_share = 0.75\], got 0.8"),
        ("--preset B/2 --label-dropout 0", "--label-dropout must be > 0 with guidance"),
        ("--warmup-epochs -1", "--warmup-epochs must be >= 0 and finite, got -1.0"),
        ("--head-depth 4", "--head-depth must be left out without improved, got 4"),
        ("--sample-scale 2", "--sample-scale must be left out without improved, got 2.0"),
        ("--preset iMF-tiny --mix 0.5", "--scale must be 1, and mix 0, with improved, which draws scales; got mix = 0"),
        ("--preset iMF-tiny --interval 0 0.5", "--interval must be 0 1 with improved, which draws intervals"),
        ("--preset iMF-tiny --identity-share 0", "--identity-share must lie between 0 and 1 with improved, got 0.0"),
        ("--preset iMF-tiny --sample-scale 9", r"--sample-scale must lie in \[1, 8\], got 9"),
        ("--preset iMF-tiny --sample-interval 0.6 1", r"--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1"),
        ("--preset iMF-tiny --label-dropout 0", "--label-dropout must be > 0 with guidance"),
        ("--preset iMF-tiny --head-depth 3", "--head-depth must be below the depth 3, got 3"),
        (
            "--preset iMF-tiny --sample-interval 0.2 1.5",
            r"--sample-interval must satisfy 0 <= first <= 0.5 <= last <= 1, got 0.2 1.5",
        ),
        ("--preset iMF-tiny --largest-scale 0.5", r"--largest-scale must lie in \[1, 100\], got 0.5"),
        ("--preset iMF-tiny --scale-power 1000", r"--scale-power must satisfy \|1 - scale_power\| .*, got 1000.0"),
        ("--interval 0 0.5", r"--interval must be left out without guidance, got \(0.0, 0.5\)"),
        ("--images images", "--images must be left out without vae, which decodes samples, got images"),
        ("--test images", "--test must be left out without images, got images"),
        ("--cudnn", "--bfloat16 must be given with cudnn, got float32"),
        ("--preset B/3", "--preset must be one of B/4, B/2, M/2, L/2, XL/2, XL/2"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(latents, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_latents(pathlib.Path("latents"))
    save_latents(pathlib.Path("bare"), labelled=False)
    save_latents(pathlib.Path("begun"), parts=2)
    save_weights("other.safetensors")
    os.makedirs("images")
    pathlib.Path("images/latents.json").write_text("{}")
    before = set(os.listdir())
    line = refusal_of(run.main, latents.main, latents.PRESETS, argv=arguments.split())
    assert re.search(message, line), line
    assert set(os.listdir()) - {"runs"} == before
    assert not list(pathlib.Path("runs").glob("*/*"))
