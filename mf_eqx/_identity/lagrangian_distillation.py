r"""Lagrangian distillation: the end of the flow map X moves with a velocity that is known everywhere.

$$u(z_t, r, t) - (t - r)\, \partial_r u(z_t, r, t) = v(X_{t \to r}(z_t), r), \qquad
X_{t \to r}(z) = z - (t - r)\, u(z, r, t),$$

with v of a trained Flow Matching network, the objective's `velocity`. It is `LagrangianSelfDistillation` with v in
place of the network's own velocity. As v is given, rows with r < t determine u alone, and no boundary rows are needed.

The equation holds for each z on its own. With `TimePairs(times, at_noise=1)` all z are noise, so that the teacher is
distilled without any data; u is then learnt at t = 1 alone, for one step. This and `stop_derivative` are the prediction
loss of Flow Map Distillation Without Data, with a uniform r. The second loss of that paper, which corrects the
distribution of the samples, is left out.

Source: Flow map matching, Boffi, Albergo, Vanden-Eijnden, 2024, arXiv 2406.07507 (Lagrangian map distillation). With
`stop_derivative`: Align Your Flow, Sabour, Fidler, Kreis, 2025, arXiv 2506.14603 (AYF-LMD), and Flow Map Distillation
Without Data, Tong, Ma, Xie, Jaakkola, 2025, arXiv 2511.19428.
"""

from jaxtyping import Array, Float

from .._derivative import Passes
from .._field import AbstractField
from .._row import Row
from .base import AbstractIdentity
from .facts import Facts
from .lagrangian_self_distillation import lagrangian_sides


class LagrangianDistillation(AbstractIdentity):
    r"""The residual $u - (t - r)\, \partial_r u - \mathrm{sg}(v(X, r))$, with v the objective's `velocity`.

    It needs an `Objective(LagrangianDistillation(), velocity=teacher)`, and costs a JVP with its gradient and one pass
    of the teacher. The gradient does not pass through X.

    **Arguments:** `stop_derivative` puts $\partial_r u$ behind stop-gradient, too: then it costs a JVP without gradient
    and the pass of the teacher, and takes any attention. Without it, attention whose derivative has no gradient, such
    as `CudnnAttention`, is refused.

    **Raises** (when called): `ValueError` if the row has no `velocity`.
    """

    stop_derivative: bool = False

    @property
    def facts(self) -> Facts:
        return Facts(
            uses_velocity=False,
            needs_velocity=True,
            learns_through_derivative=not self.stop_derivative,
            passes=Passes(forward=1, tangent=1 if self.stop_derivative else 3),
        )

    def residual(self, field: AbstractField, row: Row) -> Float[Array, "*data"]:
        left, end = lagrangian_sides(field, row, stop_derivative=self.stop_derivative)
        return left - row.known_velocity(end, row.r)
