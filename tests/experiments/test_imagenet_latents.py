"""The ImageNet script: presets with the paper's numbers, and its refusals. `test_rehearsal.py` trains by it."""

import dataclasses
import json
import math
import os
import pathlib
import re

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from fields import filled

import mf_eqx as mfx
from mf_eqx import checkpoint, data, run


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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_numbers_of_the_paper(latents, name):
    config = run.main(lambda config: config, latents.PRESETS, argv=["--preset", name])
    size, epochs, guidance, interval, _ = PRESETS[name]
    assert (config.depth, config.width, config.heads, config.patch) == size
    assert (config.epochs, (config.scale, config.mix), config.interval) == (epochs, guidance, interval)
    assert {field: getattr(config, field) for field in COMMON} == COMMON


def test_no_number_of_the_recipe_was_left_out_above(latents):
    ours, common = ({field.name for field in dataclasses.fields(kind)} for kind in (latents.Config, run.Settings))
    seen = {*COMMON, "depth", "width", "heads", "patch", "epochs", "scale", "mix", "interval"}
    assert ours - common - seen == {"data", "start", "vae", "bfloat16", "cudnn", "remat", "seed"}


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


@pytest.mark.parametrize("name", PRESETS)
def test_networks_have_the_numbers_of_parameters_of_the_paper(latents, name):
    moments = data.ArraySource(np.zeros((1, 8, 32, 32), np.float16), np.zeros(1, int), labels=1000)
    field = eqx.filter_eval_shape(latents.make_field, latents.PRESETS[name][1], moments, jr.key(0))
    arrays = [leaf for leaf in jax.tree.leaves(field) if isinstance(leaf, jax.ShapeDtypeStruct)]
    assert sum(math.prod(leaf.shape) for leaf in arrays) == PRESETS[name][-1]
    assert field.data_shape == (4, 32, 32) and field.null_label == 1000


# Bad input

X = np.random.default_rng(0).uniform(0.1, 1, (12, 8, 4, 4)).astype(np.float16)

TOKENIZER = {"widths": [4, 8], "blocks": 1, "latent": 4, "groups": 2}
NOTES = {"images": "images", "rows": 12, "labels": 3, "size": 8, "parts": 1, "bfloat16": False}
NOTES |= {"vae": "0" * 64, "tokenizer": TOKENIZER}


def save_latents(folder, label, **changes):
    """What prepare_latents.py leaves, as one part; `changes` of its notes."""
    source = data.ArraySource(X, label, labels=None if label is None else 3)
    os.makedirs(folder)
    with open(f"{folder}/latents.json", "w") as file:
        json.dump({**NOTES, **changes}, file)
    data.write_shards(source, f"{folder}/part_0000")


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
        ("--data latents --batch 8 --depth 0", r"size must be positive throughout, got DiTSize\(depth=0"),
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
        ("--label-dropout 0.8", "label_dropout|--label-dropout"),
        ("--preset B/2 --label-dropout 0", "--label-dropout must be > 0 with guidance"),
        ("--cudnn", "--cudnn must be given with bfloat16, got float32"),
        ("--preset B/3", "--preset must be one of B/4, B/2, M/2, L/2, XL/2, XL/2"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(latents, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_latents("latents", np.arange(12) % 3)
    save_latents("bare", None)
    save_latents("begun", np.arange(12) % 3, parts=2)
    save_weights("other.safetensors")
    os.makedirs("images")
    pathlib.Path("images/latents.json").write_text("{}")
    before = set(os.listdir())
    with pytest.raises(SystemExit) as ended:
        run.main(latents.main, latents.PRESETS, argv=arguments.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert re.search(message, line), line
    assert set(os.listdir()) - {"runs"} == before
    assert not list(pathlib.Path("runs").glob("*/*"))
