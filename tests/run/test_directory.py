import json
import subprocess
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
import pytest

import mf_eqx
from mf_eqx import Mean, run


@dataclass(frozen=True)
class Inner:
    interval: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Config:
    steps: int = 100
    share: Fraction = Fraction(1, 4)
    clip: float = float("inf")
    data: Path = Path("data/train")
    scale: float | None = None
    inner: Inner = field(default_factory=Inner)


def create(tmp_path, name: str | None = "a") -> run.RunDirectory:
    return run.RunDirectory.create(Config(), name, root=tmp_path, script="digits")


def description(directory: run.RunDirectory) -> dict:
    return json.loads((directory.root / "config.json").read_text(), parse_constant=pytest.fail)


def test_directory_lies_below_root_and_script(tmp_path):
    assert create(tmp_path, "sweep/a").root == tmp_path / "digits" / "sweep" / "a"


def test_script_is_named_after_the_running_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/toys.py"])
    assert run.RunDirectory.create(Config(), "a", root=tmp_path).root == tmp_path / "toys" / "a"


def test_runs_without_a_name_never_share_a_directory(tmp_path):
    assert len({create(tmp_path, None).root for _ in range(5)}) == 5


def test_config_is_written_as_strict_json(tmp_path):
    assert description(create(tmp_path))["config"] == {
        "steps": 100,
        "share": "1/4",
        "clip": "inf",
        "data": str(Path("data/train")),
        "scale": None,
        "inner": {"interval": [0.0, 1.0]},
    }


def test_versions_and_device_are_written(tmp_path):
    written = description(create(tmp_path))
    versions = written["versions"]
    assert versions["mf_eqx"] == mf_eqx.__version__
    assert (versions["jax"], versions["equinox"]) == (jax.__version__, equinox.__version__)
    assert written["device"]["kind"] == jax.devices()[0].device_kind


