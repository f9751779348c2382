"""Findings of a data check as HTML, from the JSON values of a check or of a run's journal."""

from collections.abc import Sequence
from html import escape
from typing import Any

from halfbyte.data.checks import percent
from halfbyte.report.runs import mapping, number, texts

_SEVERITIES = ("error", "warning", "info")


def findings_list(check: Any) -> str:
    """Return the findings as a list, the most severe first; empty if there are none.

    Args:
        check: What `DataCheck.as_json` returns; from a journal it may be anything.
    """
    found = mapping(check).get("findings")
    items = [_item(mapping(one)) for one in found] if isinstance(found, list) else []
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


def _item(finding: dict[str, Any]) -> str:
    severity = str(finding.get("severity"))
    severity = severity if severity in _SEVERITIES else "info"
    parts = [_counted(finding), str(finding.get("detail") or "")]
    about = "; ".join(part for part in parts if part)
    source = str(finding.get("source") or "")
    return (
        f'<li class="{severity}"><strong>{severity} <code>{_text(finding, "code")}</code></strong> '
        f"{_text(finding, 'title')}{': ' if about else ''}{escape(about)}"
        f'<span class="soft">{" in " if source else ""}{escape(source)}<br>'
        f"→ {_text(finding, 'remedy')}</span></li>"
    )


def _text(finding: dict[str, Any], key: str) -> str:
    return escape(str(finding.get(key) or ""))


def _counted(finding: dict[str, Any]) -> str:
    count, of, share = (number(finding.get(key)) for key in ("count", "of", "share"))
    if not count or not of or share is None:
        return ""
    text = f"{count:,.0f} of {of:,.0f} {finding.get('unit')} ({percent(share)})"
    lines: Sequence[str] = texts(finding.get("lines"))
    more = ", …" if count > len(lines) else ""
    return (
        f"{text}, line{'s' if len(lines) > 1 else ''} {', '.join(lines)}{more}" if lines else text
    )
