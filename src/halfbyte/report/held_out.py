"""``held_out.jsonl``: the rows that ``eval_split`` held out, for ``halfbyte eval`` and others.

A row has the format ``messages``, ``prompt/completion`` or ``text``, whatever it had in the data;
it is read as the same conversation. The journal's event ``held_out`` has their lines in the data.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.atomic import new_file
from halfbyte.data.formats import to_row
from halfbyte.foreign_text import to_json

if TYPE_CHECKING:
    from halfbyte.data import Conversation

HELD_OUT_NAME = "held_out.jsonl"


def write_held_out(output: Path, rows: Iterable["Conversation"]) -> Path:
    """Write ``rows``, replacing the file of an earlier start; return its path.

    Raises:
        OutputError: The file cannot be written.
    """
    path = output / HELD_OUT_NAME
    with new_file(path) as file:
        for row in rows:
            file.write(to_json(to_row(row)).encode() + b"\n")
    return path
