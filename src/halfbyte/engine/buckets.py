"""Buckets: the few shapes of parts in which a run's tokens pass through the layers.

The documents of a step are packed into parts of about `PART_TOKENS` tokens, each padded to one of a
few sizes. The sizes are chosen before the first step from the lengths of the data, so every kernel
can be compiled and every CUDA graph captured ahead, and no step has a new shape. The maximum number
of documents and their maximum length are the same for all sizes: attention skips unused ones.

More sizes reduce padding, but each costs the capture of a graph. The sizes that minimise

    Σ over parts of (size − tokens)  +  price · number of sizes

are found exactly (`_sizes`, dynamic programming over the sorted token counts).

On a CPU nothing is compiled ahead, and parts are as long as their documents (`UnpaddedParts`).

A product of m rows is computed in tiles, one per streaming multiprocessor (SM) at a time, so its
time is a step function of m. For a 7B model on an H200 a step is 1024 rows: 3072 tokens take a
layer 6.6 ms, 3328 take 7.5 (gpu_part_sizes.json). So if a training step is divided, all parts but
the last are filled to such a multiple (`divide`).

If all parts of a run consist of rows of one length, as in a benchmark, they are not packed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.plan.ledger import CPU_PART_TOKENS, PART_TOKENS

# Sizes are multiples of this, so that strides have one alignment; rows whose length is a multiple
# of half of it need not be packed.
ROUND = 128
MOST_SIZES = 16

# Tokens that an additional size must save in a run, times the width of the model: capturing a graph
# takes 0.3 s whatever the width, in which an H200 trains 5400 tokens of width 4096.
PRICE = 2.2e7


class PartShape(NamedTuple):
    """The shape of a part, which decides how layers are called.

    Attributes:
        rows: Rows of the batch; 1 if documents are packed.
        tokens: Tokens of a row.
        documents: Maximum number of documents in a packed row; 0 if rows are documents.
        max_seqlen: Upper bound on the tokens of a document.
    """

    rows: int
    tokens: int
    documents: int
    max_seqlen: int

    @property
    def numel(self) -> int:
        """Tokens of a part."""
        return self.rows * self.tokens


def wave_tokens(width: int, num_sms: int) -> int:
    """Return the rows of a product [rows, width] whose tiles fill the GPU once; 0 if none do.

    Args:
        width: Columns of the product.
        num_sms: Number of SMs of the GPU; each computes a tile of 128 x 256 at a time.
    """
    return num_sms // -(-width // 256) * 128


def divide(
    lengths: Sequence[int], part_tokens: int | None = None, wave: int = 0
) -> list[list[int]]:
    """Return the documents of a step, by index, divided into parts of about ``part_tokens``.

    There are as few parts as possible, of similar size: starting with the longest, each document
    goes to the part with the fewest tokens so far. If parts can hold two multiples of ``wave``
    tokens, all but the last are filled to a multiple as closely as possible.
    """
    most = part_tokens or PART_TOKENS
    count = min(len(lengths), -(-sum(lengths) // most))
    if count == 1:
        return [list(range(len(lengths)))]
    if 0 < 2 * wave <= most:
        return _divide_at_waves(lengths, most, wave, count)
    parts: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = tokens.index(min(tokens))
        parts[part].append(number)
        tokens[part] += lengths[number]
    return [sorted(part) for part in parts if part]


def _divide_at_waves(lengths: Sequence[int], most: int, wave: int, count: int) -> list[list[int]]:
    parts, rest = list[list[int]](), list(range(len(lengths)))
    for left in range(count, 1, -1):
        if not rest:  # a document longer than a part took the place of several
            break
        tokens = sum(lengths[i] for i in rest)
        even = -(-tokens // (left * wave)) * wave
        # The remainder must fit into the other parts.
        aim = max(min(even, most // wave * wave), min(most, tokens - (left - 1) * most))
        part = _fullest([lengths[i] for i in rest], aim)
        parts.append([rest[i] for i in sorted(part)])
        rest = [number for i, number in enumerate(rest) if i not in part]
    return [part for part in (*parts, rest) if part]


def _fullest(lengths: Sequence[int], most: int) -> set[int]:
    """Return the indices of the lengths whose sum is closest to ``most`` from below.

    Subset sum, with the reachable sums as bits of an integer. If every length exceeds ``most``, it
    is the first.
    """
    reached = [1]
    for n in lengths:
        reached.append((reached[-1] | reached[-1] << n) & ((1 << (most + 1)) - 1))
    total, chosen = reached[-1].bit_length() - 1, set[int]()
    for i in reversed(range(len(lengths))):
        if not reached[i] >> total & 1:
            chosen.add(i)
            total -= lengths[i]
    return chosen or {0}


def as_rows(lengths: Sequence[int]) -> PartShape | None:
    """Return the shape of documents that need not be packed, or None."""
    if len(set(lengths)) == 1 and lengths[0] % (ROUND // 2) == 0:
        return PartShape(len(lengths), lengths[0], 0, lengths[0])
    return None


@dataclass(frozen=True)
class Buckets:
    """The shapes of a run's parts.

    Attributes:
        shapes: All of them, the largest first.
        part_tokens: Size in tokens at which parts are divided.
        wave: See `divide`.
    """

    shapes: tuple[PartShape, ...]
    part_tokens: int = PART_TOKENS
    wave: int = 0

    @classmethod
    def of(
        cls,
        steps: Sequence[Sequence[int]],
        width: int,
        part_tokens: int | None = None,
        *,
        num_sms: int = 0,
    ) -> "Buckets":
        """Choose the shapes for a run.

        Args:
            steps: The lengths of each step's documents, in tokens.
            width: Width of the residual stream, which determines the price of a size.
            part_tokens: Approximate tokens of a part; `PART_TOKENS` by default.
            num_sms: Number of SMs of the GPU; 0 to ignore it.
        """
        most, wave = part_tokens or PART_TOKENS, wave_tokens(width, num_sms)
        parts = [[step[i] for i in part] for step in steps for part in divide(step, most, wave)]
        rows = {as_rows(part) for part in parts}
        if None not in rows and len(rows) <= 2:
            found = sorted((r for r in rows if r is not None), key=lambda r: -r.numel)
            return cls(tuple(found), most, wave)
        tokens = Counter(_rounded(sum(part)) for part in parts)
        sizes = _sizes(tokens, PRICE / max(1, width))
        max_seqlen = _max_seqlen(max(map(max, parts)))
        # Padding consists of documents as well.
        gaps = [next(n for n in sizes if n >= sum(part)) - sum(part) for part in parts]
        counts = [
            len(p) + len(fillers(gap, max_seqlen)) for p, gap in zip(parts, gaps, strict=True)
        ]
        documents = _power_of_two(max(counts))
        return cls(tuple(PartShape(1, n, documents, max_seqlen) for n in sizes[::-1]), most, wave)

    @property
    def largest(self) -> PartShape:
        """The shape with most tokens."""
        return self.shapes[0]

    @property
    def smallest(self) -> PartShape:
        """The shape with fewest tokens."""
        return self.shapes[-1]

    def divide(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the documents of a step, by index, for each part."""
        return divide(lengths, self.part_tokens, self.wave)

    def fit(self, lengths: Sequence[int]) -> PartShape:
        """Return the shape for a part of these documents.

        A part larger than all shapes, which no step of the run has, gets its own.
        """
        rows = as_rows(lengths)
        if rows is not None and rows in self.shapes:
            return rows
        return next((s for s in reversed(self.shapes) if _fits(lengths, s)), own_shape(lengths))


