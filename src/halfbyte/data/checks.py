"""Checks a data set before anything is trained on it, and reports what is found under codes.

Three passes, each in bounded memory: over the encoded examples (`example_checks`), over the
conversations (`row_checks`), and over the tokens of rows for near duplicates (`near_duplicates`).
The tokenizer and its chat template are probed (`tokenizer_checks`). What reading and encoding have
found already is taken from the report on the data and given its code here, not found again.

``halfbyte check`` looks at all rows, and ``halfbyte train`` at `TRAIN_ROWS` of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.check_codes import CODES, Severity
from halfbyte.data.dataset_report import DatasetReport, NothingUsable, Rejection
from halfbyte.data.example_checks import ExampleScan, Found, Lengths, lengths_of
from halfbyte.data.near_duplicates import near_duplicates
from halfbyte.data.row_checks import RowScan, first_match, repeated
from halfbyte.data.tokenizer_checks import (
    control_ids,
    control_pattern,
    template_findings,
    text_findings,
)
from halfbyte.foreign_text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halfbyte.data import Dataset

TRAIN_ROWS = 2000
"""Rows of a data set that a run looks at before it trains, evenly chosen."""

NEAR_ROWS = 100_000
"""Rows of a data set that are compared for near duplicates, evenly chosen."""

_SHOWN = 5
_ORDER: tuple[Severity, ...] = ("error", "warning", "info")
_FEW_SUPERVISED = 0.02
_OUTLIER = 4  # times the 99th percentile


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        code: Its code in `CODES`.
        severity: As `CODES` says, or an error if it is that frequent.
        count: How often; 0 if it is not about rows, replies or examples.
        of: Of how many.
        unit: What is counted.
        lines: The first lines of the data.
        detail: An instance, or a reason.
        source: The data set; empty for the tokenizer and the model.
        reported: Whether the report on the data says it too.
    """

    code: str
    severity: Severity
    count: int = 0
    of: int = 0
    unit: str = "rows"
    lines: tuple[str, ...] = ()
    detail: str = ""
    source: str = ""
    reported: bool = False

    @property
    def share(self) -> float | None:
        """The share of those looked at."""
        return self.count / self.of if self.of else None

    @property
    def text(self) -> str:
        """What was found, in one line, without the code."""
        title = CODES[self.code].title
        counts = f": {self.counted}" if self.count else ""
        return f"{title}{counts}" + (f"; {self.detail}" if self.detail else "")

    @property
    def counted(self) -> str:
        """``3 of 200 rows (1.5 %), lines 4, 7, 9``; empty if nothing was counted."""
        if not self.count:
            return ""
        unit = self.unit.removesuffix("s") if self.of == 1 else self.unit
        text = f"{self.count:,} of {self.of:,} {unit} ({percent(self.share or 0.0)})"
        if self.lines:
            more = ", …" if self.count > len(self.lines) else ""
            text += f", line{'s' if len(self.lines) > 1 else ''} {', '.join(self.lines)}{more}"
        return text

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values, with its remedy."""
        return {
            "code": self.code,
            "severity": self.severity,
            "title": CODES[self.code].title,
            "text": self.text,
            "source": self.source,
            "count": self.count,
            "of": self.of,
            "unit": self.unit,
            "share": self.share,
            "lines": list(self.lines),
            "detail": self.detail,
            "remedy": CODES[self.code].remedy,
        }


def percent(share: float) -> str:
    """``12 %``, ``1.5 %`` or ``0.02 %``: two digits, and never rounded to nothing or to all."""
    value = 100 * share
    if not 0.01 <= value <= 99.9:
        return "0 %" if not value else "100 %" if value == 100 else _NEARLY[value > 1]
    digits = 2 if value < 1 else 1 if value < 10 or value >= 99.5 else 0
    return f"{value:.{digits}f} %"


_NEARLY = ("< 0.01 %", "> 99.9 %")


@dataclass(frozen=True)
class DataCheck:
    """The result of a check.

    Attributes:
        findings: Errors first, then warnings, in the order of their codes.
        lengths: The lengths of the training examples; None if there are none.
        rows: Usable training rows.
        looked_at: Of these, rows that were looked at.
    """

    findings: tuple[Finding, ...]
    lengths: Lengths | None = None
    rows: int = 0
    looked_at: int = 0

    def count(self, severity: Severity) -> int:
        """The number of findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The findings and their numbers as JSON values."""
        return {
            "findings": [finding.as_json() for finding in self.findings],
            **{f"{severity}s": self.count(severity) for severity in ("error", "warning")},
            "rows": self.rows,
            "looked_at": self.looked_at,
        }


@dataclass(frozen=True)
class CheckOptions:
    """How the data would be trained on.

    Attributes:
        max_length: Longer examples are truncated.
        everything: Whether all tokens are supervised.
        positions: Positions that the model was made for, if known.
        batch_size: Examples of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step.
        most_rows: Rows to look at; None for all.
        ignore: Codes that are not reported.
    """

    max_length: int
    everything: bool = False
    positions: int | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 8
    most_rows: int | None = None
    ignore: tuple[str, ...] = ()


def check_data(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: CheckOptions,
    *,
    held_out: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Check a data set, and held-out data against it.

    If the data was loaded with a larger ``max_length`` than that of the options, it is known what
    the smaller one would cut off.

    Args:
        dataset: The training data.
        tokenizer: The tokenizer that encoded it.
        options: How it would be trained on.
        held_out: The data to evaluate on.
        progress: Called with (passes done, passes).

    Raises:
        DataError: The chat template is not valid.
    """
    sets = [dataset] if held_out is None else [dataset, held_out]
    passes = 3 * len(sets)
    said = progress or (lambda done, total: None)
    findings = [_finding(code, detail=text) for code, text in template_findings(tokenizer)]
    looks: list[_Look] = []
    for number, data in enumerate(sets):
        look = _Look(data, tokenizer, options)
        looks.append(look)
        for step in range(2):
            said(3 * number + step, passes)
            findings += look.over_examples() if step == 0 else look.over_rows()
    said(passes - 1, passes)
    findings += _duplicates(looks)
    said(passes, passes)
    kept = _sorted(one for one in findings if one.code not in options.ignore)
    first = looks[0]
    lengths = lengths_of(
        first.examples,
        max_length=options.max_length,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
    )
    return DataCheck(kept, lengths, len(dataset.last_of_row), len(first.indices))


