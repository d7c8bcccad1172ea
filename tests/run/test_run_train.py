"""The loop in this process, on a tiny network: what it leaves and refuses, and that stopping it changes nothing."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import types

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
import pytest
import trainer

import mf_eqx as mfx
from mf_eqx import _train, checkpoint, data, run
from mf_eqx.run import _stopwatch, _train as run_train

for package in ("grain", "orbax.checkpoint"):
    pytest.importorskip(package)

CONFIG = trainer.Config(steps=14, log_every=4, save_every=5, preview_every=6)  # six steps are an epoch


COMPILED = _train._train_step
due = None  # after which step which signal arrives


@pytest.fixture(autouse=True, scope="module")
def signals():
    """During one of the steps a signal may arrive."""

    def signalled(kept, state):
        if due is not None and int(state.step) == due[0] - 1:
            os.kill(os.getpid(), due[1])
        return COMPILED(kept, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_train, "_train_step", signalled)
        yield


def configured(**fields):
    return dataclasses.replace(CONFIG, **fields)


def trained(root, config=CONFIG, *, stop_after=None, by=signal.SIGTERM, **arguments):
    """State and directory of a run, which may be told to stop after a step."""
    global due
    due = None if stop_after is None else (stop_after, by)
    try:
        with run.opened(config, root=root, script="trainer") as directory:
            return trainer.train(config, directory, **arguments), directory
    finally:
        due = None


def stopped(root, config=CONFIG, *, after, **arguments):
    with pytest.raises(run.Stopped):
        trained(root, config, stop_after=after, **arguments)


def arrays(tree):
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    return [np.asarray(jr.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


def bits(tree):
    """A digest of all leaves, bit by bit: parameters, optimiser, averages, counters, key."""
    digest = hashlib.sha256()
    for leaf in arrays(tree):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()


def files(folder):
    """All files and what they hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def metrics(directory):
    return (directory.root / "metrics.jsonl").read_bytes()


def steps_on_disk(directory):
    return checkpoint.Checkpoints(directory.root / "checkpoints").steps()


def saved(directory, config, step):
    """The state in a checkpoint."""
    _, make_state = trainer.parts(config.width, config.half, config.sgd, config.share, config.accumulation, None)
    return checkpoint.Checkpoints(directory.root / "checkpoints").load(make_state, step=step).state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def stop(tmp_path_factory):
    """The error of a run that a signal stopped, in the second epoch between two lines of metrics, and its root."""
    root = tmp_path_factory.mktemp("stop")
    with pytest.raises(run.Stopped) as error:
        trained(root, stop_after=7)
    return error.value, root


