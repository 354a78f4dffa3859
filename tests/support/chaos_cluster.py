"""A scheduler and two shard groups that can be broken in every way, and are started again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

import psutil

from support.cut_proxy import CutProxy
from support.ports import free_port
from support.up import ranks

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

MODEL = "tiny/llama"
_SCHEDULER, _ONE, _TWO = "scheduler", "group of one rank", "group of two ranks"


class Fault(StrEnum):
    """What can be done to a cluster."""

    SCHEDULER_KILLED = "scheduler killed"
    SCHEDULER_STOPPED = "scheduler told to stop"
    GROUP_KILLED = "group killed"
    LEADER_KILLED = "leader killed"
    FOLLOWER_KILLED = "follower killed"
    CLIENTS_CUT = "clients cut off"
    GROUPS_CUT = "groups cut off"
    LEADERS_CUT = "leaders cut off"


class Cluster:
    """Its processes and the proxies between them, and who starts again what has died."""

    def __init__(self, folder: Path, model: Path) -> None:
        """Starts it.

        Args:
            folder: where the scheduler keeps its data, and all write their log.
            model: the folder of the model.
        """
        self._folder, self._model = folder, model
        self._port, *self._group_ports = (free_port() for _ in range(3))
        self._metrics_ports = {name: free_port() for name in (_ONE, _TWO)}
        self._to_scheduler = CutProxy(f"127.0.0.1:{self._port}")
        self._from_groups = CutProxy(f"127.0.0.1:{self._port}")
        to_groups = [CutProxy(f"127.0.0.1:{port}") for port in self._group_ports]
        self._to_groups = dict(zip((_ONE, _TWO), to_groups, strict=True))
        self.endpoint = self._to_scheduler.address
        self.struck = Counter[Fault]()
        """How often each fault has come."""
        self._log = (folder / "log").open("a")
        self._lock = threading.Lock()
        self._is_stopping = False
        self._processes = {name: self._start(name) for name in (_SCHEDULER, _ONE, _TWO)}
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def strike(self, fault: Fault, rng: random.Random) -> None:
        """Has a fault come; one that finds nothing to break, for it is down just now, is none."""
        ways: dict[Fault, Callable[[], None]] = {
            Fault.SCHEDULER_KILLED: lambda: self._process(_SCHEDULER).kill(),
            Fault.SCHEDULER_STOPPED: lambda: self._process(_SCHEDULER).terminate(),
            Fault.GROUP_KILLED: lambda: self._kill_all(rng.choice([_ONE, _TWO])),
            Fault.LEADER_KILLED: lambda: self._rank(0).kill(),
            Fault.FOLLOWER_KILLED: lambda: self._rank(1).kill(),
            Fault.CLIENTS_CUT: self._to_scheduler.cut,
            Fault.GROUPS_CUT: self._from_groups.cut,
            Fault.LEADERS_CUT: self._cut_leaders,
        }
        with self._lock, suppress(psutil.NoSuchProcess, IndexError):
            ways[fault]()
            self.struck[fault] += 1

    def num_handles(self) -> float:
        """Counts the values that groups have; for a group that does not answer, one."""
        return sum(map(_handles, self._metrics_ports.values()))

    def stop(self) -> None:
        """Stops it, and fails if a process is left."""
        self._is_stopping = True
        self._supervisor.join()
        running = [psutil.Process(process.pid) for process in self._processes.values()]
        started = [child for process in running for child in process.children(recursive=True)]
        for name in (_TWO, _ONE, _SCHEDULER):
            self._processes[name].terminate()
        for process in self._processes.values():
            process.wait(90)
        _, left = psutil.wait_procs(started, timeout=10)
        for proxy in (self._to_scheduler, self._from_groups, *self._to_groups.values()):
            proxy.close()
        self._log.close()
        assert not left, f"left behind: {left}"

    def _process(self, name: str) -> psutil.Process:
        return psutil.Process(self._processes[name].pid)

    def _kill_all(self, name: str) -> None:
        process = self._process(name)
        for victim in [*process.children(recursive=True), process]:
            victim.kill()

    def _cut_leaders(self) -> None:
        for proxy in self._to_groups.values():
            proxy.cut()

    def _rank(self, rank: int) -> psutil.Process:
        return ranks(self._process(_TWO).children(recursive=True), rank)[0]

    def _supervise(self) -> None:
        while not self._is_stopping:
            with self._lock:
                for name, process in self._processes.items():
                    if process.poll() is not None:
                        self._processes[name] = self._start(name)
            time.sleep(0.1)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        if name == _SCHEDULER:
            arguments = ["insitu_scheduler", "--port", str(self._port), "--metrics-port", "-1"]
            arguments += ["--data-dir", str(self._folder), "--grace-seconds", "0.5"]
            arguments += ["--max-attempts", "100", "--orphan-grace-seconds", "60"]
        else:
            arguments = ["insitu_shard", "--model", f"{MODEL}={self._model}"]
            arguments += ["--scheduler", self._from_groups.address]
            arguments += ["--port", str(self._group_ports[name == _TWO])]
            arguments += ["--advertise-address", self._to_groups[name].address]
            arguments += ["--metrics-port", str(self._metrics_ports[name])]
            arguments += ["--tp", "2" if name == _TWO else "1"]
        command = [sys.executable, "-m", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=self._log, stderr=self._log, env=env)


def _handles(metrics_port: int) -> float:
    with (
        suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as at,
    ):
        found = re.search(r"^insitu_shard_handles\{.*\} (\S+)$", at.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 1.0
    return 1.0
