"""A data set loaded whole: what is used, what is left out and why, and what a person is told."""

import json

import numpy as np
import pytest

from halfbyte.data import conversations, load_dataset
from halfbyte.data.dataset_report import describe_rejected, describe_unused
from halfbyte.errors import DataError
from tests.data.chats import tokenizer_of
from tests.tiny import tiny_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
LONG = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes, " * 40},
    ]
}
FAR = {
    "messages": [
        {"role": "user", "content": "Hi, " * 40},
        {"role": "assistant", "content": "Yes."},
    ]
}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_row_is_an_example_or_counted_under_its_reason(tmp_path):
    bad = {"messages": [{"role": "user", "content": "Hi"}]}
    file = write(tmp_path / "a.jsonl", GOOD, "{", bad, "", GOOD, {"t": "x"}, bad, LONG, FAR)
    done = []
    data = load_dataset(
        file, tiny_tokenizer(), max_length=40, progress=lambda *count: done.append(count)
    )
    report = data.report
    assert report.rejected == {
        "malformed JSON": ["2"],
        "no assistant turn to learn": ["3", "7"],
        "no 'messages'": ["6"],
        "nothing supervised within max_length 40": ["9"],
    }
    assert (report.format, report.rows, report.usable) == ("messages", 8, 3)
    assert [row.line for row in data.rows] == ["1", "5", "8"]
    assert sum(map(len, report.rejected.values())) == len(report.rejections) == 5
    assert report.rejections[:2] == [
        ("2", "malformed JSON", "{"),
        ("3", "no assistant turn to learn", json.dumps(bad)),
    ]
    assert report.rejections[-1].line == "9"
    assert len(report.rejections[-1].row) == 200
    assert (report.truncated, report.truncated_lines) == (1, ("8",))
    assert max(len(example.tokens) for example in data.examples) == 40 < report.longest
    assert report.tokens == sum(len(example.tokens) for example in data.examples)
    assert report.supervised_tokens == sum(e.labels_mask.sum() for e in data.examples)
    assert done == [(8, 8)]


def test_a_person_is_told_in_lines(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, LONG, *["{"] * 7, {"messages": []})
    lines = load_dataset(file, tiny_tokenizer(None), max_length=30).report.lines()
    assert lines == [
        f"{file}: 2 of 10 rows usable, read as messages",
        "left out, malformed JSON: 7 rows (lines 3, 4, 5, 6, 7, …)",
        "left out, 'messages' is empty: 1 row (line 10)",
        "truncated to max_length 30: 1 row (line 2); the longest has 164 tokens",
        "37 tokens, 31 supervised (84%)",
        "the tokenizer has no chat template: plain text, one line per message",
    ]


def test_many_reasons_are_cut_short():
    lines = describe_rejected({f"reason {at}": ["1"] * (at + 1) for at in range(8)})
    assert lines[0] == "left out, reason 7: 8 rows (lines 1, 1, 1, 1, 1, …)"
    assert lines[-1] == "left out for 3 other reasons: 6 rows"
    assert len(lines) == 6


def test_reasons_that_quote_the_data_are_bounded_in_length_and_number(tmp_path):
    turns = [{"messages": [{"role": f"{at:03}" * 300, "content": ""}]} for at in range(300)]
    file = write(tmp_path / "a.jsonl", GOOD, *turns)
    report = load_dataset(file, tiny_tokenizer(), max_length=40).report
    assert len(report.rejections) == 300
    assert len(report.rejected) == 101
    assert len(report.rejected["other reasons"]) == 200
    assert max(map(len, report.rejected)) <= 280


def test_mixed_formats_are_all_read_and_counted(tmp_path):
    rows = [GOOD, {"text": "x"}, {"instruction": "a", "output": "b"}, GOOD, {"question": "a"}]
    report = load_dataset(
        write(tmp_path / "a.jsonl", *rows), tiny_tokenizer(), max_length=40
    ).report
    assert report.formats == {"messages": 2, "text": 1, "instruction/output": 1}
    assert report.format == "messages (2 rows), text (1 row), instruction/output (1 row)"
    assert report.rejected == {"no 'messages'": ["5"]}


def test_keys_that_nothing_reads_are_said_once(tmp_path):
    rows = [{**GOOD, "id": 1, "x" * 999: 1}, {**GOOD, "id": 2}, {**GOOD, "\nid": 3}]
    report = load_dataset(
        write(tmp_path / "a.jsonl", *rows), tiny_tokenizer(), max_length=40
    ).report
    said = report.notes[0]
    assert said.startswith("keys that are not used: 'id' (2 rows), 'xxx")
    assert said.endswith(" (1 row), '\\nid' (1 row)")
    assert len(said) < 200
    many = describe_unused({f"k{at}": 1 for at in range(100_000)})
    assert len(many) == 1
    assert many[0].endswith("'k4' (1 row), 99995 more")


