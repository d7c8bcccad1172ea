"""Run by `test_checkpoints.py` in a process of its own, whose right to write and longest file are limited for a while,
and which ends, as if killed, while a step is being written. Prints what is said and what can be loaded."""

import contextlib
import json
import os
import pathlib
import resource
import sys
import tempfile

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mf_eqx.checkpoint import CheckpointError, Checkpoints

NOBODY = 65534


def make_state(step=0):
    return {"weight": jr.bits(jr.key(step), (256, 256), jnp.uint32), "step": jnp.asarray(step)}


def loaded(checkpoints):
    found = checkpoints.load(make_state)
    expected = make_state(found.step)
    return [found.step, all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.all(a == b)), found.state, expected)))]


@contextlib.contextmanager
def read_only(directory):
    """For us, who may be the one who may write everywhere."""
    directory.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        directory.chmod(0o755)


@contextlib.contextmanager
def full(directory):
    """No file may become as long as the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fails(directory, limited):
    """One save that succeeds, one under a limit, one after it."""
    checkpoints, message = Checkpoints(directory), "none"
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    before = loaded(checkpoints)  # and everything that is imported late has been
    with limited(directory):
        try:
            checkpoints.save(2, make_state(2))
            checkpoints.wait()
        except CheckpointError as error:
            message = str(error)
        meanwhile = loaded(checkpoints)
    assert loaded(checkpoints) == meanwhile == before
    checkpoints.save(3, make_state(3))
    checkpoints.wait()
    return {"message": message, "loaded": meanwhile, "afterwards": loaded(checkpoints)}


def end_while_saving(directory):
    """One whole step and the beginning of a large one."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    large = make_state(2) | {"large": jr.bits(jr.key(0), (2**24,), jnp.uint32)}
    checkpoints.save(2, large)
    while not any("orbax-checkpoint-tmp" in path.name for path in directory.iterdir()):
        assert checkpoints.steps() == [1], "too quick"
    os._exit(0)


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    result = {"full": fails(root / "full", full)}
    with tempfile.TemporaryDirectory() as open_to_all:  # unlike those of pytest
        path = pathlib.Path(open_to_all)
        path.chmod(0o755)
        result["read-only"] = fails(path, read_only)
    print(json.dumps(result), flush=True)
    end_while_saving(root / "killed")
