"""Data: from files in five row formats to the micro-batches of an optimizer step.

    sources         rows with line numbers, from a file, a directory or the hub
    formats         rows to conversations
    templates       conversations to token ids and loss masks
    batching        examples to micro-batches
    dataset_report  which rows were used, truncated or rejected

Nothing is dropped silently: rows that cannot be used are counted by reason, with their lines, and a
source without a single usable row is an error that lists the reasons.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data.batching import IGNORED, MicroBatch, StepPlan, collate, steps
from halfbyte.data.dataset_report import DatasetReport, RowRejected, describe_rejected
from halfbyte.data.formats import Conversation, Message, detect_format, to_conversation
from halfbyte.data.sources import read_source
from halfbyte.data.templates import Encoder, Example, TrainOn, end_of_turn, prompt_ids
from halfbyte.errors import DataError

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
    encoded = zip(read.conversations, encoder.encode_all(read.conversations), strict=True)
    for done, (row, whole) in enumerate(encoded, 1):
        try:
            if isinstance(whole, RowRejected):
                raise whole
            if not whole.labels_mask[:max_length].any():
                within = f" within max_length {max_length}" if whole.labels_mask.any() else ""
                raise RowRejected(f"nothing supervised{within}")
        except RowRejected as rejection:
            read.rejected[str(rejection)].append(row.line)
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
        format=read.format,
        rows=read.rows,
        usable=len(examples),
        rejected=dict(read.rejected),
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
        DataError: There is no data, no usable row, or the data is plain text, without prompts.
    """
    read = _read(source)
    if read.format == "text":
        raise DataError(f"{source} is plain text: expected conversations with replies.")
    return read.conversations


@dataclass(frozen=True)
class _Read:
    source: str
    format: str
    rows: int
    conversations: list[Conversation]
    rejected: defaultdict[str, list[str]]
    notes: tuple[str, ...]


def _read(source: str | Path) -> _Read:
    rows, notes = read_source(source)
    rejected: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.problem is not None:
            rejected[row.problem].append(row.line)
    sound = [row for row in rows if row.problem is None]
    found: list[Conversation] = []
    name = "nothing"
    if sound:
        try:
            name = detect_format(row.value for row in sound)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
    for row in sound:
        try:
            found.append(to_conversation(row.value, row.line, name))
        except RowRejected as rejection:
            rejected[str(rejection)].append(row.line)
    read = _Read(str(source), name, len(rows), found, rejected, notes)
    if not found:
        raise DataError(_nothing_usable(read))
    return read


def _nothing_usable(read: _Read) -> str:
    reasons = "".join(f"\n  {line}" for line in describe_rejected(read.rejected))
    return (
        f"{read.source}: none of the {read.rows:,} rows (read as {read.format}) is usable.{reasons}"
    )


def _cut(example: Example, length: int) -> Example:
    prompt = min(example.prompt_length, length)
    return Example(example.tokens[:length], example.labels_mask[:length], prompt)
