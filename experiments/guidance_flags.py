"""Checks of guidance that recipes and samplers share: they refuse rates of dropped labels that the rows with r = t
cannot provide or that guidance cannot do with, and at sampling scales and intervals that were not drawn in training."""

import math
from collections.abc import Sequence
from fractions import Fraction

import mf_eqx as mfx


def check_dropout(rate: float, identity_share: float, *, guided: bool) -> None:
    """Refuses a share of dropped labels that the rows with r = t do not have, and none with guidance. A wrong
    `identity_share` is left to the objective."""
    if guided and rate == 0:
        raise ValueError("label_dropout must be > 0 with guidance, which needs the unlabelled field; got 0.0")
    if not 0 <= identity_share <= 1:
        return
    share = Fraction(identity_share).limit_denominator(64)
    most = 1.0 if share == 1 else float(1 - share)  # without rows with r = t, any row may be dropped
    if not 0 <= rate <= most:
        rule = "[0, 1]" if share == 1 else f"[0, 1 - identity_share = {most:g}]"
        raise ValueError(f"label_dropout must lie in {rule}, got {rate}")


def check_drawn(
    drawn: mfx.GuidanceRange,
    scales: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    names: tuple[str, str] = ("sample_scale", "sample_interval"),
    reason: str = "",
) -> None:
    """Refuses scales and intervals of guidance that are not drawn in training. `names` are those of their flags;
    `reason` is said after the rule."""
    if not scales:
        raise ValueError(f"{names[0]} must be at least one number, got none")
    for scale in scales:
        if not drawn.contains(scale, (0, 1)):
            rule = f"lie in [{drawn.smallest:g}, {drawn.largest:g}]"
            raise ValueError(f"{names[0]} must {rule}{reason}, got {scale:g}")
    for low, high in intervals:
        if not drawn.contains(drawn.smallest, (low, high)):
            rule = "be 0 1" if drawn.middle is None else f"satisfy 0 <= first <= {drawn.middle:g} <= last <= 1"
            raise ValueError(f"{names[1]} must {rule}{reason}, got {low:g} {high:g}")


def check_scales(largest_scale: float, scale_power: float = 1.0) -> None:
    """Refuses scales from 1 that `mf_eqx.PowerLawScales` cannot draw, by the names of the flags."""
    if not 1 <= largest_scale <= 100:
        raise ValueError(f"largest_scale must lie in [1, 100], got {largest_scale}")
    if abs(1 - scale_power) * math.log(largest_scale) > 80:
        rule = "satisfy |1 - scale_power| log(largest_scale) <= 80"
        raise ValueError(f"scale_power must {rule}, got {scale_power}")
