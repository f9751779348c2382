"""Data sets of other trainers' configurations, as ``data`` and ``column`` of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from halfbyte.config.importing.rules import Imported

_OF_ROLES = {"role": "from", "content": "value"}


def spec(path: str, *, name: str | None = None, split: str | None = None) -> str:
    """One ``--data`` source: a path or a hub id, its configuration, split and slice.

    ``split`` may be written as `datasets` does: ``train[:20%]``.
    """
    found = re.fullmatch(r"(\w*)(\[.*\])?", split or "")
    chosen, rows = found.groups() if found else (split, None)
    if name:
        return f"{path}:{name}:{chosen or 'train'}{rows or ''}"
    if chosen and chosen != "train":
        return f"{path}:{chosen}{rows or ''}"
    return f"{path}{rows or ''}"


def set_columns(columns: Mapping[str, str], origin: str, into: Imported) -> None:
    """Set ``column`` for those columns that have another name than ours."""
    renamed = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    if renamed:
        into.set("column", renamed, origin)
