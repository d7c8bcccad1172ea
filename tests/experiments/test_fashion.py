"""Fashion-MNIST by its own command line: on a few images that are drawn here, and on its files where they are."""

import json
import pathlib

import numpy as np
import pytest
from image_files import save_files
from processes import Killed

from mf_eqx import checkpoint, run

SMALL = "--data files --preset quick --depth 1 --heads 2 --width 8 --batch 8 --samples 20"
SHORT = "--steps 5 --warmup 1 --decay 0.5 --save-every 2 --log-every 1 --preview-every 3"
PLACE = pathlib.Path("/usr/share/datasets/fashion-mnist")
installed = pytest.mark.skipif(not PLACE.exists(), reason="apt install dataset-fashion-mnist")


@pytest.fixture(scope="module")
def fashion(experiment):
    pytest.importorskip("safetensors")
    return experiment("fashion")


@pytest.fixture(scope="module")
def few(fashion):
    """Judged in one space of features, and the classifier hardly trained."""
    judging = fashion.images.image_judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion.images, "EVALUATIONS", (1,))
        patch.setattr(fashion.images.image_classifier, "STEPS", 3)
        patch.setattr(judging, "feature_spaces", lambda: [judging.FeatureSpace("pixels", judging.pixels)])
        yield


@pytest.fixture(scope="module")
def command(fashion, few):
    def command(root, arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr("sys.argv", ["fashion.py"])
            run.main(fashion.main, fashion.PRESETS, argv=arguments.split())
        (config,) = (root / "runs").glob("fashion/*/config.json")
        return config.parent

    return command


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    root = tmp_path_factory.mktemp("fashion")
    save_files(root / "files")
    return command(root, f"{SMALL} {SHORT}")


@pytest.mark.slow  # 18 s: compiling; test_images.py trains by the same code in each run of the tests
def test_a_run_on_four_files_ends_with_tables_by_class_and_pictures(finished):
    names = {"samples.png", "comparison.png", "curves.png", "results.json", "ema.safetensors"}
    assert names <= {path.name for path in finished.iterdir()}
    table = (finished / "results.md").read_text()
    assert "20 images each" in table and "The wanted class read, by class:" in table and "sneaker" in table
    assert checkpoint.read_weights(finished / "ema.safetensors").notes.class_names[9] == "boot"


@pytest.mark.slow
def test_classes_are_generated_by_name_from_the_file_of_weights_alone(finished, experiment, tmp_path, monkeypatch):
    generate, file = experiment("generate"), "ema.safetensors"
    (tmp_path / file).write_bytes((finished / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    flags = f"--weights {file} --label sneaker bag --number 4 --to x.npy"
    run.main(generate.main, generate.Config(), argv=flags.split())
    x = np.load("x.npy")
    assert x.shape == (4, 1, 8, 8) and np.isfinite(x).all()


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(finished, fashion, command, tmp_path, monkeypatch):
    (tmp_path / "files").symlink_to(finished.parents[2] / "files")

    def killed(*given, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fashion.images.image_samples, "save_samples", killed)  # by the preview of step 3
        command(tmp_path, f"{SMALL} {SHORT}")
    again = command(tmp_path, f"{SMALL} {SHORT}")
    for name in ("ema.safetensors", "metrics.jsonl", "results.json"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("data", ["--data nowhere", "--data .", "--data files files", "--data"])
def test_where_the_files_are_missing_a_line_says_what_brings_them(data, fashion, tmp_path, monkeypatch, refusal_of):
    monkeypatch.chdir(tmp_path)
    line = refusal_of(run.main, fashion.main, fashion.PRESETS, argv=data.split())
    assert not [*tmp_path.iterdir()]
    assert "--data must be a folder with the four IDX files" in line
    assert "apt install dataset-fashion-mnist brings them to /usr/share/datasets/fashion-mnist" in line


def test_other_classes_than_ten_are_refused_before_anything_is_trained(fashion, tmp_path, monkeypatch, refusal_of):
    monkeypatch.chdir(tmp_path)
    save_files(tmp_path / "files")
    for path in (tmp_path / "files").glob("*labels*"):
        path.write_bytes(path.read_bytes()[:8] + bytes(len(path.read_bytes()) - 8))
    line = refusal_of(run.main, fashion.main, fashion.PRESETS, argv=SMALL.split())
    assert "labels must be 10, one for each class, got 1" in line


@installed
def test_the_package_brings_balanced_classes_in_two_parts(fashion):
    assert str(PLACE) == fashion.PLACE
    train, test, _ = fashion.images.open_data(fashion.PRESETS["quick"][1], fashion.CLASSES)
    for source, count in ((train, 6000), (test, 1000)):
        rows = source.take(np.arange(len(source)))
        assert rows.x.shape == (10 * count, 1, 28, 28) and [*np.bincount(rows.label)] == 10 * [count]


@pytest.mark.slow
@installed
def test_a_classifier_reads_nine_in_ten_test_images(fashion, tmp_path):
    train, test, _ = fashion.images.open_data(fashion.PRESETS["quick"][1], fashion.CLASSES)
    classifying = fashion.images.image_classifier
    rows = test.take(np.arange(len(test)))
    _, read = classifying.read(classifying.trained(train, tmp_path), rows.x)
    assert (read == rows.label).mean() >= 0.9


@pytest.mark.slow
@installed
@pytest.mark.parametrize(
    "flags", ["", "--network unet", "--identity-share 0 --power 0", "--mix 0.5", "--references 64"]
)
def test_quick_runs_on_fashion_mnist(flags, command, tmp_path):
    directory = command(tmp_path, f"--preset quick --test-run {flags}")
    *_, row = json.loads((directory / "results.json").read_text())
    assert np.isfinite(row["frechet"]["pixels"]) and len(row["agreement_by_class"]) == 10
