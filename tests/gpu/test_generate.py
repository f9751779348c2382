"""Decoding on a GPU: in CUDA graphs as without, at real widths, and nothing stays behind."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from halfbyte.layers.vocabulary import embedding_to_host
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models import continuous_batching, decoding
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.models.continuous_batching import Batcher
from halfbyte.models.decoding import Decoder, why_not
from halfbyte.models.generate import chooser
from tests.engine.test_layerwise import FAMILIES, model_of
from tests.layers.test_kv_cache import exact
from tests.models.test_decoding import ADAPTERS, KNOWN, LENGTHS, prompts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COMMON = {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 4096}
WIDE = {"hidden_size": 4096, "num_attention_heads": 32, **COMMON}
SHAPES = {
    "llama2-7b": LlamaConfig(**WIDE, intermediate_size=11008, num_key_value_heads=32),
    "llama3-8b": LlamaConfig(**WIDE, intermediate_size=14336, num_key_value_heads=8),
    "mistral": MistralConfig(
        **WIDE, intermediate_size=14336, num_key_value_heads=8, sliding_window=20
    ),
    "qwen2": Qwen2Config(
        **COMMON,
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "qwen3": Qwen3Config(
        **COMMON,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "smollm2": LlamaConfig(
        **COMMON,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


def random_model(config, *, dtype=torch.bfloat16, quant="nf4", **lora):
    """A model with random weights, and with an adapter that does something."""
    model = build(config, BaseRecipe(quant=quant, compute_dtype=dtype, device="cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    for name, parameter in shapes.named_parameters():
        drawn = torch.randn(parameter.shape, device="cuda", generator=generator)
        load_tensor(
            model, name, drawn * parameter.shape[-1] ** -0.5 if drawn.dim() == 2 else drawn + 1
        )
    finalize(model)
    attach(model, LoRAConfig(r=16, alpha=16, **lora), seed=0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, device="cuda", generator=generator)
                parameter.copy_(drawn / 16)
    return model


@torch.no_grad()
def answers(model, prompts, most, *, graphs=True, slots=16, ends=(), temperature=0.0, seed=0):
    found = {}
    torch.manual_seed(seed)
    batcher = Batcher(
        Decoder(model),
        prompts,
        slots=slots,
        max_new_tokens=most,
        ends=ends,
        choose=chooser(temperature),
        graphs=graphs,
    )
    captured = []
    capture = batcher._captured
    batcher._captured = lambda: captured.append(1) or capture()
    batcher.run(lambda prompt, tokens: found.__setitem__(prompt, tokens))
    assert bool(captured) == (graphs and most > 8)
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("slots", [1, 5])
def test_a_graph_makes_the_tokens_that_launches_make(name, slots):
    """One slot of a large model multiplies packed weights, five multiply decoded ones."""
    model = random_model(SHAPES[name])
    prompts = prompts_of()[:slots]
    plain = answers(model, prompts, 40, graphs=False, slots=slots)
    assert answers(model, prompts, 40, slots=slots) == plain
    assert all(len(answer) == 40 for answer in plain)


@pytest.mark.parametrize("rows", [3, 70])
def test_a_graph_without_room_for_decoded_weights(rows, monkeypatch):
    """Three rows are multiplied packed, seventy by weights that are decoded in every step."""
    model = random_model(SHAPES["llama3-8b"])
    prompts = prompts_of([4 + i % 7 for i in range(rows)])
    roomy = answers(model, prompts, 12, slots=rows)
    monkeypatch.setattr(decoding, "free_bytes", lambda *_: 0)
    plain = answers(model, prompts, 12, slots=rows, graphs=False)
    assert answers(model, prompts, 12, slots=rows) == plain
    if rows > 64:
        assert plain == roomy  # the same products


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("how", ADAPTERS)
def test_float32_tokens_are_those_of_transformers(family, how):
    model = model_of(FAMILIES[family], **ADAPTERS[how]).to("cuda")
    assert why_not(model) is None
    # Before transformers has run it: nothing is remembered then but what a dry run may have left.
    got, wanted = answers(model, prompts_of(), 14), []
    for prompt in prompts_of():
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted.append(out[0, len(prompt) :].tolist())
    assert got == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["kept", "packed"])
@pytest.mark.parametrize("slots", [1, 5])
def test_logits_are_no_further_off_than_transformers(name, kind, slots, monkeypatch):
    """Of prefill and of a step, in bfloat16, against the same weights in float32.

    Of five prompts, since the error of one scatters. A single row is multiplied by rounded levels,
    not by rounded weights; what rounding does to a level, it does to all weights of that level.
    """
    model, prompts = random_model(SHAPES[name]), prompts_of((5, 3, 17, 9, 12))
    if kind == "packed":
        monkeypatch.setattr(decoding, "free_bytes", lambda *_: 0)
        monkeypatch.setattr(decoding, "_LARGE_LAYER", 0)
    else:
        monkeypatch.setattr(decoding, "_LARGE_LAYER", 2**62)
    decoder = Decoder(model)
    decoder.open(slots, 64)
    assert bool(decoder._kept) == (kind == "kept")
    prefilled, stepped = [], []
    for start in range(0, len(prompts), slots):
        some = prompts[start : start + slots]
        prefilled += list(decoder.prefill(some, range(slots)))
        decoder.prefill([prompt[:-1] for prompt in some], range(slots))
        last = torch.tensor([prompt[-1] for prompt in some], device="cuda")
        positions = torch.tensor([len(prompt) - 1 for prompt in some], device="cuda")
        stepped += list(decoder.step(decoder.embed(last), positions).clone())
    exactly = random_model(SHAPES[name], dtype=torch.float32)
    errors = {"prefill": 0.0, "step": 0.0, "transformers": 0.0}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device="cuda")
        wanted = exactly(input_ids=ids, use_cache=False).logits[0, -1].double()
        theirs = model(input_ids=ids, use_cache=False).logits[0, -1]
        for who, got in (
            ("prefill", prefilled[i]),
            ("step", stepped[i]),
            ("transformers", theirs),
        ):
            errors[who] += float((got.double() - wanted).norm() / wanted.norm()) / len(prompts)
    most = 1.6 if kind == "packed" and slots == 1 else 1.2
    assert errors["prefill"] <= 1.2 * errors["transformers"] + 1e-3, errors
    assert errors["step"] <= most * errors["transformers"] + 1e-3, errors


def test_slots_are_filled_again_and_the_cache_grows_in_graphs(monkeypatch):
    model = random_model(SHAPES["smollm2"])
    prompts = prompts_of([3 + i % 9 for i in range(23)])
    free = answers(model, prompts, 60, graphs=False, slots=5)
    ends = [answer[i % 50] for i, answer in enumerate(free)]
    plain = answers(model, prompts, 60, graphs=False, slots=5, ends=ends)
    assert len({len(answer) for answer in plain}) > 3
    assert all(a[: len(b)] == b for a, b in zip(free, plain, strict=True))
    assert answers(model, prompts, 60, slots=5, ends=ends) == plain
    monkeypatch.setattr(continuous_batching, "_UNIT", 16)
    monkeypatch.setattr(continuous_batching, "_ADVANCE", 4)
    assert answers(model, prompts, 60, slots=5, ends=ends) == plain


def test_weights_are_kept_only_beside_what_the_cache_may_grow_to(monkeypatch):
    model = random_model(SHAPES["smollm2"])
    decoder = Decoder(model)
    stacks = sum(2 * s.elements for layer in decoder._layers for s in layer.sets)
    growth = 5 * decoder.slot_bytes * (3 * 1024 // 2 - 64)
    for free, most, kept in ((0, 0, True), (0, 1024, False), (growth, 1024, True)):
        available = stacks + decoding._HEADROOM + free + 1
        monkeypatch.setattr(decoding, "free_bytes", lambda *_, found=available: found)
        decoder.open(5, 64, most)
        assert bool(decoder._kept) == kept


def test_a_seed_fixes_samples():
    model = random_model(SHAPES["smollm2"])
    one, same, other = (
        answers(model, prompts_of(), 30, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_an_embedding_on_the_host_is_read_from_there():
    model = random_model(SHAPES["llama2-7b"])
    here = answers(model, prompts_of(), 12)
    assert embedding_to_host(model) > 0
    assert answers(model, prompts_of(), 12) == here


def test_nothing_stays_on_the_card():
    model = random_model(SHAPES["llama3-8b"])
    allocated = []
    for _ in range(2):  # what a process needs once, such as counters of a kernel, stays
        for slots in (1, 3, len(LENGTHS)):
            answers(model, prompts_of(), 24, slots=slots)
        gc.collect()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] <= allocated[0]


@pytest.mark.parametrize("heads", [(32, 32, 128), (32, 8, 128), (9, 3, 64), (14, 2, 64)])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_over_the_cache(heads, window, dtype):
    from halfbyte.layers import triton_kv_cache

    q_heads, groups, width = heads
    positions = torch.tensor([0, 5, 255, 256, 1000, 2047])
    slots, capacity = len(positions), 2048
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (slots, q_heads, width),
            (slots, groups, capacity, width),
            (slots, groups, capacity, width),
        )
    )
    scale = width**-0.5
    wanted = exact(q, keys, values, positions, scale, window)
    sizes = exact(q, keys, values.abs(), positions, scale, window)
    got = triton_kv_cache.attend_cached(
        q.cuda(), keys.cuda(), values.cuda(), positions.cuda(), scale, window
    )
    # In float32 the scores, of up to 5 here, are rounded as coarsely as the result is, and the
    # exponential makes a relative error of that. In 16 bits they are exact beside it.
    bound = (14 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * sizes
    off = ((got.cpu().double() - wanted).abs() / bound).max()
    assert off <= 1, f"{off:.2f} of the bound"
