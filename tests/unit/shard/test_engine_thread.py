"""Rounds while there are segments, and other work between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
import torch

from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest
from insitu_shard.downloads import Downloads
from insitu_shard.engine import Finished, SegmentEvent, TraceStarted
from insitu_shard.engine_thread import EngineThread
from insitu_shard.gathering import Gathering
from insitu_shard.metrics import ShardMetrics
from insitu_wire.errors import Error, Reason, error

ENDLESS = 10**9
LOSES_A_RANK = 99


@dataclass
class Leader:
    """Runs segments of as many traces as their seed says; one of none can not begin."""

    commands: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)
    may_run: threading.Event = field(default_factory=threading.Event)

    @property
    def is_idle(self) -> bool:
        return self.left.keys() <= self.paused

    def pause(self, key: str, *, goes_on: bool) -> None:
        self.commands.append(f"{'resume' if goes_on else 'pause'} {key}")
        self.paused ^= {key}

    def begin(self, key: str, request: RunSegmentRequest) -> None:
        self.commands.append(f"begin {key}")
        if not request.segment.seed:
            raise error(Reason.TENSOR_NOT_UPLOADED, "it is not there")
        self.left[key] = request.segment.seed

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)

    def drop(self, key: str) -> None:
        self.commands.append(f"drop {key}")
        del self.left[key]

    def round(self) -> Iterator[tuple[str, SegmentEvent | Error]]:
        assert self.may_run.wait(10)
        self.commands.append("round")
        for key, left in list(self.left.items()):
            if key in self.paused:
                continue
            if left == LOSES_A_RANK:
                raise RuntimeError("connection closed by peer")
            yield key, TraceStarted(left)
            self.left[key] -= 1
            if not self.left[key]:
                del self.left[key]
                yield key, Finished(has_exited=False)

    def why_lost(self, exception: Exception) -> str:
        return f"rank 1 was killed ({exception})"

    def stop(self) -> None:
        self.commands.append("stop")


@pytest.fixture
def leader() -> Leader:
    leader = Leader()
    leader.may_run.set()
    return leader


@pytest.fixture
def lost() -> asyncio.Queue[str]:
    return asyncio.Queue()


@pytest.fixture
async def engine(leader: Leader, lost: asyncio.Queue[str]) -> AsyncIterator[EngineThread]:
    metrics = ShardMetrics("tiny")
    with ThreadPoolExecutor(1) as thread:
        yield EngineThread(
            leader,  # type: ignore[arg-type]
            metrics,
            thread=thread,
            downloads=Downloads(torch.device("cpu")),
            on_lost=lost.put_nowait,
        )


def _segment(num_traces: int) -> RunSegmentRequest:
    request = RunSegmentRequest(session_id=f"session of {num_traces}")
    request.segment.seed = num_traces
    return request


async def _told(engine: EngineThread, num_traces: int) -> list[SegmentEvent | Error]:
    async with aclosing(engine.run(_segment(num_traces))) as told:
        return [event async for events in told for event in events]


async def test_segments_that_come_at_the_same_time_share_rounds(
    engine: EngineThread, leader: Leader
) -> None:
    leader.may_run.clear()
    running = [asyncio.create_task(_told(engine, count)) for count in (3, 1, 2)]
    await asyncio.sleep(0)
    leader.may_run.set()
    told = [await segment for segment in running]
    assert [len(events) for events in told] == [4, 2, 3]
    assert all(isinstance(events[-1], Finished) for events in told)
    assert leader.commands.count("round") == 3


async def test_what_is_asked_for_while_a_round_runs_comes_before_the_next(
    engine: EngineThread, leader: Leader
) -> None:
    leader.may_run.clear()
    running = asyncio.create_task(_told(engine, 2))
    await asyncio.sleep(0)
    working = asyncio.create_task(engine.do(lambda: leader.commands.append("work")))
    other = asyncio.create_task(_told(engine, 1))
    await asyncio.sleep(0)
    leader.may_run.set()
    await asyncio.gather(running, working, other)
    assert leader.commands.index("work") < leader.commands.index("begin 2")
    last_round = len(leader.commands) - leader.commands[::-1].index("round") - 1
    assert leader.commands.index("begin 2") < last_round


async def test_a_segment_that_nobody_listens_to_is_dropped(
    engine: EngineThread, leader: Leader
) -> None:
    async with aclosing(engine.run(_segment(ENDLESS))) as told:
        assert (await anext(told))[0] == TraceStarted(ENDLESS)
        other = asyncio.create_task(_told(engine, 3))
        await asyncio.sleep(0)
    assert leader.cancelled == ["1"]
    assert "drop 1" in leader.commands
    assert len(await other) == 4
    assert leader.left == {}


async def test_one_that_can_not_begin_fails_alone(engine: EngineThread, leader: Leader) -> None:
    failing, other = await asyncio.gather(_told(engine, 0), _told(engine, 1))
    assert [str(event) for event in failing if isinstance(event, Error)] == [str(failing[0])]
    assert other == [TraceStarted(1), Finished(has_exited=False)]
    assert "drop 1" not in leader.commands


async def test_a_group_that_has_lost_a_rank_waits_for_it_no_more(
    engine: EngineThread, leader: Leader, lost: asyncio.Queue[str]
) -> None:
    running = asyncio.create_task(_told(engine, LOSES_A_RANK))
    why = await asyncio.wait_for(lost.get(), 10)
    assert why == "rank 1 was killed (connection closed by peer)"
    (told,) = await running
    assert isinstance(told, Error)
    assert told.reason is Reason.REPLICA_LOST
    assert f"was lost: {why}; submit" in told.message
    assert told.metadata["why"] == why
    with pytest.raises(Error, match="has ended"):
        await engine.do(lambda: leader.drop("1"))
    assert leader.commands == ["begin 1", "round"]


async def test_nothing_reaches_the_ranks_after_stop(engine: EngineThread, leader: Leader) -> None:
    async with aclosing(engine.run(_segment(ENDLESS))) as told:
        await anext(told)
        await asyncio.to_thread(engine.stop)
    with pytest.raises(Error, match="has ended"):
        await engine.do(lambda: None)
    assert leader.commands[-1] == "stop"


class _UntilTwo(Gathering):
    """Waits for a second segment, if it comes before the time is over."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def seconds_left(self, users: Collection[str], *, now: float) -> float:
        seconds = 0.0 if len(users) > 1 else self.seconds
        if seconds < 1:
            self.seconds = 0.0
        return seconds


