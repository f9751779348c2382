"""The mask of a family's template is what transformers' own rendering of prefixes says it is."""

import numpy as np
import pytest

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Conversation
from halfbyte.data.templates import Encoder, end_of_turn
from tests.data.chats import (
    CONVERSATIONS,
    FAMILIES,
    TOOLS,
    control_strings,
    tokenizer_of,
    with_json_text,
)


def expected(tokenizer, family, row):
    """The token ids, and the supervised ones, from renderings of prefixes.

    Nothing is known of the template but how its replies end. The text of a conversation must begin
    with the prompt at inference, and with that and the reply.
    """

    def rendered(messages, **more):
        return tokenizer.apply_chat_template(messages, tools=row.tools, tokenize=False, **more)

    def count(text):
        """Tokens of a text with which the whole begins."""
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[: len(tokens)].tolist() == tokens
        return len(tokens)

    text = rendered(row.messages)
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
    mask = np.zeros(len(ids), dtype=bool)
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        prompt = rendered(row.messages[:index], add_generation_prompt=True)
        reply = rendered(row.messages[: index + 1])
        if not reply.startswith(prompt):
            continue
        closing = next((one for one in family.closings if reply.endswith(one)), "")
        end = family.closings.get(closing, "")
        reply = reply.removesuffix(closing)
        following = [one for one in family.next_turn if text.startswith(reply + one)]
        if text.startswith(reply + end):
            reply += end or "".join(following)
        elif not text.startswith(reply):
            continue
        mask[count(prompt) : count(reply)] = True
    return ids, mask


def check(name, messages, needed, tools):
    """Compare with what is expected.

    Returns the supervised text, or why the row is rejected, and what is said.
    """
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    encoder = Encoder(tokenizer)
    try:
        example = encoder.encode(Conversation("1", messages, tools=tools))
    except RowRejected as rejection:
        return f"rejected: {rejection}", encoder.notes()
    ids, mask = expected(tokenizer, family, Conversation("1", needed, tools=tools))
    assert example.tokens.tolist() == ids.tolist()
    assert example.labels_mask.tolist() == mask.tolist()
    return tokenizer.decode(ids[mask]), encoder.notes()


CALLS = {name for name, chat in CONVERSATIONS.items() if "tool_calls" in str(chat)}
PARALLEL = {"parallel calls", "two results"}
# Conversations of which nothing can be learned; all others are.
REJECTED = {
    **dict.fromkeys(["chatml", "llama2", "gemma3", "phi3"], CALLS),  # which drop or refuse calls
    "gemma2": {*CALLS, "system"},
    "llama3_1": PARALLEL,
    "gpt_oss": PARALLEL,  # all calls but the first are dropped
    "deepseek_r1": {*CONVERSATIONS, "control strings"},  # prompts open thinking, texts do not
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_mask_are_those_of_rendered_prefixes_token_by_token(name):
    family, rejected = FAMILIES[name], set()
    for chat, messages in {**CONVERSATIONS, "control strings": control_strings(family)}.items():
        tools = TOOLS if chat in CALLS else None
        text = with_json_text(messages)
        needed = text if family.arguments == "text" else messages
        found, _ = check(name, messages, needed, tools)
        if tools:  # the same with arguments in the other form
            other = text if family.arguments == "either" else needed
            assert check(name, text, other, tools)[0] == found
        if found.startswith("rejected"):
            rejected.add(chat)
    assert rejected == REJECTED.get(name, set())


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_replies_and_tool_calls_end(name):
    tokenizer = tokenizer_of(name)
    assert set(tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))) == FAMILIES[name].stops


def supervised(name, chat, **more):
    messages = CONVERSATIONS[chat]
    return check(name, messages, messages, TOOLS if chat in CALLS else None)


def test_what_is_learned_of_templates_that_are_not_like_chatml():
    call = '{"city": "Paris", "days": 2, "é": ["\\"", "\\\\"]}'
    assert supervised("glm4", "turns")[0] == (
        "\n<think></think>\nYes.<|user|>\n<think></think>\nNo é 日本.<|user|>\n<think></think>\nEnd"
    )
    assert supervised("phi3", "plain")[0] == "Yes.<|end|>"
    assert supervised("command_r", "plain")[0] == (
        "<|START_RESPONSE|>Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    )
    assert supervised("mistral_v7", "call")[0] == f"[TOOL_CALLS]get_weather[ARGS]{call}</s>"
    assert supervised("gpt_oss", "result")[0] == (
        f" to=functions.get_weather<|channel|>commentary json<|message|>{call}<|call|>"
        "<|channel|>final<|message|>Take a coat.<|return|>"
    )


def test_earlier_replies_that_inference_would_see_otherwise_are_not_learned():
    rewritten = "a reply is not supervised: the chat template renders it, or what is before it"
    text, notes = supervised("qwen3", "thinking, earlier")
    assert text == "<think>\nWell.\n</think>\n\nNo.<|im_end|>"
    assert any(note.startswith(rewritten) for note in notes)
    # Mistral's tools are only before the last question.
    text, notes = supervised("mistral_v3", "after a result")
    assert "Oslo" in text
    assert "Paris" not in text
    assert any(note.startswith(rewritten) for note in notes)
    # gpt-oss ends earlier replies with <|end|>, after which it would go on.
    text, notes = supervised("gpt_oss", "turns")
    assert text.count("<|channel|>final") == 3
    assert "<|end|>" not in text
    assert any("does not end as one does at inference" in note for note in notes)


def test_why_a_row_is_rejected():
    assert supervised("deepseek_r1", "plain")[0] == (
        "rejected: no reply can be supervised: the prompt at inference ends in "
        "'<｜Assistant｜><think>\\n', with which the chat template does not begin the reply"
    )
    dropped = "rejected: the chat template drops the tool calls of a reply"
    assert supervised("chatml", "call")[0] == supervised("gpt_oss", "parallel calls")[0] == dropped
    assert supervised("llama3_1", "parallel calls")[0] == (
        "rejected: the chat template rejects it (one tool call at a time, line 14)"
    )
