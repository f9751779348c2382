"""The report on a data set: which rows were used, truncated or rejected, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SHOWN = 5
"""Line numbers and reasons to list; the rest is only counted."""


class RowRejected(Exception):
    """A row cannot be used; the message is the reason, by which rejected rows are counted."""


@dataclass(frozen=True)
class DatasetReport:
    """The report on a data set.

    Lines are strings: a line number of the file, or ``name:number`` if several files were read.

    Attributes:
        source: The source, as given by the user.
        format: The detected row format.
        rows: Rows read, without blank lines.
        usable: Rows that became examples.
        rejected: For each reason, the lines of the rejected rows.
        max_length: The maximum number of tokens of an example.
        truncated_lines: Lines of the usable rows that were truncated to ``max_length``.
        tokens: Tokens of all examples, after truncation.
        supervised_tokens: Supervised tokens among them.
        longest: Tokens of the longest usable row, before truncation.
        notes: Further messages for the user.
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
        """Number of truncated rows."""
        return len(self.truncated_lines)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [
            f"{self.source}: {self.usable:,} of {self.rows:,} rows usable, read as {self.format}"
        ]
        lines += describe_rejected(self.rejected)
        if self.truncated_lines:
            lines.append(
                f"truncated to max_length {self.max_length}: {counted(self.truncated_lines)}; "
                f"the longest has {self.longest:,} tokens"
            )
        share = self.supervised_tokens / max(self.tokens, 1)
        lines.append(f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})")
        return [*lines, *self.notes]


def counted(lines: Sequence[str]) -> str:
    """``3 rows (lines 4, 7, 9)``, listing only the first few lines."""
    shown = ", ".join(lines[:_SHOWN]) + (", …" if len(lines) > _SHOWN else "")
    plural = "s" if len(lines) > 1 else ""
    return f"{len(lines):,} row{plural} (line{plural} {shown})"


def describe_rejected(rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per reason, the most frequent first."""
    reasons = sorted(rejected, key=lambda reason: -len(rejected[reason]))
    lines = [f"left out, {reason}: {counted(rejected[reason])}" for reason in reasons[:_SHOWN]]
    if others := reasons[_SHOWN:]:
        rows = sum(len(rejected[reason]) for reason in others)
        lines.append(f"left out for {len(others)} other reasons: {rows:,} rows")
    return lines
