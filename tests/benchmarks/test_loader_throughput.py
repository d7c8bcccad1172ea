"""The loaders' benchmark, on a handful of rows."""

import json

import numpy as np
import pytest

import mf_eqx as mfx

pytest.importorskip("grain")
pytest.importorskip("array_record")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def script(benchmark_script):
    script = benchmark_script("loader_throughput")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SIZE", mfx.DiTSize(depth=1, width=16, heads=2, patch=16))
        yield script


@pytest.fixture(scope="module")
def records(script, finished):
    directory = finished("loader_throughput", rows=40, images=16, batch=8, batches=2, steps=2)
    return json.loads((directory / "results.json").read_text())


@pytest.mark.slow
def test_every_source_is_read_and_trained_on(records):
    names = ["arrays in memory", "one .npy file", "shards with a manifest", "ArrayRecord", "PNG files"]
    assert [record["source"] for record in records] == names
    for record in records:
        assert min(record["take"], record["stream"]) > 0
        assert 0 <= record["wait"] < record["step"]


def test_all_formats_hold_the_same_rows(script, tmp_path):
    sources = list(script.make_sources(script.Config(rows=20, images=20, batch=4), tmp_path))
    rows = np.arange(20)
    expected = sources[0].take(rows)
    for source in sources[1:-1]:
        np.testing.assert_array_equal(source.take(rows).x, expected.x)
        np.testing.assert_array_equal(source.take(rows).label, expected.label)
    images = sources[-1].take(rows).x  # in the order of their classes
    assert sorted(map(bytes, images)) == sorted(map(bytes, expected.x))


def test_the_wait_is_the_time_in_which_no_batch_is_there(script, monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 1.25])
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(clock))
    waiting = script.Waiting(iter("ab"))
    assert [next(waiting), next(waiting)] == ["a", "b"]
    assert waiting.seconds == 0.75


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"rows": 100}, "batch must be at most rows and images, 100, got 256"),
        ({"batch": 6}, "batch must be a multiple of 4, got 6"),
    ],
)
def test_bad_values_are_refused_by_name(script, values, message):
    with pytest.raises(ValueError, match=message):
        script.Config(**values)
