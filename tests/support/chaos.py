"""Sessions of many clients while schedulers, leaders and ranks are killed and networks are cut.

In the suite with a few sessions (`tests/integration/test_chaos.py`); with more as a script:
`.venv/bin/python tests/support/chaos.py --sessions 200 --seed 1`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from insitu import CONFIG, LanguageModel, UnavailableError
from insitu.backends.remote import RemoteBackend
from insitu_proto.v1.event_pb2 import EventKind
from support.chaos_cluster import MODEL, Cluster, Fault
from support.tiny_models import TinyModels

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from insitu._session import Session
    from insitu_proto.v1.event_pb2 import Event

IDS = [5, 9, 17, 23]
NUM_KINDS = 8
_ENDS = {
    EventKind.EVENT_KIND_COMPLETED,
    EventKind.EVENT_KIND_ERROR,
    EventKind.EVENT_KIND_CANCELLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much happens."""

    num_sessions: int
    """At least; more, if not every fault has come by then."""
    num_clients: int
    num_traces: int
    """Of each session."""
    seed: int
    """Of the order of the faults, and of the times between them."""
    pause_seconds: float
    """Between two faults, about."""


class Shown(logging.Handler):
    """What clients were shown, by session."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: defaultdict[str, list[str]] = defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line."""
        session_id, is_event, rest = record.getMessage().partition(" - ")
        if is_event:
            self.lines[session_id].append(rest)


def session(model: LanguageModel, number: int, *, num_traces: int, remote: bool) -> torch.Tensor:
    """Runs a session, and gives what it saves."""
    weights = weights_of(number)
    with model.session(remote=remote) as session:
        return record(model, session, number, weights, num_traces=num_traces)


def weights_of(number: int) -> torch.Tensor:
    """Gives the tensor that a session brings, large enough to be uploaded."""
    generator = torch.Generator().manual_seed(number % NUM_KINDS)
    return torch.randn(64, 256, generator=generator) / 8


def record(
    model: LanguageModel,
    session: Session,
    number: int,
    weights: torch.Tensor,
    *,
    num_traces: int,
) -> torch.Tensor:
    """Records traces that each need the one before, with a tensor of the user's and a message."""
    total = torch.zeros(64)
    for _ in range(num_traces):
        with model.trace([number % NUM_KINDS + 1, *IDS]):
            layers = model.model.layers
            layers[0].output[0][:, -1, :] = layers[0].output[0][:, -1, :] + total
            total = (layers[2].output[0][0, -1, :] @ weights)[:64] * 0.1
    session.log("nearly done")
    result: torch.Tensor = total.save()
    return result


def run(folder: Path, tiny: TinyModels, scale: Scale) -> Counter[Fault]:
    """Runs it all and gives which faults came; fails where anything is not as undisturbed."""
    plain = LanguageModel(str(tiny.folder("llama")))
    expected = [
        session(plain, kind, num_traces=scale.num_traces, remote=False) for kind in range(NUM_KINDS)
    ]
    shown = Shown()
    logging.getLogger("insitu").addHandler(shown)
    cluster = Cluster(folder, tiny.folder("llama"))
    os.environ["INSITU_ENDPOINT"] = cluster.endpoint
    CONFIG.set_default_api_key("chaos")
    try:
        _wait_for_groups(2)
        num_sessions = _run_clients(cluster, scale, expected)
        _check_nothing_is_left(cluster, folder, num_sessions, shown)
    finally:
        logging.getLogger("insitu").removeHandler(shown)
        cluster.stop()
    return cluster.struck


@dataclass
class Progress:
    """What clients and the one who breaks things know of each other."""

    completed: list[int] = field(default_factory=list)
    """Numbers of sessions."""
    all_struck: threading.Event = field(default_factory=threading.Event)
    """Set when every fault has come."""
    is_over: threading.Event = field(default_factory=threading.Event)
    """Set when no fault is to come any more."""


def _run_clients(cluster: Cluster, scale: Scale, expected: list[torch.Tensor]) -> int:
    """Runs sessions until there have been enough, and every fault has come; gives how many."""
    model = LanguageModel(MODEL)
    numbers = itertools.count()
    progress = Progress()

    def submit_one_after_another() -> None:
        while (number := next(numbers)) < scale.num_sessions or not progress.all_struck.is_set():
            found = _insist(model, number, scale.num_traces)
            wanted = expected[number % NUM_KINDS]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            progress.completed.append(number)

    breaking = threading.Thread(target=_break, args=(cluster, scale, progress))
    with ThreadPoolExecutor(scale.num_clients) as threads:
        breaking.start()
        try:
            clients = [threads.submit(submit_one_after_another) for _ in range(scale.num_clients)]
            for client in clients:
                client.result()
        finally:
            progress.all_struck.set()
            progress.is_over.set()
            breaking.join()
    return len(progress.completed)


