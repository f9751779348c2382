"""The record of benchmarks/quality.py as tables: means over seeds, with 95 % t-intervals.

Bases are compared in pairs: a seed fixes the examples, their order and the adapter's
initialisation, so the difference to 16 bits with the same seed says more than the difference of two
means.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "quality.md"

NAMES = {
    "lora": "16 bits (LoRA)",
    "nf4": "NF4, double quantisation (QLoRA)",
    "nf4-single": "NF4, scales in float32",
    "nf4-search": "NF4 by search (`--quant-search`)",
    "nf4-search-32": "NF4 by search, `--block-size 32`",
    "nf4-fp8": "NF4, trained with `--compute fp8`",
    "nf4-search-fp8": "NF4 by search, trained with `--compute fp8`",
    "nf4-qera": "NF4, `--init-lora-weights qera`",
    "nf4-search-qera": "NF4 by search, with qera",
    "nf4-search-32-qera": "NF4 by search in blocks of 32, with qera",
    "fp4": "FP4, double quantisation",
    "int4": "plain 4-bit integers",
}
TASKS = {
    "orders": "orders to YAML (the demo's task)",
    "timetable": "finding a bus in a timetable",
    "prose": "a book (trained on nine chapters, evaluated on three others)",
}
# The configurations of QLoRA for which the claim is checked: the default, and with its options.
CLAIMED = (
    "nf4",
    "nf4-qera",
    "nf4-search",
    "nf4-search-qera",
    "nf4-search-32",
    "nf4-search-32-qera",
)

# Student's t, 0.975 quantiles for 1 to 15 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131)

Row = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval; NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    freedom = min(len(values) - 1, len(_T))
    return mean, _T[freedom - 1] * statistics.stdev(values) / math.sqrt(len(values))


def differences(
    runs: Sequence[Row], task: str, base: str, key: str, reference: str = "lora"
) -> list[float]:
    """``key`` on ``base`` minus that on ``reference``, for each seed that both have."""
    of = {
        name: {r["seed"]: r[key] for r in runs if (r["task"], r["base"]) == (task, name)}
        for name in (reference, base)
    }
    return [
        of[base][seed] - of[reference][seed] for seed in sorted(of[reference].keys() & of[base])
    ]


def relative_loss(
    runs: Sequence[Row], task: str, base: str, reference: str = "lora"
) -> tuple[float, float] | None:
    """Paired difference in held-out loss, in percent of the mean loss on ``reference``."""
    found = differences(runs, task, base, "loss", reference)
    if not found:
        return None
    losses = [r["loss"] for r in runs if (r["task"], r["base"]) == (task, reference)]
    scale = 100 / statistics.fmean(losses)
    return interval([scale * value for value in found])


def _pm(found: tuple[float, float] | None, digits: int, *, signed: bool = False) -> str:
    if found is None:
        return ""
    mean, half = found
    # A minus sign of its own width, and no "-0.0".
    text = f"{round(mean, digits) + 0.0:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def tables(record: Row) -> str:
    """All tables in Markdown."""
    lines = ["| base | bits per weight | weight error | perplexity on prose |"]
    lines.append("|---|---|---|---|")
    bases = {row["base"]: row for row in record["bases"]}
    for base in [name for name in NAMES if name in bases]:
        row = bases[base]
        bits = {"lora": 16.0, "int4": 4.5}.get(base, row["bits_per_weight"])
        lines.append(
            f"| {NAMES[base]} | {bits:.3f} | {100 * row['weight_error']:.2f} % "
            f"| {row['prose_perplexity']:.2f} |"
        )
    runs = record["runs"]
    for task in [name for name in TASKS if any(r["task"] == name for r in runs)]:
        lines += ["", f"**{TASKS[task][0].upper()}{TASKS[task][1:]}**", ""]
        answered = all(r["exact_match"] is not None for r in runs if r["task"] == task)
        heads = ["base", "held-out loss", "vs. 16 bits"]
        heads += ["exact match", "vs. 16 bits"] if answered else []
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for base in NAMES:
            rows = [r for r in runs if (r["task"], r["base"]) == (task, base)]
            if not rows:
                continue
            plain, against = base == "lora", relative_loss(runs, task, base)
            cells = [
                NAMES[base],
                _pm(interval([r["loss"] for r in rows]), 4),
                "" if plain else _pm(against, 1, signed=True) + " %",
            ]
            if answered:
                right = [100 * value for value in differences(runs, task, base, "exact_match")]
                cells += [
                    _pm(interval([100 * r["exact_match"] for r in rows]), 1) + " %",
                    "" if plain or not right else _pm(interval(right), 1, signed=True) + " points",
                ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conclusion(found: tuple[float, float]) -> str:
    """What a difference in percent says about the claim that it is at most 1 %."""
    mean, half = found
    if mean + half <= 1:
        return "within 1 %, or better"
    if mean - half > 1:
        return "not within 1 %"
    return "inconclusive: the interval contains 1 %"


def together(records: Sequence[Row]) -> Row:
    """Merges records of the same model and bases, each with its own tasks, into one."""
    first = dict(records[0])
    first["runs"] = [run for record in records for run in record["runs"]]
    first["bases"] = list({b["base"]: b for r in records for b in r["bases"]}.values())
    first["changes"] = {t: c for r in records for t, c in r.get("changes", {}).items()}
    first["examples"] = {
        task: record["examples"][task]
        for record in records
        for task in {run["task"] for run in record["runs"]}
    }
    first["command"] = "` and `".join(record["command"] for record in records)
    first["note"] = " ".join(dict.fromkeys(record["note"] for record in records))
    return first


def write_docs(record: Row, *names: str) -> None:
    """Writes docs/quality.md from a record; ``names`` are its files in benchmarks/results."""
    seeds = len({run["seed"] for run in record["runs"]})
    cases = ", ".join(sorted({str(run["cases"]) for run in record["runs"] if run["cases"]}))
    tasks = [task for task in TASKS if any(run["task"] == task for run in record["runs"])]
    claims = [
        f"- {TASKS[task]}, on {NAMES[base]}: {_pm(found, 1, signed=True)} %; {conclusion(found)}."
        for task in tasks
        for base in CLAIMED
        if (found := relative_loss(record["runs"], task, base)) is not None
    ]
    searched = [
        f"- {TASKS[task]}: {_pm(found, 1, signed=True)} %."
        for task in tasks
        if (found := relative_loss(record["runs"], task, "nf4-search", "nf4")) is not None
    ]
    words = record["bases"][0]["prose_tokens"]
    examples = " and ".join(f"{record['examples'][task]} ({task})" for task in tasks)
    changed = "".join(
        f"; for {task} " + ", ".join(f"{name} {value:g}" for name, value in options.items())
        for task, options in record.get("changes", {}).items()
        if task in tasks
    )
    versions = record["versions"]
    files = " and ".join(f"`benchmarks/results/{name}`" for name in names)
    text = f"""# What four bits cost in quality

