"""The toy script from its command line: its references score as they must, and a wrong method shows."""

import dataclasses
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from fields import filled

from mf_eqx import run

SMALL = "--steps 600 --width 48 --depth 2 --batch 128 --samples 1000 --large-samples 2000 --rows 200"
LOWER_IS_BETTER = ("sliced_wasserstein", "energy_distance", "total_variation")


@pytest.fixture(scope="module")
def toy_2d(experiment):
    return experiment("toy_2d")


@pytest.fixture(scope="module")
def toys(experiment):
    return experiment("toy_problems")


@pytest.fixture(scope="module")
def toy_report(experiment):
    return experiment("toy_report")


@pytest.fixture(scope="module")
def finished(toy_2d, room, tmp_path_factory):
    """The report of a finished run of the right method, a wrong one and the truth."""
    root = tmp_path_factory.mktemp("toy_2d")
    arguments = f"--data three_gaussians --methods MeanFlow WrongTangent Exact --settings common --shorter {SMALL}"
    arguments += " --workers 1"  # to compile two trainings at once needs half a gigabyte more
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run.main(toy_2d.main, toy_2d.PRESETS, argv=arguments.split())
    return report_in(root)


def report_in(folder):
    """The directory of the only report below a directory in which the script ran."""
    (path,) = folder.glob("runs/*/all/*/results.json")
    return path.parent


@pytest.fixture(scope="module")
def rows(finished):
    return {row["method"]: row for row in json.loads((finished / "results.json").read_text())}


@pytest.mark.rehearsal
def test_a_run_leaves_config_results_and_pictures(finished):
    pictures = [f"three_gaussians_{kind}.png" for kind in ("samples", "one_step", "errors", "flows")]
    for name in ("results.json", "results.md", *pictures):
        assert (finished / name).stat().st_size > 0
    assert (finished.parent / "config.json").exists()


@pytest.mark.rehearsal
def test_a_run_leaves_weights_that_say_what_was_trained(finished):
    from mf_eqx import checkpoint

    assert {path.name for path in finished.glob("*.safetensors")} == {
        "three_gaussians_MeanFlow.safetensors",
        "three_gaussians_WrongTangent.safetensors",
    }
    weights = checkpoint.read_weights(finished / "three_gaussians_MeanFlow.safetensors")
    assert weights.notes.trained.average and weights.notes.steps == 600 and weights.notes.mean is None
    assert checkpoint.load_weights(finished / "three_gaussians_MeanFlow.safetensors").data_shape == (2,)


@pytest.mark.rehearsal
def test_a_finished_training_is_neither_repeated_nor_judged_again(toy_2d, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parents[3])
    monkeypatch.setattr(toy_2d, "judge", None)
    arguments = f"--data three_gaussians --methods MeanFlow --settings common --shorter {SMALL}"
    run.main(toy_2d.main, toy_2d.PRESETS, argv=arguments.split())
    printed = capsys.readouterr().out
    assert "1 cells, 1 of them finished before" in printed
    assert "| MeanFlow " in printed and "WrongTangent" not in printed
    other = [toy_2d.recipe(toy_2d.Config(steps=steps), toy_2d.Cell("two_moons", "MeanFlow", 0)) for steps in (7, 8)]
    assert other[0] != other[1]


def test_a_setting_that_a_training_does_not_use_does_not_repeat_it(toy_2d):
    config, stacked = toy_2d.Config(), "eight_gaussians_64d"
    others = [
        ("two_moons", "MeanFlow", "common", {"dit_width": 12, "dit_learning_rate": 0.1}),
        (stacked, "MeanFlow", "common", {"width": 7, "learning_rate": 0.1}),
        ("two_moons", "MeanFlow", "paper", {"power": 0.0, "pair_times": (1.0, 1.0)}),
        ("two_moons", "Exact", "common", {"steps": 3, "width": 7}),
    ]
    for data, method, settings, changes in others:
        cell = toy_2d.Cell(data, method, 0, settings)
        assert toy_2d.recipe(dataclasses.replace(config, **changes), cell) == toy_2d.recipe(config, cell)
    for name, value in {"width": 7, "power": 0.0, "batch": 128}.items():
        cell, changed = toy_2d.Cell("two_moons", "MeanFlow", 0), dataclasses.replace(config, **{name: value})
        assert toy_2d.recipe(changed, cell) != toy_2d.recipe(config, cell)


