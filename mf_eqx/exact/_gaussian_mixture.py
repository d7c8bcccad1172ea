r"""Gaussian mixtures: distributions of any shape, smooth everywhere, with the marginal velocity in closed form.

Given component k with mean $m_k$ and standard deviation $s_k$, state and noise are jointly Gaussian:

$$z_t \mid k \sim N(\alpha_t m_k, S_k^2 I), \quad S_k^2 = \alpha_t^2 s_k^2 + \sigma_t^2, \qquad
E[v_t \mid z, k] = \dot\alpha_t m_k + \frac{\dot\alpha_t \alpha_t s_k^2 + \dot\sigma_t \sigma_t}{S_k^2}
(z - \alpha_t m_k),$$

and the marginal velocity is the mean of the latter under the posterior $p(k \mid z) \propto w_k N(z; \alpha_t m_k,
S_k^2 I)$. Since $S_k > 0$ at every t in [0, 1], all derivatives of the velocity are finite there.

A toy data set of any shape is a mixture, too: a few hundred points of the shape, each blurred by a small std.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, Key, Real

from .._custom_types import as_floats, as_scalar, Condition, Scalar, TimeLike
from .._interpolant import AbstractInterpolant
from .._validate import as_labels, check_finite, check_positive
from ._base import AbstractDistribution, check_point


class GaussianMixture(AbstractDistribution):
    r"""A mixture of isotropic Gaussians $\sum_k w_k N(m_k, s_k^2 I)$, with labels or without.

    **Arguments:**

    - `mean`: the means $m_k$, one component per row.
    - `std`: the standard deviations $s_k$ > 0, in the unit of the data; one for all components, or one for each.
    - `weight`: the relative weights $w_k$ > 0, whose sum may be any number; equal by default.
    - `label`: an integer for each component, or None. Several components may have the same label. With labels, a
      `condition` is a label. If no component has this label, the velocity is NaN and samples are wrongly those of the
      last component: check labels on the host.

    **Raises:** `ValueError` if shapes do not fit, if a mean is not finite, or if a standard deviation or weight is not
    positive and finite.
    """

    mean: Float[Array, "component *data"]
    std: Float[Array, " component"]
    weight: Float[Array, " component"]
    label: Int[Array, " component"] | None

    def __init__(
        self,
        mean: Real[Array | np.ndarray, "component *data"],
        std: float | Real[Array | np.ndarray, ""] | Real[Array | np.ndarray, " component"],
        weight: Real[Array | np.ndarray, " component"] | None = None,
        label: Int[Array | np.ndarray, " component"] | None = None,
    ):
        self.mean = as_floats("mean", mean)
        components = self.mean.shape[:1]
        std = jnp.asarray(std, self.mean.dtype)
        self.std = jnp.broadcast_to(std, components) if std.ndim == 0 else std
        self.weight = jnp.asarray(np.ones(components) if weight is None else weight, self.mean.dtype)
        self.label = None if label is None else as_labels("label", label)

    def __check_init__(self):
        components = self.mean.shape[:1]
        if self.mean.ndim < 1 or self.mean.size < 1:
            raise ValueError(
                f"mean must have at least one component along its first axis, of at least one value, got shape "
                f"{self.mean.shape}"
            )
        for name, value in (("std", self.std), ("weight", self.weight), ("label", self.label)):
            if value is not None and value.shape != components:
                raise ValueError(f"{name} must have one value per component, {components}, got shape {value.shape}")
        check_finite("mean", self.mean)
        check_positive("std", self.std)
        check_positive(f"square of std in {self.std.dtype}", self.std**2)
        check_positive("weight", self.weight)

    def velocity(
        self, interpolant: AbstractInterpolant, z: Float[Array, "*data"], t: TimeLike, condition: Condition = None
    ) -> Float[Array, "*data"]:
        velocity, _, mass = self.posterior(interpolant, z, t, condition)
        return jnp.tensordot(mass, velocity, 1, precision="highest")  # accelerators round the factors by default

    def posterior(
        self, interpolant: AbstractInterpolant, z: Float[Array, "*data"], t: TimeLike, condition: Condition = None
    ) -> tuple[Float[Array, "component *data"], Float[Array, " component"], Float[Array, " component"]]:
        r"""The distribution of the conditional velocity $v_t$ given $z_t = z$, which is also a mixture.

        **Returns:** for each component the mean of $v_t$, the standard deviation of $v_t$ in every direction,
        $|\dot\alpha_t \sigma_t - \dot\sigma_t \alpha_t|\, s_k / S_k$, and the component's posterior probability.
        """
        check_point("z", z, self.mean.shape[1:])
        alpha, sigma, alpha_rate, sigma_rate = interpolant.rates(as_scalar("t", t, z))
        variance = (alpha * self.std) ** 2 + sigma**2
        offset = z - alpha * self.mean
        slope = (alpha_rate * alpha * self.std**2 + sigma_rate * sigma) / variance
        mass = jax.nn.softmax(self._log_weight(condition) + _log_normal(offset, variance))
        mean = alpha_rate * self.mean + slope.reshape(-1, *[1] * z.ndim) * offset
        std = jnp.abs(alpha_rate * sigma - sigma_rate * alpha) * self.std / jnp.sqrt(variance)
        return mean, std, mass

    def sample(self, *, key: Key[Array, ""], condition: Condition = None) -> Float[Array, "*data"]:
        return self._draw(key, condition)[0]

    def labelled_sample(
        self, *, key: Key[Array, ""], condition: Condition = None
    ) -> tuple[Float[Array, "*data"], Int[Array, ""]]:
        """One data point with the label of its component. For the same key, the point equals that of `sample`.

        **Raises:** `ValueError` if the components have no labels.
        """
        x, component = self._draw(key, condition)
        return x, self._labels()[component]

    def log_density(self, x: Float[Array, "*data"], condition: Condition = None) -> Scalar:
        r"""The logarithm of the density of the data, $\log \sum_k w_k N(x; m_k, s_k^2 I)$ with normalised weights, over
        the components with the label `condition`, or over all components if it is None."""
        check_point("x", x, self.mean.shape[1:])
        log_weight = self._log_weight(condition)
        joint = log_weight + _log_normal(x - self.mean, self.std**2)
        return logsumexp(joint) - logsumexp(log_weight) - x.size / 2 * jnp.log(2 * jnp.pi)

    def _draw(self, key: Key[Array, ""], condition: Condition) -> tuple[Float[Array, "*data"], Int[Array, ""]]:
        component_key, noise_key = jr.split(key)
        log_weight = self._log_weight(condition)
        weight = jnp.exp(log_weight - jnp.max(log_weight))  # whose sum is finite
        # A search in the cumulative weights requires one uniform number, instead of a Gumbel number for each of several
        # hundred components. A component of weight zero must have an interval of length zero, but a parallel cumulative
        # sum may round differently before and after it: so the sum is set to zero there, and `cummax` fills it in.
        bounds = jax.lax.cummax(jnp.where(weight > 0, jnp.cumsum(weight), 0))
        component = jnp.searchsorted(bounds, jr.uniform(component_key, (), bounds.dtype) * bounds[-1], side="right")
        noise = jr.normal(noise_key, self.mean.shape[1:], self.mean.dtype)
        return self.mean[component] + self.std[component] * noise, component

    def _labels(self) -> Int[Array, " component"]:
        if self.label is None:
            raise ValueError("label must be given to the mixture for conditions and labelled samples, got None")
        return self.label

    def _log_weight(self, condition: Condition) -> Float[Array, " component"]:
        """Logarithms of the weights, not normalised; minus infinity for components without the label `condition`."""
        log_weight = jnp.log(self.weight)
        return log_weight if condition is None else jnp.where(self._labels() == condition, log_weight, -jnp.inf)


def _log_normal(
    offset: Float[Array, "component *data"], variance: Float[Array, " component"]
) -> Float[Array, " component"]:
    r"""The logarithm of each component's density, without the constant $-\frac d2 \log 2\pi$."""
    dim = offset[0].size
    square = jnp.sum(offset.reshape(-1, dim) ** 2, axis=1)
    return -square / (2 * variance) - dim / 2 * jnp.log(variance)
