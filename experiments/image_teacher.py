"""A trained network of Flow Matching as a teacher: the velocity that others learn from it, and where its flow leads."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

import mf_eqx as mfx
from mf_eqx import checkpoint, exact, metrics

ROWS, SEED, AT_ONCE = 200, 2**31 - 3, 50
"""Rows of noise from which the flow is followed, their seed, and how many are followed at once."""
TOLERANCE = 1e-5
"""Of the solver, relative and absolute; float32 allows no less than 1e-6."""


class Teacher:
    """The network in a file of weights.

    **Arguments:** `path` of the file; `scale` of its guidance, 1 for none; `shape` and `labels` of the images.

    **Attributes:** `field` the network; `velocity` the field whose u(z, t, t) is learnt, guided if scale is not 1;
    `digest` of file and scale.

    **Raises:** `OSError` or `ValueError` for a file of something else, of another shape or number of labels, or of a
    network that does not know the velocity that is asked for.
    """

    def __init__(self, path: str, scale: float, shape: tuple[int, ...], labels: int | None):
        weights = checkpoint.read_weights(path)
        self.field: Any = weights.fill(weights.make_network)
        network = weights.network or {}
        found = getattr(self.field, "data_shape", None), network.get("labels")
        if found != (shape, labels):
            raise ValueError(f"teacher must be a network of shape {shape} and labels {labels}, got {found} in {path}")
        if network.get("guidance"):
            raise ValueError(f"teacher must take no guidance as an input, got {path}")
        trained = None if weights.notes is None else weights.notes.trained
        if trained is not None and not trained.velocity:
            raise ValueError(f"teacher must have learnt u(z, t, t), got {path}, which has not")
        if scale != 1 and (labels is None or (trained is not None and not trained.null_velocity)):
            raise ValueError(f"teacher_scale must be 1 for {path}, trained with labels alone or without, got {scale}")
        self.scale, self.labels = scale, labels
        self.velocity = self.guided(self.field)
        self.digest = hashlib.sha256(Path(path).read_bytes() + repr(float(scale)).encode()).hexdigest()

    def guided(self, field: mfx.AbstractField) -> mfx.AbstractField:
        return field if self.scale == 1 else mfx.GuidedField(field, self.scale, self.labels)

    def sample(self, field: mfx.AbstractField, eps: Array, condition: Any, **how: Any) -> Array:
        """A sample by Euler steps along the guided velocity, as a method of `mf_eqx.Generator` for the network."""
        return mfx.sample_euler(self.guided(field), eps, condition, **how)

    @functools.cached_property
    def _known(self) -> tuple[Float[Array, "rows *data"], Int[Array, " rows"] | None, Float[Array, "rows *data"]]:
        """Noise, labels, and the average of the velocity from there to the data."""
        eps = jr.normal(jr.key(SEED), (ROWS, *self.field.data_shape))
        label = None if self.labels is None else jnp.arange(ROWS, dtype=jnp.int32) % self.labels
        flow = exact.AverageVelocity(self.velocity, rtol=TOLERANCE, atol=TOLERANCE)

        @eqx.filter_jit
        def follow(flow: exact.AverageVelocity, eps: Array, label: Array | None) -> Array:
            return jax.lax.map(lambda row: flow(row[0], 0.0, 1.0, row[1]), (eps, label), batch_size=AT_ONCE)

        return eps, label, follow(flow, eps, label)

    def error(self, field: mfx.AbstractField) -> float:
        """The relative error E|u - u*|^2 / E|u*|^2 of u(eps, 0, 1), with u* the average velocity of the teacher's
        flow."""
        eps, label, u = self._known
        return float(metrics.relative_error(field, u, eps, jnp.zeros(ROWS), jnp.ones(ROWS), label).value)
