"""The cells of the ablations: which ones a method has, their keys, and what is trained and judged."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fields import filled
from own_methods import OWN

import mf_eqx as mfx
from mf_eqx import exact, run


@pytest.fixture(scope="module")
def cells(experiment):
    return experiment("ablation_cells")


@pytest.fixture(scope="module")
def recipes(experiment):
    return experiment("ablation_recipes")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_tables_share_the_cell_in_the_centre(cells):
    for name in ("1a", "1b", "1c", "1d", "1e", "1f"):
        assert cells.Setting() in [
            setting for setting, _ in cells.paper_tables(cells.Setting())[name].cells.values()
        ], name


def test_settings_that_are_equal_are_one_key(cells):
    texts = {}
    for table in cells.paper_tables(cells.Setting()).values():
        for setting, _ in table.cells.values():
            text = json.dumps(dataclasses.asdict(setting))  # 0 and 0.0 are equal but not the same key
            assert texts.setdefault(setting, text) == text


def test_table_5_keeps_the_effective_scale(cells):
    for setting, _ in cells.paper_tables(cells.Setting())["5"].cells.values():
        np.testing.assert_allclose(mfx.Guidance(setting.scale, setting.mix).effective_scale, 2, rtol=1e-5)


def test_tables_are_those_that_the_objective_of_the_method_allows(cells):
    every = set(cells.paper_tables(cells.Setting()))
    rows = {"MeanFlow": 4, "SoFlow": 4, "Shortcut": 3, "TerminalVelocityMatching": 3, "InductiveMomentMatching": 4}
    without = {"MeanFlow": set(), "InductiveMomentMatching": {"1b", "1f", "5"}}
    for method, number in rows.items():
        tables = cells.tables(cells.Study(method=method))
        assert set(tables) == every - without.get(method, {"1b"}), method
        assert len(tables["1a"].cells) == number, method  # a share of 100% or not


def test_another_recipe_is_another_key(cells, recipes):
    keys = [
        cells.key_of(cells.Study(), recipes.eight_gaussians(steps), cells.Cell(cells.Setting(), 0)) for steps in (1, 2)
    ]
    assert keys[0] != keys[1]
    assert {"batch", "width", "learning_rate", "decay", "clip", "label_dropout"} <= set(keys[0])


def test_key_of_digits_holds_the_network_and_what_is_held_out(cells, recipes):
    recipe = recipes.handwritten_digits(7)
    key = cells.key_of(cells.Study(data="digits"), recipe, cells.Cell(cells.Setting(), 5))
    wanted = {"seed": 5, "depth": 4, "heads": 4, "patch": 2, "holdout": 0.2, "split_seed": 0}
    assert wanted.items() <= key.items() and len(key["images"]) == 64


def test_parts_of_a_key_with_the_same_name_are_refused(cells, recipes):
    recipe = recipes.eight_gaussians()._replace(details={"seed": 1})
    with pytest.raises(ValueError, match="different names, got seed twice"):
        cells.key_of(cells.Study(), recipe, cells.Cell(cells.Setting(), 0))


def key_in_centre(cells, recipes, **config):
    cell = cells.Cell(cells.Setting(), 0)
    return cells.key_of(cells.Study(**config), recipes.eight_gaussians(), cell)


def test_key_of_mean_flow_finds_cells_from_before_there_were_other_methods(cells, recipes):
    key = key_in_centre(cells, recipes)
    assert "method" not in key and "own" not in key
    assert run.digest(key) == "413c75f7"  # as of cells that were finished then


def test_keys_name_other_methods_and_the_file_of_the_users_own(cells, recipes, own):
    mean_flow = key_in_centre(cells, recipes)
    assert key_in_centre(cells, recipes, method="Shortcut") == mean_flow | {"method": "Shortcut"}
    assert key_in_centre(cells, recipes, method="Shortcut", identity=own) == mean_flow | {"method": "Shortcut"}
    digest = run.digest(OWN)
    assert key_in_centre(cells, recipes, method="Mine", identity=own) == mean_flow | {"method": "Mine", "own": digest}


def identity_of(cells, setting=None, **config):
    setting = setting or cells.Setting()
    return cells.objective(cells.Study(**config), setting, 4, 0.1, steps=10).identity


def test_the_method_is_what_is_trained(cells, own):
    assert type(identity_of(cells, method="Shortcut")).__name__ == "Shortcut"
    assert type(identity_of(cells, method="Mine", identity=own)).__name__ == "Mine"
    assert identity_of(cells, cells.Setting(tangent=(1.0, 0.0))).tangent_r == 1
    assert identity_of(cells, cells.Setting(share=0.0), method="Shortcut") is None


def test_a_method_with_a_teacher_is_taught_by_the_average_that_is_judged(cells, recipes):
    for method, teacher in (("TerminalVelocityMatching", 0), ("Shortcut", None)):
        config, recipe = cells.Study(method=method), recipes.eight_gaussians()
        assert cells.train_step(config, cells.Setting(), recipe.labels, recipe.numbers).teacher == teacher


@pytest.mark.slow
def test_the_cost_of_a_step_is_that_of_the_program(cells, recipes):
    """Floating-point operations of loss and gradient, three passes being those of Flow Matching."""
    recipe, passes = recipes.eight_gaussians(), recipes.passes

    def operations(setting):
        training = cells.training(cells.Study(), recipe, cells.Cell(setting, 0), "a", {})
        batch, field = recipe.draw(jr.key(0)), training.make_field()
        loss = eqx.filter_grad(lambda field, key: training.step.objective(field, batch, key=key)[0])
        return eqx.filter_jit(loss).lower(field, jr.key(1)).lowered.cost_analysis()["flops"]

    of_a_pass = operations(cells.Setting(share=0.0)) / 3
    for varied, expected in (({}, 3.25), ({"scale": 2.0}, 4.25), ({"mix": 0.5}, 4.5), ({"share": 1.0}, 4.0)):
        setting = cells.Setting(**varied)
        assert passes(setting) == expected
        # Activations, embeddings and the loss itself are 1.5% more.
        np.testing.assert_allclose(operations(setting) / of_a_pass, expected, rtol=0.02)


def test_ten_steps_in_a_row_that_are_not_finite_are_recorded_as_diverged(cells, recipes):
    config, cell = cells.Study(), cells.Cell(cells.Setting(), 0)
    training = cells.training(config, recipes.eight_gaussians(), cell, "a", {})
    judge = recipes.Judge(lambda field, setting: {"distance": 2.0, "error of u": 3.0})
    made = training.make_state()
    for faults, wanted in ((9, {"distance": 2.0, "error of u": 3.0}), (10, {"distance": None})):
        state = eqx.tree_at(lambda state: state.faults.most_in_row, made, jnp.asarray(faults))
        found = cells.figures_of(recipes.eight_gaussians(), judge, cell, state, None)
        assert {name: None if np.isnan(value) else value for name, value in found.items()} == wanted


@pytest.mark.rehearsal
def test_points_that_are_not_finite_or_far_away_are_judged_without_an_error(cells, recipes, monkeypatch):
    monkeypatch.setattr(recipes, "ROWS", 8)
    recipe = recipes.eight_gaussians()
    made, judge = filled(lambda: recipe.make_field(cells.EMBEDDINGS["t - r"], jr.key(0))), recipe.open_judge(None)
    for scale in (np.nan, 1e30):
        field = jax.tree.map(lambda leaf, scale=scale: scale * (leaf + 1), made)
        figures = judge.score(field, cells.Setting(scale=0.1, mix=0.95))
        assert "distance" in figures and not np.isfinite(list(figures.values())).any()


@pytest.mark.slow
def test_exact_guided_field_is_judged_right(cells, recipes):
    mixture = exact.eight_gaussians()
    mixture = exact.GaussianMixture(mixture.mean, mixture.std, label=jnp.arange(8) % 4)
    velocity = exact.GuidedVelocity(exact.MarginalVelocity(mixture), 2.0)
    field = exact.AverageVelocity(velocity, rtol=1e-5, atol=1e-5)
    judge = recipes.eight_gaussians().open_judge(None).score
    right, wrong = judge(field, cells.Setting(scale=1.0, mix=0.5)), judge(field, cells.Setting())
    assert right["error of u"] < 1e-6
    # Finite samples: 500 per class from other noise, and data that are not guided.
    assert right["distance to the guided truth"] < 0.01 < wrong["distance to the guided truth"]
    assert wrong["error of u"] > 0.01


@pytest.mark.slow
def test_digits_have_a_recipe_of_the_same_kind(cells, recipes):
    recipe = recipes.handwritten_digits()
    batch = recipe.draw(jr.key(0))
    assert batch.x.shape[1:] == (1, 8, 8) and batch.x.shape[0] == batch.condition.shape[0]
    figures = recipe.open_judge(None).score(recipe.make_field(cells.EMBEDDINGS["(t, r)"], jr.key(1)), cells.Setting())
    assert np.isfinite(list(figures.values())).all()
