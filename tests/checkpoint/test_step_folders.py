"""Which steps are kept, moved aside or removed, and that nothing else in the directory is touched."""

import shutil

import pytest
from saved_states import bits, contents, damage, saved, State

pytest.importorskip("orbax.checkpoint")

from mf_eqx.checkpoint import CheckpointError, Checkpoints

# What is kept


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, None, [7]),
        (2, None, [6, 7]),
        (9, None, [1, 2, 3, 4, 5, 6, 7]),
        (1, 3, [3, 6, 7]),
        (2, 2, [2, 4, 6, 7]),
        (1, 1, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_last_steps_are_kept_and_multiples(tmp_path, keep_last, keep_every, expected):
    checkpoints = saved(tmp_path, *range(1, 8), keep_last=keep_last, keep_every=keep_every)
    assert checkpoints.steps() == expected
    names = {name for step in expected for name in (f"{step:08}", f"{step:08}.json")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_old_step_is_there_until_the_new_one_is_on_disk(tmp_path):
    """Nothing of step 2 can be read before `wait`; if step 1 were gone already, a kill would leave nothing."""
    checkpoints = saved(tmp_path, 1, keep_last=1)
    checkpoints.save(2, State(2))
    assert 1 in checkpoints.steps()
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_newer_step_that_was_passed_over_does_not_count_as_kept(tmp_path):
    """Step 9 is damaged, the run continues after 2: neither 3 nor 2 may be given up in favour of 9."""
    checkpoints = saved(tmp_path, 1, 2, 9, keep_last=3)
    damage(checkpoints, 9)
    again = Checkpoints(tmp_path, keep_last=2)
    assert again.load(State).step == 2
    again.save(3, State(3))
    again.wait()
    assert again.steps() == [2, 3] and (tmp_path / "00000009.damaged").is_dir()
    found = again.load(State)
    assert found.step == 3 and not found.passed_over


@pytest.mark.parametrize("value", [0, 2.0, True])
@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_keeping_what_is_no_count_is_refused(tmp_path, unchecked, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {value}"):
        Checkpoints(tmp_path, **{name: value})


# What others left there


def test_leftovers_of_a_killed_run_are_cleaned_and_nothing_else(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("00000003.orbax-checkpoint-tmp", "00000003.orbax-checkpoint-tmp-17", "00000000.deleted"):
        shutil.copytree(checkpoints.path(1), tmp_path / name)
    assert checkpoints.steps() == [1, 2]
    checkpoints.clean()
    assert {path.name for path in tmp_path.iterdir()} == before
    assert checkpoints.load(State).step == 2


def test_nothing_is_cleaned_where_nothing_is(tmp_path):
    Checkpoints(tmp_path / "none").clean()
    assert not (tmp_path / "none").exists()


def test_empty_directory_named_like_a_newer_step_is_passed_over(tmp_path):
    checkpoints = saved(tmp_path, 1)
    checkpoints.path(9).mkdir()
    found = checkpoints.load(State)
    assert found.step == 1
    assert found.passed_over[9].startswith("its record cannot be read: FileNotFoundError")


def test_other_files_and_directories_are_ignored(tmp_path):
    checkpoints = saved(tmp_path, 1, keep_last=1)
    for name in ("00000050", "notes.txt", "00000007.json", ".hidden"):
        (tmp_path / name).write_text("junk")
    for name in ("junk", "9.5", "-3", "00000060.damaged"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    checkpoints.save(2, State(2))
    checkpoints.wait()
    found = checkpoints.load(State)
    assert found.step == 2 and found.passed_over == {}
    assert (tmp_path / "notes.txt").read_text() == "junk" and (tmp_path / "junk").is_dir()


# Links


@pytest.fixture
def linked(tmp_path):
    """Steps 1 and 2, of which 1 lies elsewhere, with a link in its place."""
    checkpoints = saved(tmp_path / "run", 1, 2, keep_last=2)
    checkpoints.path(1).rename(tmp_path / "elsewhere")
    checkpoints.path(1).symlink_to(tmp_path / "elsewhere")
    return checkpoints


def names(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


def test_a_step_may_be_a_link(linked):
    found = linked.load(lambda: State(1), step=1)
    assert bits(found.state) == bits(State(1))


def test_a_step_that_is_a_link_is_pruned_and_what_it_points_to_is_not(linked, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    linked.save(3, State(3))
    linked.wait()
    assert names(linked) == ["00000002", "00000002.json", "00000003", "00000003.json"]
    assert before and {path: path.read_bytes() for path in before} == before


def test_links_that_were_left_half_deleted_are_removed(linked, tmp_path):
    for name in ("00000000.deleted", "00000005.orbax-checkpoint-tmp", "00000000.damaged", "00000001.damaged"):
        (linked.directory / name).symlink_to(tmp_path / "elsewhere")
    linked.clean()
    assert names(linked) == ["00000001", "00000001.damaged", "00000001.json", "00000002", "00000002.json"]
    assert any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("aside", ["link", "file", "nothing"])
def test_a_step_that_is_a_link_is_moved_aside_when_it_is_saved_again(aside, linked, tmp_path):
    path = linked.path(1).with_suffix(".damaged")
    if aside == "link":
        path.symlink_to(tmp_path)
    elif aside == "file":
        path.write_text("")
    shutil.rmtree(linked.path(2))
    linked.save(1, State(1))
    linked.wait()
    assert path.is_symlink() and path.resolve() == tmp_path / "elsewhere"
    assert bits(linked.load(lambda: State(1), step=1).state) == bits(State(1))


def test_a_link_that_points_nowhere_is_passed_over_and_kept(linked, tmp_path):
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    before = names(linked)
    linked.clean()
    assert names(linked) == before
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(step 1: "):
        linked.load(lambda: State(1), step=1)
    shutil.rmtree(linked.path(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(step 1: "):
        linked.load(lambda: State(1))
    linked.save(1, State(1))
    linked.wait()
    assert linked.path(1).with_suffix(".damaged").is_symlink()
    assert bits(linked.load(lambda: State(1)).state) == bits(State(1))


def test_step_that_was_passed_over_is_moved_aside_when_it_is_reached_again(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for _ in range(2):  # and what was moved aside before gives way
        damage(checkpoints, 2)
        broken = contents(checkpoints.path(2))
        assert checkpoints.load(State).step == 1
        checkpoints.save(2, State(2))
        checkpoints.wait()
        found = checkpoints.load(State)
        assert found.step == 2 and found.passed_over == {} and bits(found.state) == bits(State(2))
        assert contents(tmp_path / "00000002.damaged") == broken
        assert checkpoints.steps() == [1, 2]


def test_damaged_step_that_was_passed_over_does_not_count_as_kept(tmp_path):
    damage(saved(tmp_path, 10, 20), 20)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.load(State).step == 10
    checkpoints.save(25, State(25))
    checkpoints.wait()
    damage(checkpoints, 25)
    assert checkpoints.load(State).step == 10


@pytest.mark.parametrize("name", ["7", "0000000007"])
def test_directory_with_another_name_for_a_step_is_left_alone(tmp_path, name):
    checkpoints = saved(tmp_path, 1, keep_last=1)
    (tmp_path / name).mkdir()
    for step in (8, 9):
        checkpoints.save(step, State(step))
        checkpoints.wait()
    assert checkpoints.steps() == [9] and (tmp_path / name).is_dir()


def test_cleaning_leaves_other_files_alone_and_removes_records_without_a_step(tmp_path):
    checkpoints = saved(tmp_path, 1)
    for name in ("x.deleted", "00000002.json", "notes.json"):
        (tmp_path / name).write_text("")
    checkpoints.clean()
    assert {path.name for path in tmp_path.iterdir()} == {"00000001", "00000001.json", "x.deleted", "notes.json"}
