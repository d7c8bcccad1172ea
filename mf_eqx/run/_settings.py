"""The settings of every training run, whatever it trains."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from typing import Any

import jax

from .._sharding import Parallelism
from ._directory import as_json
from ._meeting import WAIT

_LEAST = {"save_every": 1, "keep_last": 1, "keep_every": 0, "log_every": 1, "preview_every": 0}
_LEAST |= {"most_faults": 1, "fsdp": 1, "accumulation": 1, "workers": 1}
_MOST_WORKERS = 1024


@dataclasses.dataclass(frozen=True)
class CommonSettings:
    """How a run is saved and monitored: the fields that `Settings` and `CellSettings` have in common."""

    name: str = ""
    """Directory of the run below runs/SCRIPT; by default a digest of the configuration, so that the same command
    continues the run."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; each line is the mean over these steps."""
    most_faults: int = 10
    """Steps in a row without a finite loss and gradient after which the run stops, at its next line of metrics. Such a
    step leaves network, averages and optimiser unchanged."""
    dry_run: bool = False
    """Print what would be trained, on which devices the arrays are placed and how much memory they need, and stop."""
    test_run: bool = False
    """Do two steps of everything, in a separate directory that each test run empties first."""

    def check(self, **least: int) -> None:
        """Refuses values with which no run is possible, and those that `check_numbers` refuses.

        **Arguments:** `least` the smallest allowed values of the script's own fields, by their names. If a field is a
        tuple, each of its numbers is checked.

        **Raises:** `ValueError`.
        """
        check_numbers(self)
        for name, bound in (_LEAST | least).items():
            value = getattr(self, name, bound)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number < bound:
                    raise ValueError(f"{name} must be >= {bound}, got {number}")
        if hasattr(self, "workers"):
            check_sizes(self, workers=_MOST_WORKERS)


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The base of a script's configuration: how a run is saved, monitored and distributed over devices.

        @dataclasses.dataclass(frozen=True)
        class Config(run.Settings):
            steps: int = 6000

    None of these fields changes what is learnt, except for rounding, so a run may be continued with other values. The
    script's own fields must not change.
    """

    keep_every: int = 0
    """Checkpoints at multiples of this number of steps are never deleted; 0 for none."""
    preview_every: int = 1000
    """Steps between previews from fixed noise; 0 for none."""
    fsdp: int = 1
    """Devices that share one copy of the parameters; must divide the number of devices."""
    accumulation: int = 1
    """Parts of each device's rows that are differentiated one after the other, to save memory."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard."""
    wandb: str = ""
    """Also send metrics to Weights & Biases, to this project."""
    coordinator: str = ""
    """HOST:PORT of the first of several processes, which listens at this address only. Give it 0.0.0.0:PORT if the
    others reach it by an address that its machine does not have. Not needed under SLURM, Open MPI and on TPUs."""
    processes: int = 0
    """Number of processes, with --coordinator."""
    process: int = -1
    """Number of this process, from 0, with --coordinator."""
    wait: int = WAIT
    """Seconds that each of several processes waits at the start until all have connected."""


@dataclasses.dataclass(frozen=True)
class CellSettings(CommonSettings):
    """The base of the configuration of a script that trains many small networks side by side, by `train_cells`. None of
    these fields changes what is learnt."""

    log_every: int = 250
    """Steps between lines of each cell's metrics.jsonl, or slightly fewer, to make the parts equal; each line is the
    mean over these steps. A cell can be stopped after each line."""
    workers: int = max(1, min(os.cpu_count() or 1, 8))
    """Number of trainings that run at the same time."""


