"""A state that comes back is the state that was saved, or the step is passed over and says why."""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from devices import run_on_devices

import mf_eqx as mfx

pytest.importorskip("orbax.checkpoint")

from mf_eqx.checkpoint import _checkpoints, CheckpointError, Checkpoints


class State(mfx.AbstractField):
    """Something of every kind. All bits are drawn, so that nothing is compressed, and some are no numbers. The larger
    arrays are longer than what Orbax stores among its tables, under checksums of its own."""

    weight: jax.Array
    half: jax.Array
    flags: jax.Array
    key: jax.Array
    step: jax.Array
    name: str
    nothing: None = None

    def __init__(self, step=0, *, width=128, dtype=jnp.float32, name="first"):
        draws = np.random.default_rng(step)
        self.weight = jnp.asarray(np.frombuffer(draws.bytes(4 * width * 4), np.float32).reshape(width, 4), dtype)
        self.half = jnp.asarray(np.frombuffer(draws.bytes(2 * 600), jnp.bfloat16))
        self.flags = jnp.asarray(draws.random(7) < 0.5)
        self.key = jr.key(step)
        self.step = jnp.asarray(step, jnp.int32)
        self.name = name

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight @ z


class Line(mfx.AbstractField):
    """The smallest field that learns."""

    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight @ z


def plain(leaf):
    return np.asarray(jr.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def bits(tree):
    """Dtype, shape and bytes of each array."""
    leaves = jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): (str(x.dtype), x.shape, plain(x).tobytes()) for path, x in leaves}


