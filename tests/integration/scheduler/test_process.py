"""The real process: how it starts, says where it is, and ends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from insitu_scheduler.server import Server
from support.fake_shard import FakeShard, saving

from .conftest import Client

if TYPE_CHECKING:
    from pathlib import Path

    from insitu_scheduler.config import SchedulerConfig


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "insitu_scheduler", "--data-dir", str(tmp_path), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_address(tmp_path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (tmp_path / "scheduler.json").exists():
        assert time.monotonic() < deadline, "the scheduler did not start"
        time.sleep(0.02)
    address: str = json.loads((tmp_path / "scheduler.json").read_text())["address"]
    return address


def failing(tmp_path: Path, *flags: str) -> str:
    """Starts a scheduler that must fail; gives what it says."""
    process = start(tmp_path, *flags)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    return errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_and_frees_its_port(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, "--port", "0")
    address = wait_for_address(tmp_path)
    host, _, port = address.partition(":")
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert f"insitu scheduler is listening at {address}" in errors
    assert "any non-empty API key is accepted" in errors
    assert not (tmp_path / "scheduler.json").exists()
    socket.create_server((host, int(port))).close()


def test_bad_settings_are_told_in_one_line_with_their_cure(tmp_path: Path) -> None:
    assert "--port is 70000" in failing(tmp_path, "--port", "70000")
    assert "--api-keys-file" in failing(tmp_path, "--port", "0", "--host", "0.0.0.0")
    missing = str(tmp_path / "none")
    assert "can not be read" in failing(tmp_path, "--port", "0", "--api-keys-file", missing)


def test_a_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"can not listen on 127.0.0.1:{port}" in failing(tmp_path, "--port", port)
        flags = ("--port", "0", "--metrics-port", port)
        assert "choose a free port with --metrics-port" in failing(tmp_path, *flags)
        flags = ("--port", "0", "--health-port", port)
        assert "choose a free port with --health-port" in failing(tmp_path, *flags)


def test_a_data_folder_that_can_not_be_used_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--data-dir" in failing(tmp_path / "file", "--port", "0")


async def test_a_data_folder_has_one_scheduler_at_a_time(server: Server, tmp_path: Path) -> None:
    assert "in use by another scheduler" in failing(tmp_path, "--port", "0")


def test_the_environment_gives_the_flags(tmp_path: Path) -> None:
    env = {**os.environ, "INSITU_PORT": "70000", "INSITU_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "insitu_scheduler"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, "--port is 70000" in done.stderr) == (1, True)


async def test_the_metrics_show_the_queue_latency(config: SchedulerConfig) -> None:
    config = dataclasses.replace(config, metrics_port=0)
    async with Server(config) as server, FakeShard(server.address) as shard:
        await shard.ready()
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            await client.watch(await client.submit(saving()))
        url = f"http://{server.metrics_address}/metrics"
        text = (await asyncio.to_thread(_get, url)).splitlines()
    for line in (
        'insitu_queue_latency_seconds_count{model="tiny/model",outcome="dispatched"} 1.0',
        'insitu_session_duration_seconds_count{model="tiny/model",outcome="completed"} 1.0',
        'insitu_leases_total{event="granted",model="tiny/model"} 1.0',
        'insitu_queue_expected_wait_seconds{model="tiny/model"} 0.0',
        'insitu_fairness_ratio{model="tiny/model"} 1.0',
        "insitu_queue_bytes 0.0",
        "insitu_journal_pending 0.0",
        'insitu_sessions_accepted_total{model="tiny/model"} 1.0',
        'insitu_sessions_finished_total{model="tiny/model",outcome="completed"} 1.0',
        'insitu_execution_latency_seconds_count{model="tiny/model",outcome="completed"} 1.0',
        'insitu_queue_sessions{model="tiny/model"} 0.0',
        'insitu_queue_oldest_age_seconds{model="tiny/model"} 0.0',
        f'insitu_build_info{{python="{platform.python_version()}",version="0.1.0"}} 1.0',
    ):
        assert line in text


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        text: str = response.read().decode()
        return text
