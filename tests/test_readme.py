"""The README's own words: its example runs and learns, its tree is the tree."""

import pathlib
import re

import jax
import jax.random as jr
import pytest

from mf_eqx.metrics import energy_distance

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example():
    """The names that the example leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_example_generates_the_mixture_in_one_evaluation(example):
    data = example["draw"](jr.split(jr.key(99), 2000))
    noise = jr.normal(jr.key(2), (2000, 2))
    assert energy_distance(example["x"], data) < energy_distance(noise, data) / 5  # seen: a tenth


def test_example_reports_raw_errors(example):
    assert {"boundary_error", "identity_error"} <= set(jax.device_get(example["metrics"]))


def test_tree_names_everything_in_the_package():
    tree = README.split("## What is where")[1].split("```")[1]
    entries = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "mf_eqx").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__.py"}
    assert entries == set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