def told(root, *arguments, **options):
    """State and directory of a run, and what it says on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        state, directory = trained(root, *arguments, **options)
    return state, directory, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def halves(stop, tmp_path_factory):
    """State, directory, and lines of the run that was stopped, to its end."""
    return told(shutil.copytree(stop[1], tmp_path_factory.mktemp("halves") / "copy"))


# Stopping and continuing


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    "fields", [{"half": True}, *(pytest.param(f, marks=pytest.mark.slow) for f in ({}, {"accumulation": 2}))], ids=str
)
def test_a_run_in_two_halves_has_the_bits_and_the_metrics_of_one_in_one(fields, tmp_path):
    whole, directory = trained(tmp_path / "whole", configured(**fields))
    stopped(tmp_path / "halves", configured(**fields), after=7)  # in the second epoch, between two lines of metrics
    found, continued = trained(tmp_path / "halves", configured(**fields))
    assert bits(found) == bits(whole)
    assert metrics(continued) == metrics(directory)


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    "stops",
    [(6, 8, 13), *(pytest.param(stop, marks=pytest.mark.slow) for stop in [(2, 3, 7, 12), (1,), (5,), (14,)])],
    ids=str,
)
def test_stops_at_any_step_change_neither_bits_nor_metrics(stops, undisturbed, tmp_path):
    for after in stops:
        stopped(tmp_path, after=after)
    found, directory = trained(tmp_path)
    assert bits(found) == bits(undisturbed[0])
    assert metrics(directory) == metrics(undisturbed[1])


def test_the_state_has_counted_its_steps(undisturbed):
    state, _ = undisturbed
    assert (int(state.step), int(state.faults.total)) == (14, 0)


def test_a_stopped_run_says_after_which_step_and_has_it_saved(stop):
    error, root = stop
    assert str(error) == "stopped by SIGTERM after step 7; the same command continues"
    (directory,) = (root / "trainer").iterdir()
    assert steps_on_disk(run.RunDirectory(directory)) == [5, 7]


@pytest.mark.slow
def test_an_interrupt_stops_like_a_termination(tmp_path):
    with pytest.raises(run.Stopped, match="SIGINT after step 3") as stop:
        trained(tmp_path, stop_after=3, by=signal.SIGINT)
    assert stop.value.signal == signal.SIGINT


def test_signals_are_handled_as_before_after_the_loop(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped(tmp_path, after=2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_that_continues_says_so(halves):
    assert ": continues after step 7 of 14\n" in halves[2]


def test_a_finished_run_again_is_the_same_state_and_adds_nothing(halves, tmp_path, capsys):
    state, directory, *_ = halves
    shutil.copytree(directory.root.parents[1], tmp_path, dirs_exist_ok=True)
    directory = run.RunDirectory(tmp_path / directory.root.relative_to(directory.root.parents[1]))
    before = files(directory.root)
    again, _ = trained(tmp_path)
    assert bits(again) == bits(state)
    assert ": finished step 14 of 14\n" in capsys.readouterr().out
    after = files(directory.root)
    grown = ("starts.jsonl", "summary.json")  # which say that there was another session
    assert {k: v for k, v in after.items() if k not in grown} == {k: v for k, v in before.items() if k not in grown}


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_never_ended(undisturbed, tmp_path):
    _, directory = trained(tmp_path, steps=7)
    found, _ = trained(tmp_path)
    assert bits(found) == bits(undisturbed[0])
    assert [record["step"] for record in directory.records()] == [4, 7, 8, 12, 14]


@pytest.mark.slow
def test_metrics_after_the_last_checkpoint_are_taken_back(undisturbed, tmp_path):
    stopped(tmp_path, after=7)
    (root,) = (tmp_path / "trainer").iterdir()
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 3.0}\n{"step": 12, "lo')  # of a run that was killed while it wrote
    trained(tmp_path)
    assert (root / "metrics.jsonl").read_bytes() == metrics(undisturbed[1])


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["a line", "the file"])
def test_lines_that_are_gone_from_the_log_are_told_once(lost, tmp_path, capsys):
    config = configured(log_every=2)
    stopped(tmp_path, config, after=7)
    (root,) = (tmp_path / "trainer").iterdir()
    path = root / "metrics.jsonl"
    _, *left = path.read_text().splitlines(keepends=True)
    path.write_text("".join(left)) if lost == "a line" else path.unlink()
    number = len(left) if lost == "a line" else 0
    stopped(tmp_path, config, after=9)
    told = f"{path}: must have 3 lines up to step 7, but has {number}; the run continues nevertheless\n"
    assert told in capsys.readouterr().out
    trained(tmp_path, config)
    assert "must have" not in capsys.readouterr().out


def test_a_checkpoint_with_one_flipped_byte_is_passed_over_for_the_one_before(undisturbed, stop, tmp_path, capsys):
    shutil.copytree(stop[1], tmp_path, dirs_exist_ok=True)
    (root,) = (tmp_path / "trainer").iterdir()
    contents = [path for path in (root / "checkpoints" / "00000007").rglob("d/*") if path.is_file()]
    largest = max(contents, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    found, directory = trained(tmp_path)
    told = capsys.readouterr().out
    assert re.search("00000007: passed over, because .*\n.*: continues after step 5 of 14", told)
    assert bits(found) == bits(undisturbed[0])
    assert metrics(directory) == metrics(undisturbed[1])


@pytest.mark.slow
def test_settings_may_change_and_the_bits_do_not(undisturbed, tmp_path):
    stopped(tmp_path, configured(save_every=2), after=7)
    changed = configured(save_every=3, keep_last=4, keep_every=2, log_every=20, preview_every=0, most_faults=1)
    found, directory = trained(tmp_path, changed)
    assert bits(found) == bits(undisturbed[0])
    assert [record["step"] for record in directory.records()] == [4, 14]
    assert steps_on_disk(directory) == [6, 7, 9, 12, 14]


# What is refused


def refused(directory, config=CONFIG, **arguments):
    """The message of a refusal that must not touch a file."""
    before = files(directory.root)
    with pytest.raises(ValueError) as error:
        trainer.train(config, directory, **arguments)
    assert files(directory.root) == before
    return str(error.value)


def test_another_configuration_is_refused_by_the_field(undisturbed):
    message = refused(undisturbed[1], configured(share=0.25))
    assert re.search(
        r"checkpoints: configuration must be that of the run so far, but config.share was 0.5, now 0.25", message
    )


def test_other_data_are_refused_by_what_differs(undisturbed):
    source = trainer.Marked(CONFIG)
    source.x = source.x + np.float32(1)
    assert "data must be that of the run so far, but data.sampled_rows_sha256 was" in refused(
        undisturbed[1], source=source
    )


def test_another_training_of_the_same_run_is_refused_by_its_name(undisturbed):
    assert "training must be that of the run so far, but training was , now Flow Matching" in refused(
        undisturbed[1], name="Flow Matching"
    )


def test_a_checkpoint_that_does_not_say_of_what_it_is_is_refused(undisturbed, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, undisturbed[0])
    checkpoints.wait()
    assert "configuration must be that of the run so far, but config was , now {" in refused(run.RunDirectory(tmp_path))


def test_fewer_steps_than_are_done_are_refused(undisturbed):
    assert f"steps must be at least the 14 that are done in {undisturbed[1].root}, got 13" in refused(
        undisturbed[1], steps=13
    )


def test_a_disk_that_is_too_small_for_the_checkpoints_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9_000))
    with pytest.raises(ValueError, match=r"must have .* of disk space for 3 more checkpoints of .* got 9 kB"):
        trained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_network_is_refused_by_its_leaves(undisturbed, monkeypatch):
    parts = trainer.parts
    monkeypatch.setattr(trainer, "parts", lambda width, *others: parts(8, *others))
    message = refused(undisturbed[1])
    assert "must hold the expected arrays, but it differs: .averages[0]" in message
    assert "is float32 (16" in message


def test_a_batch_that_cannot_be_divided_is_refused(undisturbed):
    assert "3 (accumulation steps) = 6, got 16" in refused(undisturbed[1], configured(accumulation=3))


# Steps without a finite loss


def spoiled(*steps, **fields):
    """A configuration with bad steps, counted from 1."""
    return configured(**{"bad_steps": tuple(step - 1 for step in steps), "log_every": 1, "save_every": 1, **fields})


@pytest.fixture(scope="module")
def one_bad(tmp_path_factory):
    """Configuration, directory, and lines of a run with a bad step."""
    config = spoiled(4, steps=5, keep_last=5)
    _, directory, _, err = told(tmp_path_factory.mktemp("one_bad"), config)
    return config, directory, err


def test_a_bad_step_changes_nothing_but_the_counters(one_bad):
    config, directory, _ = one_bad
    before, after, later = (saved(directory, config, step) for step in (3, 4, 5))
    for part in ("field", "opt_state", "averages", "key"):
        assert bits(getattr(before, part)) == bits(getattr(after, part)), part
    assert (int(after.step), *map(int, (after.faults.total, after.faults.in_row, after.faults.last))) == (4, 1, 1, 4)
    assert (int(later.step), *map(int, (later.faults.total, later.faults.in_row, later.faults.last))) == (5, 1, 0, 4)
    assert bits(later.field) != bits(after.field)


def test_a_bad_step_is_told_by_its_number_once(one_bad):
    _, directory, told = one_bad
    assert told.count("no finite loss and gradient in step 4, skipped (1 such steps so far)\n") == 1
    assert told.count("no finite loss") == 1
    assert [record["loss"] is None for record in directory.records()] == [False, False, False, True, False]


@pytest.mark.parametrize("log_every", [1, 5])
def test_too_many_bad_steps_in_a_row_stop_the_run_with_a_finite_checkpoint(log_every, tmp_path):
    config = spoiled(3, 4, 5, steps=9, most_faults=3, log_every=log_every, save_every=100)
    message = r"3 steps in a row up to step 5 had no finite loss and gradient; .*checkpoints/00000005 is finite"
    with pytest.raises(run.NonFinite, match=message):
        trained(tmp_path, config)
    (root,) = (tmp_path / "trainer").iterdir()
    assert all(np.isfinite(leaf).all() for leaf in arrays(saved(run.RunDirectory(root), config, 5)))


def test_fewer_bad_steps_in_a_row_than_allowed_do_not_stop_the_run(tmp_path):
    state, _ = trained(tmp_path, spoiled(2, 3, 5, 6, steps=6, most_faults=3))
    assert (int(state.step), int(state.faults.total), int(state.faults.in_row)) == (6, 4, 2)


def test_bad_steps_of_before_a_stop_are_counted_and_not_told_again(tmp_path, capsys):
    config = spoiled(3, 4, 5, steps=6, most_faults=3)
    stopped(tmp_path, config, after=4)
    assert "no finite loss and gradient in step 4" in capsys.readouterr().err
    with pytest.raises(run.NonFinite, match="3 steps in a row up to step 5"):
        trained(tmp_path, config)
    assert re.findall(r"in step (\d), skipped", capsys.readouterr().err) == ["5"]


# What a run refuses, and an error on the way


@pytest.mark.parametrize(("dropout", "meaning"), [(mfx.LabelDropout(0.1, 3), "null label"), (None, "of the network")])
def test_data_with_labels_beyond_those_of_the_network_are_refused(dropout, meaning, tmp_path):
    step = mfx.TrainStep(mfx.Objective(label_dropout=dropout), optax.adam(1e-3))
    field = mfx.MLP(2, width=4, depth=1, labels=3, key=jr.key(0))
    source = data.ArraySource(np.zeros((32, 2), np.float32), np.zeros(32, np.int32), labels=4, name="four")
    make_state = functools.partial(mfx.init_state, field, step.optimizer, [], key=jr.key(0))
    with (
        run.opened(CONFIG, root=tmp_path, script="labels") as directory,
        pytest.raises(ValueError, match=rf"four: labels must be at most 3, .*{meaning}, got 4"),
    ):
        run.train(CONFIG, step, make_state, data.Stream(source, 16), directory, steps=1)


def test_an_error_leaves_no_unfinished_save_for_the_next_run_of_this_process(tmp_path):
    def preview(state, path):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, preview=preview)
    (root,) = (tmp_path / "trainer").iterdir()
    assert steps_on_disk(run.RunDirectory(root)) == [5]


# What a run leaves


def test_checkpoints_previews_and_lines_are_due_at_multiples_and_at_the_end(undisturbed):
    _, directory = undisturbed
    assert [record["step"] for record in directory.records()] == [4, 8, 12, 14]
    assert sorted(path.stem for path in (directory.root / "previews").iterdir()) == ["00000006", "00000012", "00000014"]
    assert steps_on_disk(directory) == [10, 14]


def test_a_line_is_the_mean_over_its_steps(undisturbed, tmp_path):
    _, directory = trained(tmp_path, configured(log_every=1))
    each = [record["loss"] for record in directory.records()]
    lines = [record["loss"] for record in undisturbed[1].records()]
    assert lines == pytest.approx([np.mean(each[i : i + 4]) for i in (0, 4, 8, 12)], rel=1e-6)


def test_checkpoints_at_multiples_are_kept_for_ever(tmp_path):
    _, directory = trained(tmp_path, configured(save_every=2, keep_last=1, keep_every=4))
    assert steps_on_disk(directory) == [4, 8, 12, 14]


def test_summary_adds_up_to_the_wall_time_of_all_sessions(halves):
    _, directory, *_ = halves
    summary = json.loads((directory.root / "summary.json").read_text())
    assert [(session["start"], session["stop"]) for session in summary["sessions"]] == [(0, 7), (7, 14)]
    assert summary["steps"] == 14
    for seconds in (summary["seconds"], *(session["seconds"] for session in summary["sessions"])):
        parts = {name: value for name, value in seconds.items() if name != "wall"}
        assert set(parts) == {"start", "compile", "data", "save", "preview", "log", "steps"}
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(seconds["wall"], abs=0.01)  # each is rounded to milliseconds
    for name, value in summary["seconds"].items():
        assert value == pytest.approx(sum(session["seconds"][name] for session in summary["sessions"]), abs=0.002)
    assert summary["goodput"] == pytest.approx(summary["seconds"]["steps"] / summary["seconds"]["wall"], rel=1e-3)


@pytest.fixture
def clock(monkeypatch):
    """A clock of the run that only `sleep` moves, and of which it says nothing otherwise."""
    now = [100.0]
    monkeypatch.setattr(run_train, "Stopwatch", lambda: _stopwatch.Stopwatch(lambda: now[0]))
    return types.SimpleNamespace(sleep=lambda seconds: now.append(now.pop() + seconds))


@pytest.mark.slow
def test_time_of_previews_is_counted_as_theirs(tmp_path, monkeypatch, clock):
    monkeypatch.setenv("PAUSE", "0.2")
    monkeypatch.setattr(trainer, "time", clock)
    _, directory = trained(tmp_path, configured(preview_every=7))
    seconds = json.loads((directory.root / "summary.json").read_text())["seconds"]
    assert seconds["preview"] == seconds["wall"] == 0.4


@pytest.mark.slow
def test_the_first_step_is_counted_as_compiling(tmp_path, monkeypatch, clock):
    step = _train._train_step

    def slow_at_first(kept, state):
        clock.sleep(2 if int(state.step) == 0 else 0.5)
        return step(kept, state)

    monkeypatch.setattr(_train, "_train_step", slow_at_first)
    _, directory = trained(tmp_path)
    seconds = json.loads((directory.root / "summary.json").read_text())["seconds"]
    assert (seconds["compile"], seconds["steps"]) == (2, 13 * 0.5)


def test_a_test_run_does_two_steps_of_everything_beside_the_run_and_begins_anew(tmp_path):
    config = configured(test_run=True, save_every=1000, name="a")
    for _ in range(2):
        state, directory = trained(tmp_path, config)
        assert int(state.step) == 2
        assert directory.root == tmp_path / "trainer" / "a-test"
        assert [record["step"] for record in directory.records()] == [1, 2]
        assert len(list((directory.root / "previews").iterdir())) == len(steps_on_disk(directory)) == 2
        assert len((directory.root / "starts.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "trainer").iterdir()] == ["a-test"]


def test_a_dry_run_says_what_would_be_trained_and_makes_nothing(undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_train, "_train_step", COMPILED)  # options are for the outermost program
    with pytest.raises(SystemExit) as end:
        trained(tmp_path, configured(dry_run=True))
    assert end.value.code == 0
    parameters = sum(leaf.size for leaf in arrays(undisturbed[0].field))
    size = sum(leaf.nbytes for leaf in arrays(undisturbed[0]))
    text = capsys.readouterr().out
    assert json.loads(text[: text.index("\n}\n") + 3])["width"] == 16
    assert f"MLP with {parameters:,} parameters, 14 steps of 16 rows from points (96 rows)" in text
    assert "1 x cpu" in text and re.search(r"memory per device: \d[\d.]* kB", text)
    assert f"the whole state: {size / 1000:.3g} kB, and so each checkpoint on disk" in text
    assert not list(tmp_path.iterdir())


# Where metrics go


class Kept:
    """A logger of one's own."""

    def __init__(self):
        self.lines, self.closed = [], 0

    def log(self, step, values):
        self.lines.append((step, dict(values)))

    def close(self):
        self.closed += 1


