import io
import signal
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import checkpoint, run
from mf_eqx.run import _parallel

TIMEOUT = 10.0  # seconds until a wait that never ends is a failure; none of them is ever used up by right code
ENDLESS = 1000


def progress(total=10):
    return run.Progress(total, stream=io.StringIO())


class Log:
    """A task for each name, which says what becomes of it: "quick" ends after one step, "bad" raises in its second, and
    any other one goes on until it is stopped. "quick" and "bad" wait until `before` tasks run."""

    def __init__(self, before):
        self.before = before
        self.changed = threading.Condition()
        self.started, self.steps, self.ended = [], {}, []

    def __call__(self, name):
        with self.changed:
            self.started.append(name)
            self.changed.notify_all()
            if name in ("quick", "bad"):
                assert self.changed.wait_for(lambda: len(self.started) >= self.before, TIMEOUT)
        try:
            for step in range(1 if name == "quick" else ENDLESS):
                if name == "bad" and step == 1:
                    raise RuntimeError("the task is bad")
                if name not in ("quick", "bad"):
                    time.sleep(0.005)
                self.steps[name] = step + 1
                yield 1, {}
        finally:
            self.ended.append(name)
        return name


# Tasks that end well


def add(task):
    """As many steps as the task says; the result is their sum."""
    sum_ = 0
    for step in range(task):
        sum_ += step
        yield 1, {"step": float(step)}
    return sum_


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_every_task_comes_with_its_result(workers):
    found = dict(run.in_parallel(add, range(7), workers=workers, progress=progress()))
    assert found == {task: sum(range(task)) for task in range(7)}


def test_results_come_as_they_are_finished():
    first = threading.Event()

    def function(task):
        if task == "late":
            assert first.wait(TIMEOUT)
        yield 1, {}
        return task

    results = run.in_parallel(function, ["late", "early"], workers=2, progress=progress())
    assert next(results) == ("early", "early")
    first.set()
    assert list(results) == [("late", "late")]


def test_one_worker_takes_the_tasks_in_their_order():
    assert [task for task, _ in run.in_parallel(add, [5, 3, 4], workers=1, progress=progress())] == [5, 3, 4]


def test_tasks_need_not_be_hashable():
    results = run.in_parallel(lambda task: add(task[0]), [[3], [3]], workers=2, progress=progress())
    assert list(results) == [([3], 3), ([3], 3)]


def test_no_tasks_have_no_results():
    assert list(run.in_parallel(add, [], workers=2, progress=progress())) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_more_tasks_than_workers_are_active(workers):
    lock, active, peaks = threading.Lock(), set(), []

    def function(task):
        with lock:
            active.add(task)
            peaks.append(len(active))
        for _ in range(3):
            time.sleep(0.002)
            yield 1, {}
        with lock:
            active.remove(task)

    assert len(list(run.in_parallel(function, range(8), workers=workers, progress=progress()))) == 8
    assert max(peaks) <= workers


def test_two_workers_work_at_the_same_time():
    barrier = threading.Barrier(2, timeout=TIMEOUT)  # one alone would wait for the other until it breaks

    def function(task):
        barrier.wait()
        yield 1, {}
        barrier.wait()

    assert len(list(run.in_parallel(function, range(2), workers=2, progress=progress()))) == 2


def test_steps_of_all_tasks_are_counted():
    seen = []

    class Kept(run.Progress):
        def update(self, step, metrics):
            seen.append((step, metrics["task"]))

    def function(task):
        for _ in range(3):
            yield task, {"task": task}

    list(run.in_parallel(function, [1, 10, 100], workers=3, progress=Kept(333, stream=io.StringIO())))
    steps = np.array([0, *(step for step, _ in seen)])
    np.testing.assert_array_equal(np.diff(steps), [task for _, task in seen])
    assert steps[-1] == 333


# Tasks that are ended


def test_error_of_a_task_reaches_the_caller():
    with pytest.raises(RuntimeError, match="the task is bad"):
        list(run.in_parallel(Log(before=2), ["bad", "a"], workers=2, progress=progress()))


