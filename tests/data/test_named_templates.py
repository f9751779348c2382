"""Chat templates by name: the published formats token by token, and what a tokenizer must have."""

import json

import pytest

from halfbyte.data import conversations, end_of_turn, prompt_ids
from halfbyte.data.named_templates import FORMATS, choose_template
from halfbyte.data.templates import Encoder
from halfbyte.errors import ConfigError
from tests.data.chats import (
    CONVERSATIONS,
    FAMILIES,
    SYSTEM,
    TEMPLATES,
    Family,
    reply,
    tokenizer_with,
    user,
)
from tests.tiny import tiny_tokenizer

PLAIN = {name: CONVERSATIONS[name] for name in ("plain", "turns", "system", "spaces")}
ZEPHYR = Family({"</s>\n": "</s>"}, ("<s>", "</s>"))
WITHOUT_TOKENS = ("alpaca", "vicuna", "zephyr")


def tokenizer_for(name):
    """A tokenizer of the family of a format, without a template."""
    family = {"llama3": "llama3_1", "mistral": "mistral_v3", "gemma": "gemma3"}.get(name, name)
    return tokenizer_with(None, FAMILIES.get(family, ZEPHYR))


def named(name, tokenizer):
    tokenizer.chat_template, notes = choose_template(name, tokenizer)
    return tokenizer, notes


def ids(tokenizer, template, messages, **more):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False, **more
    )


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("name", "published", "chats"),
    [
        ("chatml", "chatml", PLAIN),
        ("gemma", "gemma3", PLAIN),
        ("gemma", "gemma2", ("plain", "turns", "spaces")),  # has no system prompt
        ("llama2", "llama2", PLAIN),
        ("mistral", "mistral_v3", ("plain", "turns", "spaces")),  # moves it from turn to turn
        ("phi3", "phi3", PLAIN),
        ("phi4", "phi4", PLAIN),
    ],
)
def test_a_format_is_the_published_template_token_by_token(name, published, chats, prompt):
    tokenizer = tokenizer_for(name)
    ours, _ = choose_template(name, tokenizer)
    theirs = (TEMPLATES / f"{published}.jinja").read_text()
    for chat in chats:
        messages = PLAIN[chat][:-1] if prompt else PLAIN[chat]
        more = {"add_generation_prompt": prompt}
        assert ids(tokenizer, ours, messages, **more) == ids(tokenizer, theirs, messages, **more)


def test_llama_3_is_llama_3_1_without_the_date():
    tokenizer = tokenizer_for("llama3")
    ours, _ = choose_template("llama3", tokenizer)
    theirs = (TEMPLATES / "llama3_1.jinja").read_text().replace("Today Date: 1 Jul 2024\\n\\n", "")
    assert ids(tokenizer, ours, PLAIN["system"]) == ids(tokenizer, theirs, PLAIN["system"])


CHAT = [user("Hi"), reply("Yes."), user("So?"), reply("No.")]
EXPECTED = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nHi\n\n### Response:\nYes.</s>\n\n"
    "### Instruction:\nSo?\n\n### Response:\nNo.</s>\n\n",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: Hi ASSISTANT: Yes.</s>USER: So? ASSISTANT: No.</s>",
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\nYes.</s>\n"
    "<|user|>\nSo?</s>\n<|assistant|>\nNo.</s>\n",
}
WITH_SYSTEM = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n",
    "vicuna": "Be brief. USER: Hi ASSISTANT:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_formats_without_a_published_template_here_are_as_described(name):
    tokenizer, _ = named(name, tokenizer_for(name))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == EXPECTED[name]
    prompt = tokenizer.apply_chat_template(
        [SYSTEM, user("Hi")], tokenize=False, add_generation_prompt=True
    )
    assert prompt == WITH_SYSTEM[name]


def test_zephyr_is_what_its_published_template_renders():
    """The one of the model card; its lines end as jinja's trim_blocks leaves them."""
    published = (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}"
    )
    tokenizer = tokenizer_for("zephyr")
    ours, _ = choose_template("zephyr", tokenizer)
    for messages, prompt in ((PLAIN["system"], False), (PLAIN["system"][:-1], True)):
        more = {"add_generation_prompt": prompt}
        assert ids(tokenizer, ours, messages, **more) == ids(tokenizer, published, messages, **more)


ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
ENDS["phi4"] = "<|end|>"


