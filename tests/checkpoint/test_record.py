"""Records that were changed, forged or replaced: their step is passed over and says why."""

import functools
import hashlib
import json
import os
import shutil
import threading

import pytest
from saved_states import flip, saved, State

pytest.importorskip("orbax.checkpoint")

from mf_eqx.checkpoint import Checkpoints


def forge(checkpoints, step, record):
    """Writes a record under the checksum that belongs to it."""
    text = json.dumps(record)
    sealed = {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    checkpoints.path(step).with_suffix(".json").write_text(json.dumps(sealed))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": None}, "its record lacks format or has another type there"),
        ({"step": "2"}, "its record lacks step or has another type there"),
        ({"notes": [1]}, "its record lacks notes or has another type there"),
        ({"leaves": 3, "digests": "a"}, "its record lacks leaves, digests or has another type there"),
        ({"digests": {"a": 1}}, "its record has digests of other leaves"),
        ({"leaves": {"a": 3}, "digests": {"a": 1}}, "its record has no shape and dtype of a"),
        ({"notes": functools.reduce(lambda inner, _: {"a": inner}, range(500), {})}, "nested more than 64 times"),
    ],
    ids=range(7),
)
def test_record_of_other_content_than_a_record_is_passed_over(change, reason, tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    record = {"step": 2, "format": 1, "leaves": {}, "digests": {}, "notes": {}}
    forge(checkpoints, 2, record | change)
    found = checkpoints.load(State)
    assert found.step == 1 and reason in found.passed_over[2]


def test_record_that_is_no_object_is_passed_over(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    forge(checkpoints, 2, [1])
    assert "its record is a list" in checkpoints.load(State).passed_over[2]


def test_notes_that_are_not_finite_come_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State(), {"best": float("inf")})
    checkpoints.wait()
    assert checkpoints.load(State).notes == {"best": float("inf")}


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (lambda: functools.reduce(lambda inner, _: {"a": inner}, range(63), {}), "it is nested more than 64 times"),
        (lambda: {"many": [0] * (1 << 20)}, "it has more than 1,048,576 values"),
        # A quote takes four bytes in the file.
        (lambda: {"long": '"' * (1 << 24)}, "it has 67,.* bytes, more than 67,108,864"),
    ],
    ids=range(3),
)
def test_notes_that_could_not_be_read_again_are_refused_when_they_are_saved(notes, message, tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=f"a checkpoint, with its notes, must be JSON that can be .*, but {message}"):
        checkpoints.save(1, State(), notes())
    assert checkpoints.load(State).passed_over == {}


def test_step_whose_record_is_a_pipe_is_saved_anew(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    record = checkpoints.path(2).with_suffix(".json")
    record.unlink()
    os.mkfifo(record)
    assert checkpoints.load(State).step == 1
    thread = threading.Thread(target=checkpoints.save, args=(2, State(2)), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    checkpoints.wait()
    assert checkpoints.load(State).step == 2


def test_a_record_is_never_written_to_where_a_link_points(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run" / "00000001.json").symlink_to(tmp_path / "precious")
    saved(tmp_path / "run", 1)
    assert (tmp_path / "precious").read_text() == "text"


def test_flipped_bit_in_the_record_is_noticed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    record = checkpoints.path(2).with_suffix(".json")
    flip(record, record.read_text().index("step") + 1)
    assert checkpoints.load(State).passed_over == {2: "its record does not match its checksum"}


def test_record_of_another_step_is_noticed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    shutil.copy(checkpoints.path(1).with_suffix(".json"), checkpoints.path(2).with_suffix(".json"))
    assert checkpoints.load(State).passed_over == {2: "its record is of step 1"}
