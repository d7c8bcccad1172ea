"""What holds of a method: declared once, in its own file, and used wherever it matters."""

import dataclasses

from .._derivative import Passes


def and_forward(passes: Passes | None, number: float | int) -> Passes | None:
    """So many forward passes more, if the others are known."""
    return passes and passes._replace(forward=passes.forward + number)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What holds of a method. It decides which objectives are refused, and what proofs and scripts do with it.

    **Raises:** `ValueError` unless group >= 1.
    """

    degenerate: bool = False
    """Whether rows with r < t alone do not determine the average velocity: another field, such as u = 0, solves the
    equation too. Then an identity share of 1 is refused."""
    trains_velocity: bool = True
    """Whether rows with r < t also train u(z, t, t), as a limit. If not, v and sampling by Euler steps rest on the
    boundary rows alone."""
    uses_velocity: bool = True
    """Whether `Row.v` enters. If not, no guidance passes are spent on its rows: guidance comes from the boundary."""
    uses_pair: bool = False
    """Whether x and eps enter by `Row.at`, which know nothing of guidance or of a given velocity: both are refused."""
    ends_at_data: bool = False
    """Whether it is an equation for r = 0 alone: its rows are drawn so."""
    learns_through_derivative: bool = False
    """Whether the gradient goes through a derivative of the field, which fused attention refuses."""
    needs_teacher: bool = False
    """Whether it evaluates `Context.teacher`: `TrainStep` must be given one."""
    needs_velocity_head: bool = False
    """Whether it evaluates `AbstractFieldWithVelocity.with_velocity`: other fields are refused."""
    group: int = 1
    """How many rows its loss compares: they share r and t, and follow one another among the identity's rows."""
    exact: bool = True
    """Whether the average velocity, with the marginal v and without guidance, leaves no residual. If not, it does so in
    a limit of the method's parameters alone."""

    passes: Passes | None = None
    """What one of its rows costs beyond a gradient step of Flow Matching, whose 3 forward passes are one pass and its
    gradient; without guidance. None if it changes in training, or is not known."""

    def __post_init__(self):
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}")
