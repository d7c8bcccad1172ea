"""What all tests share: runtime type checking of the package, and float64 where a test asks for it."""

import importlib.util

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Before anything imports mf_eqx. Off with JAXTYPING_DISABLE=1, or where beartype is not installed.
if importlib.util.find_spec("beartype") is not None:
    install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


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
