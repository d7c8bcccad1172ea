"""The README's own words: its examples run and learn, its tree is the tree."""

import pathlib
import re

import jax
import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx.metrics import energy_distance

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(snippet, names):
    exec(compile(snippet, "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def example():
    """The names that the first example leaves behind."""
    return run(SNIPPETS[0], {})


def test_example_generates_the_mixture_in_one_evaluation(example):
    data = example["draw"](jr.split(jr.key(99), 2000))
    noise = jr.normal(jr.key(2), (2000, 2))
    assert energy_distance(example["x"], data) < energy_distance(noise, data) / 5  # seen: a tenth


def test_example_reports_raw_errors(example):
    assert {"boundary_error", "identity_error"} <= set(jax.device_get(example["metrics"]))


def test_robot_acts_on_what_it_observes(example, tmp_path, monkeypatch):
    pytest.importorskip("grain")
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    observed = draws.standard_normal((5000, 12)).astype(np.float32)
    slope = draws.standard_normal((12, 24)).astype(np.float32) / 12**0.5
    actions = (observed @ slope + 0.1 * draws.standard_normal((5000, 24))).astype(np.float32).reshape(-1, 8, 3)
    np.save("actions.npy", actions)
    np.save("observations.npy", observed)
    assert len(SNIPPETS[1].splitlines()) <= 15
    fewer = SNIPPETS[1].replace(", 1000)", ", 300)")
    assert fewer != SNIPPETS[1]
    chunks = np.asarray(run(fewer, dict(example))["chunks"])
    assert chunks.shape == (100, 8, 3)
    assert np.mean((chunks - actions[:100]) ** 2) < np.var(actions) / 5


def test_there_are_two_examples():
    assert len(SNIPPETS) == 2


def test_the_docstring_of_the_package_names_everything_in_it():
    entries = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "mf_eqx").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__.py"}
    assert entries == set(re.findall(r"^    (\w+(?:/|\.py)) ", mfx.__doc__, re.MULTILINE))
