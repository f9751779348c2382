"""Rows to arrays, a chunk at a time: what the processes that encode large data pass each other.

`encode_chunk` is a function of an `EncoderSpec` and of rows. Both and its result can be pickled, so
it gives the same in any process (`encoding_pool`), which needs neither torch nor a model.

What it has to say about rows (rejections, notes, counts) refers to them by their position in the
chunk, and is collected in an `EncodingReport`: chunks that are added in the order of the data give
the report that one process gives that encodes all rows at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.content_hash import content_hash
from halfbyte.data.dataset_report import (
    LONGEST_REASON,
    DatasetReport,
    Lines,
    Notes,
    Rejection,
    RowRejected,
    by_reason,
    describe_unused,
)
from halfbyte.data.formats import Conversation, format_of, to_conversation
from halfbyte.data.rendering import check_exceeded
from halfbyte.data.row_files import Row
from halfbyte.data.templates import Encoded, Encoder, Example, TrainOn, described
from halfbyte.foreign_text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGINNING = 200  # characters of a rejected row that are reported

Rejected = tuple[int, str, str]
"""The position of a rejected row in its chunk, the reason, and the beginning of the row."""


@dataclass(frozen=True, eq=False)
class EncoderSpec:
    """How rows are encoded. It can be pickled, with a fast tokenizer as its tokenizer.json.

    Attributes:
        tokenizer: The tokenizer, with its chat template.
        preferred: The row formats, the preferred first (`formats.preferred_formats`).
        max_length: Longer examples are truncated to this many tokens.
        train_on: Supervised tokens: the assistant's, or all.
    """

    tokenizer: PreTrainedTokenizerBase
    preferred: tuple[str, ...]
    max_length: int
    train_on: TrainOn = "assistant"

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder; it keeps what it finds out about the template, so chunks should share it."""
        return Encoder(self.tokenizer, self.train_on)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "encoder"}


