"""The CIFAR-10 script: presets with the paper's numbers, data, and refusals. `test_rehearsal.py` trains by it."""

import dataclasses
import math
import os
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import VelocityAlone
from image_files import save_cifar10

import mf_eqx as mfx
from mf_eqx import data, run

IMAGES = np.random.default_rng(3).integers(0, 256, (20, 3, 32, 32), np.uint8)


@pytest.fixture(scope="module")
def cifar10(experiment):
    pytest.importorskip("safetensors")
    return experiment("cifar10")


# Presets

PAPER = {
    "steps": 800_000,
    "batch": 1024,
    "width": 128,
    "multipliers": (2, 2, 2),
    "blocks": 4,
    "attention": (16,),
    "dropout": 0.2,
    "learning_rate": 6e-4,
    "betas": (0.9, 0.999),
    "warmup": 10_000,
    "decays": (0.99995, 0.9999, 0.9996),
    "average_every": 16,
    "identity_share": 0.75,
    "times": (-2.0, 2.0),
    "r_times": None,
    "power": 0.75,
    "offset": 1e-3,
    "augmentation": 0.12,
}
V1 = {**PAPER, "times": (-0.6, 1.6), "r_times": (-4.0, 1.6)}


@pytest.mark.parametrize(("name", "expected"), [("paper", PAPER), ("v1", V1)])
def test_presets_are_the_numbers_of_the_paper_and_of_the_authors_code(cifar10, name, expected):
    config = cifar10.PRESETS[name][1]
    assert {field: getattr(config, field) for field in expected} == expected
    recipe = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(run.Settings)
    }
    assert recipe - set(expected) == {"data", "start", "bfloat16", "remat", "seed"}  # nothing was forgotten above
    assert not config.bfloat16 and config.accumulation == 1


def test_parts_are_made_of_the_presets_numbers(cifar10):
    objective = cifar10.objective(cifar10.V1)
    assert isinstance(objective.identity, mfx.MeanFlow) and objective.guidance is objective.label_dropout is None
    assert float(objective.identity_share) == 0.75 and objective.boundary_times is None
    assert objective.time_pairs == mfx.TimePairs(mfx.LogitNormalTimes(-0.6, 1.6), mfx.LogitNormalTimes(-4.0, 1.6))
    assert objective.weight == mfx.AdaptiveWeight(0.75, 1e-3)
    flow_matching = cifar10.objective(dataclasses.replace(cifar10.V1, identity_share=0.0))
    assert flow_matching.boundary_times == mfx.LogitNormalTimes(-0.6, 1.6)
    assert cifar10.objective(cifar10.PAPER).time_pairs == mfx.TimePairs(mfx.LogitNormalTimes(-2.0, 2.0))
    averages = [mfx.ExponentialAverage(decay, 16) for decay in (0.99995, 0.9999, 0.9996)]
    assert cifar10.averages(cifar10.PAPER) == averages


def test_network_of_the_paper_has_its_number_of_parameters(cifar10):
    field = eqx.filter_eval_shape(cifar10.make_field, cifar10.PAPER, jr.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(field) if hasattr(leaf, "shape")) == 55_932_419
    arguments = field.arguments
    assert (arguments["dropout"], arguments["augmentation"], arguments["data_shape"]) == (0.2, 6, (3, 32, 32))


def test_times_of_v1_meet_in_three_rows_of_ten(cifar10):
    """A quarter has no identity; of the rest, r is drawn above t, and becomes t, in 6.7%: Phi(-3.4 / (1.6 sqrt 2))."""
    draw = jax.jit(jax.vmap(lambda key: cifar10.objective(cifar10.V1).time_pairs(key=key)))
    r, t = draw(jr.split(jr.key(0), 40_000))
    assert bool((r <= t).all())
    assert abs(float((r == t).mean()) - 0.0665) < 0.005  # four standard errors
    assert abs(0.25 + 0.75 * 0.0665 - 0.3) < 1e-3


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-8), (5000, 3.00005e-4), (10_000, 6e-4), (20_000, 6e-4)])
def test_learning_rate_warms_up_from_almost_zero_and_stays(cifar10, step, rate):
    optimizer, weight = cifar10.optimizer(cifar10.PAPER), jnp.zeros(1)
    adam, schedule = optimizer.init(weight)
    update, _ = optimizer.update(jnp.ones(1), (adam, schedule._replace(count=jnp.asarray(step))), weight)
    # Adam's first step is as long as the learning rate, which is 6e-4 minus something: in float32, like 1 - 0.999.
    np.testing.assert_allclose(update, -rate, rtol=1e-5, atol=3e-11)


def test_optimizer_is_adam_with_the_betas_of_the_paper(cifar10):
    optimizer = cifar10.optimizer(dataclasses.replace(cifar10.PAPER, warmup=0))
    state, first, second = optimizer.init(jnp.zeros(3)), np.zeros(3), np.zeros(3)
    for step, gradient in enumerate(np.random.default_rng(0).standard_normal((4, 3)), 1):
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        expected = -6e-4 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-3)  # 0.999 in float32


# Data


def test_drawn_shapes_are_the_same_bytes_each_time(cifar10):
    x = cifar10.draw_shapes(50, seed=0)
    assert (x.shape, x.dtype) == ((50, 3, 32, 32), np.uint8)
    np.testing.assert_array_equal(x, cifar10.draw_shapes(50, seed=0))
    assert not np.array_equal(x, cifar10.draw_shapes(50, seed=1))
    assert len(np.unique(x.reshape(50, -1), axis=0)) == 50


