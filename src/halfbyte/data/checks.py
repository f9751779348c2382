"""Checks a data set before anything is trained on it, and reports what is found under codes.

Three passes, each in bounded memory: over the encoded examples (`example_checks`), over the
conversations (`row_checks`), and over the tokens of rows for near duplicates (`near_duplicates`).
The tokenizer and its chat template are probed (`tokenizer_checks`). What reading and encoding have
found already is taken from the report on the data and given its code here, not found again.

``halfbyte check`` looks at all rows, and ``halfbyte train`` at `TRAIN_ROWS` of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.check_codes import CODES, Severity
from halfbyte.data.dataset_report import DatasetReport, NothingUsable, by_reason
from halfbyte.data.example_checks import ExampleScan, Found, Lengths, lengths_of
from halfbyte.data.near_duplicates import near_duplicates
from halfbyte.data.row_checks import RowScan, first_match, repeated
from halfbyte.data.tokenizer_checks import (
    SpecialTokens,
    control_ids,
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
    train = _Look(dataset, tokenizer, options)
    held = None if held_out is None else _Look(held_out, tokenizer, options)
    passes = [_of_template(tokenizer)]  # generators: each makes its pass when its turn comes
    for look in (train, held):
        if look is not None:
            passes += [look.over_report(), look.over_examples(), look.over_rows()]
    passes.append(_duplicates(train, held))
    findings: list[Finding] = []
    for done, found in enumerate(passes, 1):
        findings += found
        if progress is not None:
            progress(done, len(passes))
    kept = _sorted(one for one in findings if one.code not in options.ignore)
    lengths = lengths_of(
        train.examples,
        max_length=options.max_length,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        positions=options.positions,
    )
    return DataCheck(kept, lengths, len(dataset.last_of_row), len(train.indices))


def check_unusable(error: NothingUsable, tokenizer: PreTrainedTokenizerBase) -> DataCheck:
    """The check of a data set without a single usable row."""
    found = [*_of_template(tokenizer)]
    found += _of_rejected(error.source, error.rows, by_reason(error.rejections))
    if not any(one.code == "HB201" for one in found):
        every = error.rows
        found.append(
            _finding("HB201", count=every, of=every, source=error.source, detail="no row is usable")
        )
    return DataCheck(_sorted(found))


def _of_template(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    for code, text in template_findings(tokenizer):
        yield _finding(code, detail=text)


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

    def over_report(self) -> Iterator[Finding]:
        """What reading and encoding have found."""
        return _of_report(self.data.report)

    def over_examples(self) -> Iterator[Finding]:
        """What the tokens say."""
        options = self.options
        indices = evenly(len(self.data.examples), options.most_rows)
        scan = self.examples = ExampleScan(
            self.data.examples,
            indices,
            self._ids,
            max_length=options.max_length,
            everything=options.everything,
        )
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
        special = SpecialTokens(self._tokenizer)
        self.rows = RowScan(self.data.rows, self.indices, special)
        for code, found in sorted(self.rows.found.items()):
            yield self.of(code, found, len(self.indices))
        tried, texts = text_findings(
            self._tokenizer, self.data.rows, self.indices, special, self._ids.unknown
        )
        for code, found in texts.items():
            if code != "HB601" or not self.examples.unknown.count:
                yield self.of(code, found, tried)


# Duplicates


def _duplicates(train: _Look, held: _Look | None) -> Iterator[Finding]:
    """What occurs twice in the training data, or in it and in the held-out data."""
    count = len(train.indices)
    exact = repeated(train.rows.hashes)
    yield from _alike("HB501", train, train, exact, count)
    unique = np.setdiff1d(np.arange(count), exact[:, 0])
    asked = unique[train.rows.prompts[unique] != 0]
    same = repeated(train.rows.prompts[asked])
    yield from _alike("HB503", train, train, asked[same], count)
    compared = unique[evenly(len(unique), NEAR_ROWS)]
    if held is None:
        near = near_duplicates(_Documents([(train, compared)]))
        yield from _alike("HB502", train, train, compared[near], len(compared))
        return

    of, origin = len(held.indices), first_match(held.rows.hashes, train.rows.hashes)
    both, rest = np.flatnonzero(origin >= 0), np.flatnonzero(origin < 0)
    yield from _alike("HB504", held, train, np.stack([both, origin[both]], axis=1), of)
    origin = first_match(held.rows.prompts[rest], train.rows.prompts[asked])
    like = {int(rest[at]): int(asked[origin[at]]) for at in np.flatnonzero(origin >= 0)}
    others = rest[evenly(len(rest), NEAR_ROWS)]
    near = near_duplicates(_Documents([(train, compared), (held, others)]))
    within, across = near[:, 0] < len(compared), near[:, 1] < len(compared)
    yield from _alike("HB502", train, train, compared[near[within]], len(compared))
    for later, earlier in near[across & ~within].tolist():
        like.setdefault(int(others[later - len(compared)]), int(compared[earlier]))
    pairs = np.array(sorted(like.items()), dtype=np.int64).reshape(-1, 2)
    yield from _alike("HB505", held, train, pairs, of)


class _Documents(Sequence[NDArray[np.int32]]):
    """The tokens of rows of data sets, one after the other, read when they are looked at."""

    def __init__(self, parts: Sequence[tuple[_Look, NDArray[np.int64]]]) -> None:
        self._parts = [(look.data, look.indices[chosen]) for look, chosen in parts]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self._parts)

    def __getitem__(self, at: Any) -> Any:
        for data, indices in self._parts:
            if at < len(indices):
                return data.examples[int(indices[at])].tokens
            at -= len(indices)
        raise IndexError(at)


def _alike(
    code: str, ours: _Look, others: _Look, pairs: NDArray[np.int64], of: int
) -> Iterator[Finding]:
    """A finding about rows, with a pair of lines as its instance; none without pairs.

    Args:
        code: The code.
        ours: Whose rows are counted.
        others: Whose rows they are like.
        pairs: int64 [m, 2], positions among the rows looked at.
        of: The number of rows compared.
    """
    if not len(pairs):
        return
    lines = ours.lines(ours.indices[pairs[:_SHOWN, 0]].tolist())
    (other,) = others.lines([int(others.indices[pairs[0, 1]])])
    detail = f"line {lines[0]} is like line {other}"
    if ours is not others:
        detail += f" of {others.source}"
    counts = {"count": len(pairs), "of": of}
    yield _finding(code, **counts, lines=lines, detail=detail, source=ours.source)


# What the report on the data has said already


class _Lines(Protocol):
    """The lines of rows, of which the first are looked at."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Sequence[str]: ...


