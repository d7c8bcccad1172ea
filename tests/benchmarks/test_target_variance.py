"""Noise in targets: what the script measures is what the formulas say, and a whole small run."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import run

X = np.random.default_rng(0).standard_normal((2000, 3), np.float32) * np.float32([1.0, 2.0, 0.5])


@pytest.fixture(scope="module")
def target_variance(benchmark_script):
    pytest.importorskip("sklearn")
    pytest.importorskip("tyro")
    return benchmark_script("target_variance")


def test_near_noise_the_target_has_the_variance_of_the_data_and_n_references_leave_one_part_in_n_plus_one(
    target_variance,
):
    noise, square, left = target_variance.noise(X, X[:500], np.float32(1.0), (1, 9))
    variance = np.sum(np.var(X, axis=0))
    np.testing.assert_allclose(noise, variance, rtol=0.15)  # of 500 rows
    np.testing.assert_allclose(square, 3 + variance, rtol=0.15)
    np.testing.assert_allclose(left / noise, [1 / 2, 1 / 10], rtol=0.15)


def test_near_the_data_nothing_is_left_to_remove(target_variance):
    noise, _, _ = target_variance.noise(100 * X, 100 * X[:500], np.float32(0.01), (1, 9))
    assert float(noise) < 1e-6


@pytest.mark.slow
def test_a_run_leaves_shares_of_every_data_set(target_variance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--copies 1 3 --times 0.5 1 --numbers 4 --data-rows 64 --rows 16 --name one"
    run.main(target_variance.main, target_variance.Config(), argv=arguments.split())
    (path,) = tmp_path.glob("runs/*/one/results.json")
    records = json.loads(path.read_text())
    assert [record["dim"] for record in records] == [2, 6, 64]
    assert all(0 < share < 1 for record in records for share in record["noise"])
    assert all(np.shape(record["left"]) == (2, 1) for record in records)


def test_a_data_set_of_few_rows_has_no_column_of_more_references(target_variance):
    rows = jnp.ones((3, 2))
    assert target_variance.noise(rows, rows, 0.5, ())[2].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images one", "--images must be two files, of images and of labels, got 1"),
        ("--images one two", "--images must be files, found none at one"),
        ("--times 0", r"--times must be positive numbers, got \(0.0,\)"),
        ("--times 2", r"--times must lie in \(0, 1\], got 2.0"),
        ("--rows 0", "--rows must be >= 1, got 0"),
        ("--data-rows 20000", "--data-rows must be at most 16384, got 20000"),
    ],
)
def test_bad_input_ends_in_one_line(target_variance, arguments, message, refusal_of):
    line = refusal_of(run.main, target_variance.main, target_variance.Config(), argv=arguments.split())
    assert re.search(message, line), line
