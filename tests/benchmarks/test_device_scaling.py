"""The comparison of meshes, on one small network."""

import json

import pytest

import mf_eqx as mfx


@pytest.fixture(scope="module")
def script(benchmark_script):
    return benchmark_script("device_scaling")


def test_meshes_are_each_number_of_devices_without_and_with_sharing(script):
    assert script.cells(script.Config(devices=(1, 2, 4))) == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)]


@pytest.mark.slow
def test_one_device_has_the_whole_state_and_no_collective(script, finished, monkeypatch):
    monkeypatch.setitem(script.SIZES, "small", mfx.DiTSize(depth=1, width=16, heads=2, patch=16))
    directory = finished("device_scaling", devices=(1,), batch=4, rounds=1, real=True)
    (record,) = json.loads((directory / "results.json").read_text())
    assert record["collectives"] == {}
    assert min(record["seconds"], record["compile_seconds"], record["state_bytes"]) > 0


@pytest.mark.slow
def test_forced_devices_are_measured_in_processes_of_their_own(script):
    config = script.Config(devices=(2,), batch=8, rounds=1)
    apart, shared = (script.measure_apart(config, 2, fsdp) for fsdp in (1, 2))
    assert apart.collectives == {"all-reduce": 1}
    assert shared.state_bytes < apart.state_bytes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "B"}, "model must be among small, .*; got B"),
        ({"devices": ()}, "devices must be at least one number >= 1, got"),
        ({"batch": 48}, "batch must be a multiple of 4 x 8 devices, got 48"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(script, values, message):
    with pytest.raises(ValueError, match=message):
        script.Config(**values)
