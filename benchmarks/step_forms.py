"""Does the form of a step matter? Loops against unrolled programs, and the checked step against a plain one.

    python benchmarks/step_forms.py                                          a small DiT
    python benchmarks/step_forms.py --model B/4 --batch 256 --dtype bfloat16
    python benchmarks/step_forms.py --model XL/2 --batch 256 --dtype bfloat16 --form loops "kinds of rows unrolled"

    loops                     over blocks and over the kinds of rows, the update in a branch: the default of a DiT
    kinds of rows unrolled    rows with r < t and rows with r = t in one piece of program (`TrainStep.unroll`)
    blocks unrolled           no loop over the network's blocks
    plain                     one gradient of the whole loss, one update, no check that anything is finite

A branch in a loop may wait for the host of a GPU, a loop may hide operations from the compiler; an unrolled program
takes longer to compile and may take more memory. All forms are timed in rounds of changing order, on one state.

README.md beside this file has figures.
"""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from steps import ATTENTIONS, DTYPES, make_batch, make_state, make_step, MODELS, REMATS, Setting, VARIANTS

import mf_eqx as mfx
from mf_eqx import measure, run

FORMS = ("loops", "kinds of rows unrolled", "blocks unrolled", "plain")


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
    """none, products, full."""
    attention: str = "xla"
    """xla, cudnn (NVIDIA GPUs, bfloat16), chunked."""
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
        known = {"dtype": DTYPES, "remat": REMATS, "attention": ATTENTIONS, "variant": VARIANTS}
        for name, allowed in {"model": MODELS[1:], **known}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be among {', '.join(allowed)}; got {getattr(self, name)}")
        if not self.form or set(self.form) - set(FORMS):
            raise ValueError(f"form must be one or more of {', '.join(FORMS)}; got {', '.join(self.form) or 'none'}")
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
    setting = setting._replace(form="unroll" if form == "blocks unrolled" else "scan")
    step = dataclasses.replace(make_step(setting, variant), unroll=form == "kinds of rows unrolled")
    shapes = eqx.filter_eval_shape(lambda key: make_state(setting, key=key), jr.key(0))
    return plain(step) if form == "plain" else step, shapes


def main(config: Config) -> None:
    """Time a training step in several forms."""
    if config.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"attention must be xla without an NVIDIA GPU, got cudnn on {jax.default_backend()}")
    setting = Setting(config.model, config.batch, config.dtype, remat=config.remat, attention=config.attention)
    directory = run.RunDirectory.create(config, config.name)
    state, batch = make_state(setting, key=jr.key(0)), make_batch(setting, key=jr.key(1))
    leaves, structures, programs = jax.tree.leaves(state), {}, {}
    with run.Progress(len(config.form) * (config.rounds + 2)) as progress:
        for done, form in enumerate(config.form, start=1):
            step, shapes = make_form(form, setting, config.variant)
            structures[form] = jax.tree.structure(shapes)
            programs[form] = measure.compile_program(step, shapes, batch, donate=(0,))
            progress.update(done, {"seconds": programs[form].cost.compile_seconds})

        def take(form: str) -> Any:
            nonlocal leaves
            # The forms of a network differ in what is no array: their states have the same leaves.
            after, metrics = programs[form](jax.tree.unflatten(structures[form], leaves), batch)
            leaves = jax.tree.leaves(after)
            return metrics

        calls = {form: functools.partial(take, form) for form in config.form}
        times = measure.time_interleaved(calls, config.rounds, report=progress.update, done=len(calls))
    rows, records, first = [], [], times[config.form[0]]
    for form in config.form:
        cost, found = programs[form].cost, times[form]
        ratio = float(jnp.median(found.wall / first.wall))
        numbers = (f"{1e3 * found.median:.1f}", f"{ratio:.3f}", f"{100 * found.spread:.0f}%", cost.compile_seconds)
        rows.append((form, *numbers, f"{cost.temporary_bytes / 1e6:.0f}"))
        record = {**setting._asdict(), "form": form, "variant": config.variant, "wall_seconds": found.wall.tolist()}
        records.append({**record, "ratio": ratio, "cost": dataclasses.asdict(cost)})
    headers = ("form", "ms", f"/ {config.form[0]}", "spread", "compile s", "temporary MB")
    text = f"**{setting}: {config.variant}**\n\n{run.table(rows, headers)}"
    directory.save_results(text, records)
    print(f"{text}\n\nResults are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
