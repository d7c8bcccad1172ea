"""Toy data sets whose average velocity is known, and how a field is held against it: used by `toy_2d.py` and others.

A data set is a Gaussian mixture, so its velocity v is known in closed form and its average velocity u by integration.
A field is held against that truth, and its samples against the density.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, install_import_hook, Key
from toy_points import is_own, mixture_of_points, title_of

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx
    from mf_eqx import exact, metrics

STACKED = "eight_gaussians_64d"
DATA: dict[str, Callable[[], exact.GaussianMixture]] = {
    "eight_gaussians": exact.eight_gaussians,
    "three_gaussians": exact.three_gaussians,
    "two_moons": exact.two_moons,
    "checkerboard": exact.checkerboard,
    "sharp_checkerboard": lambda: exact.checkerboard(1 / 64, points=2048),
    "swiss_roll": exact.swiss_roll,
    "pinwheel": exact.pinwheel,
    "two_spirals": exact.two_spirals,
    STACKED: exact.eight_gaussians,
}
BLUR, POINTS = 0.05, 1024  # of a file of points
COPIES = 32  # of the mixture in the stacked data set: 64 dimensions
EVALUATIONS = (1, 2, 4, 8)
EDGES = tuple(np.linspace(0, 1, 9).tolist())
PATH = mfx.LinearInterpolant()
JUDGED_PAIRS = mfx.TimePairs(mfx.UniformTimes())

Distribution: TypeAlias = exact.GaussianMixture | exact.StackedMixture


class JudgedKeys(NamedTuple):
    """Of everything that is judged: the same for all methods and seeds."""

    truth: Key[Array, ""]
    data: Key[Array, ""]
    floor: Key[Array, ""]
    noise: Key[Array, ""]
    slices: Key[Array, ""]
    large: Key[Array, ""]
    renewal: Key[Array, ""]


def judged_keys() -> JudgedKeys:
    """Made when they are needed: a script that is imported must not touch a device."""
    return JudgedKeys(*jr.split(jr.key(2**31 - 1), 7))


def copies_of(name: str) -> int:
    return COPIES if name == STACKED else 1


def mixture_of(name: str, blur: float = BLUR, points: int = POINTS) -> exact.GaussianMixture:
    """The mixture of a data set, or of a file of points (see `toy_points.py`)."""
    return mixture_of_points(name, blur, points) if is_own(name) else DATA[name]()


def distribution_of(name: str, blur: float = BLUR, points: int = POINTS) -> Distribution:
    mixture, copies = mixture_of(name, blur, points), copies_of(name)
    return exact.StackedMixture(mixture, copies) if copies > 1 else mixture


class Cell(NamedTuple):
    """What is trained and judged: `part` of all steps."""

    data: str
    method: str
    seed: int
    settings: str = "common"
    part: float = 1.0


class Instantaneous(mfx.AbstractField):
    """What Flow Matching knows, u(z, r, t) = v(z, t): sampling by it is Euler's method."""

    field: mfx.AbstractField

    def __call__(self, z, r, t, condition=None, *, key=None):
        return self.field(z, t, t, condition, key=key)


class Problem(NamedTuple):
    """A data set with everything that methods are held against."""

    name: str
    mixture: exact.GaussianMixture
    distribution: Distribution
    truth: exact.AverageVelocity
    known: metrics.FieldTruth
    data: Float[Array, "samples dim"]
    limit: float


def make_problem(name: str, *, samples: int, rows: int, blur: float = BLUR, points: int = POINTS) -> Problem:
    """The truth at `rows` points, and `samples` of the data; `blur` and `points` of a file of points."""
    mixture, distribution = mixture_of(name, blur, points), distribution_of(name, blur, points)
    # The best that float32 can do, and a thousand times less than the error of any network here.
    truth = exact.AverageVelocity(exact.MarginalVelocity(distribution, PATH), rtol=1e-5, atol=1e-5)
    known = metrics.field_truth(truth, distribution.sample, PATH, JUDGED_PAIRS, rows, key=judged_keys().truth)
    data = exact.draw(distribution, samples, judged_keys().data)
    limit = 1.05 * float(jnp.max(jnp.abs(mixture.mean)) + 3 * jnp.max(mixture.std))
    return Problem(title_of(name), mixture, distribution, truth, known, data, limit)


@eqx.filter_jit
def generate(
    field: mfx.AbstractField, eps: Float[Array, "rows dim"], number: int, new_noise: float = 0.0
) -> Float[Array, "rows dim"]:
    """Samples at `number` evaluations; `new_noise` as for `sample_consistency`."""
    # An exact field integrates: in one vmap every row would wait for the slowest.
    rows = 50 if isinstance(field, exact.AverageVelocity) else len(eps)
    times, keys = mfx.uniform_times(number), jr.split(judged_keys().renewal, len(eps))

    def one(row: tuple[Float[Array, " dim"], Key[Array, ""]]) -> Float[Array, " dim"]:
        eps, key = row
        if new_noise:
            return mfx.sample_consistency(field, eps, times=times, key=key, new_noise=new_noise)
        return mfx.sample(field, eps, times=times)

    return jax.lax.map(one, (eps, keys), batch_size=min(rows, len(eps)))


