"""The benchmark of readers finds nothing wrong in a few rows, and what is wrong if there is."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = __import__("readers")
    monkeypatch.setattr(module, "LONG_ROWS", 0)  # of 8 MB each
    return module


@pytest.mark.parametrize("reader", ["JSON lines, gzip", "JSON array", "CSV", "Parquet, streamed"])
def test_each_row_is_accepted_or_rejected_for_its_reason(
    readers: Any, tmp_path: Path, reader: str
) -> None:
    found = readers.try_reader(reader, 400, 1, tmp_path)
    assert sum(found["accepted"].values()) + sum(found["rejected"].values()) == found["rows"]
    assert found["accepted"]["good"] == found["kinds"]["good"]
    assert len(found["rejected"]) >= 5


def test_a_row_that_is_lost_is_found(
    readers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = readers.write_lines

    def lossy(path: Path, made: Any) -> Any:
        expected = real(path, made)
        path.write_bytes(path.read_bytes().replace(b'"prompt"', b'"prompd"', 1))
        return expected

    monkeypatch.setitem(readers.READERS, "JSON lines", ("a.jsonl", lossy))
    with pytest.raises(ValueError, match=r"JSON lines, row .*expected line"):
        readers.try_reader("JSON lines", 400, 1, tmp_path)
