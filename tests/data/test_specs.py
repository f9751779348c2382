"""The grammar of a source: what a file's name is, and what is said about it after the name."""

import os

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from halfbyte.config.data_sources import DataSource
from halfbyte.data.specs import Slice, Spec
from halfbyte.errors import DataError


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl:0.5").write_text("{}\n")
    (tmp_path / "c[:5]").write_text("{}\n")
    (tmp_path / "rows").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.jsonl", Spec("a.jsonl")),
        ("a.jsonl:0.7", Spec("a.jsonl", weight=0.7)),
        ("a.jsonl:3", Spec("a.jsonl", weight=3.0)),
        ("a.jsonl:.5", Spec("a.jsonl", weight=0.5)),
        ("a.jsonl:1e-2", Spec("a.jsonl", weight=0.01)),
        ("a.jsonl[:500]", Spec("a.jsonl", Slice(None, "500"))),
        ("a.jsonl[100:200]:2", Spec("a.jsonl", Slice("100", "200"), 2.0)),
        ("a.jsonl[-10%:]", Spec("a.jsonl", Slice("-10%", None))),
        ("a.jsonl#500", Spec("a.jsonl", Slice(None, "500"))),
        ("b.jsonl:0.5", Spec("b.jsonl:0.5")),  # a file of that name
        ("b.jsonl:0.5:0.25", Spec("b.jsonl:0.5", weight=0.25)),
        ("c[:5]", Spec("c[:5]")),
        ("c[:5][:2]", Spec("c[:5]", Slice(None, "2"))),
        ("rows:test", Spec("rows", split="test")),
        ("rows:test[:5]:2", Spec("rows", Slice(None, "5"), 2.0, split="test")),
        ("*.jsonl:2", Spec("*.jsonl", weight=2.0)),
        (r"C:\data\x.jsonl", Spec(r"C:\data\x.jsonl")),
        (r"C:\data\x.jsonl:0.5", Spec(r"C:\data\x.jsonl", weight=0.5)),
        ("-", Spec("-")),
        ("-[:9]", Spec("-", Slice(None, "9"))),
        ("o/n", Spec("o/n")),
        ("o/n:test", Spec("o/n", split="test")),
        ("o/n:en:test", Spec("o/n", config="en", split="test")),
        ("o/n:en:test[10%:20%]:0.5", Spec("o/n", Slice("10%", "20%"), 0.5, "en", "test")),
        ("o/n#100", Spec("o/n", Slice(None, "100"))),
        ("rows/n:test", Spec("rows/n:test")),  # a mistyped path: there is a directory rows
        ("x[1].jsonl", Spec("x[1].jsonl")),
    ],
)
def test_what_is_said_after_a_name(text, spec):
    assert Spec.parse(text) == spec


def test_a_home_directory_is_found(directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory))
    assert Spec.parse("~/a.jsonl:2") == Spec(f"{directory}/a.jsonl", weight=2.0)


@pytest.mark.parametrize(
    ("given_", "spec"),
    [
        ({"path": "a.jsonl", "weight": 2}, Spec("a.jsonl", weight=2.0)),
        ({"path": "a.jsonl[:5]", "columns": {"text": "body"}},
         Spec("a.jsonl", Slice(None, "5"), columns=(("text", "body"),))),
        ({"path": "o/n", "config": "en", "split": "test[:9]"},
         Spec("o/n", Slice(None, "9"), None, "en", "test")),
        ({"path": "o/n", "split": "train[:1%]+test"}, Spec("o/n", split="train[:1%]+test")),
        ({"path": "rows", "split": "test"}, Spec("rows", split="test")),
    ],
)  # fmt: skip
def test_a_mapping_says_the_same(given_, spec):
    assert Spec.parse(DataSource(**given_)) == spec


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("a.jsonl:0", "expected more than 0"),
        ("a.jsonl[:101%]", "at most 100%"),
        (f"a.jsonl[:{10**30}]", "at most 18 digits"),
        (DataSource(path="a.jsonl:2", weight=3), "`weight` of 'a.jsonl:2' is given twice"),
        (DataSource(path="o/n:test", split="train"), "`split` of 'o/n:test' is given twice"),
        (DataSource(path="o/n[:5]", split="train[:6]"), "are given twice"),
        ("x" * 5000, "cannot be read"),
        ("~nobody-of-this-name/a", "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_an_error(given_, message):
    with pytest.raises(DataError, match=message):
        Spec.parse(given_)


rows = st.none() | st.integers(-120, 120).map(str)
percents = st.none() | st.integers(-100, 100).map(lambda number: f"{number}%")


@given(bounds=st.tuples(rows, rows) | st.tuples(percents, percents), count=st.integers(0, 110))
def test_rows_are_those_that_datasets_takes(bounds, count):
    datasets = pytest.importorskip("datasets", reason="the package datasets is the reference")
    # [-1%:] of ten rows is all of them there, and none here.
    for bound in bounds:
        negative = bound is not None and bound.startswith("-") and bound.endswith("%")
        assume(not negative or round(int(bound[:-1]) * count / 100) != 0)
    start, stop = bounds
    instruction = datasets.ReadInstruction.from_spec(f"train[{start or ''}:{stop or ''}]")
    (absolute,) = instruction.to_absolute({"train": count})
    begin = 0 if absolute.from_ is None else absolute.from_
    end = count if absolute.to is None else absolute.to
    assert list(Slice(start, stop).of(count)) == list(range(begin, end))


def test_a_part_from_the_end_that_rounds_to_no_row_is_none():
    assert list(Slice("-1%").of(10)) == []
    assert list(Slice("-10%").of(10)) == [9]


def test_bounds_that_need_the_number_of_rows_are_known_as_such():
    assert Slice("5", "9").known == (5, 9)
    assert Slice().known == (0, None)
    assert Slice("-5").known is None
    assert Slice(None, "5%").known is None


def test_nothing_but_names_is_looked_up(directory):
    os.mkfifo(directory / "pipe")
    assert Spec.parse("pipe") == Spec("pipe")  # not opened, which would wait
