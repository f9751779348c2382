"""The report on a data set: which rows were used, truncated or rejected, and why.

Reasons may quote the data, so their length and the number of those that are listed have limits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.errors import DataError
from halfbyte.foreign_text import quote

_SHOWN = 5
"""Line numbers, reasons and keys to show; the rest is only counted."""

LONGEST_REASON = 280
"""Characters of a reason."""

_MOST_REASONS = 100
_OTHER_REASONS = "other reasons"


class RowRejected(Exception):
    """A row cannot be used; the message is the reason, by which rejected rows are counted."""


class Rejection(NamedTuple):
    """A rejected row: its line, the reason, and the beginning of the row."""

    line: str
    reason: str
    row: str


class Notes:
    """Notes about how rows were encoded, each with the lines of the rows, or for all of them.

    Those about texts come before those about tokens, whichever were made first, so that they are in
    the same order however the rows were divided.

    Attributes:
        texts: For each note about rendered texts, lines in the order of the data, as keys.
        tokens: The same about tokens.
    """

    def __init__(self) -> None:
        self.texts: dict[str, dict[str, None]] = {}
        self.tokens: dict[str, dict[str, None]] = {}

    def add(self, other: Notes, lines: Sequence[str]) -> None:
        """Add notes about the following rows, whose lines are their positions in ``lines``."""
        for mine, others in ((self.texts, other.texts), (self.tokens, other.tokens)):
            for note, rows in others.items():
                mine.setdefault(note, {}).update((lines[int(row)], None) for row in rows)

    def described(self) -> list[str]:
        """One line for each note."""
        every = [*self.texts.items(), *self.tokens.items()]
        return [f"{note}: {counted(list(lines))}" if lines else note for note, lines in every]


class NothingUsable(DataError):
    """Not a single row of a data set can be used.

    Attributes:
        source: The data set, as the user names it.
        rows: The number of rows.
        rejections: Why each is rejected.
    """

    def __init__(
        self, message: str, source: str, rows: int, rejections: Sequence[Rejection]
    ) -> None:
        super().__init__(message)
        self.source = source
        self.rows = rows
        self.rejections = rejections


@dataclass(frozen=True)
class DatasetReport:
    """The report on a data set.

    Lines are strings: a line number of the file, or ``name:number`` if several files were read.

    Attributes:
        source: The source, as given by the user.
        formats: The number of rows in each row format, the most frequent first.
        rows: Rows read, without blank lines.
        usable: Rows that became examples.
        examples: Their number.
        split_lines: Lines of the usable rows that became several examples, or one that is not the
            whole row, because no text has all their replies as at inference.
        rejections: Every rejected row.
        max_length: The maximum number of tokens of an example.
        truncated_lines: Lines of the usable rows that were truncated to ``max_length``. Examples
            of which nothing supervised was left are not among ``examples``.
        tokens: Tokens of all examples, after truncation.
        supervised_tokens: Supervised tokens among them.
        longest: Tokens of the longest usable row, before truncation.
        notes: Further messages for the user.
    """

    source: str
    formats: Mapping[str, int]
    rows: int
    usable: int
    examples: int
    split_lines: tuple[str, ...]
    rejections: Sequence[Rejection]
    max_length: int
    truncated_lines: tuple[str, ...]
    tokens: int
    supervised_tokens: int
    longest: int
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """The row formats in words, with counts if there are several."""
        return in_words(self.formats)

    @property
    def rejected(self) -> dict[str, list[str]]:
        """For each reason, the lines of the rejected rows."""
        return by_reason(self.rejections)

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
        if self.split_lines:
            among = self.examples - (self.usable - len(self.split_lines))
            lines.append(
                f"{counted(self.split_lines)} became {among:,} example{'s' if among > 1 else ''}: "
                "the chat template renders earlier replies otherwise than at inference"
            )
        if self.truncated_lines:
            lines.append(
                f"truncated to max_length {self.max_length}: {counted(self.truncated_lines)}; "
                f"the longest has {self.longest:,} tokens"
            )
        share = self.supervised_tokens / max(self.tokens, 1)
        lines.append(f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})")
        return [*lines, *self.notes]


def in_words(formats: Mapping[str, int]) -> str:
    """``messages``, or ``messages (7 rows), text (1 row)``."""
    if len(formats) < 2:
        return "".join(formats)
    return ", ".join(f"{name} ({_rows(count)})" for name, count in formats.items())


def by_reason(rejections: Sequence[Rejection]) -> dict[str, list[str]]:
    """Return for each reason the lines of the rows; beyond 100 reasons, the others as one."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for line, reason, _ in rejections:
        listed = reason in found or len(found) < _MOST_REASONS
        found[reason if listed else _OTHER_REASONS].append(line)
    return dict(found)


def counted(lines: Sequence[str]) -> str:
    """``3 rows (lines 4, 7, 9)``, listing only the first few lines."""
    shown = ", ".join(lines[:_SHOWN]) + (", …" if len(lines) > _SHOWN else "")
    return f"{_rows(len(lines))} (line{'s' if len(lines) > 1 else ''} {shown})"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def describe_rejected(rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per reason, the most frequent first."""
    reasons = sorted(rejected, key=lambda reason: -len(rejected[reason]))
    lines = [f"left out, {reason}: {counted(rejected[reason])}" for reason in reasons[:_SHOWN]]
    if others := reasons[_SHOWN:]:
        rows = sum(len(rejected[reason]) for reason in others)
        lines.append(f"left out for {len(others)} other reasons: {_rows(rows)}")
    return lines


def describe_unused(unused: Mapping[str, int]) -> list[str]:
    """One line that names the keys of rows which nothing reads, the most frequent first."""
    keys = sorted(unused, key=lambda key: -unused[key])
    named = [f"{quote(key)} ({_rows(unused[key])})" for key in keys[:_SHOWN]]
    more = [f"{len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
    return [f"keys that are not used: {', '.join([*named, *more])}"] if keys else []