@pytest.mark.slow
def test_a_logger_of_ones_own_gets_what_metrics_jsonl_gets_and_is_closed(tmp_path):
    logger = Kept()
    assert isinstance(logger, run.Logger)
    _, directory = trained(tmp_path, loggers=[logger])
    records = directory.records()
    assert [step for step, _ in logger.lines] == [record["step"] for record in records]
    for (_, values), record in zip(logger.lines, records, strict=True):
        assert values["loss"] == record["loss"] and isinstance(values["loss"], float)
        assert len(values["identity_error_by_gap"]) == len(record["identity_error_by_gap"])
    assert logger.closed == 1


@pytest.mark.slow
def test_pictures_of_other_processes_than_the_first_are_dropped(tmp_path, monkeypatch):
    drawn = []

    def preview(state, path):
        path.write_bytes(b"a picture")
        drawn.append(path)

    monkeypatch.setattr(run_train, "is_first", lambda: False)
    trained(tmp_path, configured(preview_every=4), preview=preview)
    assert drawn and {path.suffix for path in drawn} == {".png"}
    assert not any(path.exists() or path.is_relative_to(tmp_path / "trainer") for path in drawn)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_loggers_are_closed_after_an_error_too(tmp_path):
    def preview(state, path):
        raise KeyError("no picture")

    loggers = [Kept(), Kept()]
    with pytest.raises(KeyError, match="no picture"):
        trained(tmp_path, configured(preview_every=4), preview=preview, loggers=loggers)
    assert [logger.closed for logger in loggers] == [1, 1]


