import threading

import jax
import jax.numpy as jnp
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


def test_a_watch_may_have_been_started_before(clock):
    assert _stopwatch.Stopwatch(clock, began=90.0).seconds()["wall"] == 10


def compiled(watch, function, x):
    """Seconds that the watch has counted for compiling after a call."""
    with watch.compiling():
        jax.block_until_ready(function(x))
    return watch.seconds()["compile"]


def test_only_the_first_call_of_a_program_compiles():
    watch = _stopwatch.Stopwatch()
    function = jax.jit(lambda x: jnp.sin(x) @ jax.jit(jnp.cos)(x))
    first = compiled(watch, function, jnp.ones((4, 4)))
    assert 0 < first <= watch.seconds()["wall"]  # what is traced inside counts once
    assert compiled(watch, function, jnp.ones((4, 4))) == first


def test_what_another_thread_compiles_is_not_counted():
    watch = _stopwatch.Stopwatch()
    x = jax.block_until_ready(jnp.ones(7))
    with watch.compiling():
        thread = threading.Thread(target=lambda: jax.jit(lambda x: jnp.sinh(x) + 3)(x))
        thread.start()
        thread.join()
    assert watch.seconds()["compile"] == 0


def test_watches_add_up_part_by_part(clock, watch):
    with watch.part("save"):
        clock.now += 2
    clock.now += 1
    sums = _stopwatch.added([watch.seconds(), watch.seconds()])
    assert {name: value for name, value in sums.items() if value} == {"save": 4, "steps": 2, "wall": 6}
    judging = _stopwatch.Stopwatch(clock, parts=("judge",))
    assert set(_stopwatch.added([judging.seconds(), {}])) == {"judge", "steps", "wall"}
