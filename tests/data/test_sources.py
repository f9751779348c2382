"""Reading rows: every row has its line, a bad line is a problem, and only emptiness is an error."""

import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.config.data_sources import DataSource
from halfbyte.data import row_files, sources
from halfbyte.data.sources import local_paths, open_sources, read_source, require_source
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


# The first bytes of Parquet, Arrow, gzip, Zstandard, bzip2 and xz files.
SIGNATURES = (b"PAR1", b"ARROW1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00")


@given(raw=st.binary(min_size=1, max_size=60) | st.sampled_from(SIGNATURES))
def test_any_bytes_are_rows_problems_or_one_error(scratch, raw):
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or not raw.removeprefix(b"\xef\xbb\xbf").strip():
        with pytest.raises(DataError, match=r"empty|UTF-16"):
            read(scratch / "bytes.jsonl", raw)
    elif raw.startswith(SIGNATURES):
        with pytest.raises(DataError, match=r"cannot be read as|damaged or incomplete"):
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
    monkeypatch.setattr(row_files, "LONGEST_ROW", 10_000)
    rows = [json.dumps({"a": "x" * count}) for count in (8000, 20_000, 3)]
    text = "\n".join(rows) if end == "jsonl" else "[" + ",\n".join(rows) + "]"
    found = read(tmp_path / f"a.{end}", text)
    assert [row.line for row in found] == ["1", "2", "3"]
    assert [row.problem for row in found] == [None, "longer than 8 MB; divide it", None]
    assert found[2].value == {"a": "xxx"}
    one = json.dumps({"a": ["x" * 20_000]}, indent=1)
    (row,) = read(tmp_path / "one.json", one)
    assert (row.line, row.problem) == ("1", "longer than 8 MB; divide it")


@pytest.mark.parametrize("start", ["", "\n", "{\n", '{"cut": \n'])
def test_objects_on_lines_stay_rows_however_the_file_begins(tmp_path, monkeypatch, start):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 1000)
    rows = read(tmp_path / "a.json", start + '{"a": 1}\n' * 500)  # longer than a row may be
    assert [row.value for row in rows if row.problem is None] == [{"a": 1}] * 500
    assert len(rows) == 500 + bool(start.strip())


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


@pytest.mark.parametrize("suffix", [".txt", ".xlsx", ".ZIP"])
def test_other_kinds_of_file_are_refused_with_a_way_out(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"a row")
    with pytest.raises(DataError, match="expected JSONL, JSON, CSV, TSV, Parquet or Arrow"):
        read_source(tmp_path / f"a{suffix}")


def test_a_missing_file_names_the_one_that_was_meant(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"Did you mean .*train\.jsonl"):
        read_source(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="There is no data file"):
        read_source("no/such/file.jsonl")


def test_a_missing_file_is_said_before_another_is_converted(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\nx\n")
    monkeypatch.setattr(sources, "row_file", lambda *_, **__: pytest.fail("it was converted"))
    with pytest.raises(DataError, match="There is no data file"):
        open_sources([tmp_path / "a.csv", tmp_path / "b.csv"])


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


def write(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def values(data, **options):
    return [row.value for row in open_sources(data, **options).rows()]


def test_several_sources_are_read_in_their_order_and_lines_name_their_file(tmp_path):
    one, two = write(tmp_path / "one.jsonl", 1, 2), write(tmp_path / "two.jsonl", 3)
    found = open_sources([two, one])
    assert [(row.line, row.value) for row in found.rows()] == [
        ("two.jsonl:1", 3),
        ("one.jsonl:1", 1),
        ("one.jsonl:2", 2),
    ]
    assert (found.names, found.weights) == ([two, one], None)
    assert [file.source for file in found.files] == [0, 1]


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path):
    one, two = write(tmp_path / "x" / "a.jsonl", 1), write(tmp_path / "y" / "a.jsonl", 2)
    assert [row.line for row in open_sources([one, two]).rows()] == [f"{one}:1", f"{two}:1"]


def test_weights_are_of_sources(tmp_path):
    one = write(tmp_path / "one.jsonl", 1)
    write(tmp_path / "d" / "train.jsonl", 2)
    found = open_sources([f"{one}:0.7", DataSource(path=str(tmp_path / "d"), weight=3)])
    assert found.weights == [0.7, 3.0]
    with pytest.raises(DataError, match=r"two.* has no weight.*give every source a weight"):
        open_sources([f"{one}:0.7", write(tmp_path / "two.jsonl", 2)])


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    start=st.integers(-6, 6),
    stop=st.none() | st.integers(-6, 12),
    most=st.none() | st.integers(1, 9),
)
def test_rows_of_several_files_are_those_of_one_list(scratch, counts, start, stop, most):
    directory = scratch / "-".join(map(str, counts))
    every = list(range(sum(counts)))
    left = iter(every)
    for at, count in enumerate(counts):
        write(directory / f"{at}.jsonl", *(next(left) for _ in range(count)))
    expected = every[start:stop][:most]
    spec = f"{directory}[{start}:{'' if stop is None else stop}]"
    if expected:
        assert values(spec, max_samples=most) == expected
    else:
        with pytest.raises(DataError, match="has no rows in"):
            open_sources(spec, max_samples=most)


