"""Would a step fit on a GPU or TPU that is not here? Training steps, compiled by the compilers of such devices.

    python benchmarks/compile_for.py --model XL/2 --remat products --device h100 h200
    python benchmarks/compile_for.py --model XL/2 --remat full --device v5e:8 v6e:8 --fsdp
    python benchmarks/compile_for.py --network mine.py:Net --shape 3 64 64 --identity mine.py:Mix --device h100 v5e

XLA compiles for a device that it only has a description of. So any machine can tell whether a step compiles there, how
much memory it needs on each device, and how devices communicate; how fast it is, only the device can tell. Nothing is
run and no parameters are allocated.

It needs the compilers (1.2 GB): pip install -e '.[experiments,compilers]'. Use a virtual environment of its
own, since in one with these packages JAX looks for the devices whenever it starts.

"state" is parameters, Adam's moments and one average, "temporary" what a step needs besides; both of one device. For
GPUs these are XLA's own buffers, without what libraries need, and algorithms of products are chosen untimed; JAX takes
75% of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. A TPU pads arrays to its tiles; its compiler
refuses a program whose temporary memory alone is too large, and may compute again what does not fit.

README.md beside this file has figures.
"""

import dataclasses
import functools
import re
import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.random as jr
from other_devices import GPUS, Target, target, TPUS, without_devices
from steps import (
    ATTENTIONS,
    count_collectives,
    DTYPES,
    FLOAT32_ONLY,
    FOR_GPUS,
    make_batch,
    make_state,
    make_step,
    MODELS,
    out_of_memory,
    own_network,
    Setting,
    variant_of,
    VARIANTS,
)

import mf_eqx as mfx
from mf_eqx import measure, nn, run

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps to compile: each variant for each device."""

    device: tuple[str, ...] = ("h100", "v5e")
    """a100 (80 GB), h100, h200, v5e, v5p, v6e; with a number for several, as h100:8 (GPUs 1, 2, 4, 8; TPUs 1, 4, 8, 16,
    32, 64, but v5p from 4 on)."""
    model: str = "B/4"
    """MLP, tiny, S/4, S/2, B/4, B/2, M/2, L/2, XL/2, U-Net, U-Net tiny."""
    network: str | None = None
    """A network of your own in place of `model`, `dtype`, `form`, `remat` and `attention`, as mine.py:Net, see
    compile_time.py. One that asks JAX for its backend, as a DiT without `unroll` does, hears of this machine's CPU."""
    shape: tuple[int, ...] = ()
    """Shape of one row for the network of --network, such as 3 64 64."""
    variant: tuple[str, ...] = ("MeanFlow",)
    """Steps, by the names of `steps.py`."""
    identity: str | None = None
    """A method of your own besides `variant`, as mine.py:Mix, see compile_time.py."""
    batch: int = 256
    """Rows per step, on all devices together: a multiple of 4 times the number of devices."""
    dtype: str = "bfloat16"
    """Compute precision, bfloat16 or float32."""
    form: str = "scan"
    """scan (a loop over blocks), unroll (none)."""
    remat: str = "none"
    """none, products, full."""
    attention: str = "xla"
    """xla, chunked, pallas (NVIDIA GPUs)."""
    share: float = 0.25
    """Share of rows with r < t; the CIFAR-10 experiment has 0.75."""
    fsdp: bool = False
    """Divide the state between the devices instead of keeping a copy on each."""
    name: str | None = None
    """Name of the run below runs/compile_for/; by default the time of day."""

    def __post_init__(self):
        without_devices()  # before a network of one's own asks for one
        run.check_sizes(self, batch=1 << 20, shape=1 << 14)
        own_network(self.network, self.shape)
        attentions = [name for name in ATTENTIONS if name != "cudnn"]  # its library would be asked
        run.check_among(self, model=MODELS, dtype=DTYPES, form=("scan", "unroll"), remat=nn.REMATS, variant=VARIANTS)
        run.check_among(self, attention=attentions)
        if not self.device:
            raise ValueError(f"device must be at least one of {', '.join((*GPUS, *TPUS))}; got none")
        if not 0.02 <= self.share <= 0.9:
            raise ValueError(f"share must lie in [0.02, 0.9], got {self.share}")
        if self.dtype != "float32" and (wrong := [name for name in self.variant if name in FLOAT32_ONLY]):
            raise ValueError(f"dtype must be float32 for {wrong[0]}, got {self.dtype}")
        groups = {name: variant_of(name, self.share).objective.divisor for name in self.variants}
        for each in map(target, self.device):
            if self.attention in FOR_GPUS and each.name in TPUS:
                raise ValueError(f"attention must be xla or chunked for a TPU, got {self.attention} for {each.name}")
            for name, group in groups.items():
                if self.batch < 1 or self.batch % (group * each.number):
                    raise ValueError(
                        f"batch must be a multiple of {group} x {each.number} for {name} on {each}, got {self.batch}"
                    )

    @property
    def variants(self) -> tuple[str, ...]:
        """All steps that are compiled for a device."""
        return self.variant if self.identity is None else (*self.variant, self.identity)


