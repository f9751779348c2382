"""The mask of every family's template is what transformers' own rendering of prefixes says it is."""

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


def outcomes(name):
    """For each conversation, what is learned of it and what is said."""
    family = FAMILIES[name]
    for chat, messages in {**CONVERSATIONS, "control strings": control_strings(family)}.items():
        tools = TOOLS if any("tool_calls" in message for message in messages) else None
        text = with_json_text(messages)
        needs_text = family.arguments == "text"
        yield chat, *check(name, messages, text if needs_text else messages, tools)
        if tools:  # arguments in the other form give the same
            other = messages if family.arguments == "objects" else text
            yield chat, *check(name, text, text if needs_text else other, tools)
