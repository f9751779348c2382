"""The chats of the benchmarks of whole runs: the same each time, and as long as they claim."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODEL = os.environ.get("HALFBYTE_TEST_MODEL", "")


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("chats")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_seed_and_a_count_give_the_same_bytes(chats: Any, tmp_path: Path) -> None:
    one = chats.write_chats(tmp_path / "one.jsonl", 40, seed=3).read_bytes()
    assert chats.write_chats(tmp_path / "same.jsonl", 40, seed=3).read_bytes() == one
    assert chats.write_chats(tmp_path / "other.jsonl", 40, seed=4).read_bytes() != one
    # Fewer rows are the first of more.
    assert one.startswith(chats.write_chats(tmp_path / "few.jsonl", 7, seed=3).read_bytes())


def test_held_out_rows_are_in_no_training_data(chats: Any, tmp_path: Path) -> None:
    training = read(chats.write_chats(tmp_path / "training.jsonl", 300))
    held_out = read(chats.write_chats(tmp_path / "held-out.jsonl", 100, held_out=True))
    answers = {row["messages"][-1]["content"] for row in training}
    assert len(answers) == 300
    assert not answers & {row["messages"][-1]["content"] for row in held_out}


def test_rows_are_questions_and_answers_in_turn(chats: Any, tmp_path: Path) -> None:
    rows = read(chats.write_chats(tmp_path / "chats.jsonl", 200))
    turns = [len(row["messages"]) // 2 for row in rows]
    assert set(turns) == {1, 2, 3, 4}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in row["messages"]:
            assert message["content"].endswith("?" if message["role"] == "user" else ".")


def test_lengths_in_words_are_lognormal_and_cut(chats: Any, tmp_path: Path) -> None:
    rows = read(chats.write_chats(tmp_path / "chats.jsonl", 2000))
    tokens = []
    for row in rows:
        words = sum(len(message["content"].split()) for message in row["messages"])
        marks = chats.TOKENS_OF_TEMPLATE + chats.TOKENS_OF_TURN * len(row["messages"]) / 2
        tokens.append(words * chats.TOKENS_PER_WORD + marks)
    assert 400 < statistics.mean(tokens) < 450
    assert 0.95 < statistics.median(tokens) / chats.MEDIAN < 1.05
    # Words are whole, so a row may be off by one or two of each message.
    assert chats.LONGEST * 0.99 < max(tokens) < chats.LONGEST * 1.01
    assert 5 <= sum(count > 0.99 * chats.LONGEST for count in tokens) <= 40


@pytest.mark.skipif(not MODEL, reason="needs SmolLM2's GGUF file: HALFBYTE_TEST_MODEL names it")
def test_words_are_as_many_tokens_as_is_said(chats: Any, tmp_path: Path) -> None:
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.data import load_dataset

    tokenizer = open_base(MODEL).tokenizer()
    path = chats.write_chats(tmp_path / "chats.jsonl", 500)
    texts = [message["content"] for row in read(path) for message in row["messages"]]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert tokens / words == pytest.approx(chats.TOKENS_PER_WORD, rel=0.01)
    dataset = load_dataset(path, tokenizer, max_length=chats.LONGEST)
    lengths = [len(example.tokens) for example in dataset.examples]
    assert 400 < statistics.mean(lengths) < 450
    assert dataset.report.truncated <= 10
    assert dataset.report.longest < 1.03 * chats.LONGEST
    assert not dataset.report.rejected