def check_unusable(error: NothingUsable, tokenizer: PreTrainedTokenizerBase) -> DataCheck:
    """The check of a data set without a single usable row."""
    found = [_finding(code, detail=text) for code, text in template_findings(tokenizer)]
    found += _of_rejections(error.source, error.rows, error.rejections)
    if not any(one.code == "HB201" for one in found):
        every = error.rows
        found.append(
            _finding("HB201", count=every, of=every, source=error.source, detail="no row is usable")
        )
    return DataCheck(_sorted(found))


def _sorted(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda one: (_ORDER.index(one.severity), one.code)))


def _finding(code: str, *, count: int = 0, of: int = 0, **more: Any) -> Finding:
    known = CODES[code]
    severity = known.severity
    if known.error_from is not None and of and count / of >= known.error_from:
        severity = "error"
    return Finding(code, severity, count=count, of=of, **more)


def evenly(count: int, most: int | None) -> NDArray[np.int64]:
    """Indices below ``count``: all, or ``most`` of them at equal distances."""
    if most is None or most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).astype(np.int64)


class _Look:
    """The passes over one data set."""

    def __init__(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, options: CheckOptions
    ) -> None:
        self.data, self.options = data, options
        self.source = data.report.source
        self._tokenizer, self._ids = tokenizer, control_ids(tokenizer)
        chosen = evenly(len(data.last_of_row), options.most_rows)
        self.indices = np.asarray(data.last_of_row, dtype=np.int64)[chosen]
        self.examples: ExampleScan
        self.rows: RowScan

    def lines(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The lines of these examples' rows."""
        return tuple(self.data.rows[index].line for index in indices[:_SHOWN])

    def of(self, code: str, found: Found, of: int, unit: str = "rows", **more: Any) -> Finding:
        """A finding with lines."""
        found_lines = self.lines(list(dict.fromkeys(found.first)))
        more = {"detail": found.instance, "lines": found_lines} | more
        return _finding(code, count=found.count, of=of, unit=unit, source=self.source, **more)

    def over_examples(self) -> Iterator[Finding]:
        """What the report on the data and the tokens say."""
        options, report = self.options, self.data.report
        indices = evenly(len(self.data.examples), options.most_rows)
        scan = self.examples = ExampleScan(
            self.data.examples,
            indices,
            self._ids,
            max_length=options.max_length,
            everything=options.everything,
        )
        yield from _of_report(report)
        count = len(indices)
        if scan.unended.count:
            yield self.of("HB202", scan.unended, scan.whole, "replies")
        if scan.two_bos.count:
            yield self.of("HB701", scan.two_bos, count, "examples")
        if scan.unknown.count:
            yield self.of("HB601", scan.unknown, count, "examples")
        yield from self._over_lengths(scan)

    def _over_lengths(self, scan: ExampleScan) -> Iterator[Finding]:
        options, count = self.options, len(scan.indices)
        lengths = np.minimum(scan.lengths, options.max_length)
        total, within = int(scan.supervised.sum()), scan.supervised_within
        if scan.cut.count:
            yield self.of(
                "HB301",
                scan.cut,
                count,
                "examples",
                detail=f"with {percent(1 - within / total)} of the supervised tokens",
            )
        if scan.lost.count:
            yield self.of("HB302", scan.lost, scan.replies, "replies")
        share = within / int(lengths.sum())
        if share < _FEW_SUPERVISED:
            yield _finding("HB203", source=self.source, detail=f"{percent(share)} of all tokens")
        if options.positions is not None:
            over = scan.indices[lengths > options.positions]
            if len(over):
                found = Found(len(over), over[:_SHOWN].tolist(), f"it has {options.positions:,}")
                yield self.of("HB303", found, count, "examples")
        usual = int(np.percentile(lengths, 99, method="inverted_cdf"))
        over = scan.indices[lengths > _OUTLIER * usual]
        if len(over):
            text = f"99 % have at most {usual:,} tokens, the longest {int(lengths.max()):,}"
            yield self.of(
                "HB304", Found(len(over), over[:_SHOWN].tolist(), text), count, "examples"
            )

    def over_rows(self) -> Iterator[Finding]:
        """What the conversations say."""
        controls = control_pattern(self._tokenizer)
        self.rows = RowScan(self.data.rows, self.indices, controls)
        for code, found in sorted(self.rows.found.items()):
            yield self.of(code, found, len(self.indices))
        tried, texts = text_findings(
            self._tokenizer, self.data.rows, self.indices, controls, self._ids.unknown
        )
        for code, found in texts.items():
            if code != "HB601" or not self.examples.unknown.count:
                yield self.of(code, found, tried)


# Duplicates


def _duplicates(looks: Sequence[_Look]) -> Iterator[Finding]:
    """What occurs twice in the training data, or in it and in the held-out data."""
    train = looks[0]
    count = len(train.indices)
    exact = repeated(train.rows.hashes)
    if len(exact):
        yield _pairs("HB501", train, train, exact, count)
    unique = np.setdiff1d(np.arange(count), exact[:, 0])
    hashes, prompts = train.rows.hashes[unique], train.rows.prompts[unique]
    asked = unique[prompts != 0]
    same = repeated(train.rows.prompts[asked])
    if len(same):
        yield _pairs("HB503", train, train, asked[same], count)
    held = looks[-1] if len(looks) > 1 else None
    near_train = unique[evenly(len(unique), NEAR_ROWS)]
    documents = _Documents(train, near_train)
    if held is None:
        near = near_duplicates(documents)
        yield from _near("HB502", train, train, near_train[near], len(near_train))
        return
    origin = first_match(held.rows.hashes, hashes)
    both = np.flatnonzero(origin >= 0)
    if len(both):
        pairs = np.stack([both, unique[origin[both]]], axis=1)
        yield _pairs("HB504", held, train, pairs, len(held.indices))
    rest = np.flatnonzero(origin < 0)
    origin = first_match(held.rows.prompts[rest], prompts)
    asked = np.flatnonzero((origin >= 0) & (held.rows.prompts[rest] != 0))
    like = dict(zip(rest[asked].tolist(), unique[origin[asked]].tolist(), strict=True))
    near_held = rest[evenly(len(rest), NEAR_ROWS)]
    pairs = near_duplicates(_Documents(train, near_train, held, near_held))
    later, earlier = pairs[:, 0], pairs[:, 1]
    within = later < len(near_train)
    yield from _near("HB502", train, train, near_train[pairs[within]], len(near_train))
    across = ~within & (earlier < len(near_train))
    for at, other in zip(later[across], earlier[across], strict=True):
        like.setdefault(int(near_held[at - len(near_train)]), int(near_train[other]))
    yield from _near("HB505", held, train, np.array(sorted(like.items())), len(held.indices))


class _Documents(Sequence[NDArray[np.int32]]):
    """The tokens of rows of one or two data sets, one after the other."""

    def __init__(self, *parts: Any) -> None:
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        self._sets = [(look, look.indices[chosen]) for look, chosen in pairs]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self._sets)

    def __getitem__(self, at: Any) -> Any:
        for look, indices in self._sets:
            if at < len(indices):
                return look.data.examples[int(indices[at])].tokens
            at -= len(indices)
        raise IndexError(at)


