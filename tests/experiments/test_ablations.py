"""The ablations from their command line: resumable cell by cell, and the trends of Tab. 1a and 1b."""

import json
import re

import numpy as np
import pytest
from own_methods import OWN

from mf_eqx import run


@pytest.fixture(scope="module")
def ablations(experiment):
    return experiment("ablations")


def files(root):
    """The directory of the only data set."""
    (directory,) = (root / "runs").glob("*/*")
    return directory


def cells(root):
    return [json.loads(line) for line in (files(root) / "cells.jsonl").read_text().splitlines()]


def start(ablations, root, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run.main(ablations.main, ablations.Config(), argv=arguments.split())


@pytest.fixture(scope="module")
def finished(ablations, tmp_path_factory):
    root = tmp_path_factory.mktemp("ablations")
    start(ablations, root, "--only 1a --seeds 1 --steps 30")
    return root


@pytest.mark.slow
def test_a_run_leaves_cells_a_table_and_a_figure(finished):
    assert len(cells(finished)) == 4
    text = (files(finished) / "results.md").read_text()
    assert "Tab. 1a" in text and "328.9" in text
    assert (files(finished) / "ablations.png").stat().st_size > 0


@pytest.mark.slow
def test_finished_cells_are_not_trained_again(ablations, finished, capsys):
    before = cells(finished)
    start(ablations, finished, "--only 1a --seeds 1 --steps 30")
    assert cells(finished) == before
    assert "4 of them finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_lost_cell_is_trained_again_with_the_same_result(ablations, finished):
    before = cells(finished)
    path = files(finished) / "cells.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    start(ablations, finished, "--only 1a --seeds 1 --steps 30")
    after = cells(finished)
    assert after[-1]["settings"] == before[-1]["settings"]
    np.testing.assert_allclose(after[-1]["result"]["distance"], before[-1]["result"]["distance"], rtol=1e-5)


@pytest.mark.slow
def test_every_cell_has_metrics_of_its_own(finished):
    found = {path.parent.name for path in files(finished).glob("cells/*/metrics.jsonl")}
    assert len(found) == 4 and any(name.startswith("share_1.0_seed_0_") for name in found)
    assert (files(finished) / "summary.json").exists()


@pytest.mark.slow
def test_a_test_run_is_short_and_keeps_away_from_the_results(ablations, tmp_path):
    start(ablations, tmp_path, "--only 1a --seeds 1 --test-run")
    assert files(tmp_path).name == "eight_gaussians-test"
    assert {cell["settings"]["steps"] for cell in cells(tmp_path)} == {2}


@pytest.mark.slow
def test_a_test_run_of_another_method_is_complete_and_has_a_directory_of_its_own(ablations, tmp_path, monkeypatch):
    monkeypatch.setattr("ablation_recipes.ROWS", 80)
    start(ablations, tmp_path, "--method Shortcut --only 1a --seeds 1 --test-run")
    assert files(tmp_path).name == "eight_gaussians_Shortcut-test"
    assert [cell["settings"]["method"] for cell in cells(tmp_path)] == 3 * ["Shortcut"]
    text = (files(tmp_path) / "results.md").read_text()
    assert "MeanFlow's FID in its paper" in text and "the order of MeanFlow's paper" in text
    assert "Without 100%: identity_share must be below 1 for Shortcut" in text
    assert (files(tmp_path) / "ablations.png").stat().st_size > 0


def test_a_method_that_does_not_fit_into_the_batch_is_refused_before_anything_trains(ablations, tmp_path, refusal_of):
    (tmp_path / "mine.py").write_text(OWN)
    line = refusal_of(start, ablations, tmp_path, "--method Triples --identity mine.py --only 1a --seeds 1")
    assert "batch must be a positive multiple of 12" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_tables_of_earlier_calls_stay_in_the_files(ablations, finished):
    start(ablations, finished, "--only 1b --seeds 1 --steps 30")
    text = (files(finished) / "results.md").read_text()
    assert "Tab. 1a" in text and "Tab. 1b" in text and "Tab. 1c" not in text


DIVERGES = """
import jax.numpy as jnp
import mf_eqx as mfx

class Diverges(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return jnp.nan * row.x
"""


@pytest.mark.slow
def test_cells_that_diverge_are_shown_so_and_the_others_are_judged(ablations, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ablation_recipes.ROWS", 80)
    (tmp_path / "mine.py").write_text(DIVERGES)
    start(ablations, tmp_path, "--method Diverges --identity mine.py --only 1a --seeds 1 --steps 12")
    finite = [cell["settings"]["setting"]["share"] for cell in cells(tmp_path) if cell["result"]["distance"] > 0]
    assert finite == [0.0] and len(cells(tmp_path)) > 2
    out, err = capsys.readouterr()
    assert "diverged; about" in err and re.search(r"\| +25% \| +61\.06 \| diverged", out)
    assert "Rows left out because a training diverged" in out
    assert (files(tmp_path) / "ablations.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only 1z", "--only must be among 1a, .*; got 1z"),
        ("--only", "--only must be at least one of 1a, .*; got none"),
        ("--method Shortkut", "--method must be among .*Shortcut, .*; got Shortkut"),
        ("--identity none.py", r"--identity must be a Python file, got none\.py"),
        ("--method Shortcut --only 1a 1b", "--only must be among the tables of Shortcut, got 1b: tangent must be"),
        ("--method ConsistencyTraining --only 5", "of ConsistencyTraining, got 5: guidance must be None"),
        ("--method InductiveMomentMatching --only 1f", "of InductiveMomentMatching, got 1f: guidance must be None"),
        ("--seeds 0", "--seeds must be >= 1, got 0"),
        ("--steps 0", "--steps must be >= 1, got 0"),
        ("--data cifar", "data"),
        ("--workers 0", "--workers must be >= 1, got 0"),
    ],
)
def test_bad_input_ends_in_one_line(ablations, arguments, message, refusal_of, tmp_path):
    line = refusal_of(start, ablations, tmp_path, arguments)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # seven cells and two seeds at the default budget: about four minutes on two cores
def test_trends_of_tables_1a_and_1b(ablations, tmp_path):
    start(ablations, tmp_path, "--only 1a 1b")
    distance = {}
    for cell in cells(tmp_path):
        setting = cell["settings"]["setting"]
        distance.setdefault((setting["share"], *setting["tangent"]), []).append(cell["result"]["distance"])
    right = max(distance[0.25, 0.0, 1.0])  # the worst seed of the right one, the best of the wrong ones
    assert min(distance[0.0, 0.0, 1.0]) > 3 * right  # seen: 71 times
    for tangent in [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]:
        assert min(distance[0.25, *tangent]) > 3 * right, tangent  # seen: 28, 37 and 19 times
