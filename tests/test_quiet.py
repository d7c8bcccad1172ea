"""What a failed read leaves behind is reported nowhere."""

import asyncio
import gc

import pytest

from mf_eqx._quiet import collect_tasks, quiet


def abandon():
    """A pending task that nothing but itself holds: asyncio reports it when it is deleted."""
    loop = asyncio.new_event_loop()

    async def wait():
        await loop.create_future()

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    task.itself = task
    loop.close()


@pytest.fixture
def by_hand():
    """Garbage is collected only where a test does it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def reported(caplog):
    gc.collect()
    return [record.message for record in caplog.records if "Task was destroyed" in record.message]


def test_task_that_is_not_collected_in_time_is_reported(by_hand, caplog):
    with quiet():
        abandon()
    assert reported(caplog)


def test_tasks_of_a_failed_read_are_collected_unheard(by_hand, caplog):
    with quiet():
        abandon()
        collect_tasks()
    assert not reported(caplog)


def test_tasks_that_still_ran_are_collected_after_the_next_read(by_hand, caplog):
    with quiet():
        collect_tasks()
        abandon()
    with quiet():
        pass
    assert not reported(caplog)


def test_tasks_of_an_interrupted_read_are_collected_unheard(by_hand, caplog):
    with pytest.raises(KeyboardInterrupt), quiet():
        abandon()
        raise KeyboardInterrupt
    assert not reported(caplog)
