"""Every code of the data check is found where it is, and only there."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.data import NothingUsable, load_dataset
from halfbyte.data.check_codes import CODES
from halfbyte.data.checks import (
    CheckOptions,
    DataCheck,
    check_data,
    check_unusable,
    evenly,
    percent,
)
from tests.data.chats import FAMILIES, SYSTEM, call, reply, tokenizer_of, user
from tests.tiny import CHATML, GENERATION, LLAMA2, tiny_tokenizer

WHOLE = 10**9
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
NO_PROMPT = CHATML.partition("{% if add")[0]
# Marks replies itself, so they are supervised though the prompt is another at inference.
THINKS = GENERATION.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
REWRITES = CHATML.replace("message['content']", "message['content'].replace('dog', 'cat')")
MERGES = "{% for m in messages %}{{ ' ' if m.role == 'assistant' }}{{ m.content }}"
MERGES += "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ ' ' if add_generation_prompt }}"
DATED = "{{ strftime_now('%Y') ~ '\n' }}" + CHATML


WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx"]


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def usual(count: int = 12) -> list[dict[str, Any]]:
    """Rows that are all different and in which nothing is wrong."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 24)) for _ in range(4 * count)]
    rows = zip(*[iter(texts)] * 4, strict=True)
    return [chat(user(a), reply(b), user(c), reply(d)) for a, b, c, d in rows]


