"""The grammar of a source on the command line.

    PATH, DIRECTORY, GLOB, -            a file, a directory, files by pattern, standard input
    owner/name[[:config]:split]         a data set on the hub; the split is train if not given
    DIRECTORY:split                     the files of another split than train
    …[start:stop]  …#500                rows of it: numbers from 0, from the end (-500), percent
    …:0.7                               its weight, at the very end

A name that exists as a file or directory is that, whatever it looks like.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from halfbyte.config.data_sources import DataSpec
from halfbyte.data.kinds import is_file_name
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote, shorten

STANDARD_INPUT = "-"

_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)", re.DOTALL)
_ROWS = re.compile(r"(.+)\[(-?\d+%?)?:(-?\d+%?)?\]", re.DOTALL)
_COUNT = re.compile(r"(.+)#(\d+)", re.DOTALL)
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")
_SPLIT = re.compile(r"(.+):([\w.-]+)", re.DOTALL)
_MOST_DIGITS = 18


@dataclass(frozen=True)
class Slice:
    """A range of the rows of a source, as of a list in Python; percent are rounded to rows.

    Attributes:
        start: The first row: a number, or text that ends with ``%``.
        stop: The row after the last, likewise.
    """

    start: str | None = None
    stop: str | None = None

    @property
    def is_everything(self) -> bool:
        """Whether all rows are used."""
        return self.start is None and self.stop is None

    @property
    def known(self) -> tuple[int, int | None] | None:
        """Start and stop, if they do not depend on the number of rows."""
        bounds = (self.start or "0", self.stop or "0")
        if any(bound.startswith("-") or bound.endswith("%") for bound in bounds):
            return None
        return int(bounds[0]), None if self.stop is None else int(self.stop)

    def of(self, count: int) -> range:
        """The rows of ``count`` that are used."""
        start, stop = (
            None if bound is None else self._absolute(bound, count)
            for bound in (self.start, self.stop)
        )
        return range(count)[start:stop]

    @staticmethod
    def _absolute(bound: str, count: int) -> int:
        if not bound.endswith("%"):
            return int(bound)
        # As `datasets` rounds it, so that [:10%] is the same rows of a file and on the hub; but
        # [-1%:] of ten rows are none, and not all.
        rows = round(int(bound[:-1].removeprefix("-")) * count / 100)
        return count - rows if bound.startswith("-") else rows


@dataclass(frozen=True)
class Spec:
    """One source, as it was named.

    Attributes:
        path: A path, a glob, a hub id, or ``-``.
        rows: The rows that are used.
        weight: Its weight, or None.
        config: Configuration of a data set on the hub.
        split: Split of a data set on the hub or of a directory.
        columns: Pairs of a key that halfbyte reads, and the column that it is read from.
    """

    path: str
    rows: Slice = Slice()
    weight: float | None = None
    config: str | None = None
    split: str | None = None
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.path == STANDARD_INPUT:
            return "standard input"
        return ":".join(part for part in (self.path, self.config, self.split) if part)

    @property
    def is_local(self) -> bool:
        """Whether it is a file or directory that exists."""
        return _exists(self.path)

    @property
    def is_hub_id(self) -> bool:
        """Whether it is a hub id, not a mistyped path: ``owner/name``, and no directory owner."""
        named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.path)
        return bool(named) and not is_file_name(self.path) and not Path(self.path).parent.exists()

    @classmethod
    def parse(cls, given: DataSpec) -> Self:
        """Read a source.

        Raises:
            DataError: It is not valid, or its name cannot be looked up.
        """
        if isinstance(given, str):
            return cls._parse_text(given)
        spec = cls._parse_text(given.path)
        split, rows = given.split, spec.rows
        if split and "+" not in split and (found := _ROWS.fullmatch(split)):
            split, of_split = found[1], Slice(found[2], found[3])
            _check_rows(of_split, given.split or "")
            if not rows.is_everything:
                raise DataError(f"the rows of {quote(given.path)} are given twice; remove one.")
            rows = of_split
        for key in ("weight", "config", "split"):
            if getattr(given, key) is not None and getattr(spec, key) is not None:
                raise DataError(f"`{key}` of {quote(given.path)} is given twice; remove one.")
        return replace(
            spec,
            rows=rows,
            weight=spec.weight or given.weight,
            config=spec.config or given.config,
            split=spec.split or split,
            columns=tuple(given.columns.items()),
        )

    @classmethod
    def _parse_text(cls, text: str) -> Self:
        rest, rows, weight = text, Slice(), None
        while not _exists(rest):
            if weight is None and rows.is_everything and (found := _WEIGHT.fullmatch(rest)):
                weight = float(found[2])
                if not 0 < weight < float("inf"):
                    raise DataError(f"the weight of {quote(text)}: expected more than 0.")
            elif rows.is_everything and (found := _ROWS.fullmatch(rest)):
                rows = Slice(found[2], found[3])
            elif rows.is_everything and (found := _COUNT.fullmatch(rest)):
                rows = Slice(None, found[2])
            else:
                break
            rest = found[1]
        _check_rows(rows, text)
        spec = cls(os.path.expanduser(rest), rows, weight)
        if spec.is_local or rest == STANDARD_INPUT:
            return spec
        if (found := _SPLIT.fullmatch(rest)) and Path(os.path.expanduser(found[1])).is_dir():
            return replace(spec, path=os.path.expanduser(found[1]), split=found[2])
        if found := _HUB_ID.fullmatch(rest):
            first, second = found[2], found[3]
            hub = replace(
                spec,
                path=found[1],
                config=first if second else None,
                split=second or first,
            )
            return hub if hub.is_hub_id else spec
        return spec


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user, in ~user
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shorten(path)} cannot be read: {reason}.") from error


def _check_rows(rows: Slice, text: str) -> None:
    for bound in (rows.start, rows.stop):
        if bound is None:
            continue
        number = bound.removesuffix("%").removeprefix("-")
        if len(number) > _MOST_DIGITS or (bound.endswith("%") and int(number) > 100):
            most = "100%" if bound.endswith("%") else "18 digits"
            raise DataError(f"the rows of {quote(text)}: expected at most {most}.")
