"""A tokenizer of one's own by the command lines of all scripts: images -> tokenizer -> latents -> field -> judged."""

import json
import os
import pathlib
import re
import shlex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import save_mnist
from processes import Killed

from mf_eqx import checkpoint, data, run, vae

DRAWS = np.random.default_rng(11)
SMALL = "--data files --preset quick --widths 4 --latent 2 --groups 2 --batch 8 --samples 20"
SHORT = "--steps 4 --warmup 1 --decay 0.5 --save-every 2 --log-every 1 --preview-every 0"
PATH = "--data files --preset quick --widths 4 8 --latent 2 --groups 2 --batch 16 --samples 20 --learning-rate 1e-2"
PLACE = pathlib.Path("/usr/share/datasets/fashion-mnist")
installed = pytest.mark.skipif(not PLACE.exists(), reason="apt install dataset-fashion-mnist")


def save_files(folder, side=8):
    """Files as of MNIST, squares of the brightness of their class: 200 to train on, 40 darker ones."""
    parts = []
    for count, brighter in ((200, 30), (40, 0)):
        label = np.arange(count) % 10
        x = DRAWS.integers(0, 20, (count, side, side))
        x[:, 2:-2, 2:-2] += 20 * label[:, None, None] + brighter
        parts.append((x, label))
    save_mnist(folder, *parts)


@pytest.fixture(scope="module")
def tokenizer(experiment):
    pytest.importorskip("safetensors")
    return experiment("tokenizer")


@pytest.fixture(scope="module")
def few(tokenizer):
    """Judged in one space of features, and the classifier hardly trained."""
    judging = tokenizer.image_judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer.fashion.images, "EVALUATIONS", (1,))
        patch.setattr(tokenizer.image_classifier, "STEPS", 3)
        patch.setattr(judging, "feature_spaces", lambda: [judging.FeatureSpace("pixels", judging.pixels)])
        yield


@pytest.fixture(scope="module")
def command(experiment, few):
    """A script by its name, from a command line in a folder; returns the newest directory of its runs."""

    def command(root, name, arguments):
        script = experiment(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr("sys.argv", [f"{name}.py"])
            run.main(script.main, getattr(script, "PRESETS", None) or script.Config(), argv=arguments.split())
        return max(root.glob(f"runs/{name}/*/config.json"), key=os.path.getmtime, default=root / "none").parent

    return command


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    save_files(root / "files")
    return command(root, "tokenizer", f"{SMALL} {SHORT}")


@pytest.mark.slow  # with the next three tests 50 s or more, nearly all of it compiling
def test_a_run_leaves_a_tokenizer_with_statistics_a_picture_and_tables(finished, tokenizer):
    names = {"reconstructions.png", "curves.png", "results.json", "vae"}
    assert names <= {path.name for path in finished.iterdir()}
    network, statistics = (read(finished / "vae") for read in (vae.load_autoencoder, vae.read_latent_statistics))
    assert network.size == vae.AutoencoderSize((4,), 1, 2, 2, channels=1)
    assert len(statistics.mean) == len(statistics.std) == 2
    table = (finished / "results.md").read_text()
    for text in ("PSNR, dB", "standard deviation", "mean latents", "drawn latents", "training images", "nats"):
        assert text in table, text
    mean, drawn, *_ = json.loads((finished / "results.json").read_text())
    assert 0 < mean["absolute_error"] < drawn["absolute_error"] < 1  # of so short a training; noise never helps here


@pytest.mark.slow
def test_latents_of_training_images_have_unit_variance_by_the_statistics(finished, tokenizer):
    network, statistics = (read(finished / "vae") for read in (vae.load_autoencoder, vae.read_latent_statistics))
    train = data.read_idx(*tokenizer.image_sources.mnist_files(finished.parents[2] / "files", "train"))
    found = tokenizer.encoded(network, train.take(np.arange(200)).x)
    z = jax.vmap(statistics.standardise)(jnp.asarray(found.sampled()))
    np.testing.assert_allclose(z.mean(axis=(0, 2, 3)), 0, atol=0.05)  # five standard errors of 200 x 64 draws
    np.testing.assert_allclose(z.std(axis=(0, 2, 3)), 1, atol=0.05)


@pytest.mark.slow
def test_test_images_change_neither_tokenizer_nor_statistics(finished, command, tmp_path):
    (tmp_path / "files").mkdir()
    for path in (finished.parents[2] / "files").iterdir():
        content = path.read_bytes()
        is_test = path.name.startswith("t10k-images")
        (tmp_path / "files" / path.name).write_bytes(content[:16] + content[:15:-1] if is_test else content)
    again = command(tmp_path, "tokenizer", f"{SMALL} {SHORT}")
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (again / "vae" / name).read_bytes() == (finished / "vae" / name).read_bytes()
    assert (again / "results.json").read_bytes() != (finished / "results.json").read_bytes()


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(finished, tokenizer, command, tmp_path, monkeypatch):
    (tmp_path / "files").symlink_to(finished.parents[2] / "files")

    def killed(*given):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokenizer, "save_reconstructions", killed)  # by the preview of step 3
        command(tmp_path, "tokenizer", f"{SMALL} {SHORT} --preview-every 3")
    again = command(tmp_path, "tokenizer", f"{SMALL} {SHORT}")
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json", "metrics.jsonl", "results.json"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()


