r"""The average velocity of any velocity, by solving an ordinary differential equation.

With h = t - r, and s from 0 (time t) to 1 (time r), the displacement per unit of h obeys

$$y'(s) = v\big(z - h\, y(s),\; t - h s\big), \quad y(0) = 0, \qquad u(z, r, t) = y(1):$$

substitute $\tau = t - h s$ in Eq. 3. There is no division by t - r: at r = t the slope is the constant v(z, t), so that
u = v, which the boundary rows of an objective and a predicted velocity require.

The derivatives of u are taken through every step of the solver. They do not use the MeanFlow identity; so this field
can be used to verify it.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from .._custom_types import as_times, Condition, TimeLike
from .._field import AbstractField, Velocity, velocity_at
from .._validate import as_float, check_positive


class AverageVelocity(AbstractField):
    r"""The average velocity u(z, r, t | condition) of a velocity v(z, t, condition), to solver accuracy.

    Differentiable only in forward mode (`jax.jvp`, `total_derivative`), any number of times. Intended for float64: make
    the velocity and its inputs inside `with jax.enable_x64(True):`. Under `jax.vmap` all examples take as many steps as
    the one with the most; for large batches of a costly velocity `jax.lax.map(..., batch_size=50)` is faster.

    **Arguments:**

    - `velocity`: called as (z, t, condition) for one example: a `MarginalVelocity`, a `GuidedVelocity` or any function.
      Outside of jit a Module is better than a lambda, since every new lambda is compiled again. Or a field, whose
      velocity head or u(z, t, t) is integrated: the average velocity that a trained Flow Matching network would have.
    - `rtol`, `atol`: tolerances of the adaptive steps. At 1e-10, identities hold with a residual of about 1e-9 at most;
      at 1e-8, of about 1e-7. `atol` has the unit of u, and must be > 0 because the solution starts at zero.
    - `solver`: a diffrax solver with an error estimate. At 1e-10 `Dopri8` takes half the steps of `Tsit5` and slightly
      less time, and its typical residual is five times smaller.
    - `max_steps`: a solution that requires more steps raises a runtime error. Tens of steps are usual; thousands mean
      that v is singular in [r, t], for example that of a `PointSet` at r = 0.

    **Raises:** `ValueError` if a tolerance is negative or `atol` is 0; when called, if both are below what the dtype of
    `z` can reach.
    """

    velocity: Velocity
    rtol: float = eqx.field(default=1e-10, converter=as_float("rtol"))
    atol: float = eqx.field(default=1e-10, converter=as_float("atol"))
    solver: diffrax.AbstractAdaptiveSolver = diffrax.Dopri8()
    max_steps: int = 4096

    def __check_init__(self):
        check_positive("rtol", self.rtol, or_zero=True)
        check_positive("atol", self.atol)
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be >= 1, got {self.max_steps}")

    def __call__(
        self,
        z: Float[Array, "*data"],
        r: TimeLike,
        t: TimeLike,
        condition: Condition = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*data"]:
        self._check_precision(z.dtype)
        r, t = (time.astype(z.dtype) for time in as_times(r, t, z))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_slope),
            self.solver,
            t0=0.0,
            t1=1.0,
            dt0=1.0,  # the whole interval in one step: exact at r = t, and otherwise soon reduced by the controller
            y0=jnp.zeros_like(z),
            args=(self.velocity, z, t, t - r, condition),
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            adjoint=diffrax.ForwardMode(),
            max_steps=self.max_steps,
        )
        assert solution.ys is not None
        return solution.ys[0].astype(z.dtype)  # if float64 is enabled, the solver's times are float64

    def _check_precision(self, dtype: jnp.dtype) -> None:
        reachable = 10 * float(jnp.finfo(dtype).eps)
        if max(self.rtol, self.atol) < reachable:
            raise ValueError(
                f"rtol or atol must be at least {reachable:.1e} when z is {dtype} (for less, make z and the velocity "
                f"float64 inside `with jax.enable_x64(True):`), got rtol = {self.rtol}, atol = {self.atol}"
            )


def _slope(s: ArrayLike, y: Float[Array, "*data"], args) -> Float[Array, "*data"]:
    # Not a closure: outside of jit, diffrax compiles once per function and reads everything else from `args`.
    velocity, z, t, h, condition = args
    return velocity_at(velocity, z - h * y, t - h * jnp.asarray(s, t.dtype), condition).astype(y.dtype)
