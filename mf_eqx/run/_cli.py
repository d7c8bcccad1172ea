"""The command line of a script: a typed configuration in, one line out when the input is bad.

Exit codes: 0 done, 2 bad input, 3 no finite loss or gradient, 4 run directory in use, or moved away in the midst of the
run, 5 another process of the run is gone or never came, 6 its first process is gone, at which JAX ends all others at
once, 130 and 143 stopped by SIGINT and SIGTERM; 1 with a traceback is a bug.

Bad input is what the parser or the configuration's own checks refuse and, once the script's function runs, a
`ValueError` that this package or the script itself raises, a file that cannot be opened, a full disk, checkpoints that
cannot be read or written, a missing optional package, or more than fits into the memory of host or device.
A `ValueError` from anywhere else (an array library, say) was not foreseen by a check of ours, and keeps its traceback.
"""

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .._optional import MissingDependency
from ..checkpoint import CheckpointError
from ._arguments import BadArguments, parse
from ._directory import CREATED, take_back
from ._lock import InUse, Moved
from ._meeting import Missing
from ._noise import leave_out
from ._processes import (
    connect,
    is_one_of_several,
    is_out_of_memory,
    leave,
    RefusedElsewhere,
    Separated,
    Stopped,
    together,
)
from ._settings import Settings
from ._train import NonFinite

_Config = TypeVar("_Config")
_Result = TypeVar("_Result")

_TRACEBACK = "MF_EQX_TRACEBACK"
_EXPECTED = {
    (BadArguments, MissingDependency, CheckpointError, RefusedElsewhere): 2,
    (NonFinite,): 3,
    (InUse, Moved): 4,
    (Separated, Missing): 5,
}
"""Exit codes of errors whose message says all."""
_LONGEST = 300
"""Characters of what an allocator says, which may list all that it holds."""
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
"""A disk that takes no more: what writes knows no file's name."""


def main(
    function: Callable[[_Config], _Result],
    presets: _Config | Mapping[str, tuple[str, _Config]],
    *,
    description: str | None = None,
    argv: Sequence[str] | None = None,
) -> _Result:
    """Call `function` with the configuration that the command line asks for.

    Every field of the configuration is a flag (`--peak-rate 1e-3`; `--compare` and `--no-compare` for a bool), its
    docstring the help. `--preset NAME` says which preset the other flags override; `--preset NAME --help` shows its
    values.

    **Arguments:**

    - `function`: what the script does.
    - `presets`: a frozen dataclass with its defaults, or several by name, each with a line that describes it; the first
      is the default. Its `__post_init__` checks values by `ValueError("steps must be >= 0, got -3")`; a field's name in
      front is shown as its flag.
    - `description`: shown by `--help`, by default the docstring of `function`.
    - `argv`: arguments without the program's name, by default those of the process.

    **Returns:** what `function` returns.

    A configuration that is a `run.Settings` also connects several processes, before anything else.

    **Raises:** `SystemExit`: 0 after `--help`; 2 after bad input, with one line on stderr that names argument, rule and
    value; 3, 4, 5, 6, 130, 143 as said above. With MF_EQX_TRACEBACK=1 in the environment, all errors keep their
    traceback.
    """
    program = Path(sys.argv[0]).name
    choices = presets if isinstance(presets, Mapping) else {"default": ("", presets)}
    about = description or inspect.getdoc(function) or ""
    arguments = list(sys.argv[1:] if argv is None else argv)
    created = len(CREATED)
    if not _wants_traceback():
        leave_out()
    try:
        if any(isinstance(config, Settings) for _, config in choices.values()):
            connect(arguments)
        config = parse(choices, program, about, arguments)
        with together():
            return function(config)
    except (Exception, KeyboardInterrupt) as error:
        code, message = _ending(error, function.__module__)
        if code == 2:
            take_back(CREATED[created:])
        if code == 1 or _wants_traceback():
            if is_one_of_several():
                traceback.print_exc()
                leave(code)
            raise
        print(program + ": " + " ".join(message.split()), file=sys.stderr, flush=True)
        if isinstance(error, Separated) or (is_one_of_several() and not isinstance(error, Stopped | NonFinite)):
            leave(code)
        raise SystemExit(code) from None


def _wants_traceback() -> bool:
    return os.environ.get(_TRACEBACK, "0") not in ("", "0")


def _ending(error: BaseException, script: str) -> tuple[int, str]:
    """Exit code and message for an error; 1 for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, Stopped):
        return 128 + error.signal, str(error)
    for kinds, code in _EXPECTED.items():
        if isinstance(error, kinds):
            return code, f"error: {error}"
    if is_out_of_memory(error):
        found = (str(error).strip() or "no more could be had").splitlines()[0][:_LONGEST]
        return 2, f"error: out of memory: {found} ({_TRACEBACK}=1 shows where)"
    unreadable = isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_ROOM)
    if unreadable or (isinstance(error, ValueError) and _is_raised_by_us(error, script)):
        return 2, f"error: {error} ({_TRACEBACK}=1 shows where)"
    return 1, ""


def _is_raised_by_us(error: BaseException, script: str) -> bool:
    """Whether the statement that raised stands in this package, in the script or in another one beside it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    if module == script or module.partition(".")[0] == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(script), "__file__", None)
    return file is not None and Path(frame.f_code.co_filename).resolve().parent == Path(file).resolve().parent
