"""Saved weights become pictures and arrays by one command: their content, the defaults, and what is refused."""

import functools
import os
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled
from own_methods import OWN_NETWORK

import mf_eqx as mfx
from mf_eqx import checkpoint, nn, run, vae

TESTS = pathlib.Path(__file__).parents[1]
TINY_VAE = vae.AutoencoderSize(widths=(4, 4), blocks=1, latent=4, groups=2)
SIZE = mfx.DiTSize(1, 8, 2, 4)
NETWORKS = {
    "plain": eqx.Partial(mfx.DiT, (1, 8, 8), SIZE, key=jr.key(0)),
    "digits": eqx.Partial(mfx.DiT, (1, 8, 8), SIZE, labels=12, key=jr.key(0)),
    "flow": eqx.Partial(mfx.MLP, 2, width=8, depth=1, labels=3, key=jr.key(0)),
    "robot": eqx.Partial(mfx.MLP, 6, width=8, depth=1, condition=5, key=jr.key(0)),
    "latent": eqx.Partial(mfx.DiT, (4, 4, 4), SIZE, key=jr.key(0)),
    "guided": eqx.Partial(
        mfx.InContextDiT, (1, 8, 8), mfx.InContextDiTSize(2, 8, 2, 4, 1), labels=2, guidance=True, key=jr.key(0)
    ),
    "drawn": eqx.Partial(mfx.DiT, (1, 8, 8), SIZE, labels=2, guidance=True, key=jr.key(0)),
    "unsaid": eqx.Partial(mfx.DiT, (3, 4, 4), SIZE, labels=2, key=jr.key(0)),
    "ends": eqx.Partial(mfx.DiT, (1, 4, 4), SIZE, labels=2, key=jr.key(0)),
    "one": eqx.Partial(mfx.MLP, 2, width=8, depth=1, key=jr.key(0)),
}
NAMES = tuple("abcdefghijkl")
STATISTICS = vae.LatentStatistics((1.0, 0.0, -2.0, 0.5), (3.0, 0.5, 1.0, 2.0))
NOTES = {
    "plain": checkpoint.Notes(pixels=(-1, 1), steps=7, decay=0.9),
    "digits": checkpoint.Notes(pixels=(0, 2), class_names=NAMES, trained=mfx.Trained(True, True, False)),
    "flow": checkpoint.Notes(trained=mfx.Trained(False, True, False)),
    "robot": checkpoint.Notes(trained=mfx.Trained(True, False, False)),
    "latent": checkpoint.Notes(pixels=(-1, 1), tokenizer=checkpoint.Tokenizer(TINY_VAE, statistics=STATISTICS)),
    "guided": None,
    "drawn": checkpoint.Notes(
        pixels=(-1, 1), trained=mfx.Trained(True, True, False, guidance=mfx.GuidanceRange(1.0, 8.0, 0.5))
    ),
    "unsaid": None,
    "ends": checkpoint.Notes(trained=mfx.Trained(True, False, True, velocity=False, ends_at_data=True)),
    "one": checkpoint.Notes(trained=mfx.Trained(True, False, False, velocity=False, ends_at_data=True, one_step=True)),
}


@pytest.fixture(scope="module")
def files(experiment, tmp_path_factory):
    """A folder with weights, the fields in them, and the script."""
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("files")
    fields = {name: filled(make) for name, make in NETWORKS.items()}
    for name, field in fields.items():
        checkpoint.save_weights(root / f"{name}.safetensors", field, notes=NOTES[name])
    np.save(root / "vectors.npy", np.random.default_rng(0).standard_normal((4, 5)))
    np.save(root / "short.npy", np.zeros((4, 3), np.float32))
    return root, fields, experiment("generate")


@pytest.fixture
def command(files, tmp_path, monkeypatch):
    """The command, in a folder of its own."""
    root, _, generate = files
    for entry in root.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir())

    def command(arguments):
        run.main(generate.main, generate.Config(), argv=f"--weights {arguments}".split())
        return sorted(set(os.listdir()) - before)

    return command