def _insist(model: LanguageModel, number: int, num_traces: int) -> torch.Tensor:
    """A client tries again while nobody answers."""
    deadline = time.monotonic() + 300
    while True:
        try:
            return session(model, number, num_traces=num_traces, remote=True)
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _break(cluster: Cluster, scale: Scale, progress: Progress) -> None:
    rng = random.Random(scale.seed)
    for fault in _faults(rng):
        # On a busy machine what died takes long to come back: some session gets through first.
        num_before = len(progress.completed)
        is_over = progress.is_over.wait(scale.pause_seconds * rng.uniform(0.5, 1.5))
        while not is_over and len(progress.completed) == num_before:
            is_over = progress.is_over.wait(0.1)
        if is_over:
            return
        cluster.strike(fault, rng)
        if len(cluster.struck) == len(Fault):
            progress.all_struck.set()


def _faults(rng: random.Random) -> Iterator[Fault]:
    """Deals all faults in some order, and again in another."""
    while True:
        yield from rng.sample(list(Fault), len(Fault))


def _wait_for_groups(number: int) -> None:
    backend = RemoteBackend(CONFIG)
    deadline = time.monotonic() + 200
    while True:
        with suppress(UnavailableError):
            if len(backend.server_state().groups) == number:
                break
        assert time.monotonic() < deadline, "the shard groups have not registered"
        time.sleep(0.2)
    backend.close()


def _check_nothing_is_left(cluster: Cluster, folder: Path, num_sessions: int, shown: Shown) -> None:
    """Every session has ended once, its events were shown once, and nothing holds anything."""
    _wait_for_groups(2)
    backend = RemoteBackend(CONFIG)
    deadline = time.monotonic() + 90
    while True:
        queues = backend.server_state().queues
        num_open = sum(queue.num_waiting + queue.num_running for queue in queues)
        num_open += sum(group.num_sessions for group in backend.server_state().groups)
        if not num_open and not (num_handles := cluster.num_handles()):
            break
        assert time.monotonic() < deadline, f"{num_open} sessions or {num_handles} handles are left"
        time.sleep(0.5)
    num_completed = 0
    for row in backend.sessions(10 * num_sessions):
        responses = backend.events(row.session_id, after=0, timeout=30)
        events = [response.event for response in responses]
        check_events(events, shown.lines[row.session_id])
        num_completed += events[-1].kind == EventKind.EVENT_KIND_COMPLETED
        # Whoever lost the server before it answered submits another in its place.
        assert events[-1].kind in {
            EventKind.EVENT_KIND_COMPLETED,
            EventKind.EVENT_KIND_CANCELLED,
        }, events[-1]
    backend.close()
    assert num_completed >= num_sessions
    assert not list((folder / "uploads" / "drafts").iterdir())


def check_events(events: list[Event], lines: list[str]) -> None:
    """Checks that a session ended once, and a client that stayed was shown each event once.

    Args:
        events: all of the session's.
        lines: what the client was shown; nothing, if it did not stay.
    """
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.kind in _ENDS for event in events] == [False] * (len(events) - 1) + [True]
    told = [
        f"{EventKind.Name(event.kind).removeprefix('EVENT_KIND_')}: {event.message}"
        for event in events
    ]
    assert lines in (told, [])
    if lines:
        assert sum("nearly done" in line for line in lines) == 1


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--traces", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=10.0, help="seconds between faults")
    found = parser.parse_args()
    scale = Scale(
        num_sessions=found.sessions,
        num_clients=found.clients,
        num_traces=found.traces,
        seed=found.seed,
        pause_seconds=found.pause,
    )
    logging.getLogger("insitu").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        models, data = Path(folder, "models"), Path(folder, "data")
        models.mkdir()
        data.mkdir()
        struck = run(data, TinyModels(models), scale)
    faults = ", ".join(f"{fault} {count} times" for fault, count in sorted(struck.items()))
    sys.stdout.write(f"{found.sessions} sessions or more, all as undisturbed: {faults}\n")


if __name__ == "__main__":
    main()
