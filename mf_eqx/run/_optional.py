"""Packages that only scripts need, from the extra `experiments`."""

from types import TracebackType


class MissingDependency(ImportError):
    """An optional package that is not installed; the message says how to get it."""


class optional:
    """A context in which an optional package is imported.

        with optional("matplotlib"):
            from matplotlib.figure import Figure

    **Arguments:** `package` its import name. **Raises:** `MissingDependency` if it is not installed. An import that
    fails *inside* an installed package passes unchanged: that is another problem.
    """

    def __init__(self, package: str):
        self.package = package

    def __enter__(self) -> None:
        return None

    # A plain class, because a generator-based context could swallow exceptions as far as type checkers know.
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == self.package:
            message = f"{self.package} is not installed: pip install 'mf_eqx[experiments]'"
            raise MissingDependency(message, name=self.package) from error
