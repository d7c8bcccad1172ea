"""The training steps that benchmarks compare: networks by name, variants of the objective, and their operations.

A `Setting` is what the steps of one table have in common (network, batch, precision ...), a `Variant` an objective with
the passes that it takes. A step is loss, gradient, Adam and one average.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import mf_eqx as mfx
from mf_eqx import measure, nn, run

LABELS = 1000
PLANE, IMAGE, LATENT = (2,), (3, 32, 32), (4, 32, 32)
DITS = {
    "tiny": mfx.DiTSize(depth=2, width=384, heads=6, patch=4),
    "S/4": mfx.DIT_S4,
    "S/2": mfx.DIT_S2,
    "B/4": mfx.DIT_B4,
    "B/2": mfx.DIT_B2,
    "M/2": mfx.DIT_M2,
    "L/2": mfx.DIT_L2,
    "XL/2": mfx.DIT_XL2,
}
UNETS = {
    "U-Net": mfx.UNET_CIFAR10,
    "U-Net tiny": mfx.UNetSize(width=32, multipliers=(1, 2), blocks=1, attention=(16,)),
}
MODELS = ("MLP", *DITS, *UNETS)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
FORMS = {"default": None, "scan": 1, "unroll": True}
ATTENTIONS: dict[str, nn.AbstractAttention] = {
    "xla": nn.XLAAttention(),
    "cudnn": nn.CudnnAttention(),
    "chunked": nn.ChunkedAttention(),
    "pallas": nn.PallasAttention(),
}
FOR_GPUS = ("cudnn", "pallas")
"""Attentions in kernels for NVIDIA GPUs."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def check_device(*attentions: str) -> None:
    """**Raises:** `ValueError` if one of these attentions cannot run on the device at hand."""
    lacking = [name for name in attentions if name in FOR_GPUS]
    if lacking and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention must be xla or chunked without an NVIDIA GPU, got {lacking[0]} on {jax.default_backend()}"
        )


class OwnNetwork(NamedTuple):
    """A network of one's own in the place of a model's name: where its class stands, and the shape of one row."""

    place: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.place} on {' x '.join(map(str, self.shape))}"


@functools.cache
def own_network(place: str | None, shape: tuple[int, ...]) -> OwnNetwork | None:
    """The network that `--network` and `--shape` ask for, if any. **Raises:** `ValueError` if it cannot be used."""
    if (place is None) != (not shape):
        raise ValueError(f"shape must be given with network, and only with it, got shape {shape}, network {place}")
    if shape and min(shape) < 1:
        raise ValueError(f"shape must be positive numbers, got {shape}")
    if place is None:
        return None
    run.own_network("network", place, shape, jax.ShapeDtypeStruct((), jnp.int32))
    return OwnNetwork(place, shape)


class Setting(NamedTuple):
    """One value of every axis: what all variants have in common."""

    model: str | OwnNetwork
    batch: int = 16
    dtype: str = "float32"
    form: str = "default"
    remat: str = "none"
    attention: str = "xla"
    share: float = 0.25

    def __str__(self) -> str:
        form = "" if self.form == "default" else f", {self.form}"
        return (
            f"{self.model}, batch {self.batch}, {self.dtype}{form}, remat {self.remat}, {self.attention} attention, "
            f"share {self.share:g}"
        )


def with_less_memory(setting: Setting) -> list[Setting]:
    """The setting, and the same with each remat that keeps less."""
    names = list(nn.REMATS)
    return [setting._replace(remat=name) for name in names[names.index(setting.remat) :]]


def out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX says that the device's memory is too small."""
    return "RESOURCE_EXHAUSTED" in str(error)


# What is compared


class Variant(NamedTuple):
    """A step: its objective, and its passes in units of one forward pass F of the whole batch (a backward pass is 2).

    `passes(tangent, share)` takes the cost of a tangent pass and the share of rows with r < t. It is None if a method
    of one's own does not state its passes; then its program is counted instead.
    """

    objective: mfx.Objective
    passes: Callable[[float, float], float] | None


FLOW_MATCHING = "Flow Matching"
ENGINES = ("stopped JVP", "finite difference")
"""MeanFlow with another way to du/dt."""
FLOAT32_ONLY = ("finite difference",)


