"""The benchmark of whole runs, as far as it is ours: on a CPU, with a tiny model."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMOLLM2 = os.environ.get("HALFBYTE_TEST_MODEL", "")


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    # One thread, as in conftest.py: two wait for each other where cores are busy.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return __import__("gpu_run")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def benchmark(gpu_run: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the script, whose contestants are processes, in this one; return what it ends with."""

    def call(*words: object, output: Path) -> str:
        given = ["gpu_run.py", "--device", "cpu", "--output", output, *words]
        monkeypatch.setattr("sys.argv", [str(word) for word in given])
        try:
            gpu_run.main()
        except SystemExit as error:
            return str(error)
        return ""

    return call


@pytest.mark.slow
def test_contestants_of_ours_have_a_row_each_with_every_figure(
    benchmark: Callable[..., str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "row.json"
    words = ["--only", "smollm2", "halfbyte-no-graphs", "--checkpoint", model, "--gguf", model]
    words += ["--chats", 16, "--steps", 1, "--longest", 256]
    assert not benchmark(*words, output=output)
    rows = json.loads(output.read_text())["rows"]
    steps = [(name, row["steps"]) for name, row in rows.items()]
    assert steps == [("smollm2", 3), ("halfbyte-no-graphs", 1)]
    ours = rows["halfbyte-no-graphs"]
    # One step is all the data, cut.
    assert rows["smollm2"]["tokens"] == 3 * ours["tokens"]
    assert 8 * 256 < ours["tokens"] <= 16 * 256
    assert rows["smollm2"]["loss"] < ours["loss"]  # it is the mean of three steps
    assert rows["smollm2"]["predicted_seconds"] > 0
    for row in rows.values():
        assert 0 < row["first_step_s"] < row["wall_s"]
        assert row["steady_tokens_per_s"] > 0
        assert 0.1 < row["peak_gb"] < 5
        assert abs(row["forecast_off"]) < 1
    printed = capsys.readouterr().out.splitlines()
    # The row, and the table.
    assert sum(line.startswith("halfbyte-no-graphs ") for line in printed) == 2


@pytest.mark.slow
def test_contestants_that_fail_or_hang_are_told_and_the_rest_goes_on(
    benchmark: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "row.json"
    words = ["--only", "smollm2", "smollm2", "--checkpoint", model, "--steps", 1]
    words += ["--gguf", tmp_path / "none.gguf", "--chats", 16, "--longest", 256]
    assert benchmark(*words, output=output) == "failed: smollm2, smollm2 (2)"
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["smollm2", "smollm2 (2)"]
    assert all("none.gguf" in row["failed"] for row in rows.values())

    assert benchmark(*words, "--seconds", 0.5, output=output) == "failed: smollm2, smollm2 (2)"
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["smollm2", "smollm2 (2)"]
    assert {row["failed"] for row in rows.values()} == {"did not end within 0.5 s"}
    assert all(0.5 <= row["wall_s"] < 5 for row in rows.values())


@pytest.mark.slow
def test_commands_are_timed_with_their_exit_codes(
    gpu_run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = gpu_run.COMMANDS
    chosen = {name: every[name] for name in ("train", "report")}
    monkeypatch.setattr(gpu_run, "COMMANDS", chosen | {"wrong": "merge {model}"})
    data = gpu_run.chats.write_chats(tmp_path / "chats.jsonl", 8)
    options = {"gguf": model, "data": data, "steps": 1, "longest": 256, "held_out": 2}
    args = argparse.Namespace(**options, device="cpu", seconds=100)
    kept: list[list[str]] = []
    rows = gpu_run.command(args, tmp_path, lambda commands: kept.append(list(commands)))
    codes = {name: row["exit_code"] for name, row in rows.items()}
    assert codes == {"train": 0, "report": 0, "wrong": 2}
    assert "failed" in rows["wrong"]
    assert kept == [[*chosen][: n + 1] for n in range(2)] + [[*chosen, "wrong"]]
    # A word that is a sentence stays one.
    assert "What did the Queen" not in " ".join(every.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "halfbyte"], "--gguf is missing"),
        (["--only", "unsloth", "--gguf", "m.gguf"], "--device cpu is for ours"),
    ],
)
def test_wrong_use_is_said_before_anything_runs(
    words: list[str], message: str, tmp_path: Path
) -> None:
    call = [sys.executable, str(BENCHMARKS / "gpu_run.py"), "--device", "cpu", *words]
    call += ["--output", str(tmp_path / "row.json")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_steady_figures_leave_the_first_steps_out(gpu_run: Any) -> None:
    found = gpu_run.figures([(100, 10.0)] * 10 + [(300, 1.0), (100, 1.0), (200, 1.0)])
    assert found["steady_tokens_per_s"] == 200
    assert found["tokens_per_s"] == round(1600 / 103)
    assert found["warm_steps_s"] == 100
    assert found["steady_step_ms"] == found["slowest_steady_ms"] == 1000
    assert gpu_run.figures([(100, 10.0), (100, 1.0)])["steady_tokens_per_s"] == 100


def journal(path: Path, *, without: str = "") -> Path:
    """A journal of two steps, in which ``without`` is missing: an event, or a field of one."""
    at = datetime.fromtimestamp(1002.5, UTC).isoformat()
    records: list[dict[str, Any]] = [
        {"event": "loaded", "seconds": 1.0},
        {"event": "step", "step": 1, "tokens": 10, "seconds": 2.0, "loss": 3.0},
        {"event": "step", "step": 2, "tokens": 10, "seconds": 1.0, "loss": 2.0},
        {"event": "captured", "seconds": 1.5, "graphs": 4},
        {
            "event": "memory",
            "measured_bytes": 11e9,
            "predicted_bytes": 10e9,
            "predicted_reserved_bytes": 12.5e9,
        },
        {"event": "finish", "peak_memory_bytes": 12e9, "reserved_bytes": 13e9},
    ]
    event, _, name = without.partition(".")
    kept = [record for record in records if record["event"] != event or name]
    for record in kept:
        record["time"] = at
        if record["event"] == event:
            del record[name]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path


def test_a_row_of_ours_is_what_the_journal_says(gpu_run: Any, tmp_path: Path) -> None:
    row = gpu_run.of_journal(journal(tmp_path / "journal.jsonl"), 1000.0, "cuda")
    assert row["first_step_s"] == 2.5
    assert (row["peak_gb"], row["reserved_gb"], row["forecast_gb"]) == (12, 13, 10)
    assert row["forecast_off"] == 0.1
    assert row["forecast_reserved_gb"] == 12.5
    assert (row["capture_s"], row["graphs"]) == (1.5, 4)
    assert row["loss"] == 2.5
    assert row["steady_tokens_per_s"] == 10
    text = gpu_run.table({"halfbyte": row, "unsloth": {"wall_s": 1.0, "failed": "no memory"}})
    assert "+10.0%" in text
    assert text.endswith("failed: no memory")


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("step", "no `step`"),
        ("memory", "no `memory`"),
        ("memory.predicted_bytes", "`memory` has no `predicted_bytes`; it has .*measured_bytes"),
        ("finish.reserved_bytes", "`finish` has no `reserved_bytes`"),
        ("step.seconds", "`step` has no `seconds`"),
    ],
)
def test_what_the_journal_does_not_say_is_no_figure(
    gpu_run: Any, tmp_path: Path, without: str, message: str
) -> None:
    path = journal(tmp_path / "journal.jsonl", without=without)
    with pytest.raises(gpu_run.Missing, match=message):
        gpu_run.of_journal(path, 1000.0, "cuda")


