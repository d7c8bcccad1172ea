"""Benchmarks as modules, and runs of them that are as small as a run can be."""

import contextlib
import functools
import importlib
import os
import pathlib

import jax
import pytest

import mf_eqx as mfx
from mf_eqx import measure

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = {"one_step_vs_ode": ("sklearn", "beartype")}  # by the experiments that it imports
MINUSCULE = mfx.DiTSize(depth=1, width=16, heads=2, patch=16)


@pytest.fixture(scope="module")
def benchmark_script():
    """Import one by name."""

    def imported(name):
        for package in NEEDED.get(name, ()):
            pytest.importorskip(package)
        return importlib.import_module(name)

    with pytest.MonkeyPatch.context() as patch:
        for folder in ("experiments", "benchmarks"):
            patch.syspath_prepend(ROOT / folder)
        yield imported


@pytest.fixture(scope="module", autouse=True)
def compilation_cache():
    """As before: scripts turn it off, so that compiling takes the time that it takes."""
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture(scope="module", autouse=True)
def devices():
    """As before: a script that compiles for other devices hides those of this machine."""
    environment, platforms = dict(os.environ), jax.config.jax_platforms
    yield
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_platforms", platforms)


@pytest.fixture(scope="module")
def resized(benchmark_script):
    """A context in which `tiny` is minuscule, and other names of DiTs stand for the sizes that are given."""
    steps = benchmark_script("steps")
    counts = (steps.count_passes, steps.count_again, steps.xla_flops)

    @contextlib.contextmanager
    def resize(sizes=()):
        with pytest.MonkeyPatch.context() as patch:
            for name, size in {"tiny": MINUSCULE, **dict(sizes)}.items():
                patch.setitem(steps.DITS, name, size)
            for count in counts:
                count.cache_clear()
            yield
        for count in counts:
            count.cache_clear()

    return resize


@pytest.fixture(scope="module")
def finished(benchmark_script, resized, tmp_path_factory):
    """Run a script to its end with minuscule networks; returns the directory that it leaves."""
    pytest.importorskip("matplotlib")

    def finish(name, sizes=(), **config):
        script, root = benchmark_script(name), tmp_path_factory.mktemp(name)
        peak = functools.partial(measure.matmul_peak, size=64, rounds=1)
        with resized(sizes), pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr(measure, "matmul_peak", peak)
            script.main(script.Config(**config))
        (directory,) = (root / "runs").glob("*/*")
        return directory

    return finish