@pytest.mark.rehearsal
def test_exact_field_has_no_error(rows):
    exact = rows["Exact"]
    assert max(exact[place] for place in ("overall", "diagonal", "one_step")) < 1e-6
    assert exact["identity"] < 1e-3  # float32, tolerances of 1e-5
    assert exact["semigroup"] < 1e-4


@pytest.mark.rehearsal
def test_exact_field_scores_the_noise_floor_at_any_number_of_evaluations(toys, rows, finished):
    *_, floor = re.findall(r"\| samples of the data(.*)\|", (finished / "results.md").read_text())
    floor = [float(cell) for cell in floor.split("|")[-len(toys.Quality._fields) :]]
    for quality in rows["Exact"]["quality"]:
        for name, value in zip(toys.Quality._fields, floor, strict=True):
            # Two draws of the noise floor: those of distances differ by a factor of up to three at 1,000 samples.
            if name in LOWER_IS_BETTER:
                assert value / 3 < quality[name] < 3 * value
            else:
                assert abs(quality[name] - value) < 0.03


@pytest.mark.rehearsal
def test_exact_field_has_the_density_of_the_data(rows):
    density = rows["Exact"]["density"]
    assert abs(density["divergence"]) < 1e-3 and density["effective_share"] > 0.999  # float32, tolerances of 1e-5
    assert abs(density["mean_weight"] - 1) < 1e-3 and density["turned_over"] == 0


@pytest.mark.rehearsal
def test_wrong_tangent_shows_in_every_column_that_it_can_touch(rows):
    right, wrong = rows["MeanFlow"], rows["WrongTangent"]
    for place in ("overall", "one_step", "identity", "semigroup"):
        assert wrong[place] > 1.5 * right[place], place  # seen: 2 to 13 times
    for name in LOWER_IS_BETTER:
        assert wrong["quality"][0][name] > 1.5 * right["quality"][0][name], name
    assert wrong["density"]["divergence"] > 1.5 * right["density"]["divergence"]
    assert wrong["quality"][0]["mode_coverage"] < right["quality"][0]["mode_coverage"] - 0.1
    # Rows with r = t are plain Flow Matching whatever the tangent.
    assert wrong["diagonal"] < 2 * right["diagonal"]


@pytest.mark.rehearsal
def test_error_is_shown_by_cells_of_both_times(toys, rows):
    cells = np.array(rows["MeanFlow"]["error_by_cell"], float)
    assert cells.shape == (len(toys.EDGES) - 1,) * 2
    assert np.isnan(cells[np.tril_indices(len(cells), -1)]).all()  # r > t
    assert np.isfinite(cells[0, -1])


def test_every_identity_is_a_method_and_trained_by_default_with_both_settings(toy_2d):
    import mf_eqx as mfx

    found = mfx.identities_in(vars(mfx), steps=1)
    assert {*found, "FlowMatching", "WrongTangent", "Exact"} == set(toy_2d.methods())
    cells = toy_2d.cells(toy_2d.Config(seeds=2))
    expected = {(name, "common", part) for name in (*found, "FlowMatching") for part in (1, 0.25)}
    expected |= {(name, "paper", 1) for name in found if found[name].facts.paper_settings is not None}
    expected |= {("Exact", "common", 1)}
    assert {(cell.method, cell.settings, cell.part) for cell in cells} == expected
    assert ("MeanFlow", "paper", 1) in expected and ("ModularMeanFlow", "paper", 1) not in expected
    assert len(cells) == 2 * len(expected) - 1  # the exact field has no seeds
    both = [toy_2d.cells(toy_2d.Config(settings=settings)) for settings in (("common", "paper"), ("paper", "common"))]
    assert set(both[0]) == set(both[1])


