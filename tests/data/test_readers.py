"""Readers of text: every row with its line, and a bad one never costs the next."""

import contextlib
import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import readers, row_files
from halfbyte.data.readers import RawRow, read_array, read_csv, read_lines
from halfbyte.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
CELL = st.text(st.sampled_from('ab",;\n\r\t é🙂0\x00'), max_size=6)


def rows_of(reader, raw, *more):
    return list(reader(io.BytesIO(raw), *more))


@given(
    values=st.lists(JSON, max_size=6),
    space=st.sampled_from(["", " ", "\n", "\r\n\t"]),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
)
def test_an_array_is_read_whatever_the_size_of_its_chunks(values, space, chunk, indent):
    texts = [json.dumps(value, ensure_ascii=False, indent=indent) for value in values]
    raw = (space + "[" + ",".join(space + text + space for text in texts) + "]" + space).encode(
        "utf-8", "surrogatepass"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        rows = rows_of(read_array, raw)
    assert [row.number for row in rows] == [
        1 + raw[: _start(raw, texts, at, space)].count(b"\n") for at in range(len(texts))
    ]
    for row, value in zip(rows, values, strict=True):
        if any(0xD800 <= ord(one) < 0xE000 for one in json.dumps(value, ensure_ascii=False)):
            assert row.problem == "not UTF-8"
        else:
            assert (json.loads(row.raw), row.problem) == (value, None)
            assert b"\n" not in row.raw


def _start(raw, texts, at, space):
    before = space + "[" + "".join(space + text + space + "," for text in texts[:at]) + space
    return len(before.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("raw", "good", "problem"),
    [
        (b'[1, {"a": 2} {"b"', 1, "malformed JSON; the rest of the array is not read"),
        (b"[1, tru, 2]", 1, "malformed JSON; the rest of the array is not read"),
        (b"[1, 2", 1, "malformed JSON; the rest of the array is not read"),
        (b"[1, ", 1, "the array does not end"),
        (b"[1, 2] and more", 2, "after the end of the array: not read"),
        (b"[1, " + b"[" * 100_000, 1, "malformed JSON; the rest of the array is not read"),
        (b"[1, " + b"9" * 5000 + b"]", 1, "malformed JSON; the rest of the array is not read"),
        (b"[1,]", 1, None),
    ],
)
def test_an_array_that_breaks_says_where(raw, good, problem):
    rows = rows_of(read_array, raw)
    assert [row.problem for row in rows] == [None] * good + [problem] * (problem is not None)


def test_an_element_that_is_far_too_long_ends_the_array_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 10**6)
    raw = io.BytesIO(b'[1, "' + b"x" * 40_000_000 + b'", 2]')
    tracemalloc.start()
    rows = list(read_array(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[1].problem == row_files.TOO_LONG + "; the rest of the array is not read"
    assert peak < 15_000_000


def test_white_space_without_end_takes_no_memory():
    raw = io.BytesIO(b"[" + b" " * 30_000_000 + b"1]")
    tracemalloc.start()
    assert list(read_array(raw)) == [RawRow(1, b"1")]
    assert tracemalloc.get_traced_memory()[1] < 12_000_000
    tracemalloc.stop()


@given(
    st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=6), st.sampled_from(["\n", "\r\n"])
)
def test_csv_is_read_back_with_its_lines(cells, end):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    starts = []
    for row in [["a", "b", "c"], *cells]:
        starts.append(1 + text.getvalue().count("\n"))
        writer.writerow(row)
    rows = rows_of(read_csv, text.getvalue().encode(), "t.csv")
    assert all(row.problem is None for row in rows)
    assert [row.number for row in rows] == starts[1:]
    assert [json.loads(row.raw) for row in rows] == [
        {name: cell for name, cell in zip("abc", row, strict=True) if cell} for row in cells
    ]


def test_csv_is_what_pyarrow_reads():
    from pyarrow import csv as arrow

    raw = b'question,answer,n\n"What, ""now""?",Yes\xc3\xa9,01\n"two\nlines",,2.50\n,x,\n'
    theirs = arrow.read_csv(
        io.BytesIO(raw),
        parse_options=arrow.ParseOptions(newlines_in_values=True),
        convert_options=arrow.ConvertOptions(
            column_types={"n": "string"}, strings_can_be_null=True, null_values=[""]
        ),
    ).to_pylist()
    ours = [json.loads(row.raw) for row in rows_of(read_csv, raw, "t.csv")]
    assert ours == [{k: v for k, v in row.items() if v is not None} for row in theirs]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"1", "1 cells, and 2 columns"),
        (b"1,2,3", "3 cells, and 2 columns"),
        (b'1,"open', "malformed CSV: text after a quote was closed"),
        (b'1,"a"b', "malformed CSV: text after a quote was closed"),
        (b"1,caf\xe9", "not UTF-8"),
        (b"1,a\rb", "malformed CSV: a carriage return outside quotes"),
    ],
)
def test_a_bad_row_of_csv_costs_no_other(line, problem):
    raw = b'a,b\n0,"x\n\ny"\n' + line + b'\n3,"4"\n\n5,6\n'
    rows = rows_of(read_csv, raw, "t.csv")
    assert [(row.number, row.problem) for row in rows] == [
        (2, None),
        (5, problem),
        (6, None),
        (8, None),
    ]
    assert json.loads(rows[0].raw) == {"a": "0", "b": "x\n\ny"}
    assert rows[1].raw.startswith(line[:5])


def test_a_quote_that_is_never_closed_costs_one_row(monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 3000)
    raw = b'a,b\n1,"open\n' + b"2,x\n" * 2000 + b'3,"y'
    rows = rows_of(read_csv, raw, "t.csv")
    assert [row.number for row in rows if row.problem] == [2, 2003]
    assert len(rows) == 2002
    assert csv.field_size_limit() == 131_072  # as it was


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_found(delimiter):
    raw = f"a{delimiter}b\n1{delimiter}2,5\n".encode()
    assert [json.loads(row.raw) for row in rows_of(read_csv, raw, "t")] == [{"a": "1", "b": "2,5"}]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a,b,a\n1,2,3\n", "the column 'a' occurs twice"),
        (b'a,"b\n1,2\n', "t.csv, line 1: expected names of columns: malformed CSV"),
        (b"caf\xe9,b\n1,2\n", "t.csv, line 1: expected names of columns: not UTF-8"),
    ],
)
def test_a_first_line_without_names_is_an_error(raw, message):
    with pytest.raises(DataError, match=message):
        rows_of(read_csv, raw, "t.csv")


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"a,b\n", b"\xef\xbb\xbf"])
def test_csv_without_rows_has_none(raw):
    assert rows_of(read_csv, raw, "t.csv") == []


@given(st.binary(max_size=80))
def test_any_bytes_are_rows_or_one_error(raw):
    for reader in (read_lines, read_array):
        for row in rows_of(reader, raw):
            assert b"\n" not in row.raw or row.problem
    with contextlib.suppress(DataError):
        rows_of(read_csv, raw, "t.csv")


def test_a_byte_order_mark_is_none_of_the_first_column():
    (row,) = rows_of(read_csv, b"\xef\xbb\xbfa,b\n1,2\n", "t.csv")
    assert json.loads(row.raw) == {"a": "1", "b": "2"}


def test_lines_are_what_gzip_holds():
    raw = gzip.compress(b'{"a": 1}\n\n{"a": 2}')
    with gzip.open(io.BytesIO(raw)) as file:
        assert list(read_lines(file)) == [RawRow(1, b'{"a": 1}'), RawRow(3, b'{"a": 2}')]
