"""The examples of data that is encoded while it is trained on, in an order without end.

Rows are taken in the order of each epoch, a function of seed and epoch over all *rows*, and epochs
follow each other. A row that is rejected, or says what a held-out row says, is replaced by the
next, and one that became several examples gives them one after the other. So which examples a step
gets depends on the rows before it, and a `Position` says how far a run has come; from there it goes
on with the same examples, whether they are in the cache or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.batching import Mixture
from halfbyte.data.encoding import EncodedChunk, EncodingReport, without
from halfbyte.data.encoding_pool import EncodingPool
from halfbyte.data.row_encoder import CHUNK_ROWS, RowEncoder, chunks_of
from halfbyte.data.row_files import Row
from halfbyte.data.row_table import RowTable
from halfbyte.data.templates import Example
from halfbyte.errors import DataError

Order = Callable[[int], NDArray[np.unsignedinteger[Any]]]
"""The rows of an epoch, in the order in which they are taken."""


class Position(NamedTuple):
    """How far examples have been taken.

    Attributes:
        rows: Rows before the next example's, over all epochs.
        examples: Examples of its row that have been taken.
    """

    rows: int = 0
    examples: int = 0


class EncodedRow(NamedTuple):
    """The line of a row and its examples, none if it is rejected."""

    line: str
    examples: list[Example]


class Taken(NamedTuple):
    """An example, and the line of its row."""

    line: str
    example: Example


class ExampleStream:
    """Gives the examples of encoded rows, one after the other.

    Attributes:
        position: Of the next example.
    """

    def __init__(self, rows: Iterator[EncodedRow], position: Position, most: int) -> None:
        """Begin.

        Args:
            rows: The rows from ``position`` on.
            position: Where to begin.
            most: So many rows without an example are an error.
        """
        self.position = position
        self._rows, self._most = rows, most
        self._row: EncodedRow | None = None

    def take(self, count: int, most_tokens: int | None = None) -> list[Taken]:
        """Return the next examples; fewer, if the rows end.

        Args:
            count: Their number.
            most_tokens: Fewer, too, if the next one had them exceed so many tokens together.

        Raises:
            DataError: Too many rows in a row are rejected, or the data cannot be read.
        """
        taken: list[Taken] = []
        empty = 0
        while len(taken) < count:
            if self._row is None:
                self._row = next(self._rows, None)
                if self._row is None:
                    break
            number, at = self.position
            left = self._row.examples[at : at + count - len(taken)]
            if most_tokens is not None:
                fitting = _fitting(left, most_tokens, first=not taken)
                most_tokens -= sum(len(example.tokens) for example in left[:fitting])
                if fitting < len(left):
                    taken += [Taken(self._row.line, example) for example in left[:fitting]]
                    self.position = Position(number, at + fitting)
                    break
            taken += [Taken(self._row.line, example) for example in left]
            if at + len(left) < len(self._row.examples):
                self.position = Position(number, at + len(left))
                continue
            empty = 0 if left else empty + 1
            if empty > self._most:
                raise DataError(f"none of {empty:,} rows one after the other is usable.")
            self._row, self.position = None, Position(number + 1)
        return taken


def _fitting(examples: Sequence[Example], most: int, *, first: bool) -> int:
    """Return how many of the examples have at most so many tokens; the first may exceed them."""
    for at, example in enumerate(examples):
        most -= len(example.tokens)
        if most < 0 and not (first and not at):
            return at
    return len(examples)


def shuffled(rows: int, seed: int, mixture: Mixture | None = None) -> Order:
    """Return an order in which every epoch has all rows once, or sources by their weights.

    That of the last epoch that was asked for is held.
    """
    kind: type[np.unsignedinteger[Any]] = np.uint32 if rows <= 1 << 32 else np.uint64

    @lru_cache(maxsize=1)
    def order(epoch: int) -> NDArray[np.unsignedinteger[Any]]:
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        if mixture is not None:
            return mixture.order(generator).astype(kind)
        found: NDArray[np.unsignedinteger[Any]] = np.arange(rows).astype(kind)
        generator.shuffle(found)
        return found

    return order


def rows_from(
    table: RowTable,
    encoder: RowEncoder,
    order: Order,
    start: int,
    report: EncodingReport,
    held_out: NDArray[np.uint64],
) -> Iterator[EncodedRow]:
    """Yield the rows of all epochs, encoded, from one on.

    Args:
        table: The rows.
        encoder: Encodes them.
        order: The order of each epoch.
        start: The number of the first row, over all epochs.
        report: Gets the chunks of the first epoch that it has not got yet, each when its first row
            is taken.
        held_out: uint64, ascending: hashes of what held-out rows say. Rows that say the same have
            no examples.
    """
    epoch, skipped = divmod(start, len(table))
    while True:
        rows, places = order(epoch), deque[range]()

        def chunks(
            rows: NDArray[np.unsignedinteger[Any]] = rows,
            places: deque[range] = places,
            skipped: int = skipped,
        ) -> Iterator[NDArray[np.int64]]:
            for place in _places(table, rows, skipped):
                places.append(place)
                yield rows[place.start : place.stop].astype(np.int64)

        for chunk in encoder.encode(chunks(), again=epoch > 0):
            place = places.popleft()
            chunk = without(chunk, held_out)
            if epoch == 0 and place.start >= report.rows:
                report.add(chunk)
            yield from by_row(chunk)[max(0, skipped - place.start) :]
        epoch, skipped = epoch + 1, 0


def _places(
    table: RowTable, rows: NDArray[np.unsignedinteger[Any]], skipped: int
) -> Iterator[range]:
    """Yield where in an epoch the chunks are, without those that end before a row."""
    for group in range(skipped // CHUNK_ROWS * CHUNK_ROWS, len(rows), CHUNK_ROWS):
        at = group
        for chunk in chunks_of(table, rows[group : group + CHUNK_ROWS].astype(np.int64)):
            if at + len(chunk) > skipped:
                yield range(at, at + len(chunk))
            at += len(chunk)


def stream_from(
    rows: Iterator[Row],
    pool: EncodingPool,
    seed: int,
    start: int,
    report: EncodingReport,
    *,
    buffer: int,
) -> Iterator[EncodedRow]:
    """Yield the rows of a stream, encoded, from one on, in an order that is shuffled within limits.

    Args:
        rows: The stream, from its beginning.
        pool: Encodes them.
        seed: Seed of the order.
        start: The number of the first row; those before are read, but not encoded.
        report: Gets the chunks that it has not got yet, each when its first row is taken.
        buffer: How many rows of the stream the next one is drawn from.
    """
    mixed = islice(_mixed(rows, seed, buffer), start // CHUNK_ROWS * CHUNK_ROWS, None)
    chunks = iter(lambda: list(islice(mixed, CHUNK_ROWS)), [])
    at = start // CHUNK_ROWS * CHUNK_ROWS
    for chunk in pool.imap(chunks):
        if at >= report.rows:
            report.add(chunk)
        yield from by_row(chunk)[max(0, start - at) :]
        at += CHUNK_ROWS


def _mixed(rows: Iterator[Row], seed: int, size: int) -> Iterator[Row]:
    """Yield each row in the place of one that is drawn from a buffer; at the end the rest."""
    generator = np.random.Generator(np.random.PCG64([seed, size]))
    held = list(islice(rows, size))
    for row in rows:
        at = int(generator.integers(len(held)))
        drawn, held[at] = held[at], row
        yield drawn
    for at in generator.permutation(len(held)).tolist():
        yield held[at]


def by_row(chunk: EncodedChunk) -> list[EncodedRow]:
    """Return each row of a chunk with its examples."""
    found = [EncodedRow(line, []) for line in chunk.lines]
    start = 0
    for at, length, prompt in zip(
        chunk.row.tolist(), chunk.lengths.tolist(), chunk.prompt_lengths.tolist(), strict=True
    ):
        part = slice(start, start + length)
        found[at].examples.append(Example(chunk.tokens[part], chunk.mask[part], prompt))
        start += length
    return found
