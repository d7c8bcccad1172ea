"""The study of the tangent: its bias and variance at every b are those of gradients that are taken at that b, an exact
velocity has no bias, and the command leaves its results."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import mf_eqx as mfx
from mf_eqx import run

TINY = "--data three_gaussians --tangents 0 1 --seeds 1 --stages 2 --batches 16 128 --width 4 --depth 1"


@pytest.fixture(scope="module")
def tangent_study(experiment):
    return experiment("tangent_study")


@pytest.fixture(scope="module")
def gm(experiment):
    return experiment("gradient_moments")


@pytest.fixture(scope="module")
def exact(experiment):
    return pytest.importorskip("mf_eqx.exact")


def judged_untrained(config, trainings, judge, directory, *, note):
    """In place of `run.train_cells`: most of the time would go into compiling trainings."""
    results = {cell: judge(cell, training.make_state()) for cell, training in trainings.items()}
    assert all(note(cell, result).startswith(f"b {cell.b:g}, ") for cell, result in results.items())
    return results


def finished(tangent_study, root, monkeypatch):
    monkeypatch.chdir(root)
    run.main(tangent_study.main, tangent_study.Config(), argv=f"{TINY} --test-run".split())
    (directory,) = (root / "runs").glob("*/*")
    for name in ("config.json", "results.md", "results.json", "tangent_study.png"):
        assert (directory / name).stat().st_size > 0
    (results,) = json.loads((directory / "results.json").read_text())
    return results


@pytest.mark.slow
def test_results_and_a_figure_are_made_of_what_was_trained(tangent_study, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train_cells", judged_untrained)
    results = finished(tangent_study, tmp_path, monkeypatch)
    assert [line["b"] for line in results["gradients"]] == [0, 1, 0, 1]
    assert all(line["bias"] == [0, 0] for line in results["gradients"] if line["b"] == 1)
    assert [set(line) for line in results["best b"]] == [{"steps", "16", "128"}]
    assert len(results["trainings"]) == 5  # one is a stage
    assert all(line["error of u"] == 1 for line in results["trainings"])  # a fresh network outputs zero


@pytest.mark.slow
def test_a_test_run_trains_and_ends(tangent_study, tmp_path, monkeypatch):
    results = finished(tangent_study, tmp_path, monkeypatch)
    assert all(0 < line["error of u"] != 1 for line in results["trainings"])


def tiny_field(key):
    """A network with no zeros in it, in float64 where that is enabled."""

    def fill(leaf):
        return 0.3 * jr.normal(key, leaf.shape, float) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(fill, mfx.MLP(2, width=4, depth=1, key=key))


@pytest.fixture(scope="module")
def measured(gm):
    """A field, rows of any numbers, and what is measured of them, in float64."""
    with jax.enable_x64(True):
        keys, number = jr.split(jr.key(1), 4), 16 * gm.GROUPS
        r, t = jnp.sort(jr.uniform(keys[0], (2, number)), axis=0)
        z, u = jr.normal(keys[1], (2, number, 2))
        rows = gm.Rows(z, r, t, u, u[:, None] + jr.normal(keys[2], (number, 3, 2)))
        field = tiny_field(jr.key(0))
        return field, rows, gm.gradients(field, rows)


def gradient(loss, field):
    return ravel_pytree(eqx.filter(eqx.filter_grad(loss)(field), eqx.is_inexact_array))[0]


def gradients_at(b, field, rows, velocity):
    """The gradient of each row's loss, as the shipped identity has it at this b."""
    identity = mfx.MeanFlow() if b == 1 else mfx.ImprovedMeanFlow(b)

    def of_row(z, v, r, t):
        return gradient(lambda field: jnp.sum(identity.residual(field, mfx.Row(z, v, r, t)) ** 2), field)

    return np.asarray(jax.vmap(of_row)(rows.z, rows.v[:, velocity], rows.r, rows.t))


def square_of_mean(gm, values):
    """From products of different groups."""
    groups = values.reshape(gm.GROUPS, -1, values.shape[-1]).mean(1)
    return (np.sum(groups.sum(0) ** 2) - np.sum(groups**2)) / (gm.GROUPS * (gm.GROUPS - 1))


