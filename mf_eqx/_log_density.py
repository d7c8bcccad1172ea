r"""Exact densities of samples by average velocities, by the change of variables.

A sampler of n steps is a map from noise to data, $x = X(\epsilon)$. If it is injective, the density of its samples is

$$\log p(x) = \log N(\epsilon; 0, I) - \sum_{k=1}^{n} \log \Big| \det \Big( I - (t_k - r_k)\,
\frac{\partial u}{\partial z} (z_{t_k}, r_k, t_k) \Big) \Big|, \qquad z_r = z_t - (t - r)\, u(z_t, r, t) \quad (12).$$

The true average velocity has an injective map, the flow. A trained network may *fold*: several noises, and so several
terms of this kind, make one x, and the density is their sum,

$$p(x) = \sum_{\epsilon: X(\epsilon) = x} N(\epsilon; 0, I)\, |\det \partial X / \partial \epsilon|^{-1}.$$

Then the density along a single noise is too small: a lower bound. Where a fold turns the map over, the determinant
changes its sign; that is why the sign is returned.

Sources: FALCON: Few-step Accurate Likelihoods for Continuous Flows, Rehman et al., 2025, arXiv 2512.09914, which weighs
samples of such maps by these densities; Joint Distillation for Fast Likelihood Evaluation and Sampling in Flow-based
Models, Ai, He, Gu, Salakhutdinov, Kolter, Boffi, Simchowitz, 2025, arXiv 2512.02636, which instead learns the
determinants, as the average divergence along the flow.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from ._custom_types import Condition, Scalar, Time
from ._derivative import has_stopped_tangent, in_forward_mode
from ._engine_guards import refuse_custom_vjp, refuse_gradient, trace_and_check
from ._field import AbstractField
from ._sample import check_times, Evaluate, over_intervals, TimeGrid, with_condition


class SampleWithLogDensity(NamedTuple):
    r"""A sample with its density: `x`; `log_density` in nats; `orientation`, the sign of the determinant $\det \partial
    X / \partial \epsilon$: 1, -1 (the map turns space over there), or 0 (the density is infinite)."""

    x: Float[Array, "*data"]
    log_density: Scalar
    orientation: Scalar


def sample_with_log_density(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    times: TimeGrid = (1.0, 0.0),
    unroll: bool = False,
) -> SampleWithLogDensity:
    r"""One sample by average velocities, as `sample` makes it, with the logarithm of its density under the model,

    $$\log p(x) = \log N(\epsilon; 0, I) - \sum \log | \det(I - (t - r)\, \partial u / \partial z) |,$$

    a sum over the intervals of `times`.

    Data of d numbers cost d tangent passes in each step, whose results are held together, and a factorisation of a d x
    d matrix: this is for vectors of up to some hundreds of numbers. The Jacobian is taken by forward mode, so that
    `mf_eqx.exact.AverageVelocity` will do as the field.

    **Arguments:** as `sample`; `eps` is a draw of the standard normal distribution, or any other point of noise. If
    `times` does not begin at 1, the density is that of samples whose states at its first time are standard normal.

    **Returns:** a `SampleWithLogDensity`, in float32 or better. If the map of the field is injective, the density is
    exact up to rounding; if it folds, the true density is larger, since other noises make the same x. Different signs
    of `orientation` at different `eps`, with the same condition, prove that it folds; equal ones prove nothing. The
    density is that of samples with this condition.

    **Raises:** `ValueError` as `sample`, and if u is computed from z by a `jax.custom_vjp` function, such as a fused
    kernel that is not an `mf_eqx.nn.AbstractAttention`.
    """
    check_times(times)
    field = in_forward_mode(field)
    stopped = has_stopped_tangent(field)
    u, eps = with_condition(field, eps, condition)

    def step(state: SampleWithLogDensity, r: Time, t: Time) -> SampleWithLogDensity:
        z, log_density, orientation = state
        moved, jacobian = step_with_jacobian(u, z, r, t)
        sign, log_determinant = jnp.linalg.slogdet(refuse_gradient(jacobian, (moved, z)) if stopped else jacobian)
        return SampleWithLogDensity(moved, log_density - log_determinant, orientation * sign)

    noise = -jnp.sum(eps**2) / 2 - eps.size / 2 * jnp.log(2 * jnp.pi).astype(eps.dtype)
    start = SampleWithLogDensity(eps, noise, jnp.ones_like(noise))
    return over_intervals(step, start, times, eps.dtype, unroll)


def step_with_jacobian(
    u: Evaluate, z: Float[Array, "*data"], r: Time, t: Time
) -> tuple[Float[Array, "*data"], Float[Array, "size size"]]:
    r"""The state $z_r = z_t - (t - r) u(z_t, r, t)$, and $\partial z_r / \partial z_t$ of the flattened states."""

    def step(flat: Float[Array, " size"]) -> Float[Array, " size"]:
        state = flat.reshape(z.shape)
        return (state - (t - r) * u(state, r, t)).astype(z.dtype).reshape(-1)

    def differentiate(
        flat: Float[Array, " size"], tangent: Float[Array, " size"]
    ) -> tuple[Float[Array, " size"], Float[Array, " size"]]:
        return jax.jvp(step, (flat,), (tangent,))

    # `jax.jacfwd` in two parts: only the program of a single tangent says what has no forward mode.
    flat = z.reshape(-1)
    push = trace_and_check(differentiate, refuse_custom_vjp, flat, flat)
    moved, jacobian = jax.vmap(push, (None, 1), (None, 1))(flat, jnp.eye(flat.size, dtype=flat.dtype))
    return moved.reshape(z.shape), jacobian
