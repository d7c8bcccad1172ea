"""The comparison of du/dt with float64, on a network with one small block, where its conclusions hold already."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import nn


@pytest.fixture(scope="module")
def jvp_accuracy(benchmark_script):
    return benchmark_script("jvp_accuracy")


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Without which products of float32 are less on some accelerators."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def whole_run(jvp_accuracy, finished):
    """The directory of a run, and the rows and du/dt of its references by time scale."""
    references, reference = {}, jvp_accuracy.reference

    def kept(config, time_scale, rows):
        references[time_scale] = (rows, reference(config, time_scale, rows))
        return references[time_scale][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jvp_accuracy, "reference", kept)
        return finished("jvp_accuracy", model="tiny", rows=8, steps=(1e-1, 5e-3)), references


@pytest.fixture(scope="module")
def directory(whole_run):
    return whole_run[0]


@pytest.fixture(scope="module")
def errors(directory):
    """Median errors by engine, step, precision and time scale."""
    records = json.loads((directory / "results.json").read_text())
    return {(e["engine"], e["step"], e["precision"], e["time_scale"]): e["median"] for e in records}


@pytest.fixture
def small(jvp_accuracy, resized):
    """A configuration of the small network, and its rows."""
    with resized():
        config = jvp_accuracy.Config(model="tiny", rows=4)
        yield config, jvp_accuracy.make_rows(config)


# Conclusions


@pytest.mark.slow
def test_a_run_judges_every_engine_precision_and_time_scale(directory, errors):
    assert len(errors) == (2 + 2) * 3 * 2
    assert np.isfinite(list(errors.values())).all()
    assert (directory / "jvp_accuracy.png").stat().st_size > 0
    assert (directory / "results.md").read_text().count("fused JVP") == 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused JVP", "stopped JVP"])
def test_jvp_in_float32_is_exact_to_float32(errors, engine):
    assert errors[engine, None, "float32", 1.0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_finite_difference_in_float32_is_worse_than_the_jvp(errors, time_scale):
    assert errors["central difference", 5e-3, "float32", time_scale] > 10 * errors["fused JVP", None, "float32", 1.0]


@pytest.mark.slow
def test_finite_difference_over_a_tenth_is_worse_than_over_a_two_hundredth(errors):
    wide, narrow = (errors["central difference", step, "float32", 1.0] for step in (1e-1, 5e-3))
    assert wide > 50 * narrow  # 400 times but for rounding: of second order


@pytest.mark.slow
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_jvp_in_bfloat16_is_within_two_percent(errors, time_scale):
    assert 1e-3 < errors["fused JVP", None, "bfloat16", time_scale] < 0.02


@pytest.mark.slow
def test_finite_difference_in_bfloat16_is_of_no_use(errors):
    assert errors["central difference", 5e-3, "bfloat16", 1.0] > 0.1


@pytest.mark.slow
def test_bfloat16_times_ruin_the_jvp_at_the_large_time_scale_alone(errors):
    assert errors["fused JVP", None, "bfloat16 times", 1.0] < 0.02
    assert errors["fused JVP", None, "bfloat16 times", 1000.0] > 0.1


# What they are drawn from


@pytest.mark.slow
def test_reference_has_digits_that_float32_has_not(jvp_accuracy, whole_run, small):
    rows, found = whole_run[1][1.0]
    field = jvp_accuracy.make_field(small[0], "float64", 1.0)
    with jax.enable_x64(True):
        field, rows = nn.cast(field, jnp.float64), nn.cast(rows, jnp.float64)
        expected = jvp_accuracy.differences(field, rows, jnp.float64(1e-5))  # wrong by 2e-10
    assert jvp_accuracy.relative(found, np.asarray(expected)).max() < 1e-8


@pytest.mark.slow
def test_every_precision_has_the_same_parameters_and_none_is_zero(jvp_accuracy, small):
    def parameters(precision):
        return jax.tree.leaves(jvp_accuracy.make_field(small[0], precision, 1.0))

    expected = parameters("float32")
    assert all(leaf.dtype == jnp.float32 and np.any(leaf) for leaf in expected)
    for precision in ("bfloat16", "bfloat16 times", "float64"):
        for found, leaf in zip(parameters(precision), expected, strict=True):
            np.testing.assert_array_equal(found, leaf)


def test_rows_have_r_before_t(small):
    _, (*_, r, t, label) = small
    assert (r < t).all()
    assert len(set(label.tolist())) == 4


@pytest.mark.slow
def test_differences_are_those_of_the_package(jvp_accuracy, small):
    config, rows = small
    field = jvp_accuracy.make_field(config, "float32", 1.0)
    expected = jvp_accuracy.by_engine(mfx.CentralDifference(0.05), field, rows)
    np.testing.assert_allclose(jvp_accuracy.differences(field, rows, jnp.float32(0.05)), expected, atol=1e-4)


def test_relative_error_is_that_of_each_row(jvp_accuracy):
    expected = np.array([[[3.0, 4.0]], [[0.0, 2.0]]])
    found = expected + np.array([[[0.0, 1.0]], [[1.0, 1.0]]])
    np.testing.assert_allclose(jvp_accuracy.relative(found, expected), [1 / 5, np.sqrt(2) / 2])


def test_rounding_hurts_targets_the_more_the_nearer_they_are(jvp_accuracy):
    u = np.random.default_rng(0).standard_normal((8, 1000))
    near, far = (jvp_accuracy.effect_of_rounding_targets(u, distance) for distance in (0.05, 0.1))
    # Two roundings, each wrong by a uniform share of half a unit in the last of 8 digits.
    assert 0.02 < near < 0.06
    np.testing.assert_allclose(near / far, 2, rtol=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "MLP"}, "model must be among tiny, .*; got MLP"),
        ({"rows": 0}, "rows must be >= 1, got 0"),
        ({"steps": ()}, r"steps must be positive numbers, got \(\)"),
        ({"steps": (0.1, 0.0)}, r"steps must be positive numbers, got \(0.1, 0.0\)"),
        ({"steps": (float("nan"),)}, r"steps must be positive numbers, got \(nan,\)"),
        ({"shown_step": 0.2}, "shown_step must be one of steps, got 0.2"),
    ],
)
def test_bad_values_are_refused_by_name(jvp_accuracy, values, message):
    with pytest.raises(ValueError, match=message):
        jvp_accuracy.Config(**values)
