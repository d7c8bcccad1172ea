"""The checkpoints' benchmark, on the smallest states."""

import json

import pytest

pytest.importorskip("orbax.checkpoint")


@pytest.fixture(scope="module")
def directory(finished):
    return finished("checkpoint_blocking", megabytes=(1,), rounds=1)


@pytest.mark.slow
def test_a_save_is_measured_in_all_its_parts(directory):
    (record,) = json.loads((directory / "results.json").read_text())
    assert record["bytes"] == pytest.approx(1e6, rel=0.5)
    assert 0 < record["blocks"] <= record["written"]
    assert min(record["load"], record["digests"]) > 0


@pytest.mark.slow
def test_no_state_is_left_on_disk(directory):
    assert {path.name for path in directory.iterdir()} == {"config.json", "results.md", "results.json"}


@pytest.mark.parametrize("megabytes", [1, 10, 40])
def test_a_state_has_about_the_size_that_is_asked_for(benchmark_script, megabytes):
    import equinox as eqx
    import jax

    state = eqx.filter_eval_shape(lambda: benchmark_script("checkpoint_blocking").make_state(megabytes))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype"))
    assert size == pytest.approx(megabytes * 1e6, rel=0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"megabytes": ()}, "megabytes must be at least one number >= 1, got"),
        ({"megabytes": (10, 0)}, "megabytes must be at least one number >= 1, got"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(benchmark_script, values, message):
    with pytest.raises(ValueError, match=message):
        benchmark_script("checkpoint_blocking").Config(**values)
