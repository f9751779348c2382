"""What passes through the layers together: micro-batches, or the documents of several in one row.

Attention aside, a layer does the same to every token, whatever example it is of. So where attention
can be kept within documents (model/documents.py), the examples of a step need not stay the
micro-batches they came as: they are laid one behind the other, without padding, into parts of a few
thousand tokens. A part has few possible shapes (`_ROUND`), so a pass over it can be recorded once
and played again.

Everything here happens on the host, before the GPU is asked for anything: a part goes over in one
copy, and its supervised positions are known by their number, so nothing has to wait.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.model.documents import Documents

# Rows of one length that is a multiple of this stay rows. A packed row is filled up to a multiple
# of twice as many tokens, or of an eighth of the power of two below its length: then steps of data
# of any lengths have a handful of shapes, for a few percent more tokens.
_ROUND = 64

# Tokens from which a larger part makes no product faster.
PART_TOKENS = 8192


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        input_ids: int64 [B, T], right padded.
        labels: int64 [B, T], already shifted; -100 where nothing is supervised.
        lengths: Tokens of each row before the padding; T of all, if not given.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Part:
    """Tokens that pass through the layers together, on the device.

    Attributes:
        ids: int64 [B, T].
        rows: int64 [S], the supervised positions, counted through all rows.
        targets: int64 [S], what they should predict.
        positions: int64 [1, T], the position of each token in its document.
        documents: How the only row is divided, or None if every row is a document.
        longest: No document has more tokens.
    """

    ids: Tensor
    rows: Tensor
    targets: Tensor
    positions: Tensor
    documents: Documents | None
    longest: int

    @property
    def shape(self) -> Hashable:
        """What is equal for parts that layers are called with in the same way."""
        starts = 0 if self.documents is None else len(self.documents.starts)
        return (*self.ids.shape, starts, self.longest)


def parts_of(batches: Sequence[Batch], device: str | torch.device, *, pack: bool) -> list[Part]:
    """Return the parts of an optimizer step.

    Args:
        batches: Its micro-batches, on any device.
        device: Where the parts go.
        pack: Whether documents may share a row, and micro-batches a part. Otherwise each
            micro-batch is a part, as it is.
    """
    if not pack:
        return [_as_it_is(batch, device) for batch in batches]
    rows = [row for batch in batches for row in _unpadded(batch)]
    groups: list[list[tuple[Tensor, Tensor]]] = [[]]
    tokens = 0
    for row in rows:
        if groups[-1] and tokens + len(row[0]) > PART_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += len(row[0])
    return [_joined(group, device) for group in groups]


def _unpadded(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    ids, labels = batch.input_ids.cpu(), batch.labels.cpu()
    lengths = batch.lengths or [ids.shape[1]] * len(ids)
    return [(i[:n], k[:n]) for i, k, n in zip(ids, labels, lengths, strict=True)]


def _as_it_is(batch: Batch, device: str | torch.device) -> Part:
    ids, labels = batch.input_ids, batch.labels
    positions = torch.arange(ids.shape[1], device=ids.device)
    return _sent(ids, labels.flatten(), positions, None, ids.shape[1], device)


def _joined(rows: Sequence[tuple[Tensor, Tensor]], device: str | torch.device) -> Part:
    lengths = [len(ids) for ids, _ in rows]
    longest = max(lengths)
    if longest == min(lengths) and longest % _ROUND == 0:
        ids, labels = (torch.stack(both) for both in zip(*rows, strict=True))
        return _sent(ids, labels.flatten(), torch.arange(longest), None, longest, device)
    tokens = sum(lengths)
    unit = max(2 * _ROUND, (1 << (tokens.bit_length() - 1)) // 8)
    filled = -(-tokens // unit) * unit
    fill = filled - tokens
    # What fills up is a document that predicts nothing.
    ids = torch.cat([*(ids for ids, _ in rows), torch.zeros(fill, dtype=torch.int64)])
    labels = torch.cat([*(labels for _, labels in rows), torch.full((fill,), -100)])
    positions = torch.cat([torch.arange(n) for n in (*lengths, fill)])
    ends = torch.tensor([*lengths, fill]).cumsum(0)
    # The last start is repeated, for empty documents, up to one of few possible numbers.
    starts = torch.full((_power_of_two(len(ends)) + 1,), filled)
    starts[0], starts[1 : len(ends) + 1] = 0, ends
    # Attention has programs for so many tokens of each; what there is not costs them nothing.
    longest, most = 2 * _ROUND, max(longest, fill)
    while longest < most:
        longest *= 4
    return _sent(ids[None], labels, positions, starts, longest, device)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _sent(
    ids: Tensor,
    labels: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    longest: int,
    device: str | torch.device,
) -> Part:
    """Return a part on the device, by one copy."""
    rows = (labels != -100).nonzero()[:, 0]
    pieces = [ids.flatten(), rows, labels[rows], positions]
    pieces += [] if starts is None else [starts]
    together = torch.cat(pieces).to(device, non_blocking=True)
    sent = torch.split(together, [len(piece) for piece in pieces])
    documents = None if starts is None else Documents(sent[4].int(), longest)
    return Part(sent[0].view(ids.shape), sent[1], sent[2], sent[3][None], documents, longest)
