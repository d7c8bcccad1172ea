import sys

import pytest

from mf_eqx import picture, run


def test_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = r"sklearn is not installed: pip install 'mf_eqx\[experiments\]'"
    with pytest.raises(ImportError, match=message), run.optional("sklearn"):
        import sklearn.datasets  # noqa: F401


def test_missing_package_without_an_extra_is_installed_by_its_name():
    message = r"no_such_package is not installed: pip install no_such_package$"
    with pytest.raises(ImportError, match=message), run.optional("no_such_package"):
        import no_such_package.part  # noqa: F401 # pyright: ignore[reportMissingImports]


def test_missing_matplotlib_names_the_extra_to_install(monkeypatch, tmp_path):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(run.MissingDependency, match="matplotlib is not installed"):
        picture.save_curves(tmp_path / "curves.png", [{"step": 1, "loss": 1.0}])


def test_import_that_fails_inside_another_package_passes_unchanged():
    with pytest.raises(ModuleNotFoundError) as caught, run.optional("matplotlib"):
        import no_such_package  # noqa: F401 # pyright: ignore[reportMissingImports]
    assert not isinstance(caught.value, run.MissingDependency)


def test_what_is_needed_at_the_end_is_refused_at_once_with_its_extra(monkeypatch):
    run.require("json", "csv")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(run.MissingDependency, match=r"flatbuffers is not installed: pip install 'mf_eqx\[export\]'"):
        run.require("json", "flatbuffers")


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError, match="x"), run.optional("matplotlib"):
        raise KeyError("x")
