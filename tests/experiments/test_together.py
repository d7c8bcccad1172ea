"""How scripts start: nothing may touch a device before the processes of a run have met, and two train as one."""

import functools
import json
import os
import subprocess
import sys

import jax.random as jr
import numpy as np
import pytest
from image_files import save_idx, save_mnist
from latent_files import save_latents
from processes import ended, free_address, TESTS

import mf_eqx as mfx
from mf_eqx import checkpoint

for package in ("tyro", "matplotlib", "sklearn", "beartype", "grain", "orbax.checkpoint", "safetensors"):
    pytest.importorskip(package)
pytestmark = pytest.mark.rehearsal

ROOT = TESTS.parent
IMAGES = (np.arange(2560) ** 2 % 256).reshape(40, 8, 8)
LABEL = np.arange(40) % 10

# Of every script that trains with several processes: two steps of a minuscule network, both logged.
DIT = "--log-every 1 --depth 1 --heads 2 --width 8"
UNET = "--log-every 1 --width 4 --multipliers 1 --blocks 1 --attention"
TRAINING = {
    "digits": f"{DIT} --steps 2 --batch 16 --warmup 2",
    "cifar10": f"{UNET} --preset tiny --steps 2 --batch 8 --warmup 2 --augmentation 0 --preview-every 0",
    "images": f"{DIT} --data idx --steps 2 --batch 8",
    "fashion": f"{DIT} --data mnist --steps 2 --batch 8",
    "imagenet_latents": f"{DIT} --preset tiny --epochs 1.3 --batch 8",
    "pixels": f"{DIT} --preset tiny --depth 2 --data mnist --epochs 0.4 --batch 8",
    "tokenizer": "--log-every 1 --data mnist --widths 4 --latent 2 --groups 2 --steps 2 --batch 8 --test-run",
    "post_train": "--log-every 1 --start base.safetensors --data mnist --steps 2 --batch 16 --warmup 0 --test-run",
}

IMPORT = """
import dataclasses, importlib, json, sys
import jax
from mf_eqx import run

found = {}
for number, name in enumerate(sys.argv[1:], start=2):
    script = importlib.import_module(name)
    kind = getattr(script, "Config", None)
    trains = kind is not None and issubclass(kind, run.Settings)
    if trains:
        [dataclasses.replace(config) for _, config in getattr(script, "PRESETS", {"": ("", kind())}).values()]
    try:
        jax.config.update("jax_num_cpu_devices", number)  # refused as soon as there are devices
        found[name] = trains
    except RuntimeError:
        raise SystemExit(f"{name} touches a device when it is imported or its configuration is made")
print(json.dumps(found))
"""


def start(command, folder, **options):
    path = os.pathsep.join(map(str, [ROOT, ROOT / "experiments", ROOT / "benchmarks"]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXTYPING_DISABLE": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, **pipes, **options)


def start_script(name, folder, *flags):
    return start([ROOT / "experiments" / f"{name}.py", *TRAINING[name].split(), *flags], folder)


@functools.cache
def imported():
    """Of every script but the tour, which is one long cell, whether it trains with several processes. They are imported
    one after the other."""
    paths = [path for folder in ("experiments", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    names = [path.stem for path in paths if path.stem != "tour"]
    found = ended(start(["-c", IMPORT, *names], ROOT))
    assert found.code == 0, found.err[-3000:]
    assert list(json.loads(found.out)) == names
    return json.loads(found.out)


def test_no_script_touches_a_device_when_it_is_imported_or_makes_a_configuration_of_a_training():
    assert imported()


def test_every_training_script_is_started_below_as_two_processes():
    without = {"inverse"}  # which trains by digits.py, and goes on in the first process alone
    assert {name for name, trains in imported().items() if trains} - without == set(TRAINING)


def save_network(path):
    """What images.py leaves, of a network that has learnt nothing."""
    field = mfx.DiT((1, 8, 8), mfx.DiTSize(1, 8, 2, 4), labels=10, key=jr.key(0))
    checkpoint.save_weights(path, field, notes=checkpoint.Notes(pixels=(-1, 1)))


def records(folder):
    """All numbers of each step."""
    (path,) = folder.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder):
    """Files that a run left, of each checkpoint but the name."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return {str(path) for path in paths if path.parent.name == "checkpoints" or "checkpoints" not in path.parts}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_two_processes_train_to_the_end_as_one_does(name, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        save_latents(folder / "data" / "imagenet256")
        save_idx(folder / "idx", IMAGES)
        save_mnist(folder / "mnist", (IMAGES, LABEL), (IMAGES, LABEL))
        save_network(folder / "base.safetensors")
    several = ("--coordinator", free_address(), "--processes", "2", "--process")
    processes = [start_script(name, together, *several, process) for process in "01"]
    found = [ended(process, timeout=600) for process in (*processes, start_script(name, alone))]
    assert [each.code for each in found] == [0, 0, 0], "".join(each.err[-2000:] for each in found)
    assert written(together) == written(alone)
    expected = records(alone)
    assert [record["step"] for record in expected] == [1, 2]
    for one, other in zip(records(together), expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        for number in other:  # means of squares over other parts of the rows, with an adaptive weight before the loss
            np.testing.assert_allclose(*(np.array(each[number], float) for each in (one, other)), rtol=1e-5)
