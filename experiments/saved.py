"""Saved weights, opened so that samples can be made of them: what `generate.py` and `evaluate.py` share."""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import guidance_flags
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import prepare_latents
from jaxtyping import Array, Float

import mf_eqx as mfx
from mf_eqx import checkpoint, run, vae


class Subject(NamedTuple):
    """A network on all devices, what its file says of it, and the tokenizer of its latents, if that is given."""

    path: str
    field: Any
    network: dict[str, Any]
    config: dict[str, Any]
    notes: checkpoint.Notes
    tokenizer: vae.Autoencoder | None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Of what the network generates."""
        return tuple(self.network.get("data_shape") or self.field.data_shape)

    @property
    def labels(self) -> int | None:
        return self.network.get("labels")

    @property
    def takes_guidance(self) -> bool:
        """Whether guidance is an input of the network: its scale and its interval cost no evaluation."""
        return bool(self.network.get("guidance"))

    @property
    def is_latent(self) -> bool:
        """Whether its samples are latents that nothing decodes."""
        return self.notes.tokenizer is not None and self.tokenizer is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, decoded if that is possible."""
        if self.tokenizer is None:
            return self.data_shape
        sides = (self.tokenizer.factor * side for side in self.data_shape[1:])
        return self.tokenizer.size.channels, *sides

    @property
    def is_image(self) -> bool:
        return self.notes.pixels is not None and not self.is_latent and len(self.shape) == 3 and self.shape[0] in (1, 3)

    @property
    def pixels(self) -> tuple[float, float]:
        """Of images: the values of black and of full brightness."""
        assert self.notes.pixels is not None
        return self.notes.pixels

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(self.field, eqx.is_array)))


def open_subject(
    path: str, tokenizer_path: str, devices: mfx.Parallelism, *, bfloat16: bool, own_network: str = ""
) -> Subject:
    """**Raises:** `OSError`, `ValueError` for files that hold something else, or that do not belong together."""
    if Path(path).is_dir():  # of a run: digits.py has its files one folder further down
        found = sorted(str(file) for place in ("*", "*/*") for file in Path(path).glob(f"{place}.safetensors"))
        hint = f", which has {', '.join(found[:5])}" if found else ""
        raise ValueError(f"--weights must be a file of weights, got the folder {path}{hint}")
    weights = checkpoint.read_weights(path)
    network, how = weights.network, {"dtype": jnp.bfloat16} if bfloat16 else {}
    if own_network:
        if bfloat16:
            raise ValueError(f"--bfloat16 must be left out with --network {own_network}, a network of your own")
        make_own, network = make_own_network(weights, own_network)
        field: Any = weights.fill(lambda: make_own(key=jr.key(0)), devices)
    elif network is None:
        rule = "must describe its network, an MLP, DiT, InContextDiT or UNet, or --network mine.py:Net be given"
        raise ValueError(f"{path}: {rule}, got neither")
    else:
        field = weights.fill(lambda: weights.make_network(**how), devices)
    shape = tuple(network.get("data_shape") or field.data_shape)
    notes = weights.notes or assumed_notes(shape)
    if tokenizer_path and notes.tokenizer is None:
        raise ValueError(f"--vae must be left out for {path}, whose values are no latents, got {tokenizer_path}")
    tokenizer = None
    if tokenizer_path and notes.tokenizer is not None:
        tokenizer = prepare_latents.open_tokenizer(tokenizer_path, notes.tokenizer.size)
        if notes.tokenizer.digest not in (None, tokenizer.digest()):
            raise ValueError(f"--vae must hold the tokenizer that {path} was trained with, got {tokenizer_path}")
    return Subject(path, field, network, weights.config, notes, devices.replicate(tokenizer))


def make_own_network(
    weights: checkpoint.Weights, place: str
) -> tuple[Callable[..., mfx.AbstractField], dict[str, Any]]:
    """What makes the network of a file of one's own, and its description.

    **Arguments:** `weights` whose configuration has `data_shape` and, if there are any, `labels`; `place` of the class.
    """
    if weights.network is not None:
        found = f"{weights.network['network']}, got {place}"
        raise ValueError(f"--network must be left out for {weights.path}, whose network is described: {found}")
    shape, labels = weights.config.get("data_shape"), weights.config.get("labels")
    sizes = [*(shape if isinstance(shape, list) and shape else [None]), 1 if labels is None else labels]
    if not all(type(size) is int and size > 0 for size in sizes):
        rule = "must say its data_shape, and labels if it has any, in its configuration, as images.py leaves it"
        raise ValueError(f"{weights.path}: {rule}, for --network; got {shape!r:.60} and {labels!r:.60}")
    label = None if labels is None else jax.ShapeDtypeStruct((), jnp.int32)
    make = run.own_network("--network", place, tuple(sizes[:-1]), label, labels=labels)
    name = run.own_class("--network", place, mfx.AbstractField).__name__
    return make, {"network": name, "data_shape": shape, "labels": labels}


