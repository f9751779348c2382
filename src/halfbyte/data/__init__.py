"""Data: from files in five row formats to the micro-batches of an optimizer step.

    sources         rows with line numbers, from a file, a directory or the hub
    in_memory       rows of a program
    formats         rows to conversations
    messages        the messages of a conversation
    templates       conversations to examples: token ids and loss masks
    encoding        chunks of rows to arrays, in this or in other processes (encoding_pool)
    batching        examples to micro-batches
    dataset_report  which rows were used, truncated or rejected

Nothing is dropped silently: rows that cannot be used are counted by reason, with their lines, and a
source without a single usable row is an error that lists the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data.batching import IGNORED, MicroBatch, StepPlan, collate, steps
from halfbyte.data.dataset_report import (
    LONGEST_REASON,
    DatasetReport,
    NothingUsable,
    Rejection,
    RowRejected,
    by_reason,
    describe_rejected,
    describe_unused,
    in_words,
)
from halfbyte.data.encoding import beginning_of, cut
from halfbyte.data.formats import (
    Conversation,
    Message,
    format_of,
    preferred_formats,
    to_conversation,
)
from halfbyte.data.in_memory import RowsInMemory
from halfbyte.data.sources import Row, read_source
from halfbyte.data.templates import (
    Encoded,
    Encoder,
    Example,
    TrainOn,
    end_of_turn,
    prompt_ids,
)
from halfbyte.errors import DataError
from halfbyte.foreign_text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Conversation",
    "Dataset",
    "DatasetReport",
    "Encoder",
    "Example",
    "Message",
    "MicroBatch",
    "NothingUsable",
    "RowsInMemory",
    "StepPlan",
    "collate",
    "conversations",
    "end_of_turn",
    "load_dataset",
    "prompt_ids",
    "steps",
]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The usable rows of a data set, and a report on all rows.

    Attributes:
        examples: What is trained on. A row is several examples if its replies cannot be supervised
            in one text; see `halfbyte.data.templates`.
        report: The report on all rows.
        rows: For each example its conversation: the row, or the row up to one of its replies.
        last_of_row: For each usable row the index of its last example, which is the whole row
            unless nothing is supervised in that.
    """

    examples: list[Example]
    report: DatasetReport
    rows: list[Conversation]
    last_of_row: list[int]

    @property
    def cases(self) -> list[tuple[Conversation, Example]]:
        """Each usable row once, with its last example: what answers are generated for."""
        return [(self.rows[index], self.examples[index]) for index in self.last_of_row]


def load_dataset(
    source: str | Path | RowsInMemory,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Reads, checks and encodes a data set.

    Args:
        source: A file, a directory or a hub id, see `halfbyte.data.sources`; or a program's rows.
        tokenizer: The tokenizer, with its chat template.
        max_length: Longer rows are truncated to this many tokens, and counted.
        train_on: Supervised tokens: the assistant's, or all.
        progress: Called with (rows done, total rows).

    Raises:
        DataError: There is no data, or no usable row.
    """
    read = _read(source)
    encoder = Encoder(tokenizer, train_on)
    collected = _Examples(max_length)
    encoded = zip(
        read.conversations, read.sources, encoder.encode_all(read.conversations), strict=True
    )
    for done, (row, raw, found) in enumerate(encoded, 1):
        try:
            if isinstance(found, RowRejected):
                raise found
            collected.add(row, found)
        except RowRejected as rejection:
            read.reject(raw, str(rejection))
        if progress is not None:
            progress(done, len(read.conversations))
    examples = collected.examples
    if not examples:
        raise _nothing_usable(read)
    report = DatasetReport(
        source=str(source),
        formats=read.formats,
        rows=read.rows,
        usable=len(collected.last_of_row),
        examples=len(examples),
        split_lines=tuple(collected.split),
        rejections=read.rejections,
        max_length=max_length,
        truncated_lines=tuple(collected.truncated),
        tokens=sum(len(example.tokens) for example in examples),
        supervised_tokens=sum(int(example.labels_mask.sum()) for example in examples),
        longest=collected.longest,
        notes=read.notes + encoder.notes(),
    )
    return Dataset(examples, report, collected.rows, collected.last_of_row)


def conversations(source: str | Path) -> list[Conversation]:
    """The usable rows as conversations: prompts and expected replies.

    Raises:
        DataError: There is no data, no usable row, or a row is plain text, without a prompt.
    """
    read = _read(source)
    if "text" in read.formats:
        raise DataError(
            f"{source} has plain text in {read.formats['text']:,} of its {read.rows:,} rows: "
            "expected conversations with replies."
        )
    return read.conversations


class _Read:
    """The rows of a source: as conversations with their sources, or rejected."""

    def __init__(self, source: str | Path | RowsInMemory) -> None:
        read = source.read if isinstance(source, RowsInMemory) else partial(read_source, source)
        rows, self.notes = read()
        self.source, self.rows = str(source), len(rows)
        self.conversations: list[Conversation] = []
        self.sources: list[Row] = []
        self.rejections: list[Rejection] = []
        try:
            preferred = preferred_formats(row.value for row in rows if row.problem is None)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        unused: Counter[str] = Counter()
        for row in rows:
            try:
                if row.problem is not None:
                    raise RowRejected(row.problem)
                found = to_conversation(row.value, row.line, preferred)
            except RowRejected as rejection:
                self.reject(row, str(rejection))
            else:
                unused.update(found.unused)
                self.conversations.append(found)
                self.sources.append(row)
        formats = [format_of(row.value, preferred) for row in rows if row.problem is None]
        self.formats = dict(Counter(filter(None, formats)).most_common())
        self.notes += tuple(describe_unused(unused))

    def reject(self, row: Row, reason: str) -> None:
        """Record that a row cannot be used."""
        reason, beginning = shorten(reason, LONGEST_REASON), beginning_of(row.value)
        self.rejections.append(Rejection(row.line, reason, beginning))


def _read(source: str | Path | RowsInMemory) -> _Read:
    read = _Read(source)
    if not read.conversations:
        raise _nothing_usable(read)
    return read


def _nothing_usable(read: _Read) -> NothingUsable:
    listed = "".join(f"\n  {line}" for line in describe_rejected(by_reason(read.rejections)))
    read_as = f" (read as {in_words(read.formats)})" if read.formats else ""
    message = f"{read.source}: none of the {read.rows:,} rows{read_as} is usable.{listed}"
    return NothingUsable(message, read.source, read.rows, read.rejections)


class _Examples:
    """The examples of the usable rows, truncated; the lines of rows that this needed, or split."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self.examples: list[Example] = []
        self.rows: list[Conversation] = []
        self.last_of_row: list[int] = []
        self.truncated: list[str] = []
        self.split: list[str] = []
        self.longest = 0

    def add(self, row: Conversation, encoded: list[Encoded]) -> None:
        """Add a row's examples, without those of which nothing supervised is left.

        Raises:
            RowRejected: None is left.
        """
        most = self._max_length
        kept, longest = cut(encoded, most)
        self.rows += [one.row for one in kept]
        self.examples += [one.example for one in kept]
        self.last_of_row.append(len(self.examples) - 1)
        self.longest = max(self.longest, longest)
        if longest > most:
            self.truncated.append(row.line)
        if any(one.row is not row for one in encoded):
            self.split.append(row.line)
