"""The HTML page of a data check: findings, lengths, and examples token by token.

One self-contained file in the style of a run's page. Supervised tokens are marked by a tint, by a
line below them, and by words for screen readers; token boundaries are thin lines.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from halfbyte.atomic import new_file
from halfbyte.data.checks import DataCheck, percent
from halfbyte.data.token_view import Piece, ShownExample, runs, shortened
from halfbyte.report.charts import Bar, bar_chart, table
from halfbyte.report.check_text import coarser, length_facts, piece_text
from halfbyte.report.findings import findings_list
from halfbyte.report.page import document, key_figures, require_page, section

_TOKENS_SHOWN = 2000
_BINS = 20


def write_check_page(
    output: Path, title: str, check: DataCheck, examples: Sequence[ShownExample], batch_size: int
) -> Path:
    """Write the page to ``output``, and return that.

    Raises:
        OutputError: The page cannot be written, or another file has its name.
    """
    require_page(output)
    content = check_page(title, check, examples, batch_size).encode(errors="replace")
    with new_file(output) as file:
        file.write(content)
    return output


def check_page(
    title: str, check: DataCheck, examples: Sequence[ShownExample], batch_size: int
) -> str:
    """The page about a check."""
    figures: list[tuple[str, str | None]] = [
        (f"{severity}s", f"{check.count(severity):,}") for severity in ("error", "warning")
    ]
    figures.append(("rows checked", f"{check.looked_at:,}" if check.looked_at else None))
    if (lengths := check.lengths) is not None:
        figures += [
            ("tokens an epoch", f"{lengths.tokens:,}"),
            ("supervised", percent(lengths.supervised / max(lengths.tokens, 1))),
            ("longest, tokens", f"{lengths.percentiles[100]:,}"),
        ]
    parts = [
        f'<header><h1>Data check</h1><p class="soft">{escape(title)}</p>'
        f"{key_figures(figures)}</header>",
        section("Findings", findings_list(check.as_json()) or "<p>Nothing was found.</p>"),
        section("Lengths", _lengths(check, batch_size)),
        section("Examples, token by token", _examples(examples)),
    ]
    return document(f"data check of {title} · halfbyte", "\n".join(parts))


def _lengths(check: DataCheck, batch_size: int) -> str:
    if (lengths := check.lengths) is None:
        return ""
    bars = [
        Bar(
            f"{low:,} – {high - 1:,}",
            [("beyond max_length" if low >= lengths.max_length else "examples", float(count))],
        )
        for low, high, count in coarser(lengths.bins, _BINS)
    ]
    facts = [list(fact) for fact in length_facts(lengths, batch_size=batch_size)]
    chart = bar_chart("Examples", "by their tokens", bars, say=lambda value: f"{value:,.0f}")
    return chart + table(["", ""], facts, "what the lengths mean for a run").replace(
        "<table>", '<table class="options">'
    )


def _examples(examples: Sequence[ShownExample]) -> str:
    if not examples:
        return ""
    legend = (
        '<p class="soft"><mark class="tokens">Marked and underlined</mark> tokens are supervised: '
        "the model learns to write them. Thin lines are token boundaries; <b>bold</b> tokens are "
        "special; ⏎ is a line break.</p>"
    )
    return legend + "".join(map(_example, examples))


def _example(example: ShownExample) -> str:
    shown = shortened(example.pieces, _TOKENS_SHOWN)
    body = "".join(
        f'<mark><span class="unseen">supervised: </span>{_run(run)}'
        '<span class="unseen"> (end)</span></mark>'
        if is_supervised
        else _run(run)
        for is_supervised, run in runs(shown)
    )
    ids = " ".join(
        f"[{' '.join(map(str, piece.ids))}]" if piece.supervised else " ".join(map(str, piece.ids))
        for piece in shown
        if piece.ids
    )
    label = escape(example.title)
    return (
        f"<h3>{label}</h3>"
        f'<div class="tokens" role="region" tabindex="0" aria-label="{label}">{body}</div>'
        f"<details><summary>Token ids, supervised ones in brackets</summary><pre>{ids}</pre>"
        "</details>"
    )


def _run(run: Sequence[Piece]) -> str:
    return "".join(
        f'<i class="gap">{escape(piece_text(piece))}</i>'
        if piece.left_out
        else f"<{_tag(piece)}>{escape(piece_text(piece))}</{_tag(piece)}>"
        for piece in run
    )


def _tag(piece: Piece) -> str:
    return "b" if piece.special else "span"
