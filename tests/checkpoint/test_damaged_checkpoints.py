"""Damage of every kind to the files of a step: the step is passed over, or what comes back is right."""

import itertools
import shutil

import numpy as np
import pytest
from saved_states import bits, damage, data_file, files, flip, saved, State

pytest.importorskip("orbax.checkpoint")

from mf_eqx.checkpoint import _checkpoints, CheckpointError


@pytest.mark.parametrize("name", ["weight", "half"])
def test_flipped_bit_is_noticed_and_its_leaf_named(tmp_path, name):
    checkpoints = saved(tmp_path, 1, 2)
    path, place = data_file(checkpoints, 2, getattr(State(2), name))
    flip(path, place + 3, bit=5)
    found = checkpoints.load(State)
    assert found.step == 1 and bits(found.state) == bits(State(1))
    assert found.passed_over == {2: f".{name} not as saved (by the digest)"}


def test_arrays_of_another_step_are_noticed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    shutil.rmtree(checkpoints.path(2))
    shutil.copytree(checkpoints.path(1), checkpoints.path(2))
    (reason,) = checkpoints.load(State).passed_over.values()
    assert "not as saved (by the digest)" in reason


def test_if_all_are_damaged_every_step_is_named(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3)
    damage(checkpoints, 1)
    damage(checkpoints, 3)
    shutil.rmtree(checkpoints.path(2) / "state")
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(State)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: no checkpoint can be used (step 3: .weight not as saved (by the digest); ")
    assert "; step 2: it cannot be read: " in message and "; step 1: .weight not as saved" in message


# Damage of every kind everywhere

DAMAGES = {
    "first flip": lambda content, draws: flipped(content, draws),
    "second flip": lambda content, draws: flipped(content, draws),
    "half": lambda content, _: content[: len(content) // 2],
    "zeros": lambda content, _: bytes(min(4096, len(content))) + content[4096:],
    "deleted": lambda *_: None,
}


def flipped(content, draws):
    changed = bytearray(content)
    changed[draws.integers(len(content))] ^= 1 << int(draws.integers(8))
    return bytes(changed)


def outcome(checkpoints):
    """What becomes of a load, if step 1 is good and step 2 may be damaged."""
    found = checkpoints.load(State)
    if bits(found.state) != bits(State(found.step)):
        return "wrong"
    reason = found.passed_over.get(2, "")
    if found.step == 1:
        return "digest" if reason.endswith("by the digest") else "unreadable" if reason else "no reason"
    return "right" if found.passed_over == {} else "wrong step"


def sweep(checkpoints, paths, damages):
    """The outcomes of damages to one file at a time, which is put right again."""
    found, draws = {}, np.random.default_rng(0)
    for path, (name, change) in itertools.product(paths, damages):
        content = path.read_bytes()
        if content or name == "deleted":
            changed = change(content, draws)
            path.unlink() if changed is None else path.write_bytes(changed)
            found[f"{name} {path.name}"] = outcome(checkpoints)
            path.write_bytes(content)
    return found


@pytest.mark.parametrize(
    "names", [("second flip", "zeros"), pytest.param(tuple(DAMAGES), marks=pytest.mark.slow)], ids=len
)
def test_damaged_file_is_harmless_or_its_step_passed_over(names, tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    found = sweep(checkpoints, files(checkpoints, 2), [(name, DAMAGES[name]) for name in names])
    assert {name: how for name, how in found.items() if how not in ("right", "digest", "unreadable")} == {}
    # Or the damages were too tame to show anything. Few of them reach the data, which the digest is for.
    assert set(found.values()) >= {"right", "unreadable", *(["digest"] if names == tuple(DAMAGES) else [])}
    assert len(found) > 8 * len(names)


def test_sweep_finds_wrong_weights_where_digests_are_not_compared(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, 2)
    path, _ = data_file(checkpoints, 2, State(2).weight)
    flips = [(str(i), lambda content, draws: flipped(content, draws)) for i in range(4)]
    assert "wrong" not in sweep(checkpoints, [path], flips).values()
    monkeypatch.setattr(_checkpoints, "digests", lambda tree: {})
    assert "wrong" in sweep(checkpoints, [path], flips).values()


@pytest.mark.slow
def test_no_flip_of_hundreds_lets_a_wrong_state_through(tmp_path):
    """At random places of the step's bytes, so that large files get their share. Two minutes."""
    checkpoints = saved(tmp_path, 1, 2)
    paths, draws = files(checkpoints, 2), np.random.default_rng(1)
    share = np.array([path.stat().st_size for path in paths])
    chosen = [paths[i] for i in draws.choice(len(paths), 400, p=share / share.sum())]
    found = {}
    for number, path in enumerate(chosen):
        found |= sweep(checkpoints, [path], [(str(number), lambda content, _: flipped(content, draws))])
    assert {name: how for name, how in found.items() if how not in ("right", "digest", "unreadable")} == {}


def test_damaged_metadata_are_passed_over_in_silence(tmp_path, capfd):
    checkpoints = saved(tmp_path, 1, 2)
    file = checkpoints.path(2) / "state/array_metadatas/process_0"
    content = file.read_bytes()
    for length in (60, 100, 140):
        file.write_bytes(content[:length])
        assert checkpoints.load(State).step == 1
    assert capfd.readouterr().err == ""
