"""A converted configuration as a YAML file, with a comment for every foreign setting."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from halfbyte.config.importing.rules import Imported
from halfbyte.config.reading import check
from halfbyte.config.schema import TrainConfig

_WIDTH = 100
_REQUIRED = {"model": "MODEL", "data": "DATA", "output": "out"}


def to_yaml(imported: Imported, source: str) -> str:
    """The options, in the order of ``halfbyte train --help``, and what has no option as comments.

    Args:
        imported: The converted configuration.
        source: The file it was read from.

    Raises:
        ConfigError: Values that no option takes, which its messages name.
    """
    values = _ordered(imported)
    check(TrainConfig, _REQUIRED | values)
    lines = [f"# Converted from {' '.join(source.split())} ({imported.trainer}).", ""]
    for name, placeholder in _REQUIRED.items():
        if name not in values and name != "output":
            lines.append(f"# {name}: {placeholder}    # to be set")
    values.setdefault("output", _REQUIRED["output"])
    origins = imported.origins
    entries = [(yaml_line(name, value), origins.get(name, "")) for name, value in values.items()]
    column = min(44, max((len(entry) for entry, _ in entries), default=0))
    for entry, origin in entries:
        same = not origin or origin.replace(" ", "") == entry.replace(" ", "")
        lines.append(entry if same else f"{entry:<{column}}  # {origin}")
    lines += _comments("Without a counterpart; see to these:", imported.missing)
    lines += _comments("Not needed:", imported.unneeded)
    return "\n".join(lines) + "\n"


def missing_options(imported: Imported) -> list[str]:
    """Required options that the configuration does not give."""
    return [name for name in ("model", "data") if name not in imported.values]


def _ordered(imported: Imported) -> dict[str, Any]:
    return {
        name: imported.values[name] for name in TrainConfig.model_fields if name in imported.values
    }


def yaml_line(name: str, value: Any) -> str:
    """One option as a line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(plain, list | dict):  # in one line, with what they contain
        inner = yaml.safe_dump(
            plain, default_flow_style=True, sort_keys=False, width=100_000, allow_unicode=True
        )
        return f"{name}: {inner.strip()}"
    return yaml.safe_dump({name: plain}, width=100_000, allow_unicode=True).strip()


def _comments(heading: str, listed: Sequence[tuple[str, str]]) -> list[str]:
    if not listed:
        return []
    lines = ["", f"# {heading}"]
    for setting, reason in listed:
        lines += textwrap.wrap(
            f"{setting} — {reason}",
            _WIDTH,
            initial_indent="#   ",
            subsequent_indent="#     ",
            break_on_hyphens=False,
        )
    return lines