def test_a_run_that_failed_has_its_time_summed_up_and_its_lock_given_back(tmp_path):
    def preview(state, path):
        raise KeyError("no picture")

    with pytest.raises(KeyError, match="no picture"):
        trained(tmp_path, configured(preview_every=4), preview=preview)  # before the first save
    (root,) = (tmp_path / "trainer").iterdir()
    (session,) = json.loads((root / "summary.json").read_text())["sessions"]
    assert (session["start"], session["stop"]) == (0, 4)
    trained(tmp_path)


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX import proto
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    _, directory = trained(tmp_path, configured(tensorboard=True))
    (path,) = (directory.root / "tensorboard").iterdir()
    content, found = path.read_bytes(), {}
    while content:  # a record: length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        event = proto.event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[12 + length + 4 :]
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
    records = directory.records()
    assert {step for step, _ in found} == {record["step"] for record in records}
    for record in records:
        assert found[record["step"], "loss"] == np.float32(record["loss"])
        for i, value in enumerate(record["identity_error_by_gap"]):
            assert (
                math.isnan(found[record["step"], f"identity_error_by_gap/{i}"])
                if value is None
                else found[record["step"], f"identity_error_by_gap/{i}"] == np.float32(value)
            )


def test_tensorboard_itself_reads_each_step_once_though_a_killed_run_repeats_some(tmp_path):
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (4, 8, 12)), (5, (8, 12, 14))):
        logger = run.TensorBoardLogger(tmp_path, start)
        for step in steps:
            logger.log(step, {"loss": step / 10 + start, "error_by_gap": [0.5, math.nan]})
        logger.close()
    events = reader.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, np.float32(value)) for step, value in ((4, 0.4), (8, 5.8), (12, 6.2), (14, 6.4))]
    assert [event.value for event in events.Scalars("error_by_gap/0")] == [0.5] * 4
    assert all(math.isnan(event.value) for event in events.Scalars("error_by_gap/1"))


