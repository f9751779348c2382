"""Five formats, one kind of conversation; what cannot be one is refused with a reason."""

import pytest

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import detect_format, to_conversation
from halfbyte.errors import DataError

USER = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}

ROWS = {
    "messages": {"messages": [USER, REPLY]},
    "conversations": {
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    },
    "prompt/completion": {"prompt": "Why?", "completion": "Because."},
    "instruction/output": {"instruction": "Why?", "input": "", "output": "Because."},
}


def convert(row, name=None):
    return to_conversation(row, "7", name or detect_format([row]))


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_detected_and_says_the_same(name):
    assert detect_format([ROWS[name]]) == name
    conversation = convert(ROWS[name])
    assert conversation.messages == [USER, REPLY]
    assert (conversation.line, conversation.text) == ("7", None)
    assert (conversation.prompt, conversation.expected) == ([USER], "Because.")


def test_text_is_kept_as_text():
    conversation = convert({"text": "Once upon a time"})
    assert (conversation.text, conversation.messages) == ("Once upon a time", [])


def test_the_upper_format_wins_in_a_row_and_the_majority_among_rows():
    both = {**ROWS["messages"], "text": "rendered"}
    assert detect_format([both]) == "messages"
    assert detect_format([ROWS["messages"], {"text": "a"}, {"text": "b"}]) == "text"
    assert detect_format([{"text": "a"}, ROWS["messages"]]) == "messages"
    assert detect_format([3, None, {"text": "a"}]) == "text"


def test_no_known_format_shows_the_keys_and_what_was_expected():
    with pytest.raises(DataError, match=r"'question', 'answer'.*prompt and completion"):
        detect_format([{"question": "Why?", "answer": "Because."}])
    with pytest.raises(DataError, match="keys: none"):
        detect_format([[1, 2]])


def test_instruction_and_input_are_one_turn_with_a_blank_line_between():
    row = {"instruction": "Sum up.", "input": "A long text.", "output": "Short.", "system": "Hm."}
    messages = convert(row).messages
    assert messages[0] == {"role": "system", "content": "Hm."}
    assert messages[1] == {"role": "user", "content": "Sum up.\n\nA long text."}


def test_a_prompt_of_messages_is_read_and_never_learned():
    row = {"prompt": [USER, REPLY, USER], "completion": [REPLY]}
    conversation = convert(row)
    assert [conversation.learns(index) for index in range(4)] == [False, False, False, True]
    with_system = convert({**row, "system": "Be brief."})
    assert with_system.messages[0] == SYSTEM
    assert [with_system.learns(index) for index in range(5)] == [False] * 4 + [True]


def test_a_message_of_weight_zero_is_read_and_not_learned():
    conversation = convert({"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]})
    assert [conversation.learns(index) for index in range(4)] == [False, False, False, True]


def test_the_last_reply_is_the_expected_one():
    last = {"role": "assistant", "content": "Indeed."}
    conversation = convert({"messages": [SYSTEM, USER, REPLY, USER, last, USER]})
    assert conversation.prompt == [SYSTEM, USER, REPLY, USER]
    assert conversation.expected == "Indeed."


def test_parts_of_text_are_joined_and_other_keys_kept():
    call = {"function": {"name": "weather", "arguments": {}}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "W"}, {"text": "hy?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "name": "weather"},
            REPLY,
        ],
        "tools": [{"type": "function"}],
    }
    conversation = convert(row)
    assert conversation.messages[0] == USER
    assert conversation.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call],
    }
    assert conversation.messages[2]["name"] == "weather"
    assert conversation.tools == [{"type": "function"}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Why?", "not a list of messages"),
        ([], "is empty"),
        (["Why?"], "not a JSON object"),
        ([{"content": "Why?"}], "without a role"),
        ([{"role": 3, "content": "Why?"}], "without a role"),
        ([{"role": "narrator", "content": "Why?"}], "unknown role 'narrator'"),
        ([{"role": "user"}], "without content"),
        ([{"role": "user", "content": 3}], "not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text"),
        ([{"role": "user", "content": []}], "not text"),
        ([{"role": "user", "content": " \n"}, REPLY], "empty content in a message of the user"),
        ([USER, {"role": "assistant", "content": ""}], "empty content .* assistant"),
        ([USER], "no assistant turn"),
        ([USER, {**REPLY, "weight": 0}], "no assistant turn"),
    ],
)
def test_messages_that_cannot_be_used_are_refused_with_the_reason(messages, reason):
    with pytest.raises(RowRejected, match=reason):
        convert({"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ([1], "messages", "not a JSON object"),
        ({"text": "a"}, "messages", "no 'messages'"),
        ({"prompt": "a"}, "prompt/completion", "no 'completion'"),
        ({}, "instruction/output", "no 'instruction' and no 'output'"),
        ({"instruction": "a", "output": None}, "instruction/output", "no 'output'"),
        ({"text": " "}, "text", "empty text"),
        ({"text": {}}, "text", "not text"),
        ({"prompt": [USER], "completion": [USER]}, "prompt/completion", "no assistant turn"),
        ({"messages": [USER, REPLY], "tools": "[]"}, "messages", "'tools' is not a list"),
    ],
)
def test_rows_that_are_not_in_the_format_are_refused_with_the_reason(row, name, reason):
    with pytest.raises(RowRejected, match=reason):
        convert(row, name)
