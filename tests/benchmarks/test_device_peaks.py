"""The rates of products and copies."""

import json

import jax
import pytest


@pytest.fixture(scope="module")
def device_peaks(benchmark_script):
    return benchmark_script("device_peaks")


def test_a_run_finds_a_rate_of_every_product_and_of_copies(finished):
    directory = finished("device_peaks", size=64, megabytes=1, rounds=1)
    records = json.loads((directory / "results.json").read_text())
    names = ["products in bfloat16", "products in float32, fast", "products in float32", "copies"]
    assert [r["what"] for r in records] == names
    assert min(r["rate"] for r in records) > 0


def test_a_round_is_several_calls_in_a_row_and_one_wait(device_peaks, monkeypatch):
    waits, read = [], []
    monkeypatch.setattr(jax, "jit", lambda function: function)
    monkeypatch.setattr(jax, "block_until_ready", waits.append)
    device_peaks.seconds(lambda x: read.append(x) or x + 1, 0, 4, 1)
    assert waits == [4, 4, 4]  # two rounds that are not timed, and one that is
    assert read == 3 * [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": -1}, "size must be >= 0, got -1"),
        ({"megabytes": 1 << 20}, "megabytes must be at most 65536, got 1048576"),
        ({"calls": -1}, "calls must be >= 0, got -1"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(device_peaks, values, message):
    with pytest.raises(ValueError, match=message):
        device_peaks.Config(**values)
