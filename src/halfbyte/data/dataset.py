"""A data set with random access, without an object for each row: its examples are views of arrays.

Token ids and masks stay in the chunks in which they were encoded, in memory or mapped from a file
of the cache. Of each example there are a few numbers in arrays; its conversation is read from the
file of the data again, when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.batching import Mixture
from halfbyte.data.dataset_report import DatasetReport
from halfbyte.data.encoding import EncodedChunk
from halfbyte.data.formats import Conversation, to_conversation
from halfbyte.data.row_table import RowTable
from halfbyte.data.templates import Example

_READ_TOGETHER = 256  # rows, when all are gone through
_NONE = np.empty(0, dtype=np.int32)


class Examples(Sequence[Example]):
    """Examples, as views of the arrays of chunks.

    Attributes:
        lengths: int32 [examples], the tokens of each.
        prompt_lengths: int32 [examples], those before the first supervised one.
    """

    def __init__(self, chunks: Iterable[EncodedChunk]) -> None:
        """Take the examples of chunks, in order."""
        lengths, prompts, chunk, starts = [], [], [], []
        self._chunks: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
        for one in chunks:
            lengths.append(one.lengths)
            prompts.append(one.prompt_lengths)
            chunk.append(np.full(len(one.lengths), len(self._chunks), dtype=np.int32))
            starts.append(np.cumsum(one.lengths, dtype=np.int64) - one.lengths)
            self._chunks.append((one.tokens, one.mask))
        self.lengths: NDArray[np.int32] = np.concatenate([_NONE, *lengths])
        self.prompt_lengths: NDArray[np.int32] = np.concatenate([_NONE, *prompts])
        self._chunk: NDArray[np.int32] = np.concatenate([_NONE, *chunk])
        self._start: NDArray[np.int64] = np.concatenate([_NONE.astype(np.int64), *starts])

    def select(self, indices: NDArray[np.int64]) -> Examples:
        """Return the examples with these indices."""
        found = Examples(())
        found._chunks = self._chunks
        found.lengths, found.prompt_lengths = self.lengths[indices], self.prompt_lengths[indices]
        found._chunk, found._start = self._chunk[indices], self._start[indices]
        return found

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        tokens, mask = self._chunks[self._chunk[index]]
        start = int(self._start[index])
        part = slice(start, start + int(self.lengths[index]))
        return Example(tokens[part], mask[part], int(self.prompt_lengths[index]))


class Conversations(Sequence[Conversation]):
    """For each example its conversation, read from the data when it is asked for."""

    def __init__(
        self,
        table: RowTable,
        preferred: Sequence[str],
        row: NDArray[np.int64],
        messages: NDArray[np.int32],
    ) -> None:
        """Describe them.

        Args:
            table: The rows of the data.
            preferred: The formats in which they are read.
            row: int64 [examples], the row of each example.
            messages: int32 [examples], how many of the row's messages it is; 0 for plain text.
        """
        self._table, self._preferred = table, tuple(preferred)
        self.row, self.messages = row, messages

    def __len__(self) -> int:
        return len(self.row)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return list(self._read(np.arange(len(self))[index]))
        return next(self._read(np.array([range(len(self))[index]])))

    def __iter__(self) -> Iterator[Conversation]:
        for start in range(0, len(self), _READ_TOGETHER):
            yield from self._read(np.arange(start, min(start + _READ_TOGETHER, len(self))))

    def select(self, indices: NDArray[np.int64]) -> Conversations:
        """Return those of the examples with these indices."""
        chosen = self.row[indices], self.messages[indices]
        return Conversations(self._table, self._preferred, *chosen)

    def lines(self, indices: Sequence[int]) -> list[str]:
        """Return the lines of examples, without reading them."""
        return self._table.lines(self.row[np.array(indices, dtype=np.int64)])

    def _read(self, indices: NDArray[np.int64]) -> Iterator[Conversation]:
        stops = self.messages[indices].tolist()
        for row, stop in zip(self._table.read(self.row[indices]), stops, strict=True):
            found = to_conversation(row.value, row.line, self._preferred)
            yield found.up_to(stop) if found.messages else found


class Case(NamedTuple):
    """A usable row, and its last example."""

    row: Conversation
    example: Example


class Cases(Sequence[Case]):
    """Each usable row of a data set once, with its last example; read when it is asked for."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset.last_of_row)

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> list[Case]: ...

    def __getitem__(self, index: int | slice) -> Case | list[Case]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = int(self._dataset.last_of_row[index])
        return Case(self._dataset.rows[at], self._dataset.examples[at])

    def __iter__(self) -> Iterator[Case]:
        rows, examples = self._dataset.rows, self._dataset.examples
        last = np.asarray(self._dataset.last_of_row, dtype=np.int64)
        if isinstance(rows, Conversations):  # some of them together
            rows, indices = rows.select(last), last.tolist()
        else:
            rows, indices = [rows[at] for at in last.tolist()], last.tolist()
        for row, at in zip(rows, indices, strict=True):
            yield Case(row, examples[at])


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
        mixture: The examples and weights of the sources; None without weights.
    """

    examples: Sequence[Example]
    report: DatasetReport
    rows: Sequence[Conversation]
    last_of_row: Sequence[int] | NDArray[np.int64]
    mixture: Mixture | None = None

    @property
    def cases(self) -> Cases:
        """Each usable row once, with its last example: what answers are generated for."""
        return Cases(self)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [examples], the tokens of each."""
        if isinstance(self.examples, Examples):
            return self.examples.lengths
        return np.array([len(example.tokens) for example in self.examples], dtype=np.int32)

    def lines(self, indices: Sequence[int]) -> list[str]:
        """Return the lines of the rows of examples."""
        if isinstance(self.rows, Conversations):
            return self.rows.lines(indices)
        return [self.rows[index].line for index in indices]

    def select(
        self, indices: NDArray[np.int64]
    ) -> tuple[Sequence[Example], Sequence[Conversation]]:
        """Return the examples with these indices, and their conversations."""
        examples: Sequence[Example] = []
        if isinstance(self.examples, Examples):
            examples = self.examples.select(indices)
        else:
            examples = [self.examples[index] for index in indices.tolist()]
        if isinstance(self.rows, Conversations):
            return examples, self.rows.select(indices)
        return examples, [self.rows[index] for index in indices.tolist()]

    def digest(self) -> str:
        """Return a digest of the tokens of all examples, and of which are supervised."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray(example.tokens).tobytes())
            digest.update(np.asarray(example.labels_mask).tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def prompts(self, longest: int) -> list[int]:
        """Return which of the `cases` have a prompt, of at most so many tokens."""
        last = np.asarray(self.last_of_row, dtype=np.int64)
        if isinstance(self.examples, Examples) and isinstance(self.rows, Conversations):
            fits = self.examples.prompt_lengths[last] <= longest
            return np.flatnonzero(fits & (self.rows.messages[last] > 0)).tolist()
        cases = enumerate(self.cases)
        return [
            at
            for at, (row, example) in cases
            if row.text is None and example.prompt_length <= longest
        ]


def last_of_row(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of the last of each run of equal rows."""
    return np.flatnonzero(np.diff(row, append=-1) != 0)