class EncodedChunk(NamedTuple):
    """The examples of a chunk of rows, one after the other, and what is to be said about the rows.

    Rows are meant by their positions in the chunk.

    Attributes:
        tokens: int32 [tokens], the token ids of all examples.
        mask: bool [tokens], true for supervised tokens.
        lengths: int32 [examples], the tokens of each example, after truncation.
        prompt_lengths: int32 [examples], those before the first supervised one.
        row: int64 [examples], the row of each example; ascending.
        messages: int32 [examples], the number of messages of its row that the example is; 0 for
            plain text.
        lines: For each row, its line.
        unread: Rows that could not be read, or are in no known format.
        rejected: Rows that could be read, but not used.
        formats: The number of rows in each row format.
        unused: The number of rows with each key that nothing read.
        truncated: Rows of which an example was truncated.
        split: Rows that became several examples, or one that is not the whole row.
        longest: Tokens of the longest example, before truncation.
        notes: Notes about rows, with the rows' positions as lines.
        exceeded: Renderings that exceeded a limit of the sandbox.
        content: uint64 [rows], the hash of what each row says (`content_hash`); 0 for rows that
            could not be read.
        held_out: Usable rows whose examples were left out by `without`.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    row: NDArray[np.int64]
    messages: NDArray[np.int32]
    lines: list[str]
    unread: list[Rejected]
    rejected: list[Rejected]
    formats: dict[str, int]
    unused: dict[str, int]
    truncated: list[int]
    split: list[int]
    longest: int
    notes: Notes
    exceeded: int
    content: NDArray[np.uint64]
    held_out: int = 0


def encode_chunk(spec: EncoderSpec, rows: Iterable[Row]) -> EncodedChunk:
    """Convert rows to examples.

    Raises:
        DataError: The chat template is not valid, or the tokenizer cannot be used for it.
    """
    rows = list(rows)
    read, unread, formats, unused = _read(rows, spec.preferred)
    encoder, kept = spec.encoder, _Kept(spec.max_length)
    rejected: list[Rejected] = []
    numbered = [conversation for _, conversation in read]
    content = np.zeros(len(rows), dtype=np.uint64)
    for at, conversation in read:
        content[at] = content_hash(conversation)
    for (at, row), found in zip(read, encoder.encode_all(numbered), strict=True):
        try:
            if isinstance(found, RowRejected):
                raise found
            kept.add(at, row, found)
        except RowRejected as rejection:
            rejected.append((at, str(rejection), beginning_of(rows[at].value)))
    examples = kept.examples
    return EncodedChunk(
        tokens=_joined(np.int32, [example.tokens for example in examples]),
        mask=_joined(np.bool_, [example.labels_mask for example in examples]),
        lengths=np.array([len(example.tokens) for example in examples], dtype=np.int32),
        prompt_lengths=np.array([example.prompt_length for example in examples], dtype=np.int32),
        row=np.array(kept.rows, dtype=np.int64),
        messages=np.array(kept.messages, dtype=np.int32),
        lines=[row.line for row in rows],
        unread=unread,
        rejected=rejected,
        formats=dict(formats),
        unused=dict(unused),
        truncated=kept.truncated,
        split=kept.split,
        longest=kept.longest,
        notes=encoder.take_notes(),
        exceeded=encoder.take_exceeded(),
        content=content,
    )


def without(chunk: EncodedChunk, content: NDArray[np.uint64]) -> EncodedChunk:
    """Leave out the examples of rows that say what others say, and count these rows.

    The rows stay in the chunk, as rejected ones do; ``formats``, ``unused`` and ``longest``, which
    are known of the whole chunk only, count them.

    Args:
        chunk: The chunk.
        content: uint64, ascending: hashes of what the others say.
    """
    if not len(content):
        return chunk
    used = np.unique(chunk.row)
    hashes = chunk.content[used]
    places = np.searchsorted(content, hashes).clip(max=len(content) - 1)
    out = used[content[places] == hashes]
    if not len(out):
        return chunk
    kept, gone = ~np.isin(chunk.row, out), set(out.tolist())
    of_tokens = np.repeat(kept, chunk.lengths)
    return chunk._replace(
        tokens=chunk.tokens[of_tokens],
        mask=chunk.mask[of_tokens],
        lengths=chunk.lengths[kept],
        prompt_lengths=chunk.prompt_lengths[kept],
        row=chunk.row[kept],
        messages=chunk.messages[kept],
        truncated=[at for at in chunk.truncated if at not in gone],
        split=[at for at in chunk.split if at not in gone],
        notes=chunk.notes.without(set(map(str, gone))),
        held_out=len(out),
    )


def beginning_of(value: object) -> str:
    """Return the beginning of a row, as reports on rejected rows show it."""
    text = value
    if not isinstance(text, str):
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text.strip()[:_BEGINNING]


_COUNTS = (
    "_rows",
    "_usable",
    "_examples",
    "_tokens",
    "_supervised",
    "_longest",
    "_exceeded",
    "_held_out",
)


class EncodingReport:
    """The report on chunks of rows, added in the order of the data.

    However many rows there are, it is small, except for rejected rows if it has to keep them.
    """

    def __init__(
        self,
        source: str,
        spec: EncoderSpec,
        notes: Sequence[str] = (),
        *,
        rejected: Callable[[list[Rejection]], object] | None = None,
    ) -> None:
        """Begin the report of a source.

        Args:
            source: The source, as given by the user.
            spec: How its rows are encoded.
            notes: Messages about how the source was read.
            rejected: Called with the rejected rows of each chunk, which then are not kept.
        """
        self._source, self._max_length, self._notes = source, spec.max_length, tuple(notes)
        self._tokenizer = spec.tokenizer
        self._rows = self._usable = self._examples = self._tokens = self._supervised = 0
        self._longest = self._held_out = 0
        self._formats: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._unread: list[Rejection] = []
        self._rejected: list[Rejection] = []
        self._give_rejected = rejected
        self._reasons: dict[str, Lines] = {}
        self._truncated, self._split = Lines(), Lines()
        # Notes about texts come first, as in `Notes`.
        self._said: tuple[dict[str, Lines], dict[str, Lines]] = ({}, {})
        self._exceeded = 0

    def add(self, chunk: EncodedChunk) -> None:
        """Add the next chunk, whose `lines` are those of the whole source.

        Raises:
            DataError: Too many renderings exceeded a limit of the sandbox.
        """
        lines = chunk.lines
        self._rows += len(lines)
        self._usable += len(np.unique(chunk.row))
        self._held_out += chunk.held_out
        self._examples += len(chunk.lengths)
        self._tokens += len(chunk.tokens)
        self._supervised += int(np.count_nonzero(chunk.mask))
        self._longest = max(self._longest, chunk.longest)
        self._formats.update(chunk.formats)
        self._unused.update(chunk.unused)
        unread, rejected = (
            [
                Rejection(lines[at], shorten(reason, LONGEST_REASON), beginning)
                for at, reason, beginning in found
            ]
            for found in (chunk.unread, chunk.rejected)
        )
        if self._give_rejected is None:
            self._unread += unread
            self._rejected += rejected
        elif unread or rejected:
            by_reason(unread + rejected, self._reasons)
            self._give_rejected(unread + rejected)
        self._truncated.extend(lines[at] for at in chunk.truncated)
        self._split.extend(lines[at] for at in chunk.split)
        for mine, others in zip(self._said, (chunk.notes.texts, chunk.notes.tokens), strict=True):
            for note, rows in others.items():
                mine.setdefault(note, Lines()).extend(lines[int(row)] for row in rows)
        self._exceeded += chunk.exceeded
        check_exceeded(self._exceeded)

    @property
    def rows(self) -> int:
        """The rows that have been added."""
        return self._rows

    def state(self) -> dict[str, Any]:
        """Return what has been added so far as JSON values, for `load`; without kept rejections."""

        def listed(found: Mapping[str, Lines]) -> dict[str, Any]:
            return {name: [len(lines), list(lines)] for name, lines in found.items()}

        return {
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "formats": dict(self._formats),
            "unused": dict(self._unused),
            "reasons": listed(self._reasons),
            "rows": listed({"truncated": self._truncated, "split": self._split}),
            "notes": [listed(found) for found in self._said],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` has returned.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """

        def lines(found: Mapping[str, Any]) -> dict[str, Lines]:
            return {name: Lines(first, total) for name, (total, first) in found.items()}

        counts = {"_held_out": 0} | state["counts"]  # 0: of a checkpoint that was before it
        for name in _COUNTS:
            setattr(self, name, int(counts[name]))
        self._formats, self._unused = Counter(state["formats"]), Counter(state["unused"])
        self._reasons = lines(state["reasons"])
        rows = lines(state["rows"])
        self._truncated, self._split = rows["truncated"], rows["split"]
        texts, tokens = state["notes"]
        self._said = lines(texts), lines(tokens)

    def report(self) -> DatasetReport:
        """Return the report on all chunks that were added; its ``usable`` may be 0."""
        formats = dict(self._formats.most_common())
        unused = tuple(describe_unused(self._unused))
        said = [note for found in self._said for note in found.items()]
        return DatasetReport(
            source=self._source,
            formats=formats,
            rows=self._rows - self._held_out,
            usable=self._usable,
            examples=self._examples,
            split_lines=self._split,
            rejections=self._unread + self._rejected,
            rejected_lines=None if self._give_rejected is None else self._reasons,
            max_length=self._max_length,
            truncated_lines=self._truncated,
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            longest=self._longest,
            notes=(*self._notes, *unused, *described(said, self._tokenizer)),
            held_out=self._held_out,
        )