def git(directory: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    ended = subprocess.run(["git", *identity, *command], cwd=directory, check=True, capture_output=True, text=True)
    return ended.stdout.strip()


def test_commit_of_the_script_is_written_and_changes_are_marked(tmp_path, monkeypatch):
    script = tmp_path / "toys.py"
    script.write_text("")
    try:
        git(tmp_path, "init")
    except OSError:
        pytest.skip("needs git")
    git(tmp_path, "add", "toys.py")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(sys, "argv", [str(script)])
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert description(create(tmp_path, "clean"))["commit"] == commit
    script.write_text("changed")
    assert description(create(tmp_path, "changed"))["commit"] == f"{commit}-dirty"


def test_without_git_the_commit_is_null(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert description(create(tmp_path))["commit"] is None


def test_directory_with_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "digits" / "a").mkdir(parents=True)
    (tmp_path / "digits" / "a" / "precious.txt").write_text("data")
    with pytest.raises(ValueError, match="name must be that of a new run, got 'a'"):
        create(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["precious.txt"]


def test_empty_directory_is_used(tmp_path):
    (tmp_path / "digits" / "a").mkdir(parents=True)
    assert (create(tmp_path).root / "config.json").exists()


def test_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "a").write_text("")
    with pytest.raises(ValueError, match="name must be"):
        create(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/a", "", "b/../../a"])
def test_name_that_leaves_the_root_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name must be a path below"):
        create(tmp_path / "root", name)
    assert not list(tmp_path.iterdir())


def test_path_makes_parent_directories(tmp_path):
    directory = create(tmp_path)
    directory.path("previews/000500.png").write_bytes(b"")
    assert (directory.root / "previews" / "000500.png").exists()


def test_each_log_is_one_line_at_once(tmp_path):
    directory = create(tmp_path)
    for step in (10, 20):
        directory.log(step, {"loss": Mean(jnp.asarray(3.0), jnp.asarray(2.0)), "rate": 0.5})
        text = (directory.root / "metrics.jsonl").read_text()
        assert text.splitlines()[-1] == f'{{"step": {step}, "loss": 1.5, "rate": 0.5}}'
    assert text.count("\n") == 2


def test_numbers_that_are_not_finite_are_null(tmp_path):
    directory = create(tmp_path)
    by_gap = Mean(jnp.asarray([1.0, 0.0]), jnp.asarray([1.0, 0.0]))
    directory.log(1, {"nan": jnp.nan, "inf": -jnp.inf, "by_gap": by_gap})
    assert directory.records() == [{"step": 1, "nan": None, "inf": None, "by_gap": [1.0, None]}]


def test_records_of_an_opened_directory_are_those_logged(tmp_path):
    directory = create(tmp_path)
    directory.log(1, {"loss": 2.0})
    assert run.RunDirectory(directory.root).records() == [{"step": 1, "loss": 2.0}]


def test_record_that_was_cut_off_is_left_out(tmp_path):
    directory = create(tmp_path)
    directory.log(1, {"loss": 2.0})
    with directory.path("metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert directory.records() == [{"step": 1, "loss": 2.0}]


def test_a_run_that_logged_nothing_has_no_records(tmp_path):
    assert create(tmp_path).records() == []


def test_results_are_markdown_and_strict_json(tmp_path):
    directory = run.RunDirectory(tmp_path)
    directory.save_results("# A table", [{"a": 1.5, "b": [float("nan"), {"c": float("inf")}]}])
    assert (tmp_path / "results.md").read_text() == "# A table\n"
    assert json.loads((tmp_path / "results.json").read_text()) == [{"a": 1.5, "b": [None, {"c": None}]}]


# Files that others changed


UNREADABLE = "must be a record with a step, but it cannot be read"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\xfe", f"{UNREADABLE}: .*can't decode"),
        (
            b'{"step": 1e999}',
            f"{UNREADABLE}: its numbers must be finite, got 1e999",
        ),
        (
            b'{"step": 1, "loss": NaN}',
            f"{UNREADABLE}: its numbers must be finite, got NaN",
        ),
        (
            b'{"step": 1, "loss": ' + b"[" * 100_000,
            f"{UNREADABLE}: it is nested more than 64 times",
        ),
        (b'{"step": "7"}', """must be a record with a step, an integer >= 0, got '{"step": "7"}'"""),
        (b'{"step": 7.5}', "must be a record with a step, an integer >= 0"),
        (b'{"step": true}', "must be a record with a step, an integer >= 0"),
        (b'{"step": -1}', "must be a record with a step, an integer >= 0"),
        (b'{"loss": 1}', "must be a record with a step, an integer >= 0"),
        (b"[7]", "must be a record with a step, an integer >= 0"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("call", ["records", "drop_records_after"])
def test_line_that_is_no_record_is_refused_by_its_number(call, line, message, tmp_path):
    directory = run.RunDirectory(tmp_path)
    directory.log(1, {"loss": 2.0})
    with directory.path("metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=rf"metrics.jsonl, line 2: {message}"):
        directory.records() if call == "records" else directory.drop_records_after(1)


def test_last_record_that_was_cut_within_a_letter_is_left_out(tmp_path):
    directory = run.RunDirectory(tmp_path)
    directory.log(1, {"loss": 2.0})
    with directory.path("metrics.jsonl").open("ab") as file:
        file.write('{"step": 2, "ä'.encode()[:-1])
    assert directory.records() == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "summary",
    [
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b'{"sessions": 3}',
        b'{"sessions": [3]}',
        b'{"sessions": [{"seconds": {"wall": "1"}}]}',
        b'{"sessions": [{"seconds": {"wall": NaN}}]}',
        b'{"sessions": [{"seconds": {"wall": 1e999}}]}',
        b'{"sessions": [{"seconds": {"wall": [1]}}]}',
        b'{"sessions": [{"seconds": {"wall": ' + b"9" * 400 + b"}}]}",
        b'{"sessions": [{"seconds": {"wall": 1}, "more": ' + b"[" * 500 + b"]" * 500 + b"}]}",
    ],
    ids=range(11),
)
def test_summary_that_cannot_be_read_is_begun_anew(summary, tmp_path):
    (tmp_path / "summary.json").write_bytes(summary)
    run.RunDirectory(tmp_path).add_session(0, 2, {"steps": 1.0, "wall": 2.0})
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written["sessions"] == [{"start": 0, "stop": 2, "seconds": {"steps": 1.0, "wall": 2.0}}]
    assert (written["goodput"], written["seconds"]["wall"]) == (0.5, 2.0)
