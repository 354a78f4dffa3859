"""What is fuzzed: a model as a shard runs it, and a real scheduler with a group of a script."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from insitu import LanguageModel
from insitu_proto.v1.shard_service_pb2 import DescribeModelResponse
from insitu_scheduler.config import SchedulerConfig
from insitu_scheduler.models import KnownModel
from insitu_scheduler.server import Server
from insitu_shard.engine import load_model
from support.fake_shard import FakeShard
from support.fuzz_seeds import seed_sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu_proto.v1.model_pb2 import ModelDescription
    from insitu_proto.v1.session_pb2 import Session
    from support.tiny_models import TinyModels


@dataclass
class Target:
    """A model named "tiny", what a scheduler knows of it, and valid sessions over it."""

    model: Any
    known: dict[str, KnownModel]
    seeds: list[Session]


@pytest.fixture(scope="module")
def target(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tiny.folder("llama")
    model = load_model("tiny", folder)
    known = {"tiny": KnownModel.from_description(model.describe(), ())}
    seeds = seed_sessions(LanguageModel(str(folder)), tmp_path_factory.mktemp("seeds"))
    return Target(model, known, seeds)


class _Described(FakeShard):
    """Serves the model that the sessions are for, without running it."""

    description: ModelDescription

    async def DescribeModel(self, request: Any, context: Any) -> DescribeModelResponse:
        return DescribeModelResponse(description=self.description)


@dataclass
class Running:
    """A scheduler on an event loop of its own, so that a test can call it as any client does."""

    config: SchedulerConfig
    description: ModelDescription
    address: str = ""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def start(self) -> None:
        self._stack = AsyncExitStack()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._do(self._start())

    def stop(self) -> None:
        self._do(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        server = await self._stack.enter_async_context(Server(self.config))
        shard = _Described(server.address, model="tiny", max_sessions=16)
        shard.description = self.description
        await (await self._stack.enter_async_context(shard)).ready()
        self.address = server.address

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


@pytest.fixture(scope="module")
def running(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("scheduler")
    config = SchedulerConfig(
        data_dir=folder, port=0, metrics_port=None, grace_seconds=1, orphan_grace_seconds=0.5
    )
    running = Running(config, target.model.describe())
    running.start()
    yield running
    running.stop()