def test_error_of_a_task_stops_the_others_at_their_next_yield():
    log = Log(before=2)
    with pytest.raises(RuntimeError):
        list(run.in_parallel(log, ["bad", "a"], workers=2, progress=progress()))
    steps = log.steps["a"]
    time.sleep(0.03)
    assert log.steps["a"] == steps < ENDLESS


def test_after_an_error_no_waiting_task_is_started_even_while_the_caller_is_busy():
    log = Log(before=0)
    results = run.in_parallel(log, ["quick", "bad", "a"], workers=1, progress=progress())
    next(results)
    time.sleep(0.1)  # the caller stores the result, and meanwhile the next task fails
    with pytest.raises(RuntimeError, match="the task is bad"):
        next(results)
    assert log.started == ["quick", "bad"]


def test_error_of_a_task_runs_the_finally_blocks_of_the_others_before_it_is_raised():
    log = Log(before=2)
    try:
        list(run.in_parallel(log, ["bad", "a"], workers=2, progress=progress()))
    except RuntimeError:
        assert sorted(log.ended) == ["a", "bad"]  # here and not behind the block, where the traceback is gone


def leave_by_break(start):
    for _ in start():
        break


def leave_by_close(start):
    results = start()
    next(results)
    results.close()


def leave_by_interruption(start):
    with pytest.raises(KeyboardInterrupt):
        for _ in start():
            raise KeyboardInterrupt


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_by_interruption])
def test_leaving_the_loop_early_stops_the_running_tasks_and_starts_no_others(leave):
    log = Log(before=2)
    leave(lambda: run.in_parallel(log, ["quick", "a", "b", "c"], workers=2, progress=progress()))
    stopped = dict(log.steps)
    time.sleep(0.03)
    assert log.steps == stopped and "c" not in log.started
    assert sorted(log.ended) == sorted(log.started)  # the tasks' own `finally` has run