@functools.cache
def variants(share: float = 0.25) -> dict[str, Variant]:
    """All steps by name, with that share of rows with r < t, a fraction such as `Objective` takes; Flow Matching first,
    since everything is a ratio to it.

    Otherwise the paper's settings. Where every row has tangents a coin sets r = t as often as the split would, as in
    the authors' code.
    """

    mean_flow, of_method = mfx.MeanFlow(), functools.partial(variant_of_method, share=share)
    every = functools.partial(paper_objective, mean_flow, 1, equal=1 - share)
    stopped, difference = (mfx.MeanFlow(derivative=rule()) for rule in (mfx.StoppedJVP, mfx.CentralDifference))
    return {
        FLOW_MATCHING: Variant(paper_objective(None, 0), lambda T, s: 3),
        "MeanFlow on every row": Variant(every(), lambda T, s: 3 + T),
        "MeanFlow": of_method(mean_flow),
        "stopped JVP": of_method(stopped),
        "finite difference": of_method(difference),
        "guided on every row": Variant(every(guided=True), lambda T, s: 3 + T + 2),
        "guided": Variant(paper_objective(mean_flow, share, guided=True), lambda T, s: 3 + s * T + 1 + s),
        **{name: of_method(method) for name, method in methods().items() if name != "MeanFlow"},
    }


def paper_objective(
    identity: mfx.AbstractIdentity | None, share: float, *, guided: bool = False, equal: float = 0
) -> mfx.Objective:
    return mfx.Objective(
        identity,
        time_pairs=mfx.TimePairs(equal=equal),
        identity_share=share,
        guidance=mfx.Guidance(scale=1.0, mix=0.5) if guided else None,
        label_dropout=mfx.LabelDropout(0.1, LABELS),
    )


def variant_of_method(identity: mfx.AbstractIdentity, share: float) -> Variant:
    """A method with the passes that its facts state."""
    objective, passes = paper_objective(identity, share), identity.facts.passes
    if passes is None:
        return Variant(objective, None)
    return Variant(objective, lambda T, s: 3 + s * (passes.forward + passes.tangent * T))


@functools.cache
def variant_of(name: str, share: float = 0.25) -> Variant:
    """A step by its name, or the method of one's own that stands there, as mine.py:Mix."""
    known = variants(share)
    return known[name] if name in known else variant_of_method(run.own_identity("identity", name, 1), share)


@functools.cache
def methods() -> dict[str, mfx.AbstractIdentity]:
    """The package's methods whose cost is known, and the same at every step."""
    found = mfx.identities_in(vars(mfx), steps=1)
    return {name: identity for name, identity in found.items() if identity.facts.passes is not None}


VARIANTS = tuple(variants())
FIRST_OF_ITS_COST = {identity.facts.passes: name for name, identity in reversed(methods().items())}
FIRST_OF_ITS_COST[mfx.MeanFlow().facts.passes] = "MeanFlow"
COMPARED = tuple(name for name in VARIANTS if name not in methods() or name in FIRST_OF_ITS_COST.values())
"""Of methods that cost the same, one."""


# Networks and steps


def data_shape(model: str | OwnNetwork) -> tuple[int, ...]:
    """Of one row."""
    if isinstance(model, OwnNetwork):
        return model.shape
    return PLANE if model == "MLP" else IMAGE if model in UNETS else LATENT


def make_field(setting: Setting, *, depth: int | None = None, key: jax.Array) -> mfx.AbstractField:
    """The network of a setting, a DiT with another number of blocks if `depth` says so."""
    dtype = DTYPES[setting.dtype]
    if isinstance(setting.model, OwnNetwork):
        return run.own_network("network", *setting.model)(key=key)
    if setting.model == "MLP":
        return mfx.MLP(*PLANE, labels=LABELS, dtype=dtype, key=key)
    options: dict[str, Any] = {"remat": nn.REMATS[setting.remat], "attention": ATTENTIONS[setting.attention]}
    if (unroll := FORMS[setting.form]) is not None:
        options["unroll"] = unroll
    if setting.model in UNETS:
        return mfx.UNet(IMAGE, UNETS[setting.model], labels=LABELS, dtype=dtype, **options, key=key)
    size = DITS[setting.model]
    size = size if depth is None else size._replace(depth=depth)
    return mfx.DiT(LATENT, size, labels=LABELS, dtype=dtype, **options, key=key)


def shapes_of(setting: Setting, depth: int | None = None) -> mfx.AbstractField:
    """A network without its numbers."""
    return eqx.filter_eval_shape(lambda key: make_field(setting, depth=depth, key=key), jr.key(0))


def make_step(setting: Setting, name: str, parallelism: mfx.Parallelism | None = None) -> mfx.TrainStep:
    """A variant's step."""
    objective, average = variant_of(name, setting.share).objective, mfx.ExponentialAverage(0.9999)
    teacher = 0 if objective.needs_teacher else None
    return mfx.TrainStep(objective, optax.adam(1e-4, b2=0.95), [average], teacher=teacher, parallelism=parallelism)


