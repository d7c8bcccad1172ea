r"""Drifting: generated samples move to where data are, and away from each other.

$$L = \big|\phi(x_i) - \mathrm{sg}(\phi(x_i) + V_i)\big|^2, \qquad
V_i = \sum_{j, k} a^+_{ij}\, a^-_{ik}\, (y^+_j - y^-_k),$$

with features $y^+$ of data and $y^-$ of the other generated samples. The affinities $a$ come from one matrix over all
of these, from the kernel $\exp(-|\phi(x_i) - y_j| / \tau)$: the geometric mean of its softmax over j, the samples that
act on i, and over i, the samples that j acts on. As $V$ changes its sign when data and generated samples are exchanged,
its mean is zero when both have the same distribution, up to terms of order 1 / rows, since a sample does not act on
itself.

Distances are divided by their mean, so that $\tau$ has no unit and features no scale, and the force of each $\tau$ by
its root mean square, before the forces are added. So the loss does not fall during training; watch `drift`, the size of
the forces before that division, which does. The noise of a finite batch does not fall either: let the learning rate
decay.

Source: Generative Modeling via Drifting, Deng, Li, Li, Du, He, 2026, arXiv 2602.04770 (Alg. 2, App. A.6).
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._batch import Batch
from .._custom_types import at_least_float32, Condition, Scalar
from .._mean import mean_of, Metrics
from .._validate import as_tuple, check_positive
from .population import product
from .sample_objective import AbstractSampleLoss


class Drifting(AbstractSampleLoss):
    r"""The drift of generated samples towards the data of the batch, for a `SampleObjective`.

    Samples and data act on each other only where their conditions have the same integers, so that labels are learnt
    one by one. The more rows of a label a batch has, the better: with a single one its sample does not move.

    **Arguments:**

    - `features`: $\phi$, the function from one sample to a vector, by default the flattened sample.
    - `scales`: $\tau$, in units of the mean distance.

    **Metrics:** `drift`, the root mean square of V in units of the mean distance, averaged over the scales.

    **Raises:** `ValueError` unless there is at least one scale and all are > 0.
    """

    features: Callable[[Float[Array, "*data"]], Float[Array, " features"]] = jnp.ravel
    scales: tuple[float, ...] = eqx.field(
        default=(0.02, 0.05, 0.2), converter=functools.partial(as_tuple, "scales", example=(0.02, 0.05, 0.2))
    )

    def __check_init__(self):
        if not self.scales:
            raise ValueError("scales must be at least one, got none")
        check_positive("scales", self.scales)

    def init(self) -> None:
        return None

    def batches_to_fill(self, rows: int) -> int:
        return 0

    def __call__(self, x: Float[Array, "rows *data"], batch: Batch, state: None) -> tuple[Scalar, Metrics, None]:
        own, data = (at_least_float32(jax.vmap(self.features)(values)) for values in (x, batch.x))
        positives, negatives, unit = _normalised(jax.lax.stop_gradient((data, own)), batch.condition)
        forces, sizes = [], []
        for scale in self.scales:
            force = drift(negatives, positives, negatives, scale, *acting_on(batch.condition, len(x)))
            sizes.append(jnp.sqrt(jnp.mean(force**2)))
            forces.append(force / jnp.maximum(sizes[-1], jnp.finfo(force.dtype).tiny))
        errors = jnp.mean((own / unit - (negatives + sum(forces))) ** 2, axis=1)
        return jnp.mean(errors), {"drift": mean_of(jnp.stack(sizes))}, None


def acting_on(condition: Condition, rows: int) -> tuple[Bool[Array, "rows rows"], Bool[Array, "rows rows"]]:
    """Which data act on which sample, and which other samples do: those with the same integers as condition."""
    same = jnp.ones((rows, rows), bool)
    for leaf in jax.tree.leaves(condition):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            values = jnp.reshape(leaf, (rows, -1))
            same &= jnp.all(values[:, None] == values[None], axis=-1)
    return same, same & ~jnp.eye(rows, dtype=bool)


def drift(
    y: Float[Array, "rows features"],
    positives: Float[Array, "data features"],
    negatives: Float[Array, "samples features"],
    scale: float,
    positive_acts: Bool[Array, "rows data"],
    negative_acts: Bool[Array, "rows samples"],
) -> Float[Array, "rows features"]:
    r"""V at `y`.

    **Arguments:** features `y`, `positives` $y^+$ and `negatives` $y^-$, scaled so that their mean distance is
    $\sqrt{D}$ for D features; `scale` $\tau$; which of the positives and negatives act on which row.
    """
    others, acts = jnp.concatenate([positives, negatives]), jnp.concatenate([positive_acts, negative_acts], axis=1)
    logits = -distances(y, others) / (scale * y.shape[1] ** 0.5)
    affinity = jnp.sqrt(_softmax(logits, acts, axis=1) * _softmax(logits, acts, axis=0))
    attraction, repulsion = jnp.split(affinity, [len(positives)], axis=1)
    towards = product(attraction, positives) * jnp.sum(repulsion, axis=1, keepdims=True)
    away = product(repulsion, negatives) * jnp.sum(attraction, axis=1, keepdims=True)
    return towards - away


def distances(a: Float[Array, "n features"], b: Float[Array, "m features"]) -> Float[Array, "n m"]:
    """The Euclidean distances of all pairs, of features that are centred to lose no digits."""
    centre = jnp.mean(b, axis=0)
    a, b = a - centre, b - centre
    squares = jnp.sum(a**2, axis=1)[:, None] - 2 * product(a, b.T) + jnp.sum(b**2, axis=1)
    return jnp.sqrt(jnp.maximum(squares, 0))


def _normalised(
    features: tuple[Float[Array, "rows features"], Float[Array, "rows features"]], condition: Condition
) -> tuple[Float[Array, "rows features"], Float[Array, "rows features"], Float[Array, ""]]:
    r"""Features of data and of samples, both divided by one unit, and the unit. It gives those that act on each other
    the mean distance $\sqrt{D}$ for D features. If these differ by no more than rounding, it is infinite, and nothing
    moves."""
    data, own = features
    acts = jnp.concatenate(acting_on(condition, len(own)), axis=1)
    found = distances(own, jnp.concatenate([data, own]))
    mean = jnp.sum(jnp.where(acts, found, 0)) / jnp.sum(acts)
    rounding = 10 * jnp.finfo(own.dtype).eps * jnp.sqrt(jnp.mean(jnp.sum(own**2, axis=1)))
    unit = jnp.where(mean <= rounding, jnp.inf, mean / own.shape[1] ** 0.5)
    return data / unit, own / unit, unit


def _softmax(logits: Float[Array, "n m"], counts: Bool[Array, "n m"], axis: int) -> Float[Array, "n m"]:
    """The softmax along `axis` over the entries that `counts`; 0 elsewhere, also where none counts."""
    highest = jnp.max(jnp.where(counts, logits, -jnp.inf), axis=axis, keepdims=True)
    powers = jnp.where(counts, jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0)), 0)
    return powers / jnp.maximum(jnp.sum(powers, axis=axis, keepdims=True), jnp.finfo(logits.dtype).tiny)
