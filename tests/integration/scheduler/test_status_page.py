"""The status page: for everybody, for somebody with a key, and in a browser."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING

import grpc
import pytest

from insitu_scheduler.server import Server
from support.chromium import CHROMIUM, page_as_shown, take_picture
from support.fake_shard import FakeShard, finished, saving, trace_started
from support.up import INSITU, run_python

from .conftest import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
    from insitu_scheduler.config import SchedulerConfig

_PNG = b"\x89PNG"


@dataclasses.dataclass
class Site:
    """A scheduler with its page: of ann's two sessions one runs, one waits."""

    address: str
    shard: FakeShard
    client: Client
    running: str
    waiting: str

    @property
    def url(self) -> str:
        return f"http://{self.address}/status"

    async def get(self) -> str:
        return (await asyncio.to_thread(_fetch, self.url, None))[1]

    async def post(self, **form: str) -> tuple[int, str]:
        return await asyncio.to_thread(_fetch, self.url, urllib.parse.urlencode(form).encode())


def _fetch(url: str, body: bytes | None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, body, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as failure:
        with failure:
            return failure.code, failure.read().decode()


@pytest.fixture
async def site(config: SchedulerConfig, tmp_path: Path) -> AsyncIterator[Site]:
    keys = tmp_path / "keys"
    keys.write_text("ann:ann-key\nbob:bob-key\n")
    config = dataclasses.replace(config, metrics_port=0, api_keys_file=keys)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        is_over = asyncio.Event()

        async def in_its_trace(request: RunSegmentRequest) -> AsyncIterator[RunSegmentResponse]:
            yield trace_started(1)
            await is_over.wait()
            yield finished()

        shard.script = in_its_trace
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            running = await client.submit(saving())
            await client.watch_until(running, "RUNNING")
            waiting = await client.submit(saving())
            assert server.metrics_address is not None
            yield Site(server.metrics_address, shard, client, running, waiting)
            is_over.set()


async def test_models_groups_and_queues_are_shown_to_those_with_a_key(site: Site) -> None:
    page = await site.get()
    assert "tiny/model" not in page
    assert "to those who have an API key" in page
    _, page = await site.post(api_key="bob-key")
    row = page.partition('<table id="models">')[2].partition("</table>")[0]
    assert "tiny/model" in row
    # One runs, one waits, and the group has no more room.
    assert (
        '<td class="busy">busy</td><td class="n">1</td><td class="n">1</td><td class="n">1</td>'
        in row
    )
    assert "about" in row or "under 1 s" in row
    assert site.running not in page
    assert "ann" not in page
    # Nothing on it is a script, and a browser would run none.
    assert "<script" not in page
    with await asyncio.to_thread(urllib.request.urlopen, site.url) as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


async def test_without_a_key_file_everybody_sees_models(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, metrics_port=0, api_keys_file=None)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        _, page = await asyncio.to_thread(_fetch, f"http://{server.metrics_address}/status", None)
    assert "tiny/model" in page.partition('<table id="models">')[2]


async def test_models_that_a_key_is_not_for_are_not_shown_to_it(
    config: SchedulerConfig, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    made = run_python([*INSITU, "keys", "create", "cleo", "--file", str(file), "--model", "lab/*"])
    key = made.stdout.split()[-1]
    config = dataclasses.replace(config, metrics_port=0, api_keys_file=file)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        body = urllib.parse.urlencode({"api_key": key}).encode()
        url = f"http://{server.metrics_address}/status"
        status, page = await asyncio.to_thread(_fetch, url, body)
    assert (status, "tiny/model" in page) == (200, False)
    assert "No model is served yet" in page


async def test_a_key_shows_its_own_sessions_with_their_progress(site: Site) -> None:
    status, page = await site.post(api_key="ann-key")
    assert status == 200
    assert site.running in page
    assert "Your session is running" in page
    assert "position 1 in the queue" in page
    assert "ann-key" not in page
    status, page = await site.post(api_key="bob-key")
    assert (status, site.running in page) == (200, False)
    assert "This key has no sessions here." in page


@pytest.mark.parametrize(
    ("form", "status", "said"),
    [
        ({"api_key": "nobody-key"}, 401, "does not know this API key"),
        ({"api_key": "  "}, 400, "holds no API key"),
        ({}, 400, "holds no API key"),
        ({"api_key": "x" * 5000}, 400, "too large"),
    ],
)
async def test_a_bad_key_is_said_to_be_bad_and_not_repeated(
    site: Site, form: dict[str, str], status: int, said: str
) -> None:
    found, page = await site.post(**form)
    assert (found, said in page) == (status, True)
    assert form.get("api_key", "").strip() == "" or form["api_key"] not in page


async def test_keys_are_neither_logged_nor_taken_from_the_address(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        await site.post(api_key="ann-key")
        _, page = await asyncio.to_thread(_fetch, f"{site.url}?api_key=ann-key", None)
    assert site.running not in page
    assert "ann-key" not in caplog.text


async def test_what_a_group_says_is_text_on_the_page(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, metrics_port=0)
    name = "<script>alert(1)</script>"
    async with Server(config) as server, FakeShard(server.address, model=name) as shard:
        await shard.ready()
        _, page = await asyncio.to_thread(_fetch, f"http://{server.metrics_address}/status", None)
    assert name not in page
    assert "&lt;script&gt;" in page


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here (make system-packages)")
async def test_a_browser_shows_the_page_and_sends_a_key_that_was_pasted(
    site: Site, tmp_path: Path
) -> None:
    page = await asyncio.to_thread(page_as_shown, site.url, tmp_path / "a")
    assert "to those who have an API key" in page
    assert "<form" in page
    picture = tmp_path / "status.png"
    await asyncio.to_thread(take_picture, site.url, tmp_path / "a", picture)
    assert picture.read_bytes().startswith(_PNG)
    # As a person does: the key is pasted into the form, which is sent.
    paste = tmp_path / "paste.html"
    paste.write_text(
        f"<form method=post action='{site.url}'><input name=api_key value=ann-key></form>"
        "<script>document.forms[0].submit()</script>"
    )
    page = await asyncio.to_thread(page_as_shown, paste.as_uri(), tmp_path / "a")
    assert site.running in page
    assert "tiny/model" in page
    assert "ann-key" not in page