def test_settings_of_a_paper_are_those_that_the_method_declares(toy_2d):
    config = toy_2d.Config(methods=("MeanFlow", "TransitionModel"))
    shares = {
        (method, settings): toy_2d.objective(config, toy_2d.Cell("checkerboard", method, 0, settings)).identity_share
        for method in config.methods
        for settings in config.settings
    }
    assert shares["MeanFlow", "paper"] == Fraction(1, 4)
    assert shares["TransitionModel", "paper"] == shares["MeanFlow", "common"] == Fraction(1, 2)
    paper = toy_2d.objective(config, toy_2d.Cell("checkerboard", "TransitionModel", 0, "paper"))
    assert paper.time_pairs.at_data == 0.2


OWN = """import mf_eqx as mfx
from mf_eqx import MeanFlow


class {name}(mfx.AbstractIdentity):
    facts = mfx.Facts()

    def residual(self, field, row):
        return row.evaluate(field, row.z, row.r, row.t) - row.v
"""


def test_identities_of_a_file_join_the_methods(toy_2d, tmp_path):
    path, changed = tmp_path / "mine.py", tmp_path / "changed.py"
    path.write_text(OWN.format(name="Mine"))
    changed.write_text(path.read_text() + "\n# changed\n")
    config, cell = toy_2d.Config(identity=str(path)), toy_2d.Cell("checkerboard", "Mine", 0)
    assert type(toy_2d.identity_of(config, cell)).__name__ == "Mine" and cell in toy_2d.cells(config)
    assert "Mine" in toy_2d.shrunk(config).methods
    other, theirs = toy_2d.Config(identity=str(changed)), cell._replace(method="MeanFlow")
    assert toy_2d.recipe(config, cell) != toy_2d.recipe(other, cell)
    assert toy_2d.recipe(config, theirs) == toy_2d.recipe(other, theirs) == toy_2d.recipe(toy_2d.Config(), theirs)
    with pytest.raises(ValueError, match=r"methods must be among .*; got Mine"):
        toy_2d.Config(methods=("Mine",))


def test_a_file_of_ones_own_needs_methods_with_names_of_their_own(toy_2d, tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("from mf_eqx import MeanFlow\n")
    with pytest.raises(ValueError, match=r"identity must hold identities .*, got none in .*empty\.py"):
        toy_2d.Config(identity=str(path))
    path = tmp_path / "taken.py"
    path.write_text(OWN.format(name="Shortcut"))
    with pytest.raises(ValueError, match=r"identity must be a file whose methods have other names .*, got Shortcut"):
        toy_2d.Config(identity=str(path))
    with pytest.raises(ValueError, match=r"identity must be a Python file, got none\.py"):
        toy_2d.Config(identity="none.py")


def entry(toys, toy_report, method, steps, error, *, part=1.0, settings="common", seed=0):
    quality = [dict.fromkeys(toys.Quality._fields, error) | {"evaluations": n} for n in toys.EVALUATIONS]
    names = ("overall", "diagonal", "one_step", "identity", "semigroup", "large_sliced_wasserstein")
    density = dict.fromkeys(toys.Density._fields, error)
    found = dict.fromkeys(names, error) | {"faults": 0, "quality": quality, "density": density}
    found["error_by_cell"] = [[error]]
    return toy_report.Entry(toys.Cell("two_moons", method, seed, settings, part), steps, found)


def test_leaderboard_is_sorted_and_compares_at_equal_time(toys, toy_report):
    entries = [entry(toys, toy_report, "MeanFlow", 400, 0.02), entry(toys, toy_report, "Shortcut", 400, 0.01)]
    entries += [entry(toys, toy_report, name, 100, 0.08, part=0.25) for name in ("MeanFlow", "Shortcut")]
    entries += [entry(toys, toy_report, "Diverged", 400, math.nan)]
    entries += [
        entry(toys, toy_report, "MeanFlow", 400, error, settings="paper", seed=i) for i, error in enumerate((2, 4))
    ]
    text = toy_report.tables("two_moons", entries, {"MeanFlow": 0.1, "Shortcut": 0.2}, entries[0].found)
    board = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[1].splitlines()]
    column = {name: i for i, name in reversed(list(enumerate(board[0])))}
    assert [row[0] for row in board[2:6]] == ["Shortcut", "MeanFlow", "MeanFlow", "Diverged"]
    at_equal_time = column["error at equal time"]
    # 40 s are half of Shortcut's training: half way between 0.08 and 0.01 on logarithmic axes.
    assert float(board[2][at_equal_time]) == pytest.approx((0.08 * 0.01) ** 0.5, rel=0.05)
    assert board[3][at_equal_time] == "0.02"
    assert board[4][column["error of u"]] == "3 ± 1" and board[4][at_equal_time] == "-"
    assert board[5][column["error of u"]] == "diverged"


