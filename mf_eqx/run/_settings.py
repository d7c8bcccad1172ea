"""What every training run can be told, whatever it trains."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
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
    """How a run is kept and watched: what `Settings` and `CellSettings` have in common."""

    name: str = ""
    """Directory of the run below runs/SCRIPT; by default a digest of the configuration: the same command continues."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, each a mean over them."""
    most_faults: int = 10
    """Steps in a row without a finite loss and gradient after which the run stops, at its next line of metrics. Each
    such step changes nothing."""
    dry_run: bool = False
    """Print what would be trained, where everything lies and what memory it takes, and stop."""
    test_run: bool = False
    """Two steps of everything, in a directory of its own that each such run begins anew."""

    def check(self, **least: int) -> None:
        """Refuses values that make no run, and what `check_numbers` refuses.

        **Arguments:** `least` values of the script's own fields, by their names.

        **Raises:** `ValueError`.
        """
        check_numbers(self)
        for name, bound in (_LEAST | least).items():
            if getattr(self, name, bound) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        if hasattr(self, "workers"):
            check_sizes(self, workers=_MOST_WORKERS)


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The base of a script's configuration: how a run is kept, watched and spread over devices.

        @dataclasses.dataclass(frozen=True)
        class Config(run.Settings):
            steps: int = 6000

    None of these changes what is learnt, but for rounding: a run may be continued with other ones. All fields of the
    script's own must stay as they were.
    """

    keep_every: int = 0
    """Checkpoints at multiples of it are kept for ever; 0 for none."""
    preview_every: int = 1000
    """Steps between previews from fixed noise; 0 for none."""
    fsdp: int = 1
    """Devices that share one copy of the parameters; divides the number of devices."""
    accumulation: int = 1
    """Parts that each device's rows are differentiated in, to save memory."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard."""
    wandb: str = ""
    """Also send metrics to Weights & Biases, to this project."""
    coordinator: str = ""
    """HOST:PORT of the first of several processes, which listens at this address alone; give 0.0.0.0:PORT to it if the
    others reach it by an address that its machine does not have. Found by itself under SLURM, Open MPI and on TPUs."""
    processes: int = 0
    """How many processes there are, with --coordinator."""
    process: int = -1
    """Which of them this is, from 0, with --coordinator."""
    wait: int = WAIT
    """Seconds that each of several processes waits at the start until all have come."""


@dataclasses.dataclass(frozen=True)
class CellSettings(CommonSettings):
    """The base of the configuration of a script that trains many small networks side by side, by `train_cells`. None of
    these changes what is learnt."""

    log_every: int = 250
    """Steps between lines of each cell's metrics.jsonl, each a mean over them, or a little fewer, to make equal parts.
    A cell can be stopped after each."""
    workers: int = max(1, min(os.cpu_count() or 1, 8))
    """Trainings at a time."""


def check_numbers(config: Any) -> None:
    """Refuses numbers that no script computes with: `ValueError` with the field's name for a float that is not finite,
    and for an integer beyond int32, in which devices count.

    A float that is not finite must not reach a compiled program as a constant: XLA:CPU takes it for a number, and makes
    another one of it.

    **Arguments:** `config` a dataclass; dataclasses, tuples and lists in it are looked through.
    """
    for name, value in _numbers(config):
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise ValueError(f"{name} must lie in [{-(2**31)}, {2**31 - 1}], got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_sizes(config: Any, **most: int) -> None:
    """Refuses sizes with which a script would fill all memory, or never end, before it can say anything: `ValueError`
    with the field's name.

    **Arguments:** `config` a dataclass; `most` the largest values of its fields, by their names, far above all that
    make sense. Of several numbers in one field each counts; None is no size.
    """
    for name, bound in most.items():
        value = getattr(config, name)
        for size in value if isinstance(value, tuple) else (value,):
            if size is not None and size > bound:
                raise ValueError(f"{name} must be at most {bound}, got {size}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in a configuration, with the names of the fields that they are in."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _numbers(one, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def parallelism(settings: Settings) -> Parallelism | None:
    """How a run is spread over all devices; None if there is only one.

    **Raises:** `ValueError` if `settings.fsdp` does not divide their number.
    """
    return Parallelism(fsdp=settings.fsdp) if jax.device_count() > 1 or settings.fsdp > 1 else None


def setting(default: Any) -> Any:
    """A field of a script's own that changes nothing which is learnt, but for rounding, like those of `Settings`.

        remat: bool = run.setting(False)

    **Arguments:** `default` of the field.
    """
    return dataclasses.field(default=default, metadata=_SETTING)


_SETTING = {"mf_eqx.run": "setting"}


def recipe(config: Any) -> dict[str, Any]:
    """The script's own fields, which a run that continues must share: a configuration without any settings."""
    common = {field.name for kind in (Settings, CellSettings) for field in dataclasses.fields(kind)}
    if dataclasses.is_dataclass(config):
        common |= {field.name for field in dataclasses.fields(config) if field.metadata == _SETTING}
    return {name: value for name, value in as_json(config).items() if name not in common}


def default_name(config: Any) -> str:
    """The same for the same recipe, else another."""
    return digest(recipe(config))


def digest(value: Any) -> str:
    """Eight letters that are the same for equal values, else others: a name for what a dataclass, a dictionary or a
    list says."""
    return hashlib.sha256(json.dumps(as_json(value), sort_keys=True).encode()).hexdigest()[:8]


def difference(saved: Any, wanted: Any, name: str = "") -> str | None:
    """The first thing that differs between two values that JSON can hold; None if they are equal."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in [*saved, *(key for key in wanted if key not in saved)]:
            inner = f"{name}.{key}" if name else key
            if key not in saved or key not in wanted:
                return f"{inner} is only in the {'new' if key in wanted else 'old'} one"
            if (found := difference(saved[key], wanted[key], inner)) is not None:
                return found
        return None
    return None if saved == wanted else f"{name} was {saved}, now {wanted}"
