"""Encodes rows in chunks, in any order, ahead of whoever needs them, and keeps them in the cache.

A chunk that the cache has is read from there. The others are encoded by processes
(`encoding_pool`), which are started when the first is needed; a few chunks are in work ahead of the
one that is taken, so memory is bounded, and a consumer that is slow does not wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset_report import Notes
from halfbyte.data.encoding import EncodedChunk, EncoderSpec, encode_chunk
from halfbyte.data.encoding_pool import EncodingPool, cores
from halfbyte.data.example_store import ExampleStore
from halfbyte.data.row_table import RowTable
from halfbyte.data.templates import Example
from halfbyte.errors import OutputError
from halfbyte.user_cache import cached_directory, trim
from halfbyte.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 256
"""Rows of a chunk, at most."""
CHUNK_BYTES = 1 << 20
"""Bytes of the rows of a chunk, unless it is one row."""
CACHE_LIMIT = 64 * 10**9
"""Bytes of all encoded data in the cache."""

_FORMAT = 2  # incremented when rows are encoded otherwise, or kept otherwise
_LARGE = 10**9  # bytes from which the user is told what is kept
_TRIM_EVERY = 1 << 28  # bytes
_LOOK_EVERY = 1.0  # seconds
_KIND = "encoded"
_VERSIONS = {"format", "versions"}
_CARD = "made_from.json"

logger = logging.getLogger("halfbyte")


def chunks_of(table: RowTable, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Divide rows into chunks, limited in rows and bytes."""
    for start in range(0, len(rows), CHUNK_ROWS):
        group = rows[start : start + CHUNK_ROWS]
        spans = table.job(group).spans
        ends = np.cumsum(spans[:, 1] - spans[:, 0])
        first = 0
        while first < len(group):
            before = int(ends[first - 1]) if first else 0
            stop = int(np.searchsorted(ends, before + CHUNK_BYTES, side="right"))
            stop = max(stop, first + 1)
            yield group[first:stop]
            first = stop