def samples(field, count, condition=None, *, times=(1.0, 0.0), seed=0, **options):
    """What the library makes of these: where the script makes as many at once, in the program that it has compiled."""
    condition = None if condition is None else np.asarray(condition)
    shape = (field.field if isinstance(field, mfx.GuidedField | mfx.WithGuidance) else field).data_shape
    generator = mfx.Generator(field, jr.key(seed), shape, times, condition=condition, **options)
    shards = (devices := mfx.Parallelism()).shards
    (x,) = generator.batches(count, -(-count // shards) * shards, devices)
    return np.asarray(x)[:count]


def bytes_of(x, low, high):
    """Pixels as a file holds them."""
    return np.round(255 * np.clip((x - low) / (high - low), 0, 1))


def colours(path):
    from PIL import Image

    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


# Arrays


def test_samples_are_those_of_their_numbers_labels_and_seed_in_any_batch(command, files):
    flags = "--to x.npy --label b 7 --number 5 --seed 3 --evaluations 2 --batch 2"
    assert command(f"digits.safetensors {flags}") == ["x.npy"]
    expected = samples(files[1]["digits"], 5, [1, 7], times=(1, 0.5, 0), seed=3)
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(command, full_disk, capsys):
    flags = "--label 7 --number 5"
    command(f"digits.safetensors --to small.npy {flags}")  # then nothing is compiled, and stored, under the limit
    with full_disk(100), pytest.raises(SystemExit):
        command(f"digits.safetensors --to x.npy {flags}")
    assert "x.npy" in capsys.readouterr().err.splitlines()[-1]
    assert not list(pathlib.Path().glob("x.npy*"))


def test_guided_euler_steps_follow_the_guided_velocity(command, files):
    command("flow.safetensors --to x.npy --label 1 --number 2 --euler --times 1 0.3 0 --guidance-scale 2.5")
    field = mfx.GuidedField(files[1]["flow"], 2.5, jnp.asarray(3))
    expected = samples(field, 2, [1], times=(1, 0.3, 0), method=mfx.sample_euler)
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)


def test_each_vector_of_a_file_conditions_a_sample(command, files):
    assert command("robot.safetensors --condition vectors.npy") == ["robot.npy"]
    expected = samples(files[1]["robot"], 4, np.load("vectors.npy").astype(np.float32))
    np.testing.assert_allclose(np.load("robot.npy"), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def own(files, command):
    """Weights of a network of one's own, and the file that it is in."""
    pathlib.Path("mine.py").write_text(OWN_NETWORK)
    field = filled(lambda: run.own_network("network", "mine.py:Net", (3, 4, 6), labels=2)(key=jr.key(0)))
    notes, about = checkpoint.Notes(class_names=("cat", "dog"), pixels=(-1, 1)), {"data_shape": (3, 4, 6), "labels": 2}
    checkpoint.save_weights("own.safetensors", field, about, notes)
    checkpoint.save_weights("silent.safetensors", field)
    return field


def test_weights_of_a_network_of_ones_own_are_opened_with_its_file(own, command):
    command("own.safetensors --network mine.py:Net --to x.npy --label dog --number 3 --seed 2")
    generator = mfx.Generator(own, jr.key(2), (3, 4, 6), condition=jnp.array([1]))
    np.testing.assert_allclose(np.load("x.npy"), generator(np.arange(3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("own.safetensors", "own.saf.*: must describe its network, .* or --network mine.py:Net be given, got neither"),
        ("own.safetensors --network mine.py:Other", "--network must name a subclass of AbstractField in mine.py"),
        ("own.safetensors --network mine.py --bfloat16", "--bfloat16 must be left out with --network mine.py"),
        (
            "plain.safetensors --network mine.py",
            "--network must be left out for plain.saf.* described: DiT, got mine.p",
        ),
        ("silent.safetensors --network mine.py", "silent.saf.*: must say its data_shape, .* for --network; got None"),
    ],
)
def test_a_network_of_ones_own_that_does_not_fit_its_weights_is_refused(own, command, refusal_of, flags, message):
    line = refusal_of(command, flags)
    assert re.search(message, line), line


# Pictures


def test_picture_has_a_column_for_each_of_ten_labels_by_default(command, files):
    assert command("digits.safetensors") == ["digits.png"]
    found, (pad, gap, side) = colours("digits.png"), (8, 4, 48)
    assert found.shape[1] == 2 * pad + 10 * side + 9 * gap
    top = found.shape[0] - pad - 8 * side - 7 * gap
    labels = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]  # of twelve, in equal distances
    x = bytes_of(samples(files[1]["digits"], 80, labels), 0, 2)
    for row, column in [(0, 0), (1, 5), (7, 9)]:
        at = top + row * (side + gap) + 3, pad + column * (side + gap) + 3
        shown = found[at[0] :: 6, at[1] :: 6, 0][:8, :8].astype(float)
        np.testing.assert_allclose(shown, x[10 * row + column, 0], atol=1)


def test_each_sample_is_a_file_of_its_own_size_with_its_number_and_label(command, files):
    assert command("digits.safetensors --to some/ --label 3 c --number 3") == ["some"]
    assert sorted(os.listdir("some")) == ["000000_3.png", "000001_2.png", "000002_3.png"]
    x = samples(files[1]["digits"], 3, [3, 2])
    np.testing.assert_allclose(colours("some/000001_2.png")[..., 1], bytes_of(x[1, 0], 0, 2), atol=1)


def test_weights_of_flow_matching_are_sampled_by_euler_steps_and_points_drawn(command, capsys):
    assert command("flow.safetensors --number 4 --evaluations 3") == ["flow.png"]
    out = capsys.readouterr().out
    assert (
        "u was trained at r = t alone (Flow Matching), so steps are those of --euler" in out and "3 Euler steps" in out
    )


def test_latents_are_an_array_without_a_tokenizer_and_pictures_with_one(command):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "vae")
        import diffusers_files

        diffusers_files.write_file(pathlib.Path("vae.safetensors"), diffusers_files.tensors(TINY_VAE))
    assert "latent.npy" in command("latent.safetensors --number 2")
    command("latent.safetensors --number 2 --vae vae.safetensors --to some/")
    tokenizer = vae.load_autoencoder("vae.safetensors", TINY_VAE)
    decode = jax.jit(lambda z: tokenizer.decode(STATISTICS.restore(z)))
    for i, z in enumerate(np.load("latent.npy")):
        expected = np.moveaxis(np.asarray(decode(z)), 0, -1)
        np.testing.assert_allclose(colours(f"some/00000{i}.png"), bytes_of(expected, -1, 1), atol=1)


def test_a_dry_run_tells_what_it_would_make_and_leaves_nothing(command, capsys):
    assert command("plain.safetensors --evaluations 2 --to new/folder/x.png --dry-run") == []
    out = capsys.readouterr().out
    assert re.search(
        r"DiT of [\d,]+ parameters, steps 7, decay 0.9; 64 samples of shape \(1, 8, 8\), 2 evaluations", out
    )
    assert "would be written to new/folder/x.png" in out


def test_weights_that_know_only_averages_to_the_data_take_new_noise_before_a_further_evaluation(command, files, capsys):
    command("ends.safetensors --label 1 --number 2 --evaluations 2")
    assert "2 evaluations, 100% new noise before each but the first" in capsys.readouterr().out
    expected = samples(files[1]["ends"], 2, [1], times=(1.0, 0.5, 0.0), method=mfx.sample_consistency)
    np.testing.assert_allclose(np.load("ends.npy"), expected, rtol=1e-5, atol=1e-6)


def test_a_share_of_new_noise_is_taken_before_a_further_evaluation(command, files, capsys):
    command("digits.safetensors --to x.npy --label 1 --number 2 --evaluations 2 --new-noise 0.5")
    assert "2 evaluations, 50% new noise before each but the first" in capsys.readouterr().out
    method = functools.partial(mfx.sample_consistency, new_noise=0.5)
    expected = samples(files[1]["digits"], 2, [1], times=(1.0, 0.5, 0.0), method=method)
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)