@dataclass(frozen=True)
class UnpaddedParts:
    """The shapes of parts on a CPU: each is as long as its documents together.

    Nothing is compiled ahead there, so a shape costs nothing, and padding would.

    Attributes:
        part_tokens: Approximate tokens of a part.
        window: Longest document that is packed, or None for any; a longer one is a part.
    """

    part_tokens: int = CPU_PART_TOKENS
    window: int | None = None

    def divide(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the documents of a step, by index, divided into parts."""
        if len(set(lengths)) == 1:
            # Rows without padding, each as long as it was.
            size = max(1, self.part_tokens // lengths[0])
            return [
                list(range(first, min(first + size, len(lengths))))
                for first in range(0, len(lengths), size)
            ]
        packed = [i for i, n in enumerate(lengths) if self.window is None or n <= self.window]
        alone = sorted(set(range(len(lengths))).difference(packed))
        parts = divide([lengths[i] for i in packed], self.part_tokens) if packed else []
        return [[i] for i in alone] + [[packed[i] for i in part] for part in parts]

    def shapes(self, lengths: Sequence[int]) -> list[PartShape]:
        """Return the shapes of the parts of a step."""
        return [self.fit([lengths[i] for i in part]) for part in self.divide(lengths)]

    def fit(self, lengths: Sequence[int]) -> PartShape:
        """Return the shape for a part of these documents."""
        if len(set(lengths)) == 1:
            return PartShape(len(lengths), lengths[0], 0, lengths[0])
        return PartShape(1, sum(lengths), len(lengths), max(lengths))


def own_shape(lengths: Sequence[int]) -> PartShape:
    """Return the shape of a single part, outside of a run.

    Packed rows are padded to an eighth of the power of two below their length, which limits the
    number of shapes.
    """
    rows = as_rows(lengths)
    if rows is not None:
        return rows
    tokens = sum(lengths)
    unit = max(ROUND, (1 << (tokens.bit_length() - 1)) // 8)
    filled = -(-tokens // unit) * unit
    max_seqlen = _max_seqlen(max(lengths))
    documents = len(lengths) + len(fillers(filled - tokens, max_seqlen))
    return PartShape(1, filled, _power_of_two(documents), max_seqlen)


def _fits(lengths: Sequence[int], shape: PartShape) -> bool:
    """Whether the documents and the padding documents fit a part of this shape."""
    if not shape.documents or max(lengths) > shape.max_seqlen or sum(lengths) > shape.tokens:
        return False
    return (
        len(lengths) + len(fillers(shape.tokens - sum(lengths), shape.max_seqlen))
        <= shape.documents
    )


def fillers(tokens: int, max_seqlen: int) -> list[int]:
    """Return the lengths of the documents that pad a part, at most ``max_seqlen`` each."""
    whole, rest = divmod(tokens, max_seqlen)
    return [max_seqlen] * whole + [rest] * (rest > 0)


def _rounded(tokens: int) -> int:
    # Coarser for very long parts: the search is quadratic in the number of counts.
    unit = max(ROUND, _power_of_two(tokens) // 64)
    return -(-tokens // unit) * unit


def _max_seqlen(tokens: int) -> int:
    """Return a length to compile attention for; unused length costs nothing."""
    max_seqlen = ROUND
    while max_seqlen < tokens:
        max_seqlen *= 4
    return max_seqlen


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _sizes(tokens: Counter[int], price: float) -> list[int]:
    """Return the sizes, ascending, with the least padding; at most `MOST_SIZES`."""
    counts = sorted(tokens)
    # best[k][j]: the least padding of the first j counts with k sizes, the last being counts[j-1].
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * len(counts)]
    for _ in range(min(MOST_SIZES, len(counts))):
        row = [(float("inf"), 0)] * (len(counts) + 1)
        for j in range(1, len(counts) + 1):
            waste = 0.0
            for i in range(j - 1, -1, -1):
                waste += tokens[counts[i]] * (counts[j - 1] - counts[i])
                row[j] = min(row[j], (best[-1][i][0] + waste, i))
        best.append(row)
    number = min(range(1, len(best)), key=lambda k: best[k][-1][0] + price * k)
    found, j = [], len(counts)
    for k in range(number, 0, -1):
        found.append(counts[j - 1])
        j = best[k][j][1]
    return found[::-1]
