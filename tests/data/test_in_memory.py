"""Rows of a program are read as those of a file with the same content."""

import json

import pytest

from halfbyte.data import RowsInMemory, load_dataset
from halfbyte.errors import DataError
from tests.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
ROWS = [
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No."}]},
    {"prompt": "What?", "completion": "That.", "id": 3},
    {"instruction": "Do it", "output": "Done."},
    {"text": "Plain."},
    {"prompt": 3},
    {"messages": [TURNS[0]]},
]


def read(rows, name="mine"):
    return load_dataset(RowsInMemory(rows, name), tiny_tokenizer(), max_length=200)


def test_they_are_the_rows_of_a_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    theirs, ours = load_dataset(file, tiny_tokenizer(), max_length=200), read(ROWS)
    assert ours.rows == theirs.rows
    assert [list(one.tokens) for one in ours.examples] == [list(e.tokens) for e in theirs.examples]
    assert ours.report.rejections == theirs.report.rejections
    assert ours.report.lines()[0].startswith("mine: 5 of 7 rows usable, read as ")
    assert ours.report.lines()[1:] == theirs.report.lines()[1:]


class MapStyle:
    """A map-style data set, as of torch: without an iterator, and without an IndexError."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROWS[index % 2]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:2],
        tuple(ROWS[:2]),
        iter(ROWS[:2]),
        (row for row in ROWS[:2]),
        MapStyle(),
        [TURNS, ROWS[1]],  # a list of conversations
        [tuple(TURNS), ROWS[1]],
    ],
    ids=["list", "tuple", "iterator", "generator", "map style", "conversations", "tuples"],
)
def test_any_iterable_of_rows_or_conversations(rows):
    assert [row.messages for row in read(rows).rows] == [
        TURNS,
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}],
    ]


def test_a_dataset_of_datasets():
    datasets = pytest.importorskip("datasets", reason="reads data sets of the hub; optional")
    rows = datasets.Dataset.from_list([{"messages": TURNS}] * 3)
    assert len(read(rows).examples) == 3
    with pytest.raises(DataError, match="mine: expected rows, got a mapping with the keys 'train'"):
        read(datasets.DatasetDict(train=rows))


class Table:
    columns = ("a",)

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "mine is empty: expected rows"),
        ({"train": []}, "got a mapping with the keys 'train'. Give one of its data sets"),
        ("rows.jsonl", "mine: expected rows, got text; a file is named in the options"),
        (Table(), r"got a table: give its rows as dicts, for pandas table.to_dict\('records'\)"),
        (3, "mine: expected rows, got 'int'"),
        (["a", "b"], "no row is in a known format"),
    ],
)
def test_what_is_not_rows_is_refused(rows, message):
    with pytest.raises(DataError, match=message):
        read(rows)


def test_what_json_cannot_hold_is_a_row_that_is_left_out():
    circle = {"prompt": "a", "completion": "b"}
    circle["circle"] = circle
    odd = [{"prompt": "a", "completion": b"b"}, circle, {"text": "\ud800"}]
    report = read([*odd, ROWS[0]]).report
    assert [one.line for one in report.rejections] == ["1", "2", "3"]
    assert report.rejections[0].reason == "not JSON: Object of type bytes is not JSON serializable"
    assert "half a surrogate pair" in report.rejections[2].reason


def test_nothing_is_shared_with_the_program():
    mine = [{"messages": [dict(turn) for turn in TURNS]}]
    data = read(mine)
    mine[0]["messages"][0]["content"] = "changed"
    assert data.rows[0].messages == TURNS
