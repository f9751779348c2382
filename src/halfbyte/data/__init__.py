"""Data: from files in five row formats to the micro-batches of an optimizer step.

    specs           the grammar of a source
    sources         files, directories, the hub and standard input as files of rows
    row_files       rows with line numbers, read by byte offset
    kinds           what a file is, which readers, tables and hub read
    conversion      what is not JSON lines, as JSON lines in the cache
    in_memory       rows of a program
    row_table       the rows of these files, read by number (row_index: where they are)
    formats         rows to conversations
    messages        the messages of a conversation
    templates       conversations to examples: token ids and loss masks
    encoding        chunks of rows to arrays, in this or in other processes (encoding_pool)
    row_encoder     rows to examples by several processes, kept in the user's cache
    loading         a data set whole, with random access (dataset)
    batching        examples to micro-batches
    dataset_report  which rows were used, truncated or rejected

Nothing is dropped silently: rows that cannot be used are counted by reason, with their lines, and a
source without a single usable row is an error that lists the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.config.data_sources import Data
from halfbyte.data.batching import IGNORED, MicroBatch, Mixture, StepPlan, collate, steps
from halfbyte.data.dataset import Dataset
from halfbyte.data.dataset_report import (
    LONGEST_REASON,
    DatasetReport,
    NothingUsable,
    Rejection,
    RowRejected,
)
from halfbyte.data.encoding import EncoderSpec, beginning_of
from halfbyte.data.formats import Conversation, Message, format_of, to_conversation
from halfbyte.data.in_memory import RowsInMemory
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
    "Mixture",
    "NothingUsable",
    "Rejection",
    "RowsInMemory",
    "StepPlan",
    "collate",
    "conversations",
    "end_of_turn",
    "load_dataset",
    "prompt_ids",
    "steps",
]


def load_dataset(
    source: Data | RowsInMemory,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Reads, checks and encodes a data set.

    Args:
        source: One source or several: files, directories, hub ids; see `halfbyte.data.specs`; or
            a program's rows.
        tokenizer: The tokenizer, with its chat template.
        max_length: Longer rows are truncated to this many tokens, and counted.
        train_on: Supervised tokens: the assistant's, or all.
        columns: For keys of a row format, the rows' own; see `halfbyte.data.sources`.
        max_samples: Rows of each source that are used at most, the first.
        keep: Whether encoded rows of large data are kept in the user's cache, and taken from there.
        progress: Called with (rows done, total rows).

    Raises:
        DataError: There is no data, or no usable row.
    """
    opened = open_source(source, columns=columns, max_samples=max_samples, keep=keep)
    spec = EncoderSpec(tokenizer, opened.preferred(), max_length, train_on)
    return load_rows(opened, spec, np.arange(len(opened.table)), progress=progress)


def conversations(source: Data, columns: Mapping[str, str] | None = None) -> list[Conversation]:
    """The usable rows as conversations: prompts and expected replies.

    Raises:
        DataError: There is no data, no usable row, or a row is plain text, without a prompt.
    """
    opened = open_source(source, columns=columns)
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
        raise nothing_usable(opened.name, len(opened.table), counts, rejections)
    if plain := formats["text"]:
        raise DataError(
            f"{opened.name} has plain text in {plain:,} of its {len(opened.table):,} rows: "
            "expected conversations with replies."
        )
    return found
