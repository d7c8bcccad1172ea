import io
import signal
import threading
import time

import numpy as np
import pytest

from mf_eqx import run

TIMEOUT = 60.0  # seconds until a wait that never ends is a failure; none of them is ever used up by right code
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
