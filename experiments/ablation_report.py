"""The report of `ablations.py`: tables as text, how many pairs of rows are in the paper's order, and pictures."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ablation_cells import cells_of, floor_key, key_of, method_key, refused, samples_name, Study, tables
from ablation_recipes import Recipe
from ablation_tables import Cell, Table
from jaxtyping import install_import_hook

# Shapes and types are checked while the step is traced. JAXTYPING_DISABLE=1 turns this off.
with install_import_hook("mf_eqx", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    from mf_eqx import picture, run


def spread(values: Sequence[float]) -> str:
    """Mean and half the range of the finite values; how many trainings diverged, whose values are NaN."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "diverged"
    half_range = f" ± {rounded(np.ptp(finite) / 2, 1)}" if len(finite) > 1 else ""
    lost = len(values) - len(finite)
    return rounded(np.mean(finite), 3) + half_range + (f", {lost} of {len(values)} diverged" if lost else "")


def rounded(value: float | np.floating, digits: int) -> str:
    """A number with that many significant digits, or with all digits before the point if these are more."""
    return f"{value:.{digits}g}" if not abs(value) >= 10**digits else f"{value:,.0f}"


def agreement(ours: Sequence[Sequence[float]], papers: Sequence[float], order: str = "the paper's order") -> str:
    """How many pairs of rows are in the paper's order in all seeds, and in how many pairs the seeds overlap."""
    finite = [bool(np.isfinite(values).all()) for values in ours]
    pairs = [(i, j) for i in range(len(ours)) for j in range(len(ours)) if papers[i] < papers[j]]
    pairs = [(i, j) for i, j in pairs if finite[i] and finite[j]]
    same = sum(max(ours[i]) < min(ours[j]) for i, j in pairs)
    opposite = sum(max(ours[j]) < min(ours[i]) for i, j in pairs)
    neither = "the seeds overlap" if max(map(len, ours)) > 1 else "the rows are equal"
    text = (
        f"Of {len(pairs)} pairs of rows, {same} are in {order}, {opposite} in the opposite one; in "
        f"{len(pairs) - same - opposite} {neither}."
    )
    return text if all(finite) else f"{text} Rows left out because a training diverged: {finite.count(False)}."


class Column(NamedTuple):
    """Two panels of a figure, one table: its title, the distances of all seeds by value, and the paper's FIDs."""

    title: str
    distances: dict[str, list[float]]
    fids: list[float]


