"""Images that are seen in part: what is seen of them, ways to restore them, and figures of what is restored. Images are
in [-1, 1]; `inverse.py` compares the ways."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

import mf_eqx as mfx
from mf_eqx import metrics

SEED = 2**31 - 6
"""Of the noise of states and of observations."""


class Images(NamedTuple):
    """Images, and their labels if the network takes labels."""

    x: Float[np.ndarray, "rows channels height width"]
    label: Int[np.ndarray, " rows"] | None

    def some(self, count: int) -> "Images":
        """`count` of them, evenly spaced."""
        rows = np.arange(count) * len(self.x) // count
        return Images(self.x[rows], None if self.label is None else self.label[rows])


class Problem(NamedTuple):
    """What is seen of an image: A x + noise, where the rows of A are orthonormal."""

    name: str
    projection: Float[np.ndarray, "pixels pixels"]
    """A^T A: it takes from an image what A does not see."""
    noise: float = 0.0

    def observe(self, x: Float[np.ndarray, "rows *image"]) -> Float[np.ndarray, "rows *image"]:
        """A^T y, which for the reward is as good as y, and is an image."""
        noisy = x + self.noise * np.random.default_rng(SEED).standard_normal(x.shape)
        return (noisy.reshape(len(x), -1) @ self.projection).reshape(x.shape).astype(np.float32)


def problems(shape: tuple[int, ...], noise: float) -> list[Problem]:
    pixel, (_, height, width) = np.arange(np.prod(shape)), shape
    seen = (pixel // width % height < height // 2).astype(float)
    square = pixel // width // 2 * width + pixel % width // 2
    return [
        Problem("lower half hidden", np.diag(seen)),
        Problem("2 x 2 pixels in one", (square[:, None] == square) / 4),
        Problem(f"noise of {noise:g}", np.eye(pixel.size), noise),
    ]


class Way(NamedTuple):
    """By which look-ahead an image is restored, and in which steps."""

    look_ahead: str
    through_field: bool
    straight: bool
    evaluations: int

    @property
    def name(self) -> str:
        return f"{self.look_ahead}{'' if self.straight else ' along the flow'}, {'EJ'[self.through_field]}"

    @property
    def steps(self) -> int:
        return self.evaluations if self.straight else (self.evaluations + 1) // 2


FLOW_MATCHING, FLOW_MAP = "v(z, t)", "u(z, 0, t)"


def ways(evaluations: tuple[int, ...]) -> list[Way]:
    """Steps along the flow take an odd number of evaluations; a single one is straight."""
    kinds = [(FLOW_MATCHING, True), (FLOW_MAP, True), (FLOW_MAP, False)]
    found = [
        Way(look_ahead, through_field, straight, number if straight else number - 1 + number % 2)
        for through_field in (False, True)
        for look_ahead, straight in kinds
        for number in evaluations
    ]
    return [*dict.fromkeys(way for way in found if way.straight or way.evaluations > 1)]


class Instantaneous(mfx.AbstractField):
    """What a network of Flow Matching knows: v(z, t), whatever r."""

    field: mfx.AbstractField

    def __call__(self, z: Array, r: Array, t: Array, condition: Any = None, *, key: Any = None) -> Array:
        return mfx.instantaneous_velocity(self.field, z, t, condition, key=key)


@eqx.filter_jit
def restore(
    field: mfx.AbstractField,
    way: Way,
    projection: Float[Array, "pixels pixels"],
    observed: Float[Array, "rows *image"],
    label: Int[Array, " rows"] | None,
    eps: Float[Array, "samples rows *image"],
    scale: Float[Array, ""],
) -> Float[Array, "samples rows *image"]:
    unroll = isinstance(field, mfx.UNet)  # whose convolutions are slow in loops on CPUs
    field = Instantaneous(field) if way.look_ahead == FLOW_MATCHING else field

    def one(eps: Array, observed: Array, label: Array | None) -> Array:
        def reward(x: Array) -> Array:
            return -jnp.sum((observed.ravel() - projection @ x.ravel()) ** 2) / 2

        how = {"times": mfx.uniform_times(way.steps), "through_field": way.through_field, "straight": way.straight}
        return mfx.sample_with_reward(field, eps, label, reward=reward, scale=scale, unroll=unroll, **how)

    each_row = jax.vmap(one, in_axes=(0, 0, None if label is None else 0))
    return jax.vmap(each_row, in_axes=(0, None, None))(eps, observed, label)


class Figures(NamedTuple):
    """Of restorations, in the unit of the images, which are in [-1, 1].

    **Arguments:** `observed` root mean square error of what was seen; `psnr` in dB, and `spread` between restorations
    of one image, of what was not seen (of all, where it was seen with noise); `frechet` distance in pixels to images of
    the training, of one restoration of each image.
    """

    observed: float
    psnr: float
    spread: float
    frechet: float


class Judge(NamedTuple):
    """Images, what is seen of them, and figures of their restorations."""

    problem: Problem
    images: Images
    observed: Float[np.ndarray, "rows *image"]
    reference: Float[np.ndarray, "more pixels"]

    def restored(
        self, field: mfx.AbstractField, way: Way, scale: float, samples: int
    ) -> Float[np.ndarray, "samples rows *image"]:
        """The images, each from `samples` noises that are the same for every way and scale."""
        label = None if self.images.label is None else jnp.asarray(self.images.label)
        projection = jnp.asarray(self.problem.projection, jnp.float32)
        eps = jr.normal(jr.key(SEED), (samples, *self.images.x.shape))
        made = restore(field, way, projection, jnp.asarray(self.observed), label, eps, jnp.float32(scale))
        return np.clip(made, -1, 1)

    def figures(self, x: Float[np.ndarray, "samples rows *image"]) -> Figures:
        made = np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
        truth, observed = (each.reshape(len(each), -1) for each in (self.images.x, self.observed))
        seen = self.problem.projection
        judged = seen if self.problem.noise else np.eye(len(seen)) - seen
        off, wrong = (np.sum(part**2, axis=-1).mean() for part in (made @ seen - observed, (made - truth) @ judged))
        variance = np.sum(np.var(made @ judged, axis=0, ddof=1), axis=-1).mean() if len(made) > 1 else 0.0
        with np.errstate(divide="ignore"):  # of the truth itself
            psnr = 10 * np.log10(4 * np.trace(judged) / wrong)
        return Figures(
            observed=float(off / np.trace(seen)) ** 0.5,
            psnr=float(psnr),
            spread=float(variance / np.trace(judged)) ** 0.5,
            frechet=float(np.mean([metrics.frechet_distance(each, self.reference) for each in made])),
        )
