"""The ablations from their command line: resumable cell by cell, and the trends of Tab. 1a and 1b."""

import dataclasses
import json
import re

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from own_methods import OWN

from mf_eqx import exact, run


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


def test_tables_share_the_cell_in_the_centre(ablations):
    for name in ("1a", "1b", "1c", "1d", "1e", "1f"):
        assert ablations.Setting() in [
            setting for setting, _ in ablations.paper_tables(ablations.Setting())[name].cells.values()
        ], name


def test_settings_that_are_equal_are_one_key(ablations):
    texts = {}
    for table in ablations.paper_tables(ablations.Setting()).values():
        for setting, _ in table.cells.values():
            text = json.dumps(dataclasses.asdict(setting))  # 0 and 0.0 are equal but not the same key
            assert texts.setdefault(setting, text) == text


def test_another_recipe_is_another_key(ablations):
    keys = [
        ablations.key_of(ablations.Config(), ablations.eight_gaussians(steps), ablations.Cell(ablations.Setting(), 0))
        for steps in (1, 2)
    ]
    assert keys[0] != keys[1]
    assert {"batch", "width", "learning_rate", "decay", "clip", "label_dropout"} <= set(keys[0])


def test_key_of_digits_holds_the_network_and_what_is_held_out(ablations):
    recipe = ablations.handwritten_digits(7)
    key = ablations.key_of(ablations.Config(data="digits"), recipe, ablations.Cell(ablations.Setting(), 5))
    wanted = {"seed": 5, "depth": 4, "heads": 4, "patch": 2, "holdout": 0.2, "split_seed": 0}
    assert wanted.items() <= key.items() and len(key["images"]) == 64


@pytest.mark.slow
def test_the_cost_of_a_step_is_that_of_the_program(ablations, experiment):
    """Floating-point operations of loss and gradient, three passes being those of Flow Matching."""
    recipe, passes = ablations.eight_gaussians(), experiment("ablation_recipes").passes

    def operations(setting):
        training = ablations.training(ablations.Config(), recipe, ablations.Cell(setting, 0), "a", {})
        batch, field = recipe.draw(jr.key(0)), training.make_field()
        loss = eqx.filter_grad(lambda field, key: training.step.objective(field, batch, key=key)[0])
        return eqx.filter_jit(loss).lower(field, jr.key(1)).lowered.cost_analysis()["flops"]

    of_a_pass = operations(ablations.Setting(share=0.0)) / 3
    for varied, expected in (({}, 3.25), ({"scale": 2.0}, 4.25), ({"mix": 0.5}, 4.5), ({"share": 1.0}, 4.0)):
        setting = ablations.Setting(**varied)
        assert passes(setting) == expected
        # Activations, embeddings and the loss itself are 1.5% more.
        np.testing.assert_allclose(operations(setting) / of_a_pass, expected, rtol=0.02)


def test_parts_of_a_key_with_the_same_name_are_refused(ablations):
    recipe = ablations.eight_gaussians()._replace(details={"seed": 1})
    with pytest.raises(ValueError, match="different names, got seed twice"):
        ablations.key_of(ablations.Config(), recipe, ablations.Cell(ablations.Setting(), 0))


# Other methods


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return str(path)


def key_in_centre(ablations, **config):
    cell = ablations.Cell(ablations.Setting(), 0)
    return ablations.key_of(ablations.Config(**config), ablations.eight_gaussians(), cell)


def test_key_of_mean_flow_finds_cells_from_before_there_were_other_methods(ablations):
    key = key_in_centre(ablations)
    assert "method" not in key and "own" not in key
    assert run.digest(key) == "413c75f7"  # as of cells that were finished then


def test_keys_name_other_methods_and_the_file_of_the_users_own(ablations, own):
    mean_flow = key_in_centre(ablations)
    assert key_in_centre(ablations, method="Shortcut") == mean_flow | {"method": "Shortcut"}
    assert key_in_centre(ablations, method="Shortcut", identity=own) == mean_flow | {"method": "Shortcut"}
    digest = run.digest(OWN)
    assert key_in_centre(ablations, method="Mine", identity=own) == mean_flow | {"method": "Mine", "own": digest}


def identity_of(ablations, setting=None, **config):
    setting = setting or ablations.Setting()
    return ablations.objective(ablations.Config(**config), setting, 4, 0.1, steps=10).identity


def test_the_method_is_what_is_trained(ablations, own):
    assert type(identity_of(ablations, method="Shortcut")).__name__ == "Shortcut"
    assert type(identity_of(ablations, method="Mine", identity=own)).__name__ == "Mine"
    assert identity_of(ablations, ablations.Setting(tangent=(1.0, 0.0))).tangent_r == 1
    assert identity_of(ablations, ablations.Setting(share=0.0), method="Shortcut") is None


def test_a_method_with_a_teacher_is_taught_by_the_average_that_is_judged(ablations):
    for method, teacher in (("TerminalVelocityMatching", 0), ("Shortcut", None)):
        config, recipe = ablations.Config(method=method), ablations.eight_gaussians()
        assert ablations.train_step(config, ablations.Setting(), recipe.labels, recipe.numbers).teacher == teacher


