"""The report of the ablations: numbers, orders, sections and pictures."""

import math

import pytest

from mf_eqx import run


@pytest.fixture(scope="module")
def report(experiment):
    return experiment("ablation_report")


def test_agreement_counts_pairs_whose_seeds_do_not_overlap(report):
    text = report.agreement([[1.0, 1.1], [2.0, 2.1], [2.05, 3.0]], [10.0, 30.0, 20.0])
    assert text == "Of 3 pairs of rows, 2 are in the paper's order, 0 in the opposite one; in 1 the seeds overlap."
    assert report.agreement([[1.0], [2.0]], [20.0, 10.0]).endswith("1 in the opposite one; in 0 the rows are equal.")


def test_numbers_keep_all_digits_before_the_point(report):
    assert report.spread([1000.0, 1478.8]) == "1,239 ± 239"
    assert report.spread([0.0116, 0.0126]) == "0.0121 ± 0.0005"
    assert report.spread([81.817]) == "81.8"


def test_a_seed_that_diverged_does_not_hide_the_others(report):
    nan = float("nan")
    assert report.spread([nan, 0.1]) == "0.1, 1 of 2 diverged"
    assert report.spread([1.0, nan, 2.0]) == "1.5 ± 0.5, 1 of 3 diverged"
    assert report.spread([nan, nan]) == report.spread([nan]) == "diverged"


def test_rows_that_diverged_are_counted_apart(report):
    text = report.agreement([[1.0], [float("nan")], [3.0]], [10.0, 20.0, 30.0])
    assert text.startswith("Of 1 pairs of rows, 1 are in the paper's order") and text.endswith("diverged: 1.")


def test_sections_have_every_row_with_diverged_trainings_and_real_data(report, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(tmp_path / "ablations.py")])
    recipe = experiment("ablation_recipes").eight_gaussians(7)._replace(has_floor=True)
    study, ledger = report.Study(seeds=1), run.Ledger(tmp_path / "cells.jsonl")
    for place, cell in enumerate(report.cells_of(study, "1b")):
        figures = {"distance": math.nan} if place == 1 else {"distance": 1.0 + place, "error of u": 0.1}
        ledger.put(report.key_of(study, recipe, cell), figures)
    ledger.put(report.floor_key(study, recipe), {"distance": 0.5})
    text = report.report(study, recipe, run.Ledger(tmp_path / "cells.jsonl"), ["1b"])
    about, title, table, order = text.split("\n\n")
    assert about.endswith("Seed 0 of trainings of 7 steps. Commits: unknown.")
    assert title == "## Tab. 1b: tangent on (z, r, t)"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows == [
        ["(v, 0, 1)", "61.06", "1", "0.1"],
        ["(v, 0, 0)", "268.06", "diverged", "diverged"],
        ["(v, 1, 0)", "329.22", "3", "0.1"],
        ["(v, 1, 1)", "137.96", "4", "0.1"],
        ["real data", "-", "0.5", "-"],
    ]
    assert order.startswith("By distance: Of 3 pairs of rows, 2 are in") and order.endswith("diverged: 1.")
