import dataclasses
import json

import jax
import pytest

from mf_eqx import run
from mf_eqx.run._settings import default_name


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    steps: int = 10
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Started(Config):
    start: str = ""


def opened(root, **fields):
    return run.opened(Config(**fields), root=root, script="toys")


def made(root, **fields):
    """The directory of a run that was opened and left."""
    with opened(root, **fields) as directory:
        return directory.root


def tree(root):
    return {str(path.relative_to(root)): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def refused(root, **fields):
    """The message of a refusal that must change nothing."""
    before = tree(root)
    with pytest.raises(ValueError) as error, opened(root, **fields):
        pass
    assert tree(root) == before
    return str(error.value)


def test_directory_is_named_after_the_recipe(tmp_path):
    assert made(tmp_path) == tmp_path / "toys" / default_name(Config())


def test_directory_is_named_as_asked(tmp_path):
    assert made(tmp_path, name="sweep/a") == tmp_path / "toys" / "sweep" / "a"


def test_same_recipe_with_other_settings_is_the_same_directory(tmp_path):
    assert made(tmp_path) == made(tmp_path, save_every=3, fsdp=2)
    assert made(tmp_path) != made(tmp_path, rate=0.2)


def test_configuration_is_that_of_the_first_start_and_every_start_has_a_line(tmp_path):
    root = made(tmp_path)
    made(tmp_path, save_every=3)
    assert json.loads((root / "config.json").read_text())["config"]["save_every"] == Config().save_every
    starts = [json.loads(line) for line in (root / "starts.jsonl").read_text().splitlines()]
    assert [start["versions"]["jax"] for start in starts] == [jax.__version__] * 2


def test_another_recipe_of_that_name_is_refused_with_what_differs(tmp_path):
    root = made(tmp_path, name="a")
    assert refused(tmp_path, name="a", rate=0.2) == (
        f"name must be that of a run with this configuration, but in {root} rate was 0.1, now 0.2; "
        "a new run takes another name"
    )


def test_a_longer_run_of_that_name_is_refused_with_the_way_on(tmp_path):
    with run.opened(Started(name="a"), root=tmp_path, script="toys") as directory:
        pass
    message = f"steps was 10, now 20; the number of steps cannot be changed .*: --start {directory.root} begins"
    with (
        pytest.raises(ValueError, match=message),
        run.opened(Started(name="a", steps=20), root=tmp_path, script="toys"),
    ):
        pass


def test_a_longer_run_in_a_directory_of_its_own_is_told_of_the_shorter_one(tmp_path, capsys):
    for fields in ({}, {"steps": 20}, {"steps": 30, "rate": 0.2}):
        with run.opened(Started(**fields), root=tmp_path, script="toys"):
            pass
    shorter = tmp_path / "toys" / default_name(Started())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'toys' / default_name(Started(steps=20))}: a new run; ")
    assert f"--start {shorter} begins a new run from the state of that one" in line


def test_a_run_of_several_trainings_is_continued_from_one_of_them(tmp_path, capsys):
    with run.opened(Started(), root=tmp_path, script="toys") as directory:
        for name in ("a", "b"):
            directory.path(f"{name}/checkpoints/00000001/array")
    with run.opened(Started(steps=20), root=tmp_path, script="toys"):
        pass
    assert f"--start {directory.root}/a or --start {directory.root}/b begins a new run" in capsys.readouterr().out


def test_a_run_that_has_a_name_is_told_and_continued_by_its_name(tmp_path, capsys):
    old = made(tmp_path, name="mine")
    made(tmp_path, name="of-a-test", test_run=True)  # is nothing to continue
    new = made(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{new}: a new run; {old} has the same configuration, and --name mine continues it"
    with opened(tmp_path, name="mine") as directory:
        assert directory.root == old
    assert not capsys.readouterr().out


def test_a_shared_directory_is_that_of_all_configurations(tmp_path):
    for rate in (0.1, 0.2):
        with run.opened(Config(rate=rate), root=tmp_path, script="toys", shared="cells") as directory:
            assert directory.root == tmp_path / "toys" / "cells"
    assert len((directory.root / "starts.jsonl").read_text().splitlines()) == 2
    with run.opened(Config(test_run=True), root=tmp_path, script="toys", shared="cells") as directory:
        assert directory.root == tmp_path / "toys" / "cells-test"


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "toys" / "a").mkdir(parents=True)
    (tmp_path / "toys" / "a" / "precious.txt").write_text("data")
    assert "has files and no config.json" in refused(tmp_path, name="a")
    (tmp_path / "toys" / "a").rename(tmp_path / "toys" / "a-test")
    assert "has files and no config.json" in refused(tmp_path, name="a", test_run=True)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "a").write_text("")
    assert "name must be that of a directory" in refused(tmp_path, name="a")


