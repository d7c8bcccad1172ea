"""Experiments as modules: they import each other as the scripts that they are."""

import importlib
import pathlib

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def experiment():
    """Import one by name."""
    for package in ("tyro", "matplotlib", "sklearn", "beartype", "grain", "orbax.checkpoint"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module
