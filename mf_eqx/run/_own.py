"""Classes from a Python file of a user's own: a network or a method that a script is asked to use.

    method = run.own_identity("identity", "mine.py:Mix", steps=5000)
    make = run.own_network("network", "mine.py:Net", (3, 64, 64))
    field = make(key=key)

The first argument is the name of the script's own field, for error messages. A file is run once, and can import from
the folder that it is in. `own_file` returns a digest of the file, to be part of the settings by which a result is found
again. The digest is that of the file alone, not of what the file imports.
"""

import functools
import inspect
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from .._custom_types import Condition
from .._field import AbstractField
from .._identity import AbstractIdentity, identities_in
from ._settings import digest

_Class = TypeVar("_Class")


class OwnFile(NamedTuple):
    """What a Python file defines, by name, and a digest of its text."""

    members: dict[str, Any]
    digest: str


def own_file(name: str, place: str) -> OwnFile:
    """A Python file, as it was when it was first read.

    **Arguments:** `name` of the setting; `place` the path of the file, or `mine.py:Net`.

    **Raises:** `ValueError` unless it is a Python file that runs.
    """
    path, _ = _parts(place)
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise ValueError(f"{name} must be a Python file, got {path}")
    try:
        return _read(path, str(Path(path).resolve()))
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(
            f"{name} must be a Python file that runs, but {where}: {type(error).__name__}: {error}"
        ) from error


@functools.cache
def _read(path: str, resolved: str) -> OwnFile:
    sys.path.append(str(Path(resolved).parent))
    return OwnFile(runpy.run_path(path), digest(Path(path).read_text(encoding="utf-8")))


def own_class(name: str, place: str, base: type[_Class]) -> type[_Class]:
    """A class of a user's own.

    **Arguments:** `name` of the setting; `place` as `mine.py:Net`, or `mine.py` if the file defines one such class;
    `base` of which it must be a subclass.

    **Raises:** `ValueError` if there is no such file or class, or several in a file without a name.
    """
    (path, wanted), members = _parts(place), own_file(name, place).members
    classes = {key: member for key, member in members.items() if _is_concrete(member, base)}
    if wanted is not None:
        if wanted not in classes:
            rule = f"name a subclass of {base.__name__} in {path}"
            raise ValueError(f"{name} must {rule}, which has {', '.join(classes) or 'none'}; got {wanted}")
        return classes[wanted]
    defined = [key for key, member in classes.items() if member.__module__ == members["__name__"]]
    if len(defined) != 1:
        rule = f"be FILE.py:CLASS unless the file defines exactly one subclass of {base.__name__}"
        raise ValueError(f"{name} must {rule}; got {place}, which defines {', '.join(defined) or 'none'}")
    return classes[defined[0]]


def own_identity(name: str, place: str, steps: int) -> AbstractIdentity:
    """A method of a user's own, made by `for_training` if it has schedules, and without arguments otherwise.

    **Arguments:** `name`, `place` as for `own_class`; `steps` of the training.

    **Raises:** as `own_class`, and `ValueError` if the class needs arguments.
    """
    cls = own_class(name, place, AbstractIdentity)
    if not (made := identities_in({cls.__name__: cls}, steps, known_velocity=True)):
        raise ValueError(f"{name} must be a class that can be made without arguments, got {cls.__name__}")
    return made[cls.__name__]


def own_network(
    name: str, place: str, shape: tuple[int, ...], condition: Condition = None, *, labels: int | None = None
) -> Callable[..., AbstractField]:
    """A function that makes a network of a user's own from a key, `make(key=key)`.

    The class is called as those of `mf_eqx` are: `Net(size, key=key)` for vectors, `Net(shape, key=key)` otherwise,
    with `labels=labels` if the data have labels and the class has such an argument.

    **Arguments:** `name`, `place` as for `own_class`; `shape` of one row of data; `condition` of one row, arrays or
    their shapes, with which the network is tried; `labels` how many different labels the data have, or None.

    **Raises:** as `own_class`, and `ValueError` if the network cannot be made so, or does not take and return data of
    this shape. (It is traced once, and nothing is computed.)
    """
    cls: Any = own_class(name, place, AbstractField)
    size = shape[0] if len(shape) == 1 else shape
    options = {} if labels is None or "labels" not in inspect.signature(cls).parameters else {"labels": labels}
    given = f"{size}, labels={labels}" if options else f"{size}"
    call = f"{cls.__name__}({given}, key=key)(z, r, t{'' if condition is None else ', condition'})"
    row, time = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    try:
        u = eqx.filter_eval_shape(
            lambda z, r, t, c: cls(size, **options, key=jr.key(0))(z, r, t, c),
            *(row, time, time, condition),
        )
    except Exception as error:
        rule = f"{name} must be a class that can be called as {call}"
        raise ValueError(f"{rule}, got {type(error).__name__}: {error}") from error
    if (found := getattr(u, "shape", None)) != shape:
        raise ValueError(f"{name} must return the shape of z, {shape}, got {found} from {call}")
    return functools.partial(cls, size, **options)


def _parts(place: str) -> tuple[str, str | None]:
    """Path and name of `mine.py:Net`; no name for a path alone."""
    start, found, wanted = place.partition(".py:")
    return (f"{start}.py", wanted) if found else (place, None)


def _is_concrete(member: Any, base: type) -> bool:
    return isinstance(member, type) and issubclass(member, base) and not inspect.isabstract(member)