@pytest.mark.parametrize("name", ["../a", "/a", ".", "b/../../a"])
def test_a_name_that_leaves_the_root_is_refused(name, tmp_path):
    assert "name must be a path below" in refused(tmp_path, name=name)


DEEP = ["[" * 100_000, '{"config": {"rate": ' + "[" * 900 + "]" * 900 + "}}"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"config": 3}', "null", '{"config": {"rate": NaN}}', '{"config": {"a": 1e999}}', *DEEP],
    ids=range(10),
)
def test_a_configuration_that_cannot_be_read_is_refused_by_its_file(text, tmp_path):
    file = made(tmp_path, name="a") / "config.json"
    file.write_text(text)
    assert str(file) in refused(tmp_path, name="a")


def test_a_directory_that_was_left_before_its_configuration_was_written_is_used(tmp_path):
    root = made(tmp_path)
    (root / "config.json").unlink()
    (root / "starts.jsonl").unlink()
    assert made(tmp_path) == root
    assert (root / "config.json").exists()


def test_a_directory_in_use_is_refused_and_free_afterwards(tmp_path):
    with opened(tmp_path) as directory:
        before = tree(tmp_path)
        with pytest.raises(run.InUse, match=f"{directory.root}: is in use by process"), opened(tmp_path):
            pass
        assert tree(tmp_path) == before
    made(tmp_path)


def test_a_dry_run_makes_nothing_and_minds_no_lock(tmp_path):
    assert not made(tmp_path, dry_run=True).exists()
    assert not list(tmp_path.iterdir())
    with opened(tmp_path), opened(tmp_path, dry_run=True):
        pass


def test_a_test_run_empties_its_own_directory_and_no_other(tmp_path):
    root = made(tmp_path, name="a")
    (root / "metrics.jsonl").write_text("precious")
    with opened(tmp_path, name="a", test_run=True) as directory:
        assert directory.root == tmp_path / "toys" / "a-test"
        directory.path("checkpoints/00000001/array").write_text("old")
        directory.path("metrics.jsonl").write_text("old")
    again = made(tmp_path, name="a", test_run=True, rate=0.2)  # of whatever recipe
    assert sorted(path.name for path in again.iterdir()) == [".lock", "config.json", "starts.jsonl"]
    assert (root / "metrics.jsonl").read_text() == "precious"


def test_what_a_killed_run_left_half_written_is_removed_at_the_next_start(tmp_path):
    with opened(tmp_path) as directory:
        for name in ("summary.json.part", "cells/a/metrics.jsonl.part"):
            directory.path(name).write_text("{")
    with opened(tmp_path) as directory:
        assert not list(directory.root.rglob("*.part"))


def test_a_test_run_is_emptied_of_links_and_not_of_what_they_point_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    with opened(tmp_path, test_run=True) as directory:
        directory.path("link").symlink_to(elsewhere)
    with opened(tmp_path, test_run=True) as directory:
        assert not directory.path("link").is_symlink()
    assert (elsewhere / "file").read_text() == "kept"


def test_a_test_run_in_use_is_not_emptied(tmp_path):
    with opened(tmp_path, test_run=True) as directory:
        directory.path("metrics.jsonl").write_text("new")
        with pytest.raises(run.InUse), opened(tmp_path, test_run=True):
            pass
        assert (directory.root / "metrics.jsonl").read_text() == "new"


def test_a_run_named_like_a_test_run_is_never_emptied(tmp_path):
    (made(tmp_path, name="a-test") / "metrics.jsonl").write_text("precious")
    refused(tmp_path, name="a", test_run=True)


@pytest.mark.parametrize(
    "error", [ValueError("bad"), MemoryError("bad"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: bad")]
)
def test_a_refusal_inside_leaves_no_directory_that_was_not_there(error, tmp_path):
    with pytest.raises(type(error), match="bad"), opened(tmp_path / "new", name="a/b"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_refusal_inside_leaves_the_directories_of_others(tmp_path):
    made(tmp_path, name="a")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="bad"), opened(tmp_path, name="b"):
        raise ValueError("bad")
    assert tree(tmp_path) == before
