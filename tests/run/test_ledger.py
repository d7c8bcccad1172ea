import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from mf_eqx import run


@dataclass(frozen=True)
class Inner:
    interval: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Setting:
    power: float = 1.0
    scale: float | None = None
    inner: Inner = field(default_factory=Inner)


AS_DICT = {"power": 1.0, "scale": None, "inner": {"interval": [0.0, 1.0]}}
RESULT = {"distance": 0.125, "curve": [1.0, 2.0], "note": 'two\nlines, \u2028 and a "quote"'}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cells.jsonl"


def filled(path, number=2) -> run.Ledger:
    """Results 0, 1, ... under settings of that seed."""
    ledger = run.Ledger(path)
    for seed in range(number):
        ledger.put({"seed": seed}, {"number": seed})
    return ledger


def numbers(ledger) -> dict[int, int]:
    return {seed: ledger[{"seed": seed}]["number"] for seed in range(10) if {"seed": seed} in ledger}


def test_a_result_is_found_by_its_settings(path):
    ledger = run.Ledger(path)
    ledger.put(Setting(), RESULT)
    assert Setting() in ledger and ledger[Setting()] == RESULT


def test_a_result_is_found_by_another_ledger_on_the_file(path):
    run.Ledger(path).put(Setting(), RESULT)
    ledger = run.Ledger(path)
    assert Setting() in ledger and ledger[Setting()] == RESULT


@pytest.mark.parametrize("opened_again", [False, True])
@pytest.mark.parametrize("other", [Setting(power=0.5), Setting(inner=Inner((0.0, 0.5))), {**AS_DICT, "seed": 0}, {}])
def test_other_settings_are_not_found(path, other, opened_again):
    ledger = run.Ledger(path)
    ledger.put(Setting(), RESULT)
    ledger = run.Ledger(path) if opened_again else ledger
    assert other not in ledger
    with pytest.raises(KeyError):
        ledger[other]


def test_a_dataclass_equals_the_dict_of_its_fields(path):
    ledger = run.Ledger(path)
    ledger.put({"setting": Setting(), "seed": 1}, RESULT)
    assert {"setting": AS_DICT, "seed": 1} in ledger


def test_the_order_of_keys_does_not_matter(path):
    ledger = run.Ledger(path)
    ledger.put({"seed": 0, "inner": {"a": 1, "b": 2}}, RESULT)
    assert {"inner": {"b": 2, "a": 1}, "seed": 0} in ledger


def test_the_last_result_of_equal_settings_counts(path):
    ledger = run.Ledger(path)
    ledger.put(Setting(), {"distance": 1.0})
    ledger.put(Setting(), {"distance": 2.0})
    assert ledger[Setting()] == run.Ledger(path)[Setting()] == {"distance": 2.0}


def test_a_number_that_is_not_finite_is_kept(path):
    run.Ledger(path).put(Setting(), {"loss": float("inf")})
    assert run.Ledger(path)[Setting()] == {"loss": float("inf")}


def test_each_result_is_one_line_of_the_file_at_once(path):
    ledger = run.Ledger(path)
    for number in (1, 2, 3):
        ledger.put({"seed": number}, RESULT)
        lines = path.read_text(encoding="utf-8").split("\n")
        assert len(lines) == number + 1 and lines[-1] == ""
        assert json.loads(lines[number - 1])["settings"] == {"seed": number}


def test_a_new_ledger_appends_to_the_file(path):
    filled(path)
    run.Ledger(path).put({"seed": 2}, {"number": 2})
    assert numbers(run.Ledger(path)) == {0: 0, 1: 1, 2: 2}


def test_several_ledgers_may_add_to_one_file(path):
    ledgers = [run.Ledger(path) for _ in range(3)]
    for round in range(2):
        for i, ledger in enumerate(ledgers):
            ledger.put({"seed": 3 * round + i}, {"number": 3 * round + i})
    assert numbers(run.Ledger(path)) == {number: number for number in range(6)}


def test_a_missing_file_is_an_empty_ledger_and_is_not_made(path):
    ledger = run.Ledger(path)
    assert Setting() not in ledger
    assert not path.exists()


def test_parent_directories_are_made(tmp_path):
    path = tmp_path / "runs" / "toys" / "cells.jsonl"
    run.Ledger(path).put(Setting(), RESULT)
    assert Setting() in run.Ledger(str(path))


def test_a_result_that_json_cannot_hold_is_refused_and_leaves_the_ledger_as_it_was(path):
    ledger = filled(path)
    with pytest.raises(TypeError):
        ledger.put({"seed": 2}, {"number": object()})
    assert numbers(ledger) == numbers(run.Ledger(path)) == {0: 0, 1: 1}


# Files that are not whole


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_last_line_that_was_cut_off_is_left_out(path, kept):
    filled(path)
    whole = path.read_text()
    run.Ledger(path).put({"seed": 2}, {"number": 2})
    path.write_text(whole + path.read_text()[len(whole) :][:kept])
    assert numbers(run.Ledger(path)) == {0: 0, 1: 1}


@pytest.mark.parametrize("number", [0, 2])
def test_a_file_that_was_cut_off_can_be_written_and_read_again(path, number):
    filled(path, number)
    with path.open("a") as file:
        file.write('{"settings": {"se')
    run.Ledger(path).put({"seed": 7}, {"number": 7})
    assert numbers(run.Ledger(path)) == {**{seed: seed for seed in range(number)}, 7: 7}


def test_reading_a_whole_file_does_not_change_it(path):
    filled(path)
    before = path.read_bytes()
    run.Ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("broken", ['{"settings": {"se', "", "no JSON at all", "[" * 100_000, "[1]"])
def test_a_broken_line_before_the_last_is_an_error(path, broken):
    filled(path)
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, broken, *others, ""]))
    with pytest.raises(ValueError):
        run.Ledger(path)


# Commits


def git(directory, *command) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    ended = subprocess.run(["git", *identity, *command], cwd=directory, check=True, capture_output=True, text=True)
    return ended.stdout.strip()


def test_commits_are_those_of_the_script_when_the_results_were_put(tmp_path, monkeypatch):
    script, path = tmp_path / "toys.py", tmp_path / "ignored" / "cells.jsonl"
    monkeypatch.setattr(sys, "argv", [str(script)])
    (tmp_path / ".gitignore").write_text("ignored")
    try:
        git(tmp_path, "init")
    except OSError:
        pytest.skip("needs git")
    commits = []
    for number in range(2):
        script.write_text(f"# {number}")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-m", "next")
        commits.append(git(tmp_path, "rev-parse", "HEAD"))
        ledger = run.Ledger(path)
        ledger.put({"seed": number}, RESULT)
    for opened in (ledger, run.Ledger(path)):
        assert [opened.commit({"seed": number}) for number in range(2)] == commits
    assert len(set(commits)) == 2


def test_a_result_is_found_whatever_the_commit(path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run.Ledger(path).put(Setting(), RESULT)
    path.write_text(path.read_text().replace('"commit": null', '"commit": "0123abc"'))
    assert run.Ledger(path)[Setting()] == RESULT


def test_outside_git_the_commit_is_none(path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run.Ledger(path).put(Setting(), RESULT)
    assert run.Ledger(path).commit(Setting()) is None