def chosen(config: Config) -> Setting:
    """What all steps have in common."""
    own = own_network(config.network, config.shape)
    if own is not None:
        return Setting(own, config.batch, share=config.share)
    return Setting(config.model, config.batch, config.dtype, config.form, config.remat, config.attention, config.share)


class Result(NamedTuple):
    """A step on one of the devices that share it, in bytes."""

    device: str
    variant: str
    memory: int
    """That the device has."""
    by_default: int
    """Of which JAX takes so much by default."""
    compile_seconds: float
    """To trace, lower and compile."""
    state: int = 0
    """And the rows of the batch."""
    temporary: int = 0
    collectives: dict[str, int] | None = None
    refused: str = ""
    """Why the compiler refuses the step, if it does."""

    @property
    def row(self) -> tuple[str | None, ...]:
        """Of the table."""
        seconds = f"{self.compile_seconds:.0f}"
        if self.refused:
            temporary = f"{self.temporary / 1e9:.2f}" if self.temporary else None
            return self.device, self.variant, None, temporary, self.refused, seconds, None
        held = self.state + self.temporary
        whether = "yes" if held <= self.by_default else "beyond JAX's default" if held <= self.memory else "no"
        fits = f"{whether}, {held / self.memory:.0%} of {self.memory / 1e9:.1f} GB"
        counts = ", ".join(f"{count} {name}" for name, count in (self.collectives or {}).items()) or "none"
        sizes = (f"{size / 1e9:.2f}" for size in (self.state, self.temporary))
        return self.device, self.variant, *sizes, fits, seconds, counts


def compiled(setting: Setting, variant: str, where: Target, *, fsdp: bool) -> Result:
    """A step compiled for these devices, with as much of its state on each as the rule of `Parallelism` says."""
    parallelism = mfx.Parallelism(fsdp=where.number if fsdp else 1, devices=where.devices())
    step = make_step(setting, variant, parallelism=parallelism)
    shapes = eqx.filter_eval_shape(lambda key: make_state(setting, key=key), jr.key(0))
    arrays, others = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = eqx.combine(jax.tree.map(placed, arrays, parallelism.of_tree(arrays)), others)
    rows = eqx.filter_eval_shape(lambda key: make_batch(setting, key=key), jr.key(0))
    batch = jax.tree.map(lambda leaf: placed(leaf, parallelism.rows), rows)
    began, whole = time.perf_counter(), functools.partial(Result, str(where), variant, where.memory, where.by_default)
    try:
        with where.lowering() if setting.attention == "pallas" else nullcontext():
            program = measure.compile_program(step, state, batch, donate=(0,))
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        temporary = int(float(found[1]) * UNITS[found[2]]) if found else 0
        refused = f"refused, has {where.memory / 1e9:.1f} GB"
        return whole(time.perf_counter() - began, temporary=temporary, refused=refused)
    cost, seconds = program.cost, time.perf_counter() - began
    state_bytes = cost.argument_bytes + cost.output_bytes - cost.donated_bytes
    return whole(seconds, state_bytes, cost.temporary_bytes, count_collectives(program))


def report(setting: Setting, results: list[Result]) -> str:
    """The table as text."""
    headers = ("device", "step", "state GB", "temporary GB", "fits", "compile s", "collectives")
    return f"**{setting}**\n\n{run.table([result.row for result in results], headers)}"


def main(config: Config) -> None:
    """Compile training steps for other devices than those of this machine."""
    setting = chosen(config)
    targets, results = [target(text) for text in config.device], list[Result]()
    for where in targets:
        where.devices()  # before a directory is made
    jax.config.update("jax_enable_compilation_cache", False)  # which may know a program, or not know the device
    directory = run.RunDirectory.create(config, config.name)
    pairs = [(where, variant) for where in targets for variant in config.variants]
    with run.Progress(len(pairs), doing="compiling") as progress:
        for done, (where, variant) in enumerate(pairs, start=1):
            results.append(compiled(setting, variant, where, fsdp=config.fsdp))
            progress.update(done, {"seconds": results[-1].compile_seconds})
            directory.save_results(report(setting, results), [r._asdict() for r in results])
    print(f"{report(setting, results)}\n\nResults are in {directory.root}.")


if __name__ == "__main__":
    run.main(main, Config(), description=__doc__)
