"""The demo's task: one right answer, stated in the sentence; nothing of the test in training."""

import json
import re
from pathlib import Path

import pytest
import yaml

from halfbyte.data import load_dataset
from halfbyte.errors import OutputError
from halfbyte.tools.demo_task import HELD_OUT, NUMBER_WORDS, TRAINING, make_orders, write_task
from tests.tiny import tiny_tokenizer

FIELDS = ["item", "quantity", "name", "city", "date"]


def orders_of(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert all([m["role"] for m in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], row[2]["content"]) for row in rows]


@pytest.mark.parametrize("vocabulary", [TRAINING, HELD_OUT], ids=["training", "held out"])
def test_the_answer_is_one_line_of_yaml_and_is_in_the_sentence(vocabulary):
    for order in make_orders(vocabulary, 500, seed=3):
        assert "\n" not in order.expected
        assert yaml.safe_load(order.expected) == order.answer
        assert list(order.answer) == FIELDS
        for key in ("item", "name", "city", "date"):
            assert order.sentence.lower().count(str(order.answer[key]).lower()) == 1
        quantity = order.answer["quantity"]
        assert isinstance(quantity, int)
        words = re.findall(r"\w+", order.sentence.lower())
        assert str(quantity) in words or NUMBER_WORDS[quantity] in words


def test_nothing_held_out_occurs_in_training(tmp_path):
    files = write_task(tmp_path, seed=0)
    train, test = orders_of(files.train), orders_of(files.test)
    assert len(set(test)) >= 100
    for key in FIELDS:
        seen = {yaml.safe_load(answer)[key] for _, answer in train}
        held = {yaml.safe_load(answer)[key] for _, answer in test}
        assert not seen & held, key
    assert not set(TRAINING.phrasings) & set(HELD_OUT.phrasings)


def test_the_vocabularies_have_no_value_twice_and_no_item_word_in_common():
    for vocabulary in (TRAINING, HELD_OUT):
        for values in (
            vocabulary.phrasings,
            vocabulary.names,
            vocabulary.cities,
            vocabulary.items,
        ):
            assert len(set(values)) == len(values)
        for phrasing in vocabulary.phrasings:
            assert sorted(re.findall(r"{(\w+)}", phrasing)) == sorted(FIELDS)
    seen = {word for item in TRAINING.items for word in item.split()}
    assert not seen & {word for item in HELD_OUT.items for word in item.split()}


def test_every_value_is_dealt_equally():
    orders = make_orders(HELD_OUT, 3 * len(HELD_OUT.names), seed=0)
    names = [order.answer["name"] for order in orders]
    assert {names.count(name) for name in HELD_OUT.names} == {3}


def test_the_seed_decides_training_and_leaves_the_test_alone(tmp_path):
    first = write_task(tmp_path / "a", seed=1)
    again = write_task(tmp_path / "b", seed=1)
    other = write_task(tmp_path / "c", seed=2)
    assert first.train.read_bytes() == again.train.read_bytes()
    assert first.train.read_bytes() != other.train.read_bytes()
    assert first.test.read_bytes() == other.test.read_bytes()


def test_sizes_are_arguments_and_the_files_can_be_trained_on(tmp_path):
    files = write_task(tmp_path, seed=0, train=20, test=10)
    for path, size in ((files.train, 20), (files.test, 10)):
        report = load_dataset(path, tiny_tokenizer(), max_length=512).report
        assert (report.format, report.usable, report.rejected) == ("messages", size, {})


def test_the_sentence_begins_with_a_capital():
    for order in make_orders(TRAINING, 300, seed=0):
        assert order.sentence[0].isupper() or order.sentence[0].isdigit()


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    write_task(tmp_path, seed=1)
    write_task(tmp_path, seed=2)
    (tmp_path / "orders.test.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match=r"orders\.test\.jsonl was not written by the demo"):
        write_task(tmp_path, seed=3)
    assert (tmp_path / "orders.test.jsonl").read_text() == "mine\n"


def test_a_file_that_is_linked_to_stays(tmp_path):
    (tmp_path / "a").mkdir()
    files = write_task(tmp_path / "a", seed=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / files.train.name).hardlink_to(files.train)
    before = files.train.read_bytes()
    assert write_task(tmp_path / "b", seed=2).train.read_bytes() != before
    assert files.train.read_bytes() == before


def test_a_directory_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_task(tmp_path / "file" / "task", seed=0)