def saved(directory, *steps, **options):
    """Checkpoints of the state of each step."""
    checkpoints = Checkpoints(directory, **{"keep_last": 9, **options})
    for step in steps:
        checkpoints.save(step, State(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def files(checkpoints, step):
    """All files of a step: those of its directory, and its record."""
    found = [path for path in checkpoints.path(step).rglob("*") if path.is_file()]
    return sorted([*found, checkpoints.path(step).with_suffix(".json")])


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def data_file(checkpoints, step, leaf):
    """The file that has the bytes of an array, and where in it they begin."""
    content = plain(leaf).tobytes()
    ((path, place),) = [
        (path, place) for path in files(checkpoints, step) if (place := path.read_bytes().find(content)) >= 0
    ]
    return path, place


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def damage(checkpoints, step):
    """One flipped bit in the weights of a step."""
    flip(*data_file(checkpoints, step, State(step).weight))


# What was saved


def test_state_comes_back_bit_for_bit(tmp_path):
    found = saved(tmp_path, 3).load(State)
    assert bits(found.state) == bits(State(3))
    assert (found.step, found.notes, found.passed_over) == (3, {"step": 3}, {})


@pytest.fixture
def x64_everywhere():
    """In all threads, among them those that read; `x64` is for the test's own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "uint16", "int64", "complex64", "int4"])
def test_array_of_any_dtype_comes_back_bit_for_bit(x64_everywhere, tmp_path, dtype):
    content = np.random.default_rng(0).bytes(24 * jnp.dtype(dtype).itemsize)
    plain = np.frombuffer(content, "int8" if dtype == "int4" else dtype).reshape(2, 3, 4)
    array = jnp.asarray(plain, dtype)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, [array])
    checkpoints.wait()
    assert bits(checkpoints.load(lambda: [jnp.zeros((2, 3, 4), dtype)]).state) == bits([array])


def test_arrays_of_numpy_come_back_as_those_of_jax(tmp_path):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3).T
    state = {"weight": weight, "swapped": weight.astype(">f4"), "count": np.array(3, np.int32), "one": np.float32(0.5)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    expected = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(leaf.dtype.newbyteorder("="))), state)
    found = checkpoints.load(lambda: jax.tree.map(jnp.zeros_like, expected)).state
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    assert bits(found) == bits(expected)


def test_array_of_numpy_that_jax_would_round_is_refused(tmp_path):
    message = r"\['weight'\] must have a dtype that JAX keeps, got float64"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).save(1, {"weight": np.ones(2)})


@pytest.mark.parametrize("step", [3, np.int64(3), np.array(3), jnp.array(3)], ids=["int", "NumPy's", "array", "JAX's"])
def test_step_may_be_any_integer(step, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(step, State(3))
    checkpoints.wait()
    assert checkpoints.load(State).step == 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("step", [-1, 2.5, True, jnp.array(2.0)], ids=str)
def test_step_that_no_load_would_find_is_refused(step, tmp_path):
    with pytest.raises(ValueError, match=rf"step must be an integer >= 0, got {re.escape(repr(step))}"):
        Checkpoints(tmp_path).save(step, State(2))


def test_step_before_those_in_the_directory_is_refused(tmp_path):
    """The next load would return the state of another branch of the training."""
    checkpoints = saved(tmp_path, 10, 20, 30)
    assert checkpoints.load(State, step=10).step == 10
    with pytest.raises(ValueError, match=r"step must not be before those in .*, 20, 30, got 15: to go on"):
        checkpoints.save(15, State(15))
    for step in (20, 30):
        checkpoints.path(step).rename(tmp_path / f"before-{step}")
    checkpoints.save(15, State(15))
    checkpoints.wait()
    assert checkpoints.load(State).step == 15


def test_kind_of_random_keys_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    keys = jr.split(jr.key(0, impl="rbg"), 3)
    checkpoints.save(1, {"keys": keys})
    checkpoints.wait()
    found = checkpoints.load(lambda: {"keys": jr.split(jr.key(1, impl="rbg"), 3)}).state["keys"]
    assert jr.key_impl(found) == jr.key_impl(keys)
    np.testing.assert_array_equal(jr.bits(found[1]), jr.bits(keys[1]))


def test_what_is_no_array_comes_from_the_run(tmp_path):
    found = saved(tmp_path, 3).load(lambda: State(name="second")).state
    assert found.name == "second" and found.nothing is None
    np.testing.assert_array_equal(found.step, 3)


def test_newest_step_is_loaded(tmp_path):
    saved(tmp_path, 1, 2, 10)
    assert Checkpoints(tmp_path).load(State).step == 10


def test_step_that_is_asked_for_is_loaded(tmp_path):
    found = saved(tmp_path, 1, 2, 3).load(State, step=2)
    assert found.step == 2 and bits(found.state) == bits(State(2))


def test_step_that_is_asked_for_and_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(step 7: its record cannot be read"):
        saved(tmp_path, 1).load(State, step=7)


def test_a_part_of_a_state_is_read_by_the_paths_of_the_whole(tmp_path):
    checkpoints = saved(tmp_path, 3)

    def part():
        return eqx.tree_at(lambda state: (state.half, state.key), State(0), (None, None))

    found = checkpoints.load(part, partial=True).state
    whole = bits(State(3))
    assert bits(found) == {name: whole[name] for name in (".weight", ".flags", ".step")}
    with pytest.raises(ValueError, match=r"must hold the expected arrays, but it has the unexpected \.half, \.key"):
        checkpoints.load(part)


def test_a_part_that_was_not_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold the expected arrays, but it differs: \.weight"):
        saved(tmp_path, 3).load(lambda: State(0, width=64), partial=True)


def test_a_record_tells_shapes_and_notes_without_the_arrays(tmp_path):
    checkpoints = saved(tmp_path, 3)
    leaves, notes = checkpoints.saved(3)
    assert leaves[".weight"] == [[128, 4], "float32"] and notes == {"step": 3}
    with pytest.raises(CheckpointError, match="00000004: its record cannot be read"):
        checkpoints.saved(4)


def test_nothing_is_loaded_where_nothing_was_saved(tmp_path):
    assert Checkpoints(tmp_path / "none").load(State) is None
    assert Checkpoints(tmp_path).load(State) is None
    assert list(tmp_path.iterdir()) == []


def test_loading_writes_nothing(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    damage(checkpoints, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpoints.load(State)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), State(1)
    checkpoints.save(1, state)
    for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array)):
        leaf.delete()
    checkpoints.wait()
    assert bits(checkpoints.load(State).state) == bits(State(1))


def test_wait_returns_when_the_step_is_on_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.wait()
    checkpoints.save(4, State(4))
    checkpoints.wait()
    assert Checkpoints(tmp_path).load(State).step == 4
    checkpoints.wait()


def test_step_is_complete_when_it_is_written_whether_anybody_waits_or_not(tmp_path):
    """A run that is killed between two saves has the first of them, although it never asked whether it was done."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, State(4))
    until = time.monotonic() + 60
    while not checkpoints.path(4).exists() and time.monotonic() < until:
        time.sleep(0.02)
    found = Checkpoints(tmp_path).load(State)
    assert found.step == 4 and bits(found.state) == bits(State(4))
    checkpoints.wait()


def test_state_of_the_step_before_is_found_while_a_step_is_saved_again(tmp_path, monkeypatch):
    """That is what a kill in this moment leaves: the old one stands aside, the new one is not complete."""
    from orbax.checkpoint import v1 as ocp

    checkpoints, seen, begin = saved(tmp_path, 1, 2), [], ocp.save_async

    def look(*arguments):
        found = Checkpoints(tmp_path).load(State)
        seen.append((found.step, bits(found.state) == bits(State(1)), (tmp_path / "00000002.damaged").is_dir()))
        return begin(*arguments)

    monkeypatch.setattr(ocp, "save_async", look)
    checkpoints.save(2, State(7))
    checkpoints.wait()
    assert seen == [(1, True, True)]
    assert bits(checkpoints.load(State).state) == bits(State(7))


def test_save_waits_for_the_save_before(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, State(step))
    assert bits(Checkpoints(tmp_path).load(State, step=1).state) == bits(State(1))
    checkpoints.wait()


OPTIMISERS = {
    "adam": optax.adam(1e-2),
    "holds the parameters": optax.contrib.dog(),
    "per block": mfx.nn.per_block(optax.lamb(1e-2)),
    "set by hand": optax.inject_hyperparams(optax.sgd)(1e-2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "adam" else pytest.mark.slow) for name in OPTIMISERS]
)
def test_restored_training_continues_as_if_nothing_had_happened(tmp_path, name):
    optimizer, averages = OPTIMISERS[name], (mfx.ExponentialAverage(0.9),)
    step = mfx.TrainStep(mfx.Objective(None, identity_share=0.0), optimizer, averages)

    def make():
        return mfx.init_state(mfx.MLP(2, width=8, depth=1, key=jr.key(0)), optimizer, averages, key=jr.key(1))

    def rows(number):
        return mfx.Batch(np.random.default_rng(number).standard_normal((4, 2), np.float32))

    checkpoints, state = Checkpoints(tmp_path), eqx.filter_jit(make)()
    for number in range(4):
        if number == 2:
            checkpoints.save(2, state)
        state, _ = step(state, rows(number))
    checkpoints.wait()
    found = checkpoints.load(make).state
    for number in (2, 3):
        found, _ = step(found, rows(number))
    assert bits(found) == bits(state)


# What is kept


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, None, [7]),
        (2, None, [6, 7]),
        (9, None, [1, 2, 3, 4, 5, 6, 7]),
        (1, 3, [3, 6, 7]),
        (2, 2, [2, 4, 6, 7]),
        (1, 1, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_last_steps_are_kept_and_multiples(tmp_path, keep_last, keep_every, expected):
    checkpoints = saved(tmp_path, *range(1, 8), keep_last=keep_last, keep_every=keep_every)
    assert checkpoints.steps() == expected
    names = {name for step in expected for name in (f"{step:08}", f"{step:08}.json")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_old_step_is_there_until_the_new_one_is_on_disk(tmp_path):
    """Nothing of step 2 can be read before `wait`; if step 1 were gone already, a kill would leave nothing."""
    checkpoints = saved(tmp_path, 1, keep_last=1)
    checkpoints.save(2, State(2))
    assert 1 in checkpoints.steps()
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_newer_step_that_was_passed_over_does_not_count_as_kept(tmp_path):
    """Step 9 is damaged, the run continues after 2: neither 3 nor 2 may be given up in favour of 9."""
    checkpoints = saved(tmp_path, 1, 2, 9, keep_last=3)
    damage(checkpoints, 9)
    again = Checkpoints(tmp_path, keep_last=2)
    assert again.load(State).step == 2
    again.save(3, State(3))
    again.wait()
    assert again.steps() == [2, 3] and (tmp_path / "00000009.damaged").is_dir()
    found = again.load(State)
    assert found.step == 3 and not found.passed_over


@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_keeping_fewer_than_one_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        Checkpoints(tmp_path, **{name: 0})


# What others left there


def test_leftovers_of_a_killed_run_are_cleaned_and_nothing_else(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("00000003.orbax-checkpoint-tmp", "00000003.orbax-checkpoint-tmp-17", "00000000.deleted"):
        shutil.copytree(checkpoints.path(1), tmp_path / name)
    assert checkpoints.steps() == [1, 2]
    checkpoints.clean()
    assert {path.name for path in tmp_path.iterdir()} == before
    assert checkpoints.load(State).step == 2


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What a process says of saves that fail, and the directory that it leaves when it ends while it saves."""
    root = tmp_path_factory.mktemp("failures")
    return run_on_devices("checkpoint/fail_to_write.py", root), root / "killed"


def test_run_that_ends_while_it_saves_leaves_the_step_before(failures):
    _, root = failures
    checkpoints = Checkpoints(root)
    assert checkpoints.steps() == [1]
    assert any("orbax-checkpoint-tmp" in path.name for path in root.iterdir())  # or it had been too quick
    checkpoints.clean()
    assert {path.name for path in root.iterdir()} == {"00000001", "00000001.json"}
    checkpoints.save(2, State(2))
    checkpoints.wait()
    assert checkpoints.load(State).step == 2


def test_nothing_is_cleaned_where_nothing_is(tmp_path):
    Checkpoints(tmp_path / "none").clean()
    assert not (tmp_path / "none").exists()


def test_empty_directory_named_like_a_newer_step_is_passed_over(tmp_path):
    checkpoints = saved(tmp_path, 1)
    checkpoints.path(9).mkdir()
    found = checkpoints.load(State)
    assert found.step == 1
    assert found.passed_over[9].startswith("its record cannot be read: FileNotFoundError")


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


def test_other_files_and_directories_are_ignored(tmp_path):
    checkpoints = saved(tmp_path, 1, keep_last=1)
    for name in ("00000050", "notes.txt", "00000007.json", ".hidden"):
        (tmp_path / name).write_text("junk")
    for name in ("junk", "9.5", "-3", "00000060.damaged"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    checkpoints.save(2, State(2))
    checkpoints.wait()
    found = checkpoints.load(State)
    assert found.step == 2 and found.passed_over == {}
    assert (tmp_path / "notes.txt").read_text() == "junk" and (tmp_path / "junk").is_dir()


# What does not fit


def refused(checkpoints, make, *parts):
    with pytest.raises(ValueError) as refusal:
        checkpoints.load(make)
    for part in (str(checkpoints.path(2)), *parts):
        assert part in str(refusal.value)


def test_state_of_another_width_is_refused_with_the_leaf(tmp_path):
    refused(saved(tmp_path, 1, 2), lambda: State(width=8), "differs: .weight is float32 (128, 4), not float32 (8, 4)")


def test_state_of_another_dtype_is_refused_with_the_leaf(tmp_path):
    make = lambda: State(dtype=jnp.bfloat16)  # noqa: E731
    refused(saved(tmp_path, 1, 2), make, "differs: .weight is float32 (128, 4), not bfloat16 (128, 4)")


def test_state_of_another_optimiser_is_refused_with_the_leaves(tmp_path):
    def make(optimizer):
        return lambda: mfx.init_state(State(), optimizer, key=jr.key(0))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, make(optax.adam(0.1))())
    checkpoints.wait()
    refused(checkpoints, make(optax.sgd(0.1)), "unexpected .opt_state[0].count, .opt_state[0].mu.half", "and 2 more")
    refused(checkpoints, make(optax.sgd(0.1, 0.9)), "lacks .opt_state[0].trace.half", ".opt_state[0].count")


def test_step_that_does_not_fit_is_no_reason_to_use_an_older_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, State(1, width=8))
    checkpoints.save(2, State(2))
    checkpoints.wait()
    refused(checkpoints, lambda: State(width=8), ".weight")


def test_check_is_shown_the_notes_and_may_refuse(tmp_path):
    checkpoints, seen = saved(tmp_path, 1, 2), []

    def check(notes):
        seen.append(notes)
        raise ValueError("data are others")

    with pytest.raises(ValueError, match="data are others"):
        checkpoints.load(State, check=check)
    assert seen == [{"step": 2}]
    assert checkpoints.load(State, check=seen.append).step == 2


# Links


@pytest.fixture
def linked(tmp_path):
    """Steps 1 and 2, of which 1 lies elsewhere, with a link in its place."""
    checkpoints = saved(tmp_path / "run", 1, 2, keep_last=2)
    checkpoints.path(1).rename(tmp_path / "elsewhere")
    checkpoints.path(1).symlink_to(tmp_path / "elsewhere")
    return checkpoints


def names(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


def test_a_step_may_be_a_link(linked):
    found = linked.load(lambda: State(1), step=1)
    assert bits(found.state) == bits(State(1))


def test_a_step_that_is_a_link_is_pruned_and_what_it_points_to_is_not(linked, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    linked.save(3, State(3))
    linked.wait()
    assert names(linked) == ["00000002", "00000002.json", "00000003", "00000003.json"]
    assert before and {path: path.read_bytes() for path in before} == before


def test_links_that_were_left_half_deleted_are_removed(linked, tmp_path):
    for name in ("00000000.deleted", "00000005.orbax-checkpoint-tmp", "00000000.damaged", "00000001.damaged"):
        (linked.directory / name).symlink_to(tmp_path / "elsewhere")
    linked.clean()
    assert names(linked) == ["00000001", "00000001.damaged", "00000001.json", "00000002", "00000002.json"]
    assert any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("aside", ["link", "file", "nothing"])
def test_a_step_that_is_a_link_is_moved_aside_when_it_is_saved_again(aside, linked, tmp_path):
    path = linked.path(1).with_suffix(".damaged")
    if aside == "link":
        path.symlink_to(tmp_path)
    elif aside == "file":
        path.write_text("")
    shutil.rmtree(linked.path(2))
    linked.save(1, State(1))
    linked.wait()
    assert path.is_symlink() and path.resolve() == tmp_path / "elsewhere"
    assert bits(linked.load(lambda: State(1), step=1).state) == bits(State(1))


def test_a_link_that_points_nowhere_is_passed_over_and_kept(linked, tmp_path):
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    before = names(linked)
    linked.clean()
    assert names(linked) == before
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(step 1: "):
        linked.load(lambda: State(1), step=1)
    shutil.rmtree(linked.path(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(step 1: "):
        linked.load(lambda: State(1))
    linked.save(1, State(1))
    linked.wait()
    assert linked.path(1).with_suffix(".damaged").is_symlink()
    assert bits(linked.load(lambda: State(1)).state) == bits(State(1))


def test_a_record_is_never_written_to_where_a_link_points(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run" / "00000001.json").symlink_to(tmp_path / "precious")
    saved(tmp_path / "run", 1)
    assert (tmp_path / "precious").read_text() == "text"


# What is damaged


@pytest.mark.parametrize("name", ["weight", "half"])
def test_flipped_bit_is_noticed_and_its_leaf_named(tmp_path, name):
    checkpoints = saved(tmp_path, 1, 2)
    path, place = data_file(checkpoints, 2, getattr(State(2), name))
    flip(path, place + 3, bit=5)
    found = checkpoints.load(State)
    assert found.step == 1 and bits(found.state) == bits(State(1))
    assert found.passed_over == {2: f".{name} not as saved (by the digest)"}


def test_flipped_bit_in_the_record_is_noticed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    record = checkpoints.path(2).with_suffix(".json")
    flip(record, record.read_text().index("step") + 1)
    assert checkpoints.load(State).passed_over == {2: "its record does not match its checksum"}


def test_record_of_another_step_is_noticed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    shutil.copy(checkpoints.path(1).with_suffix(".json"), checkpoints.path(2).with_suffix(".json"))
    assert checkpoints.load(State).passed_over == {2: "its record is of step 1"}


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


def test_step_that_was_passed_over_is_moved_aside_when_it_is_reached_again(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for _ in range(2):  # and what was moved aside before gives way
        damage(checkpoints, 2)
        broken = contents(checkpoints.path(2))
        assert checkpoints.load(State).step == 1
        checkpoints.save(2, State(2))
        checkpoints.wait()
        found = checkpoints.load(State)
        assert found.step == 2 and found.passed_over == {} and bits(found.state) == bits(State(2))
        assert contents(tmp_path / "00000002.damaged") == broken
        assert checkpoints.steps() == [1, 2]


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


# Other devices


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    return run_on_devices("checkpoint/restore_on_devices.py", tmp_path_factory.mktemp("restore"))


@pytest.mark.parametrize("layout", ["1 device", "2 devices", "8 devices", "1 x fsdp 8", "4 x fsdp 2", "none"])
def test_state_comes_back_on_other_devices_bit_for_bit_and_in_its_place(on_devices, layout):
    assert on_devices[layout] == {"bits": True, "placed": True, "step": 2, "passed_over": {}}


def test_damaged_part_of_one_device_is_noticed_on_all(on_devices):
    assert on_devices["damaged"] == [1, "['large'] not as saved (by the digest)"]


# Disks that refuse


def test_directory_that_cannot_be_made_is_refused_with_step_and_reason(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "inside")
    with pytest.raises(CheckpointError, match=r"inside/00000004: step 4 could not be saved: .*Not a directory"):
        checkpoints.save(4, State(4))


def test_read_only_directory_is_refused_with_step_and_reason(failures):
    message = failures[0]["read-only"]["message"]
    assert "/00000002: step 2 could not be saved: " in message and "Permission denied" in message


def test_full_disk_is_refused_with_step_and_reason(failures):
    message = failures[0]["full"]["message"]
    assert "/00000002: step 2 could not be saved: " in message and "File too large" in message


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_older_step_loads_where_the_newer_one_could_not_be_written(failures, kind):
    assert failures[0][kind]["loaded"] == [1, True]


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_saving_goes_on_where_the_disk_is_well_again(failures, kind):
    assert failures[0][kind]["afterwards"] == [3, True]


# Found by reading and trying


def test_damaged_step_that_was_passed_over_does_not_count_as_kept(tmp_path):
    damage(saved(tmp_path, 10, 20), 20)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.load(State).step == 10
    checkpoints.save(25, State(25))
    checkpoints.wait()
    damage(checkpoints, 25)
    assert checkpoints.load(State).step == 10


@pytest.mark.parametrize("name", ["7", "0000000007"])
def test_directory_with_another_name_for_a_step_is_left_alone(tmp_path, name):
    checkpoints = saved(tmp_path, 1, keep_last=1)
    (tmp_path / name).mkdir()
    for step in (8, 9):
        checkpoints.save(step, State(step))
        checkpoints.wait()
    assert checkpoints.steps() == [9] and (tmp_path / name).is_dir()


def test_save_that_cannot_begin_leaves_the_step_that_stood_there(tmp_path):
    checkpoints = saved(tmp_path, 2)
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        checkpoints.save(2, State(2), {"notes": object()})
    assert checkpoints.load(State).step == 2


def test_damaged_metadata_are_passed_over_in_silence(tmp_path, capfd):
    checkpoints = saved(tmp_path, 1, 2)
    file = checkpoints.path(2) / "state/array_metadatas/process_0"
    content = file.read_bytes()
    for length in (60, 100, 140):
        file.write_bytes(content[:length])
        assert checkpoints.load(State).step == 1
    assert capfd.readouterr().err == ""


def test_cleaning_leaves_other_files_alone_and_removes_records_without_a_step(tmp_path):
    checkpoints = saved(tmp_path, 1)
    for name in ("x.deleted", "00000002.json", "notes.json"):
        (tmp_path / name).write_text("")
    checkpoints.clean()
    assert {path.name for path in tmp_path.iterdir()} == {"00000001", "00000001.json", "x.deleted", "notes.json"}


def test_keys_of_another_generator_of_the_same_width_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, [jr.key(0, impl="rbg")])
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"differs: \[0\] is key<rbg> \(\), not key<urbg> \(\)"):
        checkpoints.load(lambda: [jr.key(0, impl="unsafe_rbg")])
