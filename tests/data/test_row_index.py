"""Where rows are: any bytes are divided into the rows that reading line by line finds."""

import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import row_index as module
from halfbyte.data.row_index import read_span, row_index
from halfbyte.errors import DataError
from halfbyte.input_files import open_file

PIECES = [
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b"\x0b",
    b"\xef\xbb\xbf",
    b'{"a": 1}',
    b"x" * 30,
    b"\xff",
    b"",
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines_of(raw):
    """The rows and the numbers of their lines, read by Python."""
    lines = enumerate(io.BytesIO(raw.removeprefix(b"\xef\xbb\xbf")), 1)
    return [(number, line) for number, line in lines if line.strip()]


def found(path):
    index = row_index(path)
    rows = np.arange(len(index))
    with open_file(path) as file:
        spans = index.spans(rows).tolist()
        raws = [read_span(file, start, stop) for start, stop in spans]
    return list(zip(index.line_numbers(rows).tolist(), raws, strict=True))


@given(raw=st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join), block=st.integers(4, 9))
def test_rows_are_the_lines_that_are_not_blank(tmp_path_factory, raw, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_PIECE", 1)
        patch.setattr(module, "_threads", module.threading.local())
        path = tmp_path_factory.getbasetemp() / "rows.jsonl"
        path.write_bytes(raw)
        assert found(path) == lines_of(raw)


def test_an_index_is_kept_and_made_again_if_the_file_or_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_FROM", 1)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([b'{"a": 1}', b"", b'{"b": 2}']))
    scans = []
    scan = module._scan
    monkeypatch.setattr(module, "_scan", lambda *given: scans.append(1) or scan(*given))
    first = found(path)
    assert (found(path), len(scans)) == (first, 1)
    [card] = (tmp_path / "cache").rglob("index.json")
    for damaged in ("offsets.bin", "lines.bin", "index.json"):
        before = len(scans)
        os.truncate(card.with_name(damaged), 8)
        assert (found(path), len(scans)) == (first, before + 1)
    digest = row_index(path).digest
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    assert row_index(path).digest != digest
    moved = path.rename(tmp_path / "other.jsonl")
    assert row_index(moved, keep=False).digest == row_index(moved).digest != digest


def test_a_file_that_changes_while_it_is_used_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n{}\n")
    index = row_index(path)
    path.write_bytes(b"{}\n")
    with pytest.raises(DataError, match="has changed since its rows were counted"):
        index.require_unchanged()
    with open_file(path) as file, pytest.raises(OSError, match="shorter"):
        read_span(file, 3, 6)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        index.require_unchanged()
