"""The command line of a script: it makes a typed configuration, and reports bad input in one line.

Exit codes: 0 done, 2 bad input, 3 no finite loss or gradient, 4 run directory in use, or moved during the run,
5 another process of the run has ended or did not connect, 6 the first process of the run has ended, whereupon JAX ends
all others at once, 130 and 143 stopped by SIGINT and SIGTERM, 141 by a pipe that nothing reads any more (`| head`);
1 with a traceback is a bug.

Bad input is what the parser or the configuration's own checks refuse. Once the script's function runs, bad input is
also a `ValueError` raised by this package or by the script itself, a file that cannot be opened, a full disk,
checkpoints that cannot be read or written, a missing optional package, or too little memory on the host or a device.
A `ValueError` from anywhere else (an array library, for example) was not foreseen by our checks, and keeps its
traceback.
"""

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from .._optional import MissingDependency
from ..checkpoint import CheckpointError
from ._arguments import BadArguments, flag_of_path, name_flag, parse
from ._directory import CREATED, remove_unused
from ._lock import InUse, Moved
from ._meeting import Missing
from ._noise import suppress_noise
from ._processes import (
    connect,
    exit_at_once,
    is_one_of_several,
    is_out_of_memory,
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
"""Exit codes of errors whose message alone explains them."""
_PACKAGE = __name__.partition(".")[0]
_LONGEST_MESSAGE = 300
"""Characters shown of an allocator's message, which may list all of its allocations."""
_DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that accepts no more data. They may come without the name of a file."""


def main(
    function: Callable[[_Config], _Result],
    presets: _Config | Mapping[str, tuple[str, _Config]],
    *,
    description: str | None = None,
    argv: Sequence[str] | None = None,
) -> _Result:
    """Call `function` with the configuration that the command line describes.

    Every field of the configuration is a flag (`--peak-rate 1e-3`; `--compare` and `--no-compare` for a bool), and the
    field's docstring is its help. `--preset NAME` selects the preset whose values the other flags override;
    `--preset NAME --help` shows these values.

    **Arguments:**

    - `function`: what the script does.
    - `presets`: a frozen dataclass with its defaults, or several by name, each with a line that describes it; the first
      is the default. Its `__post_init__` raises errors such as `ValueError("steps must be >= 0, got -3")`; the name of
      a field at the start of the message is shown as its flag, also if the script raises it later.
    - `description`: shown by `--help`, by default the docstring of `function`.
    - `argv`: arguments without the program's name, by default those of the process.

    **Returns:** what `function` returns.

    If the configuration is a `run.Settings`, several processes of a run are connected before anything else is done.

    **Raises:** `SystemExit`: 0 after `--help`; 2 after bad input, with one line on stderr that names argument, rule and
    value; 3, 4, 5, 6, 130, 143 as listed at the top of this module. With MF_EQX_TRACEBACK=1 in the environment, all
    errors keep their traceback.
    """
    program = Path(sys.argv[0]).name
    choices = presets if isinstance(presets, Mapping) else {"default": ("", presets)}
    about = description or inspect.getdoc(function) or ""
    arguments, config = list(sys.argv[1:] if argv is None else argv), next(iter(choices.values()))[1]
    created = len(CREATED)
    if not _keeps_traceback():
        suppress_noise()
    try:
        if any(isinstance(config, Settings) for _, config in choices.values()):
            connect(arguments)
        config = parse(choices, program, about, arguments)
        with together():
            result = function(config)
        sys.stdout.flush()  # here rather than when the interpreter ends, where an error cannot be reported
        return result
    except (Exception, KeyboardInterrupt) as error:
        code, message = _exit_code_and_message(error, function.__module__, config, arguments)
        if code == 2:
            remove_unused(CREATED[created:])
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # nor can what is left in its buffer be written
        if code == 1 or _keeps_traceback():
            if is_one_of_several():
                traceback.print_exc()
                exit_at_once(code)
            raise
        print(program + ": " + " ".join(message.split()), file=sys.stderr, flush=True)
        if isinstance(error, Separated) or (is_one_of_several() and not isinstance(error, Stopped | NonFinite)):
            exit_at_once(code)
        raise SystemExit(code) from None


def _keeps_traceback() -> bool:
    return os.environ.get(_TRACEBACK, "0") not in ("", "0")


def _exit_code_and_message(error: BaseException, script: str, config: Any, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and message for an error; 1 for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):
        return 141, "stopped, since nothing reads its output any more"
    if isinstance(error, Stopped):
        return 128 + error.signal, str(error)
    for kinds, code in _EXPECTED.items():
        if isinstance(error, kinds):
            return code, f"error: {error}"
    if is_out_of_memory(error):
        text = (str(error).strip() or "an allocation failed").splitlines()[0][:_LONGEST_MESSAGE]
        return 2, f"error: out of memory: {text} ({_TRACEBACK}=1 shows where)"
    unreadable = isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS)
    by_script = _is_raised_by_script(error, script)
    if isinstance(error, OSError) and error.strerror and (flag := flag_of_path(error.filename, config, arguments)):
        return 2, f"error: {flag}: {error.strerror}: {error.filename!r} ({_TRACEBACK}=1 shows where)"
    if unreadable or (isinstance(error, ValueError) and (by_script or _module_of(error) == _PACKAGE)):
        message = name_flag(str(error), config) if by_script else str(error)
        return 2, f"error: {message} ({_TRACEBACK}=1 shows where)"
    return 1, ""


def _frame_of(error: BaseException) -> FrameType:
    """Where the error was raised."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame


def _module_of(error: BaseException) -> str:
    """The top-level module in which the error was raised."""
    return _frame_of(error).f_globals.get("__name__", "").partition(".")[0]


def _is_raised_by_script(error: BaseException, script: str) -> bool:
    """Whether the error was raised in the script, or in a script in the same directory."""
    frame = _frame_of(error)
    if frame.f_globals.get("__name__", "") == script:
        return True
    file = getattr(sys.modules.get(script), "__file__", None)
    return file is not None and Path(frame.f_code.co_filename).resolve().parent == Path(file).resolve().parent
