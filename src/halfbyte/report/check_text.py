"""Prints a data check on standard output: findings, lengths, and examples token by token.

Nothing is said by colour alone: supervised tokens stand between ``[[`` and ``]]``.
"""

from collections.abc import Sequence

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from halfbyte.data.check_codes import CODES
from halfbyte.data.checks import DataCheck, Finding, percent
from halfbyte.data.example_checks import Lengths
from halfbyte.data.token_view import Piece, ShownExample, runs, shortened
from halfbyte.foreign_text import printable
from halfbyte.report.show import as_text, heading, open_console

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_TOKENS_SHOWN = 400
_BAR = 32  # characters of the longest bar
_ROWS = 14  # of a histogram


def print_check(check: DataCheck) -> None:
    """Print the findings, each with its remedy, the most severe first."""
    console = open_console()
    sources = dict.fromkeys(finding.source for finding in check.findings if finding.source)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in check.findings:
        style = _STYLES[finding.severity]
        where = f"{finding.source}: " if len(sources) > 1 and finding.source else ""
        grid.add_row(
            Text(finding.severity, style=style),
            Text(finding.code, style="bold"),
            as_text(where + finding.text),
        )
        if not _needs_nothing(finding):
            grid.add_row("", "", as_text(f"→ {CODES[finding.code].remedy}", "dim"))
    if check.findings:
        heading("Findings")
        console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def _needs_nothing(finding: Finding) -> bool:
    return CODES[finding.code].remedy.startswith("nothing need be done")


def print_verdict(check: DataCheck) -> None:
    """Print one line: how many errors and warnings there are, and how many rows were looked at."""
    errors, warnings, notes = (check.count(one) for one in ("error", "warning", "info"))
    counts = [(errors, "error"), (warnings, "warning"), (notes, "note")]
    said = ", ".join(f"{n} {name}{'s' if n != 1 else ''}" for n, name in counts)
    looked = f"{check.rows:,} row{'s' if check.rows != 1 else ''} checked: " if check.rows else ""
    style = "bold red" if errors else "yellow" if warnings else "green"
    console = open_console()
    console.print()
    console.print(as_text(f"{looked}{said}", style))


def print_lengths(lengths: Lengths, *, batch_size: int) -> None:
    """Print the table of lengths: a histogram, percentiles, and what a ``max_length`` cuts off."""
    heading("Lengths in tokens")
    console = open_console()
    bins = coarser(lengths.bins, _ROWS)
    longest = max(count for _, _, count in bins)
    grid = Table.grid(padding=(0, 2))
    for justify in ("right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    for low, high, count in bins:
        cut = low >= lengths.max_length
        grid.add_row(
            f"{low:,} – {high - 1:,}",
            f"{count:,}",
            Text(_bar(count / longest), style="dim" if cut else "cyan")
            + Text("  beyond max_length" if cut and count else "", style="dim"),
        )
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))
    console.print()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in length_facts(lengths, batch_size=batch_size):
        facts.add_row(as_text(name), as_text(value))
    console.print(Padding(facts, (0, 0, 0, 2), expand=False))


def _bar(share: float) -> str:
    """A bar in eighths of a character; a share that is not zero is never invisible."""
    eighths = max(round(8 * _BAR * share), bool(share))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def coarser(bins: Sequence[tuple[int, int, int]], most: int) -> list[tuple[int, int, int]]:
    """Join neighbouring bins in pairs until there are at most so many."""
    found = list(bins)
    while len(found) > most:
        pairs = [found[at : at + 2] for at in range(0, len(found), 2)]
        found = [(pair[0][0], pair[-1][1], sum(one[2] for one in pair)) for pair in pairs]
    return found


def length_facts(lengths: Lengths, *, batch_size: int) -> list[tuple[str, str]]:
    """Names and values of what the lengths of the data mean for a run."""
    shown = ", ".join(
        f"{length:,} ({'longest' if percentile == 100 else f'{percentile} %'})"
        for percentile, length in lengths.percentiles.items()
        if percentile >= 50
    )
    share = lengths.supervised / max(lengths.tokens, 1)
    facts = [
        ("at most", shown),
        (
            "an epoch",
            f"{lengths.tokens:,} tokens in {lengths.examples:,} examples, "
            f"{lengths.supervised:,} supervised ({percent(share)})",
        ),
    ]
    if batch_size > 1:
        padded = f"{percent(lengths.padding)} of the tokens if {batch_size} examples are padded"
        facts.append(("padding", f"{padded} to the longest"))
    fill = f"rows of max_length {lengths.max_length:,} would be {percent(lengths.packed)} full"
    facts.append(("packed", fill))
    for length, examples, supervised in lengths.choices:
        if supervised >= _MUCH:
            continue
        text = f"cuts off {percent(examples)} of the examples, "
        text += f"{percent(supervised)} of the supervised tokens"
        facts.append((f"max_length {length:,}", text if examples else "cuts off nothing"))
        if not examples:
            break
    if (enough := suggestion(lengths)) is not None:
        facts.append(("suggestion", enough))
    return facts


# Shares of the supervised tokens: more is not worth a line, less can be lost.
_MUCH, _LITTLE = 0.2, 0.005


def suggestion(lengths: Lengths) -> str | None:
    """A better ``max_length`` in words, or None if this one is good."""
    found = next(((n, cut) for n, _, cut in lengths.choices if cut <= _LITTLE), None)
    if found is None or found[0] == lengths.max_length:
        return None
    if lengths.positions is not None and found[0] > lengths.positions:
        return None  # HB303 would be next
    enough, cut = found
    said = f"cuts off {percent(cut)} of the supervised tokens" if cut else "cuts off nothing"
    longest = min(lengths.percentiles[100], lengths.max_length)
    if enough > lengths.max_length or 2 * enough <= longest:
        return f"max_length {enough:,} {said}"
    return None


def print_example(example: ShownExample) -> None:
    """Print an example token by token: ``│`` between tokens, ``[[`` and ``]]`` if supervised."""
    heading(example.title)
    shown = Text()
    for is_supervised, run in runs(shortened(example.pieces, _TOKENS_SHOWN)):
        style = "green" if is_supervised else "dim"
        shown.append("[[" if is_supervised else "", style="bold green")
        for number, piece in enumerate(run):
            shown.append("│" if number else "", style="dim")
            text = piece_text(piece)
            shown.append(printable(text), style=f"bold {style}" if piece.special else style)
        closed = "]]" if is_supervised else ""
        at_end = run[-1].text.endswith("\n")
        if at_end and closed:  # the bracket goes before the line break
            shown.right_crop(1)
        shown.append(closed, style="bold green")
        shown.append("\n" if at_end and closed else "")
    shown.rstrip()
    open_console().print(Padding(shown, (0, 0, 0, 2), expand=False))


def piece_text(piece: Piece) -> str:
    """The text of a token with its line breaks and tabs visible."""
    if piece.left_out:
        return f" … {piece.left_out:,} tokens … "
    return piece.text.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "⏎\n") or "∅"
