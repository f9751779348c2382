"""What templates add and drop is said."""

import pytest

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Conversation
from halfbyte.data.templates import Encoder
from tests.data.chats import CONVERSATIONS, FAMILIES, TOOLS, call, reply, tokenizer_of, user
from tests.tiny import CHATML, tiny_tokenizer


def said(tokenizer, messages, tools=None):
    encoder = Encoder(tokenizer)
    encoder.encode(Conversation("1", messages, tools=tools))
    return [note.removesuffix(": 1 row (line 1)") for note in encoder.notes()]


ADDED = "the chat template adds to rows without a system prompt: "
DATE = "the chat template writes today's date: tokens differ from day to day"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_default_system_prompt_is_said(name):
    texts = {
        "qwen2_5": "You are a model by nobody. You help.",
        "llama3_1": "Today Date: 1 Jul 2024",
        "command_r": "# Preamble You are a model by nobody.",
        "mistral_v7": "You are a model by nobody. Today is 20",
        "gpt_oss": "You are a model by nobody. Current date: 20",
    }
    encoder = Encoder(tokenizer_of(name), "all")
    encoder.encode(Conversation("1", CONVERSATIONS["plain"]))
    notes = [note for note in encoder.notes() if note.startswith(ADDED)]
    wanted = [f"{ADDED}'{texts[name]}"] if name in texts else []
    assert [note[: len(text)] for note, text in zip(notes, wanted, strict=True)] == wanted
    assert (DATE in encoder.notes()) == (name in ("mistral_v7", "gpt_oss"))


def test_a_default_system_prompt_is_not_said_of_rows_that_have_one_and_is_cut():
    tokenizer = tokenizer_of("qwen2_5")
    assert said(tokenizer, CONVERSATIONS["system"]) == []
    (note,) = said(tiny_tokenizer("{{ 'Words. ' * 99 + '\n' }}" + CHATML), CONVERSATIONS["plain"])
    assert note.startswith(f"{ADDED}'Words. Words.")
    assert len(note) < 300


def test_context_that_a_template_drops_is_said():
    unlearned = [user("Rain?"), reply("", call("Paris"), weight=0), reply("No.")]
    assert said(tokenizer_of("chatml"), unlearned, TOOLS) == [
        "the chat template drops the tool calls of a message of the assistant",
        "the chat template drops the tools",
    ]
    no_results = CHATML.replace(
        "message['content']", "(message['content'] if message['role'] != 'tool' else '')"
    )
    asked = [user("Rain?"), {"role": "tool", "content": "no"}, reply("No.")]
    assert said(tiny_tokenizer(no_results), asked) == [
        "the chat template drops the content of a message of the tool"
    ]
    thinking = [user("Hi"), reply("Yes.", thinking="Hm.")]
    assert said(tokenizer_of("chatml"), thinking) == [
        "the chat template drops the reasoning of a message of the assistant"
    ]
    assert said(tokenizer_of("qwen3"), thinking) == []
    assert said(tokenizer_of("llama3_1"), CONVERSATIONS["call with text"], TOOLS) == [
        "the chat template drops the content of a message of the assistant"
    ]


def test_without_a_template_only_contents_are_kept_and_that_is_said():
    plain = tiny_tokenizer(None)
    thinking = [user("Hi"), reply("Yes.", thinking="Hm.")]
    assert "the chat template drops the reasoning of a message of the assistant" in said(
        plain, thinking
    )
    with pytest.raises(RowRejected, match="drops the tool calls of a reply"):
        said(plain, CONVERSATIONS["call"])


def test_a_row_is_judged_by_its_kind_once():
    encoder = Encoder(tokenizer_of("chatml"))
    for line in "12":
        encoder.encode(Conversation(line, [user(line), reply("Yes.", thinking=line)]))
    assert encoder.notes() == (
        "the chat template drops the reasoning of a message of the assistant: 2 rows (lines 1, 2)",
    )