def assumed_notes(shape: tuple[int, ...]) -> checkpoint.Notes:
    """Of a file without notes: what its shape suggests."""
    channels = shape[0] if len(shape) == 3 else 0
    is_latent = channels == vae.SD_VAE.latent
    return checkpoint.Notes(
        pixels=(-1, 1) if is_latent or channels in (1, 3) else None,
        tokenizer=checkpoint.Tokenizer(vae.SD_VAE) if is_latent else None,
    )


Interval: TypeAlias = tuple[float, float]
"""The first and the last time at which guidance applies."""
ALWAYS: Interval = (0.0, 1.0)


def check_times_and_guidance(times: Sequence[float], scales: Sequence[float], intervals: Sequence[Interval]) -> None:
    """Refuses times, if any are given, and scales and intervals of guidance that no sampler takes."""
    falling = all(before > after for before, after in itertools.pairwise(times))
    if times and not (falling and (times[0], times[-1]) == (1, 0)):
        raise ValueError(f"times must fall strictly from 1 to 0, got {times}")
    if not scales or not all(0 <= scale < math.inf for scale in scales):
        found = scales[0] if len(scales) == 1 else scales
        raise ValueError(f"guidance_scale must be >= 0 and finite, got {found}")
    for low, high in intervals:
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must satisfy 0 <= first <= last <= 1, got {low} {high}")
    if not intervals:
        raise ValueError("guidance_interval must have two times, got none")


def check_steps(subject: Subject, steps: int, *, euler: bool) -> None:
    """Refuses a number or kind of steps that evaluates u where it was never trained, as far as the file says where it
    was."""
    if not euler and (wanted := post_trained_evaluations(subject.config)) not in (None, steps):
        reason = f"post-trained for samples of {wanted}"
        raise ValueError(f"--evaluations must be {wanted} for {subject.path}, {reason}, got {steps}")
    if (trained := subject.notes.trained) is None:
        return
    if euler and not trained.velocity:
        raise ValueError(f"--euler must be left out for {subject.path}, whose u was not trained at r = t, got --euler")
    if not euler and not trained.average:
        raise ValueError(f"--euler must be given for {subject.path}, whose u was trained at r = t alone, got none")
    if not euler and trained.one_step and steps > 1:
        rule = "1, or --euler be given," if trained.velocity else "1"
        reason = "whose averages u(z, r, t) were trained in one step alone"
        raise ValueError(f"--evaluations must be {rule} for {subject.path}, {reason}, got {steps}")


def check_new_noise(subject: Subject, given: float | None, *, euler: bool) -> None:
    """Refuses a share of new noise that the network, or its way of sampling, cannot have."""
    if given is not None and not 0 <= given <= 1:
        raise ValueError(f"--new-noise must lie in [0, 1], got {given}")
    if given and euler:
        raise ValueError(f"--new-noise must be 0 for Euler steps, got {given}")
    if given and (wanted := post_trained_evaluations(subject.config)):
        raise ValueError(f"--new-noise must be 0 for {subject.path}, post-trained for samples of {wanted}, got {given}")
    if not euler and given not in (None, 1) and only_to_data(subject):
        reason = "whose u was trained at r = 0 alone"
        raise ValueError(f"--new-noise must be 1 or left out for {subject.path}, {reason}, got {given}")


def only_to_data(subject: Subject) -> bool:
    return subject.notes.trained is not None and subject.notes.trained.ends_at_data


def method_of(subject: Subject, steps: int, *, euler: bool, new_noise: float | None) -> Callable[..., Array]:
    """How samples are made; `new_noise` as the flag of that name."""
    if euler:
        return mfx.sample_euler
    share = new_noise_of(subject, new_noise)
    return functools.partial(mfx.sample_consistency, new_noise=share) if share and steps > 1 else mfx.sample


def new_noise_of(subject: Subject, given: float | None) -> float:
    """The share of new noise: as given, or the default."""
    return float(only_to_data(subject)) if given is None else given


def post_trained_evaluations(about: dict[str, Any]) -> int | None:
    """Of weights by post_train.py: the equal steps in which the samples were made that it trained."""
    match about.get("post_training"):
        case [*_, {"evaluations": int(evaluations)}]:
            return evaluations
    return None


