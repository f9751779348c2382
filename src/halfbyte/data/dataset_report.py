"""What became of each row of a data set, so that nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SHOWN = 5
"""Line numbers, and reasons, that are shown before the rest is only counted."""


class RowRejected(Exception):
    """One row cannot be used; its text is the reason, under which rows are counted together."""


@dataclass(frozen=True)
class DatasetReport:
    """The report on a data set.

    Lines are strings: a line number of the file, or ``name:number`` where several files were read.

    Attributes:
        source: What was read, as the user wrote it.
        format: Which of the row formats it is in.
        rows: Rows read, blank lines not counted.
        usable: Rows that became examples.
        rejected: For each reason, the lines of the rows that were left out for it.
        max_length: The most tokens that an example may have.
        truncated_lines: Lines of the usable rows that were cut to ``max_length``.
        tokens: Tokens of all examples, after cutting.
        supervised_tokens: Those of them that are trained on.
        longest: Tokens of the longest usable row, before cutting.
        notes: What a person should know besides.
    """

    source: str
    format: str
    rows: int
    usable: int
    rejected: Mapping[str, Sequence[str]]
    max_length: int
    truncated_lines: tuple[str, ...]
    tokens: int
    supervised_tokens: int
    longest: int
    notes: tuple[str, ...] = ()

    @property
    def truncated(self) -> int:
        """How many rows were cut."""
        return len(self.truncated_lines)

    def lines(self) -> list[str]:
        """Lines for a person, a statement each."""
        lines = [
            f"{self.source}: {self.usable:,} of {self.rows:,} rows usable, read as {self.format}"
        ]
        lines += describe_rejected(self.rejected)
        if self.truncated_lines:
            lines.append(
                f"cut to max_length {self.max_length}: {counted(self.truncated_lines)}; "
                f"the longest has {self.longest:,} tokens"
            )
        share = self.supervised_tokens / max(self.tokens, 1)
        lines.append(f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})")
        return [*lines, *self.notes]


def counted(lines: Sequence[str]) -> str:
    """``3 rows (lines 4, 7, 9)``, with no more than the first few lines."""
    shown = ", ".join(lines[:_SHOWN]) + (", …" if len(lines) > _SHOWN else "")
    plural = "s" if len(lines) > 1 else ""
    return f"{len(lines):,} row{plural} (line{plural} {shown})"


def describe_rejected(rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason, the most frequent first."""
    reasons = sorted(rejected, key=lambda reason: -len(rejected[reason]))
    lines = [f"left out, {reason}: {counted(rejected[reason])}" for reason in reasons[:_SHOWN]]
    if others := reasons[_SHOWN:]:
        rows = sum(len(rejected[reason]) for reason in others)
        lines.append(f"left out for {len(others)} other reasons: {rows:,} rows")
    return lines
