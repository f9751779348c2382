"""Our own decoding: the tokens of transformers' generate, for every known family and adapter."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from halfbyte.linear.lora import dropout_clock
from halfbyte.models import continuous_batching
from halfbyte.models.continuous_batching import Batcher
from halfbyte.models.decoding import Decoder, why_not
from halfbyte.models.generate import chooser
from tests.engine.test_layerwise import FAMILIES, SIZES, model_of

KNOWN = ("llama", "qwen2", "qwen3", "mistral")
LENGTHS = (5, 1, 17, 9, 12)


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 120, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_transformers(model, prompt, most, ends=()):
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=0
    )
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def by_batcher(model, prompts, most, ends=(), slots=8):
    answers = [None] * len(prompts)

    def finished(prompt, tokens):
        assert answers[prompt] is None, "an answer came twice"
        answers[prompt] = tokens

    batcher = Batcher(
        Decoder(model),
        prompts,
        slots=slots,
        max_new_tokens=most,
        ends=ends,
        choose=chooser(0.0),
    )
    batcher.run(finished)
    return answers


ADAPTERS = {
    "nf4": {},
    "plain base": {"quant": "none"},
    "dora": {"use_dora": True},
    "trained whole": {"modules_to_save": ("embed_tokens", "norm", "lm_head")},
    "packed vocabulary": {"quantize_head": True, "quantize_embeddings": True},
}


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("how", ADAPTERS)
def test_greedy_tokens_are_those_of_transformers(family, how):
    """Prompts of uneven lengths, some and their answers beyond mistral's window of 8 tokens."""
    model = model_of(FAMILIES[family], **ADAPTERS[how])
    assert why_not(model) is None
    wanted = [by_transformers(model, prompt, 14) for prompt in prompts_of()]
    assert by_batcher(model, prompts_of(), 14) == wanted
    assert len({tuple(answer) for answer in wanted}) == len(wanted)


@pytest.mark.parametrize("family", KNOWN)
def test_without_an_adapter_and_with_a_tied_head(family):
    config = type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), "tie_word_embeddings": True})
    model = model_of(config)
    for module in model.modules():
        if hasattr(module, "adapter"):
            module.adapter = None
    wanted = [by_transformers(model, prompt, 9) for prompt in prompts_of()]
    assert by_batcher(model, prompts_of(), 9) == wanted


def test_biases_everywhere_and_adapters_on_some():
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    model = model_of(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    for layer in model.model.layers[1:]:
        layer.self_attn.k_proj.adapter = layer.mlp.gate_proj.adapter = None
    wanted = [by_transformers(model, prompt, 9) for prompt in prompts_of()]
    assert by_batcher(model, prompts_of(), 9) == wanted


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_slots_are_filled_again_and_answers_end_where_they_should(slots):
    model = model_of(FAMILIES["llama"])
    lengths = [3, 8, 5, 11, 4, 6, 7]
    free = [by_transformers(model, prompt, 20) for prompt in prompts_of(lengths)]
    ends = [free[0][2], free[3][0], free[5][7]]
    wanted = [by_transformers(model, prompt, 20, ends) for prompt in prompts_of(lengths)]
    assert len({len(answer) for answer in wanted}) > 2
    assert len(wanted[3]) == 1
    assert by_batcher(model, prompts_of(lengths), 20, ends, slots) == wanted
    shortest = by_batcher(model, prompts_of(lengths), 1, ends, slots)
    assert shortest == [answer[:1] for answer in wanted]


def test_a_cache_grows_and_prompts_are_prefilled_in_parts(monkeypatch):
    model = model_of(FAMILIES["qwen3"])
    wanted = [by_transformers(model, prompt, 30) for prompt in prompts_of()]
    monkeypatch.setattr(continuous_batching, "_UNIT", 4)
    monkeypatch.setattr(continuous_batching, "_ADVANCE", 3)
    monkeypatch.setattr(continuous_batching, "_PREFILL_TOKENS", {False: 20})
    grown = []
    grow = Decoder.grow
    monkeypatch.setattr(
        Decoder, "grow", lambda self, capacity: grown.append(capacity) or grow(self, capacity)
    )
    assert by_batcher(model, prompts_of(), 30) == wanted
    assert grown == [40, 48]


@torch.no_grad()
@pytest.mark.parametrize("family", KNOWN)
def test_a_step_gives_the_logits_of_a_prefill(family):
    model = model_of(FAMILIES[family])
    prompts = prompts_of()
    decoder = Decoder(model)
    decoder.open(len(prompts), 32)
    decoder.prefill([prompt[:-1] or [5] for prompt in prompts], range(len(prompts)))
    prompts[1] = [5, *prompts[1]]
    positions = torch.tensor([len(prompt) - 1 for prompt in prompts])
    stepped = decoder.step(
        decoder.embed(torch.tensor([prompt[-1] for prompt in prompts])), positions
    )
    # In other slots than before: nothing depends on which.
    again = decoder.prefill(prompts[::-1], range(len(prompts))).flip(0)
    torch.testing.assert_close(stepped, again, rtol=1e-4, atol=1e-4)
    for prompt, logits in zip(prompts, again, strict=True):
        wanted = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_run_is_told():
    for family, why in (("phi3", "Phi3ForCausalLM is none of"), ("gemma3", "Gemma3")):
        assert why in why_not(model_of(FAMILIES[family]))
    turning = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES, rope_parameters=turning)
    assert "rotary embedding (dynamic)" in why_not(model_of(config))
    config = LlamaConfig(**SIZES, hidden_act="gelu")
    assert "activation is gelu" in why_not(model_of(config))
    model = model_of(FAMILIES["llama"], dropout=0.1)
    assert why_not(model) is None
    dropout_clock(model).running = True
    assert why_not(model) == "dropout is on"
    model = model_of(FAMILIES["llama"])
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48)
    assert why_not(model) == "a linear of a layer has been replaced"


def test_samples_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(40000, -1)
    torch.manual_seed(0)
    counts = torch.bincount(chooser(0.5)(logits), minlength=4) / 40000
    wanted = torch.softmax(logits[0] / 0.5, 0)
    # Four standard deviations of a share of 40,000 draws.
    assert ((counts - wanted).abs() <= 4 * (wanted * (1 - wanted) / 40000).sqrt()).all()
