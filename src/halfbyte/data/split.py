"""Holds out rows of a data set, so that no text is in both parts.

Rows with the same text, up to case and white space, are a group, and a group is held out as a
whole. Groups are ranked by a hash of (seed, text), and taken in this order until there are as many
rows as wanted; one with more rows than are still wanted is passed over. So which rows are held out
depends on the seed and on what the rows say, not on their order, and appending rows to a file moves
few of the others from one part to the other.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import Dataset
from halfbyte.data.formats import Conversation
from halfbyte.errors import DataError


class Split(NamedTuple):
    """Which rows are held out.

    Attributes:
        held_out: bool [rows].
        groups: Number of different texts among them.
    """

    held_out: NDArray[np.bool_]
    groups: int


def content_hash(row: Conversation) -> int:
    """Return a hash (64 bits) of what a row says, without case and the amount of white space."""
    said = [row.text, row.messages, row.tools]
    return _hash(json.dumps(_normalised(said), sort_keys=True).encode())


def raw_hash(row: bytes) -> int:
    """Return the same for the bytes of a row, for data too large to be parsed before training.

    Rows that say the same in other formats, or with their keys in another order, differ.
    """
    return _hash(b" ".join(row.split()).lower())


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
    count = max(1, round(wanted * rows)) if wanted < 1 else int(wanted)
    if count >= rows:
        raise DataError(
            f"eval_split {wanted:g} would hold out {count:,} of {rows:,} rows: none would be left "
            "to train on"
        )
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
        of the whole data set only.
    """
    stops = np.asarray(dataset.last_of_row, np.intp) + 1
    starts = np.append(0, stops[:-1]) if len(stops) else stops
    chosen = [list(range(starts[row], stops[row])) for row in rows]
    examples = [dataset.examples[index] for indices in chosen for index in indices]
    lines = {dataset.rows[indices[-1]].line for indices in chosen}
    whole = dataset.report
    report = replace(
        whole,
        rows=len(chosen),
        usable=len(chosen),
        examples=len(examples),
        split_lines=tuple(line for line in whole.split_lines if line in lines),
        truncated_lines=tuple(line for line in whole.truncated_lines if line in lines),
        rejections=[],
        tokens=sum(len(example.tokens) for example in examples),
        supervised_tokens=sum(int(example.labels_mask.sum()) for example in examples),
        notes=(),
    )
    return Dataset(
        examples,
        report,
        [dataset.rows[index] for indices in chosen for index in indices],
        [count - 1 for count in accumulate(map(len, chosen))],
    )


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


def _normalised(value: Any) -> Any:
    """Return a JSON value with its text folded, without the marks of what is supervised."""
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Mapping):
        return {str(key): _normalised(one) for key, one in value.items() if key != "weight"}
    if isinstance(value, list | tuple):
        return [_normalised(one) for one in value]
    return value


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one pseudo-random number for each number: the steps of splitmix64 (Steele 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