def _read(
    rows: Sequence[Row], preferred: tuple[str, ...]
) -> tuple[list[tuple[int, Conversation]], list[Rejected], Counter[str], Counter[str]]:
    """The rows as conversations, with their positions as lines; what is wrong with the others."""
    read: list[tuple[int, Conversation]] = []
    unread: list[Rejected] = []
    formats: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    for at, row in enumerate(rows):
        try:
            if row.problem is not None:
                raise RowRejected(row.problem)
            if (name := format_of(row.value, preferred)) is not None:
                formats[name] += 1
            found = to_conversation(row.value, str(at), preferred)
        except RowRejected as rejection:
            unread.append((at, str(rejection), beginning_of(row.value)))
        else:
            unused.update(found.unused)
            read.append((at, found))
    return read, unread, formats, unused


class _Kept:
    """The examples of the usable rows, truncated; which rows this needed, or split."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self.examples: list[Example] = []
        self.rows: list[int] = []
        self.messages: list[int] = []
        self.truncated: list[int] = []
        self.split: list[int] = []
        self.longest = 0

    def add(self, at: int, row: Conversation, encoded: Sequence[Encoded]) -> None:
        """Add a row's examples, without those of which nothing supervised is left.

        Raises:
            RowRejected: None is left.
        """
        kept, longest = cut(encoded, self._max_length)
        self.examples += [one.example for one in kept]
        self.rows += [at] * len(kept)
        self.messages += [len(one.row.messages) for one in kept]
        self.longest = max(self.longest, longest)
        if longest > self._max_length:
            self.truncated.append(at)
        if any(one.row is not row for one in encoded):
            self.split.append(at)


def cut(encoded: Sequence[Encoded], length: int) -> tuple[list[Encoded], int]:
    """Truncate the examples of a row, and leave out those of which nothing supervised is left.

    Returns:
        The examples, and the tokens of the longest before that.

    Raises:
        RowRejected: None is left.
    """
    kept = [one for one in encoded if one.example.labels_mask[:length].any()]
    if not kept:
        learns = any(one.example.labels_mask.any() for one in encoded)
        raise RowRejected(f"nothing supervised{f' within max_length {length}' if learns else ''}")
    longest = max(len(one.example.tokens) for one in encoded)
    return [Encoded(one.row, _first(one.example, length)) for one in kept], longest


def _first(example: Example, length: int) -> Example:
    if len(example.tokens) <= length:
        return example
    prompt = min(example.prompt_length, length)
    return Example(example.tokens[:length], example.labels_mask[:length], prompt)


def _joined(kind: type, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=kind), *arrays])
