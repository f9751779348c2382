"""Parquet and Arrow: what pyarrow writes is read back, and damage is one message."""

import datetime
import decimal
import json
import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, parquet

from halfbyte.data import tables
from halfbyte.data.readers import RawRow
from halfbyte.data.tables import open_arrow, open_parquet, rows_of
from halfbyte.errors import DataError

SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.large_string()})),
        "n": pa.int64(),
        "x": pa.float64(),
        "flag": pa.bool_(),
        "words": pa.dictionary(pa.int32(), pa.string()),
    }
)
TEXT = st.none() | st.text(st.characters(codec="utf-8"), max_size=5)
ROW = st.fixed_dictionaries(
    {
        "messages": st.none()
        | st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3),
        "n": st.none() | st.integers(-(2**63), 2**63 - 1),
        "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.none() | st.booleans(),
        "words": TEXT,
    }
)
ROWS = [
    {"messages": [{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": "é"}]}
    for at in range(600)
]


def read(path):
    opener = open_parquet if path.suffix == ".parquet" else open_arrow
    with opener(path, path.name) as table:
        return list(table.rows)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


KINDS = ["a.parquet", "a.feather", "a.arrow"]


@given(rows=st.lists(ROW, max_size=5), kind=st.sampled_from(KINDS), part=st.integers(1, 3))
def test_rows_are_read_back(scratch, rows, kind, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_ROWS", part)
        found = read(save(scratch / kind, pa.Table.from_pylist(rows, SCHEMA)))
    assert [(row.number, row.problem) for row in found] == [
        (at + 1, None) for at in range(len(rows))
    ]
    assert [json.loads(row.raw) for row in found] == rows


def save(path, table, **options):
    """Writes a table to the kind of file that the name says."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
    elif path.suffix == ".feather":
        feather.write_feather(table, path, **options)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_json_becomes_text_or_the_problem_of_its_row(tmp_path, kind):
    columns = {
        "day": [datetime.date(2026, 1, 2), None, None, None],
        "money": [decimal.Decimal("1.50"), None, None, None],
        "raw": [b"caf\xc3\xa9", b"\xff\xd8\xff", None, None],
        "at": pa.array([1, 2, 2**62, 3], pa.timestamp("us")),
        "pairs": pa.array([[("a", 1)], [], None, None], pa.map_(pa.string(), pa.int64())),
    }
    rows = read(save(tmp_path / kind, pa.table(columns)))
    assert json.loads(rows[0].raw) == {
        "day": "2026-01-02",
        "money": "1.50",
        "raw": "café",
        "at": "1970-01-01T00:00:00.000001",
        "pairs": [["a", 1]],
    }
    assert [row.problem for row in rows] == [
        None,
        "column 'raw': bytes that are not text",
        "column 'at': date value out of range",
        None,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_utf8_is_the_problem_of_its_row(tmp_path, kind):
    texts = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    rows = read(save(tmp_path / kind, pa.table({"text": texts.view(pa.string())})))
    assert [row.problem for row in rows] == [None, "not UTF-8", None]
    assert json.loads(rows[2].raw) == {"text": "c"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_occurs_twice_is_an_error(tmp_path, kind):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    if kind == "a.parquet":
        parquet.write_table(table, tmp_path / kind)
    else:
        opened = pa.ipc.new_file if kind == "a.feather" else pa.ipc.new_stream
        with opened(tmp_path / kind, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(DataError, match="the column 'a' occurs twice"):
        read(tmp_path / kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_file_is_rows_problems_or_one_error(tmp_path, kind, packed):
    plain = "none" if kind == "a.parquet" else "uncompressed"
    options = {} if kind == "a.arrow" else {"compression": "zstd" if packed else plain}
    raw = save(tmp_path / kind, pa.Table.from_pylist(ROWS), **options).read_bytes()
    generator = random.Random(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(raw)
        if generator.random() < 0.2:
            del damaged[generator.randrange(len(raw)) :]
        for _ in range(generator.choice([1, 1, 5, 50])):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / kind).write_bytes(damaged)
        try:
            rows = read(tmp_path / kind)
        except DataError as error:
            assert f"{kind} cannot be read as " in str(error) or "occurs twice" in str(error)  # noqa: PT017
            outcomes.add("error")
        else:
            outcomes.add("rows")
            assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert outcomes == {"error", "rows"}


def test_values_of_python_are_rows():
    rows = list(rows_of([{"a": 1}, {"a": object()}, {"a": "\ud800"}, {"a": {1: [b"x"]}}], first=5))
    assert rows[0] == RawRow(5, b'{"a": 1}')
    assert rows[1].problem == "column 'a': expected text or numbers, found object"
    assert rows[2].problem == "column 'a': not UTF-8"
    assert json.loads(rows[3].raw) == {"a": {"1": ["x"]}}
