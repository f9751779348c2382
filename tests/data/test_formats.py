"""Five formats, one kind of conversation; what cannot be one is refused with a reason."""

import json

import pytest

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import format_of, preferred_formats, to_conversation
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
    return to_conversation(row, "7", (name,) if name else preferred_formats([row]))


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_detected_and_says_the_same(name):
    conversation = convert(ROWS[name])
    assert format_of(ROWS[name], preferred_formats([ROWS[name]])) == name
    assert conversation.messages == [USER, REPLY]
    assert (conversation.line, conversation.text) == ("7", None)
    assert (conversation.prompt, conversation.expected) == ([USER], "Because.")


def test_text_is_kept_as_text():
    conversation = convert({"text": "Once upon a time"})
    assert (conversation.text, conversation.messages) == ("Once upon a time", [])


def test_the_frequent_format_is_preferred_and_in_a_tie_the_upper_one():
    both = {**ROWS["messages"], "text": "rendered"}
    assert preferred_formats([both]) == ("messages",)
    assert preferred_formats([ROWS["messages"], {"text": "a"}, {"text": "b"}])[0] == "text"
    assert preferred_formats([{"text": "a"}, ROWS["messages"]])[0] == "messages"
    assert preferred_formats([3, None, {"text": "a"}]) == ("text",)
    assert preferred_formats([{"chosen": "a", "rejected": "b"}]) == ()


def test_a_row_is_read_in_its_own_format_and_in_the_frequent_one_if_it_has_several():
    text, talk = {"text": "a"}, ROWS["messages"]
    both = {**talk, "text": "rendered"}
    for rows, expected in (
        ([both, both, text], ["messages", "messages", "text"]),
        ([both, text, text, talk], ["messages", "text", "text", "messages"]),
        ([both, text, text], ["text", "text", "text"]),
        ([*ROWS.values(), text], [*ROWS, "text"]),
    ):
        preferred = preferred_formats(rows)
        assert [format_of(row, preferred) for row in rows] == expected


def test_no_known_format_shows_the_keys_and_what_was_expected():
    with pytest.raises(DataError, match=r"'question', 'answer'.*prompt and completion"):
        preferred_formats([{"question": "Why?", "answer": "Because."}])
    with pytest.raises(DataError, match="keys: none"):
        preferred_formats([[1, 2]])


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
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content with image; only text"),
        ([{"role": "user", "content": [{"type": "input_audio"}, {"text": "Hm?"}]}], "with audio"),
        ([{**USER, "images": ["a.png"]}, REPLY], "it has 'images'; only text is trained"),
        ([{"role": "user", "content": [{"type": "file"}]}], "not text"),
        ([{"role": "user", "content": []}], "not text"),
        ([{"role": "user", "content": " \n"}, REPLY], "empty content in a message of the user"),
        ([USER, {"role": "assistant", "content": ""}], "empty content .* assistant"),
        ([USER], "no assistant turn"),
        ([USER, {**REPLY, "weight": 0}], "no assistant turn"),
        ([USER, {**REPLY, "weight": 0.5}], "weight is neither 0 nor 1"),
        ([USER, {**REPLY, "tool_calls": "[]"}], "'tool_calls' is not a list"),
        ([USER, {**REPLY, "tool_calls": [1]}], "'tool_calls' is not a list"),
        ([USER, {**REPLY, "function_call": "f"}], "'function_call' is not a JSON object with a na"),
        ([USER, {"role": "function_call", "content": "{"}], "'function_call' is text that is not"),
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
        ({"messages": [USER, REPLY], "tools": {}}, "messages", "'tools' is not a list"),
        ({"messages": [USER, REPLY], "tools": "{}"}, "messages", "'tools' is not a list"),
        ({"messages": [USER, REPLY], "tools": "[" * 2000}, "messages", "'tools' is text that is n"),
        ({"text": "a", "image": "a.png"}, "text", "it has 'image'; only text is trained"),
        ({**ROWS["conversations"], "images": ["a.png"]}, "conversations", "it has 'images'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "text", "preference data"),
        ({**ROWS["messages"], "chosen": "b", "rejected": "c"}, "messages", "preference data"),
        ({**ROWS["messages"], "label": False}, "messages", "preference data \\('label'\\)"),
        ({**ROWS["messages"], "weight": 0}, "messages", "the row's weight is 0"),
        ({**ROWS["messages"], "weight": 2}, "messages", "weight is neither 0 nor 1"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "instruction/output", "'history'"),
        ({"instruction": "a", "output": "b", "history": "c"}, "instruction/output", "'history'"),
    ],
)
def test_rows_that_are_not_in_the_format_are_refused_with_the_reason(row, name, reason):
    with pytest.raises(RowRejected, match=reason):
        convert(row, name)


