"""What all tests share: quick compiling, runtime type checking of the package, and float64 where a test asks for it."""

import gc
import importlib.util
import os
import subprocess
import sys

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Before anything imports mf_eqx. Off with JAXTYPING_DISABLE=1, or where beartype is not installed.
if importlib.util.find_spec("beartype") is not None:
    install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
PROBE = "import jax; jax.jit(lambda: 0)(); assert jax.default_backend() == 'cpu'"


def pytest_configure(config):
    """Have XLA compile in half the time and without optimisation, since most programs of the tests run once.

    Not for slow tests, which train for minutes; not on accelerators, nor by an XLA that does not know these flags,
    which would end the process, nor where XLA_FLAGS are set: `XLA_FLAGS= pytest` tests what XLA makes of programs
    otherwise.
    """
    if config.option.markexpr == "not slow" and "XLA_FLAGS" not in os.environ:
        quick = {**os.environ, "XLA_FLAGS": QUICK}
        if subprocess.run([sys.executable, "-c", PROBE], env=quick, capture_output=True).returncode == 0:
            os.environ["XLA_FLAGS"] = QUICK


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What a module leaves behind, mostly programs, is not searched for garbage again and again during all others."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """Float64 for one test; arrays must be created inside it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """No runtime type checking for one test: the package's own refusal is what users without it see."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
