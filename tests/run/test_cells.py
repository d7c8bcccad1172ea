"""Several small trainings of one run: in equal parts, continued to the same bits, stopped with everything saved."""

import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cell_trainer import Config, digest, Draw, judge, STEP, training
from processes import tree

import mf_eqx as mfx
from mf_eqx import checkpoint, run
from mf_eqx.run import _cell_run, _cells

pytest.importorskip("orbax.checkpoint")


@pytest.fixture
def directory(tmp_path):
    return run.RunDirectory(tmp_path)


def config(**fields):
    return Config(**{"workers": 1, **fields})


def trained(settings, trainings, directory, judge=judge, **options):
    return run.train_cells(settings, trainings, judge, directory, **options)


def last(directory, name):
    """The last saved state of a cell."""
    restored = checkpoint.Checkpoints(directory.root / "cells" / name / "checkpoints").load(training().make_state)
    return restored.state


def records(directory, name):
    return run.RunDirectory(directory.root / "cells" / name).records()


# What is trained


@pytest.fixture
def no_training(unchecked, monkeypatch):
    """`scan_steps` only counts; its calls are in the list."""
    calls = []

    def scan_steps(step, state, draw, steps):
        calls.append(steps)
        return state, {}

    monkeypatch.setattr(_cell_run, "scan_steps", scan_steps)
    monkeypatch.setattr(_cell_run.CellRun, "_save", lambda self, state: None)
    return calls


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        (1000, 250, [250] * 4),
        (1001, 250, [201] * 4 + [197]),
        (499, 250, [250, 249]),
        (7, 3, [3, 3, 1]),
        (5, 250, [5]),
        (3, 1, [1] * 3),
        (0, 3, []),
    ],
)
def test_parts_are_equal_but_for_the_last_and_add_up(no_training, steps, most, expected, directory):
    trained(config(log_every=most), {0: training(steps=steps)}, directory)
    assert no_training == expected
    assert [record["step"] for record in records(directory, "seed_0")] == np.cumsum(expected).tolist()


def test_parts_give_the_state_and_the_metrics_of_one_scan(directory):
    trained(config(log_every=2), {0: training(steps=5)}, directory)
    state, metrics = mfx.scan_steps(STEP, training().make_state(), Draw(), 5)
    # Equal bodies of a loop; only a compiler that unrolls one of the two could tell them apart.
    for leaf, other in zip(jax.tree.leaves(last(directory, "seed_0").field), jax.tree.leaves(state.field), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)
    losses, steps = [record["loss"] for record in records(directory, "seed_0")], [2, 2, 1]
    np.testing.assert_allclose(np.average(losses, weights=steps), metrics["loss"].value, rtol=1e-5)


def test_cells_are_those_of_each_alone_in_the_given_order(directory, tmp_path):
    cells = {seed: training(seed, steps=4) for seed in (2, 0, 1)}
    together = trained(config(workers=3), {**cells, "none": None}, directory)
    alone = {
        seed: trained(config(), {seed: cell}, run.RunDirectory(tmp_path / "alone")) for seed, cell in cells.items()
    }
    assert list(together) == [2, 0, 1, "none"]
    assert together == {2: alone[2][2], 0: alone[0][0], 1: alone[1][1], "none": "nothing"}


def test_a_finished_cell_is_judged_again_and_trained_no_further(directory):
    first = trained(config(), {0: training(steps=4)}, directory)
    before = (directory.root / "summary.json").read_bytes()
    assert trained(config(), {0: training(steps=4)}, directory) == first
    assert len(records(directory, "seed_0")) == 1
    assert (directory.root / "summary.json").read_bytes() == before


def test_directories_are_named_after_the_cells(directory):
    trained(config(), {0: training(name="(t, r - t), 0.5: yes", steps=1)}, directory)
    assert [path.name for path in (directory.root / "cells").iterdir()] == ["_t_r_-_t_0.5_yes"]