def check_numbers(config: Any) -> None:
    """Refuses numbers that no script can use: raises `ValueError` with the field's name for a float that is not finite,
    and for an integer that is not in int32, the type of integers on devices.

    A float that is not finite must not reach a compiled program as a constant: XLA:CPU treats it as a finite number,
    and turns it into another number.

    **Arguments:** `config` a dataclass; dataclasses, tuples and lists in it are checked, too.
    """
    for name, value in _numbers(config):
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise ValueError(f"{name} must lie in [{-(2**31)}, {2**31 - 1}], got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_sizes(config: Any, **most: int) -> None:
    """Refuses sizes with which a script would fill all memory, or never end, before it can report anything: raises
    `ValueError` with the field's name.

    **Arguments:** `config` a dataclass; `most` the largest allowed values of its fields, by their names, far above all
    that make sense. If a field is a tuple, each of its numbers is checked; None is skipped.
    """
    for name, bound in most.items():
        value = getattr(config, name)
        for size in value if isinstance(value, tuple) else (value,):
            if size is not None and size > bound:
                raise ValueError(f"{name} must be at most {bound}, got {size}")


def check_among(config: Any, **known: Collection[str]) -> None:
    """Refuses names that a script does not know: raises `ValueError` with the name of the field and the known names.

    **Arguments:** `config` a dataclass; `known` the names that its fields may have as values, by the names of the
    fields. A field that is a tuple must have at least one name, and none twice; None is skipped.
    """
    for name, allowed in known.items():
        value = getattr(config, name)
        chosen = value if isinstance(value, tuple) else (value,)
        if not chosen:
            raise ValueError(f"{name} must be at least one of {', '.join(allowed)}; got none")
        if unknown := [each for each in chosen if each is not None and each not in allowed]:
            raise ValueError(f"{name} must be among {', '.join(allowed)}; got {', '.join(map(str, unknown))}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"{name} must differ from each other, got {', '.join(chosen)}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in a configuration, with the names of the fields that they are in."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def parallelism(settings: Settings) -> Parallelism | None:
    """How a run is distributed over all devices; None if there is only one.

    **Raises:** `ValueError` if `settings.fsdp` does not divide their number.
    """
    return Parallelism(fsdp=settings.fsdp) if jax.device_count() > 1 or settings.fsdp > 1 else None


def setting(default: Any) -> Any:
    """A script's own field that does not change what is learnt, except for rounding, like the fields of `Settings`; or
    a number of steps on which nothing else depends, so that a larger number continues the same run.

        remat: Literal["none", "products", "full"] = run.setting("none")

    **Arguments:** `default` of the field.
    """
    return dataclasses.field(default=default, metadata=_SETTING)


_SETTING = {"mf_eqx.run": "setting"}


def recipe(config: Any, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """The script's own fields, without settings: they must be the same when a run continues.

    **Arguments:** `config`; `saved` None, or the fields of another run of the same script, whose recipe is returned.
    """
    common = {field.name for kind in (Settings, CellSettings) for field in dataclasses.fields(kind)}
    if dataclasses.is_dataclass(config):
        common |= {field.name for field in dataclasses.fields(config) if field.metadata == _SETTING}
    fields = as_json(config) if saved is None else saved
    return {name: value for name, value in fields.items() if name not in common}


def default_name(config: Any) -> str:
    """A name that is the same for equal recipes, and differs for others."""
    return digest(recipe(config))


def digest(value: Any) -> str:
    """Eight hexadecimal digits that are the same for equal values, and differ for others: a name for the contents of a
    dataclass, a dictionary or a list."""
    return hashlib.sha256(json.dumps(as_json(value), sort_keys=True).encode()).hexdigest()[:8]


def difference(saved: Any, current: Any, name: str = "") -> str | None:
    """The first thing that differs between two values that JSON can hold; None if they are equal."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in [*saved, *(key for key in current if key not in saved)]:
            inner = f"{name}.{key}" if name else key
            if key not in saved or key not in current:
                return f"{inner} is only in the {'new' if key in current else 'old'} one"
            if (change := difference(saved[key], current[key], inner)) is not None:
                return change
        return None
    return None if saved == current else f"{name} was {saved}, now {current}"
