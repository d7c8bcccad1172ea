"""What a training begins from if it is not to begin from nothing: exported weights, or a checkpoint of another run.

    state = run.train(config, step, make_state, stream, directory, steps=config.steps, start=config.start)

                  from exported weights    from a checkpoint
    network       those weights            its network, not its averages
    averages      copies of the network    its averages, if there are as many
    optimiser     new                      its state, if it has the same arrays; schedules start again, and
                                           hyperparameters of optax.inject_hyperparams are the new ones
    all else      new                      new

"All else" are the number of steps, the order of the data, the random numbers, and the state of the objective: as
`make_state` makes them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import optax

from .._leaves import leaves, shapes
from .._model import describe
from .._optimizer import copy
from .._sharding import Parallelism
from .._train import TrainStep
from .._train_state import init_state, TrainState
from ..checkpoint import CheckpointError, Checkpoints, read_weights
from ..vae import Autoencoder
from ._processes import tell

_PARTS = {".field": "network", ".averages": "averages", ".opt_state": "state of the optimiser"}


def started(
    start: str,
    make_state: Callable[[], TrainState],
    step: TrainStep,
) -> Callable[[], TrainState]:
    """A function that makes the state before the first step, with what is taken over from a file or directory. What is
    taken over and what is not is printed.

    **Arguments:** `start` a file of `save_weights`, the directory of a run, that of its checkpoints, or that of one
    checkpoint; `make_state` makes the new state; `step`.

    **Raises:** `OSError` if the file cannot be read; `ValueError` if there are neither weights nor checkpoints, or if
    they are of another network; `CheckpointError` if no checkpoint can be used.
    """
    path, wanted = Path(start), eqx.filter_eval_shape(make_state)
    if path.is_dir():
        parts, origin = _of_checkpoint(path, wanted, step.parallelism)
    else:
        weights = read_weights(path)
        _check_network(weights.network, wanted.field, path)
        found = weights.fill(lambda: make_state().field, step.parallelism)
        parts, origin = _only(wanted, ".field"), str(path)
        parts = eqx.tree_at(lambda state: state.field, parts, eqx.filter(found, eqx.is_array))
    taken = [part for name, part in _PARTS.items() if _names(parts, name)]
    new = [part for part in _PARTS.values() if part not in taken]
    tell(f"start: {', '.join(taken)} from {origin}; new: {', '.join([*new, 'all else'])}")
    return eqx.Partial(_with_parts, parts, make_state, step)


def _of_checkpoint(path: Path, wanted: TrainState, parallelism: Parallelism | None) -> tuple[TrainState, str]:
    """The parts of a checkpoint that fit, and its path."""
    checkpoints, number = _open(path)
    saved, notes = _newest_record(checkpoints) if number is None else checkpoints.saved(number)
    _check_network(notes.get("network"), wanted.field, checkpoints.directory)
    expected = shapes(leaves(wanted))

    def fits(part: str) -> bool:
        of_part = [{name: leaf for name, leaf in tree.items() if name.startswith(part)} for tree in (saved, expected)]
        return of_part[0] == of_part[1]

    chosen = _only(wanted, ".field", *(part for part in (".averages", ".opt_state") if fits(part)))
    restored = checkpoints.load(lambda: chosen, parallelism, step=number, partial=True)
    assert restored is not None
    for passed, reason in restored.passed_over.items():
        tell(f"{checkpoints.path(passed)}: passed over, because {reason}")
    return restored.state, str(checkpoints.path(restored.step))


def _open(path: Path) -> tuple[Checkpoints, int | None]:
    """The checkpoints that a path means, and the step if it means a single one."""
    if path.name.isdecimal() and path.with_suffix(".json").exists():
        return Checkpoints(path.parent), int(path.name)
    below = sorted(path.glob("*/checkpoints"))  # of a run of several trainings
    for folder in (path, path / "checkpoints", *(below if len(below) == 1 else ())):
        if (checkpoints := Checkpoints(folder)).steps():
            return checkpoints, None
    hint = f"; there are some in {' and '.join(str(folder.parent) for folder in below)}" if below else ""
    raise ValueError(f"start must be exported weights or a directory with checkpoints, got {path} with none{hint}")


def _newest_record(checkpoints: Checkpoints) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest record that can be read. **Raises:** `CheckpointError` of the oldest one if none can."""
    *others, oldest = reversed(checkpoints.steps())
    for step in others:
        with contextlib.suppress(CheckpointError):
            return checkpoints.saved(step)
    return checkpoints.saved(oldest)


def description_of(field: eqx.Module) -> dict[str, Any] | None:
    """What identifies a network: of a tokenizer its class and size, which serve only for comparison; of any other
    network the result of `mf_eqx.describe`, or None if it cannot be described."""
    if isinstance(field, Autoencoder):
        return json.loads(json.dumps({"network": "Autoencoder", **field.size._asdict()}, default=int))
    try:
        return describe(field)
    except ValueError:
        return None


def _check_network(found: Mapping[str, Any] | None, field: eqx.Module, path: Path) -> None:
    """Refuses another network: one with other attention heads, say, or other groups, has arrays of the same shapes. A
    network without a description is compared by its arrays alone."""
    wanted = description_of(field)
    if found is None or wanted is None:
        return
    for name in wanted:
        if name != "dropout" and found.get(name) != wanted[name]:
            raise ValueError(f"start must be of {name} {wanted[name]}, got {found.get(name)} in {path}")


def _names(state: TrainState, part: str) -> list[str]:
    return [name for name in leaves(state) if name.startswith(part)]


def _only(state: TrainState, *parts: str) -> TrainState:
    """The arrays, or shapes, of some parts of a state; None in place of all other leaves."""
    chosen = {name for part in parts for name in _names(state, part)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if jax.tree_util.keystr(path) in chosen else None, state
    )


def _with_parts(parts: TrainState, make_state: Callable[[], TrainState], step: TrainStep) -> TrainState:
    """A new state whose network is that of `parts`, with all else that `parts` has."""
    new = make_state()
    field = eqx.combine(parts.field, new.field)
    state = init_state(field, step.optimizer, step.averages, step.objective, key=new.key)
    averages, opt_state = jax.tree.map(copy, (parts.averages, parts.opt_state))
    averages = eqx.combine(averages, state.averages)
    opt_state = _with_new_schedules(eqx.combine(opt_state, state.opt_state), state.opt_state)
    return dataclasses.replace(state, averages=averages, opt_state=opt_state, objective=new.objective)


def _with_new_schedules(opt_state: Any, new: Any) -> Any:
    """The state of an optimiser, with the counts by which optax's schedules know the step, and the hyperparameters that
    they give, from a new one."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState | optax.InjectStatefulHyperparamsState)

    def chosen(old: Any, new: Any) -> Any:
        if isinstance(old, optax.InjectStatefulHyperparamsState):
            return new._replace(inner_state=_with_new_schedules(old.inner_state, new.inner_state))
        return new if is_schedule(old) else old

    return jax.tree.map(chosen, opt_state, new, is_leaf=is_schedule)
