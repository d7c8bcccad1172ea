"""The comparison of compilations, on networks of one and of four small blocks."""

import json
import math

import pytest

import mf_eqx as mfx


@pytest.fixture(scope="module")
def compile_time(benchmark_script):
    return benchmark_script("compile_time")


@pytest.fixture(scope="module")
def directory(finished):
    # Both are loops: a stack of one block is none.
    shallow, deep = (mfx.DiTSize(depth=depth, width=16, heads=2, patch=16) for depth in (2, 5))
    values = {"model": ("tiny", "S/4"), "variant": ("Flow Matching",), "batch": 4, "repeats": 1}
    return finished("compile_time", {"tiny": shallow, "S/4": deep}, **values)


@pytest.fixture(scope="module")
def records(directory):
    return {(r["model"], r["form"]): r for r in json.loads((directory / "results.json").read_text())}


@pytest.mark.slow
def test_a_run_compiles_every_network_in_every_form(directory, records):
    assert list(records) == [("tiny", "scan"), ("tiny", "unroll"), ("S/4", "scan"), ("S/4", "unroll")]
    for record in records.values():
        assert min(record[f"{part}_seconds"] for part in ("trace", "lower", "compile")) > 0
    assert (directory / "compile_time.png").stat().st_size > 0


@pytest.mark.slow
def test_a_scanned_program_does_not_grow_with_depth(records):
    assert records["S/4", "scan"]["program_lines"] == records["tiny", "scan"]["program_lines"]


@pytest.mark.slow
def test_an_unrolled_program_grows_with_depth(records):
    # Blocks are called, forwards and backwards: what grows are calls and what is passed along, not blocks.
    assert records["S/4", "unroll"]["program_lines"] > records["tiny", "unroll"]["program_lines"] + 3 * 2 * 10


@pytest.mark.slow
def test_all_of_the_state_is_donated(compile_time, directory, records):
    for record in records.values():
        batch = 4 * 4 * (math.prod(compile_time.data_shape("tiny")) + 1)  # bytes of rows and labels
        assert record["donated_bytes"] == record["argument_bytes"] - batch > 0
    assert (directory / "results.md").read_text().count("100.00%") == len(records)


@pytest.mark.slow
def test_a_program_in_the_persistent_cache_is_not_compiled_again(finished):
    values = {"model": ("tiny",), "form": ("scan",), "variant": ("Flow Matching",), "batch": 4, "repeats": 1}
    cold, warm = json.loads((finished("compile_time", **values, warm=True) / "results.json").read_text())
    assert (cold["warm"], warm["warm"]) == (False, True)
    assert warm["compile_seconds"] < cold["compile_seconds"] / 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ()}, "model must be at least one of tiny, .*; got none"),
        ({"model": ("MLP",)}, "model must be among tiny, .*; got MLP"),
        ({"form": ("loop",)}, "form must be among default, scan, unroll; got loop"),
        ({"remat": ("some",)}, "remat must be among none, products, full; got some"),
        ({"variant": ("meanflow",)}, "variant must be among Flow Matching, .*; got meanflow"),
        ({"dtype": "float16"}, "dtype must be among float32, bfloat16; got float16"),
        ({"batch": 6}, "batch must be a positive multiple of 4, got 6"),
        ({"batch": 0}, "batch must be a positive multiple of 4, got 0"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(compile_time, values, message):
    with pytest.raises(ValueError, match=message):
        compile_time.Config(**values)
