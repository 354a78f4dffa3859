"""The time of a session stands still while it has yielded its place."""

from __future__ import annotations

import asyncio

import pytest

from insitu_scheduler.run_clock import RunClock
from insitu_wire.errors import CapacityError


async def test_it_ends_what_takes_longer() -> None:
    with pytest.raises(CapacityError, match=r"longer than 0\.01 seconds"):
        async with RunClock(0.01).running():
            await asyncio.Event().wait()


async def test_no_time_passes_while_it_is_stopped() -> None:
    clock = RunClock(0.05)
    with pytest.raises(CapacityError):
        async with clock.running():
            clock.stop()
            await asyncio.sleep(0.15)
            has_outlived_its_time = True
            clock.go_on()
            await asyncio.Event().wait()
    assert has_outlived_its_time


async def test_each_attempt_has_the_whole_time() -> None:
    clock = RunClock(0.05)
    async with clock.running():
        clock.stop()
    clock.go_on()
    async with clock.running():
        pass


async def test_without_a_bound_it_does_nothing() -> None:
    clock = RunClock(None)
    async with clock.running():
        clock.stop()
        clock.go_on()
