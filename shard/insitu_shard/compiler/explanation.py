"""What the compiler tells people of its plans."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from insitu_shard.compiler.passes import Pass

_MIB = 1024**2
_COLUMNS = ("pass", "model", "traces", "rows", "layers run", "saved", "tokens", "MiB", "note")
_TEXTS = {"model", "traces", "note"}
_YIELDS = (
    "on a server other users run between two passes where they wait and the session has had its "
    "quantum (30 s, or as the server says); its values stay"
)


@dataclass(frozen=True, slots=True)
class ExplainedPass:
    """One forward pass of a session, as it is planned."""

    model: str
    traces: tuple[int, ...]
    """Numbers of the traces that share it, from 1."""
    rows: int = 0
    """Rows at its widest place."""
    layers_run: int = 0
    """Decoder layers that run, counted once a row."""
    layers_saved: int = 0
    """Decoder layers that a pass for each trace would run beside."""
    tokens: int = 0
    """Tokens at its widest place."""
    num_bytes: int = 0
    """Estimate of the memory that it takes beside the weights."""
    note: str = ""
    """Why it is not merged, or when it runs."""

    @staticmethod
    def of(plan: Pass, model: str, numbers: Sequence[int], note: str) -> ExplainedPass:
        """Describes a planned pass.

        Args:
            plan: the pass.
            model: name of the model.
            numbers: numbers of its traces.
            note: when it runs.
        """
        notes = [text for text in (plan.traces[0].alone_because, note) if text]
        return ExplainedPass(
            model=model,
            traces=tuple(numbers),
            rows=plan.num_rows,
            layers_run=plan.layers_run,
            layers_saved=plan.layers_saved,
            tokens=plan.num_tokens,
            num_bytes=plan.num_bytes,
            note="; ".join(notes),
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a session runs: which traces share which forward passes.

    Prints as text, and as a table in a notebook. Other sessions that wait for the same model may
    join its passes; that is not in it.
    """

    passes: tuple[ExplainedPass, ...]
    """The passes, in the order in which they run."""

    def __str__(self) -> str:
        columns = list(zip(*self._table(), strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = (
            "  ".join(
                cell.ljust(width) if column[0] in _TEXTS else cell.rjust(width)
                for column, cell, width in zip(columns, row, widths, strict=True)
            )
            for row in zip(*columns, strict=True)
        )
        return "\n".join([*(line.rstrip() for line in lines), *self._remarks])

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        titles = "".join(f"<th>{escape(name)}</th>" for name in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        remarks = "".join(f"<p>{escape(remark)}</p>" for remark in self._remarks)
        return f"<table><tr>{titles}</tr>{body}</table>{remarks}"

    def _table(self) -> Iterator[tuple[str, ...]]:
        yield _COLUMNS
        for number, planned in enumerate(self.passes, 1):
            yield (
                str(number),
                planned.model.rpartition("/")[2],
                _ranges(planned.traces),
                f"{planned.rows:,}",
                f"{planned.layers_run:,}",
                f"{planned.layers_saved:,}",
                f"{planned.tokens:,}",
                f"{planned.num_bytes / _MIB:,.1f}",
                planned.note,
            )

    @property
    def _remarks(self) -> Iterator[str]:
        yield self._summary
        if len(self.passes) > 1:
            yield _YIELDS

    @property
    def _summary(self) -> str:
        traces = len({number for planned in self.passes for number in planned.traces})
        run = sum(planned.layers_run for planned in self.passes)
        saved = sum(planned.layers_saved for planned in self.passes)
        share = saved / (run + saved) if run + saved else 0
        return (
            f"{_counted(traces, 'trace')} in {_counted(len(self.passes), 'pass')}; "
            f"{saved:,} of {run + saved:,} layers saved ({share:.0%})"
        )


def _counted(number: int, word: str) -> str:
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    return f"{number:,} {word if number == 1 else plural}"


def _ranges(numbers: Sequence[int]) -> str:
    """Writes numbers as ranges, such as "1, 3-5"."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    parts = ([number for _, number in run] for _, run in runs)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