def test_every_name_a_command_is_formatted_with_is_known(gpu_run: Any) -> None:
    known = {"model", "data", "held_out", "work", "steps", "longest", "prompt", "device"}
    for text in gpu_run.COMMANDS.values():
        text.format(**dict.fromkeys(known, ""))


@pytest.mark.skipif(not SMOLLM2, reason="needs SmolLM2's GGUF file: HALFBYTE_TEST_MODEL names it")
def test_the_model_that_is_made_reads_chats_as_smollm2_does(
    gpu_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.data import load_dataset

    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    monkeypatch.setattr(gpu_run, "MODEL", gpu_run.MODEL | small | {"num_key_value_heads": 2})
    made = tmp_path / "made"
    words = ["--worker", "make", "--checkpoint", made, "--gguf", SMOLLM2, "--layers", 2]
    monkeypatch.setattr("sys.argv", ["gpu_run.py", "--device", "cpu", *map(str, words)])
    gpu_run.main()
    source = open_base(str(made))
    assert source.config.num_hidden_layers == 2
    assert source.config.vocab_size == len(source.tokenizer()) == 49152
    # Its padding is no end of turn, for peers.
    assert source.tokenizer().pad_token_id != source.config.eos_token_id
    data = gpu_run.chats.write_chats(tmp_path / "chats.jsonl", 20)
    tokenizers = (source.tokenizer(), open_base(SMOLLM2).tokenizer())
    ours, theirs = (load_dataset(data, one, max_length=2048).examples for one in tokenizers)
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.labels_mask.tolist() == other.labels_mask.tolist()