@pytest.mark.parametrize("name", FORMATS)
def test_every_reply_is_supervised_and_generation_stops_where_it_ends(name, tmp_path):
    tokenizer, notes = named(name, tokenizer_for(name))
    end = ENDS.get(name, "</s>")
    assert end_of_turn(tokenizer) == (tokenizer.convert_tokens_to_ids(end),)
    assert notes[0] == f"chat template: {name}"
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    [row] = conversations(file)
    [(_, example)] = Encoder(tokenizer).encode(row)
    supervised = tokenizer.decode(example.tokens[example.labels_mask]).split()
    assert "".join(supervised) == f"Yes.{end}No.{end}"
    assert list(example.tokens[: example.prompt_length]) == prompt_ids(tokenizer, CHAT[:1])


@pytest.mark.parametrize("name", FORMATS)
def test_where_a_token_is_missing_what_to_do_is_said(name):
    tokenizer = tiny_tokenizer(None)  # ChatML's tokens alone
    if name in ("llama3", "gemma", "phi3", "phi4"):
        with pytest.raises(
            ConfigError, match=r"needs the token .* which this model's tokenizer cuts"
        ) as caught:
            choose_template(name, tokenizer)
        assert "--modules-to-save embed_tokens,lm_head" in str(caught.value)
    else:
        _, notes = choose_template(name, tokenizer)
        assert any("is cut into" in note for note in notes) == (name == "zephyr")


def test_of_a_file_only_the_token_that_ends_turns_must_be_one(tmp_path):
    text = FORMATS["chatml"].replace("<|im_start|>", "<|turn|>")
    (tmp_path / "begins.jinja").write_text(text)
    (tmp_path / "ends.jinja").write_text(text.replace("<|im_end|>", "<|over|>"))
    tokenizer = tiny_tokenizer()
    _, notes = choose_template(f"{tmp_path}/begins.jinja", tokenizer)
    assert any(note.startswith("<|turn|> is cut into") for note in notes)
    with pytest.raises(ConfigError, match=r"needs the token '<\|over\|>', which"):
        choose_template(f"{tmp_path}/ends.jinja", tokenizer)


def test_a_tokenizer_without_eos_cannot_end_turns_with_it():
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(
        ConfigError, match="ends turns with EOS, which this tokenizer does not have"
    ):
        choose_template("alpaca", tokenizer)


@pytest.mark.parametrize("name", ["alpaca", "vicuna"])
def test_bos_is_written_if_the_tokenizer_begins_texts_with_it(name):
    for adds in (True, False):
        tokenizer, _ = named(name, tiny_tokenizer(None, adds_bos=adds))
        rendered = ids(tokenizer, tokenizer.chat_template, CHAT)
        assert (rendered[0] == tokenizer.bos_token_id) == adds


def test_a_named_template_of_the_tokenizer_and_a_file(tmp_path):
    tokenizer = tiny_tokenizer({"default": "{{ 'a' }}", "tool_use": "{{ 'b<|im_end|>' }}"})
    assert choose_template("tool_use", tokenizer)[0] == "{{ 'b<|im_end|>' }}"
    file = tmp_path / "own.jinja"
    file.write_text(FORMATS["chatml"])
    text, notes = choose_template(str(file), tokenizer)
    assert text == FORMATS["chatml"]
    assert notes == [f"chat template: {file}, instead of the tokenizer's own"]
    assert set(tokenizer.chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("chatlm", r"expected chatml, .* or a .jinja file, got 'chatlm'; did you mean `chatml`\?"),
        ("missing.jinja", "cannot read missing.jinja: No such file"),
        ("{directory}/", "expected a file, found a directory"),
        ("{directory}/bad.jinja", "chat template is not valid"),
        ("{directory}/refuses.jinja", "not for you"),
        ("{directory}/binary.jinja", "it is not text in UTF-8"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, wanted, message):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('not for you') }}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template
    with pytest.raises(ConfigError, match=message):
        choose_template(wanted.format(directory=tmp_path), tokenizer)
    assert tokenizer.chat_template == before
