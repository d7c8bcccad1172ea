r"""Bias and variance of MeanFlow's gradient for every tangent b v + (1 - b) u(z, t, t), against the exact field.

The loss of a row with r < t is |residual|² with the residual u - sg(v - (t - r) du/dt). Its gradient is
2 J^T residual, where J is the derivative of u by the parameters. It is linear in the tangent, as the residual is:

    g_b = b g_1 + (1 - b) g_0,

whatever velocity v is given as target and in the tangent. So two gradients of each row show those of all b:

    bias        E g_b - g* = (1 - b) E[g_0 - g_1] = (1 - b) E[2 (t - r) J^T du/dz (u(z, t, t) - v*)]
    variance    V_b = V_1 + 2 (1 - b) C + (1 - b)² D    of one row: the traces of the covariances of g_1 with itself,
                                                        of g_1 with g_0 - g_1, and of g_0 - g_1 with itself
    best b      1 - b = -C / (batch |E[g_0 - g_1]|² + D), which minimises |bias|² + V_b / batch

Given z, r and t, g_b is linear in v, so its expectation is the same with the marginal velocity v* in place of v, where
it has less noise. So g* = E g_1 and the bias are measured with v*, on the same rows.

    rows = draw_rows(objective, distribution, truth, number, key)
    found = moments(*gradients(field, rows))
    figures(found, CONDITIONAL, b)
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

import mf_eqx as mfx
from mf_eqx import exact

CONDITIONAL, STABLE, MARGINAL = range(3)
"""The velocities that are given: the conditional one, that from references, the exact marginal one."""
KINDS = 7
"""The gradients that are measured: g_1 and g_0 with each given velocity, and that of |u - u*|²."""
DESCENT = np.eye(KINDS)[-1]
GROUPS = 16
"""Groups of rows: products of different groups have no bias, and their spread says how large the errors are."""
PER_PRODUCT = 8
"""Products of a row's gradients with each other are computed for one row in so many, since they take ten times as long
as the mean gradient."""


class Rows(NamedTuple):
    """Rows with r < t as an objective draws them; u the exact average velocity, v the given velocities."""

    z: Float[Array, "*rows dim"]
    r: Float[Array, "*rows"]
    t: Float[Array, "*rows"]
    u: Float[Array, "*rows dim"]
    v: Float[Array, "*rows 3 dim"]


@eqx.filter_jit
def draw_rows(
    objective: mfx.Objective,
    distribution: exact.AbstractDistribution,
    truth: exact.AverageVelocity,
    number: int,
    key: Key[Array, ""],
) -> Rows:
    """Independent rows. Each draws references of its own, while the rows of a training step share theirs: with
    references, the variance of one row divided by their number is not that of a step."""
    path, stable_target = objective.interpolant, objective.stable_target
    assert stable_target is not None

    def draw(key: Key[Array, ""]) -> Rows:
        x_key, eps_key, times_key, references_key = jr.split(key, 4)
        x = distribution.sample(key=x_key)
        eps = jr.normal(eps_key, x.shape, x.dtype)
        r, t = (jnp.asarray(time, x.dtype) for time in objective.time_pairs(key=times_key))
        z, v = path.state_and_velocity(x, eps, t)
        stable = stable_target.velocity(path, x, eps, t, key=references_key)
        return Rows(z, r, t, truth(z, r, t), jnp.stack([v, stable, truth(z, t, t)]))

    return jax.lax.map(draw, jr.split(key, number), batch_size=50)


@eqx.filter_jit
def gradients(
    field: mfx.AbstractField, rows: Rows
) -> tuple[Float[Array, "groups kinds parameters"], Float[Array, "groups kinds kinds"]]:
    """The mean gradient of each group and kind, and the mean products of the gradients of one row with each other.

    **Arguments:** `field`; `rows`, a multiple of `GROUPS`.
    """
    parameters, rest = eqx.partition(field, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(parameters)

    def u(vector: Float[Array, " parameters"], row: Rows) -> Float[Array, " dim"]:
        return eqx.combine(unravel(vector), rest)(row.z, row.r, row.t)

    def twice_residuals(row: Rows) -> Float[Array, "kinds dim"]:
        given, tangents = [mfx.Row(row.z, v, row.r, row.t) for v in row.v], (mfx.MeanFlow(), mfx.ImprovedMeanFlow())
        residuals = [tangent.residual(field, row) for row in given for tangent in tangents]
        return 2 * jnp.stack([*residuals, u(vector, row) - row.u])

    def kernel(row: Rows) -> Float[Array, "dim dim"]:
        jacobian = jax.jacrev(u)(vector, row)
        return jacobian @ jacobian.T

    def of_group(rows: Rows) -> tuple[Float[Array, "kinds parameters"], Float[Array, "kinds kinds"]]:
        w = jax.vmap(twice_residuals)(rows)
        _, pull = jax.vjp(lambda vector: jax.vmap(u, (None, 0))(vector, rows), vector)
        few = jax.tree.map(lambda leaf: leaf[::PER_PRODUCT], (w, rows))
        kernels = jax.lax.map(kernel, few[1], batch_size=8)
        products = jnp.einsum("nkd,nde,nle->kl", few[0], kernels, few[0]) / len(kernels)
        return jax.vmap(lambda w: pull(w)[0], in_axes=1)(w) / len(w), products

    with jax.default_matmul_precision("highest"):  # small differences of large numbers follow
        return jax.lax.map(of_group, jax.tree.map(lambda leaf: leaf.reshape(GROUPS, -1, *leaf.shape[1:]), rows))


class Moments(NamedTuple):
    """Moments of the gradients of each two kinds. The first entry is from all groups of rows, each other one from all
    groups but one.

    **Arguments:** `inner` products of the expected gradients; `covariance` of one row, the trace.
    """

    inner: Float[np.ndarray, "parts kinds kinds"]
    covariance: Float[np.ndarray, "parts kinds kinds"]


def moments(means: Float[Array, "groups kinds parameters"], products: Float[Array, "groups kinds kinds"]) -> Moments:
    """The moments without the bias that squares of noisy means would have."""
    parts = np.vstack([np.ones(GROUPS), 1 - np.eye(GROUPS)])
    number, groups = parts.sum(1)[:, None, None], np.asarray(means, np.float64)

    def total(values: Float[np.ndarray, "groups ..."]) -> Float[np.ndarray, "parts ..."]:
        return np.einsum("jg,gkl->jkl", parts, values)

    together = total(groups)
    of_different = together @ together.swapaxes(1, 2) - total(groups @ groups.swapaxes(1, 2))
    inner = of_different / (number * (number - 1))
    return Moments(inner, total(np.asarray(products, np.float64)) / number - inner)


def gradient(velocity: int, b: float) -> Float[np.ndarray, " kinds"]:
    """g_b with a given velocity, as a sum over the kinds that were measured."""
    weights = np.zeros(KINDS)
    weights[2 * velocity : 2 * velocity + 2] = b, 1 - b
    return weights


def product(
    matrices: Float[np.ndarray, "parts kinds kinds"], a: Float[np.ndarray, " kinds"], b: Float[np.ndarray, " kinds"]
) -> Float[np.ndarray, " parts"]:
    return np.einsum("k,jkl,l->j", a, matrices, b)


def figures(found: Moments, velocity: int, b: float) -> dict[str, Float[np.ndarray, " parts"]]:
    """Figures of g_b: bias in units of |g*|, variance of one row in units of |g*|² and of that at b = 1, the batch at
    which |bias|² equals variance / batch, cosines of E g_b with g* and with the gradient of E|u - u*|²."""
    true, mean, given = gradient(MARGINAL, 1), gradient(MARGINAL, b), gradient(velocity, b)
    square = product(found.inner, true, true)
    bias = np.maximum(product(found.inner, mean - true, mean - true), 0)
    variance = product(found.covariance, given, given)
    at_one = product(found.covariance, gradient(velocity, 1), gradient(velocity, 1))

    def cosine(a: Float[np.ndarray, " kinds"]) -> Float[np.ndarray, " parts"]:
        sizes = product(found.inner, mean, mean) * product(found.inner, a, a)
        return product(found.inner, mean, a) / np.sqrt(sizes)

    with np.errstate(divide="ignore", invalid="ignore"):  # no bias at b = 1; noise can make a square negative
        return {
            "bias": np.sqrt(bias / square),
            "variance": variance / square,
            "of that at b = 1": variance / at_one,
            "equal at batch": variance / bias,
            "cosine with g*": cosine(true),
            "with descent": cosine(DESCENT),
        }


def squared_error(found: Moments, velocity: int, b: float, batch: float) -> float:
    """|bias|² + variance / batch in units of that at b = 1."""
    bias, given = gradient(MARGINAL, b) - gradient(MARGINAL, 1), gradient(velocity, b)
    at_one = gradient(velocity, 1)
    error = np.maximum(product(found.inner, bias, bias), 0) + product(found.covariance, given, given) / batch
    return float((error / product(found.covariance, at_one, at_one) * batch)[0])


def best_tangent(found: Moments, velocity: int, batch: float) -> Float[np.ndarray, " parts"]:
    """The b in [0, 1] with the least mean squared error."""
    change, bias = (gradient(given, 0) - gradient(given, 1) for given in (velocity, MARGINAL))
    curvature = batch * np.maximum(product(found.inner, bias, bias), 0) + product(found.covariance, change, change)
    with np.errstate(invalid="ignore"):  # a field that does not depend on z has the same gradient at every b
        return 1 - np.clip(-product(found.covariance, gradient(velocity, 1), change) / curvature, 0, 1)


def with_error(values: Float[np.ndarray, " parts"]) -> tuple[float, float]:
    """The value from all groups and its standard error (jackknife)."""
    with np.errstate(invalid="ignore"):
        return float(values[0]), math.sqrt((GROUPS - 1) * np.var(values[1:]))
