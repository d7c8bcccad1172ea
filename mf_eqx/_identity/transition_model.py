r"""Transition models: the MeanFlow identity with a weight for the length of the transition.

$$u(z_t, r, t) = v_t - (t - r)\, \frac{d}{dt} u(z_t, r, t), \qquad
\text{loss} = \frac{1}{\sqrt{\tan t - \tan r + \sigma}} \cdot \frac{e}{\mathrm{sg}(e) + c}$$

with e the mean squared residual over dimensions. The paper derives the identity for several paths, with a
parametrisation of the transition for each; its models use the linear path, on which it is MeanFlow's. This class uses
MeanFlow's identity on every path. The paper's models compute du/dt by a central difference, `CentralDifference(0.005)`.

They weigh boundary rows in the same way. To e they add one minus the cosine similarity of u and its target (Alg. 1),
which is not done here. With guidance, $v_t + 0.75\, (u_c - u_\varnothing)$ for $0.3 \le t \le 0.8$ with u(z, t, t) of
an averaged copy, the authors' code still takes the derivative along the unguided path; here it is along the guided
velocity, as in MeanFlow.

Source: Transition Models: Rethinking the Generative Learning Objective, Wang, Zhang, Yue, Yue, Li, Ouyang, Bai, 2025,
arXiv 2509.04394, and the authors' code, from which `paper_settings` are.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar
from .._derivative import AbstractDerivative, FusedJVP
from .._field import AbstractField
from .._row import Row
from .._times import TimePairs
from .._validate import as_float, check_positive
from .._weight import AdaptiveWeight
from .base import AbstractIdentityWithLoss
from .facts import Facts
from .mean_flow import MeanFlow


class TransitionModel(AbstractIdentityWithLoss):
    r"""The residual of `MeanFlow` with the transition model's weight.

    **Arguments:** `sigma` > 0 bounds the weight of short transitions, 1 in the paper; `offset` c, > 0: 1e-5 in the
    authors' code; `derivative` the engine that computes du/dt.
    """

    sigma: float = eqx.field(default=1.0, converter=as_float("sigma"))
    offset: float = eqx.field(default=1e-5, converter=as_float("offset"))
    derivative: AbstractDerivative = FusedJVP()

    def __check_init__(self):
        check_positive("sigma", self.sigma)
        check_positive("offset", self.offset)

    @property
    def facts(self) -> Facts:
        weight = AdaptiveWeight(offset=1e-5, mean=True)
        settings = {"identity_share": 0.5, "time_pairs": TimePairs(at_data=0.2), "weight": weight}
        return Facts(passes=self.derivative.passes, paper_settings=settings)

    def residual_and_loss(self, field: AbstractField, row: Row) -> tuple[Float[Array, "*data"], Scalar]:
        residual = MeanFlow(derivative=self.derivative).residual(field, row)
        error = jnp.sum(residual**2) / residual.size
        weight = (jnp.tan(row.t) - jnp.tan(row.r) + self.sigma) ** -0.5
        return residual, weight * error / jax.lax.stop_gradient(error + self.offset)