def test_weights_that_know_only_averages_to_the_data_make_one_evaluation_guided_or_not(command, files):
    assert command("ends.safetensors --label 1 --number 2") == ["ends.npy"]
    np.testing.assert_allclose(np.load("ends.npy"), samples(files[1]["ends"], 2, [1]), rtol=1e-5, atol=1e-6)
    command("ends.safetensors --label 1 --number 2 --guidance-scale 2")
    expected = samples(mfx.GuidedField(files[1]["ends"], 2, jnp.asarray(2)), 2, [1])
    np.testing.assert_allclose(np.load("ends.npy"), expected, rtol=1e-5, atol=1e-6)


def test_guidance_of_weights_that_say_nothing_is_a_warning(command, capsys):
    command("unsaid.safetensors --guidance-scale 2 --dry-run")
    text = "warning: unsaid.safetensors does not say whether u without a label was trained at r < t"
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "sampler"), [pytest.param("", mfx.sample, marks=pytest.mark.slow), ("--euler", mfx.sample_euler)]
)
def test_a_network_that_takes_guidance_gets_scale_and_interval(command, files, capsys, steps, sampler):
    flags = "--label 1 --number 2 --evaluations 2 --guidance-scale 3 --guidance-interval 0.2 0.7"
    command(f"guided.safetensors --to x.npy {flags} {steps}")
    field = mfx.WithGuidance(files[1]["guided"], 3.0, (0.2, 0.7))
    expected = samples(field, 2, [1], times=(1, 0.5, 0), method=sampler)
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)
    assert ", guidance 3 for t from 0.2 to 0.7, " in capsys.readouterr().out