def test_two_cells_of_one_directory_are_refused(directory):
    with pytest.raises(ValueError, match="names of trainings must differ, got a_b twice"):
        trained(config(), {0: training(name="a b"), 1: training(name="a, b")}, directory)
    assert not list(directory.root.iterdir())


@pytest.mark.parametrize("name", ["", ".."])
def test_a_cell_whose_directory_would_be_another_is_refused(name, directory):
    with pytest.raises(ValueError, match="names of trainings must have more than dots"):
        trained(config(), {0: training(name=name)}, directory)


def test_a_line_is_shown_of_each_cell_as_it_is_finished(directory, capsys):
    trained(config(), {0: training(steps=1)}, directory, note=lambda cell, result: f"{cell}: {result[:8]}")
    assert f"0: {digest(last(directory, 'seed_0'))[:8]}\n" in capsys.readouterr().err


def test_a_test_run_does_two_steps_of_everything(directory):
    trained(config(test_run=True), {0: training(), 1: training(1, steps=1)}, directory)
    assert [record["step"] for record in records(directory, "seed_0")] == [1, 2]
    assert [record["step"] for record in records(directory, "seed_1")] == [1]


# Ended early


def signals_itself(directory, calls, number=signal.SIGTERM):
    """`scan_steps`, at whose call of that number the process gets a signal."""
    scan_steps, done = _cell_run.scan_steps, iter(range(1, 10**6))

    def scan(*arguments):
        if next(done) == calls:
            signals = signal.getsignal(number).__self__
            os.kill(os.getpid(), number)
            wait_for(lambda: signals.received() is not None)  # Python hears it in its main thread, this is another
        return scan_steps(*arguments)

    return scan


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_part_with_all_saved_and_the_rest_gives_the_same_bits(
    number, directory, tmp_path, monkeypatch
):
    cells = {seed: training(seed, steps=8) for seed in range(3)}
    expected = trained(config(log_every=2), cells, run.RunDirectory(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(_cell_run, "scan_steps", signals_itself(directory, 6, number))
        with pytest.raises(run.Stopped) as stopped:
            trained(config(log_every=2), cells, directory)
    assert (stopped.value.signal, stopped.value.step) == (number, 8 + 4)
    assert last(directory, "seed_1").step == 4
    assert trained(config(log_every=2), cells, directory) == expected
    for name in ("seed_0", "seed_1", "seed_2"):
        paths = [root / "cells" / name / "metrics.jsonl" for root in (directory.root, tmp_path / "other")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    summary = json.loads((directory.root / "summary.json").read_text())
    assert [(part["start"], part["stop"]) for part in summary["sessions"]] == [(0, 12), (12, 24)]


def test_a_signal_while_the_last_cell_is_judged_is_obeyed(directory):
    def judge(cell, state):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(run.Stopped) as stopped:
        trained(config(), {0: training(steps=3)}, directory, judge)
    assert stopped.value.step == 3


def test_handlers_are_as_before_after_an_error_too(directory):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError):
        trained(config(), {0: training(steps=1)}, directory, lambda cell, state: {}[cell])
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_in_one_cell_saves_the_others(directory, monkeypatch):
    scan_steps = _cell_run.scan_steps

    def scan(step, state, draw, steps):
        if isinstance(draw, Broken):
            wait_for(lambda: records(directory, "seed_0"))
            raise KeyError("broken")
        return scan_steps(step, state, draw, steps)

    monkeypatch.setattr(_cell_run, "scan_steps", scan)
    cells = {0: training(steps=10**6), 1: training(1, draw=Broken())}
    with pytest.raises(KeyError, match="broken"):
        trained(config(workers=2, log_every=1), cells, directory)
    assert last(directory, "seed_0").step == records(directory, "seed_0")[-1]["step"] > 0


def test_an_error_in_a_note_ends_the_others(directory):
    cells = {0: None, 1: training(1, steps=10**6)}

    def note(cell, result):
        wait_for(lambda: records(directory, "seed_1"))
        raise KeyError("note")

    with pytest.raises(KeyError, match="note"):
        trained(config(workers=2, log_every=1), cells, directory, note=note)
    number = len(records(directory, "seed_1"))
    time.sleep(0.1)
    assert len(records(directory, "seed_1")) == number == last(directory, "seed_1").step


def wait_for(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


class Broken(Draw):
    """Rows that cannot be drawn."""


def test_a_training_that_learns_nothing_ends_with_a_finite_checkpoint(directory):
    lost = training(steps=24, draw=Draw(jnp.nan))
    path = directory.root / "cells" / "seed_0" / "checkpoints" / "00000012"
    with pytest.raises(run.NonFinite) as error:
        trained(config(log_every=12), {0: lost}, directory)
    assert str(error.value) == f"12 steps in a row up to step 12 had no finite loss and gradient; {path} is finite"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last(directory, "seed_0").field))


def test_a_finished_training_that_learnt_nothing_is_not_judged_later(directory):
    lost = training(steps=12, draw=Draw(jnp.nan))
    for _ in range(2):
        with pytest.raises(run.NonFinite):
            trained(config(), {0: lost}, directory)


def test_a_damaged_checkpoint_is_told_and_passed_over(directory, capsys):
    cells = {0: training(steps=6)}
    expected = trained(config(log_every=2, save_every=2), cells, directory)
    (directory.root / "cells" / "seed_0" / "checkpoints" / "00000006.json").write_text("{")
    assert trained(config(log_every=2, save_every=2), cells, directory) == expected
    assert "00000006: passed over, because its record cannot be read" in capsys.readouterr().err
    assert [record["step"] for record in records(directory, "seed_0")] == [2, 4, 6]


def test_lines_that_are_gone_from_the_log_are_told(directory, capsys):
    every = config(log_every=2, save_every=2)
    trained(every, {0: training(steps=6)}, directory)
    folder = directory.root / "cells" / "seed_0"
    shutil.rmtree(folder / "checkpoints" / "00000006")
    trained(every, {0: training(steps=6)}, directory)
    assert "must have" not in capsys.readouterr().err
    (folder / "metrics.jsonl").unlink()
    trained(every, {0: training(steps=6)}, directory)
    assert f"{folder / 'metrics.jsonl'}: must have 3 lines up to step 6, but has 0; " in capsys.readouterr().err


# Checkpoints of other trainings


def check_refusal(directory, wanted, message, settings=None):
    before = tree(directory.root)
    with pytest.raises(ValueError, match=f"checkpoints: checkpoints must be of this training, but {message}"):
        trained(settings or config(), {0: wanted}, directory)
    assert tree(directory.root) == before


def test_a_checkpoint_that_was_copied_from_another_cell_is_refused(directory):
    trained(config(), {0: training(0, steps=2), 1: training(1, steps=4)}, directory)
    cells = directory.root / "cells"
    shutil.rmtree(cells / "seed_0" / "checkpoints")
    shutil.copytree(cells / "seed_1" / "checkpoints", cells / "seed_0" / "checkpoints")
    check_refusal(directory, training(0, steps=4), "name was seed 1, now seed 0")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (training(1, steps=4, name="seed 0"), r"key was \['\w+', \[\d+, \d+\]\], now "),
        (training(steps=2), "steps was 4, now 2"),
        (training(steps=9), "steps was 4, now 9"),
        (training(steps=4, settings={"power": 1}), "settings.steps is only in the old one"),
    ],
    ids=["seed", "fewer steps", "more steps", "settings"],
)
def test_a_checkpoint_of_a_training_of_the_same_name_is_refused(wanted, message, directory):
    trained(config(), {0: training(steps=4)}, directory)
    check_refusal(directory, wanted, message)


