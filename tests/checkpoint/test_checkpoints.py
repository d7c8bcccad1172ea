"""A state that comes back is the state that was saved, or the step is passed over and says why."""

import re
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from devices import run_on_devices
from fields import filled
from saved_states import bits, damage, saved, State

import mf_eqx as mfx

pytest.importorskip("orbax.checkpoint")

from mf_eqx.checkpoint import CheckpointError, Checkpoints


class Line(mfx.AbstractField):
    """The smallest field that learns."""

    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight @ z


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
        field = filled(lambda: mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
        return mfx.init_state(field, optimizer, averages, key=jr.key(1))

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


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What a process says of saves that fail, and the directory that it leaves when it ends while it saves."""
    root = tmp_path_factory.mktemp("failures")
    return run_on_devices("checkpoint/fail_to_write.py", root), root / "killed"


@pytest.mark.rehearsal
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


# Other devices


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    return run_on_devices("checkpoint/restore_on_devices.py", tmp_path_factory.mktemp("restore"))


@pytest.mark.rehearsal
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


def test_save_that_cannot_begin_leaves_the_step_that_stood_there(tmp_path):
    checkpoints = saved(tmp_path, 2)
    with pytest.raises(ValueError, match=r"a checkpoint, with its notes, must be JSON .* not JSON serializable"):
        checkpoints.save(2, State(2), {"notes": object()})
    assert checkpoints.load(State).step == 2


def test_keys_of_another_generator_of_the_same_width_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, [jr.key(0, impl="rbg")])
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"differs: \[0\] is key<rbg> \(\), not key<urbg> \(\)"):
        checkpoints.load(lambda: [jr.key(0, impl="unsafe_rbg")])
