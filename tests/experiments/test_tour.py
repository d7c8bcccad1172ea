"""The introduction: its first half in the default suite, and the whole script."""

import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx

for package in ("matplotlib", "safetensors", "flatbuffers"):
    pytest.importorskip(package)

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "tour.py"
CELLS = re.split(r"^# %%(?: \[markdown\])?\n", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
KINDS = ("boundary", "identity")


def test_points_become_samples_and_methods_have_costs(room, tmp_path, monkeypatch):
    """Cells up to the error, and those of a new method and of costs; without training, most of the time."""
    monkeypatch.chdir(tmp_path)
    mean = mfx.Mean(jnp.ones(()), jnp.ones(()))
    monkeypatch.setattr(mfx, "scan_steps", lambda _, state, *__: (state, {f"{k}_error": mean for k in KINDS}))
    names, titles = {}, [cell.split("\n")[0] for cell in CELLS]
    new, cost = (titles.index(f"# ## {title}") for title in ("A method of your own", "What does it cost?"))
    for cell in (*CELLS[: titles.index("# ## How far is it from the truth?")], CELLS[new + 1], CELLS[cost + 1]):
        exec(compile(cell, SCRIPT.name, "exec"), names)
    assert (tmp_path / "runs" / "tour" / "samples.png").stat().st_size > 0
    np.testing.assert_array_equal(names["panels"]["u, 1 evaluation"], names["eps"])  # a fresh MLP is zero
    np.testing.assert_allclose(names["cost"], 1 + 2 / 6, rtol=0.02)


def test_prose_and_code_take_turns():
    """Editors show a cell of prose as text: all its lines are comments."""
    prose = [cell for cell in CELLS if cell.startswith("# ")]
    assert len(prose) > 8
    assert all(line.startswith("#") or not line for cell in prose for line in cell.splitlines())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the script prints, and where it ran."""
    folder = tmp_path_factory.mktemp("tour")
    environment = {**os.environ, "TOUR_STEPS": "1000", "PYTHONPATH": str(SCRIPT.parents[1])}
    result = subprocess.run([sys.executable, SCRIPT], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, folder / "runs" / "tour"


def found(text, pattern):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.slow
def test_tour_leaves_pictures_weights_and_a_sampler(whole):
    names = {path.name for path in whole[1].iterdir()}
    assert names == {
        "samples.png",
        "methods.png",
        "guided.png",
        "scales.png",
        "weights.safetensors",
        "sampler.jaxexport",
    }
    assert found(whole[0], r"agrees to (.*)")[0] < 1e-5


@pytest.mark.slow
def test_tour_proves_its_own_method_and_shows_a_wrong_one(whole):
    own, mean_flow, wrong = found(whole[0], r"the exact field leaves (.*)")
    assert max(own, mean_flow) < 1e-8 and wrong > 0.1


@pytest.mark.slow
def test_tour_learns_by_both_methods(whole):
    assert max(found(whole[0], r"error of u (.*?),")) < 0.1
    distances = dict(re.findall(r"(.*): sliced Wasserstein distance to the data (.*)", whole[0]))
    assert float(distances["u, 1 evaluation"]) < float(distances["v, 1 evaluation"]) / 3


@pytest.mark.slow
def test_tour_says_what_a_step_costs(whole):
    # Half of the rows carry a tangent pass, or one and a forward pass more, or two forward passes.
    costs = found(whole[0], r"a step costs (.*) of Flow")
    np.testing.assert_allclose(costs, [1 + 1 / 6, 1 + 2 / 6, 1 + 2 / 6], rtol=0.02)