def _near(
    code: str, ours: _Look, others: _Look, pairs: NDArray[np.int64], of: int
) -> Iterator[Finding]:
    if len(pairs):
        yield _pairs(code, ours, others, pairs, of)


def _pairs(code: str, ours: _Look, others: _Look, pairs: NDArray[np.int64], of: int) -> Finding:
    """A finding about rows, with a pair of lines as its instance.

    Args:
        code: The code.
        ours: Whose rows are counted.
        others: Whose rows they are like.
        pairs: int64 [m, 2], positions among the rows looked at.
        of: The number of rows compared.
    """
    (line,) = ours.lines([int(ours.indices[pairs[0, 0]])])
    (other,) = others.lines([int(others.indices[pairs[0, 1]])])
    lines = ours.lines(ours.indices[pairs[:_SHOWN, 0]].tolist())
    like = f"line {line} is like line {other}" + ("" if ours is others else f" of {others.source}")
    return _finding(code, count=len(pairs), of=of, lines=lines, detail=like, source=ours.source)


# What the report on the data has said already

_REASONS = (
    (r"nothing supervised within max_length", "HB302"),
    (r"nothing supervised|no assistant turn|no reply can be supervised", "HB201"),
    (r"empty content|empty text", "HB405"),
    (r"the chat template rejects it", "HB714"),
)
_NOTES = (
    (r"keys that are not used", "HB102"),
    (r"no token ends the reply", ""),  # found in the tokens
    (r"the tokenizer has no EOS", ""),
    (r"a reply is not supervised", "HB204"),
    (r"a token merges the prompt's end", "HB206"),
    (r"the chat template itself writes BOS twice", ""),  # found in the tokens
    (r"the chat template writes no BOS", "HB702"),
    (r"the chat template writes today's date", "HB705"),
    (r"(the chat template|plain text) drops", "HB706"),
    (r"the chat template changes the text of a reply", "HB707"),
    (r"the chat template adds to rows", "HB708"),
    (r"the tokenizer has no chat template", "HB709"),
    (r"arguments of tool calls are given", "HB711"),
)
_COUNTED = re.compile(r": ([\d,]+) rows? \(lines? ([^()]*?)(?:, …)?\)$")


