"""Chat templates as the families of models have them, and conversations to render with them.

The templates in ``chat_templates`` are ours, and have the structure of the families': where turns
begin and end, what is moved, dropped and added. What is known of each is in `FAMILIES`.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        closings: How the rendering of a conversation ends after its last reply, and how much of
            that, from its beginning, the model writes.
        next_turn: Tokens that begin a turn and thereby end a reply, if nothing else does.
        special: Its special tokens; BOS and EOS are the first and the second.
        added: Its other added tokens.
        arguments: What the template needs the arguments of tool calls to be.
    """

    closings: dict[str, str]
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    next_turn: tuple[str, ...] = ()
    arguments: str = "objects"

    @property
    def stops(self) -> set[str]:
        """Where generation must stop."""
        return {*self.closings.values(), *self.next_turn}


def _family(closings, special, added="", next_turn="", arguments="objects"):
    return Family(
        closings, (*special.split(),), (*added.split(),), (*next_turn.split(),), arguments
    )


_CHATML = {"<|im_end|>\n": "<|im_end|>"}
_QWEN = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
_MISTRAL = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] "
_MISTRAL += "[/TOOL_RESULTS]"
_DEEPSEEK = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
_DEEPSEEK_END = {"<｜end▁of▁sentence｜>": "<｜end▁of▁sentence｜>"}
_TOOLS = "tool▁calls▁begin tool▁calls▁end tool▁call▁begin tool▁call▁end tool▁sep tool▁outputs▁begin"
_TOOLS += " tool▁outputs▁end tool▁output▁begin tool▁output▁end"
_GEMMA = "<bos> <eos> <start_of_turn> <end_of_turn>"
_GEMMA_END = {"<end_of_turn>\n": "<end_of_turn>"}

