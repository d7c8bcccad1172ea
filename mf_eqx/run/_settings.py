"""What every training run can be told, whatever it trains."""

import dataclasses
import hashlib
import json
from typing import Any

import jax

from .._sharding import Parallelism
from ._directory import as_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base of a script's configuration: how a run is kept, watched and spread over devices.

        @dataclasses.dataclass(frozen=True)
        class Config(run.Settings):
            steps: int = 6000

    None of these changes what is learnt, but for rounding: a run may be continued with other ones. All fields of the
    script's own must stay as they were.
    """

    name: str = ""
    """Directory of the run below runs/SCRIPT; by default a digest of the configuration: the same command continues."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of it are kept for ever; 0 for none."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, each a mean over them."""
    preview_every: int = 1000
    """Steps between previews from fixed noise; 0 for none."""
    most_faults: int = 10
    """Steps in a row without a finite loss and gradient after which the run stops, at its next line of metrics. Each
    such step changes nothing."""
    fsdp: int = 1
    """Devices that share one copy of the parameters; divides the number of devices."""
    accumulation: int = 1
    """Parts that each device's rows are differentiated in, to save memory."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard."""
    wandb: str = ""
    """Also send metrics to Weights & Biases, to this project."""
    dry_run: bool = False
    """Print what would be trained, where everything lies and what memory it takes, and stop."""
    test_run: bool = False
    """Two steps of everything, in a directory of its own that each such run begins anew."""
    coordinator: str = ""
    """HOST:PORT of the first of several processes; found by itself under SLURM, Open MPI and on TPUs."""
    processes: int = 0
    """How many processes there are, with --coordinator."""
    process: int = -1
    """Which of them this is, from 0, with --coordinator."""

    def check(self) -> None:
        """Refuses values that make no run. **Raises:** `ValueError`."""
        least = {"save_every": 1, "keep_last": 1, "keep_every": 0, "log_every": 1, "preview_every": 0}
        least |= {"most_faults": 1, "fsdp": 1, "accumulation": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")


def parallelism(settings: Settings) -> Parallelism | None:
    """How a run is spread over all devices; None if there is only one.

    **Raises:** `ValueError` if `settings.fsdp` does not divide their number.
    """
    return Parallelism(fsdp=settings.fsdp) if jax.device_count() > 1 or settings.fsdp > 1 else None


def recipe(config: Any) -> dict[str, Any]:
    """The script's own fields, which a run that continues must share: a configuration without any `Settings`, and
    without the number of `workers`."""
    common = {field.name for field in dataclasses.fields(Settings)} | {"workers"}
    return {name: value for name, value in as_json(config).items() if name not in common}


def default_name(config: Any) -> str:
    """The same for the same recipe, else another."""
    return hashlib.sha256(json.dumps(recipe(config), sort_keys=True).encode()).hexdigest()[:8]


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
