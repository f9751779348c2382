"""The report on a data set: which rows were used, truncated or rejected, and why.

Reasons may quote the data, so their length and the number of those that are listed have limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.errors import DataError
from halfbyte.foreign_text import quote

_SHOWN = 5
"""Line numbers, reasons and keys to show; the rest is only counted."""

LONGEST_REASON = 280
"""Characters of a reason."""

_MOST_REASONS = 100
_LISTED = 100  # lines that are kept where only some are needed
_OTHER_REASONS = "other reasons"


class RowRejected(Exception):
    """A row cannot be used; the message is the reason, by which rejected rows are counted."""


class Rejection(NamedTuple):
    """A rejected row: its line, the reason, and the beginning of the row."""

    line: str
    reason: str
    row: str


class Lines:
    """The lines of some rows: how many there are, and the first of them, which are iterated over.

    So that a report on millions of rows is small. It equals a list of lines of which it has all.
    """

    def __init__(self, lines: Iterable[str] = (), total: int | None = None) -> None:
        """Take lines; ``total`` is their number if they are only the first."""
        self._first: list[str] = []
        self._total = 0
        self.extend(lines)
        if total is not None:
            self._total = max(total, self._total)

    def extend(self, lines: Iterable[str]) -> None:
        """Add lines."""
        for line in lines:
            self._total += 1
            if len(self._first) < _LISTED:
                self._first.append(line)

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __getitem__(self, part: slice) -> list[str]:
        return self._first[part]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, list | tuple | Lines):
            return (self._total, self._first) == (len(other), list(other))
        return NotImplemented

    def __repr__(self) -> str:
        return f"Lines({self._first!r}, total={self._total})"

    __hash__ = None  # type: ignore[assignment]


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

    def without(self, lines: Set[str]) -> Notes:
        """Return the notes without those lines; a note that was about no others is left out."""
        found = Notes()
        for mine, others in ((self.texts, found.texts), (self.tokens, found.tokens)):
            for note, rows in mine.items():
                left = {line: None for line in rows if line not in lines}
                if left or not rows:
                    others[note] = left
        return found


def described_notes(notes: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Return one line for each note, with the lines of its rows if it is not for all."""
    found = [(note, lines if isinstance(lines, Lines) else Lines(lines)) for note, lines in notes]
    return [f"{note}: {counted(lines)}" if len(lines) else note for note, lines in found]


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
        rejections: Every rejected row; none if they are given to a file as they are found, and
            then ``rejected_lines`` has their lines.
        max_length: The maximum number of tokens of an example.
        truncated_lines: Lines of the usable rows that were truncated to ``max_length``. Examples
            of which nothing supervised was left are not among ``examples``.
        tokens: Tokens of all examples, after truncation.
        supervised_tokens: Supervised tokens among them.
        longest: Tokens of the longest usable row, before truncation.
        notes: Further messages for the user.
        rejected_lines: For each reason the lines of rejected rows, if ``rejections`` has them not.
        held_out: Further rows, which ``rows`` does not count: left out because they are held out,
            or say the same as a row that is.
    """

    source: str
    formats: Mapping[str, int]
    rows: int
    usable: int
    examples: int
    split_lines: Lines
    rejections: Sequence[Rejection]
    max_length: int
    truncated_lines: Lines
    tokens: int
    supervised_tokens: int
    longest: int
    notes: tuple[str, ...] = ()
    rejected_lines: Mapping[str, Lines] | None = None
    held_out: int = 0

    @property
    def format(self) -> str:
        """The row formats in words, with counts if there are several."""
        return in_words(self.formats)

    @property
    def rejected(self) -> dict[str, Lines]:
        """For each reason, the lines of the rejected rows."""
        if self.rejected_lines is not None:
            return dict(self.rejected_lines)
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
        if self.held_out:
            lines.append(
                f"left out for `eval_split`: {_rows(self.held_out)}, held out or with the text of "
                "a row that is"
            )
        lines += describe_rejected(self.rejected)
        if len(self.split_lines):
            among = self.examples - (self.usable - len(self.split_lines))
            lines.append(
                f"{counted(self.split_lines)} became {among:,} example{'s' if among > 1 else ''}: "
                "the chat template renders earlier replies otherwise than at inference"
            )
        if len(self.truncated_lines):
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


def by_reason(
    rejections: Iterable[Rejection], found: dict[str, Lines] | None = None
) -> dict[str, Lines]:
    """Return for each reason the lines of the rows; beyond 100 reasons, the others as one.

    Args:
        rejections: Rejected rows.
        found: Those of earlier rows, to which they are added.
    """
    found = {} if found is None else found
    for line, reason, _ in rejections:
        listed = reason in found or len(found) < _MOST_REASONS
        found.setdefault(reason if listed else _OTHER_REASONS, Lines()).extend([line])
    return found


def counted(lines: Sequence[str] | Lines) -> str:
    """``3 rows (lines 4, 7, 9)``, listing only the first few lines."""
    shown = ", ".join(lines[:_SHOWN]) + (", …" if len(lines) > _SHOWN else "")
    return f"{_rows(len(lines))} (line{'s' if len(lines) > 1 else ''} {shown})"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def describe_rejected(rejected: Mapping[str, Sequence[str] | Lines]) -> list[str]:
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
