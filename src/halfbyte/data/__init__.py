"""Data: from files in five row formats to the micro-batches of an optimizer step.

    sources         what the user names, as files of JSON lines
    row_table       the rows of these files, read by number
    formats         rows to conversations
    messages        the messages of a conversation
    templates       conversations to examples: token ids and loss masks
    row_encoder     rows to examples by several processes, kept in the user's cache
    loading         a data set whole, with random access (dataset)
    batching        examples to micro-batches
    dataset_report  which rows were used, truncated or rejected

Nothing is dropped silently: rows that cannot be used are counted by reason, with their lines, and a
source without a single usable row is an error that lists the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.data.batching import IGNORED, MicroBatch, StepPlan, collate, steps
from halfbyte.data.dataset import Dataset
from halfbyte.data.dataset_report import LONGEST_REASON, DatasetReport, Rejection, RowRejected
from halfbyte.data.encoding import EncoderSpec, beginning_of
from halfbyte.data.formats import Conversation, Message, format_of, to_conversation
from halfbyte.data.loading import load_rows, nothing_usable, open_source
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
    "Rejection",
    "StepPlan",
    "collate",
    "conversations",
    "end_of_turn",
    "load_dataset",
    "prompt_ids",
    "steps",
]


def load_dataset(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Reads, checks and encodes a data set.

    Args:
        source: A file, a directory or a hub id; see `halfbyte.data.sources`.
        tokenizer: The tokenizer, with its chat template.
        max_length: Longer rows are truncated to this many tokens, and counted.
        train_on: Supervised tokens: the assistant's, or all.
        keep: Whether encoded rows of large data are kept in the user's cache, and taken from there.
        progress: Called with (rows done, total rows).

    Raises:
        DataError: There is no data, or no usable row.
    """
    opened = open_source(source, keep=keep)
    spec = EncoderSpec(tokenizer, opened.preferred(), max_length, train_on)
    return load_rows(opened, spec, np.arange(len(opened.table)), progress=progress)


def conversations(source: str | Path) -> list[Conversation]:
    """The usable rows as conversations: prompts and expected replies.

    Raises:
        DataError: There is no data, no usable row, or a row is plain text, without a prompt.
    """
    opened = open_source(source)
    preferred = opened.preferred()
    found, formats, rejections = [], Counter[str](), []
    for row in opened.table.read(np.arange(len(opened.table))):
        try:
            if row.problem is not None:
                raise RowRejected(row.problem)
            formats.update(filter(None, [format_of(row.value, preferred)]))
            found.append(to_conversation(row.value, row.line, preferred))
        except RowRejected as rejection:
            reason = shorten(str(rejection), LONGEST_REASON)
            rejections.append(Rejection(row.line, reason, beginning_of(row.value)))
    if not found:
        counts = dict(formats.most_common())
        raise DataError(nothing_usable(str(source), len(opened.table), counts, rejections))
    if "text" in formats:
        raise DataError(
            f"{source} has plain text in {formats['text']:,} of its {len(opened.table):,} rows: "
            "expected conversations with replies."
        )
    return found
