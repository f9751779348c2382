"""Rows as JSON lines: read whole, or in any parts by byte offset, each row with its line."""

import json
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import row_files
from halfbyte.data.row_files import Row, RowFile, problem_line, with_columns

LINE = st.sampled_from(
    [b'{"a": 1}', b"", b"  \t", b'{"b": "\xc3\xa9"}\r', b"[1]", b"{", b"caf\xe9", b"\xef\xbb\xbf{}"]
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@given(lines=st.lists(LINE, max_size=8), last=st.booleans(), cuts=st.lists(st.integers(0, 8)))
def test_any_division_into_ranges_of_bytes_gives_the_same_rows(scratch, lines, last, cuts):
    path = scratch / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if last and lines else b""))
    file = RowFile(path, "rows.jsonl")
    every = list(file.rows())
    assert [row.line for row in every] == [
        str(at)
        for at, line in enumerate(lines, 1)
        if line.removeprefix(b"\xef\xbb\xbf" if at == 1 else b"").strip()
    ]
    ends = np.cumsum([0, *(len(line) + 1 for line in lines)])
    ends[-1] = path.stat().st_size
    places = [0, *sorted(min(cut, len(lines)) for cut in cuts), len(lines)]
    parts = [
        list(file.read_rows(int(ends[start]), int(ends[stop]), start + 1))
        for start, stop in pairwise(places)
        if start < stop
    ]
    assert [row for part in parts for row in part] == every


@given(
    values=st.lists(st.integers(), max_size=9),
    start=st.integers(0, 9),
    stop=st.none() | st.integers(0, 12),
)
def test_a_slice_counts_rows_not_lines(scratch, values, start, stop):
    path = scratch / "slice.jsonl"
    path.write_text("".join(f"\n{value}\n" for value in values))
    file = RowFile(path, "slice.jsonl", start=start, stop=stop)
    assert [row.value for row in file.rows()] == values[start:stop]


def test_a_converted_file_has_the_lines_of_the_original_and_its_problems(tmp_path):
    raw = b'{"a": 1}\n' + problem_line("3 cells, and 2 columns", b"x,y,z") + b'\n{"a": 2}\n'
    (tmp_path / "rows.jsonl").write_bytes(raw)
    np.save(tmp_path / "lines.npy", np.array([2, 5, 9], dtype=np.int64))
    file = RowFile(
        tmp_path / "rows.jsonl", "t.csv", lines=tmp_path / "lines.npy", converted=True, named=True
    )
    assert list(file.rows()) == [
        Row("t.csv:2", {"a": 1}),
        Row("t.csv:5", "x,y,z", "3 cells, and 2 columns"),
        Row("t.csv:9", {"a": 2}),
    ]


def test_a_mark_in_a_file_of_the_user_is_malformed_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(problem_line("all is well", b"{}"))
    (row,) = RowFile(tmp_path / "a.jsonl", "a.jsonl").rows()
    assert row.problem == "malformed JSON"


def test_a_line_without_an_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 5000)
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(200 * 10**6)  # a hole of zeros, which takes no space
    tracemalloc.start()
    rows = list(RowFile(tmp_path / "a.jsonl", "a.jsonl").rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.problem for row in rows] == [None, row_files.TOO_LONG]
    assert peak < 5_000_000


@given(
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=5),
    st.lists(
        st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=3, unique_by=lambda c: c[0]
    ),
)
def test_columns_are_renamed_all_at_once(row, columns):
    found = with_columns(row, columns)
    for ours, theirs in columns:
        if theirs in row:
            assert found[ours] == row[theirs]
    names = {name for pair in columns for name in pair}
    assert {key: value for key, value in found.items() if key not in names} == {
        key: value for key, value in row.items() if key not in names
    }


def test_columns_can_be_exchanged():
    assert with_columns({"a": 1, "b": 2}, [("a", "b"), ("b", "a")]) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"messages": '[{"role": "user"}]'}, {"messages": [{"role": "user"}]}),
        ({"text": "[1]"}, {"text": "[1]"}),  # text stays text
        ({"tools": "none"}, {"tools": "none"}),
        ({"label": "False", "weight": "0"}, {"label": False, "weight": 0}),
        ({"messages": None}, {"messages": None}),
    ],
)
def test_lists_in_cells_of_tables_are_json(tmp_path, value, found):
    (tmp_path / "a").write_text(json.dumps(value))
    (row,) = RowFile(tmp_path / "a", "a", json_cells=True).rows()
    assert row.value == found
    (row,) = RowFile(tmp_path / "a", "a").rows()
    assert row.value == value


@pytest.mark.parametrize("cell", ["[{'role': 'user'}]", '["\\ud800"]', "[" * 102 + "]" * 102])
def test_a_cell_that_is_no_json_is_a_problem_of_its_row(tmp_path, cell):
    (tmp_path / "a").write_text(json.dumps({"messages": cell}))
    (row,) = RowFile(tmp_path / "a", "a", json_cells=True).rows()
    assert row.problem.startswith("column 'messages': ")
