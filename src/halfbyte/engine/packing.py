"""Batches for the layers: micro-batches, or documents of several packed into one row.

Except for attention, a layer treats every token alike, whatever its example. So if attention can be
restricted to documents (layers/attention.py), the examples of a step are not tied to their
micro-batches: they are packed, without padding, into parts of a few thousand tokens and few shapes
(engine/buckets.py).

All of this runs on the host, before any GPU work: a part is transferred in one copy, and its
supervised positions are passed as indices, so nothing synchronises with the GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.engine.buckets import Buckets, PartShape, UnpaddedParts, divide, fillers, own_shape
from halfbyte.layers.attention import Documents

# Alignment of the tensors of a part in elements: kernels are specialised for pointers that are a
# multiple of 16 bytes.
_ALIGNED = 16


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        input_ids: int64 [B, T], right padded.
        labels: int64 [B, T], already shifted; -100 for unsupervised positions.
        lengths: Tokens of each row without padding; T for all by default.
        documents: The index of each row in the step (rows of all micro-batches concatenated), if
            that has more rows than these micro-batches (engine/dealing.py).
        number: Its own index in the step, likewise.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Sequence[int] | None = None
    documents: Sequence[int] | None = None
    number: int | None = None


class Span(NamedTuple):
    """Where a document is among the tokens of a part.

    Attributes:
        document: Its row index in the step (rows of all micro-batches concatenated).
        start: Index of its first token in the flattened rows.
        tokens: Its tokens, without padding.
    """

    document: int
    start: int
    tokens: int


@dataclass(frozen=True)
class PackedBatch:
    """Tokens that pass through the layers together, on the device.

    Attributes:
        ids: int64 [B, T].
        rows: int64 [S], the supervised positions, as indices into the flattened rows.
        targets: int64 [S], the tokens they should predict.
        positions: int64 [1, T], the position of each token in its document.
        documents: The documents packed into the only row, or None if every row is a document.
        max_seqlen: Upper bound on the tokens of a document.
        lengths: The tokens of each document in the only row; none if every row is a document.
        segments: int64 [S], if requested: the document of each supervised position, as its row
            index in the step (rows of all micro-batches concatenated).
        spans: Where the documents of a step are; none in a part that is not of a step.
        number: The index of the micro-batch in the step, as in `Batch`.
    """

    ids: Tensor
    rows: Tensor
    targets: Tensor
    positions: Tensor
    documents: Documents | None
    max_seqlen: int
    lengths: Sequence[int] = ()
    segments: Tensor | None = None
    spans: Sequence[Span] = ()
    number: int | None = None

    @property
    def shape(self) -> PartShape:
        """The shape that decides how layers are called."""
        documents = 0 if self.documents is None else len(self.documents.cu_seqlens) - 1
        rows, tokens = self.ids.shape
        return PartShape(rows, tokens, documents, self.max_seqlen)


def lengths_of(batches: Sequence[Batch]) -> list[int]:
    """Return the tokens of each example of a step."""
    return [n for b in batches for n in b.lengths or [b.input_ids.shape[1]] * len(b.input_ids)]


def with_first_row(batches: Sequence[Batch]) -> Iterator[tuple[Batch, int]]:
    """Yield each micro-batch with the index of its first row in the step."""
    first = 0
    for batch in batches:
        yield batch, first
        first += len(batch.input_ids)


def spans_of(batch: Batch, first: int) -> list[Span]:
    """Return where the rows of a micro-batch are, whose first has index ``first`` in the step."""
    rows, tokens = batch.input_ids.shape
    lengths = batch.lengths or [tokens] * rows
    documents = batch.documents or range(first, first + rows)
    return [
        Span(document, i * tokens, int(n))
        for i, (document, n) in enumerate(zip(documents, lengths, strict=True))
    ]


def parts_of(
    batches: Sequence[Batch],
    device: str | torch.device,
    *,
    pack: bool,
    buckets: Buckets | UnpaddedParts | None = None,
    segments: bool = False,
) -> list[PackedBatch]:
    """Return the parts of an optimizer step.

    Args:
        batches: Its micro-batches, on any device.
        device: Device of the parts.
        pack: Whether documents may share a row, and micro-batches a part. Otherwise each
            micro-batch is a part, unchanged.
        buckets: The allowed shapes of parts; by default each part has its own.
        segments: Whether parts have `PackedBatch.segments`.
    """
    if not pack:
        return [
            replace(
                _as_it_is(batch, device, first if segments else None),
                spans=spans_of(batch, first),
                number=batch.number,
            )
            for batch, first in with_first_row(batches)
        ]
    rows = [row for batch in batches for row in _unpadded(batch)]
    found = []
    documents = [one.document for each in with_first_row(batches) for one in spans_of(*each)]
    lengths = [len(ids) for ids, _ in rows]
    divided: Sequence[Sequence[int]]
    numbered = batches[0].number is not None
    if numbered:  # they are dealt out as they are (engine/dealing.py)
        divided = [
            range(first, first + len(batch.input_ids)) for batch, first in with_first_row(batches)
        ]
    else:
        divided = divide(lengths) if buckets is None else buckets.divide(lengths)
    for place, numbers in enumerate(divided):
        part = [rows[number] for number in numbers]
        own = [lengths[number] for number in numbers]
        shape = own_shape(own) if buckets is None else buckets.fit(own)
        made = _packed(part, shape, device, numbers if segments else None)
        starts = accumulate(own, initial=0)
        own_documents = [documents[number] for number in numbers]
        spans = [*map(Span, own_documents, starts, own)]
        found.append(replace(made, spans=spans, number=batches[place].number if numbered else None))
    return found


def tiles_of_loss(part: PackedBatch, size: int) -> Iterator[PackedBatch]:
    """Yield the part with ``size`` of its supervised positions at a time; at least once."""
    segments = part.segments
    for start in range(0, max(1, len(part.rows)), size):
        tile = slice(start, start + size)
        yield replace(
            part,
            rows=part.rows[tile],
            targets=part.targets[tile],
            segments=None if segments is None else segments[tile],
        )


def part_of_shape(shape: PartShape, device: str | torch.device, supervised: int = 0) -> PackedBatch:
    """Return a part of this shape that contains only token 0, with ``supervised`` positions."""
    if not shape.documents:
        row = torch.zeros(shape.tokens, dtype=torch.int64)
        rows = [(row, torch.full_like(row, -100)) for _ in range(shape.rows)]
    else:
        lengths = fillers(shape.tokens, shape.max_seqlen)
        zeros = [torch.zeros(n, dtype=torch.int64) for n in lengths]
        rows = [(row, torch.full_like(row, -100)) for row in zeros]
    labels = torch.cat([labels for _, labels in rows])
    labels[:supervised] = 0
    rows = [
        (ids, own)
        for (ids, _), own in zip(rows, torch.split(labels, [len(i) for i, _ in rows]), strict=True)
    ]
    return _packed(rows, shape, device)


def _unpadded(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    ids, labels = batch.input_ids.cpu(), batch.labels.cpu()
    lengths = batch.lengths or [ids.shape[1]] * len(ids)
    return [(i[:n], k[:n]) for i, k, n in zip(ids, labels, lengths, strict=True)]


def _as_it_is(batch: Batch, device: str | torch.device, first: int | None) -> PackedBatch:
    ids, labels = batch.input_ids, batch.labels
    count, tokens = ids.shape
    positions, owners = torch.arange(tokens, device=ids.device), None
    if first is not None:
        owners = torch.arange(first, first + count, device=ids.device).repeat_interleave(tokens)
    return _sent(ids, labels.flatten(), positions, None, owners, tokens, device)


def _packed(
    rows: Sequence[tuple[Tensor, Tensor]],
    shape: PartShape,
    device: str | torch.device,
    numbers: Sequence[int] | None = None,
) -> PackedBatch:
    lengths = [len(ids) for ids, _ in rows]
    owners = None
    if numbers is not None:
        owners = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
    if not shape.documents:
        ids, labels = (torch.stack(both) for both in zip(*rows, strict=True))
        positions = torch.arange(shape.max_seqlen)
        return _sent(ids, labels.flatten(), positions, None, owners, shape.max_seqlen, device)
    fill = shape.tokens - sum(lengths)
    # Padding consists of documents without supervised positions.
    ids = torch.cat([*(ids for ids, _ in rows), torch.zeros(fill, dtype=torch.int64)])
    labels = torch.cat([*(labels for _, labels in rows), torch.full((fill,), -100)])
    lengths += fillers(fill, shape.max_seqlen)
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0)
    # The last start is repeated, for empty documents.
    cu_seqlens = torch.full((shape.documents + 1,), shape.tokens)
    cu_seqlens[0], cu_seqlens[1 : len(ends) + 1] = 0, ends
    made = _sent(ids[None], labels, positions, cu_seqlens, owners, shape.max_seqlen, device)
    return replace(made, lengths=lengths)


def _sent(
    ids: Tensor,
    labels: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor | None,
    owners: Tensor | None,
    max_seqlen: int,
    device: str | torch.device,
) -> PackedBatch:
    """Return a part on the device, transferred in one copy; ``owners``: document of each token."""
    rows = (labels != -100).nonzero()[:, 0]
    pieces = {"ids": ids.flatten(), "rows": rows, "targets": labels[rows], "positions": positions}
    if cu_seqlens is not None:
        pieces["cu_seqlens"] = cu_seqlens
    if owners is not None:
        pieces["segments"] = owners[rows]
    sizes = [-(-len(piece) // _ALIGNED) * _ALIGNED for piece in pieces.values()]
    pinned = ids.device.type == "cpu" and torch.device(device).type == "cuda"
    together = torch.zeros(sum(sizes), dtype=torch.int64, device=ids.device, pin_memory=pinned)
    for place, piece in zip(torch.split(together, sizes), pieces.values(), strict=True):
        place[: len(piece)] = piece
    whole = torch.split(together.to(device, non_blocking=True), sizes)
    sent = {name: place[: len(pieces[name])] for name, place in zip(pieces, whole, strict=True)}
    documents = None
    if cu_seqlens is not None:
        documents = Documents(sent["cu_seqlens"].int(), max_seqlen)
    return PackedBatch(
        sent["ids"].view(ids.shape),
        sent["rows"],
        sent["targets"],
        sent["positions"][None],
        documents,
        max_seqlen,
        segments=sent.get("segments"),
    )
