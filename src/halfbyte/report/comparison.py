"""The result of a comparison: values of each variant and seed, a table, a sentence, a page.

Everything is read from the runs' own files, so it does not matter whether a comparison was
interrupted, or its runs were made at different times.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

from halfbyte.checkpoint.reading import read_json
from halfbyte.report.charts import Bar, bar_chart, dot_chart, memory, table
from halfbyte.report.page import curves, document, section
from halfbyte.report.runs import Run, number, read_run

EVALUATION = "eval.json"
_ADAPTER = "adapter_model.safetensors"

# Two-sided 95 % points of Student's t for 1 … 9 degrees of freedom; above, 2.2 errs to caution.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Result:
    """One variant trained with one seed. Values not measured are None.

    Attributes:
        variant: Its name.
        seed: Its seed.
        load_peak: Peak of bytes in use while loading the base model: of the process, or on the GPU.
        load_reserved: Bytes reserved by torch on the GPU at that point.
        train_peak: Peak of bytes in use until the end.
        train_reserved: Peak of bytes reserved by torch on the GPU.
        tokens_per_second: Without the first few steps.
        held_out_loss: At the end.
        exact_match: Share of held-out cases answered exactly.
        adapter_bytes: The adapter on disk.
        base_bytes: The base model in its stored form, in memory or on disk.
        failure: The reason if there is no result.
    """

    variant: str
    seed: int
    load_peak: float | None = None
    load_reserved: float | None = None
    train_peak: float | None = None
    train_reserved: float | None = None
    tokens_per_second: float | None = None
    held_out_loss: float | None = None
    exact_match: float | None = None
    adapter_bytes: float | None = None
    base_bytes: float | None = None
    failure: str | None = None


def read_result(variant: str, seed: int, run: Run) -> Result:
    """Read the files of a finished run."""
    file, adapter = run.path / EVALUATION, run.path / _ADAPTER
    evaluated = read_json(file, "`eval --json` writes it") if file.exists() else {}
    return Result(
        variant=variant,
        seed=seed,
        load_peak=number(run.loaded.get("peak_memory_bytes")),
        load_reserved=number(run.loaded.get("reserved_bytes")),
        train_peak=run.peak_bytes,
        train_reserved=number(run.finish.get("reserved_bytes")),
        tokens_per_second=run.tokens_per_second,
        held_out_loss=run.last("held_out"),
        exact_match=number(evaluated.get("exact_match")),
        adapter_bytes=float(adapter.stat().st_size) if adapter.exists() else None,
        base_bytes=number(run.begin.get("base_bytes")),
    )


@dataclass(frozen=True)
class Measure:
    """A field of ``Result``, its name, and how it is written; of ``worst`` ones the most counts."""

    field: str
    name: str
    say: Callable[[float], str]
    worst: bool = False


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


MEASURES = (
    Measure("load_peak", "peak at load", memory, worst=True),
    Measure("load_reserved", "reserved at load", memory, worst=True),
    Measure("train_peak", "peak in training", memory, worst=True),
    Measure("train_reserved", "reserved in training", memory, worst=True),
    Measure("tokens_per_second", "tokens/s", "{:,.0f}".format),
    Measure("held_out_loss", "held-out loss", "{:.4f}".format),
    Measure("exact_match", "exact match", _percent),
    Measure("adapter_bytes", "adapter", memory, worst=True),
    Measure("base_bytes", "base", memory, worst=True),
)


@dataclass(frozen=True)
class Comparison:
    """All results, in the order of the variants."""

    results: tuple[Result, ...]

    @property
    def variants(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(result.variant for result in self.results))

    def values(self, variant: str, field: str) -> list[float]:
        """The values of a measurement of a variant, by seed."""
        found = [getattr(one, field) for one in self.results if one.variant == variant]
        return [value for value in found if value is not None]

    def typical(self, variant: str, field: str) -> float | None:
        """The mean over seeds, or the maximum if the worst counts."""
        values = self.values(variant, field)
        worst = next(measure.worst for measure in MEASURES if measure.field == field)
        return None if not values else max(values) if worst else fmean(values)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table, without empty rows."""
        return ["", *self.variants], [
            [measure.name, *(self._cell(variant, measure) for variant in self.variants)]
            for measure in MEASURES
            if any(self.values(variant, measure.field) for variant in self.variants)
        ]

    def _cell(self, variant: str, measure: Measure) -> str:
        value = self.typical(variant, measure.field)
        if value is None:
            return "–"
        values = self.values(variant, measure.field)
        spread = len(values) > 1 and not measure.worst
        return measure.say(value) + (f" ± {measure.say(stdev(values))}" if spread else "")

    def failures(self) -> list[str]:
        """A line for each run without a result."""
        return [f"{r.variant}, seed {r.seed}: {r.failure}" for r in self.results if r.failure]

    def as_json(self) -> dict[str, Any]:
        """Plain values of everything."""
        summary = {
            variant: {measure.field: self.typical(variant, measure.field) for measure in MEASURES}
            for variant in self.variants
        }
        return {
            "sentence": self.sentence(),
            "variants": summary,
            "runs": [dataclasses.asdict(result) for result in self.results],
        }

    def sentence(self) -> str:
        """The comparison of the first two variants, or of LoRA and QLoRA if both exist."""
        usual = ("lora", "qlora")
        names = [*filter(self.variants.__contains__, usual)]
        names += [name for name in self.variants if name not in usual]
        if len(names) < 2:
            return "There is one variant, so nothing to compare it with."
        base, other = names[:2]
        parts = [
            *self._memory_clause(base, other),
            *self._speed_clause(base, other),
            *self._loss_clause(base, other),
        ]
        if not parts:
            return f"There is no result of both {base} and {other} yet."
        return f"Against {base}, {other} " + _joined(parts) + "."

    def _both(self, base: str, other: str, field: str) -> tuple[float, float] | None:
        one, two = self.typical(base, field), self.typical(other, field)
        return (one, two) if one and two else None

    def _memory_clause(self, base: str, other: str) -> list[str]:
        clauses: list[str] = []
        for when in ("load", "train"):
            reserved = self._both(base, other, f"{when}_reserved")
            pair = reserved or self._both(base, other, f"{when}_peak")
            if pair:
                one, two = pair
                change = "as much"
                if abs(two / one - 1) >= 0.005:
                    change = f"{abs(two / one - 1):.0%} {'less' if two < one else 'more'}"
                start = change if clauses else f"takes {change} memory"
                where = "to load" if when == "load" else "in training"
                kind = " reserved" if reserved else ""
                clauses.append(f"{start} {where} ({memory(two)}{kind} instead of {memory(one)})")
        return [" and ".join(clauses)] if clauses else []

    def _speed_clause(self, base: str, other: str) -> list[str]:
        pair = self._both(base, other, "tokens_per_second")
        if not pair:
            return []
        one, two = pair
        if abs(two / one - 1) < 0.005:
            return [f"is as fast ({two:,.0f} tokens/s)"]
        faster = "faster" if two > one else "slower"
        speeds = [self.values(variant, "tokens_per_second") for variant in (base, other)]
        spread = sum(stdev(values) for values in speeds if len(values) > 1)
        noise = ", within their spread" if abs(two - one) <= spread else ""
        change = f"{abs(two / one - 1):.0%} {faster}"
        return [f"is {change} ({two:,.0f} tokens/s against {one:,.0f}{noise})"]

    def _loss_clause(self, base: str, other: str) -> list[str]:
        ones, twos = ({r.seed: r.held_out_loss for r in self.results if r.variant == v}
                      for v in (base, other))  # fmt: skip
        pairs = [
            (a, b)
            for seed, a in ones.items()
            if (b := twos.get(seed)) is not None and a is not None
        ]
        if not pairs:
            return []
        differences = [b - a for a, b in pairs]
        change = fmean(differences) / fmean(a for a, _ in pairs)
        message = (
            f"ends with a held-out loss {abs(change):.1%} {'higher' if change > 0 else 'lower'}"
        )
        if len(pairs) == 1:
            return [f"{message}, of one seed, which cannot tell it from chance"]
        count = len(pairs)
        t = _T[count - 2] if count - 2 < len(_T) else 2.2
        reach = t * stdev(differences) / math.sqrt(count)
        if abs(fmean(differences)) <= reach:
            return [f"{message}, which {count} seeds cannot tell from chance"]
        return [f"{message}, the same way in {count} seeds"]


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def comparison_page(
    found: Comparison, runs: Sequence[Run], title: str, about: str, links: Mapping[str, str]
) -> str:
    """A page with the sentence, the table, and charts of its values.

    Args:
        found: The results.
        runs: A run of each variant, named as it is, for the curves.
        title: The models or options compared, plain text.
        about: Model, data and machine, plain text.
        links: The pages of the runs by name, as paths from this one.
    """
    failures = "".join(f'<p class="warning">{escape(one)}</p>' for one in found.failures())
    heads, rows = found.rows()
    seeds = len({result.seed for result in found.results})
    spread = f"means and standard deviations of {seeds} seeds; memory and sizes: the largest"
    held = [
        Bar(f"{variant}, {when}", [(when, value)])
        for variant in found.variants
        for when, field in (("load", "load_peak"), ("training", "train_peak"))
        if (value := found.typical(variant, field))
    ]
    disk = [
        Bar(
            variant,
            [
                (what, found.typical(variant, field) or 0.0)
                for what, field in (("base", "base_bytes"), ("adapter", "adapter_bytes"))
            ],
        )
        for variant in found.variants
    ]
    pictures = [
        dot_chart(name, "a dot for each seed, a bar for their mean", _dots(found, field), say=say)
        for field, name, say in (
            ("held_out_loss", "Held-out loss", "{:.4f}".format),
            ("exact_match", "Exact match", _percent),
            ("tokens_per_second", "Tokens a second", "{:,.0f}".format),
        )
    ]
    pictures.insert(2, bar_chart("Peak memory", "the largest of all seeds", held, say=memory))
    pictures.append(bar_chart("On disk", "", disk, say=memory))
    body = (
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(about)}</p>'
        f"<p>{escape(found.sentence())}</p>{failures}</header>"
        + section("Results", table(heads, rows, spread if seeds > 1 else "one seed"))
        + section("Side by side", f'<div class="charts">{"".join(pictures)}</div>')
        + section("Curves of the first seed", curves(runs) if runs else "")
        + section("Every run", _linked(links))
    )
    return document(f"{title} · halfbyte", body)


def _linked(links: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><a href="{escape(quote(path))}">{escape(name)}</a></li>'
        for name, path in links.items()
    )
    return f'<ul class="notes">{items}</ul>' if items else ""


def _dots(found: Comparison, field: str) -> list[tuple[str, list[float]]]:
    return [(variant, found.values(variant, field)) for variant in found.variants]


def finished_run(directory: Path, *, evaluated: bool) -> Run | None:
    """The run in ``directory`` if it has finished, and was evaluated if requested."""
    if not (directory / "journal.jsonl").exists():
        return None
    run = read_run(directory)
    return run if run.finished and (not evaluated or (directory / EVALUATION).exists()) else None