def test_signal_to_noise_is_that_of_its_definition(tokenizer):
    x = DRAWS.integers(20, 230, (3, 1, 4, 4), np.uint8)
    ten = (x + 10.0) / 127.5 - 1
    assert tokenizer.peak_signal_to_noise(x, ten) == pytest.approx(20 * np.log10(25.5))
    assert tokenizer.peak_signal_to_noise(x, x / 127.5 - 1) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "--data must be files or folders that exist, got nowhere"),
        ("--widths 4 4 4 4 4 --groups 2", "--widths must be 5 numbers for images with sides that are multiples of 16"),
        ("--widths 6 9", r"--widths must be multiples of the 8 groups, got \(6, 9\)"),
        ("--widths", "--widths must be 1 to 8 numbers, got 0"),
        ("--kl -1", "--kl must be >= 0 and finite, got -1"),
        ("--learning-rate 0", r"--learning-rate must lie in \(0, 1\), got 0.0"),
        ("--steps 20 --warmup 20", "--warmup must be below the 20 steps, got 20"),
        ("--decay 1", r"--decay must lie in \[0, 1\), got 1.0"),
        ("--batch 0", "--batch must be a positive"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_run(arguments, message, tokenizer, tmp_path, monkeypatch, refusal_of):
    monkeypatch.chdir(tmp_path)
    save_files(tmp_path / "files")
    flags = arguments if arguments.startswith("--data") else f"--data files {arguments}"
    line = refusal_of(run.main, tokenizer.main, tokenizer.PRESETS, argv=flags.split())
    assert not list(tmp_path.glob("runs/*/*"))
    assert re.search(message, line), line


@pytest.fixture
def printed(tokenizer, experiment, tmp_path, monkeypatch):
    """What the commands that are printed after a run with these settings mean to the two scripts."""
    (tmp_path / "my photos").mkdir()
    monkeypatch.chdir(tmp_path)

    def printed(**how):
        found, directory = [], run.RunDirectory(pathlib.Path("runs/a run"))
        for command in tokenizer.next_commands(tokenizer.Config(**how), directory, 200):
            python, path, *flags = shlex.split(command)
            assert pathlib.Path(python).exists() and pathlib.Path(path).exists()
            script = experiment(pathlib.Path(path).stem)
            run.main(found.append, getattr(script, "PRESETS", None) or script.Config(), argv=flags)
        return found

    return printed


def test_commands_that_are_printed_take_the_same_images_as_the_tokenizer(printed):
    how = {"size": (16, 8), "grey": True}
    encoding, training = printed(data=("my photos",), holdout=0.25, **how)
    wanted = {"images": ("my photos",), "vae": "runs/a run/vae"}
    found = {name: getattr(encoding, name) for name in ("images", "vae", "size", "grey", "holdout", "parts")}
    assert found == {**wanted, **how, "holdout": 0.25, "parts": 1}
    assert (training.images, training.vae, training.data) == (("my photos",), encoding.vae, encoding.to)
    assert (training.patch, training.test) == (1, ())
    assert training.epochs * 200 == training.batch * 4000 == 20 * 200 * training.warmup_epochs  # steps of the preset


def test_commands_that_are_printed_take_files_of_labels_and_test_images_along(printed):
    encoding, training = printed(data=("images", "labels"), test=("more images", "more labels"))
    assert encoding.images == training.images == ("images", "labels") and encoding.holdout == 0
    assert training.test == ("more images", "more labels")


# The whole path


@pytest.fixture(scope="module")
def latents(command, tmp_path_factory):
    """A tokenizer that has learnt something, and the latents of its training images."""
    root = tmp_path_factory.mktemp("path")
    save_files(root / "files")
    directory = command(root, "tokenizer", f"{PATH} --steps 150 --warmup 5 --save-every 150 --preview-every 0")
    os.symlink(directory / "vae", root / "vae")
    command(root, "prepare_latents", "--images files --vae vae --to latents --parts 2 --batch 50")
    return root, directory


@pytest.mark.slow
def test_tokenizer_learns_what_tells_images_apart(latents, tokenizer):
    root, directory = latents
    records = run.RunDirectory(directory).records()
    assert records[-1]["absolute_error"] < 0.5 * records[0]["absolute_error"]
    network = vae.load_autoencoder(root / "vae")
    x = data.read_idx(*tokenizer.image_sources.mnist_files(root / "files", "t10k")).take(np.arange(40)).x
    made = tokenizer.decoded(network, tokenizer.encoded(network, x).mean)
    brightness = [values.mean(axis=(1, 2, 3)) for values in (x, made)]
    assert np.corrcoef(*brightness)[0, 1] > 0.9  # that of the class; a constant image would have none


@pytest.mark.slow
def test_latents_are_of_training_images_alone(latents, experiment):
    root, _ = latents
    prepare_latents = experiment("prepare_latents")
    source, notes = prepare_latents.open_latents(str(root / "latents")), prepare_latents.read_notes(root / "latents")
    assert (len(source), source.labels, source.row_shape, notes.size) == (200, 10, (4, 4, 4), [8, 8])
    network = vae.load_autoencoder(root / "vae")
    assert notes.of_tokenizer() == checkpoint.Tokenizer(
        network.size, network.digest(), vae.read_latent_statistics(root / "vae")
    )


LATENT_DIT = "--preset quick --data latents --vae vae --depth 1 --width 16 --heads 2 --batch 16 --save-every 100"


@pytest.mark.slow
def test_latents_are_trained_on_judged_evaluated_and_generated(latents, command):
    root, _ = latents
    how = "--epochs 0.4 --warmup-epochs 0 --decay 0.5 --images files --samples 20 --preview-every 3"
    directory = command(root, "imagenet_latents", f"{LATENT_DIT} {how}")
    floor, *_, row = json.loads((directory / "results.json").read_text())
    assert floor["what"] == "training images" and row["what"] == "MeanFlow on latents"
    assert np.isfinite(row["frechet"]["pixels"]) and len(row["agreement_by_class"]) == 10
    assert {"samples.png", "comparison.png", "curves.png"} <= {path.name for path in directory.iterdir()}
    weights = (directory / "ema_0.5.safetensors").relative_to(root)
    statistics = vae.read_latent_statistics(root / "vae")
    assert checkpoint.read_weights(root / weights).notes.tokenizer.statistics == statistics

    command(root, "generate", f"--weights {weights} --vae vae --number 20 --to images.npy")
    command(root, "generate", f"--weights {weights} --number 20 --to latents.npy")
    x, z = (np.load(root / name) for name in ("images.npy", "latents.npy"))
    network = vae.load_autoencoder(root / "vae")
    expected = eqx.filter_jit(jax.vmap(network.decode))(jax.vmap(statistics.restore)(jnp.asarray(z)))
    np.testing.assert_allclose(x, expected, atol=1e-4)
    assert x.shape == (20, 1, 8, 8) and np.abs(expected - jax.vmap(network.decode)(jnp.asarray(z))).max() > 0.01
    command(root, "evaluate", f"--weights {weights} --vae vae --grid-only --batch 8 --decode-batch 8")


@pytest.mark.slow
def test_another_tokenizer_and_other_images_are_refused(latents, command, refusal_of, tmp_path):
    root, _ = latents
    network = vae.load_autoencoder(root / "vae")
    vae.save_autoencoder(
        root / "other",
        eqx.tree_at(lambda n: n.to_moments.bias, network, replace_fn=lambda b: b + 1),
        vae.LatentStatistics(),
    )
    if not (root / "others").exists():
        save_files(root / "others", side=12)
    for flags, message in (
        ("--vae other", "--vae must hold the tokenizer of latents, "),
        (
            "--vae vae --images others",
            "images must be the 200 of latents, 8 x 8 pixels, with 10 labels, ",
        ),
        ("--images files", "--images must be left out without vae, which decodes samples, got files"),
    ):
        arguments = f"--preset quick --data latents --batch 16 {flags}"
        assert message in refusal_of(command, root, "imagenet_latents", arguments)


@pytest.mark.slow
@installed
def test_quick_runs_on_fashion_mnist(command, tmp_path):
    directory = command(tmp_path, "tokenizer", "--preset quick --test-run")
    assert vae.load_autoencoder(directory / "vae").size.channels == 1
    assert "sneaker" in (directory / "results.md").read_text()
