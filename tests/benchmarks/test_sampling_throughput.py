"""The throughput of sampling: that what is timed is sampling, and a whole run."""

import json

import jax
import jax.random as jr
import numpy as np
import pytest
from fields import refilled

import mf_eqx as mfx

SMALL = mfx.DiTSize(depth=1, width=16, heads=2, patch=16)


@pytest.fixture(scope="module")
def sampling_throughput(benchmark_script):
    return benchmark_script("sampling_throughput")


@pytest.fixture(scope="module")
def field():
    return refilled(mfx.DiT((4, 32, 32), SMALL, labels=1000, key=jr.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize(("evaluations", "times"), [(1, (1.0, 0.0)), (2, (1.0, 0.5, 0.0))])
def test_what_is_timed_is_sampling(sampling_throughput, field, evaluations, times):
    cell = sampling_throughput.Cell("tiny", 3, evaluations)
    call = sampling_throughput.make_call(sampling_throughput.Config(), cell, field)
    found = call()
    eps, label = call.args
    assert eps.shape == (3, 4, 32, 32)
    assert label.tolist() == [0, 1, 2]
    expected = jax.jit(jax.vmap(lambda eps, label: mfx.sample(field, eps, label, times=times)))(eps, label)
    assert np.abs(expected - eps).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def directory(finished):
    return finished("sampling_throughput", model=("tiny",), batch=(1, 2), evaluations=(1, 2), rounds=1)


@pytest.mark.slow
def test_a_run_leaves_times_and_operations_of_every_cell(directory):
    records = json.loads((directory / "results.json").read_text())
    assert [(r["batch"], r["evaluations"]) for r in records] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for record in records:
        assert record["flops"] == record["batch"] * record["evaluations"] * records[0]["flops"] > 0
        (seconds,) = record["wall_seconds"]
        assert 0 < seconds < np.inf


@pytest.mark.slow
def test_a_run_leaves_a_table_and_a_picture(directory):
    assert (directory / "results.md").read_text().count("| tiny") == 4
    assert (directory / "sampling_throughput.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ()}, "model must be at least one of MLP, tiny, .*; got none"),
        ({"model": ("S/3",)}, "model must be among MLP, tiny, .*; got S/3"),
        ({"dtype": "float16"}, "dtype must be among float32, bfloat16; got float16"),
        ({"attention": "flash"}, "attention must be among xla, cudnn, chunked, pallas; got flash"),
        ({"batch": ()}, r"batch must be positive numbers, got \(\)"),
        ({"batch": (4, 0)}, r"batch must be positive numbers, got \(4, 0\)"),
        ({"evaluations": (0,)}, r"evaluations must be positive numbers, got \(0,\)"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(sampling_throughput, values, message):
    with pytest.raises(ValueError, match=message):
        sampling_throughput.Config(**values)