def weights_and_biases_records(path):
    """What the package wrote into a file: after seven bytes, blocks of 32 KiB; in these, parts of records, each with
    its checksum, its length, and whether it is whole (1), the first (2), a middle (3) or the last part (4)."""
    from wandb.proto import wandb_internal_pb2

    content, position, record = path.read_bytes(), 7, b""
    while position < len(content):
        if (left := -position % 32768) < 7:  # too few for another part: filled up with zeros
            position += left
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_weights_and_biases_itself_takes_every_number_of_a_run_that_continues_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configured(wandb="toys")
    stopped(tmp_path, config, after=7)
    _, directory = trained(tmp_path, config)
    paths = sorted((directory.root / "wandb").glob("offline-run-*/*.wandb"))
    found = [record for path in paths for record in weights_and_biases_records(path)]
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert len(paths) == 2 and len({run.run_id for run in runs}) == 1 and runs[0].project == "toys"
    assert {"width": "16"}.items() <= {item.key: item.value_json for item in runs[0].config.update}.items()
    history = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    losses = {
        step.step.num: json.loads(item.value_json)
        for step in history
        for item in step.item
        if "loss" in item.nested_key
    }
    assert losses == {record["step"]: record["loss"] for record in directory.records()} and len(history) == len(losses)


@pytest.mark.slow
def test_weights_and_biases_gets_one_run_that_continues(tmp_path, monkeypatch):
    started, logged, finished = [], [], []

    class Run:
        def log(self, values, *, step):
            logged.append((step, values))

        def finish(self):
            finished.append(True)

    def init(**arguments):
        started.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = configured(wandb="toys")
    stopped(tmp_path, config, after=7)
    _, directory = trained(tmp_path, config)
    assert [arguments["project"] for arguments in started] == ["toys", "toys"]
    assert [arguments["resume"] for arguments in started] == ["allow", "allow"]
    assert started[0]["id"] == started[1]["id"] and "/" not in started[0]["id"]
    assert started[0]["config"]["width"] == 16 and "save_every" not in started[0]["config"]
    assert [(step, values["loss"]) for step, values in logged] == [
        (record["step"], record["loss"]) for record in directory.records()
    ]
    assert finished == [True, True]


def test_without_its_package_a_logger_is_refused_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(run.MissingDependency, match=r"wandb is not installed: pip install 'mf_eqx\[wandb\]'"):
        trained(tmp_path, configured(wandb="toys"))
