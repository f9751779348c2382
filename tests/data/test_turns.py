"""The mask of a family's template is what transformers' own rendering of prefixes says it is."""

import numpy as np
import pytest

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Conversation
from halfbyte.data.templates import Encoder, end_of_turn
from tests.data.chats import (
    CONVERSATIONS,
    FAMILIES,
    TEMPLATES,
    TOOLS,
    control_strings,
    only,
    reply,
    tokenizer_of,
    tokenizer_with,
    user,
    with_json_text,
)


def rendered(tokenizer, messages, tools, **more):
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more)


def prompts_and_replies(tokenizer, messages, tools):
    """Of each reply that begins as the prompt at inference ends, the texts of both."""
    found = {}
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != 0:
            asked = rendered(tokenizer, messages[:index], tools, add_generation_prompt=True)
            replied = rendered(tokenizer, messages[: index + 1], tools)
            if replied.startswith(asked):
                found[index] = asked, replied
    return found


def expected(tokenizer, family, messages, tools, taken):
    """The token ids, the supervised ones, and the indices of the replies that these are.

    Nothing is known of the template but how its replies end. The text of a conversation must begin
    with the prompt at inference, and with that and the reply, which is not one of those ``taken``.
    """

    def count(text):
        """Tokens of a text with which the whole begins."""
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[: len(tokens)].tolist() == tokens
        return len(tokens)

    text = rendered(tokenizer, messages, tools)
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
    mask = np.zeros(len(ids), dtype=bool)
    found = set()
    for index, (asked, replied) in prompts_and_replies(tokenizer, messages, tools).items():
        closing = next((one for one in family.closings if replied.endswith(one)), "")
        end = family.closings.get(closing, "")
        replied = replied.removesuffix(closing)
        following = [one for one in family.next_turn if text.startswith(replied + one)]
        if index not in taken and text.startswith(replied + end):
            mask[count(asked) : count(replied + (end or "".join(following)))] = True
            found.add(index)
    return ids, mask, found


def check(name, messages, needed, tools):
    """Compare with what is expected, and check that each reply is learned in one example.

    Returns the supervised text of each example, or why the row is rejected, and what is said.
    """
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    encoder = Encoder(tokenizer)
    try:
        encoded = encoder.encode(Conversation("1", messages, tools=tools))
    except RowRejected as rejection:
        return f"rejected: {rejection}", encoder.notes()
    taken, texts = set(), []
    for row, example in reversed(encoded):
        assert row.messages == messages[: len(row.messages)]
        ids, mask, found = expected(tokenizer, family, needed[: len(row.messages)], tools, taken)
        assert example.tokens.tolist() == ids.tolist()
        assert example.labels_mask.tolist() == mask.tolist()
        texts.insert(0, tokenizer.decode(ids[mask]))
        taken |= found
    assert taken == set(prompts_and_replies(tokenizer, needed, tools))
    return texts, encoder.notes()


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
        if isinstance(found, str):
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
    assert supervised("glm4", "turns")[0] == [
        "\n<think></think>\nYes.<|user|>\n<think></think>\nNo é 日本.<|user|>\n<think></think>\nEnd"
    ]
    assert supervised("phi3", "plain")[0] == ["Yes.<|end|>"]
    assert supervised("command_r", "plain")[0] == [
        "<|START_RESPONSE|>Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    ]
    assert supervised("mistral_v7", "call")[0] == [f"[TOOL_CALLS]get_weather[ARGS]{call}</s>"]
    assert supervised("gpt_oss", "result")[0] == [
        f" to=functions.get_weather<|channel|>commentary json<|message|>{call}<|call|>"
        "<|channel|>final<|message|>Take a coat.<|return|>"
    ]


MULTIPLE_TURNS = ("turns", "system", "after a result", "thinking, earlier", "thinking, call")


@pytest.mark.parametrize("chat", MULTIPLE_TURNS)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "mistral_v3", "gpt_oss"])
def test_every_reply_is_learned_once_after_its_prompt_and_with_its_end(name, chat):
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    messages, tools = CONVERSATIONS[chat], TOOLS if chat in CALLS else None
    written = []
    for asked, replied in prompts_and_replies(tokenizer, messages, tools).values():
        closing = next(one for one in family.closings if replied.endswith(one))
        end = family.closings[closing]
        written.append((asked, replied.removesuffix(closing).removeprefix(asked) + end))
    assert len(written) == sum(message["role"] == "assistant" for message in messages)
    learned = []
    for _, example in Encoder(tokenizer).encode(Conversation("1", messages, tools=tools)):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], example.labels_mask, [0]])))
        for start, stop in edges.reshape(-1, 2):
            parts = example.tokens[:start], example.tokens[start:stop]
            learned.append(tuple(map(tokenizer.decode, parts)))
    assert sorted(learned) == sorted(written)


def test_replies_share_an_example_if_they_can():
    def examples(name, chat):
        return [text.count(FAMILIES[name].special[1]) for text in supervised(name, chat)[0]]

    assert examples("qwen2_5", "after a result") == [4]
    # Qwen 3.5 drops the thinking before the last question, Mistral moves the tools there.
    assert examples("qwen3_5", "after a result") == [2, 2]
    assert examples("mistral_v3", "after a result") == [2, 2]
    # Qwen 3 writes no empty thinking but in the last reply.
    assert examples("qwen3", "after a result") == [1, 1, 1, 1]
    assert supervised("qwen3", "thinking, earlier")[0] == [
        "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
        "<think>\nWell.\n</think>\n\nNo.<|im_end|>",
    ]
    assert len(supervised("gpt_oss", "turns")[0]) == 3


def test_nothing_is_said_to_be_lost_that_another_example_has():
    assert not any("drops" in note for note in supervised("qwen3", "thinking, earlier")[1])
    unweighted = [
        user("Hi"),
        reply("Yes.", reasoning_content="Hm.", weight=0),
        user("?"),
        reply("N"),
    ]
    assert any(
        "drops the reasoning" in note for note in check("qwen3", unweighted, unweighted, None)[1]
    )


def test_why_a_row_is_rejected():
    reason = (
        "rejected: no reply can be supervised: the prompt at inference ends in "
        "'<｜Assistant｜><think>\\n', with which the chat template does not begin the reply; "
    )
    assert supervised("deepseek_r1", "plain")[0] == (
        reason + "train on all tokens (train_on: all), or change the model's chat template"
    )
    dropped = "rejected: the chat template drops the tool calls of a reply"
    assert supervised("chatml", "call")[0] == supervised("gpt_oss", "parallel calls")[0] == dropped
    assert supervised("llama3_1", "parallel calls")[0] == (
        "rejected: the chat template rejects it (one tool call at a time, line 14)"
    )


def test_where_thinking_is_missing_the_reason_asks_for_it():
    template = (TEMPLATES / "deepseek_r1.jinja").read_text()
    thinking = "('<think>\\n' ~ message.reasoning_content if message.reasoning_content else '')"
    template = template.replace("'<｜Assistant｜>' ~", f"'<｜Assistant｜>' ~ {thinking} ~", 1)
    encoder = Encoder(tokenizer_with(template, FAMILIES["deepseek_r1"]))
    asks = r"give its thinking as 'reasoning_content', or train on all tokens \(train_on: all\)$"
    with pytest.raises(RowRejected, match=asks):
        encoder.encode(Conversation("1", CONVERSATIONS["plain"]))
    followed = [user("Hi"), reply("Yes.", reasoning_content="Hm.")]
    assert only(encoder.encode(Conversation("1", followed))).labels_mask.any()