def test_guidance_beyond_that_of_the_training_is_made_if_it_is_asked_for(command, files):
    flags = "--label 1 --number 2 --guidance-scale 9 --guidance-interval 0.6 0.7 --untrained-guidance"
    command(f"drawn.safetensors --to x.npy {flags}")
    expected = samples(mfx.WithGuidance(files[1]["drawn"], 9.0, (0.6, 0.7)), 2, [1])
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)


def test_euler_steps_take_any_interval_since_all_times_are_trained_with_and_without_guidance(command, files):
    flags = "--label 1 --number 2 --evaluations 2 --guidance-scale 3 --guidance-interval 0.6 1 --euler"
    command(f"drawn.safetensors --to x.npy {flags}")
    field = mfx.WithGuidance(files[1]["drawn"], 3.0, (0.6, 1.0))
    expected = samples(field, 2, [1], times=(1, 0.5, 0), method=mfx.sample_euler)
    np.testing.assert_allclose(np.load("x.npy"), expected, rtol=1e-5, atol=1e-6)


def test_several_scales_are_rows_of_one_picture_of_the_same_noise(command, files, monkeypatch):
    grids = []
    monkeypatch.setattr(files[2].picture, "save_image_grid", lambda *grid, **names: grids.append((*grid, names)))
    command("drawn.safetensors --guidance-scale 1 8 --guidance-interval 0.4 0.6")
    ((path, grid, low, high, names),) = grids
    assert (path, low, high, grid.shape) == ("drawn.png", -1, 1, (2, 2, 1, 8, 8))
    assert names == {"row_labels": ["guidance 1", "guidance 8"], "column_labels": ["0", "1"]}
    for row, scale in zip(grid, (1.0, 8.0), strict=True):
        expected = samples(mfx.WithGuidance(files[1]["drawn"], scale, (0.4, 0.6)), 2, [0, 1])
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(grid[0] - grid[1]).max() > 1e-3


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing", "No such file or directory: 'missing'"),
        (".", r"--weights must be a file of weights, got the folder \., which has digits.safetensors, "),
        ("vectors.npy", "vectors.npy: must be a file of save_weights"),
        ("guided.safetensors --to x.npy --guidance-scale 0", "--guidance-scale must be > 0 for guided.*, got 0"),
        (
            "drawn.safetensors --guidance-scale 2 8.5",
            r"--guidance-scale must lie in \[1, 8\], as in the training of drawn.saf.*-guidance be .*, got 8.5",
        ),
        ("drawn.safetensors --guidance-scale 0.9", r"--guidance-scale must lie in \[1, 8\], .*, got 0.9"),
        (
            "drawn.safetensors --guidance-interval 0.6 1",
            r"--guidance-interval must satisfy 0 <= first <= 0.5 <= last <= 1, as in .*, got 0.6 1",
        ),
        (
            "drawn.safetensors --to x.npy --guidance-scale 1 2",
            "--guidance-scale must be one scale for all but .* x.npy",
        ),
        ("digits.safetensors --untrained-guidance", "--untrained-guidance must be left out for digits.*, which takes"),
        ("digits.safetensors --guidance-interval 0 0.5", "--guidance-interval must be 0 1 for digits.*, got 0 0.5"),
        (
            "guided.safetensors --guidance-interval 0.5 0.2",
            "--guidance-interval must satisfy 0 <= first <= last .* 0.2",
        ),
        ("digits.safetensors --label 99", r"--label must lie in \[0, 11\] or be among .* for dig.*, got 99"),
        ("digits.safetensors --label z", "--label must lie in .*, got z"),
        ("plain.safetensors --label 1", "--label must be left out for plain.safetensors, without labels, got 1"),
        ("plain.safetensors --guidance-scale 2", "--guidance-scale must be 1 for plain.safetensors, without labels"),
        ("digits.safetensors --guidance-scale 2", "--guidance-scale must be 1, or --euler be given, for digits"),
        ("robot.safetensors", r"--condition must be given: vectors of 5, such as robot.safetensors, got none"),
        ("robot.safetensors --condition short.npy", r"--condition must have rows of shape \(5,\), got \(3,\) in short"),
        ("robot.safetensors --condition none.npy", "--condition: No such file or directory: 'none.npy'"),
        ("digits.safetensors --condition vectors.npy", "--condition must be left out for weights without vectors"),
        ("plain.safetensors --condition vectors.npy", "--condition must be left out for weights without vectors"),
        (
            "robot.safetensors --condition vectors.npy --to x.png",
            "--to must end in .npy for robot.*, whose samples are",
        ),
        ("flow.safetensors --to some/", "--to must end in .npy for flow.safetensors, whose samples are no images"),
        ("latent.safetensors --to x.png", "--to must end in .npy for latent.*, whose latents need --vae for pictures"),
        ("plain.safetensors --vae vae", "--vae must be left out for plain.safetensors, whose values are no latents"),
        ("plain.safetensors --to x.jpg", r"--to must end in .png, in .npy, or in / for a folder, got x.jpg"),
        ("ends.safetensors --to x.png", "--to must end in .npy for ends.*, whose notes give no range of pixels, got x"),
        ("ends.safetensors --new-noise 0.5", "--new-noise must be 1 or left out for ends.*, whose u .* r = 0 alone"),
        ("flow.safetensors --euler --new-noise 0.5", "--new-noise must be 0 for Euler steps, got 0.5"),
        ("digits.safetensors --new-noise 2", r"--new-noise must lie in \[0, 1\], got 2"),
        ("ends.safetensors --euler", "--euler must be left out for ends.*, whose u was not trained at r = t, got --eu"),
        ("one.safetensors --evaluations 2", "--evaluations must be 1 for one.*, .* trained in one step alone, got 2"),
        ("one.safetensors --times 1 0.5 0", "--evaluations must be 1 for one.*, .* trained in one step alone, got 2"),
        ("plain.safetensors --to vectors.npy/x.png --dry-run", "Not a directory: '.*vectors.npy'"),
        ("plain.safetensors --to vectors.npy/ --dry-run", "Not a directory: '.*vectors.npy'"),
        ("plain.safetensors --to . --dry-run", r"--to must be a new or empty folder, got \."),
        ("plain.safetensors --number 10001", "--number must be at most 10000 in one picture, got 10001"),
        ("drawn.safetensors --guidance-scale 2 4 2", r"--guidance-scale must have each number once, got \(2.0, 4.0, 2"),
        ("drawn.safetensors --guidance-scale 2 4 --number 101", "--number must be at most 100 in .* scales, got 101"),
        ("drawn.safetensors --guidance-scale 2 4 --number 5001", "--number must be at most 10000 in .*, got 5001 for"),
        ("plain.safetensors --number 0", "--number must be >= 1, got 0"),
        ("plain.safetensors --times 1 0.5", "--times must fall strictly from 1 to 0"),
        ("plain.safetensors --times 1 0 --evaluations 1", "--evaluations must be left out with --times, got 1"),
        ("plain.safetensors --guidance-scale -1", "--guidance-scale must be >= 0 and finite, got -1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")  # as generate.py runs, which checks no types
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, command, refusal_of):
    before = set(os.listdir())
    line = refusal_of(command, arguments)
    assert set(os.listdir()) == before
    assert re.search(message, line), line


def test_only_what_is_made_needs_a_package(command, monkeypatch):
    """PNG files need no matplotlib, arrays no package at all."""
    needed = []
    monkeypatch.setattr(run, "require", lambda *packages: needed.append(packages))
    for place in ("x.npy", "x.png", "new/"):
        command(f"digits.safetensors --to {place} --dry-run")
    assert needed == [("matplotlib",), ("PIL",)]


def test_weights_of_a_network_of_ones_own_are_refused_by_name(command, refusal_of):
    class Own(nn.AbstractConditionEmbedding):
        weight: jax.Array

        def __call__(self, condition):
            return condition @ self.weight

    field = filled(lambda: mfx.MLP(2, width=4, depth=1, condition=Own(jnp.ones((3, 4))), key=jr.key(0)))
    checkpoint.save_weights("own.safetensors", field)
    message = "own.safetensors: must describe its network, an MLP, DiT, InContextDiT or UNet"
    assert message in refusal_of(command, "own.safetensors")