def check_guidance(
    subject: Subject, scales: Sequence[float], intervals: Sequence[Interval], *, euler: bool, untrained: bool
) -> None:
    """Checks guidance at sampling. If the network takes guidance as an input, refuses what was not drawn in training,
    unless `untrained`; Euler steps may have any interval. If not, refuses every interval, and scales other than 1
    unless u without a label was trained at the times that are sampled; warns if the notes do not say whether it was."""
    if subject.takes_guidance:
        # With Euler steps an interval decides whether a time is guided, and both are trained at all times r = t.
        _check_range(subject, scales, () if euler else intervals, untrained=untrained)
        return
    if untrained:
        raise ValueError(f"--untrained-guidance must be left out for {subject.path}, which takes no guidance")
    for low, high in intervals:
        if (low, high) != ALWAYS:
            rule = f"0 1 for {subject.path}, a network without guidance as an input"
            raise ValueError(f"--guidance-interval must be {rule}, got {low:g} {high:g}")
    if all(scale == 1 for scale in scales):
        return
    found, trained = ", ".join(f"{scale:g}" for scale in scales), subject.notes.trained
    if subject.labels is None:
        raise ValueError(f"--guidance-scale must be 1 for {subject.path}, without labels, got {found}")
    if trained is None:
        where = "at r = t" if euler else "at r < t"
        text = (
            f"{subject.path} does not say whether u without a label was trained {where}, which --guidance-scale needs"
        )
        print(f"warning: {text}", file=sys.stderr)
    elif not (trained.null_velocity or trained.null_average):
        raise ValueError(f"--guidance-scale must be 1 for {subject.path}, trained with labels alone, got {found}")
    elif not (euler or trained.null_average):
        rule = f"1, or --euler be given, for {subject.path}, whose u without a label was trained at r = t alone"
        rule += " (for guidance in one evaluation, train with it)"
        raise ValueError(f"--guidance-scale must be {rule}, got {found}")


def _check_range(subject: Subject, scales: Sequence[float], intervals: Sequence[Interval], *, untrained: bool) -> None:
    """Refuses guidance that a network, which takes it as an input, cannot take, or never took in training as far as
    that is known."""
    if min(scales) == 0:
        raise ValueError(f"--guidance-scale must be > 0 for {subject.path}, a network that takes it, got 0")
    trained = None if subject.notes.trained is None else subject.notes.trained.guidance
    if trained is None or untrained:
        return
    reason = f", as in the training of {subject.path} (or --untrained-guidance be given)"
    guidance_flags.check_drawn(trained, scales, intervals, ("--guidance-scale", "--guidance-interval"), reason)


def make_generator(
    subject: Subject,
    times: tuple[float, ...],
    *,
    seed: int,
    scale: float,
    interval: Interval,
    euler: bool,
    new_noise: float | None,
    **conditions: Any,
) -> mfx.Generator:
    """What makes the samples; `conditions` as for `mfx.Generator`."""
    field = guided = subject.field
    if subject.takes_guidance:
        guided = mfx.WithGuidance(field, scale, interval)
    elif scale != 1:
        guided = mfx.GuidedField(field, scale, jnp.asarray(subject.labels))
    return mfx.Generator(
        guided,
        jr.key(seed),
        subject.data_shape,
        times,
        method=method_of(subject, len(times) - 1, euler=euler, new_noise=new_noise),
        # Convolutions in loops are slow on CPUs; long programs compile for long.
        unroll=isinstance(field, mfx.UNet) and jax.default_backend() == "cpu" and len(times) <= 9,
        **conditions,
    )


@eqx.filter_jit
def decode(
    tokenizer: vae.Autoencoder, statistics: vae.LatentStatistics, z: Float[Array, "rows latent height width"]
) -> Float[Array, "rows colours _ _"]:
    """Images of latents as a field makes them."""
    return jax.vmap(lambda z: tokenizer.decode(statistics.restore(z)))(z)


def decoded(
    batches: Iterable[Float[Array, "_ *data"]], subject: Subject, size: int, devices: mfx.Parallelism
) -> Iterator[Float[Array, "_ *image"]]:
    """Latents decoded, `size` at once, which divides their number or is above it (the last is repeated then); pixels,
    without a tokenizer, as they are."""
    tokenizer, notes = subject.tokenizer, subject.notes.tokenizer
    for x in batches:
        if tokenizer is None or notes is None:
            yield x
            continue
        for start in range(0, len(x), size):
            rows = np.minimum(np.arange(start, start + size), len(x) - 1)
            yield decode(tokenizer, notes.statistics, jax.device_put(x[rows], devices.rows))
