"""The README's own words: its examples run and learn. What the package's docstring names is there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import exact
from mf_eqx.metrics import energy_distance

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
POINTS, ROBOT, OWN = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(snippet, names, **replaced):
    """The names that an example leaves behind."""
    for old, new in replaced.values():
        assert old in snippet
        snippet = snippet.replace(old, new)
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def first_example(steps):
    """What the first example leaves behind where it trains for fewer steps, and the points that it read."""
    x = np.asarray(exact.draw(exact.eight_gaussians(), 4000, jr.key(0)))
    np.save("points.npy", x)
    return run(POINTS, {}, steps=("(0, 3000)", f"(0, {steps})")), x


@pytest.fixture(scope="module")
def points(room, tmp_path_factory):
    """What the first example leaves behind after a few steps, and the points that it read."""
    for package in ("grain", "safetensors"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("points"))
        return first_example(20)


@pytest.mark.rehearsal
def test_points_are_generated_in_one_evaluation_by_the_saved_weights(points, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, x = first_example(500)
    samples = names["samples"]
    assert samples.shape == (1000, 2)
    noise = jr.normal(jr.key(3), (1000, 2))
    near, far = (float(energy_distance(made, jnp.asarray(x))) for made in (samples, noise))
    assert near < far / 4, (near, far)


def test_training_reports_raw_errors(points):
    assert {"boundary_error", "identity_error"} <= set(jax.device_get(points[0]["metrics"]))


@pytest.mark.rehearsal
def test_robot_acts_on_what_it_observes(points, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    observed = draws.standard_normal((5000, 12)).astype(np.float32)
    slope = draws.standard_normal((12, 24)).astype(np.float32) / 12**0.5
    actions = (observed @ slope + 0.1 * draws.standard_normal((5000, 24))).astype(np.float32).reshape(-1, 8, 3)
    np.save("actions.npy", actions)
    np.save("observations.npy", observed)
    assert len(ROBOT.splitlines()) <= 15
    chunks = np.asarray(run(ROBOT, dict(points[0]), steps=("(0, 1000)", "(0, 300)"), batch=("=128", "=64"))["chunks"])
    assert chunks.shape == (100, 8, 3)
    assert np.mean((chunks - actions[:100]) ** 2) < np.var(actions) / 5


def test_a_network_and_a_method_of_ones_own_train_together(points):
    names = run(OWN, dict(points[0]))
    network = names["Network"](names["eqx"].nn.MLP(4, 2, 64, 2, jax.nn.silu, key=jr.key(0)))
    velocity = exact.MarginalVelocity(exact.eight_gaussians(), mfx.LinearInterpolant())  # a target without variance
    objective = mfx.Objective(names["Midpoint"](), weight=mfx.ConstantWeight(), velocity=velocity)
    step = mfx.TrainStep(objective, optax.adam(5e-3))
    state = mfx.init_state(network, step.optimizer, key=jr.key(1))
    errors = []
    for _ in range(100):
        state, metrics = step(state, mfx.Batch(jnp.asarray(points[1][:256])))
        errors.append(float(metrics["boundary_error"].value))
    assert np.isfinite(errors).all() and np.mean(errors[-10:]) < np.mean(errors[:10]) / 2


def test_the_readme_fits_on_a_few_pages():
    assert len(README.splitlines()) <= 200


def test_the_docstring_of_the_package_names_everything_in_it():
    entries = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "mf_eqx").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__.py"}
    assert entries == set(re.findall(r"^    (\w+(?:/|\.py)) ", mfx.__doc__, re.MULTILINE))
