"""What benchmarks/quality.py puts to models, and the statistics it tells of their answers."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def timetable(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("timetable")


@pytest.fixture
def quality_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("quality_table")


def minutes(clock: str) -> int:
    hour, minute = clock.split(":")
    return 60 * int(hour) + int(minute)


def test_every_answer_follows_from_its_timetable(timetable: Any) -> None:
    for vocabulary in (timetable.TRAINING, timetable.HELD_OUT):
        for case in timetable.make_cases(vocabulary, 200, seed=3):
            _, user, assistant = (message["content"] for message in case["messages"])
            town, start, bay, takes = re.fullmatch(
                r"(\w+): (\d+:\d\d) from bay (\d), (\d+) minutes", assistant
            ).groups()
            table, question = user.split(". ", 1)
            rows = [row for row in table.split(";") if town in row]
            assert len(rows) == 1
            assert f"bay {bay}" in rows[0]
            times = re.findall(r"\d+:\d\d", rows[0])
            assert start in times
            end = next(time for time in times if time != start)
            assert minutes(end) - minutes(start) == int(takes)
            asked = re.findall(r"\d+:\d\d", question)
            if asked:
                starts = [min(map(minutes, re.findall(r"\d+:\d\d", r))) for r in table.split(";")]
                assert min(s for s in starts if s > minutes(asked[0])) == minutes(start)
            else:
                assert town in question


def test_held_out_cases_share_nothing_with_the_examples(timetable: Any) -> None:
    one, other = timetable.TRAINING, timetable.HELD_OUT
    for field in ("hours", "towns", "places", "openings", "rows", "by_town", "by_time"):
        assert not set(getattr(one, field)) & set(getattr(other, field)), field


def test_prose_is_read_in_whole_paragraphs_and_no_more_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    quality: Any = __import__("quality")
    for name, most in ((quality.TRAINING, quality.EXAMPLES["prose"]), (quality.HELD_OUT, None)):
        rows = [
            json.loads(line)["text"]
            for line in quality._prose(name, tmp_path, most).read_text().splitlines()
        ]
        words = (quality.TEXTS / name).read_text().split()
        kept = " ".join(rows).split()
        assert kept == words[: len(kept) if most else None]
        assert len(rows) == (most or len(rows))
    trained = (quality.TEXTS / quality.TRAINING).read_text().split("\n\n")
    read = (quality.TEXTS / quality.HELD_OUT).read_text().split("\n\n")
    assert not {one for one in trained if len(one) > 80} & set(read)


def test_intervals_are_students(quality_table: Any) -> None:
    mean, half = quality_table.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert math.isnan(quality_table.interval([1.0])[1])


def run(base: str, seed: int, loss: float) -> dict[str, Any]:
    right = {"exact_match": 0.5, "cases": 4}
    return {"task": "orders", "base": base, "seed": seed, "loss": loss, **right}


def test_differences_are_of_the_same_seed(quality_table: Any) -> None:
    # Seeds differ by far more than bases do, and that must not widen the interval.
    runs = [run("lora", seed, 1.0 + seed) for seed in range(3)]
    runs += [run("nf4", seed, 1.01 + seed) for seed in (2, 1, 0)]
    mean, half = quality_table.relative_loss(runs, "orders", "nf4")
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(0, abs=1e-9)
    assert quality_table.relative_loss(runs, "orders", "fp4") is None


def test_a_task_that_is_not_answered_has_a_loss_only(quality_table: Any) -> None:
    runs = [run("lora", 0, 2.0), run("nf4", 0, 2.1)]
    runs = [one | {"task": "prose", "exact_match": None, "cases": 0} for one in runs]
    table = quality_table.tables({"bases": [], "runs": runs})
    assert "| base | held-out loss | vs. 16 bits |\n|---|---|---|\n" in table
    assert "| NF4, double quantisation (QLoRA) | 2.1000 | +5.0 % |" in table


def test_records_of_several_tasks_are_put_together(quality_table: Any) -> None:
    one = {"runs": [run("lora", 0, 1.0)], "bases": [{"base": "lora"}], "examples": {"orders": 9}}
    other = {
        "runs": [run("lora", 0, 3.0) | {"task": "prose"}],
        "bases": [{"base": "lora"}, {"base": "nf4-search-32"}],
        "examples": {"orders": 448, "prose": 60},
        "changes": {"prose": {"batch_size": 2}},
    }
    common = {"command": "c", "note": "n"}
    found = quality_table.together([one | common, other | common])
    assert found["examples"] == {"orders": 9, "prose": 60}
    assert [base["base"] for base in found["bases"]] == ["lora", "nf4-search-32"]
    assert found["changes"] == {"prose": {"batch_size": 2}}


def test_verdicts(quality_table: Any) -> None:
    assert quality_table.conclusion((-3.0, 1.0)) == "within 1 %, or better"
    assert quality_table.conclusion((0.5, 2.0)).startswith("inconclusive")
    assert quality_table.conclusion((5.0, 2.0)) == "not within 1 %"


def test_docs_are_written_from_a_record(
    quality_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_table, "DOCS", tmp_path / "quality.md")
    bare = {"weight_error": 0.0, "prose_perplexity": 20.0, "prose_tokens": 9}
    record = {
        "command": "python benchmarks/quality.py",
        "device": "a machine",
        "date": "2026-11-24T00:00:00",
        "versions": {"torch": "2", "transformers": "5"},
        "model": "tiny",
        "note": "",
        "recipe": {"lora_r": 16, "learning_rate": 8e-4, "batch_size": 8},
        "examples": {"orders": 9},
        "bases": [{"base": n, "bits_per_weight": 4.127, **bare} for n in ("lora", "nf4")],
        "runs": [run(base, seed, 1.0) for base in ("lora", "nf4") for seed in (0, 1)],
    }
    quality_table.write_docs(json.loads(json.dumps(record)), "row.json")
    text = (tmp_path / "quality.md").read_text()
    assert "| NF4, double quantisation (QLoRA) | 1.0000 ± 0.0000 | +0.0 ± 0.0 % |" in text
    assert "within 1 %, or better" in text
