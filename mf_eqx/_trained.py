"""Which values of a field a training leaves learnt, for those who sample later."""

from typing import NamedTuple

from ._guidance import GuidanceRange


class Trained(NamedTuple):
    """Which values of a field an objective trains.

    **Arguments:**

    - `average`: u(z, r, t) for r < t; without it, sample by Euler steps along u(z, t, t).
    - `null_velocity`: u(z, t, t) with the null condition, which guidance needs, also in the target.
    - `null_average`: u(z, r, t) for r < t with the null condition, which a `GuidedField` needs, except by Euler steps.
    - `velocity`: u(z, t, t); without it, Euler steps follow values that were never trained.
    - `ends_at_data`: whether u(z, r, t) for r < t was trained at r = 0 alone; then sample in one step, by
      `sample_consistency`, or by Euler steps.
    - `one_step`: whether u(z, r, t) for r < t was trained for one step alone: at one pair of times, as by a
      `SampleObjective` of one step, or at t = 1 (`TimePairs.at_noise`); then sample in one step.
    - `guidance`: for a field that takes guidance as an input, the scales and intervals that were drawn; None if it
      takes none, or if they are not known.
    """

    average: bool
    null_velocity: bool
    null_average: bool
    velocity: bool = True
    ends_at_data: bool = False
    one_step: bool = False
    guidance: GuidanceRange | None = None
