"""The benchmark of several GPUs, as far as it can be tried without any."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SAID = """GPU 0: NVIDIA H200 (UUID: GPU-0)
\t Link 0: Data Tx: 10 KiB
\t Link 0: Data Rx: 20 KiB
\t Link 1: Data Tx: 1 KiB
\t Link 1: Data Rx: 2 KiB
"""


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("scaling")


def test_speeds_are_compared_with_one_gpu_and_with_whole_weights(scaling: Any) -> None:
    def row(name: str, gpus: int, speed: int) -> dict[str, Any]:
        return {"contestant": name, "gpus": gpus, "ms": 1.0, "tokens_per_second": speed}

    failed = {"contestant": "shard-host", "gpus": 4, "failed": "exit code 1"}
    rows = [row("data-parallel", 1, 100), row("data-parallel", 4, 390), row("shard", 4, 380)]
    scaling.compare([*rows, failed])
    assert "times_one" not in rows[0]
    assert rows[1]["times_one"] == 3.9
    assert rows[2]["times_one"] == 3.8
    assert rows[2]["over_data_parallel"] == pytest.approx(380 / 390, abs=1e-3)
    assert set(failed) == {"contestant", "gpus", "failed"}
    alone = [row("shard", 2, 50)]
    scaling.compare(alone)
    assert set(alone[0]) == {"contestant", "gpus", "ms", "tokens_per_second"}


@pytest.mark.parametrize(
    ("script", "received"),
    [(f"cat <<'X'\n{SAID}X\n", 22 * 1024), ("echo no links", None), ("exit 3", None)],
)
def test_received_bytes_are_read_where_there_are_links(
    scaling: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    received: int | None,
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert scaling.received_by_nvlink(0) == received


def test_without_the_program_nothing_is_known(
    scaling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scaling.received_by_nvlink(0) is None