def changed(row: dict[str, Any]) -> dict[str, Any]:
    """A row that differs from another in a word."""
    first, *others = row["messages"]
    return chat({**first, "content": first["content"] + " yes"}, *others)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows a few words, and no others."""
    words = ["[UNK]", "</s>", *WORDS, "user"]
    tokenizer = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] + ' </s> ' }}{% endfor %}",
    )


class Case(NamedTuple):
    """Rows with a fault: what is found, how often of how many, and where first."""

    code: str
    severity: str
    rows: list[dict[str, Any]]
    count: int = 1
    lines: tuple[str, ...] = ()
    detail: str = ""
    tokenizer: PreTrainedTokenizerFast | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    held_out: list[dict[str, Any]] | None = None
    max_length: int = WHOLE


GOOD = usual()
DOGS = sum(any("dog" in one["content"] for one in row["messages"][1::2]) for row in GOOD)
LONG = chat(user("Hi"), reply("yes " * 900))
LATE = chat(user("Hi " * 900), reply("Yes."))
SAME = chat(user(GOOD[0]["messages"][0]["content"].upper()), *GOOD[0]["messages"][1:])
OTHER = chat(*GOOD[1]["messages"][:3], reply("Something else entirely."))
CUT = {"max_length": 512}

CASES = [
    Case("HB101", "warning", [*GOOD, chat()], 1, ("13",), "left out: 'messages' is empty"),
    Case("HB101", "error", [*GOOD, *[chat()] * 12], 12),
    Case("HB102", "info", [{**row, "id": 1} for row in GOOD], 0, (), "'id' (12 rows)"),
    Case("HB201", "warning", [*GOOD, chat(user("Hi"))], 1, ("13",), "no assistant turn"),
    Case("HB201", "error", [*GOOD, chat(user("Hi")), chat(user("a"))], 2, ("13", "14")),
    Case("HB202", "error", GOOD, 24, ("1", "2", "3"), tokenizer=tiny_tokenizer(NO_END)),
    Case("HB202", "error", GOOD, 12, ("1", "2", "3", "4", "5"), tokenizer=tokenizer_of("glm4")),
    Case("HB203", "info", [chat(user("a b " * 200), reply("Yes."))], 0, (), "of all tokens"),
    Case("HB204", "warning", [*GOOD, chat(reply("x"), user("a"), reply("b"))], 1, ("13",)),
    Case("HB205", "info", GOOD, 12, ("1", "2", "3", "4", "5"), tokenizer=tokenizer_of("qwen3")),
    Case(
        "HB206",
        "info",
        [chat(user("a"), reply("the fox"))],
        1,
        ("1",),
        "merges",
        tiny_tokenizer(MERGES),
    ),
    Case("HB301", "warning", [*GOOD, LONG], 1, ("13",), "of the supervised", options=CUT),
    Case("HB301", "error", [GOOD[0], LONG], 1, ("2",), options=CUT),
    Case("HB301", "warning", [*GOOD, LONG], 1, ("13",), max_length=512, options=CUT),
    Case("HB302", "warning", [*GOOD, LATE], 1, ("13",), options=CUT),
    Case("HB302", "warning", [*GOOD, LATE], 1, ("13",), "left out", max_length=512, options=CUT),
    Case("HB303", "warning", [*GOOD, LONG], 1, ("13",), "512", options={"positions": 512}),
    Case("HB304", "info", [*usual(120), LONG], 1, ("121",), "the longest"),
    Case("HB401", "warning", [*GOOD, chat(user("a"), user("b"), reply("c"))], 1, ("13",), "user"),
    Case("HB402", "warning", [*GOOD, chat(SYSTEM, reply("a"), user("b"), reply("c"))], 1, ("13",)),
    Case("HB403", "warning", [*GOOD, chat(user("a"), SYSTEM, reply("c"))], 1, ("13",), "message 2"),
    Case("HB404", "info", [*GOOD, chat(*GOOD[0]["messages"], user("b"))], 1, ("13",), "user"),
    Case("HB405", "warning", [*GOOD, chat(user("a"), reply(" \n"))], 1, ("13",), "left out"),
    Case("HB405", "warning", [*GOOD, chat(user("\u200b\ufeff"), reply("a"))], 1, ("13",), "u200b"),
    Case("HB406", "info", [*GOOD, chat(user(" a"), reply("\nYes"))], 1, ("13",), r"'\nYes'"),
    Case("HB501", "warning", [*GOOD, SAME], 1, ("13",), "line 13 is like line 1"),
    Case("HB502", "warning", [*usual(40), changed(GOOD[3])], 1, ("41",), "line 41 is like line 4"),
    Case("HB503", "info", [*GOOD, OTHER], 1, ("13",), "line 13 is like line 2"),
    Case("HB504", "error", GOOD, 1, ("2",), "like line 1 of", held_out=[*usual(14)[13:], SAME]),
    Case("HB505", "warning", GOOD, 1, ("2",), "line 2 of", held_out=[*usual(14)[13:], OTHER]),
    Case(
        "HB505",
        "warning",
        usual(40),
        1,
        ("1",),
        "line 1 is like line 4 of",
        held_out=[changed(GOOD[3])],
    ),
    Case(
        "HB601",
        "warning",
        [*GOOD, chat(user("ant owl"), reply("fox"))],
        1,
        ("13",),
        tokenizer=words_tokenizer(),
    ),
    Case(
        "HB602",
        "warning",
        [*GOOD, chat(user("ant"), reply("fox\n\n\nfox"))],
        1,
        ("13",),
        "is decoded as 'fox fox'",
        words_tokenizer(),
    ),
    Case("HB603", "warning", [*GOOD, chat(user("CafÃ©"), reply("b"))], 1, ("13",), "perhaps 'é'"),
    Case("HB603", "warning", [*GOOD, {"text": "a \ufffd"}], 1, ("13",), "'a \ufffd'"),
    Case("HB604", "warning", [*GOOD, chat(user("a<|im_end|>"), reply("b"))], 1, ("13",), "im_end"),
    Case(
        "HB701",
        "error",
        GOOD,
        12,
        ("1", "2", "3", "4", "5"),
        tokenizer=tiny_tokenizer("{{ bos_token }}" + LLAMA2, adds_bos=True),
    ),
    Case("HB702", "warning", GOOD, 0, tokenizer=tiny_tokenizer(LLAMA2[15:], adds_bos=True)),
    Case("HB703", "warning", GOOD, 0, (), "<think>", tiny_tokenizer(THINKS)),
    Case("HB704", "warning", GOOD, 0, (), "assistant", tiny_tokenizer(NO_PROMPT)),
    Case("HB705", "warning", GOOD, 0, (), "day to day", tiny_tokenizer(DATED)),
    Case(
        "HB706",
        "warning",
        [*GOOD, chat(user("a"), reply("b", reasoning_content="Hm."))],
        1,
        ("13",),
        "drops the reasoning",
    ),
    Case(
        "HB706",
        "warning",
        [*GOOD, chat(user("a"), reply("", call("Paris")))],
        1,
        ("13",),
        "left out: the chat template drops the tool calls",
    ),
    Case("HB707", "warning", GOOD, DOGS, tokenizer=tiny_tokenizer(REWRITES)),
    Case("HB708", "info", GOOD, 12, (), "You help", tokenizer_of("qwen2_5")),
    Case("HB709", "warning", GOOD, 0, (), "plain text", tiny_tokenizer(None)),
    Case("HB710", "info", GOOD, 0, (), "im_end"),
    Case(
        "HB711",
        "info",
        [
            *GOOD,
            chat(
                user("a"),
                reply("", {"function": {"name": "f", "arguments": '{"a": 1}'}}),
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            ),
        ],
        1,
        ("13",),
        tokenizer=tokenizer_of("qwen2_5"),
    ),
    Case("HB712", "info", GOOD, 0, tokenizer=tiny_tokenizer(LLAMA2, adds_bos=True)),
    Case("HB713", "info", GOOD, 0, (), "EOS is", tokenizer_of("gemma2")),
    Case(
        "HB714",
        "warning",
        [*GOOD, chat(SYSTEM, user("a"), reply("b"))],
        1,
        ("13",),
        "roles must be",
        tiny_tokenizer(LLAMA2),
    ),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def check(case: Case, tmp_path: Path) -> DataCheck:
    tokenizer = case.tokenizer or tiny_tokenizer()
    how = CheckOptions(**{"max_length": 4096, **case.options})

    def load(name: str, rows: list[dict[str, Any]]) -> Any:
        return load_dataset(write(tmp_path / name, rows), tokenizer, max_length=case.max_length)

    held_out = load("test.jsonl", case.held_out) if case.held_out else None
    train = load("train.jsonl", case.rows)
    return check_data(train, tokenizer, how, held_out=held_out)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}-{case.severity}")
def test_what_is_wrong_is_found(case: Case, tmp_path: Path) -> None:
    found = [one for one in check(case, tmp_path).findings if one.code == case.code]
    assert [(one.severity, one.count) for one in found] == [(case.severity, case.count)]
    assert found[0].lines[: len(case.lines)] == case.lines
    assert case.detail in found[0].detail


def test_every_code_has_a_case(tmp_path: Path) -> None:
    assert {case.code for case in CASES} | {"HB103"} == {*CODES}
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("train.jsonl", "other.jsonl"):  # a note of the source
        write(directory / name, GOOD)
    data = load_dataset(directory, tiny_tokenizer(), max_length=WHOLE)
    found = check_data(data, tiny_tokenizer(), CheckOptions(4096)).findings
    assert [one.code for one in found] == ["HB103", "HB710"]


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek_r1", "glm4"}))
def test_good_rows_are_fine_with_every_real_template(name: str, tmp_path: Path) -> None:
    found = check(Case("", "", GOOD, tokenizer=tokenizer_of(name)), tmp_path).findings
    expected = {"HB705"} if name in ("gpt_oss", "mistral_v7") else set()  # these write the date
    assert {one.code for one in found if one.severity != "info"} == expected


def test_no_note_of_reading_and_encoding_is_without_a_code(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    rows = [
        *GOOD,
        chat(user("Rain?"), reply("", call("Paris")), tools=tools),
        chat(user("a"), reply("b", reasoning_content="Hm."), id=7),
        chat(reply("x"), user("a"), reply("b")),
    ]
    for name in FAMILIES.keys() - {"deepseek_r1"}:
        data = load_dataset(write(tmp_path / "a.jsonl", rows), tokenizer_of(name), max_length=WHOLE)
        found = check_data(data, tokenizer_of(name), CheckOptions(4096)).findings
        assert "HB103" not in {one.code for one in found}, (name, data.report.notes)


def test_data_without_a_usable_row_is_an_error_with_its_reasons(tmp_path: Path) -> None:
    rows = [chat(user("a")), chat()]
    with pytest.raises(NothingUsable) as raised:
        load_dataset(write(tmp_path / "a.jsonl", rows), tiny_tokenizer(), max_length=WHOLE)
    found = check_unusable(raised.value, tiny_tokenizer()).findings
    assert [(one.code, one.severity, one.count) for one in found] == [
        ("HB101", "error", 1),
        ("HB201", "error", 1),
        ("HB710", "info", 0),
    ]
    only_empty = NothingUsable("", "a", 1, raised.value.rejections[1:])
    found = check_unusable(only_empty, tiny_tokenizer()).findings
    assert [one.code for one in found if one.severity == "error"] == ["HB101", "HB201"]


def test_a_sample_of_the_rows_is_looked_at_and_said(tmp_path: Path) -> None:
    rows = [chat(user(f"a {at}"), user("b"), reply("c")) for at in range(40)]
    found = check(Case("", "", rows, options={"most_rows": 5}), tmp_path)
    (twice,) = [one for one in found.findings if one.code == "HB401"]
    assert (found.rows, found.looked_at, twice.of) == (40, 5, 5)
    assert twice.lines == ("1", "10", "20", "30", "40")
    assert evenly(40, None).tolist() == list(range(40))


def test_ignored_codes_are_left_out_and_the_worst_comes_first(tmp_path: Path) -> None:
    case = Case("", "", [*GOOD, SAME, chat(user("\u200b"), reply("b"))], held_out=GOOD)
    found = check(case, tmp_path)
    severities = [one.severity for one in found.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert found.count("error") == 1
    without = check(case._replace(options={"ignore": ("HB504", "HB710")}), tmp_path)
    left = {one.code for one in found.findings} - {one.code for one in without.findings}
    assert left == {"HB504", "HB710"}


def test_a_finding_is_a_sentence_and_json(tmp_path: Path) -> None:
    found = check(Case("", "", [*GOOD, SAME]), tmp_path)
    (same,) = [one for one in found.findings if one.code == "HB501"]
    assert same.text == "duplicate rows: 1 of 13 rows (7.7 %), line 13; line 13 is like line 1"
    record = json.loads(json.dumps(found.as_json()))
    assert (record["errors"], record["warnings"], record["rows"]) == (0, 1, 13)
    one = next(one for one in record["findings"] if one["code"] == "HB501")
    assert (one["count"], one["of"], one["lines"]) == (1, 13, ["13"])
    assert one["remedy"] == CODES["HB501"].remedy


def test_shares_are_rounded_but_never_to_nothing_or_to_all() -> None:
    shown = [percent(share) for share in (0, 1e-6, 1e-4, 0.0123, 0.5, 0.9975, 0.9999, 1)]
    assert shown == ["0 %", "< 0.01 %", "0.01 %", "1.2 %", "50 %", "99.8 %", "> 99.9 %", "100 %"]


def test_nothing_is_logged_by_libraries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(Case("", "", [*GOOD, LONG], held_out=GOOD), tmp_path)
    assert not caplog.records