def test_alpaca_s_history_is_the_earlier_turns_and_its_answers_are_learned():
    row = {"instruction": "Why?", "output": "Because.", "history": [["Who?", "I."], ["So?", "No."]]}
    conversation = convert({**row, "system": "Be brief."})
    assert [message["content"] for message in conversation.messages] == [
        *("Be brief.", "Who?", "I.", "So?", "No.", "Why?", "Because.")
    ]
    assert [i for i in range(7) if conversation.learns(i)] == [2, 4, 6]
    assert (conversation.expected, conversation.unused) == ("Because.", ())
    assert convert({**row, "history": None}).messages == [USER, REPLY]
    assert convert({**row, "history": []}).messages == [USER, REPLY]


TOOL = {"name": "weather", "parameters": {}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Leeds"}}}
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Leeds"}}'


@pytest.mark.parametrize("text", [CALL_TEXT, f"[{CALL_TEXT}]"])
def test_sharegpt_s_tool_calls_and_tools_in_text_become_openai_s(text):
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": text},
        {"from": "observation", "value": "wet"},
        {"from": "gpt", "value": "Yes."},
    ]
    conversation = convert({"conversations": turns, "tools": f"[{json.dumps(TOOL)}]"})
    assert conversation.messages[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "wet"},
    ]
    assert conversation.tools == [{"type": "function", "function": TOOL}]
    assert [i for i in range(4) if conversation.learns(i)] == [1, 3]
    assert convert({"conversations": turns, "tools": " "}).tools is None


def test_null_is_as_good_as_no_key():
    table = [
        {"role": None, "from": "human", "content": None, "value": "Why?", "images": None},
        {"role": "assistant", "from": None, "content": "Because.", "value": None, "images": []},
    ]
    assert convert({"conversations": table, "images": []}).messages[0] == USER
    assert convert({"messages": table}).messages[1]["content"] == "Because."


def test_openai_s_former_functions_become_tools():
    row = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "weather", "content": "wet"},
            {**REPLY, "function_call": None, "tool_calls": [], "name": None},
        ],
        "functions": [TOOL],
    }
    conversation = convert(row)
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conversation.messages[3] == REPLY
    assert conversation.tools == [{"type": "function", "function": TOOL}]
    assert conversation.unused == ()
    wrapped = [{"type": "function", "function": TOOL}]
    assert convert({**row, "tools": wrapped}).tools == wrapped
    assert convert({**row, "tools": wrapped}).unused == ("functions",)


@pytest.mark.parametrize("mark", ["train", "training"])
def test_axolotl_s_mark_of_a_turn_that_is_not_trained(mark):
    conversation = convert(
        {"messages": [USER, {**REPLY, mark: False}, USER, {**REPLY, mark: True}]}
    )
    assert [i for i in range(4) if conversation.learns(i)] == [3]


def test_keys_that_nothing_reads_are_named():
    row = {**ROWS["messages"], "id": 0, "text": "rendered", "weight": 1, "source": None, "a": []}
    assert convert(row).unused == ("id", "text")
    own = {"messages": [SYSTEM, USER, REPLY]}
    assert convert({**own, "system": "Be brief."}).unused == ()
    assert convert({**own, "system": "Be verbose."}).unused == ("system",)
    assert convert({"text": "a", "system": "b", "tools": [1]}, "text").unused == ("system", "tools")
