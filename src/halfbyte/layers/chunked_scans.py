"""Recurrent states of packed documents: the gated delta rule and Mamba 2's scan, in chunks.

Both keep a state per head that decays and is written to by every token:

    gated delta rule    S_t = S_{t-1} e^{g_t} (1 − β_t k_t k_tᵀ) + β_t v_t k_tᵀ     o_t = S_t q_t
    Mamba 2             S_t = S_{t-1} e^{A Δ_t} + Δ_t x_t B_tᵀ                     y_t = S_t C_t

In the chunked form (Mamba 2: Dao and Gu 2024, arXiv:2405.21060; gated delta rule: Yang et al. 2024,
arXiv:2412.06464) what tokens of a chunk do to each other is a few matrix products over all chunks,
and only the state passes from one chunk to the next. Here every document starts a chunk, so no
chunk has tokens of two, and the first chunk of a document starts from an empty state. Chunks are
ordered by their place in their document:

    first chunks of all documents | second chunks of those that have one | …

The longest document comes first in each, so the states of step k are the first rows of those of
step k - 1, and the loop is as long as the longest document. Only the last chunk of a document is
padded.

transformers' own versions, which are the reference in tests, take no documents. Mamba 2's computes
C Bᵀ for each head, though all heads of a group share it; LAB.md has the times.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# Tokens of a chunk. Work within chunks grows with it, work between them shrinks.
CHUNK = 64


class Chunks:
    """The chunks of documents that share a row; see above for their order.

    Args:
        lengths: The tokens of each document, in order; none is empty.
        device: Where the indices are kept.

    Attributes:
        per_step: The number of chunks that are the k-th of their document, for each k.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        starts = list(accumulate(lengths, initial=0))
        longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        counts = [-(-lengths[i] // CHUNK) for i in longest_first]
        self.per_step = [sum(n > step for n in counts) for step in range(counts[0])]
        firsts = list(accumulate(self.per_step, initial=0))
        places = torch.empty(starts[-1], dtype=torch.int64)
        for rank, i in enumerate(longest_first):
            tokens = torch.arange(lengths[i])
            chunk = torch.tensor(firsts)[tokens // CHUNK] + rank
            places[starts[i] : starts[i + 1]] = chunk * CHUNK + tokens % CHUNK
        self._places = places.to(device)
        self._padded = firsts[-1] * CHUNK

    def split(self, x: Tensor) -> Tensor:
        """Return x [T, ...] as [chunks, CHUNK, ...], padded with zeros."""
        out = x.new_zeros(self._padded, *x.shape[1:]).index_copy(0, self._places, x)
        return out.view(-1, CHUNK, *x.shape[1:])

    def join(self, x: Tensor) -> Tensor:
        """Return x [chunks, CHUNK, ...] as [T, ...], without padding."""
        return x.flatten(0, 1).index_select(0, self._places)


@lru_cache(maxsize=8)
def chunks_of(lengths: tuple[int, ...], device: torch.device) -> Chunks:
    """Return the chunks of documents; all layers of a part ask for the same."""
    return Chunks(lengths, device)


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the decays within chunks, float32, for log_decay [chunks, H, CHUNK].

    Logarithms are summed in float64: where a chunk decays strongly, the difference of two float32
    sums has lost the digits that matter.

    Returns:
        from token j to token i >= j [chunks, H, CHUNK, CHUNK], 0 for the others
        from the start to each token [chunks, H, CHUNK]
        from each token to the end [chunks, H, CHUNK]
        over the chunk [chunks, H]
    """
    total = log_decay.double().cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=total.device).triu_(1)
    between = (total[..., :, None] - total[..., None, :]).to(log_decay.dtype)
    between = between.masked_fill(future, -torch.inf).exp()
    to_end = (total[..., -1:] - total).to(log_decay.dtype).exp()
    from_start = total.to(log_decay.dtype).exp()
    return between, from_start, to_end, from_start[..., -1]


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Return the output of the gated delta rule, computed in float32 (float64 for float64).

    Args:
        query: [T, K, D], as it is multiplied with the state.
        key: [T, K, D].
        value: [T, H, V]; head h belongs to head h // (H / K) of the keys.
        g: [T, H], the logarithm of the decay, not positive.
        beta: [T, H], how much of the state's answer to the key is replaced.
        lengths: The tokens of each document.

    Returns:
        [T, H, V].
    """
    chunks = chunks_of(lengths, query.device)
    heads, groups = value.shape[1], key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, log_decay, b = (
        chunks.split(x.to(wide)).transpose(1, 2) for x in (query, key, value, g, beta)
    )
    if groups != heads:
        q, k = (x.repeat_interleave(heads // groups, 1) for x in (q, k))
    between, from_start, to_end, over = _decays(log_decay)
    k_beta, v_beta = k * b[..., None], v * b[..., None]
    keys = k.transpose(-1, -2)
    # What each token of a chunk writes depends on the tokens before it: a triangular system.
    system = (k_beta @ keys) * between
    right = torch.cat([v_beta, k_beta * from_start[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    attention = (q @ keys) * between
    of_steps = (
        torch.split(x, chunks.per_step)
        for x in (
            written,
            read,
            attention,
            q * from_start[..., None],
            (k * to_end[..., None]).transpose(-1, -2),
            over[..., None, None],
        )
    )
    state, outs = None, []
    for new, stale, weights, reading, writing, decay in zip(*of_steps, strict=True):
        if state is None:
            outs.append(weights @ new)
            state = writing @ new
            continue
        state = state[: len(new)]
        new = new - stale @ state
        outs.append(reading @ state + weights @ new)
        state = state * decay + writing @ new
    return chunks.join(torch.cat(outs).transpose(1, 2))


def mamba2_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Return the output of Mamba 2's scan, computed in float32 (float64 for float64).

    Args:
        x: [T, H, P].
        dt: [T, H], the step sizes Δ.
        a: [H], negative.
        b: [T, G, N], what x is written along; head h belongs to group h // (H / G).
        c: [T, G, N], what is read.
        lengths: The tokens of each document.

    Returns:
        [T, H, P], without the skip connection D x.
    """
    chunks = chunks_of(lengths, x.device)
    heads, width = x.shape[1:]
    groups = b.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    x = chunks.split(x.to(wide) * dt[..., None]).transpose(1, 2)  # [chunks, H, CHUNK, P]
    b, c = (chunks.split(y.to(wide)).transpose(1, 2) for y in (b, c))  # [chunks, G, CHUNK, N]
    log_decay = chunks.split(a.to(wide) * dt).transpose(1, 2)
    between, from_start, to_end, over = _decays(log_decay)
    # The heads of a group share C Bᵀ, B and C, so they are the rows of one product.
    weights = (c @ b.transpose(-1, -2))[:, :, None] * between.view(len(x), groups, -1, CHUNK, CHUNK)
    within = weights.flatten(1, 2) @ x
    ends = (x * to_end[..., None]).transpose(-1, -2).reshape(len(x), groups, -1, CHUNK) @ b
    state, starts = None, []
    decays = over.view(len(x), groups, -1).repeat_interleave(width, 2)[..., None]
    of_steps = (torch.split(y, chunks.per_step) for y in (ends, decays))
    for new, decay in zip(*of_steps, strict=True):
        state = torch.zeros_like(new) if state is None else state[: len(new)]
        starts.append(state)
        state = state * decay + new
    before = c @ torch.cat(starts).transpose(-1, -2)  # [chunks, G, CHUNK, H / G · P]
    before = before.view(len(x), groups, CHUNK, -1, width).transpose(2, 3)
    before = before.reshape(len(x), heads, CHUNK, width)
    return chunks.join((within + before * from_start[..., None]).transpose(1, 2))