def test_a_checkpoint_of_another_configuration_is_refused(directory):
    trained(config(), {0: training(steps=4)}, directory)
    check_refusal(directory, training(steps=4), "settings.cells was 3, now 5", config(cells=5))


def test_settings_of_its_own_are_all_that_a_training_depends_on(directory):
    mine = training(steps=4, settings={"power": 1})
    expected = trained(config(), {0: mine}, directory)
    assert trained(config(cells=5), {0: mine}, directory) == expected


def test_a_checkpoint_that_does_not_say_of_what_it_is_is_refused(directory):
    checkpoints = checkpoint.Checkpoints(directory.root / "cells" / "seed_0" / "checkpoints")
    checkpoints.save(2, training().make_state())
    checkpoints.wait()
    check_refusal(directory, training(steps=4), "name is only in the new one")


@pytest.mark.parametrize(("left", "told"), [(2, 1), (4, 0)])
def test_another_version_is_told_where_a_training_goes_on(left, told, directory, capsys, monkeypatch):
    trained(config(log_every=2, save_every=2), {0: training(steps=4)}, directory)
    checkpoints = checkpoint.Checkpoints(directory.root / "cells" / "seed_0" / "checkpoints")
    for step in range(left + 2, 5, 2):
        shutil.rmtree(checkpoints.path(step))
    monkeypatch.setattr(_cells, "made_by", lambda: {"commit": "another"})
    trained(config(log_every=2, save_every=2), {0: training(steps=4)}, directory)
    assert capsys.readouterr().err.count("seed_0: the setup has changed since it was saved: ") == told


