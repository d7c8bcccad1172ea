import concurrent.futures
import io
import itertools
import re
import time

import jax.numpy as jnp
import pytest

from mf_eqx import Mean, run
from mf_eqx.run import _progress


class Clock:
    """Seconds that pass only on demand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def loss(value: float = 0.25) -> dict[str, Mean]:
    return {"loss": Mean(jnp.asarray(2 * value), jnp.asarray(2.0))}


def train(stream: io.StringIO, steps: int, *, first: float, each: float, total: int | None = None, **options) -> str:
    """What is written by a run whose first step takes `first` seconds, and each other one `each`."""
    clock = Clock()
    with run.Progress(steps if total is None else total, stream=stream, clock=clock, **options) as progress:
        for step in range(1, steps + 1):
            clock.now += first if step == 1 else each
            progress.update(step, loss())
    return stream.getvalue()


def test_a_pipe_gets_a_line_every_so_many_seconds():
    lines = train(io.StringIO(), 101, first=5, each=1, every=25).splitlines()
    assert [line.split()[0] for line in lines] == ["0/101", "1/101", "26/101", "51/101", "76/101", "101/101"]


def test_a_line_shows_position_rate_times_and_metrics():
    line = train(io.StringIO(), 51, first=5, each=0.5, every=10, total=201).splitlines()[-1]
    assert line == " 51/201   25%  2 steps/s  0:30 elapsed  1:15 left  loss 0.25"


def test_time_to_compile_does_not_count_in_the_rate():
    assert "4 steps/s" in train(io.StringIO(), 41, first=1000, each=0.25)


def test_time_to_compile_counts_as_elapsed():
    assert "16:50 elapsed" in train(io.StringIO(), 41, first=1000, each=0.25)


def test_the_last_step_is_always_shown_once():
    lines = train(io.StringIO(), 11, first=1, each=1, every=5).splitlines()
    assert [line.split()[0] for line in lines].count("11/11") == 1


def test_a_terminal_gets_one_line_that_is_rewritten():
    text = train(Terminal(), 50, first=1, each=1)
    assert text.count("\r") == 51 and text.count("\n") == 1 and text.endswith("\n")


def test_a_narrow_terminal_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    parts = train(Terminal(), 50, first=1, each=1).replace("\x1b[K", "").split("\r")
    assert max(len(part.rstrip("\n")) for part in parts) == 29


def test_metrics_are_fetched_only_when_a_line_is_due(monkeypatch):
    fetched = []
    monkeypatch.setattr(_progress, "fetch", lambda metrics: fetched.append(metrics) or {})
    train(io.StringIO(), 101, first=1, each=1, every=50)
    assert len(fetched) == 3


def test_only_the_chosen_metrics_are_shown_and_missing_ones_are_not_needed():
    stream = io.StringIO()
    with run.Progress(1, shown=("loss", "later"), stream=stream) as progress:
        progress.update(1, {**loss(), "gradient_norm": 3.0})
    assert "loss 0.25" in stream.getvalue() and "gradient_norm" not in stream.getvalue()


def rows(total, count):
    return {"identity_error": Mean(jnp.asarray(float(total)), jnp.asarray(float(count)))}


@pytest.mark.parametrize(("window", "shown"), [(1, "8"), (2, "3"), (5, "2")])
def test_a_line_shows_the_mean_over_the_rows_of_the_last_updates(window, shown):
    """Batches with 6, 3 and 1 rows of this kind."""
    stream = io.StringIO()
    with run.Progress(3, stream=stream, window=window) as progress:
        for step, metrics in enumerate([rows(8, 6), rows(4, 3), rows(8, 1)], start=1):
            progress.update(step, metrics)
    assert stream.getvalue().splitlines()[-1].endswith(f"  identity_error {shown}")


def test_values_that_a_line_has_fetched_count_in_the_next_one():
    stream = io.StringIO()
    with run.Progress(3, stream=stream, window=3, every=1, clock=itertools.count().__next__) as progress:
        for step, metrics in enumerate([rows(8, 6), rows(4, 3), rows(8, 1)], start=1):
            progress.update(step, metrics)
    assert [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()[1:]] == ["1.333", "1.333", "2"]


def test_metrics_in_bins_are_not_shown():
    stream = io.StringIO()
    with run.Progress(1, stream=stream) as progress:
        progress.update(1, {**loss(), "by_gap": jnp.zeros(4)})
    assert "loss 0.25" in stream.getvalue() and "by_gap" not in stream.getvalue()


def test_a_loss_that_is_not_a_number_is_shown_as_such():
    stream = io.StringIO()
    with run.Progress(1, stream=stream) as progress:
        progress.update(1, loss(float("nan")))
    assert "loss nan" in stream.getvalue()


def test_a_note_stands_on_a_line_of_its_own():
    stream = Terminal()
    with run.Progress(2, stream=stream) as progress:
        progress.update(1, loss())
        progress.note("preview saved")
    assert "\r\x1b[Kpreview saved\n" in stream.getvalue()


def test_after_an_error_nothing_is_fetched_and_the_line_is_ended(monkeypatch):
    stream = Terminal()
    with pytest.raises(RuntimeError), run.Progress(9, stream=stream, every=1e9) as progress:
        progress.update(1, loss())
        progress.update(2, loss())
        monkeypatch.setattr(_progress, "fetch", lambda metrics: pytest.fail("fetched"))
        raise RuntimeError
    assert stream.getvalue().endswith("\n")


def test_no_steps_at_all_write_nothing():
    stream = io.StringIO()
    with run.Progress(0, stream=stream):
        pass
    assert stream.getvalue() == ""


class Slow(io.StringIO):
    """Lets other threads run between two characters."""

    def write(self, text):
        for character in text:
            super().write(character)
            time.sleep(0)
        return len(text)


def test_threads_share_the_lines_without_losing_or_mixing_any():
    threads, updates = 4, 25
    total, stream = threads * updates, Slow()
    with run.Progress(total, stream=stream, every=0.5, clock=itertools.count().__next__) as progress:  # always due

        def report(thread):
            for step in range(thread * updates + 1, (thread + 1) * updates + 1):
                progress.update(step, {"loss": float(step)})
                progress.note(f"note {step}")

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(report, range(threads)))
    _, *lines = stream.getvalue().splitlines()
    notes = [int(line.removeprefix("note ")) for line in lines if line.startswith("note ")]
    shown = [
        re.fullmatch(rf" *(\d+)/{total} .* elapsed .*loss (\d+)", line)
        for line in lines
        if not line.startswith("note ")
    ]
    assert sorted(notes) == list(range(1, total + 1))
    assert sorted(int(line[1]) for line in shown) == list(range(1, total + 1))
    assert all(line[1] == line[2] for line in shown)


def test_progress_goes_to_stderr_by_default(capsys):
    with run.Progress(1) as progress:
        progress.update(1, loss())
    captured = capsys.readouterr()
    assert captured.out == "" and "1/1" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"total": -1}, "total.*-1"), ({"total": 1, "every": 0.0}, "every.*0"), ({"total": 1, "window": 0}, "window.*0")],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run.Progress(**options)


def test_a_run_that_continues_starts_from_where_it_was():
    lines = io.StringIO()
    with run.Progress(20, start=7, stream=lines) as progress:
        progress.update(8, loss())
    first, second = lines.getvalue().splitlines()
    assert first == "7/20  compiling the first step"
    assert second.startswith(" 8/20   40%  ")


def test_steps_of_before_do_not_count_in_the_rate():
    clock, lines = Clock(), io.StringIO()
    with run.Progress(1000, start=900, stream=lines, clock=clock) as progress:
        for step in range(901, 912):
            clock.now += 2
            progress.update(step, loss())
    assert "0.5 steps/s" in lines.getvalue().splitlines()[-1]


def test_a_finished_run_that_starts_again_writes_nothing():
    lines = io.StringIO()
    with run.Progress(20, start=20, stream=lines):
        pass
    assert lines.getvalue() == ""


def test_what_happens_before_the_first_step_is_said():
    lines = io.StringIO()
    with run.Progress(3, doing="integrating the truth", stream=lines):
        pass
    assert lines.getvalue() == "0/3  integrating the truth\n"


def test_rows_per_second_follow_from_the_work_of_a_step():
    line = train(io.StringIO(), 51, first=5, each=0.5, every=10, work=run.Work(64)).splitlines()[-1]
    assert "  2 steps/s  128 img/s  0:30 elapsed" in line and "MFU" not in line


def test_utilisation_is_the_share_of_the_peak_that_the_steps_use():
    work = run.Work(64, flops=3e12, peak=24e12)
    line = train(io.StringIO(), 51, first=5, each=0.5, every=10, work=work).splitlines()[-1]
    assert "  2 steps/s  128 img/s  25.0% MFU  0:30 elapsed" in line


def test_a_silent_run_writes_nothing_anywhere(capsys):
    lines = Terminal()
    for options in ({"stream": lines}, {}):
        with run.Progress(2, silent=True, **options) as progress:
            progress.update(1, loss())
            progress.note("nobody reads this")
    assert lines.getvalue() == "" and capsys.readouterr() == ("", "")