def test_the_first_rows_of_each_source(tmp_path):
    one, two = write(tmp_path / "one.jsonl", 1, 2, 3), write(tmp_path / "two.jsonl", 4)
    assert values([one, two], max_samples=2) == [1, 2, 4]


def test_columns_are_read_under_our_names(tmp_path):
    (tmp_path / "t.csv").write_text('chat,n\n"[{""role"": ""user""}]",1\n')
    rows = write(tmp_path / "a.jsonl", {"chat": 1, "messages": 2}, {"messages": 3})
    columns = {"messages": "chat"}
    assert values(tmp_path / "t.csv", columns=columns) == [
        {"messages": [{"role": "user"}], "n": "1"}
    ]
    assert values(rows, columns=columns) == [{"messages": 1}, {"messages": 3}]
    own = DataSource(path=rows, columns={"messages": "messages"})
    assert values([own], columns=columns)[0] == {"chat": 1, "messages": 2}
    with pytest.raises(DataError, match=r"no column 'chta' .* only 'chat', 'n'; did you mean"):
        open_sources(tmp_path / "t.csv", columns={"messages": "chta"})


@pytest.fixture
def standard_input(monkeypatch):
    """Sets standard input."""

    def use(raw):
        monkeypatch.setattr(sources, "_spool", [])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw))))

    return use


@pytest.mark.parametrize("raw", [b"1\n\n2", b"[1,\n\n2]", gzip.compress(b"1\n\n2", mtime=0)])
def test_standard_input_is_read_whatever_it_holds(standard_input, raw):
    standard_input(raw)
    assert list(read_source("-").rows) == [("1", 1, None), ("3", 2, None)]
    assert values(["-", "-[1:]"]) == [1, 2, 2]  # it is read once


def test_standard_input_that_is_a_terminal_or_empty_is_an_error(standard_input, monkeypatch):
    standard_input(b"")
    with pytest.raises(DataError, match="standard input is empty"):
        read_source("-")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(DataError, match="pipe it in, or name a file"):
        read_source("-")


def test_a_stream_is_read_as_it_comes(monkeypatch, tmp_path):
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "r") as reader, os.fdopen(write_end, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", reader)
        writer.write(b'{"a": 1}\n{"a"')
        stream = open_sources("-", streaming=True).stream()
        assert next(stream) == ("1", {"a": 1}, None)
        writer.write(b": 2}\nbad\n")
        writer.close()
        assert [(row.line, row.problem) for row in stream] == [
            ("2", None),
            ("3", "malformed JSON"),
        ]


def test_streams_of_files_are_the_rows_of_files(tmp_path):
    (tmp_path / "t.csv").write_text('messages,n\n"[1]",1\n"[",2\nx\n')
    rows = write(tmp_path / "d" / "a.jsonl", 1, 2, 3)
    write(tmp_path / "d" / "b.jsonl", 4)
    several = [str(tmp_path / "t.csv"), str(tmp_path / "d")]
    streamed = list(open_sources(several, streaming=True).stream())
    # A stream has not seen the other files' names when it starts, so it says their paths.
    assert [row._replace(line=Path(row.line).name) for row in streamed] == list(
        open_sources(several).rows()
    )
    assert [row.value for row in open_sources(f"{rows}[1:]", streaming=True).stream()] == [2, 3]


def test_streams_are_mixed_by_weights(tmp_path):
    one = write(tmp_path / "one.jsonl", *range(3000))
    two = write(tmp_path / "two.jsonl", *range(-3000, 0))
    opened = open_sources([f"{one}:3", f"{two}:1"], streaming=True)
    found = [row.value for row in opened.stream(seed=1)]
    assert sorted(found) == list(range(-3000, 3000))
    assert 0.7 < sum(value >= 0 for value in found[:1000]) / 1000 < 0.8
    assert found == [row.value for row in opened.stream(seed=1)]
    assert found != [row.value for row in opened.stream(seed=2)]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="expected a file, found a pipe"):
        open_sources(str(tmp_path / "rows.jsonl"))


def test_a_file_has_no_split(tmp_path):
    path = write(tmp_path / "a.jsonl", 1)
    assert values([DataSource(path=path, split="train")]) == [1]
    with pytest.raises(DataError, match="is a file, which has no split 'test'"):
        open_sources([DataSource(path=path, split="test")])


def test_sources_are_looked_up_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", 1)
    require_source([path, f"{path}:0.5", "owner/name", f"{tmp_path}/*.jsonl", f"{path}[:5]"])
    with pytest.raises(DataError, match="There is no data file or directory"):
        require_source([path, f"{tmp_path}/b.jsonl:0.5"])
    assert local_paths([f"{path}:2", "owner/name", "-"]) == [tmp_path / "a.jsonl"]