Generated by `{record["command"]}`, from {files}. Do not edit.

{record["model"]} on {record["device"]}, {record["date"][:10]}, torch {versions["torch"]},
transformers {versions["transformers"]}. {record["note"]}

Each base is trained on each task with {seeds} seeds and the same options (r =
{record["recipe"]["lora_r"]} on all linears, learning rate {record["recipe"]["learning_rate"]:g},
batches of {record["recipe"]["batch_size"]}, one pass over {examples} examples{changed}). Tasks with
answers are evaluated on {cases} held-out cases, which share no names or phrasings with the
examples. ± is half the width of a 95 % t-interval over seeds. Seeds vary the examples, their order
and the adapter's initialisation; a base is quantised the same way each time, and how well that
happens to suit a task is in no interval. "vs. 16 bits" compares runs of the same seed, which have
the same examples in the same order and the same initial adapter: the mean of these differences,
losses in percent of the loss on 16 bits.

{tables(record)}

Perplexity is that of the base before training, on {words} tokens of prose (benchmarks/texts). The
weight error is the root mean square of the rounding error, relative to that of the weights. Plain
integers are −7 … 7 sevenths of the largest of 64 weights, with scales in float32. With `qera` the
adapter is initialised with the quantisation error, as far as its rank allows
(src/halfbyte/train/qera.py); the packed bytes are those of the row without.

QLoRA's held-out loss relative to LoRA's; the claim is "within 1 %":

{chr(10).join(claims)}

Held-out loss on NF4 by search relative to plain NF4 (both with double quantisation):

{chr(10).join(searched)}
"""
    DOCS.write_text(text, encoding="utf-8")
    print(DOCS)
