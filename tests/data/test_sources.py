"""Reading rows: every row has its line, a bad line is a problem, and only emptiness is an error."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import row_files
from halfbyte.data.sources import read_source
from halfbyte.errors import DataError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def read(path, text, *, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return read_source(path).rows


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@given(values=st.lists(JSON, min_size=1, max_size=6), data=st.data())
def test_lines_and_arrays_are_read_back_with_their_lines(scratch, values, data):
    breaks = data.draw(st.lists(st.integers(1, 3), min_size=len(values), max_size=len(values)))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    ascii_only = data.draw(st.booleans())
    texts = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    expected = [(str(1 + sum(breaks[:at])), value) for at, value in enumerate(values)]

    # A first row that is itself a list would make the lines an array.
    lines = "".join(text + end * count for text, count in zip(texts, breaks, strict=True))
    if not isinstance(values[0], list):
        rows = read(scratch / "rows.jsonl", lines)
        assert [(row.line, row.value) for row in rows] == expected

    joined = "".join(end * count + text + "," for text, count in zip(texts, breaks, strict=True))
    rows = read(scratch / "rows.json", "[" + joined[:-1] + end + "]")
    lines_of = [str(1 + sum(breaks[: at + 1])) for at in range(len(values))]
    assert [(row.line, row.value) for row in rows] == list(zip(lines_of, values, strict=True))


@given(raw=st.binary(min_size=1, max_size=60))
def test_any_bytes_are_rows_problems_or_one_error(scratch, raw):
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or not raw.removeprefix(b"\xef\xbb\xbf").strip():
        with pytest.raises(DataError, match=r"empty|UTF-16"):
            read(scratch / "bytes.jsonl", raw)
    elif raw.split() != [b"[", b"]"] and raw.strip() != b"[]":
        assert read(scratch / "bytes.jsonl", raw)


def test_a_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    rows = read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \r\n{"a": 2}')
    assert [(row.line, row.value) for row in rows] == [("1", {"a": 1}), ("4", {"a": 2})]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    rows = read(tmp_path / "a.jsonl", '{"a": "x\u2028y"}\n{"a": 2}')
    assert [row.value for row in rows] == [{"a": "x\u2028y"}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": ', "malformed JSON"),
        (b"caf\xe9", "not UTF-8"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a":' * 100_000, "malformed JSON"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested more than 100 levels deep"),
    ],
    ids=["cut", "latin-1", "surrogate", "too deep for Python", "deep"],
)
def test_a_bad_line_is_a_problem_and_the_next_is_read(tmp_path, line, problem):
    rows = read(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert [row.line for row in rows] == ["1", "2", "3"]
    assert problem in rows[1].problem
    assert rows[1].value
    assert rows[1].value.encode()[:3] == line[:3]
    assert rows[2].value == {"a": 3}


@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_a_row_that_takes_minutes_to_encode_is_a_problem(tmp_path, monkeypatch, end):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 100)
    rows = [json.dumps({"a": "x" * count}) for count in (80, 200, 3)]
    text = "\n".join(rows) if end == "jsonl" else "[" + ",\n".join(rows) + "]"
    found = read(tmp_path / f"a.{end}", text)
    assert [row.line for row in found] == ["1", "2", "3"]
    assert [row.problem for row in found] == [None, "longer than 8 MB; divide it", None]
    assert found[2].value == {"a": "xxx"}
    one = json.dumps({"a": ["x" * 200]}, indent=1)
    assert read(tmp_path / "one.json", one) == [("1", one, "longer than 8 MB; divide it")]


def test_nesting_has_a_limit(tmp_path):
    lines = [b'{"a":' * depth + b"1" + b"}" * depth for depth in (100, 101)]
    rows = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [row.problem for row in rows] == [None, "nested more than 100 levels deep"]


def test_the_file_of_a_directory_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: expected a file, found a pipe"):
        read_source(tmp_path)


def test_an_array_is_read_up_to_where_it_breaks(tmp_path):
    rows = read(tmp_path / "a.json", '[\n{"a": 1},\n{"a": 2}\n{"a": 3}]')
    assert [(row.line, row.problem is None) for row in rows] == [("2", True), ("3", False)]
    assert "is not read" in rows[1].problem


def test_an_array_not_in_utf8_tells_the_line(tmp_path):
    (row,) = read(tmp_path / "a.json", b'[\n"caf\xe9"]')
    assert (row.line, row.problem) == ("2", "not UTF-8")


def test_one_object_over_several_lines_is_one_row(tmp_path):
    (row,) = read(tmp_path / "a.json", json.dumps({"messages": []}, indent=2))
    assert row.value == {"messages": []}


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "\ufeff"])
def test_an_empty_file_is_an_error(tmp_path, text):
    with pytest.raises(DataError, match="empty"):
        read(tmp_path / "a.json", text)


def test_utf16_is_an_error_that_says_so(tmp_path):
    with pytest.raises(DataError, match="UTF-16"):
        read(tmp_path / "a.jsonl", '{"a": 1}', encoding="utf-16")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".GZ"])
def test_other_kinds_of_file_are_refused_with_a_way_out(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="expected JSONL"):
        read_source(tmp_path / f"a{suffix}")


def test_a_missing_file_names_the_one_that_was_meant(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"Did you mean .*train\.jsonl"):
        read_source(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="There is no data file"):
        read_source("no/such/file.jsonl")


def test_a_file_that_cannot_be_looked_up_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_source(str(tmp_path / ("x" * 5000)))


def test_a_directory_gives_train_alone_and_says_what_it_left(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "valid.jsonl").write_text('{"a": 2}\n')
    rows, notes = read_source(tmp_path)
    assert [(row.line, row.value) for row in rows] == [("1", {"a": 1})]
    assert notes == ("read train.jsonl only, not valid.jsonl",)


def test_a_directory_without_train_gives_every_file_by_name(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": 2}\n')
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n')
    (tmp_path / "notes.md").write_text("not data")
    rows, notes = read_source(tmp_path)
    assert [(row.line, row.value["a"]) for row in rows] == [("a.jsonl:2", 1), ("b.jsonl:1", 2)]
    assert notes == ("read a.jsonl, b.jsonl",)


def test_a_directory_without_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match="contains no data"):
        read_source(tmp_path)


def test_a_hub_id_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_source("someone/orders")


def test_a_hub_id_is_read_through_the_package(monkeypatch):
    def load_dataset(name, split):
        if name == "someone/private":
            raise OSError("not found")
        return [{"text": f"{name} {split}"}]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (row,) = read_source("someone/orders").rows
    assert (row.line, row.value) == ("1", {"text": "someone/orders train"})
    with pytest.raises(DataError, match="could not be read from the hub: not found"):
        read_source("someone/private")
