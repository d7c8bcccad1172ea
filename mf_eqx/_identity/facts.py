"""Properties of a method: declared once, in the file of the method, and used wherever they matter."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._derivative import Passes


def and_forward(passes: Passes | None, number: int) -> Passes | None:
    """`passes` with `number` more forward passes, if they are known."""
    return passes and passes._replace(forward=passes.forward + number)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Properties of a method. They decide which objectives are refused, and how tests with exact fields and scripts
    treat the method.

    **Arguments:**

    - `degenerate`: whether rows with r < t alone do not determine the average velocity: another field, such as u = 0,
      solves the equation too. Then an identity share of 1 is refused.
    - `trains_velocity`: whether rows with r < t also train u(z, t, t), as a limit. If not, only boundary rows train v,
      along which Euler steps sample.
    - `uses_velocity`: whether the residual uses `Row.v`. If not, guidance passes are made for boundary rows only, and
      `ConstantWeight` is the safe weight (`AdaptiveWeight` says why).
    - `uses_pair`: whether the residual uses x and eps, by `Row.at`. They do not depend on guidance, a given velocity or
      a stable target, so these are refused.
    - `ends_at_data`: whether the equation is for r = 0 alone. Its rows are then drawn with r = 0. With
      `TimePairs(times, times)`, t is one draw of `times`; with `TimePairs(times)` it is the larger of two. Samples in
      several steps are those of `sample_consistency`.
    - `learns_through_derivative`: whether the gradient goes through a derivative of the field. Attention whose
      derivative has no gradient, such as `CudnnAttention`, is then refused.
    - `needs_velocity`: whether the method evaluates a velocity that is known everywhere, by `Row.known_velocity`. The
      objective then needs a `velocity`, and guidance is refused: guide the `velocity` itself (`GuidedField`).
    - `needs_teacher`: whether the method evaluates `Context.teacher`. `TrainStep` then needs a teacher; without
      `needs_teacher`, `Row.context` may be None.
    - `needs_velocity_head`: whether the method needs a velocity head. Fields without one are then refused.
    - `group`: the number of rows that the loss compares. They share r and t, and are consecutive among the identity
      rows.
    - `exact`: whether the residual is zero for the true average velocity, with the marginal v and without guidance. If
      not, it is zero only in a limit of the method's parameters.
    - `passes`: the cost of an identity row beyond that of a row of Flow Matching (3 forward passes: one, and two for
      its gradient), without guidance. None if it changes during training or is not known.
    - `paper_settings`: arguments of `Objective` with which the method's paper trains on images, where they differ from
      the defaults of `Objective`: `Objective(method, **method.facts.paper_settings)`. None if they are not known.

    **Raises:** `ValueError` unless group >= 1.
    """

    degenerate: bool = False
    trains_velocity: bool = True
    uses_velocity: bool = True
    uses_pair: bool = False
    ends_at_data: bool = False
    learns_through_derivative: bool = False
    needs_velocity: bool = False
    needs_teacher: bool = False
    needs_velocity_head: bool = False
    group: int = 1
    exact: bool = True
    passes: Passes | None = None
    paper_settings: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}")


PAIRS = Facts(uses_velocity=False, uses_pair=True, exact=False, passes=Passes(forward=1))
"""Facts of all methods that compare the ends of two states of one pair (x, eps)."""