def samples_of(problem: Problem, field: mfx.AbstractField, new_noise: float = 0.0) -> list[Float[Array, "rows dim"]]:
    """Samples at each number of evaluations, from the same noise for every field."""
    eps = jr.normal(judged_keys().noise, problem.data.shape)
    return [generate(field, eps, number, new_noise) for number in EVALUATIONS]


class Quality(NamedTuple):
    """How near samples are to the data; all but the coverage are 0 at best, up to the noise of finite samples. NaN for
    samples that are not finite, of a training that diverged."""

    sliced_wasserstein: float
    energy_distance: float
    mode_coverage: float
    total_variation: float


def quality(problem: Problem, x: Float[Array, "rows dim"]) -> Quality:
    if not np.isfinite(x).all():
        return Quality(*[math.nan] * len(Quality._fields))
    mixture, limit, pairs = problem.mixture, problem.limit, x.reshape(-1, 2)  # copies are samples of one mixture
    return Quality(
        float(metrics.sliced_wasserstein(x, problem.data, key=judged_keys().slices)),
        float(metrics.energy_distance(x, problem.data)),
        float(metrics.mode_coverage(pairs, mixture.mean, mixture.std, mixture.weight, mixture.label)),
        float(metrics.total_variation(pairs, mixture.log_density, low=(-limit, -limit), high=(limit, limit))),
    )


def large_distance(problem: Problem, x: Float[Array, "rows dim"]) -> float:
    """Sliced W2 to as many samples of the data."""
    if not np.isfinite(x).all():
        return math.nan
    data = exact.draw(problem.distribution, len(x), judged_keys().large)
    return float(metrics.sliced_wasserstein(x, data, key=judged_keys().slices))


class Density(NamedTuple):
    """How far the density of samples of one evaluation is from that of the data: as `metrics.ReverseKullbackLeibler`,
    and the share of samples where the map from noise to data turns space over. NaN where quality is."""

    divergence: float
    standard_error: float
    effective_share: float
    mean_weight: float
    turned_over: float


def density(problem: Problem, field: mfx.AbstractField) -> Density:
    eps = jr.normal(judged_keys().noise, problem.data.shape)
    found, true, orientation = log_densities(field, problem.distribution, eps)
    if not (np.isfinite(found).all() and np.isfinite(true).all()):
        return Density(*[math.nan] * len(Density._fields))
    return Density(*metrics.reverse_kullback_leibler(found, true), float(np.mean(np.asarray(orientation) < 0)))


@eqx.filter_jit
def log_densities(
    field: mfx.AbstractField, distribution: Distribution, eps: Float[Array, "rows dim"]
) -> tuple[Float[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """Of samples of one evaluation: the log-density of the model, that of the data, and the orientation of the map."""

    def one(eps: Float[Array, " dim"]) -> tuple[Float[Array, ""], ...]:
        x, log_density, orientation = mfx.sample_with_log_density(field, eps)
        return log_density, distribution.log_density(x), orientation

    # As many tangents as numbers are held at a time; an exact field integrates: see `generate`.
    rows = 50 if isinstance(field, exact.AverageVelocity) else max(8192 // eps.shape[1], 1)
    return jax.lax.map(one, eps, batch_size=min(rows, len(eps)))


def judge(problem: Problem, field: mfx.AbstractField, large_samples: int, new_noise: float = 0.0) -> dict[str, Any]:
    """How near a field is to the truth, and its samples to the data, as JSON holds it. `new_noise` as for `generate`.

    `overall`, `diagonal`, `one_step` are E|u - u*|² / E|u*|² over uniform pairs (r, t), at r = t, and at (0, 1);
    `identity`, `semigroup` the root-mean-square residuals of the equations, relative to the velocity.
    """
    errors, rows = metrics.field_errors(field, problem.known, edges=EDGES), problem.known.overall
    identity = metrics.relative_identity_residual(
        mfx.MeanFlow(), field, rows.z, problem.known.diagonal.u, rows.r, rows.t
    )
    judged = [quality(problem, x) for x in samples_of(problem, field, new_noise)]
    large = None
    if not isinstance(field, exact.AverageVelocity):  # it would integrate for minutes
        eps = jr.normal(judged_keys().noise, (large_samples, problem.data.shape[1]))
        large = large_distance(problem, generate(field, eps, 1))
    return {
        "overall": float(errors.overall.value),
        "diagonal": float(errors.diagonal.value),
        "one_step": float(errors.one_step.value),
        "identity": float(identity),
        "semigroup": float(metrics.relative_semigroup_residual(field, rows.z, rows.r, rows.t)),
        "large_sliced_wasserstein": large,
        "density": density(problem, field)._asdict(),
        "quality": [{"evaluations": n, **q._asdict()} for n, q in zip(EVALUATIONS, judged, strict=True)],
        "error_by_cell": np.asarray(errors.cells.value).tolist(),
    }


def floor(problem: Problem, large_samples: int) -> dict[str, Any]:
    """What samples of the data themselves score, the mean of five draws, in the form of `judge`."""
    keys = jr.split(judged_keys().floor, 5)
    draws = [quality(problem, exact.draw(problem.distribution, len(problem.data), key)) for key in keys]
    large = large_distance(problem, exact.draw(problem.distribution, large_samples, judged_keys().floor))
    mean = dict(zip(Quality._fields, np.mean(draws, axis=0).tolist(), strict=True))
    return {"large_sliced_wasserstein": large, "quality": [{"evaluations": 1, **mean}]}
