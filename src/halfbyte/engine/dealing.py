"""Deals the documents of a step out to processes by their tokens, so that none waits for others.

Every process knows all documents of a step, and this is a function of their lengths, the step and
the number of processes: nothing is exchanged. The longest document that is left goes to the process
that has the fewest tokens (Graham 1969: at most 4/3 of the best possible). Processes change places
from step to step, since otherwise the first one would always have the longest document.

A step is the same for any number of processes. The gradient of a document depends on no other, so
documents are dealt out one by one and put into micro-batches of the size that was asked for. Where
it does, as with dropout, whose masks are drawn for a micro-batch, or for a part that documents are
packed into, these are dealt out as they are, which is less even. Either way a document keeps its
number in the step, on which its noise depends (engine/neftune.py), and a micro-batch keeps its own,
on which its masks do.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace

from torch.nn.utils.rnn import pad_sequence

from halfbyte.engine.packing import Batch, lengths_of

Rows = Callable[[int], int]


def deal(tokens: Sequence[int], processes: int, step: int = 0) -> list[list[int]]:
    """Return the indices that each process gets, in ascending order.

    Args:
        tokens: The tokens of each document, or micro-batch.
        processes: Their number; some get nothing if there are more of them.
        step: The number of the step.
    """
    hands: list[list[int]] = [[] for _ in range(processes)]
    heap = [(0, place) for place in range(processes)]
    heapify(heap)
    for index in sorted(range(len(tokens)), key=lambda one: (-tokens[one], one)):
        held, place = heap[0]
        hands[(place + step) % processes].append(index)
        heapreplace(heap, (held + tokens[index], place))
    return [sorted(hand) for hand in hands]


def divided(lengths: Sequence[int], rows: Rows) -> list[list[int]]:
    """Return the indices of the documents of each micro-batch, the longest first.

    Args:
        lengths: The tokens of each document.
        rows: Returns how many documents a micro-batch may have whose longest has so many tokens.
    """
    order = sorted(range(len(lengths)), key=lambda one: (-lengths[one], one))
    found, first = [], 0
    while first < len(order):
        size = rows(lengths[order[first]])
        found.append(order[first : first + size])
        first += size
    return found


def own_batches(
    batches: Sequence[Batch],
    rank: int,
    processes: int,
    step: int,
    *,
    rows: Rows,
    units: Sequence[Sequence[int]] | None = None,
) -> list[Batch]:
    """Return the micro-batches of a step that a process computes.

    Args:
        batches: All micro-batches of the step.
        rank: The process.
        processes: The number of processes.
        step: The number of the step.
        rows: As for `divided`.
        units: The documents of the micro-batches that are dealt out as they are; None: documents
            are dealt out one by one.
    """
    lengths = lengths_of(batches)
    places = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]

    def collated(chosen: Sequence[int], number: int | None = None) -> Batch:
        own = [(*places[index], lengths[index]) for index in chosen]
        return Batch(
            pad_sequence([batch.input_ids[row, :n] for batch, row, n in own], batch_first=True),
            pad_sequence([batch.labels[row, :n] for batch, row, n in own], True, -100),
            [n for *_, n in own],
            chosen,
            number,
        )

    if units is not None:
        mine = deal([sum(lengths[i] for i in unit) for unit in units], processes, step)[rank]
        return [collated(units[number], number) for number in mine]
    mine = deal(lengths, processes, step)[rank]
    groups = divided([lengths[index] for index in mine], rows)
    return [collated([mine[place] for place in group]) for group in groups]


def portions(
    steps: Sequence[tuple[Sequence[int], Sequence[Sequence[int]] | None]],
    processes: int,
    rows: Rows,
) -> tuple[list[list[tuple[int, int]]], list[list[int]]]:
    """Return what processes get of each step, as shapes and lengths, for plans of memory.

    All processes plan for what any of them gets, so they choose the same shapes.

    Args:
        steps: The tokens of each document, and ``units`` as for `own_batches`, by step.
        processes: The number of processes.
        rows: As for `divided`.

    Returns:
        (B, T) of each micro-batch, and the tokens of each document, for each process and step.
    """
    shapes, found = [], []
    for step, (lengths, units) in enumerate(steps):
        if units is not None:
            made = [[lengths[index] for index in unit] for unit in units]
            hands = deal([sum(unit) for unit in made], processes, step)
            parts = [[made[number] for number in hand] for hand in hands]
        else:
            mine = ([lengths[i] for i in hand] for hand in deal(lengths, processes, step))
            parts = [[[own[i] for i in group] for group in divided(own, rows)] for own in mine]
        for micro_batches in filter(None, parts):
            shapes.append([(len(group), max(group)) for group in micro_batches])
            found.append([n for group in micro_batches for n in group])
    return shapes, found
