"""An HTML page about one or more runs: a single, self-contained file.

Style and script are inlined and nothing is loaded; a content security policy forbids the page to
load anything or to run any other script (by the hash of ours), whatever a journal contains. All
text is passed through ``html.escape``.
"""

import base64
import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from halfbyte.atomic import new_file, output_errors
from halfbyte.errors import OutputError
from halfbyte.input_files import open_file
from halfbyte.report.charts import (
    Bar,
    Series,
    bar_chart,
    line_chart,
    memory,
    plain,
    smoothed,
    table,
)
from halfbyte.report.findings import findings_list
from halfbyte.report.live import duration
from halfbyte.report.runs import Run, mapping, number, read_run, started, texts

_SHOWN_WARNINGS = 8
_KINDS = {
    "nf4": "QLoRA, NF4",
    "fp4": "QLoRA, FP4",
    "mxfp4": "LoRA, experts in MXFP4",
    "none": "LoRA, 16 or 32 bits",
}


def resource(name: str) -> str:
    """A style or a script of ours."""
    return (files("halfbyte.report") / name).read_text("utf-8")


def content_policy(*scripts: str) -> str:
    """A content security policy: nothing is loaded, and no other script runs than these."""
    digests = [hashlib.sha256(one.encode()).digest() for one in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"


def document(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: Plain text.
        body: HTML.
    """
    style, script = resource("page.css"), resource("page.js")
    policy = content_policy(script)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def write_page(directories: Sequence[str | Path], output: Path) -> Path:
    """Write the page about the runs in ``directories`` to ``output``, and return that.

    Raises:
        ConfigError: A directory holds no journal.
        OutputError: The page cannot be written, or another file has its name.
    """
    require_page(output)
    # A journal may hold half a surrogate pair, which JSON can say and UTF-8 cannot.
    content = page([read_run(one) for one in directories]).encode(errors="replace")
    with new_file(output) as file:
        file.write(content)
    return output


def require_page(path: Path) -> None:
    """Check that a page may be written to ``path``: there is no file, or one of `document`.

    Raises:
        OutputError: There is another file.
    """
    if not os.path.lexists(path):
        return
    with output_errors(path), open_file(path) as file:
        ours = b"halfbyte</title>" in file.read(4096)
    if not ours:
        raise OutputError(
            f"{path} is not a page of halfbyte, so it is not replaced: give another file"
        )


def page(runs: Sequence[Run]) -> str:
    """The page about ``runs``."""
    title, body = contents(runs)
    return document(title, body)


def contents(runs: Sequence[Run]) -> tuple[str, str]:
    """The title of the page about ``runs``, plain text, and its body, HTML."""
    if len(runs) == 1:
        return f"{runs[0].name} · halfbyte", _head(runs[0]) + _single(runs[0])
    _name_apart(runs)
    parts = [
        f"<header><h1>{len(runs)} runs</h1>{_states(runs)}</header>",
        _overview(runs),
        section("Curves", curves(runs)),
        section("Memory", _memory(runs)),
        section("Time", _time(runs)),
        section("Where their options differ", _differences(runs)),
        *(
            f"<details><summary><strong>{escape(run.name)}</strong></summary>"
            f"{_warnings(run)}{_answers(run)}{_data(run)}{_again(run)}{_notes(run)}</details>"
            for run in runs
        ),
    ]
    return f"{len(runs)} runs · halfbyte", "\n".join(parts)


def section(title: str, body: str) -> str:
    """A section of the page; empty without content."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def key_figures(figures: Iterable[tuple[str, str | None]]) -> str:
    """The most important names and values; those without a value are left out."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in figures
        if value
    )
    return f'<dl class="key">{cells}</dl>'


def curves(runs: Sequence[Run]) -> str:
    """Loss, learning rate, speed and gradient norm, of one run or of several in one chart."""
    alone = len(runs) == 1
    loss: list[Series] = []
    for color, run in enumerate(runs):
        points, name = run.curves["loss"], "training" if alone else run.name
        if alone:
            loss.append(Series("each step", points, color, "faint"))
        loss.append(Series(name, smoothed(points), color))
        held_out = Series("held-out" if alone else f"{name}, held-out", run.held_out, color, "dots")
        loss.append(Series(held_out.name, held_out.points, 1, "dots") if alone else held_out)

    def of(curve: str) -> list[Series]:
        return [
            Series(curve.replace("_", " ") if alone else run.name, run.curves[curve], color)
            for color, run in enumerate(runs)
        ]

    charts = [
        line_chart("Loss", f"nats per token, smoothed{'' if alone else '; dots: held-out'}", loss),
        line_chart("Speed", "tokens a second", of("tokens_per_second"), from_zero=True),
        line_chart("Learning rate", "of the update", of("learning_rate"), from_zero=True),
        line_chart("Gradient norm", "before clipping", of("grad_norm"), from_zero=True),
    ]
    if any(moved for run in runs for _, moved in run.curves["paged_bytes"]):
        moved, waited = of("paged_bytes"), of("paging_ms")
        charts.append(line_chart("Optimizer state moved", "bytes a step", moved, say=memory))
        charts.append(line_chart("Waiting for it", "milliseconds a step", waited, from_zero=True))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _single(run: Run) -> str:
    return "\n".join(
        [
            section("Curves", curves([run])),
            section("Memory", _memory([run])),
            section("Time", _time([run])),
            _answers(run),
            _data(run),
            _again(run),
            _notes(run),
        ]
    )


def _said(value: float | None, say: Callable[[float], str]) -> str | None:
    return None if value is None else say(value)


def _figures(run: Run) -> list[tuple[str, str | None]]:
    total = number(run.begin.get("total_steps"))
    spent = sum(run.seconds.values())
    return [
        ("training loss", _said(run.last("loss"), "{:.4f}".format)),
        ("held-out loss", _said(run.last("held_out"), "{:.4f}".format)),
        ("tokens a second", _said(run.tokens_per_second, "{:,.0f}".format)),
        ("peak memory", _said(run.peak_bytes, memory)),
        ("steps", f"{run.steps:,}" + (f" of {total:,.0f}" if total else "")),
        ("time", duration(spent) if spent else None),
        ("time left, about", _said(run.seconds_left, _roughly) if _runs(run) else None),
    ]


def _runs(run: Run) -> bool:
    return run.phase == "running"


def _roughly(seconds: float) -> str:
    """A duration without the digits that a forecast cannot have."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5)) * 5} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _head(run: Run) -> str:
    begin = run.begin
    kind = _KINDS.get(str(begin.get("quant")), "")
    said = [begin.get("model"), kind, begin.get("machine") or begin.get("device"), started(run)]
    state = f'<p class="state {escape(run.phase)}">{escape(run.state)}</p>' + _progress(run)
    state += _warnings(run)
    return (
        f'<header><h1>{escape(run.name)}</h1><p class="soft">'
        + " · ".join(escape(str(one)) for one in said if one)
        + f"</p>{state}{key_figures(_figures(run))}</header>"
    )


def _progress(run: Run) -> str:
    total = number(run.begin.get("total_steps"))
    if not total or not _runs(run):
        return ""
    share = min(1.0, run.steps / total)
    return (
        f'<progress max="{total:.0f}" value="{run.steps}" '
        f'aria-label="Steps made by {escape(run.name)}">{share:.0%}</progress>'
    )


def _warnings(run: Run) -> str:
    """The first warnings of a run; the journal has the others."""
    shown = "".join(
        f'<p class="warning">{escape(one)}</p>' for one in run.warnings[:_SHOWN_WARNINGS]
    )
    more = len(run.warnings) - _SHOWN_WARNINGS
    return shown + (f'<p class="warning">and {more} more, in the journal</p>' if more > 0 else "")


def _overview(runs: Sequence[Run]) -> str:
    figures = [_figures(run) for run in runs]
    known = [at for at, _ in enumerate(figures[0]) if any(one[at][1] for one in figures)]
    heads = ["run", *(figures[0][at][0] for at in known)]
    rows = [
        [run.name, *(one[at][1] or "–" for at in known)]
        for run, one in zip(runs, figures, strict=True)
    ]
    return section("At a glance", table(heads, rows, "one run per row"))


def _states(runs: Sequence[Run]) -> str:
    items = "".join(
        f'<li class="state {escape(run.phase)}">{escape(run.name)}: {escape(_state(run))}'
        f"{_progress(run)}</li>"
        for run in runs
    )
    return f'<ul class="states">{items}</ul>'


def _state(run: Run) -> str:
    count = len(run.warnings)
    return run.state + (f"; {count} warning{'s' if count > 1 else ''}" if count else "")


def _memory(runs: Sequence[Run]) -> str:
    bars, sentences = [], []
    for run in runs:
        before = "" if len(runs) == 1 else f"{run.name}, "
        expected = sum(nbytes for _, nbytes in run.predicted)
        if expected:
            bars.append(Bar(f"{before}expected", run.predicted))
        loaded = number(run.loaded.get("peak_memory_bytes"))
        if loaded is not None and loaded > 0:
            bars.append(Bar(f"{before}peak of loading", [("measured", loaded)]))
        if run.peak_bytes is not None and run.peak_bytes > 0:
            bars.append(Bar(f"{before}peak of training", [("measured", run.peak_bytes)]))
            if expected:
                off = run.peak_bytes / expected - 1
                sentences.append(
                    f"{before}{memory(expected)} expected, {memory(run.peak_bytes)} measured: "
                    f"{abs(off):.1%} {'more' if off > 0 else 'less'}."
                )
    return _sentences(sentences) + bar_chart(
        "Expected and measured", "in decimal units", bars, say=memory
    )


def _time(runs: Sequence[Run]) -> str:
    bars = [
        Bar("whole run" if len(runs) == 1 else run.name, list(run.seconds.items()))
        for run in runs
        if run.seconds
    ]
    sentences = []
    if len(runs) == 1 and (spent := sum(runs[0].seconds.values())):
        shares = sorted(runs[0].seconds.items(), key=lambda item: -item[1])
        shares = [(name, taken / spent) for name, taken in shares if taken / spent >= 0.005]
        sentences = [", ".join(f"{name} {share:.0%}" for name, share in shares) + "."]
    steps = [
        Bar("average step" if len(runs) == 1 else run.name, list(run.step_seconds.items()))
        for run in runs
        if run.steps
    ]
    return (
        _sentences(sentences)
        + '<div class="charts">'
        + bar_chart("The whole run", "by activity", bars, say=duration)
        + bar_chart("A step", "on average", steps, say=_short)
        + "</div>"
        if bars
        else ""
    )


def _short(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds < 1 else duration(seconds)


def _sentences(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(one)}</p>" for one in sentences)


def _answers(run: Run) -> str:
    found = []
    for sample in run.samples:
        answers = sample["answers"]
        expected = sample["expected"]
        shown = "".join(
            f"<dt>{'before' if step == 0 else f'after {step:,}'}</dt>"
            f"<dd{_mark(got, expected)}>{_text(got)}</dd>"
            for step, got in answers.items()
        )
        shown += f"<dt>expected</dt><dd>{_text(expected)}</dd>"
        found.append(
            f'<div class="sample"><blockquote>{_text(sample["prompt"])}</blockquote>'
            f"<dl>{shown}</dl></div>"
        )
    if not found:
        return ""
    message = '<p class="soft">Greedy answers of at most 48 tokens, before training and after.</p>'
    return section("Answers", message + "".join(found))


def _mark(got: str, expected: str) -> str:
    return ' class="right"' if got.strip() == expected.strip() else ""


def _text(text: str) -> str:
    return escape(text.strip()) or '<span class="nothing">nothing</span>'


def _data(run: Run) -> str:
    body = ""
    for name, field in (("Training", "data_verdict"), ("Held out", "held_out_verdict")):
        report = mapping(run.begin.get(field))
        if lines := texts(report.get("lines")):
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            body += f'<h3>{name}</h3><ul class="notes">{items}</ul>{_rejected(report)}'
    if found := findings_list(run.begin.get("data_check")):
        body += f"<h3>Findings</h3>{found}"
    return section("Data", body)


def _rejected(report: dict[str, Any]) -> str:
    """Every reason for which rows were left out, with their first lines."""
    found = report.get("rejected")
    rows = [
        [str(one.get("reason")), _value(one.get("rows")), ", ".join(texts(one.get("lines")))]
        for one in map(mapping, found if isinstance(found, list) else [])
    ]
    if not rows:
        return ""
    listed = table(["reason", "rows", "first lines"], rows, "rows that were left out")
    return f"<details><summary>Rows left out</summary>{listed}</details>"


def _again(run: Run) -> str:
    config = mapping(run.begin.get("config"))
    versions = mapping(run.begin.get("versions"))
    body = ""
    if config:
        file = shlex.quote(os.path.join(run.path, "config.yaml"))
        on_gpu = run.begin.get("device") == "cuda"
        same = f"On the same kind of {'GPU' if on_gpu else 'processor'}, with the same versions, "
        same += "every loss is the same"
        if on_gpu and not config.get("deterministic"):
            same += " but for the order of sums; with --deterministic, to the bit"
        body += (
            f"<pre>halfbyte train {escape(file)} --output again</pre>"
            f'<p class="soft">{same}. Options that were given are bold.</p>'
        )
        given = set(texts(run.begin.get("given")))
        body += "<details><summary>All options</summary>" + _options(config, given) + "</details>"
    if versions:
        body += "<details><summary>Versions</summary>" + _options(versions, set()) + "</details>"
    return section("How to reproduce it", body)


def _options(values: dict[str, Any], given: set[str]) -> str:
    rows = "".join(
        f'<tr{" class=given" if name in given else ""}><th scope="row">{escape(str(name))}</th>'
        f"<td>{escape(_value(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<div class="wide"><table class="options"><tbody>{rows}</tbody></table></div>'


def _value(value: Any) -> str:
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if (as_number := number(value)) is not None:
        return plain(as_number) if isinstance(value, float) else str(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(runs: Sequence[Run]) -> str:
    configs = [mapping(run.begin.get("config")) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = [
        [name, *(_value(config.get(name)) for config in configs)]
        for name in names
        if name != "output" and len({repr(config.get(name)) for config in configs}) > 1
    ]
    if not rows:
        return "<p>They were run with the same options.</p>" if names else ""
    return table(["option", *(run.name for run in runs)], rows, "options that differ")


def _notes(run: Run) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    listed = f'<details><summary>{len(run.notes)} lines</summary><ul class="notes">{items}</ul>'
    return section("What was said", f"{listed}</details>" if items else "")


def _name_apart(runs: Sequence[Run]) -> None:
    """Name runs by the shortest unique parts of their paths."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        paths = [os.path.abspath(run.path) for run in runs]
        shared = os.path.commonpath(paths)
        for run, path in zip(runs, paths, strict=True):
            run.name = os.path.relpath(path, shared)
