"""Attention over long sequences: the fastest kernel for each document, and a backward in place.

torch's variable-length attention, which takes packed documents in one call, is FlashAttention-2.
cuDNN's is faster on Hopper, but takes one document at a time. So where the host knows their
lengths, a long document is a call of its own, and the short ones between two of them are a call
together (`pieces_of`). On an H200 with 32 heads of 128, 8 of keys and values, causal, in TFLOP/s
forward and backward (2026-11-30_gpu_attention.json):

    tokens   FlashAttention-2   cuDNN by torch   cuDNN by its frontend's wheel
    16,384   339, 306           630, 559         636, 533
    65,536   352, 325           616, 547         618, 548

cuDNN prepares itself for each length it has not seen, so a document is taken with the tokens after
it up to a rounded length (`_rounded`): they are later positions, which its tokens do not see, and
as the gradient of their outputs is 0 in this call, they add nothing to any gradient.

Backward takes a few heads at a time, enough to keep the GPU busy. The kernels sum the gradient of
queries in float32, and give those of keys and values for each head of the queries: 32 kB a token
for all heads at once, which are now of constant size. The gradients overwrite q, k and v, which
nothing else reads (layers/tiled_layer.py).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.layers.attention import Documents, attend, copy_heads
from halfbyte.runtime import device as devices

# Documents of fewer tokens are computed together.
SHORT = 2048
# Tokens times heads of queries of one call of backward: 2048 blocks of 128 queries.
GROUP = 1 << 18


class Piece(NamedTuple):
    """Tokens that are computed in one call.

    Attributes:
        start: The first token.
        stop: After the last.
        documents: (first, last + 1) of several documents, or None for one.
        filled: After the last token that a call for one document is given.
    """

    start: int
    stop: int
    documents: tuple[int, int] | None
    filled: int


class Kernels(Protocol):
    """Causal attention of one document; q [1, T, H, D], k and v [1, T, G, D]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output [1, T, H, D] and its log-sum-exp, float32 [1, H, T]."""

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, of their shapes."""


class _CuDNN:
    """cuDNN's kernels, through torch."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False, scale=scale
        )
        return found[0].transpose(1, 2), found[1].reshape(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, q, k, v, out = (x.transpose(1, 2) for x in (dy, q, k, v, out))
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout: not read
        n = q.shape[2]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(dy, q, k, v, out, lse[..., None].contiguous(), none, none),
            *(None, None, None, n, n, 0.0, True),
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class _Flash:
    """FlashAttention-2, through torch."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        n = q.shape[1]
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, n, n, 0.0, True, False, scale=scale
        )
        return out, lse

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, none = q.shape[1], torch.zeros(2, dtype=torch.uint64, device=q.device)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            *(dy, q, k, v, out, lse.contiguous(), None, None, n, n, 0.0, True, none, none),
            scale=scale,
        )
        return found


class _Reference:
    """The formulas, in the dtype of the tensors and with all weights of a head: for tests."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, scale)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse[..., None])
        return torch.einsum("bhts,bshd->bthd", weights, self._of_heads(v, q)), lse

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = torch.exp(self._scores(q, k, scale) - lse[..., None])
        delta = (dy * out).sum(-1).transpose(1, 2)
        d_weights = torch.einsum("bthd,bshd->bhts", dy, self._of_heads(v, q))
        d_scores = scale * weights * (d_weights - delta[..., None])
        dq = torch.einsum("bhts,bshd->bthd", d_scores, self._of_heads(k, q))
        dk = torch.einsum("bhts,bthd->bshd", d_scores, q)
        dv = torch.einsum("bhts,bthd->bshd", weights, dy)
        grouped = *k.shape[:3], -1, k.shape[3]
        return dq, dk.view(grouped).sum(3), dv.view(grouped).sum(3)

    def _of_heads(self, x: Tensor, q: Tensor) -> Tensor:
        return x.repeat_interleave(q.shape[2] // x.shape[2], 2)

    def _scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        unseen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu_(1)
        scores = scale * torch.einsum("bthd,bshd->bhts", q, self._of_heads(k, q))
        return scores.masked_fill(unseen, -torch.inf)


REFERENCE = _Reference()


def attend_long(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    """Return `attend` of the arguments; backward overwrites q, k and v on a GPU, and runs once."""
    kernels = None if not q.is_cuda else kernels_of(q.device, q.dtype, q.shape[-1])
    known = documents is None or bool(documents.lengths)
    if kernels is None or not known or q.shape[0] != 1:
        return attend(q, k, v, documents, scale)
    return _LongAttention.apply(q, k, v, documents, scale, kernels).flatten(2)  # type: ignore[no-any-return, no-untyped-call]


@cache
def kernels_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels | None:
    """Return the fastest exact kernels of a GPU for heads of this width, or None: torch's choice.

    cuDNN's from Hopper on, if they compute a small case as the formulas say (a build of torch may
    lack them, and a version of cuDNN may refuse the shape); otherwise flash attention.
    """
    spec = devices.spec_of(device)
    sixteen = dtype in (torch.bfloat16, torch.float16)
    if not sixteen or head_dim % 8 or not spec.runs_flash_attention(head_dim):
        return None
    candidates: list[Kernels] = [_CuDNN()] if spec.is_hopper else []
    return next(
        (each for each in [*candidates, _Flash()] if _works(each, device, dtype, head_dim)), None
    )


def name_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of what `attend_long` uses, for the user."""
    kernels = kernels_of(device, dtype, head_dim)
    names = {_CuDNN: "cuDNN", _Flash: "FlashAttention-2"}
    return "torch's choice" if kernels is None else names[type(kernels)]


