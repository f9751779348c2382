"""Rows that a program has: a list or any iterable of them, or a ``datasets.Dataset``.

A row is a mapping in one of the five formats, or a conversation, which is a list of messages. Rows
are numbered from 1, as the lines of a file are. What JSON cannot hold is a row with a problem,
since no chat template expects it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from halfbyte.data.sources import Row, Source, checked
from halfbyte.errors import DataError
from halfbyte.foreign_text import quote


class RowsInMemory:
    """Rows under a name, which messages use for them. They are read once.

    Args:
        rows: The rows: a sequence or an iterable of mappings or of lists of messages.
        name: The name.

    Raises:
        DataError: They are a mapping of data sets, a table, or no rows at all.
    """

    def __init__(self, rows: Iterable[object], name: str) -> None:
        self._rows, self._name = rows, name
        if isinstance(rows, Mapping):
            names = ", ".join(map(quote, list(rows)[:8]))
            raise DataError(
                f"{name}: expected rows, got a mapping with the keys {names}. Give one of its data "
                "sets, or a list of such rows"
            )
        if isinstance(rows, str | bytes):
            raise DataError(f"{name}: expected rows, got text; a file is named in the options")
        if hasattr(rows, "columns"):  # of pandas, Arrow or Polars, which iterate over columns
            raise DataError(
                f"{name}: expected rows, got a table: give its rows as dicts, for pandas "
                "table.to_dict('records')"
            )
        if not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
            raise DataError(f"{name}: expected rows, got {quote(type(rows).__name__)}")

    def __str__(self) -> str:
        return self._name

    def read(self) -> Source:
        """Return the rows.

        Raises:
            DataError: There are none.
        """
        rows = [_row(str(number), value) for number, value in enumerate(self._values(), 1)]
        if not rows:
            raise DataError(f"{self._name} is empty: expected rows")
        return Source(rows, ())

    def _values(self) -> Iterator[object]:
        rows: Any = self._rows
        if hasattr(rows, "__iter__") or not hasattr(rows, "__len__"):
            yield from rows
        else:  # a map-style data set of torch, whose end only its length tells
            for index in range(len(rows)):
                yield rows[index]


def _row(line: str, value: object) -> Row:
    if isinstance(value, Mapping):
        value = dict(value)
    elif isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value):
        value = {"messages": [dict(one) for one in value]}
    try:
        # As from a file, so that tuples are lists and nothing is shared with the program.
        return checked(line, json.loads(json.dumps(value)))
    except (TypeError, ValueError, RecursionError) as error:
        return Row(line, repr(value)[:1000], f"not JSON: {error}")
