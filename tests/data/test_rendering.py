"""Texts are transformers' own, and arguments of tool calls what the template needs."""

import json

import pytest

from halfbyte.data import sandbox
from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Conversation
from halfbyte.data.rendering import Renderer
from halfbyte.data.templates import Encoder, prompt_ids
from halfbyte.errors import DataError
from tests.data.chats import (
    CONVERSATIONS,
    FAMILIES,
    TOOLS,
    only,
    reply,
    tokenizer_of,
    user,
    with_json_text,
)
from tests.tiny import CHATML, tiny_tokenizer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [False, True])
def test_texts_are_those_of_transformers(name, prompt):
    tokenizer = tokenizer_of(name)
    for messages in CONVERSATIONS.values():
        try:
            wanted = tokenizer.apply_chat_template(
                messages, tools=TOOLS, tokenize=False, add_generation_prompt=prompt
            )
        except Exception:  # of any type that a template may raise
            with pytest.raises(RowRejected):
                Renderer(tokenizer).chat(messages, TOOLS).text(len(messages), prompt=prompt)
        else:
            found = Renderer(tokenizer).chat(messages, TOOLS).text(len(messages), prompt=prompt)
            assert found == wanted


def test_none_and_names_for_reasoning_are_prepared_as_transformers_does():
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    messages = [{"role": "user", "content": "é", "name": None, "thinking": "h", "n": [1.5, True]}]
    tokenizer = tiny_tokenizer(template)
    wanted = tokenizer.apply_chat_template(messages, tokenize=False)
    assert Renderer(tokenizer).chat(messages).text() == wanted


def test_arguments_are_converted_for_prompts_too():
    tokenizer = tokenizer_of("qwen2_5")
    messages = CONVERSATIONS["result"][:-1]
    wanted = tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True)
    assert prompt_ids(tokenizer, with_json_text(messages), TOOLS) == wanted["input_ids"]


def with_arguments(text):
    function = {"name": "get_weather", "arguments": text}
    return [user("Rain?"), reply("", {"id": "call00000", "type": "function", "function": function})]


def test_arguments_that_are_not_a_json_object_are_a_reason_for_rejection():
    for text in ("{", "[1]", '"city"', "[" * 5000):
        with pytest.raises(RowRejected, match="arguments of a tool call are not a JSON object"):
            Encoder(tokenizer_of("qwen2_5")).encode(Conversation("1", with_arguments(text)))


def test_no_arguments_are_an_empty_object():
    tokenizer = tokenizer_of("qwen2_5")
    example = only(Encoder(tokenizer).encode(Conversation("1", with_arguments(""))))
    assert '"arguments": {}}' in tokenizer.decode(example.tokens)


def test_a_conversion_is_said_and_leaves_the_row_as_it_was():
    encoder = Encoder(tokenizer_of("qwen2_5"))
    messages = with_arguments(json.dumps({"city": "Paris"}))
    encoder.encode(Conversation("7", messages))
    assert messages == with_arguments(json.dumps({"city": "Paris"}))
    note = "arguments of tool calls are given to the chat template as it needs them: 1 row (line 7)"
    assert note in encoder.notes()


def test_a_template_that_is_not_valid_is_one_error():
    tokenizer = tiny_tokenizer("{{ 1 }}\n\n{% if %}")
    with pytest.raises(DataError, match=r"chat template is not valid: .*, line 3\."):
        Encoder(tokenizer).encode(Conversation("1", CONVERSATIONS["plain"]))
    with pytest.raises(DataError, match="not valid"):
        prompt_ids(tokenizer, CONVERSATIONS["plain"])


def test_a_template_that_always_exceeds_its_limits_is_given_up(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_STEPS", 1000)
    tokenizer = tiny_tokenizer("{% for i in range(9999) %}{% endfor %}")
    rows = [Conversation(str(line), CONVERSATIONS["plain"]) for line in range(50)]
    with pytest.raises(DataError, match=r"exceeds its limits, .*more than 1,000 steps, line 1\."):
        list(Encoder(tokenizer).encode_all(rows))
    (*few,) = Encoder(tokenizer).encode_all(rows[:20])
    assert {str(one) for one in few} == {
        "the chat template rejects it (it takes more than 1,000 steps, line 1)"
    }


def test_a_template_that_writes_half_a_surrogate_pair_rejects_the_row():
    encoder = Encoder(tiny_tokenizer(CHATML + "{{ '\\ud80a' }}"))
    with pytest.raises(RowRejected, match="text that is not valid Unicode"):
        encoder.encode(Conversation("1", CONVERSATIONS["plain"]))
