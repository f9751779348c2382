"""Data sets of other trainers' configurations, as sources of ``data``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from halfbyte.config.importing.rules import Imported

Source = str | dict[str, Any]
"""A source as text, or as the mapping that YAML has for it."""


def source(
    path: str,
    *,
    name: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Source:
    """One source: a path or a hub id, its configuration, split, slice and columns.

    Args:
        path: A path or a hub id.
        name: Configuration of a data set on the hub.
        split: As `datasets` writes it: ``train``, ``train[:20%]`` or ``train+test``.
        columns: Our keys, and the columns they are read from.
    """
    renamed = {ours: theirs for ours, theirs in (columns or {}).items() if ours != theirs}
    named: dict[str, Any] = {"path": path}
    if split and "+" in split:  # has no form as text
        named |= {"config": name, "split": split} if name else {"split": split}
    else:
        named["path"] = _as_text(path, name, split)
    if renamed:
        named["columns"] = renamed
    return named if len(named) > 1 else str(named["path"])


def _as_text(path: str, name: str | None, split: str | None) -> str:
    found = re.fullmatch(r"([^\[]*)(\[.*\])?", split or "")
    chosen, rows = found.groups() if found else (split, None)
    if name:
        return f"{path}:{name}:{chosen or 'train'}{rows or ''}"
    if chosen and chosen != "train":
        return f"{path}:{chosen}{rows or ''}"
    return f"{path}{rows or ''}"


def set_sources(sources: Iterable[Source], option: str, origin: str, into: Imported) -> None:
    """Set ``data`` or ``eval_data``, if there are sources; what is named twice is read once."""
    unique: list[Source] = []
    for one in sources:
        if one not in unique:
            unique.append(one)
    if unique:
        into.set(option, unique[0] if len(unique) == 1 else tuple(unique), origin)