@pytest.mark.parametrize("seconds", [60.0, 0.001])
async def test_a_round_waits_for_segments_that_are_about_to_come(
    leader: Leader, lost: asyncio.Queue[str], seconds: float
) -> None:
    metrics = ShardMetrics("tiny")
    with ThreadPoolExecutor(1) as thread:
        engine = EngineThread(
            leader,  # type: ignore[arg-type]
            metrics,
            thread=thread,
            downloads=Downloads(torch.device("cpu")),
            on_lost=lost.put_nowait,
            gathering=_UntilTwo(seconds),
        )
        first = asyncio.create_task(_told(engine, 1))
        await asyncio.sleep(0)
        if seconds < 1:
            await first
            assert leader.commands == ["begin 1", "round"]
            return
        for _ in range(10):
            await engine.do(lambda: None)
        await asyncio.gather(first, _told(engine, 1))
        assert leader.commands == ["begin 1", "begin 2", "round"]


async def test_a_session_that_is_held_takes_no_rounds_until_it_goes_on(
    engine: EngineThread, leader: Leader
) -> None:
    async with aclosing(engine.run(_segment(ENDLESS))) as told:
        await anext(told)
        await engine.pause(f"session of {ENDLESS}", goes_on=False)
        assert len(await _told(engine, 3)) == 4
        num_rounds = leader.commands.count("round")
        await engine.do(lambda: None)
        assert leader.commands.count("round") == num_rounds
        await engine.pause(f"session of {ENDLESS}", goes_on=True)
        while leader.commands.count("round") == num_rounds:
            await anext(told)
