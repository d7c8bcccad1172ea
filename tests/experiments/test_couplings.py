"""Couplings of data and noise: what the sets of pairs are, and a run from its command line."""

import json
import re

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import run


@pytest.fixture(scope="module")
def couplings(experiment):
    return experiment("couplings")


class Turning(mfx.AbstractField):
    """A velocity that turns with time: from eps to x = eps - (1/2, 1/3), along a parabola."""

    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.stack([t, t**2])


class Straight(mfx.AbstractField):
    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.ones(2)


def test_optimal_pairs_are_shorter_and_have_the_same_ends(couplings):
    config = couplings.Config(pairs=256, group=64)
    pairs = couplings.independent(config)
    coupled = couplings.optimal(config, pairs)
    np.testing.assert_array_equal(coupled.x, pairs.x)
    for group in range(4):
        rows = slice(64 * group, 64 * (group + 1))
        assert {*map(tuple, np.asarray(coupled.eps[rows]))} == {*map(tuple, np.asarray(pairs.eps[rows]))}
    assert np.mean((coupled.x - coupled.eps) ** 2) < 0.5 * np.mean((pairs.x - pairs.eps) ** 2)


def test_rectified_pairs_are_joined_by_the_flow(couplings):
    eps = jr.normal(jr.key(0), (10, 2))
    found = couplings.rectified(Turning(), couplings.Pairs(jnp.zeros((10, 2)), eps))
    np.testing.assert_array_equal(found.eps, eps)
    np.testing.assert_allclose(found.x, eps - np.array([1 / 2, 1 / 3]), rtol=0, atol=1e-3)


def test_curvature_is_the_variance_of_the_velocity_along_a_trajectory(couplings):
    eps = jr.normal(jr.key(0), (10, 2))
    assert couplings.curvature(Straight(), eps) < 1e-10
    # Var(t) + Var(t^2) over [0, 1], divided by the squared length of their means.
    expected = (1 / 12 + 4 / 45) / (1 / 4 + 1 / 9)
    np.testing.assert_allclose(couplings.curvature(Turning(), eps), expected, rtol=0.1)


@pytest.mark.slow
def test_a_run_leaves_a_table_of_all_couplings_and_a_picture(couplings, room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--data three_gaussians --steps 4 --pairs 256 --group 64 --batch 8 --samples 50"
    run.main(couplings.main, couplings.Config(), argv=arguments.split())
    (directory,) = (tmp_path / "runs").glob("*/*")
    rows = json.loads((directory / "results.json").read_text())
    assert {(row["coupling"], row["method"]) for row in rows} == {
        (coupling, method) for coupling in couplings.COUPLINGS for method in couplings.METHODS
    }
    assert all(np.isfinite(row["curvature"]) and np.isfinite(row["TV, 4"]) for row in rows)
    assert (directory / "samples.png").stat().st_size > 0 and (directory / "results.md").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data moons", "--data must be among"),
        ("--data eight_gaussians_64d", "--data must be among"),
        ("--pairs 100 --group 64", "--pairs must be a multiple of group = 64, got 100"),
        ("--batch 3", "--batch must be even, got 3"),
        ("--group 1", "--group must be >= 2, got 1"),
    ],
)
def test_bad_input_ends_in_one_line(couplings, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, couplings.main, couplings.Config(), argv=arguments.split())
    assert re.search(message, line), line