class RowEncoder:
    """Encodes the rows of a table. A context manager, at whose end no process is left.

    Attributes:
        key: What the encoded rows depend on, as a digest.
        identity: The same without versions: what has to be equal for the same rows and tokens.
        store: What is kept of them in the cache, or None.
        held: Chunks that are needed again soon, by the bytes of the numbers of their rows.
    """

    def __init__(
        self,
        table: RowTable,
        spec: EncoderSpec,
        *,
        keep: bool,
        in_process: bool = False,
        part: str | None = None,
    ) -> None:
        """Open the cache; nothing is encoded yet.

        Args:
            table: The rows.
            spec: How they are encoded.
            keep: Whether encoded rows are kept in the cache, and taken from there.
            in_process: Whether to encode in this process.
            part: Which part of the rows it is for, if others encode others of them. Parts are kept
                apart, since the cache knows a row in the chunk that has it last only.
        """
        self._table, self._spec = table, spec
        # A tokenizer that is not fast cannot be sent to another process.
        self._processes = 0 if in_process or not spec.tokenizer.is_fast else cores()
        self._pool: EncodingPool | None = None
        made_from = _made_from(table, spec) | ({} if part is None else {"part": part})
        self.key = _digest(made_from)
        self.identity = _digest({name: made_from[name] for name in made_from.keys() - _VERSIONS})
        self.store: ExampleStore | None = None
        self.held: dict[bytes, EncodedChunk] = {}
        self._looked = 0.0  # when it was looked whether the data has changed
        self.directory: Path | None = None
        if keep and spec.tokenizer.is_fast:
            self._open_store(made_from)

    def _open_store(self, made_from: dict[str, Any]) -> None:
        try:

            def make(new: Path) -> None:
                (new / _CARD).write_text(json.dumps(made_from))

            kept = cached_directory(_KIND, self.key[:32], make, limit=CACHE_LIMIT)
            if kept.note is not None:  # only a temporary directory could be had
                logger.warning("encoded data is not kept: %s", kept.note.partition(";")[0])
                return
            self.store = ExampleStore(kept.path, len(self._table))
            self.directory = kept.path
        except (OSError, OutputError) as error:
            logger.warning("encoded data is not kept: %s", error)

    def encode(
        self, chunks: Iterable[NDArray[np.int64]], *, again: bool = False
    ) -> Iterator[EncodedChunk]:
        """Yield chunks of rows encoded, in their order, each from the cache if it is there.

        Some are encoded ahead of the one that is taken.

        Args:
            chunks: The rows of each.
            again: The rows are in other chunks of the cache already: they are looked for one by
                one, nothing is added to the cache, and nothing is said about them.

        Raises:
            DataError: The data cannot be read, or not be encoded with this tokenizer.
            EncodingError: A process ended before its work was done.
        """
        waiting: deque[tuple[NDArray[np.int64], EncodedChunk | Future[EncodedChunk]]] = deque()
        ahead = 2 * self._processes
        for rows in chunks:
            found = self._collected(rows) if again else self._kept(rows)
            waiting.append((rows, found or self._submit(rows)))
            if len(waiting) > ahead:
                yield self._finished(*waiting.popleft(), keep=not again)
        while waiting:
            yield self._finished(*waiting.popleft(), keep=not again)

    def has(self, rows: NDArray[np.int64]) -> bool:
        """Whether a chunk is in the cache."""
        return self.store is not None and self.store.has(rows)

    def mapped(self, rows: NDArray[np.int64]) -> EncodedChunk | None:
        """Return a chunk that is in the cache, mapped into memory; None if it is not."""
        if self.store is None:
            return None
        return self.store.mapped_chunk(rows, self._table.lines(rows))

    def _kept(self, rows: NDArray[np.int64]) -> EncodedChunk | None:
        if (held := self.held.get(rows.tobytes())) is not None:
            return held
        return None if self.store is None else self.store.chunk(rows, self._table.lines(rows))

    def _collected(self, rows: NDArray[np.int64]) -> EncodedChunk | None:
        """Return rows that are in any chunks of the cache as a chunk; None if one is in none."""
        examples: list[Example] = []
        row: list[int] = []
        content: list[int] = []
        for at, number in enumerate(rows.tolist()):
            found = None if self.store is None else self.store.row(number)
            if found is None:
                return None
            examples += found.examples
            row += [at] * len(found.examples)
            content.append(found.content)
        return EncodedChunk(
            tokens=np.concatenate([np.empty(0, np.int32), *(one.tokens for one in examples)]),
            mask=np.concatenate([np.empty(0, np.bool_), *(one.labels_mask for one in examples)]),
            lengths=np.array([len(one.tokens) for one in examples], dtype=np.int32),
            prompt_lengths=np.array([one.prompt_length for one in examples], dtype=np.int32),
            row=np.array(row, dtype=np.int64),
            messages=np.zeros(len(examples), dtype=np.int32),
            lines=self._table.lines(rows),
            unread=[],
            rejected=[],
            formats={},
            unused={},
            truncated=[],
            split=[],
            longest=0,
            notes=Notes(),
            exceeded=0,
            content=np.array(content, dtype=np.uint64),
        )

    def _submit(self, rows: NDArray[np.int64]) -> Future[EncodedChunk]:
        if not self._processes:
            return _done(encode_chunk(self._spec, self._table.read(rows)))
        if self._pool is None:
            self._pool = EncodingPool(self._spec, self._processes)
        return self._pool.submit(self._table.job(rows))

    def _finished(
        self,
        rows: NDArray[np.int64],
        found: EncodedChunk | Future[EncodedChunk],
        *,
        keep: bool,
    ) -> EncodedChunk:
        if isinstance(found, EncodedChunk):
            return found
        chunk = found.result()
        if (now := time.monotonic()) - self._looked > _LOOK_EVERY:
            self._table.require_unchanged()
            self._looked = now
        if keep:
            self._keep(rows, chunk)
        return chunk

    def _keep(self, rows: NDArray[np.int64], chunk: EncodedChunk) -> None:
        store = self.store
        if store is None or not store.appends:
            return
        before = store.size
        try:
            store.append(rows, chunk)
        except OSError as error:
            store.stop_appending()
            reason = error.strerror or error
            logger.warning("no more encoded data is kept in %s: %s", self.directory, reason)
            return
        if before // _TRIM_EVERY < store.size // _TRIM_EVERY and not trim(_KIND, CACHE_LIMIT):
            store.stop_appending()
            logger.warning(
                "no more encoded data is kept in %s: the cache is full (%.0f GB), or the disk",
                self.directory,
                store.size / 1e9,
            )
        elif before < _LARGE <= store.size:
            logger.warning(
                "more than 1 GB of encoded data is kept in %s, for the next start; "
                "--no-cache-data keeps none",
                self.directory,
            )

    def close(self) -> None:
        """End the processes, and close the cache."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self.store is not None:
            self.store.close()
            self.store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _done(chunk: EncodedChunk) -> Future[EncodedChunk]:
    future: Future[EncodedChunk] = Future()
    future.set_result(chunk)
    return future


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _made_from(table: RowTable, spec: EncoderSpec) -> dict[str, Any]:
    """Return what the encoded rows depend on."""
    import transformers

    tokenizer = spec.tokenizer
    templates = json.dumps(tokenizer.chat_template, sort_keys=True)
    dated = "strftime_now" in templates
    return {
        "format": _FORMAT,
        "versions": [__version__, transformers.__version__],
        "rows": table.digest,
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": hashlib.sha256(templates.encode()).hexdigest(),
        "date": date.today().isoformat() if dated else None,
        "preferred": list(spec.preferred),
        "max_length": spec.max_length,
        "train_on": spec.train_on,
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer, without what a call changes in it."""
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {special}".encode())
    if tokenizer.is_fast:
        kept = json.loads(tokenizer.backend_tokenizer.to_str())
        kept.pop("truncation", None)
        kept.pop("padding", None)
        digest.update(json.dumps(kept, sort_keys=True).encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()
