"""The ids are transformers' own; what is learned is what inference would have the model write."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.data import templates
from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import Conversation
from halfbyte.data.templates import Encoder, end_of_turn, prompt_ids
from halfbyte.errors import DataError
from tests.data.chats import only, tokenizer_of
from tests.tiny import CHATML, GENERATION, LLAMA2, tiny_tokenizer

END = "<|im_end|>"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(*contents, **more):
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return Conversation(
        "1", [turn(roles[at % 2], content) for at, content in enumerate(contents)], **more
    )


def learned(tokenizer, row, train_on="assistant"):
    """What is learned, a text for each unbroken run of tokens, and what is said about it."""
    encoder = Encoder(tokenizer, train_on)
    runs = []
    for _, example in encoder.encode(row):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], example.labels_mask, [0]])))
        runs += [example.tokens[start:end] for start, end in edges.reshape(-1, 2)]
    return [tokenizer.decode(run) for run in runs], encoder.notes()


def template(reply, *, before="<|im_start|>assistant\n", prompt="<|im_start|>assistant\n"):
    """A ChatML-like template in which an assistant turn is ``before`` and ``reply``."""
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        f"{before}{reply}"
        "{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


CHATS = {"chatml": CHATML, "llama2": LLAMA2, "generation": GENERATION}
TOKENIZERS = {name: tiny_tokenizer(text, adds_bos=True) for name, text in CHATS.items()}
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12
) | st.sampled_from(["<|im_end|>", "\n\nYes", " ", "[/INST]", "<|im_start|>user\n", "é\u0301"])


@pytest.mark.parametrize("name", CHATS)
@given(contents=st.lists(WORDS, min_size=2, max_size=6).filter(lambda words: len(words) % 2 == 0))
def test_ids_are_transformers_own_and_begin_with_the_prompt_of_inference(name, contents):
    tokenizer, row = TOKENIZERS[name], talk(*contents)
    encoder = Encoder(tokenizer)
    example = only(encoder.encode(row))
    whole = tokenizer.apply_chat_template(row.messages)["input_ids"]
    assert example.tokens.tolist() == whole

    # A reply's tokens are those that follow the prompt, except where a token merges the two.
    asked = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"]
    assert prompt_ids(tokenizer, row.prompt) == asked
    last = np.flatnonzero(example.labels_mask)[-1]
    assert whole[last] == tokenizer.eos_token_id
    if not any("merges" in note for note in encoder.notes()):
        assert whole[: len(asked)] == asked
        assert example.labels_mask[len(asked) : last + 1].all()
        assert not example.labels_mask[len(asked) - 1]
    assert not example.labels_mask[last + 1 :].any()


@pytest.mark.parametrize("name", CHATS)
def test_every_reply_is_learned_with_the_token_that_closes_it(name):
    replies, notes = learned(TOKENIZERS[name], talk("Hi", "Yes.", "So?", "No é 日本."))
    lead = " " if name == "llama2" else ""
    assert replies == [f"{lead}Yes.{END}", f"{lead}No é 日本.{END}"]
    assert notes == ()


def test_the_first_learned_token_tells_the_prompts_length():
    tokenizer, row = TOKENIZERS["chatml"], talk("Hi", "Yes.")
    example = only(Encoder(tokenizer).encode(row))
    assert example.prompt_length == len(prompt_ids(tokenizer, row.prompt))
    assert example.labels_mask[example.prompt_length]


def test_a_mark_that_leaves_the_closing_token_out_is_extended_by_it():
    text = template(
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    )
    replies, _ = learned(tiny_tokenizer(text), talk("Hi", "Yes.", "So?", "No."))
    assert replies == [f"Yes.{END}", f"No.{END}"]


@pytest.mark.parametrize("name", ["chatml", "generation"])
def test_given_and_unweighted_replies_are_not_learned(name):
    replies, _ = learned(TOKENIZERS[name], talk("Hi", "Yes.", "So?", "No.", given=3))
    assert replies == [f"No.{END}"]
    row = talk("Hi", "Yes.", "So?", "No.")
    row.messages[3]["weight"] = 0
    assert learned(TOKENIZERS[name], row)[0] == [f"Yes.{END}"]


def test_all_tokens_are_learned_on_request_but_the_first():
    example = only(Encoder(TOKENIZERS["chatml"], "all").encode(talk("Hi", "Yes.")))
    assert example.labels_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_a_reply_that_would_think_at_inference_is_learned_where_it_does():
    text = template(
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\n' }}"
    )
    replies, notes = learned(tiny_tokenizer(text), talk("Hi", "Yes.", "So?", "No."))
    assert replies == [f"<think>\n\n</think>\n\n{word}.{END}" for word in ("Yes", "No")]
    assert notes == ()


def test_a_reply_that_is_rewritten_later_is_learned_where_it_is_not():
    text = template(
        "{{ (message['content'] if loop.last else message['content'].split('</think>')[-1])"
        " + '<|im_end|>\n' }}"
    )
    row = talk("Hi", "<think>hm</think>Yes.", "So?", "<think>hm</think>No.")
    replies, notes = learned(tiny_tokenizer(text), row)
    assert replies == [f"<think>hm</think>{word}.{END}" for word in ("Yes", "No")]
    assert notes == ()


def test_a_reply_whose_text_is_changed_is_learned_and_that_is_said():
    text = template("{{ message['content'].split('</think>')[-1] + '<|im_end|>\n' }}")
    replies, notes = learned(tiny_tokenizer(text), talk("Hi", "<think>hm</think>Yes."))
    assert replies == [f"Yes.{END}"]
    assert notes == ("the chat template changes the text of a reply: 1 row (line 1)",)


def test_only_the_token_that_ends_a_reply_at_inference_is_learned():
    text = template(
        "{{ 'final:' + message['content'] }}"
        "{% if loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}",
        before="<|im_start|>assistant",
        prompt="<|im_start|>assistant",
    )
    replies, notes = learned(tiny_tokenizer(text), talk("Hi", "final", "So?", "No."))
    assert replies == ["final:final<|endoftext|>", "final:No.<|endoftext|>"]
    assert notes == ()


def test_a_prompt_that_opens_thinking_which_training_lacks_is_a_reason_for_rejection():
    text = template(
        "{{ message['content'] + '<|im_end|>\n' }}", prompt="<|im_start|>assistant\n<think>\n"
    )
    with pytest.raises(
        RowRejected, match=r"prompt at inference ends in '<\|im_start\|>assistant\\n<think>\\n'"
    ):
        learned(tiny_tokenizer(text), talk("Hi", "Yes.", "So?", "<No."))


def test_a_reply_that_changes_what_is_before_it_is_a_reason_for_rejection():
    with pytest.raises(RowRejected, match=r"renders what is before it otherwise.*train_on: all"):
        learned(tiny_tokenizer("{{ messages | length }}" + CHATML), talk("Hi", "Yes."))


def test_a_header_that_inference_leaves_to_the_model_is_learned():
    text = template("{{ message['content'] + '<|im_end|>\n' }}", prompt="")
    replies, _ = learned(tiny_tokenizer(text), talk("Hi", "Yes."))
    assert replies == [f"<|im_start|>assistant\nYes.{END}"]


def test_a_reply_that_nothing_closes_is_learned_whole_and_that_is_said():
    text = template("{{ message['content'] + '\n' }}")
    replies, notes = learned(tiny_tokenizer(text), talk("Hi", "Yes."))
    assert replies == ["Yes.\n"]
    assert notes == ("no token ends the reply: the model will not learn to stop: 1 row (line 1)",)


def test_a_conversation_that_begins_with_a_reply_is_learned_from_the_second():
    row = Conversation("4", [turn("assistant", "Hello!"), *talk("Hi", "Yes.").messages])
    replies, notes = learned(TOKENIZERS["chatml"], row)
    assert replies == [f"Yes.{END}"]
    assert notes == ("a reply is not supervised: there is no message before it: 1 row (line 4)",)


def test_rows_of_which_no_reply_can_be_located_or_that_are_refused_are_rejected():
    with pytest.raises(RowRejected, match="no reply can be supervised: there is no message before"):
        learned(TOKENIZERS["chatml"], Conversation("1", [turn("assistant", "Hello!")]))
    system = [turn("system", "Be brief."), *talk("Hi", "Yes.").messages]
    with pytest.raises(
        RowRejected, match=r"rejects it \(roles must be user and assistant, line 1\)"
    ):
        learned(TOKENIZERS["llama2"], Conversation("1", system))
    with pytest.raises(DataError, match=r"cannot be rendered as a prompt.*roles must be"):
        prompt_ids(TOKENIZERS["llama2"], system)


def test_tools_reach_the_template():
    text = "{{ tools[0]['function']['name'] if tools else 'none' }}" + CHATML
    tokenizer = tiny_tokenizer(text)
    row = talk("Hi", "Yes.", tools=[{"type": "function", "function": {"name": "weather"}}])
    assert tokenizer.decode(only(Encoder(tokenizer).encode(row)).tokens).startswith("weather")


def test_a_token_that_merges_prompt_and_reply_is_learned_and_said():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([END, *alphabet, "ĊĊ"])}
    model = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END)
    tokenizer.chat_template = CHATML
    replies, notes = learned(tokenizer, talk("Hi", "\n Yes."))
    assert replies == [f"\n\n Yes.{END}"]
    assert notes == ("a token merges the prompt's end with the reply's start: 1 row (line 1)",)


# BOS and EOS


def test_bos_is_there_once_if_the_template_writes_it():
    tokenizer = tiny_tokenizer(LLAMA2, adds_bos=True, adds_eos=True)
    tokens = only(Encoder(tokenizer).encode(talk("Hi", "Yes."))).tokens.tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("{{ bos_token }}" + LLAMA2, "the chat template itself writes BOS twice"),
        (LLAMA2.replace("{{ bos_token }}", ""), "the chat template writes no BOS"),
    ],
)
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_bos_twice_or_not_at_all_is_left_as_transformers_does_and_said(text, note, train_on):
    tokenizer = tiny_tokenizer(text, adds_bos=True)
    encoder = Encoder(tokenizer, train_on)
    row = talk("Hi", "Yes.")
    whole = tokenizer.apply_chat_template(row.messages)["input_ids"]
    assert only(encoder.encode(row)).tokens.tolist() == whole
    assert [note in said for said in encoder.notes()] == [True]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_without_a_template_a_message_is_a_line_and_a_reply_ends_with_eos(adds_bos):
    tokenizer = tiny_tokenizer(None, adds_bos=adds_bos, adds_eos=True)
    row = talk("Hi", "Yes.", "So?", "No.")
    bos = tokenizer.bos_token * adds_bos
    tokens = only(Encoder(tokenizer).encode(row)).tokens
    assert tokenizer.decode(tokens) == f"{bos}Hi\nYes.{END}So?\nNo.{END}"
    replies, notes = learned(tokenizer, row)
    assert replies == [f"Yes.{END}", f"No.{END}"]
    assert notes == ("the tokenizer has no chat template: plain text, one line per message",)
    prompt = prompt_ids(tokenizer, row.prompt)
    assert tokens[: len(prompt)].tolist() == prompt
    everything = only(Encoder(tokenizer, "all").encode(row))
    assert everything.tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("text", ["Once.", f"Once.{END}", f"<|im_start|>Once.{END}"])
def test_plain_text_is_learned_whole_with_one_bos_and_one_eos(text, adds_eos):
    tokenizer = tiny_tokenizer(CHATML, adds_bos=True, adds_eos=adds_eos)
    example = only(Encoder(tokenizer).encode(Conversation("1", [], text=text)))
    assert tokenizer.decode(example.tokens) == f"<|im_start|>Once.{END}"
    assert example.labels_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_a_tokenizer_without_eos_is_said():
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.eos_token = None
    encoder = Encoder(tokenizer)
    assert (
        tokenizer.decode(only(encoder.encode(Conversation("1", [], text="Once."))).tokens)
        == "Once."
    )
    assert "no EOS" in encoder.notes()[0]


def test_a_tokenizer_without_offsets_is_refused_unless_all_is_learned(monkeypatch):
    tokenizer = tiny_tokenizer(CHATML)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="fast tokenizer"):
        Encoder(tokenizer).encode(talk("Hi", "Yes."))
    assert only(Encoder(tokenizer, "all").encode(talk("Hi", "Yes."))).labels_mask.any()


def test_the_token_at_which_generation_stops():
    assert end_of_turn(tiny_tokenizer(CHATML)) == (tiny_tokenizer().eos_token_id,)
    other = tiny_tokenizer(CHATML)
    other.eos_token = "<|endoftext|>"
    assert other.decode(end_of_turn(other)) == END
    assert end_of_turn(tiny_tokenizer("{{ raise_exception('no') }}")) == ()
    assert end_of_turn(tiny_tokenizer(None)) == (tiny_tokenizer().eos_token_id,)


def test_where_nothing_ends_a_reply_the_token_that_begins_the_next_turn_does():
    tokenizer = tiny_tokenizer(template("{{ message['content'] + '\n' }}"))
    assert tokenizer.decode(end_of_turn(tokenizer)) == "<|im_start|>"
    replies, notes = learned(tokenizer, talk("Hi", "Yes.", "So?", "No."))
    assert replies == ["Yes.\n<|im_start|>", "No.\n"]
    assert notes == ("no token ends the reply: the model will not learn to stop: 1 row (line 1)",)


def rejected(encode):
    """What it gives, or why the row is rejected."""
    try:
        return encode()
    except RowRejected as rejection:
        return str(rejection)


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", CHATS)
@given(chats=st.lists(st.lists(WORDS, min_size=1, max_size=5), min_size=1, max_size=5))
def test_many_rows_at_once_are_each_row_by_itself(name, train_on, chats):
    rows = [talk(*contents) for contents in chats] + [Conversation("2", [], text="bare text")]
    many, alone = (Encoder(TOKENIZERS[name], train_on) for _ in range(2))
    found = list(many.encode_all(rows))
    assert len(found) == len(rows)
    for row, got in zip(rows, found, strict=True):
        wanted = rejected(lambda row=row: alone.encode(row))
        if isinstance(wanted, str):
            assert str(got) == wanted
            continue
        got, wanted = only(got), only(wanted)
        assert np.array_equal(got.tokens, wanted.tokens)
        assert np.array_equal(got.labels_mask, wanted.labels_mask)
        assert got.prompt_length == wanted.prompt_length
    assert many.notes() == alone.notes()


def test_many_texts_of_one_row_are_tokenised_in_pieces(monkeypatch):
    monkeypatch.setattr(templates, "_AT_ONCE", 2)
    rows = [talk(*["Hi", "Yes."] * turns) for turns in (3, 1, 4)]
    rows.insert(1, Conversation("2", [], text="bare text"))
    many, alone = (Encoder(tokenizer_of("qwen3")) for _ in range(2))
    found = list(many.encode_all(rows))
    assert [len(row) for row in found] == [3, 1, 1, 4]
    for row, got in zip(rows, found, strict=True):
        for one, wanted in zip(got, alone.encode(row), strict=True):
            assert one.example.tokens.tolist() == wanted.example.tokens.tolist()
            assert one.example.labels_mask.tolist() == wanted.example.labels_mask.tolist()