_REASONS = (
    (r"nothing supervised within max_length", "HB302"),
    (r"nothing supervised|no assistant turn|no reply can be supervised", "HB201"),
    (r"empty content|empty text", "HB405"),
    (r"(the chat template|plain text) drops", "HB706"),
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
    yield from _of_rejected(source, report.rows, report.rejected)
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


def _lines(code: str, lines: _Lines, of: int, source: str) -> Finding:
    shown = tuple(lines[:_SHOWN])
    return _finding(code, count=len(lines), of=of, lines=shown, source=source, reported=True)


def _of_rejected(source: str, rows: int, rejected: Mapping[str, _Lines]) -> Iterator[Finding]:
    """One finding for each code; its detail is the most frequent reason.

    Args:
        source: The data set.
        rows: The number of its rows.
        rejected: For each reason the lines of the rows.
    """
    by_code: defaultdict[str, list[str]] = defaultdict(list)
    for reason in rejected:
        code = next((code for known, code in _REASONS if re.match(known, reason)), "HB101")
        by_code[code].append(reason)
    for code, reasons in by_code.items():
        reason = max(reasons, key=lambda one: len(rejected[one]))
        others = f", and {len(reasons) - 1} other reasons" if len(reasons) > 1 else ""
        yield _finding(
            code,
            count=sum(len(rejected[one]) for one in reasons),
            of=rows,
            lines=tuple([line for one in reasons for line in rejected[one][:_SHOWN]][:_SHOWN]),
            detail=f"left out: {reason}{others}",
            source=source,
            reported=True,
        )
