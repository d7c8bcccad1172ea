"""The toy script from its command line: its references score as they must, and a wrong method shows."""

import dataclasses
import json
import re

import numpy as np
import pytest

from mf_eqx import run

SMALL = "--steps 800 --seeds 1 --width 48 --depth 2 --batch 128 --samples 1000 --large-samples 2000 --rows 200"
LOWER_IS_BETTER = ("sliced_wasserstein", "energy_distance", "mmd", "total_variation")


@pytest.fixture(scope="module")
def toy_2d(experiment):
    return experiment("toy_2d")


@pytest.fixture(scope="module")
def finished(toy_2d, tmp_path_factory):
    """The directory of a finished run of the right method, a wrong one and the truth."""
    root = tmp_path_factory.mktemp("toy_2d")
    arguments = f"--data three_gaussians --methods MeanFlow WrongTangent Exact {SMALL}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run.main(toy_2d.main, toy_2d.PRESETS, argv=arguments.split())
    (directory,) = (root / "runs").glob("*/*")
    return directory


@pytest.fixture(scope="module")
def rows(finished):
    return {row["method"]: row for row in json.loads((finished / "results.json").read_text())}


def test_a_run_leaves_config_results_and_pictures(finished):
    pictures = [f"three_gaussians_{kind}.png" for kind in ("samples", "errors", "flows")]
    for name in ("config.json", "results.json", "results.md", *pictures):
        assert (finished / name).stat().st_size > 0


def test_exact_field_has_no_error(rows):
    exact = rows["Exact"]
    assert max(exact[place] for place in ("overall", "diagonal", "one_step")) < 1e-6
    assert exact["identity"] < 1e-3  # float32, tolerances of 1e-5
    assert exact["semigroup"] < 1e-4


def test_exact_field_scores_the_noise_floor_at_any_number_of_evaluations(toy_2d, rows, finished):
    (floor,) = re.findall(r"\| samples of the data(.*)\|", (finished / "results.md").read_text())
    floor = [float(cell) for cell in floor.split("|")[-len(toy_2d.Quality._fields) :]]
    for quality in rows["Exact"]["quality"]:
        for name, value in zip(toy_2d.Quality._fields, floor, strict=True):
            # Two draws of the noise floor: those of distances differ by a factor of up to three at 1,000 samples.
            if name in LOWER_IS_BETTER:
                assert value / 3 < quality[name] < 3 * value
            else:
                assert abs(quality[name] - value) < 0.03


def test_wrong_tangent_shows_in_every_column_that_it_can_touch(rows):
    right, wrong = rows["MeanFlow"], rows["WrongTangent"]
    for place in ("overall", "one_step", "identity", "semigroup"):
        assert wrong[place] > 1.5 * right[place], place  # seen: 2 to 13 times
    for name in LOWER_IS_BETTER:
        assert wrong["quality"][0][name] > 1.5 * right["quality"][0][name], name
    assert wrong["quality"][0]["mode_coverage"] < right["quality"][0]["mode_coverage"] - 0.1
    # Rows with r = t are plain Flow Matching whatever the tangent.
    assert wrong["diagonal"] < 2 * right["diagonal"]


def test_error_is_shown_by_cells_of_both_times(toy_2d, rows):
    cells = np.array(rows["MeanFlow"]["error_by_cell"], float)
    assert cells.shape == (len(toy_2d.EDGES) - 1,) * 2
    assert np.isnan(cells[np.tril_indices(len(cells), -1)]).all()  # r > t
    assert np.isfinite(cells[0, -1])


def test_every_identity_is_a_method_and_the_usual_ones_are_the_default(toy_2d):
    import mf_eqx as mfx

    found = mfx.identities_in(vars(mfx), steps=1)
    assert {*found, "FlowMatching", "WrongTangent", "Exact"} == set(toy_2d.methods())
    assert {"FlowMatching", "MeanFlow", "Exact"} < set(toy_2d.Config().methods) < {"FlowMatching", "Exact", *found}


def test_identities_of_a_file_join_the_methods(toy_2d, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import mf_eqx as mfx\n\n\nclass Mine(mfx.AbstractIdentity):\n    facts = mfx.Facts()\n\n"
        "    def residual(self, field, row):\n        return row.evaluate(field, row.z, row.r, row.t) - row.v\n"
    )
    config = toy_2d.Config(own=str(path), methods=("Mine", "MeanFlow"))
    assert type(toy_2d.objective(config, "Mine").identity).__name__ == "Mine"
    with pytest.raises(ValueError, match=r"methods must be among .*; got Mine"):
        toy_2d.Config(methods=("Mine",))
    with pytest.raises(ValueError, match=r"own must be a Python file, got none\.py"):
        toy_2d.Config(own="none.py")


