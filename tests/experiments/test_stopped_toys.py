"""The scripts of small trainings as processes: told to stop in the middle, each ends as the undisturbed one."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LONGEST = 600  # seconds
TOY = "--data three_gaussians --methods MeanFlow FlowMatching --steps 1500 --width 16 --depth 1 --batch 16 "
COMMANDS = {
    "toy_2d": TOY + "--settings common --shorter --samples 50 --large-samples 50 --rows 10",
    "weight_bias": "--data three_gaussians --powers 0 --offsets 1 --steps 1500 --seeds 1 --samples 50 --rows 10",
    "tangent_study": "--data three_gaussians --tangents 1 --steps 1500 --stages 1500 --seeds 1 --width 16 --depth 1 "
    "--samples 50 --rows 10 --gradient-rows 64",
    "couplings": "--data three_gaussians --steps 1500 --pairs 512 --group 64 --batch 8 --samples 50",
    "ablations": "--only 1a --seeds 1 --steps 1500",
}

pytestmark = pytest.mark.slow
for package in ("tyro", "matplotlib", "sklearn", "grain", "orbax.checkpoint"):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)


def start(script, folder, *more):
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXTYPING_DISABLE": "1", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), *COMMANDS[script].split(), *more]
    command += ["--workers", "2", "--log-every", "10", "--save-every", "500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def ended(process, code):
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == code, err[-3000:]
    return out, err


def results(folder):
    """All figures, whatever the order in which they came."""
    (directory,) = (folder / "runs").glob("*/*")
    ledger = directory / "cells.jsonl"
    if ledger.exists():
        records = [json.loads(line) for line in ledger.read_text().splitlines()]
        return sorted(json.dumps([record["settings"], record["result"]]) for record in records)
    return json.loads((directory / "results.json").read_text())


def metrics(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("runs/*/*/cells/*/metrics.jsonl")}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_that_is_told_to_stop_ends_later_as_if_nothing_had_been(script, tmp_path):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    out, _ = ended(start(script, undisturbed, "--dry-run"), 0)
    assert "memory per device" in out and not list(undisturbed.iterdir())
    ended(start(script, undisturbed), 0)
    process, limit = start(script, stopped), time.monotonic() + LONGEST
    while sum(lines.count(b"\n") for lines in metrics(stopped).values()) < 20:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[1][-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = ended(process, 143)
    line = err.splitlines()[-1]
    assert line.startswith(f"{script}.py: stopped by SIGTERM after step ") and "Traceback" not in err
    out, _ = ended(start(script, stopped), 0)
    assert "continues; of " in out
    assert results(stopped) == results(undisturbed)
    assert metrics(stopped) == metrics(undisturbed)