def _works(kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether kernels agree with the formulas on 256 tokens, to 3 % of the largest value."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (4, 2, 2, 4)
    given = [
        torch.randn(1, 256, heads, head_dim, generator=generator, device=device).to(dtype)
        for heads in sizes
    ]
    scale = head_dim**-0.5

    def results(kernels: Kernels, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v, dy = inputs
        out, lse = kernels.forward(q, k, v, scale)
        return [out, lse, *kernels.backward(dy, q, k, v, out, lse, scale)]

    wanted = results(REFERENCE, [x.float() for x in given])
    try:
        found = results(kernels, given)
    except (RuntimeError, TypeError):  # this build or card does not have them
        return False
    return all(
        bool((a.float() - b).abs().max() <= 0.03 * b.abs().max())
        for a, b in zip(found, wanted, strict=True)
    )


def _rounded(tokens: int) -> int:
    """Return the length that a document is computed with: a multiple of a 16th to a 32nd of it."""
    unit = max(128, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // unit) * unit


def pieces_of(lengths: Sequence[int], tokens: int, short: int | None = None) -> list[Piece]:
    """Return the calls for documents of these lengths, one after the other in a row of ``tokens``.

    Args:
        lengths: Tokens of each document, which fill the row.
        tokens: Tokens of the row.
        short: Documents of fewer tokens are computed together; `SHORT` by default.
    """
    short = SHORT if short is None else short
    pieces: list[Piece] = []
    start = 0
    for i, n in enumerate(lengths):
        stop = start + n
        if n >= short:
            pieces.append(Piece(start, stop, None, min(start + _rounded(n), tokens)))
        elif n and pieces and pieces[-1].documents and pieces[-1].stop == start:
            first = pieces[-1].documents[0]
            pieces[-1] = Piece(pieces[-1].start, stop, (first, i + 1), stop)
        elif n:
            pieces.append(Piece(start, stop, (i, i + 1), stop))
        start = stop
    return pieces


def head_groups(tokens: int, heads: int, groups: int) -> list[tuple[slice, slice]]:
    """Return the heads of queries, and those of keys, of each call of backward."""
    each = heads // groups
    size = next(
        (n for n in range(1, groups + 1) if groups % n == 0 and tokens * n * each >= GROUP), groups
    )
    return [
        (slice(each * first, each * (first + size)), slice(first, first + size))
        for first in range(0, groups, size)
    ]


class _Several:
    """Attention of several short documents, q [1, T, H, D]: torch's variable-length kernel."""

    def __init__(self, documents: Documents, piece: Piece) -> None:
        assert piece.documents is not None
        first, last = piece.documents
        starts = documents.cu_seqlens[first : last + 1]
        self.starts = starts - starts[0]
        self.longest = max(documents.lengths[first:last])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q[0], k[0], v[0], self.starts, self.starts, self.longest, self.longest),
            *(0.0, True, False),
            scale=scale,
        )
        return out[None], lse[None]

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(dy[0], q[0], k[0], v[0], out[0], lse[0].contiguous(), self.starts, self.starts),
            *(self.longest, self.longest, 0.0, True, none, none),
            scale=scale,
        )
        return dq[None], dk[None], dv[None]


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None,
        scale: float,
        kernels: Kernels,
    ) -> Tensor:
        tokens = q.shape[1]
        lengths = (tokens,) if documents is None else documents.lengths
        pieces = pieces_of(lengths, tokens)
        ctx.scale, ctx.pieces = scale, pieces
        ctx.kernels = [
            kernels if piece.documents is None or documents is None else _Several(documents, piece)
            for piece in pieces
        ]
        whole = len(pieces) == 1 and pieces[0].filled == tokens
        out = q.new_empty(0) if whole else torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums: list[Tensor] = []
        for piece, each in zip(pieces, ctx.kernels, strict=True):
            given = (x[:, piece.start : piece.filled] for x in (q, k, v))
            found, lse = each.forward(*given, scale)
            if whole:
                out = found.contiguous()
            else:
                n = piece.stop - piece.start
                out[:, piece.start : piece.stop] = found[:, :n]
            sums.append(lse)
            del found
        # One tensor, which an attention checkpoint takes along.
        ctx.sizes = [lse.shape[2] for lse in sums]
        lse = sums[0].contiguous() if len(sums) == 1 else torch.cat(sums, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = (x.detach() for x in ctx.saved_tensors)
        dy = grads[0]
        first = 0
        # In this order: a call reads tokens after its own, which are not overwritten yet.
        for piece, kernels, size in zip(ctx.pieces, ctx.kernels, ctx.sizes, strict=True):
            own, filled = slice(piece.start, piece.stop), slice(piece.start, piece.filled)
            n, own_lse = piece.stop - piece.start, lse[:, :, first : first + size]
            first += size
            for of_q, of_k in head_groups(size, q.shape[2], k.shape[2]):
                d_out = dy[:, filled, of_q]
                if piece.filled > piece.stop:
                    d_out = torch.cat([d_out[:, :n], torch.zeros_like(d_out[:, n:])], 1)
                found = kernels.backward(
                    d_out,
                    q[:, filled, of_q],
                    k[:, filled, of_k],
                    v[:, filled, of_k],
                    out[:, filled, of_q],
                    own_lse[:, of_q],
                    ctx.scale,
                )
                for place, heads, new in zip((q, k, v), (of_q, of_k, of_k), found, strict=True):
                    copy_heads(place[:, own, heads], new[:, :n])
                del found, d_out, new
        return q, k, v, None, None, None
