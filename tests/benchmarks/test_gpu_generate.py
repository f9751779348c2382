"""The benchmark of answers: every contestant and both commands, on a CPU, with tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_model

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu_generate.py"
pytestmark = pytest.mark.slow


def benchmark(output: Path, *words: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, BENCHMARK, "--device", "cpu", "--output", output, *words]
    # One thread, as in conftest.py: two wait for each other where cores are busy.
    return subprocess.run(
        [str(word) for word in call],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def row(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_contestants_make_the_tokens_that_are_asked_for(tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--short", 2, "--tokens", 24, "--peer-tokens", 24, "--calls", 1]
    words += ["--only", "halfbyte", "bitsandbytes-lora"]
    done = benchmark(tmp_path / "row.json", *words, "--batches", 1, 3)
    assert done.returncode == 0, done.stderr
    rows = row(tmp_path / "row.json")["rows"]
    assert list(rows) == ["halfbyte", "bitsandbytes-lora"]
    for found in rows.values():
        for batch in (1, 3):
            figures = found[f"batch {batch}"]
            expected = batch * 24 / figures["seconds_for_24"]
            assert figures["tokens_per_s"] == pytest.approx(expected, rel=0.05)
    # A layer's seven linears and the head; float32 on a CPU.
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert rows["halfbyte"]["decoded_bytes"] == 4 * (linears + 400 * 64)
    assert rows["halfbyte"]["packed_bytes"] > linears // 2 + 4 * 400 * 64


def test_both_commands_have_a_time_and_a_failure_is_told(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    done = benchmark(tmp_path / "row.json", "--gguf", model, "--chats", 2)
    assert done.returncode == 0, done.stderr
    found = row(tmp_path / "row.json")["commands"]
    assert found["imports"]["seconds"] > 0
    for name in ("generate", "eval"):
        assert found[name]["first_s"] > 0
        assert found[name]["again_s"] > 0
    done = benchmark(tmp_path / "row.json", "--gguf", tmp_path / "none.gguf", "--chats", 2)
    assert done.returncode == 1
    assert done.stderr.endswith("failed: generate, eval\n")
    assert "none.gguf" in row(tmp_path / "row.json")["commands"]["eval"]["failed"]
