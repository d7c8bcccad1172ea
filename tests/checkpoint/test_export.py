"""Samplers as files: what `sample` makes, without the package."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import refilled

import mf_eqx as mfx
from mf_eqx import checkpoint, metrics, nn, run


@pytest.fixture(scope="module")
def field():
    return refilled(mfx.MLP(2, width=8, depth=2, labels=3, key=jr.key(0)))


FRESH = """
import json, pathlib, sys
import jax, numpy as np
exported = jax.export.deserialize(bytearray(pathlib.Path("sampler").read_bytes()))
given = np.load("given.npz")
labels = {name: np.arange(len(given[name]), dtype=np.int32) % 3 for name in given}
np.savez("made.npz", **{name: exported.call(given[name], labels[name]) for name in given})
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] in ("mf_eqx", "equinox", "optax"))))
"""


@pytest.fixture(scope="module")
def exported(field, tmp_path_factory):
    """The directory of a sampler that a fresh process has called with one row and with five."""
    pytest.importorskip("flatbuffers")
    folder = tmp_path_factory.mktemp("sampler")
    checkpoint.export_sampler(
        folder / "sampler", field, (2,), jnp.asarray(0), times=(1.0, 0.5, 0.0), platforms=("cpu",)
    )
    np.savez(folder / "given.npz", one=normal(1), five=normal(5))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout)


def normal(rows):
    return np.asarray(jr.normal(jr.key(rows), (rows, 2)))


@pytest.mark.rehearsal
def test_a_sampler_runs_without_the_package(exported):
    assert exported[1] == []


@pytest.mark.parametrize(("name", "rows"), [("one", 1), ("five", 5)])
def test_a_sampler_makes_of_any_number_of_rows_what_sample_makes(name, rows, exported, field):
    made = np.load(exported[0] / "made.npz")[name]
    expected = jax.vmap(lambda eps, label: mfx.sample(field, eps, label, times=(1.0, 0.5, 0.0)))(
        normal(rows), jnp.arange(rows) % 3
    )
    assert made.shape == (rows, 2)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)  # float32, compiled apart
    assert np.abs(made - normal(rows)).max() > 0.01


def test_a_sampler_without_a_condition_takes_noise_alone(field, tmp_path):
    pytest.importorskip("flatbuffers")
    plain = refilled(mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
    checkpoint.export_sampler(tmp_path / "plain", plain, (2,), platforms=("cpu",))
    called = jax.export.deserialize(bytearray((tmp_path / "plain").read_bytes())).call(normal(3))
    np.testing.assert_allclose(called, jax.vmap(lambda eps: mfx.sample(plain, eps))(normal(3)), rtol=1e-5, atol=1e-6)


def test_a_sampler_takes_conditions_of_any_structure(tmp_path):
    pytest.importorskip("flatbuffers")

    class Sum(nn.AbstractConditionEmbedding):
        table: jax.Array

        def __call__(self, condition):
            return condition["a"] @ self.table[:3] + self.table[condition["b"][0]].sum(axis=0)

    field = refilled(mfx.MLP(2, width=8, depth=1, condition=Sum(jr.normal(jr.key(1), (9, 8))), key=jr.key(0)))
    condition = {"a": jr.normal(jr.key(2), (4, 3)), "b": (jnp.arange(8).reshape(4, 2),)}
    one = jax.tree.map(lambda leaf: leaf[0], condition)
    checkpoint.export_sampler(tmp_path / "tree", field, (2,), one, platforms=("cpu",))
    called = jax.export.deserialize(bytearray((tmp_path / "tree").read_bytes())).call(normal(4), condition)
    expected = jax.vmap(lambda eps, condition: mfx.sample(field, eps, condition))(normal(4), condition)
    np.testing.assert_allclose(called, expected, rtol=1e-5, atol=1e-6)


def test_a_sampler_takes_vectors(tmp_path):
    pytest.importorskip("flatbuffers")
    field = refilled(mfx.MLP(2, width=8, depth=1, condition=3, key=jr.key(0)))
    checkpoint.export_sampler(tmp_path / "vector", field, (2,), np.zeros(3, np.float32), platforms=("cpu",))
    vectors = np.asarray(jr.normal(jr.key(2), (4, 3)))
    called = jax.export.deserialize(bytearray((tmp_path / "vector").read_bytes())).call(normal(4), vectors)
    expected = jax.vmap(lambda eps, vector: mfx.sample(field, eps, vector))(normal(4), vectors)
    np.testing.assert_allclose(called, expected, rtol=1e-5, atol=1e-6)


def test_a_sampler_returns_what_postprocess_makes_of_each_sample(tmp_path):
    pytest.importorskip("flatbuffers")
    field = refilled(mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
    checkpoint.export_sampler(tmp_path / "pixels", field, (2,), postprocess=metrics.round_to_pixels, platforms=("cpu",))
    called = jax.export.deserialize(bytearray((tmp_path / "pixels").read_bytes())).call(normal(40))
    expected = metrics.round_to_pixels(jax.vmap(lambda eps: mfx.sample(field, eps))(normal(40)))
    assert called.dtype == np.uint8 and np.ptp(called) > 100
    # Samples that are compiled apart may differ in the last bit, and so fall on both sides of a border between levels.
    assert np.abs(np.asarray(called, int) - np.asarray(expected, int)).max() <= 1


def test_a_sampler_is_the_same_bytes_wherever_it_is_written_from(field, tmp_path):
    pytest.importorskip("flatbuffers")
    checkpoint.export_sampler(tmp_path / "a", field, (2,), jnp.asarray(0), platforms=("cpu",))
    code = "\n\ndef save(path, field): checkpoint.export_sampler(path, field, (2,), jnp.asarray(0), platforms=('cpu',))"
    exec(compile(code, "elsewhere.py", "exec"), there := {"checkpoint": checkpoint, "jnp": jnp})
    there["save"](tmp_path / "b", field)
    content = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == content and b".py" not in content


def test_a_sampler_is_written_for_every_platform_by_default(field, tmp_path):
    pytest.importorskip("flatbuffers")
    checkpoint.export_sampler(tmp_path / "sampler", field, (2,), jnp.asarray(0))
    assert jax.export.deserialize(bytearray((tmp_path / "sampler").read_bytes())).platforms == ("cpu", "cuda", "tpu")


def test_without_its_package_the_extra_is_named(field, tmp_path, monkeypatch):
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "flatbuffers"), "flatbuffers"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(run.MissingDependency, match=r"pip install 'mf_eqx\[export\]'"):
        checkpoint.export_sampler(tmp_path / "sampler", field, (2,), jnp.asarray(0))
