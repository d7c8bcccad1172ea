"""Packages that not every machine has: those of the extras, and those that only some parts need."""

from types import TracebackType


class MissingDependency(ImportError):
    """An optional package that is not installed; the message says how to get it."""


class optional:
    """A context in which an optional package is imported.

        with optional("matplotlib"):
            from matplotlib.figure import Figure

    **Arguments:** `package` its import name; `extra` of mf_eqx that installs it, or None for a package by itself.

    **Raises:** `MissingDependency` if it is not installed. An import that fails *inside* an installed package passes
    unchanged: that is another problem.
    """

    def __init__(self, package: str, extra: str | None = "experiments"):
        self.package = package
        self.source = package if extra is None else f"'mf_eqx[{extra}]'"

    def __enter__(self) -> None:
        return None

    # A plain class, because a generator-based context could swallow exceptions as far as type checkers know.
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == self.package:
            message = f"{self.package} is not installed: pip install {self.source}"
            raise MissingDependency(message, name=self.package) from error