def _of_report(report: DatasetReport) -> Iterator[Finding]:
    """The findings of reading and encoding, under their codes."""
    source = report.source
    yield from _of_rejections(source, report.rows, report.rejections)
    if len(report.split_lines):
        yield _lines("HB205", report.split_lines, report.usable, source)
    if len(report.truncated_lines):
        yield _lines("HB301", report.truncated_lines, report.usable, source)
    for note in report.notes:
        code = next((code for known, code in _NOTES if re.match(known, note)), "HB103")
        if not code:
            continue
        counts = _COUNTED.search(note)
        text = note[: counts.start()] if counts else note
        count = int(counts[1].replace(",", "")) if counts else 0
        yield _finding(
            code,
            count=count,
            of=report.rows if count else 0,
            lines=tuple(counts[2].split(", ")) if counts else (),
            detail=shorten(text.partition(": ")[2] or text, 200),
            source=source,
            reported=True,
        )


def _lines(code: str, lines: Sequence[str], of: int, source: str) -> Finding:
    shown = tuple(lines[:_SHOWN])
    return _finding(code, count=len(lines), of=of, lines=shown, source=source, reported=True)


def _of_rejections(source: str, rows: int, rejections: Sequence[Rejection]) -> Iterator[Finding]:
    """One finding for each code; its detail is the most frequent reason."""
    by_code: dict[str, dict[str, list[str]]] = {}
    for line, reason, _ in rejections:
        code = next((code for known, code in _REASONS if re.match(known, reason)), "HB101")
        by_code.setdefault(code, {}).setdefault(reason, []).append(line)
    for code, reasons in by_code.items():
        lines = [line for found in reasons.values() for line in found]
        reason = max(reasons, key=lambda one: len(reasons[one]))
        others = f", and {len(reasons) - 1} other reasons" if len(reasons) > 1 else ""
        yield _finding(
            code,
            count=len(lines),
            of=rows,
            lines=tuple(lines[:_SHOWN]),
            detail=f"left out: {reason}{others}",
            source=source,
            reported=True,
        )
