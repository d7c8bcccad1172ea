"""The tables of the MeanFlow paper's ablations: what each varies around a centre, and its FIDs.

    tables = paper_tables(Setting())
    for value, (setting, fid) in tables["1b"].cells.items(): ...

The paper's centre, `PAPER`, has p = 1 and times from lognorm(-0.4, 1.0); other data may need another centre. By default
everything else in a `Setting` is as in the paper: a share of 1/4, the tangent (v, 0, 1), an embedding of (t, t - r), no
guidance.

Mean Flows for One-step Generative Modeling, Geng, Deng, Bai, Kolter, He, 2025, arXiv 2505.13447: Tab. 1a to 1f and 5.
"""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    import mf_eqx as mfx

EMBEDDINGS = {
    "(t, r)": mfx.nn.end_start,
    "(t, t - r)": mfx.nn.end_duration,
    "(t, r, t - r)": mfx.nn.end_start_duration,
    "t - r": mfx.nn.duration,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training without its seed: share of rows with r < t, tangent (v, a, b) by (a, b), embedded times, distribution
    of times, power p, guidance omega (scale) and kappa (mix)."""

    share: float = 0.25
    tangent: tuple[float, float] = (0.0, 1.0)
    embedding: str = "(t, t - r)"
    times: tuple[float, float] | None = None  # mean and standard deviation of the logit, or uniform
    power: float = 0.0
    scale: float = 1.0
    mix: float = 0.0


PAPER = Setting(times=(-0.4, 1.0), power=1.0)
"""The paper's centre. Optimiser, batch and average are not in a setting, but in a recipe."""
CENTRES = {"eight_gaussians": Setting(), "digits": Setting(), "fashion": PAPER}
"""By data set."""


class Cell(NamedTuple):
    """One training."""

    setting: Setting
    seed: int


class Table(NamedTuple):
    """A table of the paper: what it varies, and its FID for each value."""

    title: str
    cells: dict[str, tuple[Setting, float]]


_SHARES = {0.0: 328.91, 0.25: 61.06, 0.5: 63.14, 1.0: 67.32}
_TANGENTS = {(0.0, 1.0): 61.06, (0.0, 0.0): 268.06, (1.0, 0.0): 329.22, (1.0, 1.0): 137.96}
_EMBEDDINGS = dict(zip(EMBEDDINGS, (61.75, 61.06, 63.98, 63.13), strict=True))
_TIMES = {None: 65.90, (-0.2, 1.0): 63.83, (-0.2, 1.2): 64.72, (-0.4, 1.0): 61.06, (-0.4, 1.2): 61.79}
_POWERS = {0.0: 79.75, 0.5: 63.98, 1.0: 61.06, 1.5: 66.57, 2.0: 69.19}
_SCALES = {1.0: 61.06, 1.5: 33.33, 2.0: 20.15, 3.0: 15.53, 5.0: 20.75}
_MIXES = {0.0: 20.15, 0.5: 19.15, 0.8: 19.10, 0.9: 18.63, 0.95: 19.17}


def paper_tables(centre: Setting) -> dict[str, Table]:
    """All tables around a centre. Each changes one thing of it; Tab. 5 changes omega with kappa."""

    def of(title: str, name: str, fids: dict[Any, float], text: str) -> Table:
        values = {"uniform" if value is None else text.format(value): value for value in fids}
        settings = {label: dataclasses.replace(centre, **{name: value}) for label, value in values.items()}
        return Table(title, {label: (settings[label], fids[value]) for label, value in values.items()})

    def guided(mix: float) -> Setting:
        return dataclasses.replace(centre, scale=round(2 * (1 - mix), 6), mix=mix)

    mixes = {f"{mix:g}": (guided(mix), fid) for mix, fid in _MIXES.items()}
    return {
        "1a": of("share of rows with r < t", "share", _SHARES, "{:.0%}"),
        "1b": of("tangent on (z, r, t)", "tangent", _TANGENTS, "(v, {0[0]:g}, {0[1]:g})"),
        "1c": of("embedded times", "embedding", _EMBEDDINGS, "{}"),
        "1d": of("distribution of times", "times", _TIMES, "lognorm{}"),
        "1e": of("power p of the adaptive weight", "power", _POWERS, "{:g}"),
        "1f": of("guidance scale omega, kappa 0", "scale", _SCALES, "{:g}"),
        "5": Table("guidance mix kappa at effective scale 2", mixes),
    }
