import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx import run
from mf_eqx.measure import _timing, matmul_peak, time_interleaved, Times


def recorder(names):
    """Calls that say who was called."""
    calls = []
    return calls, {name: lambda name=name: calls.append(name) for name in names}


def test_every_round_calls_everything_once():
    calls, functions = recorder("abc")
    times = time_interleaved(functions, 5, warm_up=2)
    assert [sorted(calls[i : i + 3]) for i in range(0, 21, 3)] == [["a", "b", "c"]] * 7
    assert {name: (t.wall.size, t.cpu.size) for name, t in times.items()} == dict.fromkeys("abc", (5, 5))


def test_order_changes_between_rounds_and_follows_the_seed():
    orders = []
    for seed in (0, 0, 1):
        calls, functions = recorder("abcd")
        time_interleaved(functions, 8, seed=seed)
        orders.append(calls)
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(orders[0][i : i + 4]) for i in range(0, 36, 4)}) > 4


def test_wall_time_is_time_that_passes():
    times = time_interleaved({"sleep": lambda: time.sleep(0.05)}, 3)["sleep"]
    assert times.least >= 0.05
    assert times.median_cpu < times.median / 2  # who sleeps computes nothing


def test_each_call_gets_the_time_that_it_took(monkeypatch):
    now = [100.0, 50.0]

    def take(wall, cpu):
        now[:] = now[0] + wall, now[1] + cpu

    monkeypatch.setattr(
        _timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[1])
    )
    times = time_interleaved({"a": lambda: take(4, 2), "b": lambda: take(1, 8)}, 3)
    assert {name: (*t.wall, *t.cpu) for name, t in times.items()} == {"a": (4, 4, 4, 2, 2, 2), "b": (1, 1, 1, 8, 8, 8)}


def test_results_are_waited_for():
    class Late:
        waited = 0

        def block_until_ready(self):
            Late.waited += 1
            return self

    time_interleaved({"late": Late}, 2, warm_up=1)
    assert Late.waited == 3


def test_spread_is_the_distance_of_the_quartiles():
    times = Times(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.ones(5))
    assert (times.median, times.least, times.spread) == (3.0, 1.0, pytest.approx(2 / 3))


def test_progress_counts_every_call():
    progress, seen = run.Progress(20), []
    progress.update = lambda step, metrics: seen.append(step)
    time_interleaved({"a": lambda: None, "b": lambda: None}, 2, warm_up=1, report=progress.update, done=10)
    assert seen == [11, 12, 13, 14, 15, 16]


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        time_interleaved({}, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_peak_is_more_than_a_processor_can_do_without_multiplying_matrices(dtype):
    assert 1e8 < matmul_peak(dtype, size=256, rounds=3) < 1e17
