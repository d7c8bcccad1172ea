"""Does the form of a step matter? A loop over blocks against an unrolled program, the checked step against a plain one.

    python benchmarks/step_forms.py                                          a small DiT
    python benchmarks/step_forms.py --model B/4 --batch 256 --dtype bfloat16
    python benchmarks/step_forms.py --model XL/2 --batch 256 --dtype bfloat16 --form loop unrolled

    loop        over the network's blocks
    unrolled    no loop over blocks
    plain       a loop over blocks; one gradient of the whole loss, one update, no check that anything is finite

A loop copies what the backward pass needs of each block into arrays for all blocks, and back; an unrolled program takes
longer to compile and may take more memory. All forms are timed in rounds of changing order, on one state. If
memory is too small for the first form, the next remat that keeps less is taken for all; any other form is left out.

README.md beside this file has figures.
"""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from steps import (
    ATTENTIONS,
    check_device,
    DTYPES,
    make_batch,
    make_state,
    make_step,
    MODELS,
    out_of_memory,
    Setting,
    VARIANTS,
    with_less_memory,
)

import mf_eqx as mfx
from mf_eqx import measure, nn, run

FORMS = ("loop", "plain", "unrolled")
"""Those that compile soonest first."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A step, and the forms that it is timed in."""

    model: str = "tiny"
    """tiny, S/4, S/2, B/4, B/2, M/2, L/2, XL/2, U-Net, U-Net tiny."""
    batch: int = 16
    """Rows per step, a multiple of 4."""
    dtype: str = "float32"
    """Compute precision, float32 or bfloat16."""
    remat: str = "none"
    """none, products, full: the first that is tried."""
    attention: str = "xla"
    """xla, cudnn (NVIDIA GPUs, bfloat16), chunked, pallas (NVIDIA GPUs)."""
    variant: str = "guided"
    """The step, by its name in `steps.py`."""
    form: tuple[str, ...] = FORMS
    """Forms, the first of which the others are compared with."""
    rounds: int = 7
    """Rounds that are timed."""
    name: str | None = None
    """Name of the run below runs/step_forms/; by default the time of day."""

    def __post_init__(self):
        run.check_sizes(self, batch=1 << 20)
        run.check_among(self, model=MODELS[1:], dtype=DTYPES, remat=nn.REMATS, attention=ATTENTIONS)
        run.check_among(self, variant=VARIANTS, form=FORMS)
        if self.batch < 4 or self.batch % 4:
            raise ValueError(f"batch must be a positive multiple of 4, got {self.batch}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be >= 1, got {self.rounds}")


def plain(step: mfx.TrainStep) -> Any:
    """The step as one would write it by hand."""

    def take(state: mfx.TrainState, batch: mfx.Batch) -> tuple[mfx.TrainState, jax.Array]:
        _, key = jr.split(jr.fold_in(state.key, state.step))  # the draws of `TrainStep`

        @eqx.filter_value_and_grad
        def loss_and_gradient(field: mfx.AbstractField) -> jax.Array:
            return step.objective.evaluate(field, batch, None, key=key, context=step.context(state))[0]

        loss, gradient = loss_and_gradient(state.field)
        parameters = eqx.filter(state.field, eqx.is_inexact_array)
        updates, opt_state = step.optimizer.update(gradient, state.opt_state, parameters)
        field, number = eqx.apply_updates(state.field, updates), state.step + 1
        rules = zip(step.averages, state.averages, strict=True)
        averages = tuple(rule.update(average, field, number) for rule, average in rules)
        return mfx.TrainState(field, opt_state, averages, number, state.key, state.faults), loss

    return take


def make_form(form: str, setting: Setting, variant: str) -> tuple[Any, Any]:
    """The step in a form, and the shapes of its state."""
    setting = setting._replace(form="unroll" if form == "unrolled" else "scan")
    step = make_step(setting, variant)
    shapes = eqx.filter_eval_shape(lambda key: make_state(setting, key=key), jr.key(0))
    return plain(step) if form == "plain" else step, shapes


