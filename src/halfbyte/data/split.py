"""Holds out rows of a data set, so that no text is in both parts.

Rows with the same text, up to case and white space, are a group, and a group is held out as a
whole. Groups are ranked by a hash of (seed, text), and taken in this order until there are as many
rows as wanted; one with more rows than are still wanted is passed over. So which rows are held out
depends on the seed and on what the rows say, not on their order, and appending rows to a file moves
few of the others from one part to the other.

Of data that is encoded while it is trained on, what the rows say is not known before the first
step. There rows are drawn by their numbers (`draw_rows`), and rows that say the same are left out
of training when they come.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import Dataset
from halfbyte.data.content_hash import content_hash
from halfbyte.data.dataset_report import Lines
from halfbyte.errors import DataError

_HELD_OUT = 0x68656C64  # so that the draw is independent of the order of an epoch


class Split(NamedTuple):
    """Which rows are held out.

    Attributes:
        held_out: bool [rows].
        groups: Number of different texts among them.
    """

    held_out: NDArray[np.bool_]
    groups: int


def wanted_rows(wanted: float, rows: int) -> int:
    """Return how many of the rows of a data set are to be held out.

    Args:
        wanted: Share of the rows if below 1, otherwise their number.
        rows: The rows.

    Raises:
        DataError: There are not that many, or none would be left.
    """
    count = max(1, round(wanted * rows)) if wanted < 1 else int(wanted)
    if count >= rows:
        raise DataError(
            f"eval_split {wanted:g} would hold out {count:,} of {rows:,} rows: none would be left "
            "to train on"
        )
    return count


def draw_rows(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw rows by their numbers alone, where what they say is not known yet.

    Args:
        rows: Rows of the data.
        count: How many are drawn.
        seed: Seed of the run.

    Returns:
        int64 [count]: different rows, ascending. Rows that say the same as one of these have to be
        left out of what is trained on (`halfbyte.data.encoding.without`).
    """
    generator = np.random.Generator(np.random.PCG64([seed, rows, _HELD_OUT]))
    return np.sort(generator.choice(rows, count, replace=False, shuffle=False).astype(np.int64))


def hold_out(hashes: NDArray[np.uint64], wanted: float, seed: int) -> Split:
    """Choose the rows to hold out. Needs memory for a few numbers per row.

    Args:
        hashes: uint64 [rows]: of each row; rows with equal hashes are a group.
        wanted: Share of the rows if below 1, otherwise their number.
        seed: Seed of the run.

    Raises:
        DataError: There are not that many rows, or all of them say the same.
    """
    rows = len(hashes)
    count = wanted_rows(wanted, rows)
    ordered = np.sort(hashes)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    different, sizes = ordered[starts], np.diff(starts, append=rows)
    if len(different) == 1:
        raise DataError(
            f"eval_split needs rows that differ: all {rows:,} rows say the same, so what is held "
            "out would be trained on"
        )
    order = np.argsort(_mixed(different ^ _mixed(np.array([seed], np.uint64))))
    chosen = order[_fill(sizes[order], count)]
    if not len(chosen):  # every group is larger: the first one of the smallest
        chosen = order[[np.argmin(sizes[order])]]
    taken = np.sort(different[chosen])
    places = np.searchsorted(taken, hashes).clip(max=len(taken) - 1)
    return Split(taken[places] == hashes, len(taken))


def split_dataset(dataset: Dataset, wanted: float, seed: int) -> tuple[Dataset, Dataset, int]:
    """Divide a data set.

    Args:
        dataset: The data set. Only its usable rows count.
        wanted: As for `hold_out`.
        seed: Seed of the run.

    Returns:
        What is left to train on, what is held out, and the number of different texts in that.

    Raises:
        DataError: As `hold_out`.
    """
    hashes = np.array([content_hash(row) for row, _ in dataset.cases], np.uint64)
    held_out, groups = hold_out(hashes, wanted, seed)
    rest = select(dataset, np.flatnonzero(~held_out))
    part = select(dataset, np.flatnonzero(held_out))
    # What was read and could not be used is told of the part that is trained on.
    rows = dataset.report.rows - len(part.last_of_row)
    kept = replace(
        rest.report,
        rows=rows,
        rejections=dataset.report.rejections,
        notes=dataset.report.notes,
    )
    return replace(rest, report=kept), part, groups


def select(dataset: Dataset, rows: NDArray[np.intp]) -> Dataset:
    """Return some usable rows of a data set, with all examples of each, as a data set.

    Args:
        dataset: The data set.
        rows: int [n]: indices of usable rows, in the order in which they are wanted.

    Returns:
        The rows. Its report counts only these, except ``formats`` and ``longest``, which are known
        of the whole data set only. Of more than a hundred rows that were truncated, or split, the
        number is an estimate.
    """
    stops = np.asarray(dataset.last_of_row, np.intp) + 1
    starts = np.append(0, stops[:-1]) if len(stops) else stops
    counts = stops[rows] - starts[rows]
    indices = np.concatenate([np.arange(starts[row], stops[row]) for row in rows] or [stops[:0]])
    last = np.cumsum(counts) - 1
    lines = set(dataset.lines(indices[last].tolist()))
    examples, conversations = dataset.select(indices)
    whole = dataset.report
    report = replace(
        whole,
        rows=len(rows),
        usable=len(rows),
        examples=len(examples),
        split_lines=_among(whole.split_lines, lines),
        truncated_lines=_among(whole.truncated_lines, lines),
        rejections=[],
        tokens=sum(len(example.tokens) for example in examples),
        supervised_tokens=sum(int(example.labels_mask.sum()) for example in examples),
        notes=(),
    )
    mixture = dataset.mixture
    if mixture is not None:
        sources = np.searchsorted(np.cumsum(mixture.counts), indices, side="right")
        parts = np.bincount(sources, minlength=len(mixture.counts))
        mixture = mixture._replace(counts=parts.tolist())
    return Dataset(examples, report, conversations, last, mixture)


def _among(whole: Lines, lines: set[str]) -> Lines:
    """Return those of the lines that are among others; their share, if only the first are known."""
    found = [line for line in whole if line in lines]
    known = len(list(whole))
    share = len(found) / known if known else 0.0
    return Lines(found, round(share * len(whole)))


def _fill(sizes: NDArray[np.intp], wanted: int) -> NDArray[np.intp]:
    """Return the places of the groups, in their order, that make up ``wanted`` rows or fewer."""
    found: list[NDArray[np.intp]] = []
    place, left = 0, wanted
    while left and place < len(sizes):
        total = np.cumsum(sizes[place : place + left])
        fitting = int(np.searchsorted(total, left, side="right"))
        found.append(np.arange(place, place + fitting))
        left -= int(total[fitting - 1]) if fitting else 0
        smaller = sizes[place + fitting :] <= left  # the next one is too large
        place += fitting + int(np.argmax(smaller)) if left and smaller.any() else len(sizes)
    return np.concatenate(found) if found else np.empty(0, np.intp)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one pseudo-random number for each number: the steps of splitmix64 (Steele 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
