"""One pass over encoded examples: lengths, what is supervised, how replies end, what is cut off.

Examples are looked at together, as one array of at most half a million tokens (or one example), so
the pass takes about 20 ns per token, and the same memory whatever the size of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.templates import Example

_MOST_TOGETHER, _MOST_TOKENS = 2048, 500_000
_FIRST = 5  # indices that are kept of each kind

EDGES = np.array(
    [0, *(base * 2**power for power in range(2, 20) for base in (2, 3))], dtype=np.int64
)
"""Lengths at which tables divide: 8, 12, 16, 24, 32, 48, 64, …"""


@dataclass
class Found:
    """How often something was found, where first, and an instance of it in words."""

    count: int = 0
    first: list[int] = field(default_factory=list)
    instance: str = ""

    def add(self, indices: Iterable[int], count: int = 1) -> None:
        """Count the examples or rows with these indices, ``count`` in all."""
        self.count += count
        room = _FIRST - len(self.first)
        self.first += [int(index) for index, _ in zip(indices, range(room), strict=False)]

    def see(self, index: int, instance: str = "") -> None:
        """Count one."""
        self.add([index])
        self.instance = self.instance or instance


_Item = TypeVar("_Item")


def together(
    items: Iterable[_Item], tokens_of: Callable[[_Item], NDArray[np.int32]]
) -> Iterator[list[_Item]]:
    """Yield items in lists of at most 2048, and half a million tokens unless it is one item."""
    part: list[_Item] = []
    tokens = 0
    for item in items:
        length = len(tokens_of(item))
        if part and (len(part) == _MOST_TOGETHER or tokens + length > _MOST_TOKENS):
            yield part
            part, tokens = [], 0
        part.append(item)
        tokens += length
    if part:
        yield part


@dataclass(frozen=True)
class ControlIds:
    """The token ids that the pass looks for.

    Attributes:
        ends: Those that end a turn.
        bos: The BOS token, or -1.
        unknown: The token for unknown text, or -1 if there is none or it has another role too.
    """

    ends: tuple[int, ...]
    bos: int = -1
    unknown: int = -1


class ExampleScan:
    """What the pass finds.

    Attributes:
        indices: int64 [n], the examples that were looked at.
        lengths: int64 [n], their tokens.
        supervised: int64 [n], supervised tokens among them.
        replies: Number of supervised stretches of tokens.
        whole: Replies that are not cut off.
        unended: Of these, those without a supervised end of turn.
        lost: Replies of which nothing is within ``max_length``.
        cut: Examples longer than ``max_length``.
        two_bos: Examples that begin with two BOS tokens.
        unknown: Examples with unknown tokens.
        supervised_within: Supervised tokens within ``max_length``.
        supervised_from: int64 [len(EDGES)], supervised tokens at or after each edge.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        indices: NDArray[np.int64],
        ids: ControlIds,
        *,
        max_length: int,
        everything: bool,
    ) -> None:
        """Make the pass.

        Args:
            examples: The examples, truncated to ``max_length`` or not.
            indices: Those to look at, ascending.
            ids: What to look for.
            max_length: Longer examples are, or would be, truncated to this many tokens.
            everything: Whether all tokens are supervised, also those that follow an end of turn.
        """
        self.indices = indices
        self.replies = self.whole = self.supervised_within = 0
        self.unended, self.lost, self.cut = Found(), Found(), Found()
        self.two_bos, self.unknown = Found(), Found()
        self.supervised_from = np.zeros(len(EDGES), np.int64)
        self._ids, self._max_length, self._everything = ids, max_length, everything
        lengths, supervised = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        start = 0
        for part in together((examples[at] for at in indices.tolist()), lambda one: one.tokens):
            counted = self._piece(indices[start : start + len(part)], part)
            start += len(part)
            lengths.append(counted[0])
            supervised.append(counted[1])
        self.lengths, self.supervised = np.concatenate(lengths), np.concatenate(supervised)
        self.supervised_from = np.cumsum(self.supervised_from[::-1])[::-1]

    def _piece(
        self, indices: NDArray[np.int64], examples: list[Example]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = np.concatenate([one.tokens for one in examples])
        mask = np.concatenate([one.labels_mask for one in examples])
        lengths = np.array([len(one.tokens) for one in examples], np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        owner = np.repeat(np.arange(len(examples)), lengths)
        position = np.arange(len(tokens)) - starts[owner]

        at = position[mask]
        self.supervised_within += int((at < self._max_length).sum())
        within = np.searchsorted(EDGES, at, side="right") - 1
        self.supervised_from += np.bincount(within, minlength=len(EDGES))
        cut = lengths > self._max_length
        self.cut.add(indices[cut], int(cut.sum()))
        if self._ids.bos >= 0:
            second = np.minimum(starts + 1, len(tokens) - 1)
            two = (tokens[starts] == self._ids.bos) & (tokens[second] == self._ids.bos)
            two &= lengths > 1
            self.two_bos.add(indices[two], int(two.sum()))
        if self._ids.unknown >= 0:
            having = np.unique(owner[tokens == self._ids.unknown])
            self.unknown.add(indices[having], len(having))
        self._replies(indices, tokens, mask, owner, position, lengths)
        return lengths, np.bincount(owner[mask], minlength=len(examples))

    def _replies(
        self,
        indices: NDArray[np.int64],
        tokens: NDArray[np.int32],
        mask: NDArray[np.bool_],
        owner: NDArray[np.int64],
        position: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        """Look at the stretches of supervised tokens: how each ends, and whether it is cut off."""
        same = np.append(owner[1:] == owner[:-1], False)  # as the next token
        last = np.flatnonzero(mask & ~(np.append(mask[1:], False) & same))
        before = np.append(False, mask[:-1]) & np.append(False, same[:-1])
        first = np.flatnonzero(mask & ~before)
        self.replies += len(last)

        lost = position[first] >= self._max_length
        self.lost.add(indices[owner[first[lost]]], int(lost.sum()))
        is_end = np.isin(tokens, self._ids.ends)
        ended = is_end[last]
        if self._everything:  # what a template writes after the turn is supervised as well
            counts = np.cumsum(is_end)
            ended = counts[last] - counts[first] + is_end[first] > 0
        cut = position[last] >= self._max_length
        # Of an example that has been truncated it is not known whether its last reply is whole.
        cut |= (
            (lengths[owner[last]] == self._max_length)
            & (position[last] == self._max_length - 1)
            & ~ended
        )
        self.whole += int((~cut).sum())
        unended = ~ended & ~cut
        self.unended.add(indices[owner[last[unended]]], int(unended.sum()))


@dataclass(frozen=True)
class Lengths:
    """The lengths of the examples of a data set, in tokens.

    Attributes:
        max_length: Longer examples are truncated.
        examples: Number of examples looked at.
        tokens: Their tokens, truncated: those of an epoch.
        supervised: Supervised tokens among them.
        percentiles: The length that so many percent of the examples do not exceed.
        bins: (from, below, examples), from the shortest length to the longest.
        choices: For each possible ``max_length`` (length, share of examples that it cuts off, share
            of supervised tokens that it cuts off).
        padding: Share of padding tokens if each micro-batch is padded to its longest example.
        packed: Share of tokens in rows of ``max_length`` that are packed by best fit.
        positions: Positions that the model was made for, if known.
    """

    max_length: int
    examples: int
    tokens: int
    supervised: int
    percentiles: dict[int, int]
    bins: tuple[tuple[int, int, int], ...]
    choices: tuple[tuple[int, float, float], ...]
    padding: float
    packed: float
    positions: int | None = None


_PERCENTILES = (5, 25, 50, 75, 90, 95, 99, 100)
_SAMPLED = 5000  # lengths that are padded and packed


def lengths_of(
    scan: ExampleScan,
    *,
    max_length: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    positions: int | None = None,
) -> Lengths:
    """Summarise the lengths that a pass has found, as a run would batch them."""
    found = scan.lengths
    visible = np.minimum(found, max_length)
    percentiles = np.percentile(found, _PERCENTILES, method="inverted_cdf").astype(int)
    counts = np.bincount(np.searchsorted(EDGES, found, side="right") - 1, minlength=len(EDGES))
    used = np.flatnonzero(counts)
    edges = [*EDGES.tolist(), 2 * int(EDGES[-1])]
    bins = [(edges[at], edges[at + 1], int(counts[at])) for at in range(used[0], used[-1] + 1)]
    everything = max(int(scan.supervised.sum()), 1)
    choices = [
        (int(edge), float((found > edge).mean()), float(scan.supervised_from[at] / everything))
        for at, edge in enumerate(EDGES.tolist())
        if edge and edge // 2 < found.max()
    ]
    step = batch_size * gradient_accumulation_steps
    order = np.random.default_rng(0).permutation(len(visible))[:_SAMPLED]
    shuffled = visible[order]
    padded = 0
    for start in range(0, len(shuffled), step):
        examples = np.sort(shuffled[start : start + step])[::-1]
        padded += sum(
            int(batch[0]) * len(batch)
            for batch in np.split(examples, range(batch_size, len(examples), batch_size))
        )
    return Lengths(
        max_length=max_length,
        examples=len(found),
        tokens=int(visible.sum()),
        supervised=scan.supervised_within,
        percentiles=dict(zip(_PERCENTILES, percentiles.tolist(), strict=True)),
        bins=tuple(bins),
        choices=tuple(choices),
        padding=1 - int(shuffled.sum()) / padded,
        packed=int(shuffled.sum()) / (_packs(shuffled, max_length) * max_length),
        positions=positions,
    )


def _packs(lengths: NDArray[np.int64], capacity: int) -> int:
    """The number of rows of ``capacity`` that best-fit-decreasing packing fills.

    Rows are counted by the room that is left in them: a length takes the smallest room that it
    fits into, so no list of rows is searched.
    """
    rooms = np.zeros(capacity + 1, np.int64)
    packs = 0
    for length in np.sort(lengths)[::-1].tolist():
        room = length + int(np.argmax(rooms[length:] > 0))
        if rooms[room]:
            rooms[room] -= 1
        else:
            packs, room = packs + 1, capacity
        rooms[room - length] += 1
    return packs
