"""The few shapes in which all of a run's tokens pass through the layers.

Examples are packed: the documents of a step are packed one after the other into parts of about
`PART_TOKENS` tokens, each filled up to one of a few sizes. The sizes are chosen before the first
step, from the lengths of the data at hand, so every kernel can be compiled and every CUDA graph
captured ahead, and no step meets a new shape. How many documents a part may have, and how long the
longest may be, is the same for all sizes: attention skips what is not there.

More sizes waste less on filling up, and each costs the capture of a graph. The sizes that minimise

    Σ over parts of (size − tokens)  +  price · number of sizes

are found exactly (`_sizes`, dynamic programming over the sorted token counts).

A product of m rows is computed in tiles, one on each multiprocessor at a time, so its time is a
staircase in m. Of a 7B model on an H200 a step is 1024 rows: 3072 tokens take a layer 6.5 ms, 3328
take 7.3 (gpu_part_sizes.json). So a step that is divided has all parts but the last filled to such
a multiple (`divide`).

Where all parts of a run are the same rows of one length, as in a benchmark, they stay rows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from halfbyte.plan.ledger import PART_TOKENS

# Sizes are multiples of this, so that kernels see strides of one alignment; rows of a length that
# is a multiple of half of it may stay rows.
ROUND = 128
MOST_SIZES = 16

# Tokens that a further size must save in a run, times the width of the model: capturing a graph
# takes 0.3 s whatever the width, in which an H200 trains 5400 tokens of width 4096.
PRICE = 2.2e7


class PartShape(NamedTuple):
    """What is equal for parts that layers are called with in the same way.

    Attributes:
        rows: Rows of the batch; 1 where documents are packed.
        tokens: Tokens of a row.
        documents: How many documents there is room for in a packed row; 0 where rows are documents.
        max_seqlen: No document has more tokens.
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
    """Return the rows of a product [rows, width] whose tiles fill a GPU once; 0 where none do.

    Args:
        width: Columns of the product.
        num_sms: The GPU's multiprocessors; each computes a tile of 128 x 256 at a time.
    """
    return num_sms // -(-width // 256) * 128


def divide(
    lengths: Sequence[int], part_tokens: int | None = None, wave: int = 0
) -> list[list[int]]:
    """Return the documents of a step, by number, divided into parts of about ``part_tokens``.

    Parts are as few as can be and of about as many tokens each: the longest first, each document
    goes to the part with the fewest so far. Where parts have room for two multiples of ``wave``
    tokens, all but the last are filled to one as closely as documents allow.
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
        tokens = sum(lengths[i] for i in rest)
        even = -(-tokens // (left * wave)) * wave
        # What remains must fit into the others.
        aim = max(min(even, most // wave * wave), min(most, tokens - (left - 1) * most))
        part = _fullest([lengths[i] for i in rest], aim)
        parts.append([rest[i] for i in sorted(part)])
        rest = [number for i, number in enumerate(rest) if i not in part]
    return [part for part in (*parts, rest) if part]


def _fullest(lengths: Sequence[int], most: int) -> set[int]:
    """Return the numbers of the lengths whose sum is closest to ``most`` from below.

    Subset sum by the sums that can be reached, as bits of an integer. Of one length that alone is
    more, it is the first.
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
    """Return the shape of documents that can stay rows, or None."""
    if len(set(lengths)) == 1 and lengths[0] % (ROUND // 2) == 0:
        return PartShape(len(lengths), lengths[0], 0, lengths[0])
    return None


@dataclass(frozen=True)
class Buckets:
    """The shapes of a run's parts.

    Attributes:
        shapes: All of them, the largest first.
        part_tokens: What a part is divided at.
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
            width: Of the model's residual stream; decides what a further size may cost.
            part_tokens: About how many tokens a part should have; `PART_TOKENS` if not given.
            num_sms: Multiprocessors of the GPU; 0 where it has no part in the choice.
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
        # What fills a part up are documents, too.
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
        """Return the documents of a step, by number, in the parts that they are packed into."""
        return divide(lengths, self.part_tokens, self.wave)

    def fit(self, lengths: Sequence[int]) -> PartShape:
        """Return the shape for a part of these documents.

        A part that is larger than all of them, which no step of the run has, gets one of its own.
        """
        rows = as_rows(lengths)
        if rows is not None and rows in self.shapes:
            return rows
        return next((s for s in reversed(self.shapes) if _fits(lengths, s)), own_shape(lengths))


def own_shape(lengths: Sequence[int]) -> PartShape:
    """Return the shape of a part by itself, where there is no run to choose shapes for.

    Packed rows are filled up to an eighth of the power of two below their length, so that there are
    not many of these, either.
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
    """Whether the documents, and those that fill the part up, go into a part of this shape."""
    if not shape.documents or max(lengths) > shape.max_seqlen or sum(lengths) > shape.tokens:
        return False
    return (
        len(lengths) + len(fillers(shape.tokens - sum(lengths), shape.max_seqlen))
        <= shape.documents
    )


def fillers(tokens: int, max_seqlen: int) -> list[int]:
    """Return the lengths of the documents that fill up a part: none longer than ``longest``."""
    whole, rest = divmod(tokens, max_seqlen)
    return [max_seqlen] * whole + [rest] * (rest > 0)


def _rounded(tokens: int) -> int:
    # For very long parts, coarser: what is tried grows with the square of the number of counts.
    unit = max(ROUND, _power_of_two(tokens) // 64)
    return -(-tokens // unit) * unit


def _max_seqlen(tokens: int) -> int:
    """Return a length for which attention is compiled; what there is not costs it nothing."""
    max_seqlen = ROUND
    while max_seqlen < tokens:
        max_seqlen *= 4
    return max_seqlen


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _sizes(tokens: Counter[int], price: float) -> list[int]:
    """Return the sizes, ascending, that waste least; at most `MOST_SIZES`."""
    counts = sorted(tokens)
    # best[k][j]: the least waste of the first j counts with k sizes, the last of them counts[j-1].
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
