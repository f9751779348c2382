"""Generation: the answers of transformers, whatever the batch, and where an answer ends."""

import pytest
import torch

from halfbyte.models import generate as halfbyte_generate
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.models.decoding import Decoder
from halfbyte.models.generate import end_tokens, generate
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("Hi", "What is the capital of France?", "Send nails to Leeds", "user")
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def source(tokenizer):
    # Scaled up, so that the likeliest token is not decided by rounding.
    source = tiny_llama(tokenizer)
    for parameter in source.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return source


@pytest.fixture(scope="module")
def model(source):
    model = build(source.config, BaseRecipe(quant="none"))
    for name, tensor in source.state_dict().items():
        if name != "lm_head.weight":
            load_tensor(model, name, tensor)
    finalize(model)
    return model


def test_greedy_answers_are_those_of_transformers(model, source, tokenizer):
    expected = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = source.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=1) == expected
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3) == expected
    assert len(set(expected)) > 1


def test_sampling_is_fixed_by_the_seed_and_leaves_torchs_alone(model, tokenizer):
    how = {"max_new_tokens": 12, "temperature": 5.0}
    state = torch.get_rng_state()
    one = generate(model, tokenizer, PROMPTS, seed=1, **how)
    assert generate(model, tokenizer, PROMPTS, seed=1, **how) == one
    assert generate(model, tokenizer, PROMPTS, seed=2, **how) != one
    assert torch.equal(state, torch.get_rng_state())


def test_streaming_gives_the_same_text(model, tokenizer):
    pieces = []
    (answer,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == answer
    with pytest.raises(ValueError, match="one prompt, got 4"):
        generate(model, tokenizer, PROMPTS, on_text=pieces.append)


def test_progress_counts_prompts(model, tokenizer):
    seen = []
    generate(
        model,
        tokenizer,
        PROMPTS,
        max_new_tokens=2,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_tools_reach_the_template(model, monkeypatch):
    """What training put before a reply, evaluation must put there too."""
    template = "{% if tools %}tools {{ tools | length }}\n{% endif %}"
    tokenizer = tiny_tokenizer(template + tiny_tokenizer().chat_template)
    known = [{"type": "function", "function": {"name": "send", "parameters": {}}}]
    seen = []
    prefill = Decoder.prefill

    def watched(self, prompts, slots):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return prefill(self, prompts, slots)

    monkeypatch.setattr(Decoder, "prefill", watched)
    for tools in (None, [None], [known]):
        generate(model, tokenizer, PROMPTS[:1], tools=tools, max_new_tokens=1)
    assert [text.startswith("tools 1\n") for text in seen] == [False, False, True]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_others_are_answered_by_transformers_and_the_reason_is_logged_once(
    model, tokenizer, monkeypatch, caplog, temperature
):
    how = {"max_new_tokens": 12, "temperature": temperature, "batch_size": 3}
    known = generate(model, tokenizer, PROMPTS, **how)
    monkeypatch.setattr(halfbyte_generate, "why_not", lambda model: "its name is not known")
    halfbyte_generate._tell.cache_clear()
    with caplog.at_level("INFO", "halfbyte"):
        answers = generate(model, tokenizer, PROMPTS, **how)
        assert generate(model, tokenizer, PROMPTS, **how) == answers
    assert [r.message for r in caplog.records] == [
        "using transformers' generate instead of the faster loop: its name is not known"
    ]
    if temperature == 0:
        assert answers == known
    pieces = []
    (answer,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == answer


def test_nothing_asked(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_every_end_token_counts(model, tokenizer):
    ends = end_tokens(model, tokenizer)
    assert tokenizer.eos_token_id in ends
    model.generation_config.eos_token_id = [7, 9]
    assert {7, 9, tokenizer.eos_token_id} <= set(end_tokens(model, tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def test_padding_that_a_model_would_see_is_not_used(tokenizer):
    """Blenderbot is not given positions, and counts padding on the left."""
    sizes = {"decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 4}
    model = tiny_model("blenderbot", d_model=64, decoder_ffn_dim=96, encoder_ffn_dim=96, **sizes)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert together == alone