@pytest.mark.slow
@pytest.mark.parametrize("velocity", ["CONDITIONAL", "STABLE"])
def test_bias_and_variance_are_those_of_gradients_taken_at_each_b(gm, measured, velocity):
    (field, rows, found), given = measured, getattr(gm, velocity)
    with jax.enable_x64(True):
        true = gradients_at(1, field, rows, gm.MARGINAL)
        for b in (0, 0.3, 0.8, 1):
            bias = square_of_mean(gm, gradients_at(b, field, rows, gm.MARGINAL) - true)
            each = gradients_at(b, field, rows, given)
            multiplied = each.reshape(gm.GROUPS, -1, each.shape[-1])[:, :: gm.PER_PRODUCT]
            variance = np.mean(np.sum(multiplied**2, axis=-1)) - square_of_mean(gm, each)
            figures, square = gm.figures(gm.moments(*found), given, b), square_of_mean(gm, true)
            np.testing.assert_allclose(figures["bias"][0], np.sqrt(max(bias, 0) / square), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(figures["variance"][0], variance / square, rtol=1e-9)


def test_bias_is_proportional_to_the_predicted_part(gm, measured):
    found = gm.moments(*measured[2])
    bias = {b: gm.figures(found, gm.CONDITIONAL, b)["bias"][0] for b in (0, 0.5, 0.9, 1)}
    assert bias[0] > 0.01 and bias[1] == 0
    assert bias[0.5] == pytest.approx(bias[0] / 2) and bias[0.9] == pytest.approx(bias[0] / 10)


def test_descent_is_the_gradient_of_the_squared_error(measured):
    field, rows, (means, _) = measured

    def error(field):
        return jnp.mean(jnp.sum((jax.vmap(field)(rows.z, rows.r, rows.t) - rows.u) ** 2, axis=-1))

    with jax.enable_x64(True):
        expected = gradient(error, field)
    np.testing.assert_allclose(np.mean(np.asarray(means)[:, -1], axis=0), expected, rtol=1e-9, atol=1e-12)


class ExactOnTheDiagonal(mfx.AbstractField):
    """u(z, t, t) is the velocity; off the diagonal anything."""

    velocity: eqx.Module
    network: mfx.MLP

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.velocity(z, t) + (t - r) * self.network(z, r, t)


@pytest.fixture(scope="module")
def drawn(gm, exact):
    """A velocity, and rows of it."""
    distribution = exact.three_gaussians()
    stable_target = mfx.StableTarget(exact.draw(distribution, 512, jr.key(3)), number=128)
    objective = mfx.Objective(time_pairs=mfx.TimePairs(mfx.UniformTimes()), stable_target=stable_target)
    truth = exact.AverageVelocity(exact.MarginalVelocity(distribution), rtol=1e-4, atol=1e-4)
    return truth, gm.draw_rows(objective, distribution, truth, 16 * gm.GROUPS, jr.key(4))


@pytest.mark.slow
def test_references_have_less_variance_than_the_conditional_velocity(gm, drawn):
    _, rows = drawn
    error = np.mean(np.sum((rows.v - rows.v[:, gm.MARGINAL :]) ** 2, axis=-1), axis=0)
    assert error[gm.STABLE] < 0.2 * error[gm.CONDITIONAL] and error[gm.MARGINAL] == 0


@pytest.mark.slow
def test_an_exact_velocity_has_no_bias_at_any_b(gm, drawn):
    truth, rows = drawn
    field = ExactOnTheDiagonal(truth.velocity, tiny_field(jr.key(0)))
    found = gm.moments(*gm.gradients(field, rows))
    for b in (0, 0.5, 0.9):
        figures = gm.figures(found, gm.CONDITIONAL, b)
        assert figures["bias"][0] < 1e-5  # float32
        assert abs(figures["of that at b = 1"][0] - 1) > 1e-3  # so the gradients do depend on the tangent


def test_best_tangent_is_where_the_squared_error_is_least(gm):
    inner, covariance = np.zeros((2, gm.KINDS, gm.KINDS))
    inner[4:6, 4:6] = [[1, 1], [1, 1.01]]  # a squared bias of 0.01
    covariance[:2, :2] = [[2, 1.5], [1.5, 2]]  # the change has variance 1, and covariance -1/2 with that at b = 1
    found, grid = gm.Moments(inner[None], covariance[None]), np.linspace(0, 1, 1001)
    for batch, best in ((1e-9, 0.5), (100, 0.75), (1e9, 1)):
        errors = [gm.squared_error(found, gm.CONDITIONAL, b, batch) for b in grid]
        assert gm.best_tangent(found, gm.CONDITIONAL, batch)[0] == pytest.approx(best, abs=1e-6)
        assert grid[np.argmin(errors)] == pytest.approx(best, abs=1e-3) and errors[-1] == pytest.approx(1)


def test_standard_error_of_a_mean_is_the_usual_one(gm):
    x = np.random.default_rng(0).normal(size=gm.GROUPS)
    left_out = (x.sum() - x) / (gm.GROUPS - 1)
    expected = x.mean(), np.std(x, ddof=1) / np.sqrt(gm.GROUPS)
    assert gm.with_error(np.array([x.mean(), *left_out])) == pytest.approx(expected)


def test_every_b_is_trained_with_both_velocities(tangent_study):
    config = tangent_study.Config(tangents=(0.0, 1.0), seeds=2, steps=50, stages=(20, 50))
    cells = tangent_study.cells(config)
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 + 1  # one stage is among the trainings
    objectives = [tangent_study.objective_of(tangent_study.training(config, cell)) for cell in cells]
    for cell, objective in zip(cells, objectives, strict=True):
        assert getattr(objective.identity, "conditional", 1) == cell.b
        assert (objective.stable_target is None) == (cell.given == "conditional") == (objective.weight.power == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tangents 1.1", r"--tangents must lie in \[0, 1\], got 1.1"),
        ("--tangents 0 0.5 0", "--tangents must differ from each other, got 0.0, 0.5, 0.0"),
        ("--stages 0", "--stages must be >= 1, got 0"),
        ("--batches 0", "--batches must be >= 1, got 0"),
        ("--gradient-rows 100", "--gradient-rows must be a multiple of 16, got 100"),
        ("--seeds 0", "--seeds must be >= 1, got 0"),
        ("--data moons", "--data must be among"),
    ],
)
def test_bad_input_ends_in_one_line(tangent_study, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, tangent_study.main, tangent_study.Config(), argv=arguments.split())
    assert re.search(message, line), line
