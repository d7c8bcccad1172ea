import pytest

from mf_eqx.run import _stopwatch


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    return _stopwatch.Stopwatch(clock)


def test_what_no_part_took_went_into_steps(clock, watch):
    for part, seconds in (("data", 2), ("save", 3), ("data", 4)):
        with watch.part(part):
            clock.now += seconds
        clock.now += 10
    seconds = watch.seconds()
    assert {name: value for name, value in seconds.items() if value} == {"data": 6, "save": 3, "steps": 30, "wall": 39}


def test_parts_and_steps_add_up_to_the_wall_time_at_any_moment(clock, watch):
    with watch.part("compile"):
        clock.now += 1.5
    clock.now += 0.25
    seconds = watch.seconds()
    assert sum(value for name, value in seconds.items() if name != "wall") == seconds["wall"] == 1.75


def test_a_part_that_fails_counts_too(clock, watch):
    with pytest.raises(KeyError), watch.part("preview"):
        clock.now += 2
        raise KeyError
    assert watch.seconds()["preview"] == 2


def test_every_part_is_reported_even_if_it_took_no_time(watch):
    assert set(watch.seconds()) == {*_stopwatch.PARTS, "steps", "wall"}


def test_an_unknown_part_is_refused(watch):
    with pytest.raises(KeyError), watch.part("coffee"):
        pass
