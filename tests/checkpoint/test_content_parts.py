"""Templates of parts take text, and then write what they write for it as a part."""

from typing import Any

import pytest

from halfbyte.checkpoint.content_parts import takes_only_parts, taking_text
from tests.tiny import CHATML, GENERATION, LLAMA2, tiny_tokenizer

START, END = "{{ '<|im_start|>' + message['role'] + '\n' }}", "{{ '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def around(content: str) -> str:
    return "{% for message in messages %}" + START + content + END + "{% endfor %}" + PROMPT


PARTS = {
    "one loop": around(
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>"
        "{% elif part.type == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    ),
    "selections": around(
        "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>"
        "{% endfor %}"
        "{% for part in message.content | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ part.text }}{% endgeneration %}{% endfor %}"
    ),
}
BOTH = around(
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is {{ it }}?"},
    {"role": "assistant", "content": "Paris"},
]


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    text = tiny_tokenizer(template).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("case", PARTS)
def test_text_comes_out_as_a_part_of_text_does(case: str) -> None:
    template = PARTS[case]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    expected = rendered(template, parts)
    assert "Where is {{ it }}?" in expected
    assert "Paris" not in rendered(template, TALK)  # what this is for
    assert takes_only_parts(template)
    able = taking_text(template)
    assert rendered(able, TALK) == expected
    assert rendered(able, parts) == expected
    assert taking_text(able) == able
    assert able.endswith(template)
    assert "\n" not in able.removesuffix(template)  # errors name the template's own lines


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA2, GENERATION, BOTH, "{% for x in", "{{ messages }}", ""]
)
def test_others_stay_as_they_are(template: str) -> None:
    assert taking_text(template) == template
