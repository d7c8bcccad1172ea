"""A small training, one of many in a run: what it is made of, and where its files are."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from .._batch import Batch
from .._field import AbstractField
from .._train import TrainStep
from .._train_state import init_state, TrainState
from ..checkpoint import Checkpoints
from ._directory import as_json, RunDirectory
from ._settings import CellSettings, recipe


class Training(NamedTuple):
    """A small training.

    **Arguments:** `name` any text, from which the name of the directory is made; `step` without parallelism;
    `make_field` makes the network; `draw` a function from a key to a `Batch`, as for `mf_eqx.scan_steps`, a Module
    rather than a lambda; `steps` the number of all steps; `key` of all random numbers; `settings` everything else that
    the training depends on, texts and numbers or a dataclass of them, by default the script's own fields: a checkpoint
    with other settings is refused.
    """

    name: str
    step: TrainStep
    make_field: Callable[[], AbstractField]
    draw: Callable[[Key[Array, ""]], Batch]
    steps: int
    key: Key[Array, ""]
    settings: Any = None

    def make_state(self) -> TrainState:
        """The state before the first step."""
        step = self.step
        return init_state(self.make_field(), step.optimizer, step.averages, step.objective, key=self.key)


def directory_name(training: Training) -> str:
    """The name of the training's directory."""
    name = re.sub(r"[^\w.+-]+", "_", training.name)
    if not name.strip("."):
        raise ValueError(f"names of trainings must have more than dots, got {training.name!r}")
    return name


def folder_of(training: Training, directory: RunDirectory) -> RunDirectory:
    """The directory of a training in that of the run."""
    return RunDirectory(directory.root / "cells" / directory_name(training))


def inputs_of(config: CellSettings, training: Training) -> dict[str, Any]:
    """Everything that a training depends on, as values that JSON can hold."""
    settings = recipe(config) if training.settings is None else as_json(training.settings)
    key = [str(jr.key_impl(training.key)), np.asarray(jr.key_data(training.key)).tolist()]
    return {"name": training.name, "settings": settings, "steps": training.steps, "key": key}


def steps_done(training: Training, folder: RunDirectory) -> int:
    """The number of steps that need not be repeated, if their checkpoint is valid."""
    return min(max(Checkpoints(folder.root / "checkpoints").steps(), default=0), training.steps)
