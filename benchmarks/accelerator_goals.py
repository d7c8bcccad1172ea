"""The goals on one large GPU, and what accelerator.py's records say of each."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mf_eqx import run

Records = list[dict[str, Any]]


class Goal(NamedTuple):
    """What is wanted, and how it is read from the records: None where it was not measured."""

    what: str
    wanted: str
    found: Callable[[Records], str | None]


def chosen(records: Records, **values: Any) -> Records:
    """The records that have all of these values."""
    return [record for record in records if all(record.get(name) == value for name, value in values.items())]


def how(record: dict[str, Any]) -> str:
    """Attention, remat and form of a step."""
    remat = "" if record["remat"] == "none" else f", remat {record['remat']}"
    return f"{record['attention']}{remat}, {record['form']}"


def step(model: str, variant: str, wanted: str) -> Goal:
    """Milliseconds of a step of 256 rows, its utilisation, and its memory as XLA plans it and the allocator saw it."""

    def found(records: Records) -> str | None:
        values = {"model": model, "variant": variant, "batch": 256, "dtype": "bfloat16"}
        steps = [r for r in chosen(records, **values) if r.get("wall_seconds") and "flops" in r]
        shown = []
        for record in steps:
            time = statistics.median(record["wall_seconds"])
            used = record["flops"] / time / record["matmul_peak"]
            memory = (record.get("cost") or {}).get("temporary_bytes", 0) / 1e9
            seen = record.get("allocator_peak_bytes")
            allocated = f", {seen / 1e9:.1f} GB allocated" if seen else ""
            shown.append(
                f"{1e3 * time:.1f} ({how(record)}; {100 * used:.0f}% of peak, {memory:.1f} GB temporary{allocated})"
            )
        return "; ".join(shown) or None

    return Goal(f"{model}, {variant}: ms per step", wanted, found)


def overhead(model: str, variant: str, wanted: str) -> Goal:
    """Time of a step over that of Flow Matching in the same rounds: the median of their ratios."""

    def found(records: Records) -> str | None:
        values = {"model": model, "batch": 256, "dtype": "bfloat16"}
        known = [r for r in chosen(records, **values) if r.get("wall_seconds") and "flops" in r]
        ratios = []
        for record in chosen(known, variant=variant):
            same = {name: record[name] for name in ("part", "attention", "remat", "form", "share")}
            for base in chosen(known, variant="Flow Matching", **same):
                pairs = zip(record["wall_seconds"], base["wall_seconds"], strict=True)
                more = statistics.median(one / other for one, other in pairs) - 1
                ratios.append(f"{100 * more:+.1f}% ({how(record)})")
        return "; ".join(ratios) or None

    return Goal(f"{model}, {variant}: time over Flow Matching's", wanted, found)


def rate(model: str, wanted: str, what: str, **values: Any) -> Goal:
    """Rows per second at the best batch size."""

    def found(records: Records) -> str | None:
        known = [r for r in chosen(records, model=model, **values) if r.get("wall_seconds")]
        best = max((r["batch"] / statistics.median(r["wall_seconds"]) for r in known), default=None)
        return best and f"{best:,.0f}"

    return Goal(f"{model}: {what}", wanted, found)


def peak(what: str, wanted: str) -> Goal:
    def found(records: Records) -> str | None:
        return next((f"{r['rate'] / 1e12:.4g}" for r in chosen(records, part="machine", what=what)), None)

    return Goal(f"{what}, {'TB/s' if what == 'copies' else 'TFLOP/s'}", wanted, found)


def compile_seconds(records: Records) -> str | None:
    parts = ("trace_seconds", "lower_seconds", "compile_seconds")
    known = chosen(records, part="compile", model="XL/2", form="scan")
    times = {r["warm"]: sum(r[part] for part in parts) for r in known}
    return f"{times[False]:.1f}; from the cache {times[True]:.1f}" if set(times) == {False, True} else None


def donated(records: Records) -> str | None:
    """Of the arguments of a step without its batch, which is not given away."""
    steps = [r for r in records if r.get("cost") and "batch_bytes" in r]
    whole = [r["cost"]["donated_bytes"] / (r["cost"]["argument_bytes"] - r["batch_bytes"]) for r in steps]
    return f"at least {100 * min(whole):.1f}%" if whole else None


def accuracy(records: Records) -> str | None:
    known = chosen(records, engine="fused JVP", precision="bfloat16", time_scale=1.0)
    return next((f"{record['median']:.2g}" for record in known), None)


def tests(records: Records) -> str | None:
    known = [r["outcome"] for r in chosen(records, part="checks")]
    failed = sum(outcome in ("FAILED", "ERROR") for outcome in known)
    return f"{known.count('PASSED')} passed, {failed} failed" if known else None


VARIANTS = ("Flow Matching", "MeanFlow", "MeanFlow on every row", "guided")
GOALS = (
    peak("products in bfloat16", "790 (H200), 798 (H100)"),
    peak("copies", "4.3 (H200), 3.0 (H100)"),
    Goal("checks of this device", "all pass", tests),
    *(step("B/4", v, w) for v, w in zip(VARIANTS, ("22", "24", "29.7", "33"), strict=True)),
    *(step("XL/2", v, w) for v, w in zip(VARIANTS, ("420", "462", "measure", "630"), strict=True)),
    *(overhead(m, "MeanFlow", "at most +10%") for m in ("B/4", "B/2", "XL/2")),
    *(overhead(m, "MeanFlow on every row", "at most +35%") for m in ("B/4", "B/2", "XL/2")),
    *(rate(m, w, "one-step latents per second", part="sampling") for m, w in (("B/4", "35,000"), ("XL/2", "1,800"))),
    Goal("XL/2: seconds until the first step, cold", "at most 60", compile_seconds),
    rate("U-Net", "800", "images per second, float32", variant="MeanFlow", dtype="float32", share=0.75),
    rate("U-Net", "1,500", "images per second, bfloat16", variant="MeanFlow", dtype="bfloat16", share=0.75),
    Goal("state whose memory is reused", "all of it", donated),
    Goal("error of du/dt in bfloat16", "at most 0.02", accuracy),
)
"""Times and rates are those wanted on one H200 at batch 256; a floor by FLOPs is about half of each time."""


def tabulate_goals(records: Iterable[dict[str, Any]]) -> str:
    """All goals, each with what was found."""
    known = list(records)
    rows = [(goal.what, goal.wanted, goal.found(known) or "not run") for goal in GOALS]
    return run.table(rows, ("goal on one H200, batch 256 in bfloat16", "wanted", "found"))
