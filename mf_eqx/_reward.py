r"""Sampling towards a reward, or an observation, by the look-ahead of a flow map.

An average velocity says at any time where a state will end: at the look-ahead $\hat x$. There the reward R and its
gradient are known, and each step is bent towards more of it:

$$\hat x(z) = z - t\, u(z, 0, t), \qquad z_r = z - (t - r)\, w + c, \qquad w = u(z, r, t).$$

The control c is made of n steps of gradient ascent with step length $\lambda$. They change the look-ahead
(FMRG-E of the paper, "Euclidean"), from $x_0 = \hat x$,

$$x_{i+1} = x_i + \lambda\, \nabla R(x_i), \qquad c = t\, (1 - r)\, (x_n - \hat x),$$

or, by the derivative of the field, the state (FMRG-J, "Jacobian"), from $z_0 = z$,

$$z_{i+1} = z_i + \lambda\, \nabla_z R(\hat x(z_i)), \qquad c = (t - r)\, (z_n - z).$$
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from ._custom_types import as_scalar, Condition, Scalar, ScalarLike, Time
from ._field import AbstractField
from ._sample import Evaluate, integrate, TimeGrid
from ._validate import as_count, check_positive, Count, with_checked_scalar

_More = TypeVar("_More")

Reward: TypeAlias = Callable[[Float[Array, "*data"]], Scalar]
"""What an example is worth."""


def sample_with_reward(
    field: AbstractField,
    eps: Real[ArrayLike, "*data"] | Sequence[Any],
    condition: Condition = None,
    *,
    reward: Reward,
    scale: ScalarLike,
    iterations: Count = 1,
    through_field: bool = False,
    straight: bool = False,
    times: TimeGrid = (1.0, 0.0),
    unroll: bool = False,
) -> Float[Array, "*data"]:
    r"""One sample by average velocities, bent towards a high reward: flow map reward guidance (FMRG). No training.

    For an observation y = A x, `reward` is -|y - A x|^2 / 2.

    It climbs the reward along one trajectory, as an optimal control does. It samples neither the density tilted by
    exp(reward) nor a posterior: samples from many eps vary less than those would. For data N(m, s^2) with an
    observation of x of variance $\sigma^2$, the scale with which one step has the mean of the posterior, K = s^2 / (s^2
    + $\sigma^2$), gives variance (1 - K)^2 s^2 where the posterior has (1 - K) s^2.

    **Arguments:** as `sample`, and

    - `reward`: R, a function of one example that returns a floating-point scalar, differentiable in reverse mode.
    - `scale`: the step length $\lambda$ >= 0 of the ascent, unchecked if JAX traces it; 0 is `sample`, unless
      `straight`. Its unit is that of x^2 divided by that of R: for a squared error as above, and a matrix A whose
      largest singular value is 1, it must be below 2. Without `through_field` the control does not shrink with the
      step: the more steps, the more it overrules the field. (The authors' loss is |y - A x|^2: their scale is half as
      large for the same effect.)
    - `iterations`: number n of steps of the ascent.
    - `through_field`: False changes the look-ahead and needs only the gradient of R (FMRG-E). True changes the state
      by the derivative of the field (FMRG-J), which keeps changes near to what the field can make.
    - `straight`: True for steps along the straight line to the look-ahead, w = u(z, 0, t), which leave the flow where
      that is curved: for two steps or so (the authors' `flow_map1`; without it `flow_map2`).

    To guide only the first part of the way, end `times` at a time s > 0 and give the result to `sample` with times
    from s to 0. For a field that has learnt only v(z, t) = u(z, t, t), give one that returns it at all r.

    **Cost:** of a step, two evaluations of the field, or one if `straight` or r = 0. With `through_field` there are n
    - 1 more, and n passes backwards through it.

    **Returns:** the state at the last time, as `sample`.

    **Raises:** `ValueError` as `sample`; unless `reward` is a function that returns a floating-point scalar, scale >= 0
    and finite, iterations >= 1; with `through_field` for a field that reverse mode cannot differentiate, such as
    `exact.AverageVelocity`.

    **Reference:** How to Guide Your Flow: Few-Step Alignment via Flow Map Reward Guidance, Huang, Lin, Shah, Nair,
    Boffi, 2026, arXiv 2604.27147; the factors as in the authors' code (`fluxfm_sampler_ip.py`), which also rescales
    gradients, on request, to the length of w, and from the second iteration of FMRG-J on takes u(z, t, t) for
    u(z, 0, t).
    """
    if not callable(reward):
        raise ValueError(f"reward must be a function of one example, got {reward!r:.80}")
    check_positive("scale", scale, or_zero=True)
    iterations = as_count("iterations", iterations)

    def step(u: Evaluate, z: Float[Array, "*data"], r: Time, t: Time) -> Float[Array, "*data"]:
        def look_ahead(z: Float[Array, "*data"]) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
            to_data = u(z, jnp.zeros_like(t), t)
            return z - t * to_data, to_data

        if through_field:
            change, to_data = _ascent(lambda z: _gradient_through(look_ahead, reward, z), z, scale, iterations)
            control = (t - r) * change
        else:
            x, to_data = look_ahead(z)
            change, _ = _ascent(lambda x: (_gradient(reward, x), None), x, scale, iterations)
            control = t * (1 - r) * change
        velocity = to_data if straight else jax.lax.cond(r > 0, lambda: u(z, r, t), lambda: to_data)
        return z - (t - r) * velocity + control

    return integrate(field, step, eps, condition, times, unroll)


def _ascent(
    gradient: Callable[[Float[Array, "*data"]], tuple[Float[Array, "*data"], _More]],
    start: Float[Array, "*data"],
    scale: ScalarLike,
    iterations: int,
) -> tuple[Float[Array, "*data"], _More]:
    """The change of `start`, and what else `gradient` returned there."""
    length = as_scalar("scale", scale, start).astype(start.dtype)
    first, more = gradient(start)
    end = start + length * first
    if iterations > 1:
        end = jax.lax.fori_loop(1, iterations, lambda _, x: x + length * gradient(x)[0], end)
    return end - start, more


def _gradient(reward: Reward, x: Float[Array, "*data"]) -> Float[Array, "*data"]:
    return jax.grad(lambda x: with_checked_scalar(reward(x), "reward", differentiable=True))(x)


def _gradient_through(
    look_ahead: Callable[[Float[Array, "*data"]], tuple[Float[Array, "*data"], Float[Array, "*data"]]],
    reward: Reward,
    z: Float[Array, "*data"],
) -> tuple[Float[Array, "*data"], Float[Array, "*data"]]:
    """The gradient at z of the reward of the look-ahead, and the second result of `look_ahead`."""
    x, pull_back, to_data = jax.vjp(look_ahead, z, has_aux=True)
    at_data = _gradient(reward, x)
    try:
        return pull_back(at_data)[0], to_data
    except ValueError as error:  # from JAX, which speaks of a loop in the field's program
        raise ValueError(
            "through_field must be False for a field that reverse mode cannot differentiate, such as "
            "exact.AverageVelocity, got True"
        ) from error
