"""What a comparison says: its table, its sentence, its page."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.report.comparison import (
    Comparison,
    Result,
    comparison_page,
    finished_run,
    read_result,
)
from halfbyte.report.runs import read_run
from tests.report.test_page import EVIL, Checked, journal_lines, write_journal


def compared(*results: Result) -> Comparison:
    return Comparison(tuple(results))


LORA = Result(
    "lora",
    0,
    load_peak=14e9,
    train_peak=15e9,
    tokens_per_second=1000.0,
    held_out_loss=0.5,
    exact_match=0.75,
)
QLORA = Result(
    "qlora",
    0,
    load_peak=3.5e9,
    train_peak=6e9,
    tokens_per_second=800.0,
    held_out_loss=0.51,
    exact_match=0.5,
)


def test_a_result_is_read_from_a_runs_files(tmp_path: Path) -> None:
    lines = journal_lines()
    lines[2]["base_bytes"] = 6e8
    lines[-1]["reserved_bytes"] = 10**9
    run = write_journal(tmp_path / "r", lines)
    assert finished_run(run, evaluated=True) is None
    (run / "eval.json").write_text(json.dumps({"exact_match": 0.9}))
    (run / "adapter_model.safetensors").write_bytes(b"x" * 123)
    found = finished_run(run, evaluated=True)
    assert found is not None
    assert read_result("qlora", 3, found) == Result(
        "qlora",
        3,
        load_peak=7e8,
        train_peak=9.5e8,
        train_reserved=1e9,
        tokens_per_second=pytest.approx(50),
        held_out_loss=1.25,
        exact_match=0.9,
        adapter_bytes=123,
        base_bytes=6e8,
    )
    assert finished_run(write_journal(tmp_path / "half", lines[:-1]), evaluated=False) is None
    assert finished_run(tmp_path / "nothing", evaluated=False) is None


def test_the_table_has_spread_over_seeds_and_the_largest_memory() -> None:
    second = Result("lora", 1, train_peak=16e9, tokens_per_second=1100.0, held_out_loss=0.54)
    heads, rows = compared(LORA, second, QLORA).rows()
    assert heads == ["", "lora", "qlora"]
    assert rows == [
        ["peak at load", "14.00 GB", "3.50 GB"],
        ["peak in training", "16.00 GB", "6.00 GB"],
        ["tokens/s", "1,050 ± 71", "800"],
        ["held-out loss", "0.5200 ± 0.0283", "0.5100"],
        ["exact match", "75.0 %", "50.0 %"],
    ]


def test_the_sentence_of_one_seed_claims_no_difference() -> None:
    assert compared(LORA, QLORA).sentence() == (
        "Against lora, qlora takes 75% less memory to load (3.50 GB instead of 14.00 GB) and 60% "
        "less in training (6.00 GB instead of 15.00 GB), is 20% slower (800 tokens/s against "
        "1,000), and ends with a held-out loss 2.0% higher, of one seed, which cannot tell it "
        "from chance."
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (([0.50, 0.60, 0.70], [0.51, 0.61, 0.71]), "1.7% higher, the same way in 3 seeds"),
        (([0.50, 0.60, 0.70], [0.53, 0.58, 0.71]), "1.1% higher, which 3 seeds cannot tell"),
        (([0.50, 0.60, 0.70], [0.45, 0.55, 0.65]), "8.3% lower, the same way in 3 seeds"),
    ],
)
def test_losses_are_compared_seed_by_seed(losses: Any, expected: str) -> None:
    results = [
        Result(name, seed, held_out_loss=loss)
        for name, column in zip(("lora", "qlora"), losses, strict=True)
        for seed, loss in enumerate(column)
    ]
    assert expected in compared(*results).sentence()


def test_the_sentence_is_about_lora_and_qlora_or_the_first_two() -> None:
    fp4 = Result("fp4", 0, tokens_per_second=900.0)
    assert compared(fp4, QLORA, LORA).sentence().startswith("Against lora, qlora takes")
    assert compared(QLORA, fp4).sentence() == (
        "Against qlora, fp4 is 12% faster (900 tokens/s against 800)."
    )
    assert (
        "reserved"
        in compared(
            Result("lora", 0, train_reserved=14.4e9), Result("qlora", 0, train_reserved=4.7e9)
        ).sentence()
    )


def test_a_speed_that_varies_as_much_is_said_to() -> None:
    speeds = {"lora": (800.0, 1200.0), "qlora": (700.0, 900.0)}
    results = [
        Result(name, seed, tokens_per_second=value)
        for name, values in speeds.items()
        for seed, value in enumerate(values)
    ]
    expected = "is 20% slower (800 tokens/s against 1,000, within their spread)"
    assert expected in compared(*results).sentence()


def test_what_is_missing_is_said() -> None:
    failed = Result("lora", 0, failure="it was killed by SIGKILL")
    assert compared(QLORA).sentence() == "There is one variant, so nothing to compare it with."
    assert "no result of both lora and qlora" in compared(failed, QLORA).sentence()
    assert compared(failed, QLORA).failures() == ["lora, seed 0: it was killed by SIGKILL"]
    assert compared(failed, QLORA).rows()[1][0] == ["peak at load", "–", "3.50 GB"]


def test_the_page(tmp_path: Path) -> None:
    runs = [read_run(write_journal(tmp_path / name, journal_lines())) for name in ("lora", "qlora")]
    found = compared(LORA, QLORA, Result("fp4", 0, failure=EVIL))
    html = comparison_page(found, runs, EVIL, EVIL, {EVIL: "r=8/seed 0/'\"report.html"})
    read = Checked(html)
    assert read.count("script") == 1
    [link] = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert link == "r%3D8/seed%200/%27%22report.html"
    assert "Against lora, qlora takes 75% less" in read.text
    assert "fp4, seed 0: </script>" in read.text
    # held-out loss, exact match, memory, speed; and the runs' curves
    assert [a["aria-label"] for _, a in read.tags if a.get("role") == "img"][:2] == [
        "lora: 0.5000; qlora: 0.5100; fp4: none",
        "lora: 75.0 %; qlora: 50.0 %; fp4: none",
    ]
    assert read.count("figure") == 4 + 4


def test_as_json() -> None:
    found = compared(LORA, QLORA).as_json()
    assert found["variants"]["qlora"]["load_peak"] == 3.5e9
    assert found["runs"][0]["held_out_loss"] == 0.5
    json.dumps(found, allow_nan=False)