FAMILIES = {
    "chatml": _family(_CHATML, "<|im_start|> <|im_end|>"),
    "llama2": _family({"</s>": "</s>"}, "<s> </s>"),
    "llama3_1": _family(
        {"<|eot_id|>": "<|eot_id|>"},
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
        "<|eom_id|> <|python_tag|>",
    ),
    "llama4": _family(
        {"<|eot|>": "<|eot|>", "<|eom|>": "<|eom|>"},
        "<|begin_of_text|> <|end_of_text|> <|header_start|> <|header_end|> <|eot|> <|eom|> "
        "<|python_start|> <|python_end|>",
    ),
    "mistral_v3": _family({"</s>": "</s>"}, f"<s> </s> {_MISTRAL}"),
    "mistral_v7": _family(
        {"</s>": "</s>"}, f"<s> </s> {_MISTRAL} [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [ARGS]"
    ),
    "gemma2": _family(_GEMMA_END, _GEMMA),
    "gemma3": _family(_GEMMA_END, _GEMMA),
    "phi3": _family(
        {"<|end|>\n<|endoftext|>": "<|end|>"},
        "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
    ),
    "phi4": _family(
        {"<|end|><|endoftext|>": "<|end|>"},
        "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        "<|tool|> <|/tool|> <|tool_call|> <|/tool_call|>",
    ),
    "qwen2_5": _family(_CHATML, "<|endoftext|> <|im_end|> <|im_start|>", _QWEN),
    "qwen3": _family(_CHATML, "<|endoftext|> <|im_end|> <|im_start|>", _QWEN, arguments="either"),
    "qwen3_5": _family(_CHATML, "<|endoftext|> <|im_end|> <|im_start|>", _QWEN),
    "deepseek_v3": _family(
        _DEEPSEEK_END,
        _DEEPSEEK,
        " ".join(f"<｜{name}｜>" for name in _TOOLS.split()),
        arguments="text",
    ),
    "deepseek_r1": _family(_DEEPSEEK_END, _DEEPSEEK, "<think> </think>"),
    "gpt_oss": _family(
        {"<|return|>": "<|return|>", "<|call|>": "<|call|>"},
        "<|startoftext|> <|return|> <|start|> <|end|> <|message|> <|channel|> <|call|>",
    ),
    "glm4": _family(
        {},
        "[gMASK] <|endoftext|> <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        f"{_QWEN} <arg_key> </arg_key> <arg_value> </arg_value>",
        next_turn="<|user|> <|observation|>",
    ),
    "command_r": _family(
        {"<|END_OF_TURN_TOKEN|>": "<|END_OF_TURN_TOKEN|>"},
        "<BOS_TOKEN> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|USER_TOKEN|> "
        "<|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "<|START_THINKING|> <|END_THINKING|> <|START_ACTION|> <|END_ACTION|> <|START_RESPONSE|> "
        "<|END_RESPONSE|> <|START_TOOL_RESULT|> <|END_TOOL_RESULT|>",
    ),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the tokens and the template of a family."""
    return tokenizer_with((TEMPLATES / f"{name}.jinja").read_text(), FAMILIES[name])


def tokenizer_with(template: str, family: Family) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with a template, and the tokens of a family."""
    tokenizer = tiny_tokenizer(template)
    tokens = [AddedToken(token, normalized=False, special=True) for token in family.special]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    tokenizer.bos_token, tokenizer.eos_token = family.special[:2]
    return tokenizer


def only(encoded):
    """The example of a row that is one."""
    ((_, example),) = encoded
    return example


def user(content):
    return {"role": "user", "content": content}


def reply(content, *calls, **more):
    calls = {"tool_calls": list(calls)} if calls else {}
    return {"role": "assistant", "content": content, **calls, **more}


def call(city, count=2, number=0):
    """A tool call; its arguments are an object."""
    arguments = {"city": city, "days": count, "é": ['"', "\\"]}
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(content, number=0):
    return {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": f"call{number:05}",
        "content": content,
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}

_CALLED = [user("Rain?"), reply("", call("Paris"))]
_ANSWERED = [*_CALLED, result('{"rain": true}'), reply("Take a coat.")]

CONVERSATIONS = {
    "plain": [user("Hi"), reply("Yes.")],
    "turns": [user("Hi"), reply("Yes."), user("So?"), reply("No é 日本."), user("?"), reply("End")],
    "system": [SYSTEM, user("Hi"), reply("Yes."), user("So?"), reply("No.")],
    "call": _CALLED,
    "call with text": [SYSTEM, user("Rain?"), reply("Let me see.", call("Paris"))],
    "parallel calls": [user("Rain?"), reply("", call("Paris"), call("Leeds", 3, 1))],
    "result": _ANSWERED,
    "two results": [
        user("Rain?"),
        reply("", call("Paris"), call("Leeds", 3, 1)),
        result("yes"),
        result("no", 1),
        reply("In Paris."),
    ],
    "after a result": [
        *_ANSWERED,
        user("And snow?"),
        reply("", call("Oslo")),
        result("1"),
        reply("Y"),
    ],
    "thinking": [user("Hi"), reply("Yes.", reasoning_content="Hm, a greeting.")],
    "thinking, earlier": [
        user("Hi"),
        reply("Yes.", reasoning_content="Hm."),
        user("So?"),
        reply("No.", reasoning_content="Well."),
    ],
    "thinking, call": [
        user("Rain?"),
        reply("", call("Paris"), reasoning_content="I should look."),
        result("yes"),
        reply("Take a coat.", reasoning_content="It rains."),
    ],
    "thinking in text": [user("Hi"), reply("<think>\nHm.\n</think>\n\nYes.")],
    "not weighted": [user("Hi"), reply("Yes.", weight=0), user("So?"), reply("No.")],
    "spaces": [user("  Hi \n"), reply("  Yes. \n"), user("\nSo?"), reply("\n\nNo.\t")],
}


def control_strings(family):
    """A conversation in whose contents the family's control tokens occur."""
    tokens = [*family.special, *family.added]
    return [
        user("".join(tokens)),
        reply("a " + " b ".join(tokens) + " c"),
        user(f"{family.special[1]} Hi"),
        reply(f"Yes {family.special[1]}"),
    ]


def with_json_text(messages):
    """The messages with the arguments of tool calls as JSON text, as OpenAI has them."""
    messages = deepcopy(messages)
    for message in messages:
        for called in message.get("tool_calls", ()):
            arguments = called["function"]["arguments"]
            called["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return messages
