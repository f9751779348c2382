"""Data: from files in five row formats to the micro-batches of an optimizer step.

    sources         rows with line numbers, from a file, a directory or the hub
    formats         rows to conversations
    messages        the messages of a conversation
    templates       conversations to token ids and loss masks
    batching        examples to micro-batches
    dataset_report  which rows were used, truncated or rejected

Nothing is dropped silently: rows that cannot be used are counted by reason, with their lines, and a
source without a single usable row is an error that lists the reasons.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data.batching import IGNORED, MicroBatch, StepPlan, collate, steps
from halfbyte.data.dataset_report import (
    LONGEST_REASON,
    DatasetReport,
    Rejection,
    RowRejected,
    by_reason,
    describe_rejected,
    describe_unused,
    in_words,
)
from halfbyte.data.formats import (
    Conversation,
    Message,
    format_of,
    preferred_formats,
    to_conversation,
)
from halfbyte.data.sources import Row, read_source
from halfbyte.data.templates import Encoder, Example, TrainOn, end_of_turn, prompt_ids
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

    ``examples`` and ``rows`` have one element for each usable row, in the same order.
    """

    examples: list[Example]
    report: DatasetReport
    rows: list[Conversation]


def load_dataset(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Reads, checks and encodes a data set.

    Args:
        source: A file, a directory or a hub id; see `halfbyte.data.sources`.
        tokenizer: The tokenizer, with its chat template.
        max_length: Longer rows are truncated to this many tokens, and counted.
        train_on: Supervised tokens: the assistant's, or all.
        progress: Called with (rows done, total rows).

    Raises:
        DataError: There is no data, or no usable row.
    """
    read = _read(source)
    encoder = Encoder(tokenizer, train_on)
    examples: list[Example] = []
    rows: list[Conversation] = []
    cut: list[str] = []
    longest = 0
    encoded = zip(
        read.conversations, read.sources, encoder.encode_all(read.conversations), strict=True
    )
    for done, (row, raw, whole) in enumerate(encoded, 1):
        try:
            if isinstance(whole, RowRejected):
                raise whole
            if not whole.labels_mask[:max_length].any():
                within = f" within max_length {max_length}" if whole.labels_mask.any() else ""
                raise RowRejected(f"nothing supervised{within}")
        except RowRejected as rejection:
            read.reject(raw, str(rejection))
        else:
            longest = max(longest, len(whole.tokens))
            if len(whole.tokens) > max_length:
                cut.append(row.line)
            examples.append(_cut(whole, max_length))
            rows.append(row)
        if progress is not None:
            progress(done, len(read.conversations))
    if not examples:
        raise DataError(_nothing_usable(read))
    report = DatasetReport(
        source=str(source),
        formats=read.formats,
        rows=read.rows,
        usable=len(examples),
        rejections=read.rejections,
        max_length=max_length,
        truncated_lines=tuple(cut),
        tokens=sum(len(example.tokens) for example in examples),
        supervised_tokens=sum(int(example.labels_mask.sum()) for example in examples),
        longest=longest,
        notes=read.notes + encoder.notes(),
    )
    return Dataset(examples, report, rows)


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


_BEGINNING = 200  # characters of a rejected row that are reported


class _Read:
    """The rows of a source: as conversations with their sources, or rejected."""

    def __init__(self, source: str | Path) -> None:
        rows, self.notes = read_source(source)
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
        text = row.value
        if not isinstance(text, str):
            text = json.dumps(text, ensure_ascii=False, default=str)
        beginning = text.strip()[:_BEGINNING]
        self.rejections.append(Rejection(row.line, shorten(reason, LONGEST_REASON), beginning))


def _read(source: str | Path) -> _Read:
    read = _Read(source)
    if not read.conversations:
        raise DataError(_nothing_usable(read))
    return read


def _nothing_usable(read: _Read) -> str:
    listed = "".join(f"\n  {line}" for line in describe_rejected(by_reason(read.rejections)))
    read_as = f" (read as {in_words(read.formats)})" if read.formats else ""
    return f"{read.source}: none of the {read.rows:,} rows{read_as} is usable.{listed}"


def _cut(example: Example, length: int) -> Example:
    prompt = min(example.prompt_length, length)
    return Example(example.tokens[:length], example.labels_mask[:length], prompt)