def test_a_directory_that_is_moved_in_the_midst_ends_all_cells(tmp_path, monkeypatch):
    scan_steps, calls = _cell_run.scan_steps, iter(range(10**6))

    def scan(*arguments):
        if next(calls) == 2:
            directory.root.rename(tmp_path / "elsewhere")
        return scan_steps(*arguments)

    monkeypatch.setattr(_cell_run, "scan_steps", scan)
    with pytest.raises(run.Moved), run.opened(config(), root=tmp_path, script="cells") as directory:
        trained(config(log_every=1, save_every=1), {seed: training(seed, steps=4) for seed in range(2)}, directory)
    assert not directory.root.exists()
    assert [record["step"] for record in records(run.RunDirectory(tmp_path / "elsewhere"), "seed_0")] == [1, 2]


# What is told


def test_saves_come_at_the_end_of_a_part_that_passes_a_multiple_and_at_the_end(directory):
    trained(config(log_every=2, save_every=5, keep_last=9), {0: training(steps=12)}, directory)
    steps = checkpoint.Checkpoints(directory.root / "cells" / "seed_0" / "checkpoints").steps()
    assert steps == [6, 10, 12]


def test_the_summary_says_where_the_time_of_all_cells_went(directory):
    trained(config(workers=2), {seed: training(seed) for seed in range(2)}, directory)
    summary = json.loads((directory.root / "summary.json").read_text())
    seconds = summary["seconds"]
    assert summary["steps"] == 24 and 0 < summary["goodput"] < 1
    for part in ("start", "compile", "save", "log", "judge", "steps"):
        assert seconds[part] > 0, part
    assert sum(value for name, value in seconds.items() if name != "wall") == pytest.approx(seconds["wall"], abs=0.02)


def test_nothing_is_announced_of_a_new_run(directory, capsys):
    run.announce(config(), {0: training()}, directory)
    assert capsys.readouterr().out == ""


def test_a_dry_run_counts_what_the_test_run_would_do(directory, capsys):
    with pytest.raises(SystemExit) as ended:
        run.announce(config(dry_run=True, test_run=True), {0: training(), 1: None}, directory)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "| seed_0 | Hidden  |         16 |     2 |    0 |" in out and '"dry_run": true' in out
    assert not list(directory.root.iterdir())


def test_programs_are_counted_after_every_cell(directory, monkeypatch):
    counted = []
    monkeypatch.setattr(_cell_run, "drop_programs_if_many", lambda: counted.append(1))
    trained(config(), {name: training(name=name) for name in ("a", "b")}, directory)
    assert len(counted) == 2
