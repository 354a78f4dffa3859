"""The ranks of a shard group as the engine sees them: who I am, and the collectives it needs."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from insitu_shard.engine.last_words import LastWords
from insitu_wire.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator


# How the messages of collectives that fail begin, which have no type of their own.
_OF_COLLECTIVE = re.compile(r"gloo|NCCL|^Operation timed out")

# How far ranks may be apart when all of them leave a pass for the same reason.
_LEAVING_TIMEOUT = timedelta(seconds=10)

_MAX_WHY = 300


class RankLostError(RuntimeError):
    """The ranks are not in step any more: their group has to end, and to be started again."""


@dataclass(slots=True)
class Collectives:
    """How many collectives a rank took part in, how long they took, and what they brought."""

    number: int = 0
    seconds: float = 0.0
    gathered_bytes: int = 0
    """Bytes of tensors that were joined of all ranks' parts."""

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what the block does as one."""
        started = time.perf_counter()
        yield
        self.number += 1
        self.seconds += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place in its group; with one rank nothing is communicated."""

    rank: int = 0
    size: int = 1
    collectives: Collectives = field(default_factory=Collectives, compare=False, repr=False)
    patient: Any = None
    """A process group of the same ranks for what may take long; None if there is nothing such."""
    last_words: LastWords = field(default_factory=LastWords, compare=False, repr=False)
    """Where ranks that end say why."""

    def meet(self) -> None:
        """Waits for all ranks, however long each has yet to load. Every rank must call it."""
        if self.patient is not None:
            dist.barrier(group=self.patient)

    def check_left_together(self, exception: Exception) -> None:
        """Sees to it that what raised here, with collectives in it, did on every rank.

        A rank that left alone, for want of memory say, is waited for by the others in a collective
        that it never comes to. Its end is what frees them.

        Args:
            exception: what was raised.

        Raises:
            RankLostError: another rank went on, or a collective itself failed.
        """
        if self.size == 1:
            return
        if isinstance(exception, RankLostError):
            raise exception
        if _is_of_collective(exception):
            raise RankLostError(f"rank {self.rank} lost another rank: {exception}") from exception
        # Before the others give up waiting, which may be soon.
        self.last_words.say(exception)
        try:
            meeting = dist.barrier(self.patient, async_op=True)
            assert meeting is not None
            meeting.wait(_LEAVING_TIMEOUT)
        except RuntimeError:
            raise RankLostError(
                f"rank {self.rank} alone could not go on: {exception}"
            ) from exception
        self.last_words.take_back()

    def say_why(self, exception: BaseException) -> None:
        """Leaves word of why this rank ends, for those who lose it."""
        if isinstance(exception, RankLostError) or _is_of_collective(exception):
            self.last_words.say_nothing()
        else:
            self.last_words.say(exception)

    def why_lost(self, exception: BaseException, *, within_seconds: float) -> str:
        """Finds out, in one line, why the group has to end.

        Args:
            exception: what was raised here; of a rank that is lost, a connection that broke.
            within_seconds: how long to wait for another rank to be known to have ended.
        """
        self.say_why(exception)
        return (
            self.last_words.own
            or self.last_words.heard(within_seconds)
            or "a rank did not answer, or the connection to it broke "
            f"({type(exception).__name__}: {one_line(exception)[:_MAX_WHY]})"
        )

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Every rank must call it."""
        return bool(self.highest([int(flag)])[0])

    def highest(self, numbers: list[int]) -> list[int]:
        """Gives the highest of each of the numbers over all ranks. Every rank must call it."""
        if self.size == 1:
            return numbers
        joined = torch.tensor(numbers)
        with self.collectives.measured():
            dist.all_reduce(joined, op=dist.ReduceOp.MAX)
        return joined.tolist()

    def gather(self, local: torch.Tensor, *, dim: int, full_size: int) -> torch.Tensor:
        """Joins the ranks' chunks of a tensor along a dimension. Every rank must call it.

        What is done to the whole is done on every rank alike: a rank's part of the gradient is the
        gradient of its chunk.
        """
        if torch.is_grad_enabled() and local.requires_grad:
            function: Any = _Gather
            whole: torch.Tensor = function.apply(local, self, dim, full_size)
            return whole
        return self._joined(local, dim, _chunk_sizes(full_size, self.size))

    def gather_range(
        self, local: torch.Tensor, *, dim: int, full_size: int, start: int, stop: int
    ) -> torch.Tensor:
        """Joins what the ranks' chunks have of a range of a dimension. Every rank must call it.

        No gradient goes through it.
        """
        ends = list(accumulate(_chunk_sizes(full_size, self.size), initial=0))
        bounds = [
            (min(max(start, first), after), max(min(stop, after), first))
            for first, after in pairwise(ends)
        ]
        sizes = [max(after - first, 0) for first, after in bounds]
        first = bounds[self.rank][0] - ends[self.rank]
        return self._joined(local.narrow(dim, first, sizes[self.rank]), dim, sizes)

    def local_chunk(self, full: torch.Tensor, *, dim: int) -> torch.Tensor:
        """Gives this rank's chunk of a whole tensor; its gradient is joined from all ranks."""
        if torch.is_grad_enabled() and full.requires_grad:
            function: Any = _Scatter
            part: torch.Tensor = function.apply(full, self, dim)
            return part
        return self._chunk(full, dim)

    def _joined(self, local: torch.Tensor, dim: int, sizes: list[int]) -> torch.Tensor:
        """Joins parts of known sizes, one of each rank, along a dimension."""
        widest = max(sizes)
        padded = local.movedim(dim, 0).contiguous()
        if missing := widest - padded.shape[0]:
            padded = torch.cat([padded, padded.new_zeros(missing, *padded.shape[1:])])
        chunks = [torch.empty_like(padded) for _ in range(self.size)]
        with self.collectives.measured():
            dist.all_gather(chunks, padded)
        self.collectives.gathered_bytes += padded.nbytes * self.size
        full = torch.cat([chunk[:size] for chunk, size in zip(chunks, sizes, strict=True)])
        return full.movedim(0, dim)

    def _chunk(self, full: torch.Tensor, dim: int) -> torch.Tensor:
        sizes = _chunk_sizes(full.shape[dim], self.size)
        start = sum(sizes[: self.rank])
        return full.narrow(dim, start, sizes[self.rank]).contiguous()

    def chunk_size(self, full_size: int) -> int:
        """Gives the size of this rank's chunk."""
        return _chunk_sizes(full_size, self.size)[self.rank]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, ranks: Ranks, dim: int, full_size: int
    ) -> torch.Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return ranks._joined(local, dim, _chunk_sizes(full_size, ranks.size))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.ranks.local_chunk(gradient, dim=ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, ranks: Ranks, dim: int) -> torch.Tensor:
        ctx.ranks, ctx.dim, ctx.full_size = ranks, dim, full.shape[dim]
        return ranks._chunk(full, dim)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.ranks.gather(gradient, dim=ctx.dim, full_size=ctx.full_size), None, None


def _is_of_collective(exception: BaseException) -> bool:
    return isinstance(exception, dist.DistError) or bool(_OF_COLLECTIVE.search(str(exception)))


def _chunk_sizes(full_size: int, num_ranks: int) -> list[int]:
    """Splits as torch.chunk and DTensor do: all chunks alike but the last ones."""
    widest = -(-full_size // num_ranks)
    starts = [min(widest * rank, full_size) for rank in range(num_ranks + 1)]
    return [end - start for start, end in pairwise(starts)]