def draw(path: Path, columns: Sequence[Column], ours: str, papers: str) -> None:
    width = min(4, len(columns))
    height = -(-len(columns) // width)
    figure = picture.new_figure(3.4 * width, 3.9 * height)
    panels = figure.subplots(2 * height, width, squeeze=False, gridspec_kw={"height_ratios": [3, 2] * height})
    for i, column in enumerate(columns):
        above, below = panels[2 * (i // width), i % width], panels[2 * (i // width) + 1, i % width]
        for place, values in enumerate(column.distances.values()):
            finite = [value for value in values if np.isfinite(value)]
            above.plot([place] * len(finite), finite, "o", color="C0", markersize=4, alpha=0.6)
            if finite:
                above.plot(place, np.mean(finite), "_", color="C0", markersize=16)
            if len(finite) < len(values):
                above.plot(place, 0.97, "x", color="C3", markersize=6, transform=above.get_xaxis_transform())
        below.plot(column.fids, "s", color="C1", markersize=5)
        for panel, values in ((above, [*itertools.chain(*column.distances.values())]), (below, column.fids)):
            finite = [value for value in values if np.isfinite(value)]
            if finite and max(finite) > 3 * min(finite):
                panel.set_yscale("log")
            elif finite:  # at least 1% of the values, so that ticks need no offset
                margin = max((max(finite) - min(finite)) / 10, 0.005 * max(finite))
                panel.set_ylim(min(finite) - margin, max(finite) + margin)
            panel.tick_params(axis="y", which="both", labelsize=7)
            panel.set_xlim(-0.5, len(column.fids) - 0.5)
            panel.grid(axis="y", alpha=0.3)
        above.set_xticks(range(len(column.fids)), [])
        below.set_xticks(range(len(column.fids)), list(column.distances), rotation=25, fontsize=8)
        above.set_title(column.title, fontsize=9)
    for panel in panels.T.reshape(width, height, 2).transpose(1, 0, 2).reshape(-1, 2)[len(columns) :].flat:
        panel.remove()
    title = f"circles: {ours}; lines: mean of seeds; crosses: a training diverged; squares: {papers}"
    figure.suptitle(textwrap.fill(title, 40 * width), fontsize=10)
    picture.save_figure(path, figure)


def report(config: Study, recipe: Recipe, ledger: run.Ledger, names: Sequence[str]) -> str:
    """The tables as text, after a paragraph about all of them."""
    commits = {ledger.commit(key_of(config, recipe, cell)) for name in names for cell in cells_of(config, name)}
    last = config.seeds - 1
    sentences = [
        f"{config.method}, distance: {recipe.distance}.",
        recipe.beside,
        f"Mean ± half the range of seeds 0 to {last}" if last else "Seed 0",
        f"of trainings of {recipe.numbers.steps} steps.",
        f"Commits: {', '.join(sorted(commit or 'unknown' for commit in commits))}.",
    ]
    return "\n\n".join([" ".join(filter(None, sentences)), *(section(config, recipe, ledger, name) for name in names)])


def section(config: Study, recipe: Recipe, ledger: run.Ledger, name: str) -> str:
    """One table, its order by each distance, and why rows are left out."""
    table, order = tables(config)[name], "the order of MeanFlow's paper" if method_key(config) else "the paper's order"
    found, fids = results(config, recipe, ledger, table), [fid for _, fid in table.cells.values()]
    # Of a training that diverged there is a distance alone.
    columns = tuple(dict.fromkeys(column for row in found.values() for result in row for column in result))
    values = {
        column: [[result.get(column, math.nan) for result in row] for row in found.values()] for column in columns
    }
    rows: list[tuple[object, ...]] = [
        (value, f"{fid:.2f}", *(spread(values[column][i]) for column in columns))
        for i, (value, fid) in enumerate(zip(found, fids, strict=True))
    ]
    if (key := floor_key(config, recipe)) in ledger:
        real = ledger[key]
        rows.append(("real data", None, *(rounded(real[column], 3) if column in real else None for column in columns)))
    ordered = [column for column in recipe.ordered if column in values]
    return "\n\n".join(
        [
            f"## Tab. {name}: {table.title}",
            run.table(rows, (table.title, fid_label(config), *columns)),
            "\n".join(f"By {column}: {agreement(values[column], fids, order)}" for column in ordered),
            *(f"Without {value}: {reason}." for value, reason in refused(config, name).items()),
        ]
    )


def results(config: Study, recipe: Recipe, ledger: run.Ledger, table: Table) -> dict[str, list[Mapping[str, float]]]:
    """The figures of all seeds, for each row of a table."""
    cells = {
        value: [Cell(setting, seed) for seed in range(config.seeds)] for value, (setting, _) in table.cells.items()
    }
    return {value: [ledger[key_of(config, recipe, cell)] for cell in row] for value, row in cells.items()}


def fid_label(config: Study) -> str:
    return "MeanFlow's FID in its paper" if method_key(config) else "paper's FID"


def save_figure(path: Path, config: Study, recipe: Recipe, ledger: run.Ledger, names: Sequence[str]) -> None:
    """Two panels per table: our distance with every seed, and below it the paper's FID."""
    columns = []
    for name in names:
        table = tables(config)[name]
        found = results(config, recipe, ledger, table)
        distances = {value: [result["distance"] for result in row] for value, row in found.items()}
        columns.append(Column(f"Tab. {name}: {table.title}", distances, [fid for _, fid in table.cells.values()]))
    draw(path, columns, f"{config.method}'s {recipe.distance}, every seed", fid_label(config))


def save_pictures(config: Study, recipe: Recipe, directory: run.RunDirectory, names: Sequence[str]) -> list[str]:
    """A picture per table, if the data are images: for each row of the table samples of seed 0, all from the same
    noise. A row that diverged is left out.

    **Returns:** the names of the files.
    """
    if recipe.sampler is None:
        return []
    (_, columns), saved = recipe.sampler.columns(), []
    for path in directory.root.glob("samples_*.png"):  # of tables that were complete with other steps or seeds
        path.unlink()
    for name in names:
        rows = {value: Cell(setting, 0) for value, (setting, _) in tables(config)[name].cells.items()}
        paths = {value: directory.path(samples_name(key_of(config, recipe, cell))) for value, cell in rows.items()}
        images = {value: np.load(path) for value, path in paths.items() if path.exists()}
        if images:
            saved.append(f"samples_{name}.png")
            labels = {"row_labels": [*images], "column_labels": columns}
            picture.save_image_grid(directory.path(saved[-1]), np.stack([*images.values()]), -1, 1, **labels)
    return saved