class Steps:
    """One step in the forms that memory is large enough for, all on one state."""

    def __init__(self, setting: Setting, variant: str):
        self.setting, self.variant = setting, variant
        self.batch, self.leaves = make_batch(setting, key=jr.key(1)), self.new_leaves()
        self.programs: dict[str, Any] = {}
        self.structures: dict[str, Any] = {}

    def new_leaves(self) -> list[Any]:
        return jax.tree.leaves(make_state(self.setting, key=jr.key(0)))

    def add(self, form: str) -> bool:
        """Compile a form and take a step; False if that needs more memory than there is."""
        step, shapes = make_form(form, self.setting, self.variant)
        self.structures[form] = jax.tree.structure(shapes)
        try:
            self.programs[form] = measure.compile_program(step, shapes, self.batch, donate=(0,))
            jax.block_until_ready(self.take(form))
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            self.programs.pop(form, None)
            self.leaves = []  # which may have gone with the step
        self.leaves = self.leaves or self.new_leaves()
        return form in self.programs

    def take(self, form: str) -> Any:
        # The forms of a network differ in what is no array: their states have the same leaves.
        after, metrics = self.programs[form](jax.tree.unflatten(self.structures[form], self.leaves), self.batch)
        self.leaves = jax.tree.leaves(after)
        return metrics


def fitting(setting: Setting, variant: str, form: str) -> Steps:
    """The steps with the least remat, from that of the setting on, with which memory is large enough for this form.

    **Raises:** `ValueError` if there is none.
    """
    for each in with_less_memory(setting):
        steps = Steps(each, variant)
        if steps.add(form):
            return steps
        print(f"{each}, {form}: needs more memory than there is", flush=True)
        del steps
    raise ValueError(f"batch must be smaller than {setting.batch}: {setting.model} needs more memory than there is")


def described(
    steps: Steps, forms: tuple[str, ...], times: dict[str, measure.Times]
) -> tuple[str, list[dict[str, Any]]]:
    """Table and records of the forms so far."""
    rows, records = [], []
    for form in forms:
        program, found = steps.programs.get(form), times.get(form)
        cost = program and program.cost
        first = times.get(forms[0])
        ratio = found and first and float(np.median(found.wall / first.wall))
        cpu = found and first and float(np.median(found.cpu / first.cpu))
        numbers = found and (f"{1e3 * found.median:.1f}", f"{ratio:.3f}", f"{cpu:.3f}", f"{100 * found.spread:.0f}%")
        memory = cost and (f"{cost.compile_seconds:.1f}", f"{cost.temporary_bytes / 1e6:.0f}")
        rows.append((form, *(numbers or 4 * (None,)), *(memory or ("not enough memory", None))))
        record = {**steps.setting._asdict(), "form": form, "variant": steps.variant, "ratio": ratio}
        record |= {"cpu_ratio": cpu, "wall_seconds": found and found.wall.tolist()}
        record["cpu_seconds"] = found and found.cpu.tolist()
        records.append({**record, "cost": cost and dataclasses.asdict(cost)})
    headers = ("form", "ms", f"/ {forms[0]}", "CPU time", "spread", "compile s", "temporary MB")
    return f"**{steps.setting}: {steps.variant}**\n\n{run.table(rows, headers)}", records


def main(config: Config) -> None:
    """Time a training step in several forms."""
    check_device(config.attention)
    setting = Setting(config.model, config.batch, config.dtype, remat=config.remat, attention=config.attention)
    directory = run.RunDirectory.create(config, config.name)
    first, *others = config.form
    with run.Progress(len(config.form) * (config.rounds + 2)) as progress:
        steps = fitting(setting, config.variant, first)
        directory.save_results(*described(steps, (first,), {}))
        for done, form in enumerate(others, start=2):
            if not steps.add(form):
                progress.note(f"{form}: needs more memory than there is")
            progress.update(done, {})
            directory.save_results(*described(steps, config.form[:done], {}))
        calls = {form: functools.partial(steps.take, form) for form in steps.programs}
        times = measure.time_interleaved(calls, config.rounds, report=progress.update, done=len(config.form))
    text, records = described(steps, config.form, times)
    directory.save_results(text, records)
    print(f"{text}\n\nResults are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
