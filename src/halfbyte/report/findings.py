"""Findings of a data check as HTML, from the JSON values of a check or of a run's journal."""

from html import escape
from typing import Any

from halfbyte.report.runs import mapping

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
    severity = finding.get("severity")
    severity = severity if severity in _SEVERITIES else "info"
    code, text, remedy, source = (
        escape(str(finding.get(key) or "")) for key in ("code", "text", "remedy", "source")
    )
    return (
        f'<li class="{severity}"><strong>{severity} <code>{code}</code></strong> {text}'
        f'<span class="soft">{" in " if source else ""}{source}<br>→ {remedy}</span></li>'
    )
