"""Which files of a directory are read: one split, one kind of each; what is left is said."""

import pytest

from halfbyte.data.directories import files_in, files_matching
from halfbyte.errors import DataError


def make(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}\n")


@pytest.mark.parametrize(
    ("there", "read", "note"),
    [
        (["train.jsonl", "valid.jsonl"], ["train.jsonl"], "read train.jsonl only, not valid.jsonl"),
        (["b.jsonl", "a.jsonl", "notes.md"], ["a.jsonl", "b.jsonl"], "read a.jsonl, b.jsonl"),
        (["a.jsonl.gz", "b.parquet", "c.csv"], ["a.jsonl.gz", "b.parquet", "c.csv"],
         "read a.jsonl.gz, b.parquet, c.csv"),
        (["only.parquet"], ["only.parquet"], None),
        (["train.parquet", "test.parquet", "validation.parquet"], ["train.parquet"],
         "read train.parquet only, not test.parquet, validation.parquet"),
        (["train-0000-of-0002.parquet", "train-0001-of-0002.parquet", "test-0.parquet"],
         ["train-0000-of-0002.parquet", "train-0001-of-0002.parquet"],
         "read train-0000-of-0002.parquet, train-0001-of-0002.parquet only, not test-0.parquet"),
        (["a.jsonl", "a.parquet", "a.jsonl.gz"], ["a.jsonl"],
         "read a.jsonl only, not a.jsonl.gz, a.parquet"),
        (["TRAIN.JSON", "x.json"], ["TRAIN.JSON"], "read TRAIN.JSON only, not x.json"),
        (["training.jsonl", "x.jsonl"], ["training.jsonl", "x.jsonl"],
         "read training.jsonl, x.jsonl"),
        ([".hidden.jsonl", "x.jsonl", "dataset_info.json", "sub/y.jsonl"], ["x.jsonl"], None),
        (["README.md", "data/train.parquet", "data/test.parquet"], ["data/train.parquet"],
         "read train.parquet only, not test.parquet"),
    ],
)  # fmt: skip
def test_what_is_read_and_what_is_left(tmp_path, there, read, note):
    make(tmp_path, *there)
    files, notes = files_in(tmp_path, None)
    assert [str(file.relative_to(tmp_path)) for file in files] == read
    assert notes == (() if note is None else (note,))


def test_another_split_can_be_asked_for(tmp_path):
    make(tmp_path, "train.jsonl", "test-00000-of-00001.jsonl", "x.jsonl")
    assert [file.name for file in files_in(tmp_path, "test").files] == ["test-00000-of-00001.jsonl"]
    with pytest.raises(DataError, match=r"no files of the split dev, only test-.*, x\.jsonl"):
        files_in(tmp_path, "dev")


def test_what_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets writes the directory")
    one = datasets.Dataset.from_list([{"text": "a"}] * 3)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "one")
    files, notes = files_in(tmp_path / "both", None)
    assert [file.suffix for file in files] == [".arrow"]
    assert files[0].parent.name == "train"
    assert notes == ("read train only, not test",)
    assert files_in(tmp_path / "both", "test").files[0].parent.name == "test"
    assert [file.suffix for file in files_in(tmp_path / "one", None).files] == [".arrow"]
    with pytest.raises(DataError, match="contains no split dev, only test, train"):
        files_in(tmp_path / "both", "dev")


def test_a_directory_without_data_is_an_error(tmp_path):
    make(tmp_path, "notes.md")
    with pytest.raises(DataError, match=r"contains no data: expected train\.jsonl, or other files"):
        files_in(tmp_path, None)


def test_a_pattern_takes_data_files_in_order(tmp_path):
    make(tmp_path, "b1.jsonl", "a2.csv", "a1.jsonl.gz", "a3.md", "sub/a4.parquet")
    (tmp_path / "a5.jsonl").mkdir()
    files, notes = files_matching(f"{tmp_path}/a*")
    assert [file.name for file in files] == ["a1.jsonl.gz", "a2.csv"]
    assert notes == ("read a1.jsonl.gz, a2.csv", "not read, since they are no data files: a3.md")
    assert [file.name for file in files_matching(f"{tmp_path}/**/*.parquet").files] == [
        "a4.parquet"
    ]
    with pytest.raises(DataError, match=r"No data file matches .*z\*\. Expected files named"):
        files_matching(f"{tmp_path}/z*")
    with pytest.raises(DataError, match=r"a3\.md cannot be read"):
        files_matching(f"{tmp_path}/*.md")
