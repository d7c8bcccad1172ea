"""Destinations of metrics besides metrics.jsonl: any object with the two methods of `Logger`."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .._files import read_regular, write_whole
from .._optional import optional
from ._values import Value


@runtime_checkable
class Logger(Protocol):
    """A destination of metrics. Values are numbers on the host, in nested lists for metrics in bins."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the metrics of a step."""
        ...

    def close(self) -> None:
        """Write what is still buffered."""
        ...


class TensorBoardLogger(Logger):
    """Metrics as scalars for TensorBoard; of a metric in bins, one scalar per bin. Needs the extra `tensorboard`.

    **Arguments:** `folder` of the event files; `start` the number of steps that were finished before: TensorBoard
    discards what was logged for later steps.
    """

    def __init__(self, folder: Path, start: int = 0):
        with optional("tensorboardX"):
            from tensorboardX import SummaryWriter
        purge_step = start + 1 if start else None
        # Files are named by the second: a run that continues within it would replace that of the run before.
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{start:09}")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in flat(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """Metrics for Weights & Biases. A run that is continued here is also continued there. If steps are repeated after
    a kill, it keeps their first values. Needs the extra `wandb`.

    **Arguments:** `project`; `name` of the run; `folder` for its local files; `config` of the run.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]):
        with optional("wandb"):
            import wandb  # pyright: ignore[reportMissingImports]
        self._run = wandb.init(
            project=project, name=name, id=_run_id(folder), resume="allow", dir=str(folder), config=dict(config)
        )

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._run.log(flat(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The identifier of the run at Weights & Biases, which is drawn once and saved in the run's directory."""
    file = folder / "wandb_id"
    if not file.exists():
        write_whole(file, secrets.token_hex(8).encode())
    return read_regular(file, 1000).decode()


def flat(values: Mapping[str, Value]) -> dict[str, float]:
    """One number per name: `name/0`, `name/1`, ... for a metric in bins."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            numbers |= flat({f"{name}/{i}": item for i, item in enumerate(value)})
        else:
            numbers[name] = value
    return numbers