def test_tables_are_those_that_the_objective_of_the_method_allows(ablations):
    every = set(ablations.NAMES)
    rows = {"MeanFlow": 4, "SoFlow": 4, "Shortcut": 3, "TerminalVelocityMatching": 3, "InductiveMomentMatching": 4}
    without = {"MeanFlow": set(), "InductiveMomentMatching": {"1b", "1f", "5"}}
    for method, number in rows.items():
        tables = ablations.tables(ablations.Config(method=method))
        assert set(tables) == every - without.get(method, {"1b"}), method
        assert len(tables["1a"].cells) == number, method  # a share of 100% or not


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


def test_a_method_that_does_not_fit_into_the_batch_is_refused_before_anything_trains(ablations, own, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start(ablations, tmp_path, f"--method Triples --identity {own} --only 1a --seeds 1")
    assert "batch must be a positive multiple of 12" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tables_of_earlier_calls_stay_in_the_files(ablations, finished):
    start(ablations, finished, "--only 1b --seeds 1 --steps 30")
    text = (files(finished) / "results.md").read_text()
    assert "Tab. 1a" in text and "Tab. 1b" in text and "Tab. 1c" not in text


@pytest.mark.slow
def test_exact_guided_field_is_judged_right(ablations):
    mixture = exact.eight_gaussians()
    mixture = exact.GaussianMixture(mixture.mean, mixture.std, label=jnp.arange(8) % 4)
    velocity = exact.GuidedVelocity(exact.MarginalVelocity(mixture), 2.0)
    field = exact.AverageVelocity(velocity, rtol=1e-5, atol=1e-5)
    judge = ablations.eight_gaussians().open_judge(None).score
    right, wrong = judge(field, ablations.Setting(scale=1.0, mix=0.5)), judge(field, ablations.Setting())
    assert right["error of u"] < 1e-6
    # Finite samples: 500 per class from other noise, and data that are not guided.
    assert right["distance to the guided truth"] < 0.01 < wrong["distance to the guided truth"]
    assert wrong["error of u"] > 0.01


def test_table_5_keeps_the_effective_scale(ablations):
    import mf_eqx as mfx

    for setting, _ in ablations.paper_tables(ablations.Setting())["5"].cells.values():
        np.testing.assert_allclose(mfx.Guidance(setting.scale, setting.mix).effective_scale, 2, rtol=1e-5)


def test_agreement_counts_pairs_whose_seeds_do_not_overlap(ablations):
    text = ablations.agreement([[1.0, 1.1], [2.0, 2.1], [2.05, 3.0]], [10.0, 30.0, 20.0])
    assert text == "Of 3 pairs of rows, 2 are in the paper's order, 0 in the opposite one; in 1 the seeds overlap."
    assert "1 in the opposite one" in ablations.agreement([[1.0], [2.0]], [20.0, 10.0])


def test_numbers_keep_all_digits_before_the_point(ablations):
    assert ablations.spread([1000.0, 1478.8]) == "1,239 ± 239"
    assert ablations.spread([0.0116, 0.0126]) == "0.0121 ± 0.0005"
    assert ablations.spread([81.817]) == "81.8"


def test_a_seed_that_diverged_does_not_hide_the_others(ablations):
    nan = float("nan")
    assert ablations.spread([nan, 0.1]) == "0.1, 1 of 2 diverged"
    assert ablations.spread([1.0, nan, 2.0]) == "1.5 ± 0.5, 1 of 3 diverged"
    assert ablations.spread([nan, nan]) == ablations.spread([nan]) == "diverged"


def test_rows_that_diverged_are_counted_apart(ablations):
    text = ablations.agreement([[1.0], [float("nan")], [3.0]], [10.0, 20.0, 30.0])
    assert text.startswith("Of 1 pairs of rows, 1 are in the paper's order") and text.endswith("diverged: 1.")


def test_ten_steps_in_a_row_that_are_not_finite_are_recorded_as_diverged(ablations):
    config, cell = ablations.Config(), ablations.Cell(ablations.Setting(), 0)
    training = ablations.training(config, ablations.eight_gaussians(), cell, "a", {})
    judge = ablations.Judge(lambda field, setting: {"distance": 2.0, "error of u": 3.0})
    for faults, wanted in ((9, {"distance": 2.0, "error of u": 3.0}), (10, {"distance": None})):
        state = training.make_state()
        state = eqx.tree_at(lambda state: state.faults.most_in_row, state, jnp.asarray(faults))
        found = ablations.figures_of(ablations.eight_gaussians(), judge, cell, state, None)
        assert {name: None if np.isnan(value) else value for name, value in found.items()} == wanted


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


@pytest.mark.slow
def test_digits_have_a_recipe_of_the_same_kind(ablations):
    recipe = ablations.handwritten_digits()
    batch = recipe.draw(jr.key(0))
    assert batch.x.shape[1:] == (1, 8, 8) and batch.x.shape[0] == batch.condition.shape[0]
    figures = recipe.open_judge(None).score(
        recipe.make_field(ablations.EMBEDDINGS["(t, r)"], jr.key(1)), ablations.Setting()
    )
    assert np.isfinite(list(figures.values())).all()


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
def test_bad_input_ends_in_one_line(ablations, arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        start(ablations, tmp_path, arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
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
