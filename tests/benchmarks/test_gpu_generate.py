"""The benchmark of answers: every contestant and both commands, on a CPU, with tiny models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture
def gpu_generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    # One thread, as in conftest.py: two wait for each other where cores are busy.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return __import__("gpu_generate")


@pytest.fixture
def benchmark(gpu_generate: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the script, whose contestants are processes, in this one; return what it ends with."""

    def call(output: Path, *words: object) -> str:
        given = ["gpu_generate.py", "--device", "cpu", "--output", output, *words]
        monkeypatch.setattr("sys.argv", [str(word) for word in given])
        try:
            gpu_generate.main()
        except SystemExit as error:
            return str(error)
        return ""

    return call


def row(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_contestants_make_the_tokens_that_are_asked_for(
    benchmark: Callable[..., str], tmp_path: Path
) -> None:
    words = ["--shape", "tiny", "--short", 2, "--tokens", 24, "--peer-tokens", 24, "--calls", 1]
    words += ["--only", "halfbyte", "bitsandbytes-lora"]
    assert not benchmark(tmp_path / "row.json", *words, "--batches", 1, 3)
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


def test_both_commands_have_a_time_and_a_failure_is_told(
    gpu_generate: Any,
    benchmark: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    every = gpu_generate.COMMANDS
    assert list(every) == ["generate", "eval"]
    monkeypatch.setattr(gpu_generate, "COMMANDS", {"wrong": "report {model}/none"} | every)
    ended = benchmark(tmp_path / "row.json", "--gguf", model, "--chats", 2)
    found = row(tmp_path / "row.json")["commands"]
    assert ended == "failed: wrong", found
    assert "tiny/none" in found["wrong"]["failed"]
    assert found["imports"]["seconds"] > 0
    for name in every:  # which the failure did not keep from running
        assert found[name]["first_s"] > 0
        assert found[name]["again_s"] > 0
