"""Ranks that are lost are known by what they said, or to have been killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from insitu_shard.engine.last_words import LastWords
from insitu_shard.engine.ranks import RankLostError, Ranks

BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def store(tmp_path: Path) -> dist.Store:
    return dist.FileStore(str(tmp_path / "store"), 3)


def _ranks(store: dist.Store, size: int = 3) -> list[Ranks]:
    """Ranks that are all this process."""
    return [
        Ranks(rank, size, last_words=LastWords(store, rank=rank, size=size)) for rank in range(size)
    ]


def _killed(store: dist.Store, rank: int) -> None:
    """Has a rank be a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        process.kill()
    host = store.get(f"process of rank {rank}").decode().rpartition(" ")[0]
    store.set(f"process of rank {rank}", f"{host} {process.pid}")


def _why(ranks: Ranks, exception: Exception = BROKEN) -> str:
    return ranks.why_lost(exception, within_seconds=0)


def test_what_a_rank_said_is_why_it_is_lost_and_not_what_others_saw_of_it(
    store: dist.Store,
) -> None:
    leader, failing, other = _ranks(store)
    failing.say_why(MemoryError("no room\nfor 8 bytes"))
    other.say_why(BROKEN)
    assert _why(leader) == "rank 1 could not go on: MemoryError: no room for 8 bytes"


def test_a_rank_that_is_gone_without_a_word_was_killed(store: dist.Store) -> None:
    leader, _, other = _ranks(store)
    _killed(store, 1)
    other.say_why(RankLostError("rank 2 lost another rank"))
    assert _why(leader) == "rank 1 was killed, as the system does where memory runs out"


def test_where_all_are_there_it_is_what_the_leader_saw(store: dist.Store) -> None:
    leader = _ranks(store)[0]
    why = _why(leader, RuntimeError("Operation timed out!"))
    assert why == (
        "a rank did not answer, or the connection to it broke (RuntimeError: Operation timed out!)"
    )


def test_a_rank_of_another_machine_is_not_looked_for_among_the_processes_of_this_one(
    store: dist.Store,
) -> None:
    leader = _ranks(store)[0]
    _killed(store, 1)
    process = store.get("process of rank 1").decode().rpartition(" ")[2]
    store.set("process of rank 1", f"another.machine {process}")
    assert _why(leader).startswith("a rank did not answer")


def test_what_the_leader_itself_could_not_do_is_said_of_it(store: dist.Store) -> None:
    leader, _, _ = _ranks(store)
    assert _why(leader, KeyError("a flaw")) == "rank 0 could not go on: KeyError: 'a flaw'"
    assert _why(Ranks(), KeyError("a flaw")) == "rank 0 could not go on: KeyError: 'a flaw'"


def test_what_was_taken_back_does_not_explain_a_later_loss(store: dist.Store) -> None:
    leader, recovered, _ = _ranks(store)
    recovered.last_words.say(MemoryError("all ranks alike"))
    recovered.last_words.take_back()
    assert _why(leader).startswith("a rank did not answer")


def test_words_are_bounded_and_a_store_that_is_gone_is_no_error(tmp_path: Path) -> None:
    leader, failing = _ranks(dist.FileStore(str(tmp_path / "store"), 2), size=2)
    failing.say_why(ValueError("x" * 10_000))
    assert len(_why(leader)) < 400
    gone = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", gone.port, is_master=False)
    leader = _ranks(client, size=2)[0]
    del gone
    assert _why(leader).startswith("a rank did not answer")