def test_a_row_that_fits_exactly_is_not_cut(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD)
    (whole,) = load_dataset(file, tiny_tokenizer(), max_length=512).examples
    report = load_dataset(file, tiny_tokenizer(), max_length=len(whole.tokens)).report
    assert (report.truncated, report.longest) == (0, len(whole.tokens))


def test_a_cut_row_keeps_its_prompt_length_within_it(tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "Once upon a time."})
    (example,) = load_dataset(file, tiny_tokenizer(), max_length=5).examples
    assert (len(example.tokens), len(example.labels_mask), example.prompt_length) == (5, 5, 1)


def test_all_tokens_are_supervised_on_request(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, GOOD)
    report = load_dataset(file, tiny_tokenizer(), max_length=512, train_on="all").report
    assert report.supervised_tokens == report.tokens - 2


def talk(*contents, **last):
    """User and assistant in turn; ``last`` are further keys of the last message."""
    roles = ("user", "assistant")
    turns = [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]
    turns[-1] |= last
    return {"messages": turns}


def test_a_row_that_becomes_several_examples_is_one_row_in_the_report(tmp_path):
    rows = [
        talk("Hi", "Yes.", "So?", "No.", "?", "End"),
        talk("Hi", "Yes."),
        talk("Hi", "Yes.", "So?", "No.", weight=0),
        talk("Hi", "Yes.", "So? " * 40, "No."),
    ]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))  # an array on one line
    data = load_dataset(file, tokenizer_of("qwen3"), max_length=80)
    assert [[turn["content"] for turn in row.messages[1::2]] for row in data.rows] == [
        ["Yes."],
        ["Yes.", "No."],
        ["Yes.", "No.", "End"],
        ["Yes."],
        ["Yes."],  # of the next reply nothing is supervised,
        ["Yes."],  # and of this one nothing within max_length
    ]
    assert [len(row.messages) for row, _ in data.cases] == [6, 2, 2, 2]
    for (_, example), at in zip(data.cases, (2, 3, 4, 5), strict=True):
        assert np.array_equal(example.tokens, data.examples[at].tokens)
    report = data.report
    assert (report.rows, report.usable, report.examples, len(data.examples)) == (4, 4, 6, 6)
    assert (report.split_lines, report.truncated_lines) == (("1", "1", "1"), ("1",))
    assert report.lines()[:3] == [
        f"{file}: 4 of 4 rows usable, read as messages",
        "3 rows (lines 1, 1, 1) became 5 examples: the chat template renders earlier replies "
        "otherwise than at inference",
        f"truncated to max_length 80: 1 row (line 1); the longest has {report.longest} tokens",
    ]
    assert report.longest > 80
    assert report.notes == ()
    assert report.tokens == sum(len(example.tokens) for example in data.examples)
    with pytest.raises(DataError, match="nothing supervised within max_length 4: 4 rows"):
        load_dataset(file, tokenizer_of("qwen3"), max_length=4)


def test_nothing_usable_is_an_error_that_shows_the_reasons(tmp_path):
    file = write(tmp_path / "a.jsonl", {"messages": []}, "{", "{")
    with pytest.raises(DataError) as caught:
        load_dataset(file, tiny_tokenizer(), max_length=64)
    assert str(caught.value).splitlines() == [
        f"{file}: none of the 3 rows (read as messages) is usable.",
        "  left out, malformed JSON: 2 rows (lines 2, 3)",
        "  left out, 'messages' is empty: 1 row (line 1)",
    ]
    with pytest.raises(DataError, match="nothing supervised within max_length 8"):
        load_dataset(write(file, GOOD), tiny_tokenizer(), max_length=8)
    with pytest.raises(DataError, match="malformed JSON"):
        load_dataset(write(file, "{", "{"), tiny_tokenizer(), max_length=8)
    with pytest.raises(DataError, match=r"a\.jsonl: no row is in a known format.*'question'"):
        conversations(write(file, {"question": "Why?"}))


def test_conversations_need_no_tokenizer(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, "{", {"messages": []})
    (row,) = conversations(file)
    assert (row.prompt, row.expected) == (GOOD["messages"][:1], "Yes.")
    with pytest.raises(DataError, match="plain text in 1 of its 2 rows"):
        conversations(write(file, GOOD, {"text": "Once."}))


def test_data_of_another_kind_is_an_error_that_says_so(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file = write(tmp_path / "a.jsonl", row, row)
    with pytest.raises(DataError, match=r"none of the 2 rows .*\n.* preference data .*lines 1, 2"):
        conversations(file)
