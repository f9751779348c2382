"""What is not JSON lines becomes JSON lines once, with the lines of the original."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from halfbyte.data import conversion
from halfbyte.data.conversion import count_rows, row_file
from halfbyte.data.kinds import DataFile, is_file_name
from halfbyte.data.loading import open_source
from halfbyte.errors import DataError

PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LINE = st.sampled_from(
    [
        b'{"a": 1}',
        b"",
        b"  ",
        b'{"b": "\xc3\xa9"}\r',
        b"{",
        b"caf\xe9",
        b'!["x", "y"]',
        b"\xef\xbb\xbf{}",
    ]
)


def convert(path, limit=None, progress=None):
    return row_file(DataFile.of(path, path.name), limit=limit, progress=progress)[0]


def rows_of(path, **options):
    return list(convert(path, **options).rows())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("conversion")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The cache, in which files of any size are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(conversion, "_KEPT", 0)
    return tmp_path / "cache" / "halfbyte" / "data"


@given(lines=st.lists(LINE, max_size=9), suffix=st.sampled_from([*PACKED][1:]))
def test_a_compressed_file_has_the_rows_of_the_plain_one(scratch, lines, suffix):
    raw = b'{"first": 0}\n' + b"\n".join(lines)
    (scratch / "a.jsonl").write_bytes(raw)
    (scratch / f"a.jsonl{suffix}").write_bytes(PACKED[suffix](raw))
    plain, packed = rows_of(scratch / "a.jsonl"), rows_of(scratch / f"a.jsonl{suffix}")
    assert [(row.line, row.problem) for row in packed] == [(row.line, row.problem) for row in plain]
    for ours, theirs in zip(packed, plain, strict=True):
        assert ours.value == (theirs.value if theirs.problem is None else ours.value)
        assert str(ours.value).strip() == str(theirs.value).strip()


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(
    ("name", "raw", "found"),
    [
        ("a.json", b'[{"a": 1},\n{"a": 2}]', [("1", {"a": 1}), ("2", {"a": 2})]),
        ("a.json", b'{"a":\n1}', [("1", {"a": 1})]),
        ("a.json", b'{"a": 1}\n\n{"a": 2}', [("1", {"a": 1}), ("3", {"a": 2})]),
        ("a.ndjson", b'{"a": 1}', [("1", {"a": 1})]),
        ("a", b" [\n1]", [("2", 1)]),
        (
            "a.csv",
            b'a,b\n\n1,"x\ny"\n2,z',
            [("3", {"a": "1", "b": "x\ny"}), ("5", {"a": "2", "b": "z"})],
        ),
        ("a.tsv", b"a\tb\n1\t2,3", [("2", {"a": "1", "b": "2,3"})]),
    ],
)
def test_every_kind_compressed_or_not(tmp_path, suffix, name, raw, found):
    (tmp_path / f"{name}{suffix}").write_bytes(PACKED[suffix](raw))
    assert [(row.line, row.value) for row in rows_of(tmp_path / f"{name}{suffix}")] == found


def test_content_decides_before_the_name(tmp_path):
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(b'{"a": 1}'))
    for name in ("a.jsonl", "b.jsonl"):
        assert [row.value for row in rows_of(tmp_path / name)] == [{"a": 1}]


def test_json_lines_are_used_in_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    assert convert(tmp_path / "a.jsonl").path == tmp_path / "a.jsonl"


@pytest.mark.parametrize("suffix", [*PACKED][1:])
@pytest.mark.parametrize("keep", [0.2, 0.7, 0.98])
def test_a_compressed_file_that_was_cut_is_an_error(tmp_path, suffix, keep):
    raw = PACKED[suffix](json.dumps({"a": list(range(4000))}).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match="is damaged or incomplete"):
        convert(path)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "a.xlsx",
            b"PK\3\4",
            r"is a \.xlsx file: expected JSONL, JSON, CSV, TSV, Parquet or Arrow",
        ),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), r"is a \.tar file"),
        ("a.jsonl.gz", b'{"a": 1}', "is not compressed as its name says"),
        ("a.parquet", b"PAR2", "a.parquet cannot be read as Parquet"),
        ("a.parquet", b"", "a.parquet cannot be read as Parquet"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "decompress it first"),
        ("a.arrow", b"nonsense", "a.arrow cannot be read as Arrow"),
        ("a.feather", b"FEA1....", "first version of Feather"),
        ("a.csv", b"\xff\xfea\0,\0", "is in UTF-16"),
        ("a.json.gz", gzip.compress(b"\xff\xfe[\0", mtime=0), "is in UTF-16"),
    ],
)
def test_what_is_not_read_is_one_message(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        convert(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.CSV.gz", "a.xlsx", "a.zst", "a.tar.gz"])
def test_names_of_files_are_no_ids(name):
    assert is_file_name(f"owner/{name}")
    assert not is_file_name("owner/data-v1.5")


def test_a_large_file_is_converted_once(kept, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_bytes(b"a\n\n1\n2\n")
    first = convert(tmp_path / "a.csv")
    assert kept in first.path.parents
    monkeypatch.setattr(conversion, "_write", None)  # not called again
    assert convert(tmp_path / "a.csv") == first
    assert np.load(first.lines).tolist() == [3, 4]
    assert count_rows(first) == 2


def test_a_file_that_changes_is_converted_again(kept, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a\n1\n")
    first = convert(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"a\n2\n")
    os.replace(tmp_path / "b.csv", tmp_path / "a.csv")
    assert [row.value for row in rows_of(tmp_path / "a.csv")] == [{"a": "2"}]
    assert [row.value for row in first.rows()] == [{"a": "1"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "lines.npy", "card.json"])
def test_a_damaged_conversion_is_made_again(kept, tmp_path, name, monkeypatch):
    from halfbyte import user_cache

    (tmp_path / "a.csv").write_bytes(b"a\n\n1\n2\n")
    first = convert(tmp_path / "a.csv")
    (first.path.parent / name).write_bytes(b"{")
    assert [row.value for row in rows_of(tmp_path / "a.csv")] == [{"a": "1"}, {"a": "2"}]
    assert first.path.parent in user_cache._locks


def test_no_more_is_converted_than_is_needed(kept, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a\n" + b"1\n" * 1000)
    limited = convert(tmp_path / "a.csv", limit=7)
    assert count_rows(limited) == 7
    assert count_rows(convert(tmp_path / "a.csv")) == 1000


def test_an_error_while_it_is_converted_leaves_nothing(kept, tmp_path):
    raw = gzip.compress(b'{"a": 1}\n' * 500_000)
    (tmp_path / "a.jsonl.gz").write_bytes(raw[:-6])
    with pytest.raises(DataError, match="damaged or incomplete"):
        convert(tmp_path / "a.jsonl.gz")
    assert [path.name for path in kept.iterdir()] == [".lock"]


def test_progress_ends_with_everything(tmp_path):
    seen = []
    (tmp_path / "a.csv").write_bytes(b"a\n" + (b"x" * 200 + b"\n") * 20_000)
    convert(tmp_path / "a.csv", progress=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "a.csv").stat().st_size
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    assert 0 < seen[0][0] < size


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_without_the_cache_converted_files_are_in_a_temporary_directory(tmp_path, kept, suffix):
    rows = [{"text": f"row {at}"} for at in range(20)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for keep in (False, True):
        source = open_source(path, keep=keep)
        found = list(source.table.read(np.arange(20)))
        assert [row.value for row in found] == rows
        assert kept.exists() == keep
        assert (kept in source.table.files[0].path.parents) == keep
    # And what is there is not used.
    source = open_source(path, keep=False)
    assert kept not in source.table.files[0].path.parents