def test_drawn_shapes_have_a_shape_on_a_plain_ground(cifar10):
    x = cifar10.draw_shapes(50, seed=0).astype(int)
    border = np.concatenate([x[:, :, 0], x[:, :, :, 0]], axis=2)
    assert (border == border[..., :1]).all()
    inside = (x != x[:, :, :1, :1]).any(axis=1).mean(axis=(1, 2))
    assert (inside > np.pi * 3.5**2 / 1024).all() and (inside < 20**2 / 1024).all()


def test_shards_and_folders_of_cifar10_are_read_alike(cifar10, tmp_path):
    save_cifar10(tmp_path / "cifar", IMAGES)
    data.write_shards(data.ArraySource(IMAGES), tmp_path / "shards")
    for name in ("cifar", "shards"):
        np.testing.assert_array_equal(cifar10.open_source(str(tmp_path / name)).take(np.arange(20)).x, IMAGES)


def test_rows_are_prepared_as_floats_with_six_numbers_and_no_label(cifar10):
    row = mfx.Batch(IMAGES[0], jnp.asarray(3), jnp.asarray(0))
    found = jax.jit(cifar10.prepare(cifar10.PAPER))(row, jr.key(0))
    assert found.condition.label is None and found.condition.augmentation.shape == (6,)
    assert found.x.dtype == jnp.float32 and float(jnp.abs(found.x).max()) > 0.5


def test_without_augmentation_images_are_only_mirrored_and_told_nothing(cifar10):
    """The loader's own flip, with a probability of one half."""
    prepare = cifar10.prepare(dataclasses.replace(cifar10.PAPER, augmentation=0.0))
    row = mfx.Batch(jnp.asarray(IMAGES[0]), None, jnp.asarray(0))
    found = jax.jit(jax.vmap(lambda key: prepare(row, key)))(jr.split(jr.key(0), 64))
    x = IMAGES[0] / 127.5 - 1
    same, mirrored = (np.abs(found.x - image).max(axis=(1, 2, 3)) < 1e-3 for image in (x, x[..., ::-1]))
    assert (same ^ mirrored).all() and 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(found.condition.augmentation, np.zeros((64, 6)))


# Bad input


@pytest.mark.parametrize("share", [0.75, 0.0])
def test_pictures_read_u_where_it_was_trained(cifar10, share, monkeypatch):
    pictures = []
    monkeypatch.setattr(cifar10.picture, "save_image_grid", lambda path, x, *given: pictures.append(x))
    config = dataclasses.replace(cifar10.TINY, identity_share=share)
    for steps in cifar10.evaluations(config):
        cifar10.save_samples(config, VelocityAlone(), "picture.png", steps=steps, side=2)
    assert all(np.isnan(x).all() == bool(share) for x in pictures) and len(pictures) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data missing", "--data: No such file or directory: 'missing'"),
        ("--data empty", "empty: must hold images, .* got none"),
        (
            "--data small",
            r"data must have rows of uint8 of shape \(3, 32, 32\), got uint8 of shape \(3, 16, 16\) in sm.*images.py",
        ),
        (
            "--data floats",
            r"data must have rows of uint8 of shape \(3, 32, 32\), got float32 of shape \(3, 32, 32\) in",
        ),
        ("--data cifar --batch 24", r"batch must lie in \[1, 20\], the rows of cifar, got 24"),
        ("--batch 10", "--batch must be a positive multiple of 4"),
        ("--steps -1", "--steps must be >= 0, got -1"),
        ("--warmup -1", "--warmup must be >= 0, got -1"),
        ("--learning-rate 0", r"--learning-rate must lie in \(0, 1\), got 0.0"),
        ("--learning-rate nan", "--learning-rate must be finite, got nan"),
        ("--betas 0.9 1", r"--betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ("--betas 0.9", "--betas"),
        ("--decays 0.9 0.9", r"--decays must be at least one number, each once, got \(0.9, 0.9\)"),
        ("--decays", r"--decays must be at least one number, each once, got \(\)"),
        ("--decays 1", r"decay must lie in \[0, 1\), got 1.0"),
        ("--average-every 0", "interval must be an integer >= 1, got 0"),
        ("--attention 7", r"--attention must be among the resolutions \[32, 16, 8\] of .*, got \[7\]"),
        ("--multipliers", r"--multipliers must be at least one number >= 1, got \(\)"),
        ("--width 6", "--width must be a positive multiple of 4, got 6"),
        ("--dropout 1", r"--dropout must lie in \[0, 1\), got 1.0"),
        ("--identity-share 1.5", r"--identity-share must lie in \[0, 1\], got 1.5"),
        ("--times -2 0", "std must be > 0 and finite, got 0.0"),
        ("--r-times -4 -1", "std must be > 0 and finite, got -1.0"),
        ("--augmentation 2", r"probability must lie in \[0, 1\], got 2.0"),
        ("--preset v2", "--preset must be one of paper, v1, tiny"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(cifar10, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("empty")
    save_cifar10("cifar", IMAGES)
    data.write_shards(data.ArraySource(IMAGES[..., :16, :16]), "small")
    data.write_shards(data.ArraySource(IMAGES.astype(np.float32)), "floats")
    before = set(os.listdir())
    line = refusal_of(run.main, cifar10.main, cifar10.PRESETS, argv=arguments.split())
    assert re.search(message, line), line
    assert set(os.listdir()) == before
