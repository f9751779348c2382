"""Which files of a directory, or which that match a pattern, are read.

Of a directory with files named after splits, only one split is read, ``train`` unless another is
asked for; otherwise all its data files are. What is left is said.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from halfbyte.data.kinds import READABLE, Name
from halfbyte.errors import DataError

_SHARD = r"(?:[-_.]\d+(?:-of-\d+)?)?"  # train-00000-of-00005, as the hub names parts of a split
_SPLITS_OF_SAVED, _STATE = "dataset_dict.json", "state.json"  # datasets' save_to_disk writes these
_NO_DATA = (_SPLITS_OF_SAVED, _STATE, "dataset_info.json", "dataset_infos.json")
_NAMED = 5


class Chosen(NamedTuple):
    """The files that are read, and messages about those that are not."""

    files: list[Path]
    notes: tuple[str, ...]


def files_in(directory: Path, split: str | None) -> Chosen:
    """Choose the data files of a directory.

    Args:
        directory: The directory; one that was written by the package ``datasets``, or is a copy of
            a data set of the hub, will do.
        split: Whose files to read; None: those of ``train`` if there are some, or else all.

    Raises:
        DataError: There are none.
        OSError: It cannot be read.
    """
    if (directory / _SPLITS_OF_SAVED).is_file():
        return _saved_splits(directory, split or "train")
    every = sorted(path for path in directory.iterdir() if _is_data(path))
    if not every and (inner := directory / "data").is_dir():
        return files_in(inner, split)
    chosen = [path for path in every if _is_of(path, split or "train")]
    if split is not None and not chosen and (split != "train" or not every):
        found = f", only {_listed(every)}" if every else ""
        raise DataError(f"{directory} contains no files of the split {split}{found}.")
    if not every:
        raise DataError(
            f"{directory} contains no data: expected train.jsonl, or other files named "
            f"{', '.join('*' + suffix for suffix in READABLE)}."
        )
    chosen = _one_of_each(chosen or every)
    left = [path for path in every if path not in chosen]
    if left:
        return Chosen(chosen, (f"read {_listed(chosen)} only, not {_listed(left)}",))
    return Chosen(chosen, (f"read {_listed(chosen)}",) if chosen[1:] else ())


def files_matching(pattern: str) -> Chosen:
    """Choose the data files whose paths match a pattern, in alphabetical order.

    Raises:
        DataError: There are none.
    """
    every = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    chosen = [path for path in every if Name.of(path).is_readable]
    left = [path for path in every if path not in chosen]
    if not chosen:
        found = f" {_listed(left)} cannot be read." if left else ""
        raise DataError(
            f"No data file matches {pattern}.{found} Expected files named "
            f"{', '.join('*' + suffix for suffix in READABLE)}."
        )
    notes = [f"read {_listed(chosen)}"]
    notes += [f"not read, since they are no data files: {_listed(left)}"] if left else []
    return Chosen(chosen, tuple(notes))


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist is a pattern."""
    return glob.has_magic(path)


def _is_data(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in _NO_DATA
    return not hidden and Name.of(path).is_readable and not path.is_dir()


def _is_of(path: Path, split: str) -> bool:
    name = re.escape(split) + _SHARD
    return re.fullmatch(name, Name.of(path).stem, re.IGNORECASE) is not None


def _saved_splits(directory: Path, split: str) -> Chosen:
    splits = sorted(path for path in directory.iterdir() if (path / _STATE).is_file())
    chosen = next((path for path in splits if path.name == split), None)
    if chosen is None:
        names = ", ".join(path.name for path in splits) or "none"
        raise DataError(f"{directory} contains no split {split}, only {names}.")
    files, _ = files_in(chosen, None)
    left = [path for path in splits if path != chosen]
    return Chosen(files, (f"read {split} only, not {_listed(left)}",) if left else ())


def _one_of_each(files: list[Path]) -> list[Path]:
    """Of files with the same name and several kinds, such as a Parquet copy, keep one kind."""

    def rank(path: Path) -> tuple[bool, int]:
        name = Name.of(path)
        return bool(name.compressed), max(0, READABLE.index(name.suffix) - READABLE.index(".json"))

    best: dict[str, tuple[bool, int]] = {}
    for path in files:
        stem = Name.of(path).stem
        best[stem] = min(rank(path), best.get(stem, rank(path)))
    return [path for path in files if rank(path) == best[Name.of(path).stem]]


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(path.name for path in files[:_NAMED]) + more