def make_state(setting: Setting, *, key: jax.Array) -> mfx.TrainState:
    """What every variant's step starts from."""
    step = make_step(setting, FLOW_MATCHING)

    def make(key: jax.Array) -> mfx.TrainState:
        return mfx.init_state(make_field(setting, key=key), step.optimizer, step.averages, key=key)

    # As one program, an accelerator need not compile each operation.
    return (make if jax.default_backend() == "cpu" else eqx.filter_jit(make))(key)


def make_batch(setting: Setting, *, key: jax.Array) -> mfx.Batch:
    """Normal numbers with random labels."""
    labels = jr.randint(key, (setting.batch,), 0, LABELS)
    return mfx.Batch(jr.normal(key, (setting.batch, *data_shape(setting.model))), labels)


def count_collectives(program: measure.Program[Any]) -> dict[str, int]:
    """How often a compiled program communicates between devices, by kind; the body of a loop is counted once."""
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", program.text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


# Operations


class Operations(NamedTuple):
    """Operations in matrix products and convolutions for one row: a forward pass, and a tangent pass in units of it."""

    forward: float
    tangent: float


@functools.cache
def count_passes(model: str | OwnNetwork) -> Operations:
    """From the program of one row, as it is traced."""
    field, *row = _row(Setting(model))
    if (forward := measure.product_flops(lambda f, z, t, c: f(z, t, t, c), field, *row)) == 0:
        raise ValueError(f"network must have matrix products or convolutions, got {model} without any")
    both = measure.product_flops(lambda f, z, t, c: mfx.total_derivative(f, z, z, t, t, c), field, *row)
    return Operations(forward, both / forward - 1)


@functools.cache
def count_again(model: str | OwnNetwork, remat: str) -> float:
    """What a backward pass does again, in units of a forward pass."""

    def gradient(field: mfx.AbstractField, *row: jax.Array) -> mfx.AbstractField:
        z, t, label = row
        return eqx.filter_grad(lambda field: jnp.sum(field(z, t, t, label)))(field)

    more, plain = (measure.product_flops(gradient, *_row(Setting(model, remat=r))) for r in (remat, "none"))
    return (more - plain) / count_passes(model).forward


def _row(setting: Setting) -> tuple[Any, ...]:
    """A network and one row, without their numbers."""
    row, time = jax.ShapeDtypeStruct(data_shape(setting.model), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    return shapes_of(setting), row, time, jax.ShapeDtypeStruct((), jnp.int32)


def formula_flops(setting: Setting, name: str) -> float:
    """Operations of a whole step's products and convolutions, those with the zeros of padding included."""
    (forward, tangent), variant = count_passes(setting.model), variant_of(name, setting.share)
    if variant.passes is None:
        batch = eqx.filter_eval_shape(lambda key: make_batch(setting, key=key), jr.key(0))
        ratio = measure.relative_cost(variant.objective, shapes_of(setting), batch)
        return ratio * formula_flops(setting, FLOW_MATCHING)
    passes = variant.passes(tangent, float(variant.objective.identity_share)) + count_again(
        setting.model, setting.remat
    )
    return setting.batch * forward * passes


@functools.cache
def xla_flops(model: str, name: str, share: float = 0.25) -> float:
    """XLA's count for loss and gradient of 16 rows, in float32; zeros of padding are no operation to it.

    XLA counts the body of a loop only once, and long programs without loops take long to compile. So a DiT is counted
    with one and with two blocks, without a loop, and every further block is taken to cost as much as the second.
    """
    setting, objective = Setting(model, form="unroll"), variant_of(name, share).objective
    group = objective.divisor
    rows = group * math.ceil(16 / group)  # as many as the share wants

    def gradient(field: mfx.AbstractField, x: jax.Array, label: jax.Array, key: jax.Array) -> Any:
        context = mfx.Context(jnp.zeros((), jnp.int32), mfx.stopped(field))
        return eqx.filter_grad(lambda field: objective(field, mfx.Batch(x, label), key=key, context=context)[0])(field)

    def count(depth: int | None = None) -> float:
        x = jax.ShapeDtypeStruct((rows, *data_shape(model)), jnp.float32)
        inputs = (shapes_of(setting, depth), x, jax.ShapeDtypeStruct((rows,), jnp.int32), jr.key(0))
        return measure.compile_program(gradient, *inputs, options=quick_options()).cost.flops * 16 / rows

    with jax.default_device(jax.devices("cpu")[0]):
        if model not in DITS:
            return count()
        two, depth = count(2), DITS[model].depth
        return two if depth == 2 else two + (depth - 2) * (two - count(1))


@functools.cache
def quick_options() -> dict[str, str | bool] | None:
    """XLA's, for a program that is counted and never run: without the slow part of compiling, which comes after the
    passes that remove work."""
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    try:
        measure.compile_program(lambda: jnp.zeros(()), options=options)
    except jax.errors.JaxRuntimeError:  # an XLA that does not know them
        return None
    return options