def test_flow_matching_samples_by_euler(toy_2d):
    import jax
    import jax.random as jr

    import mf_eqx as mfx

    field = mfx.MLP(2, width=8, depth=1, key=jr.key(0))
    field = jax.tree.map(lambda leaf: leaf + 0.1, field)
    eps = jr.normal(jr.key(1), (2,))
    times = mfx.uniform_times(4)
    np.testing.assert_array_equal(
        mfx.sample(toy_2d.Instantaneous(field), eps, times=times), mfx.sample_euler(field, eps, times=times)
    )


@pytest.mark.slow
def test_copies_are_judged_in_all_their_dimensions(toy_2d, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--data eight_gaussians --methods FlowMatching --copies 2 --steps 2 --seeds 1 --samples 100 --rows 20"
    run.main(toy_2d.main, toy_2d.PRESETS, argv=[*arguments.split(), "--large-samples", "100"])
    (directory,) = (tmp_path / "runs").glob("*/*")
    (row,) = json.loads((directory / "results.json").read_text())
    assert all(np.isfinite(list(quality.values())).all() for quality in row["quality"])


def test_quick_is_no_larger_than_what_is_asked_for(toy_2d):
    asked = dataclasses.replace(toy_2d.Config(), steps=7, samples=10**6, data=("two_moons", "pinwheel"))
    quick = toy_2d.shrunk(asked)
    assert (quick.steps, quick.samples, quick.seeds, quick.data) == (7, 1000, 1, ("two_moons",))
    assert quick.methods == ("FlowMatching", "MeanFlow", "Exact")
    asked = dataclasses.replace(asked, methods=("Shortcut",))
    assert toy_2d.shrunk(asked).methods == ("Shortcut",)


def test_methods_train_on_references_unless_they_need_pairs_or_the_exact_velocity_is_given(toy_2d):
    methods = ("FlowMatching", "MeanFlow", "ConsistencyTraining", "InductiveMomentMatching")
    config = toy_2d.Config(methods=methods, references=64)

    def target(config, method):
        return toy_2d.with_target(toy_2d.objective(config, method), config, "checkerboard")

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
    config = toy_2d.Config(width=24, depth=2, condition_width=6, fourier_features=5)
    field = toy_2d.training(config, toy_2d.Cell("checkerboard", "MeanFlow", 0)).make_field()
    assert field.frequencies.shape == (2, 5)
    assert field.stack.blocks.condition.weight.shape == (2, 6, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data moons", "--data must be among eight_gaussians, .*; got moons"),
        ("--methods meanflow", "--methods must be among FlowMatching, .*; got meanflow"),
        ("--methods Exact Exact", "--methods must differ from each other, got Exact, Exact"),
        ("--steps 0", "--steps must be >= 1, got 0"),
        ("--batch 7", "--batch must be a positive multiple of"),
        ("--identity-share 1", "--identity-share must be below 1 for ImprovedMeanFlow"),
        ("--power -1", "--power must be >= 0 and finite, got -1"),
        ("--clip 0", "--clip must be > 0, got 0.0"),
        ("--references 65537", "--references must be"),
        ("--references -1", "--references must be >= 0, got -1"),
        ("--fourier-features -1", "--fourier-features must be >= 0, got -1"),
        ("--fourier-scale 0", "--fourier-scale must be > 0, got 0.0"),
        ("--methods ConsistencyTraining --marginal", "--marginal must be False for ConsistencyTraining"),
        ("--decay 1", "--decay must lie in"),
    ],
)
def test_bad_input_ends_in_one_line(toy_2d, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run.main(toy_2d.main, toy_2d.PRESETS, argv=arguments.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_score_nan_in_the_table(toy_2d):
    config = dataclasses.replace(toy_2d.Config(), samples=20, large_samples=20, rows=10)
    problem = toy_2d.make_problem(config, "three_gaussians")
    for value in (np.nan, np.inf):
        x = problem.data.at[3].set(value)
        assert np.isnan(toy_2d.quality(problem, x)).all()
        assert np.isnan(toy_2d.large_distance(config, problem, x))
