"""What a template may not write, and what the arguments of a tool call may not be."""

import pytest

from halfbyte.data import Conversation, Encoder
from halfbyte.data.dataset_report import RowRejected
from tests.tiny import CHATML, tiny_tokenizer

USER, REPLY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def test_a_template_that_writes_half_a_surrogate_pair_rejects_the_row() -> None:
    encoder = Encoder(tiny_tokenizer(CHATML + "{{ '\\ud80a' }}"))
    with pytest.raises(RowRejected, match="text that is not valid Unicode"):
        encoder.encode(Conversation("1", [USER, REPLY]))


@pytest.mark.parametrize("arguments", ["{", "[" * 5000])
def test_arguments_that_cannot_be_read_reject_the_row(arguments: str) -> None:
    objects = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    encoder = Encoder(tiny_tokenizer(objects))
    with pytest.raises(RowRejected, match="arguments of a tool call are not a JSON object"):
        encoder.encode(Conversation("1", [USER, {**REPLY, "tool_calls": [call]}]))
