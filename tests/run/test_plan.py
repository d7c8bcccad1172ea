import shutil
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import data, run
from mf_eqx.checkpoint._step_folders import StepFolders
from mf_eqx.run import _plan

pytest.importorskip("grain")

ROWS = 16


class Device(types.SimpleNamespace):
    pass


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H20", 148),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4080", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_all_devices_of_the_kind_and_unknown_for_others(kind, tflops, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)] * 3)
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    peak = _plan.peak_flops()
    assert peak is None if tflops is None else peak == pytest.approx(3 * tflops * 1e12)


class Affine(mfx.AbstractField):
    weight: jax.Array

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.weight @ z


def stream(rows=ROWS):
    return data.Stream(data.ArraySource(np.zeros((32, 5), np.float32)), rows)


def parts(share, averages=(), prepare=None):
    """A step of a field with one product of 2 x 5 x 5 operations, and its first state."""
    identity = None if share == 0 else mfx.MeanFlow()
    objective = mfx.Objective(identity, identity_share=share, boundary_times=mfx.UniformTimes())
    step = mfx.TrainStep(objective, optax.sgd(0.1), averages, prepare)
    return step, lambda: mfx.init_state(Affine(jnp.eye(5)), optax.sgd(0.1), averages, key=jr.key(0))


def counted(step, make_state, rows=ROWS):
    return _plan.flops_of_step(step, eqx.filter_eval_shape(make_state), _plan.batch_shapes(stream(rows)))


def test_a_step_of_flow_matching_is_a_forward_product_and_one_for_the_gradient():
    assert counted(*parts(0)) == 2 * ROWS * 2 * 5 * 5


def test_a_step_with_identity_rows_pays_a_jvp_for_these_alone():
    plain, half = counted(*parts(0)), counted(*parts(0.5))
    jvp = (half - plain) / (ROWS / 2 * 2 * 5 * 5)  # further products of each row with r < t
    assert jvp == 1


def test_operations_grow_with_the_rows():
    assert counted(*parts(0.25), rows=32) == 2 * counted(*parts(0.25), rows=16)


def test_products_of_what_prepares_the_rows_count():
    def prepare(row, key):
        return mfx.Batch(jnp.ones((5, 5)) @ row.x, row.condition, row.index)

    assert counted(*parts(0, prepare=prepare)) - counted(*parts(0)) == ROWS * 2 * 5 * 5


def test_work_of_a_step_has_operations_only_where_the_peak_is_known(monkeypatch):
    step, make_state = parts(0)
    monkeypatch.setattr(_plan, "peak_flops", lambda: None)
    assert _plan.work_of_step(step, make_state, stream()) == _plan.Work(ROWS)
    monkeypatch.setattr(_plan, "peak_flops", lambda: 1e15)
    assert _plan.work_of_step(step, make_state, stream()) == _plan.Work(ROWS, counted(step, make_state), 1e15)


def test_shapes_of_a_batch_are_those_of_the_streams_batches():
    labelled = data.Stream(data.ArraySource(np.zeros((32, 5), np.float32), np.zeros(32, np.int32), labels=3), ROWS)
    for source in (stream(), labelled):
        shapes, batch = _plan.batch_shapes(source), next(source.batches())
        assert jax.tree.structure(shapes) == jax.tree.structure(batch)
        for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(batch), strict=True):
            assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (93_400, "93.4 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")],
)
def test_bytes_for_people(count, text):
    assert _plan.size(count) == text


@pytest.mark.parametrize("stopped", [0, 1000, 1500, 4000, 6000, 10_000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"keep_every": 2000},
        {"keep_every": 3000, "keep_last": 3},
        {"keep_every": 600, "save_every": 700},
        {"keep_every": 1000, "save_every": 250},
        {"save_every": 6000},
        {"keep_last": 50},
    ],
    ids=str,
)
def test_a_disk_must_have_space_for_all_checkpoints_at_once_and_for_the_averages(
    settings, stopped, tmp_path, monkeypatch
):
    """The checkpoints are counted in a directory in which every save of the run is one folder."""
    config, steps = run.Settings(**settings), 10_500
    folders = StepFolders(tmp_path, config.keep_last, config.keep_every or None)

    def saved_until(last, start=0):
        """The largest number of checkpoints at once."""
        most = 0
        for step in sorted({*range(config.save_every, last, config.save_every), last} - {*range(start + 1), 0}):
            folders.path(step).mkdir()
            most = max(most, len(folders.steps()))
            folders.prune(step)
        return most

    saved_until(stopped)
    before = folders.steps()
    number = saved_until(steps, stopped) - len(before)
    field = mfx.MLP(2, width=4, depth=1, key=jr.key(0))
    state = mfx.init_state(field, optax.sgd(0.1), key=jr.key(1))
    monkeypatch.setattr(_plan, "bytes_of", lambda tree: 500 if tree is state else 100)
    arguments = (tmp_path / "new" / "run", config, state, before, stopped, steps)
    needed = 500 * number + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed))
    _plan.check_disk(*arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=f"for {number} more checkpoints of 500 B each"):
        _plan.check_disk(*arguments)
