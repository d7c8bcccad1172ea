"""The wheel as its users get it: built, its metadata checked as an index does, installed into an empty environment, and
tried there.

    python .ci/wheel.py        with any Python that has pip; ends with 1 at the first fault

Besides pip it needs nothing: build tools and twine get environments of their own.
"""

import importlib
import importlib.metadata
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        wheel = build(folder)
        check_content(wheel)
        check_metadata(wheel, environment(folder / "tools", "twine"))
        subprocess.run([environment(folder / "empty", str(wheel)), "-I", __file__, "installed"], check=True)
    print(f"{wheel.name}: complete, accepted and usable, {time.perf_counter() - began:.0f} s")


def build(folder: pathlib.Path) -> pathlib.Path:
    """The wheel of this checkout."""
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: pathlib.Path, package: str) -> pathlib.Path:
    """The Python of a new environment that has `package`, with what it depends on, and nothing else."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--no-compile", package)
    return python


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def check_content(wheel: pathlib.Path) -> None:
    """Every file of the package, and no others."""
    files = [path for path in (ROOT / "mf_eqx").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != wanted:
        sys.exit(f"{wheel.name}: must hold the files of mf_eqx, but these differ: {sorted(found ^ wanted)}")


def check_metadata(wheel: pathlib.Path, python: pathlib.Path) -> None:
    """What an index refuses, a description that it cannot show, and links to files that it does not have."""
    subprocess.run([python, "-m", "twine", "check", "--strict", wheel], check=True)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    if links := re.findall(r"\]\((?!https?:|#).*?\)", text):
        sys.exit(f"{wheel.name}: links of the description must be absolute, got {links}")


def try_installed() -> None:
    """What a user does with the package, in an environment that has nothing else."""
    import equinox as eqx
    import jax
    import jax.random as jr
    import numpy as np

    import mf_eqx as mfx
    from mf_eqx import checkpoint

    home = pathlib.Path(mfx.__file__).parent
    assert home.is_relative_to(sys.prefix), home
    for module in pkgutil.walk_packages([str(home)], "mf_eqx."):
        importlib.import_module(module.name)  # which needs nothing that the wheel does not declare
    installed = importlib.metadata.distribution("mf_eqx")
    assert installed.version == mfx.__version__, installed.version
    assert (home / "py.typed").is_file()
    assert any("licenses" in path.parts and path.name == "LICENSE" for path in installed.files or [])

    def generate(field: mfx.MLP) -> np.ndarray:
        return np.asarray(mfx.Generator(field, jr.key(1), (2,))(range(3)))

    fresh = mfx.MLP(2, width=8, key=jr.key(0))
    field = jax.tree.map(lambda leaf: leaf + 0.1 if eqx.is_inexact_array(leaf) else leaf, fresh)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "ema.safetensors"
        checkpoint.save_weights(path, field)
        np.testing.assert_array_equal(generate(checkpoint.load_weights(path)), generate(field))
    assert np.abs(generate(field) - generate(fresh)).min() > 0  # that of other weights


if __name__ == "__main__":
    try_installed() if sys.argv[1:] == ["installed"] else main()