@pytest.fixture
def interruptible():
    """As a script is; the processes of a parallel test run ignore interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends a signal as POSIX systems do")
@pytest.mark.usefixtures("interruptible")
def test_interruption_while_all_tasks_run_stops_them():
    log = Log(before=0)

    def function(task):
        for number, part in enumerate(log(task)):
            if task == "a" and number == 10:  # by now the main thread waits for a result
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            yield part

    with pytest.raises(KeyboardInterrupt):
        list(run.in_parallel(function, ["a", "b", "c"], workers=2, progress=progress()))
    stopped = dict(log.steps)
    time.sleep(0.03)
    assert log.steps == stopped and log.started == ["a", "b"]


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_worker_is_refused(workers):
    with pytest.raises(ValueError, match=f"workers must be >= 1, got {workers}"):
        list(run.in_parallel(add, [1], workers=workers, progress=progress()))


# Trainings in parts


class Square(mfx.AbstractObjective):
    """Mean squared output, at random times. An objective of the package would take seconds to compile."""

    def __call__(self, field, batch, *, key, context=None):
        times = jr.uniform(key, batch.x.shape[:1])
        losses = jax.vmap(lambda x, t: jnp.sum(field(x, t, t) ** 2))(batch.x, times)
        return jnp.mean(losses), {"loss": mfx.Mean(jnp.sum(losses), jnp.asarray(float(losses.size)))}


STEP = mfx.TrainStep(Square(), optax.sgd(1e-2))


class Hidden(mfx.AbstractField):
    """A perceptron of one hidden layer."""

    inner: jax.Array
    outer: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.outer @ jax.nn.silu(self.inner @ z + t)


class Draw(eqx.Module):
    """Standard normal rows."""

    def __call__(self, key):
        return mfx.Batch(jr.normal(key, (8, 2)))


def state(seed=0):
    inner_key, outer_key = jr.split(jr.key(0))
    field = Hidden(jr.normal(inner_key, (4, 2)), jr.normal(outer_key, (2, 4)))
    return mfx.init_state(field, STEP.optimizer, key=jr.key(seed))


def drained(parts):
    """What a generator yields, and what it returns."""
    yielded = []
    while True:
        try:
            yielded.append(next(parts))
        except StopIteration as end:
            return yielded, end.value


def assert_same_network(found, expected):
    # Equal bodies of a loop; only a compiler that unrolls one of the two could tell them apart.
    for leaf, other in zip(jax.tree.leaves(found.field), jax.tree.leaves(expected.field), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)


@pytest.fixture
def no_training(unchecked, monkeypatch):
    """`scan_steps` only adds the steps to the state."""
    monkeypatch.setattr(_parallel, "scan_steps", lambda train_step, state, draw, steps: (state + steps, {}))
    monkeypatch.setattr(_parallel, "_check_faults", lambda state: None)


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        (1000, 250, [250] * 4),
        (1001, 250, [201] * 4 + [197]),
        (499, 250, [250, 249]),
        (7, 3, [3, 3, 1]),
        (5, 250, [5]),
        (3, 1, [1] * 3),
    ],
)
def test_chunks_are_equal_but_for_the_last_and_add_up(no_training, steps, most, expected):
    yielded, last = drained(run.scan_in_chunks(STEP, 0, Draw(), steps, most=most))
    assert [number for number, _ in yielded] == expected
    assert last == sum(expected) == steps


@pytest.mark.parametrize("most", [1, 2, 7, 250])
def test_no_chunk_is_larger_than_the_most_and_there_are_no_more_than_needed(no_training, most):
    for steps in range(1, 60):
        numbers = [number for number, _ in drained(run.scan_in_chunks(STEP, 0, Draw(), steps, most=most))[0]]
        assert sum(numbers) == steps and max(numbers) <= most and len(set(numbers)) <= 2
        assert len(numbers) == -(-steps // most)


def test_chunks_give_the_state_of_one_scan_over_all_steps():
    _, found = drained(run.scan_in_chunks(STEP, state(), Draw(), 5, most=2))
    expected, _ = mfx.scan_steps(STEP, state(), Draw(), 5)
    assert found.step == 5
    assert_same_network(found, expected)


def test_metrics_of_the_chunks_add_up_to_those_of_one_scan():
    yielded, _ = drained(run.scan_in_chunks(STEP, state(), Draw(), 5, most=2))
    _, expected = mfx.scan_steps(STEP, state(), Draw(), 5)
    found = mfx.total([metrics for _, metrics in yielded])
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name].value, expected[name].value, rtol=1e-5)


class Lost(eqx.Module):
    """Batches without a finite number."""

    def __call__(self, key):
        return mfx.Batch(jnp.full((8, 2), jnp.nan))


def test_training_that_learns_nothing_is_refused():
    with pytest.raises(run.NonFinite, match="12 steps in a row, up to step 12, had no finite loss and gradient"):
        drained(run.scan_in_chunks(STEP, state(), Lost(), 24, most=12))


def test_training_continues_from_its_checkpoints_to_the_same_bits(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    parts = run.scan_in_chunks(STEP, state(), Draw(), 6, most=2, checkpoints=checkpoints, save_seconds=0)
    for _ in range(3):  # the second part is saved when the third is asked for
        next(parts)
    parts.close()
    assert checkpoints.steps() == [2, 4]
    yielded, found = drained(run.scan_in_chunks(STEP, state(), Draw(), 6, most=2, checkpoints=checkpoints))
    assert [number for number, _ in yielded] == [4, 2]
    _, expected = drained(run.scan_in_chunks(STEP, state(), Draw(), 6, most=2))
    assert checkpoint.digests(found) == checkpoint.digests(expected)


def test_no_steps_return_the_state_as_it_is():
    first = state()
    yielded, last = drained(run.scan_in_chunks(STEP, first, Draw(), 0))
    assert yielded == [] and last is first


def test_trainings_side_by_side_equal_trainings_alone():
    def function(seed):
        return (yield from run.scan_in_chunks(STEP, state(seed), Draw(), 5, most=2))

    for seed, found in run.in_parallel(function, range(3), workers=2, progress=progress(15)):
        assert_same_network(found, drained(function(seed))[1])