def test_methods_that_end_at_the_data_come_last_without_what_they_do_not_learn(toys, toy_report):
    entries = [entry(toys, toy_report, "Ends", 400, 0.01), entry(toys, toy_report, "MeanFlow", 400, 0.02)]
    entries[0].found["faults"] = 3
    text = toy_report.tables("two_moons", entries, {}, entries[0].found, ["Ends"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[1].splitlines()]
    assert [row[0] for row in rows[2:]] == ["MeanFlow", "Ends", "samples of the data"]
    assert rows[3] == ["Ends", "common", "-", *["0.01"] * 8]
    assert "These learn u(z, 0, t) alone, so further evaluations take new noise: Ends." in text
    assert "left out: Ends (3)." in text


def test_outside_the_trained_lengths_there_is_no_value(toys, toy_report):
    entries = [entry(toys, toy_report, "MeanFlow", steps, 1 / steps, part=steps / 400) for steps in (100, 400)]
    lines = toy_report.lines_of(entries)
    values = [toy_report.value_at(seconds, lines, {"MeanFlow": 0.1}, "overall") for seconds in (9, 10, 20, 40, 41)]
    assert values == [None, "0.01", "0.005", "0.0025", None]


@pytest.mark.rehearsal
def test_time_of_a_step_is_measured_once_in_the_middle_of_a_training(toy_2d, tmp_path, monkeypatch):
    small = {"width": 8, "depth": 1, "batch": 8, "references": 0, "steps": 20, "methods": ("FlowMatching",)}
    config, ledger = toy_2d.Config(**small), run.Ledger(tmp_path / "cells.jsonl")
    steps, scan = [], toy_2d.mfx.scan_steps

    def counted(step, state, draw, number):
        steps.append((int(state.step), number))
        return scan(step, state, draw, number)

    monkeypatch.setattr(toy_2d.mfx, "scan_steps", counted)
    (seconds,) = toy_2d.measure_costs(config, "checkerboard", ledger).values()
    assert 0 < seconds < 1
    assert steps == [(10 + 20 * i, 20) for i in range(toy_2d.ROUNDS + 1)]
    again = toy_2d.measure_costs(config, "checkerboard", run.Ledger(tmp_path / "cells.jsonl"))
    assert again == {"FlowMatching": seconds} and len(steps) == toy_2d.ROUNDS + 1


def test_error_against_time_is_drawn_for_every_method_of_every_data_set(toys, toy_report, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    entries = [
        entry(toys, toy_report, "MeanFlow", steps, 1 / steps, part=part) for steps, part in ((400, 1), (100, 0.25))
    ]
    costs = {"MeanFlow": 0.1}
    toy_report.save_error_against_time(tmp_path / "a.png", {"one": (entries, costs), "$5_$10": (entries, costs)})
    saved[0].draw_without_rendering()  # would raise if the title were read as a formula
    for panel in saved[0].axes:
        np.testing.assert_allclose(panel.lines[0].get_xydata(), [[10, 1 / 100], [40, 1 / 400]])


def test_flow_matching_samples_by_euler(toys):
    import equinox as eqx
    import jax.random as jr

    import mf_eqx as mfx

    field = filled(lambda: mfx.MLP(2, width=8, depth=1, key=jr.key(0)))
    eps, times = np.array([0.5, -1.0], np.float32), mfx.uniform_times(4)
    found, expected = (
        eqx.filter_jit(method)(network, eps, times=times)
        for method, network in ((mfx.sample, toys.Instantaneous(field)), (mfx.sample_euler, field))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # two programs, which may round otherwise


def test_density_of_a_gaussian_is_judged_against_that_of_the_data(toys):
    from mf_eqx import exact

    mixture = exact.GaussianMixture(np.array([[0.5, -0.5]], np.float32), 0.3)
    problem = toys.Problem("one", mixture, mixture, None, None, np.zeros((400, 2), np.float32), 1.0)
    same, wider = (exact.GaussianAverageVelocity(mixture.mean[0], std) for std in (0.3, 0.6))
    found = toys.density(problem, same)
    np.testing.assert_allclose(found, (0, 0, 1, 1, 0), atol=1e-4)
    found = toys.density(problem, wider)
    assert abs(found.divergence - (2**2 - 1 - 2 * math.log(2))) < 4 * found.standard_error < 1
    assert found.turned_over == 0
    nowhere = exact.GaussianAverageVelocity(np.full(2, np.float32(np.finfo(np.float32).max)), 0.3)
    assert np.isnan(toys.density(problem, nowhere)).all()


@pytest.mark.slow
def test_stacked_data_are_learnt_by_a_dit_and_judged_in_all_their_dimensions(toy_2d, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--data eight_gaussians_64d --methods FlowMatching MeanFlow --steps 8 --samples 100 --rows 20"
    run.main(toy_2d.main, toy_2d.PRESETS, argv=[*arguments.split(), "--large-samples", "100"])
    rows = json.loads((report_in(tmp_path) / "results.json").read_text())
    assert len(rows) == 5
    assert all(np.isfinite(list(quality.values())).all() for row in rows for quality in row["quality"])
    assert all(np.isfinite(list(row["density"].values())).all() for row in rows)
    assert (report_in(tmp_path) / "error_against_time.png").exists()


def test_field_of_stacked_data_takes_vectors(toy_2d):
    import jax
    import jax.numpy as jnp

    config = toy_2d.Config(dit_width=12, dit_depth=1)
    field = filled(lambda: toy_2d.make_field(config, "eight_gaussians_64d", 0))
    z = jnp.asarray(np.arange(64, dtype=np.float32) / 64)
    pixels = jax.jit(lambda z: field.field(z.reshape(4, 4, 4).transpose(2, 0, 1), 0.0, 1.0).transpose(1, 2, 0))(z)
    # Two programs, which may round otherwise.
    np.testing.assert_allclose(jax.jit(lambda z: field(z, 0.0, 1.0))(z), pixels.reshape(-1), rtol=1e-6, atol=1e-6)


def test_quick_is_no_larger_than_what_is_asked_for(toy_2d):
    asked = dataclasses.replace(toy_2d.Config(), steps=7, samples=10**6, data=("two_moons", "pinwheel"))
    quick = toy_2d.shrunk(asked)
    assert (quick.steps, quick.samples, quick.seeds, quick.data) == (7, 1000, 1, ("two_moons",))
    assert quick.methods == ("FlowMatching", "MeanFlow", "Exact")
    assert [cell[2:] for cell in toy_2d.cells(quick)] == [(0, "common", 1.0)] * 3
    assert toy_2d.shrunk(toy_2d.Config()).data == ("eight_gaussians",)
    assert toy_2d.shrunk(toy_2d.Config(data=("checkerboard",))).data == ("checkerboard",)
    asked = dataclasses.replace(asked, methods=("Shortcut",))
    assert toy_2d.shrunk(asked).methods == ("Shortcut",)


def test_methods_train_on_references_unless_they_need_pairs_or_the_exact_velocity_is_given(toy_2d):
    methods = ("FlowMatching", "MeanFlow", "ConsistencyTraining", "InductiveMomentMatching")
    config = toy_2d.Config(methods=methods, references=64)

    def target(config, method):
        cell = toy_2d.Cell("checkerboard", method, 0)
        return toy_2d.with_target(toy_2d.objective(config, cell), config, "checkerboard")

    for method in ("FlowMatching", "MeanFlow"):
        stable = target(config, method).stable_target
        assert stable.number == 64 and stable.x.shape == (toy_2d.REFERENCES, 2)
        exact_target = target(dataclasses.replace(config, methods=(method,), marginal=True), method)
        assert exact_target.stable_target is None and exact_target.velocity is not None
        plain = target(dataclasses.replace(config, references=0), method)
        assert plain.stable_target is None and plain.velocity is None
    for method in methods[2:]:
        without = target(config, method)
        assert without.stable_target is None and without.weight.power == 0


def test_network_is_the_one_that_is_asked_for(toy_2d):
    import equinox as eqx

    config = toy_2d.Config(width=24, depth=2, condition_width=6, fourier_features=5)
    training = toy_2d.training(config, toy_2d.Cell("checkerboard", "MeanFlow", 0))
    field = eqx.filter_eval_shape(training.make_field)
    assert field.frequencies.shape == (2, 5)
    assert field.stack.blocks.condition.weight.shape == (2, 6, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data moons", "--data must be among eight_gaussians, .*; got moons"),
        ("--settings papers", "--settings must be among common, paper; got papers"),
        ("--settings", "--settings must be at least one of common, paper; got none"),
        ("--shorter 0.5 0.5", "--shorter must differ from each other, got 0.5, 0.5"),
        ("--data eight_gaussians_64d --dit-batch 7", "--dit-batch must be a positive multiple of .* settings of "),
        ("--shorter 1", r"--shorter must lie in \(0, 1\), got 1.0"),
        ("--dit-width 50", "--dit-width must be a multiple of 12 .*, got 50"),
        ("--methods meanflow", "--methods must be among FlowMatching, .*; got meanflow"),
        ("--methods Exact Exact", "--methods must differ from each other, got Exact, Exact"),
        ("--steps 0", "--steps must be >= 1, got 0"),
        ("--batch 7", "--batch must be a positive multiple of"),
        ("--identity-share 1", "--identity-share must be below 1 for .*, which does not fix"),
        ("--power -1", "--power must be >= 0 and finite, got -1"),
        ("--clip 0", "--clip must be > 0, got 0.0"),
        ("--references 65537", "--references must be"),
        ("--references -1", "--references must be >= 0, got -1"),
        ("--fourier-features -1", "--fourier-features must be >= 0, got -1"),
        ("--fourier-scale 0", "--fourier-scale must be > 0, got 0.0"),
        ("--methods ConsistencyTraining --marginal", "--marginal must be False for ConsistencyTraining"),
        ("--decay 1", "--decay must lie in"),
        ("--new-noise 2", r"--new-noise must lie in \[0, 1\], got 2"),
    ],
)
def test_bad_input_ends_in_one_line(toy_2d, arguments, message, refusal_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, toy_2d.main, toy_2d.PRESETS, argv=arguments.split())
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_score_nan_in_the_table(toys):
    """Whatever the data are, of which nothing is computed then."""
    for value in (np.nan, np.inf):
        x = np.zeros((20, 2), np.float32)
        x[3] = value
        assert np.isnan(toys.quality(None, x)).all()
        assert np.isnan(toys.large_distance(None, x))
