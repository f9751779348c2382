"""What transformers' modules ask of attention, in rows of one document and of several."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MistralConfig

from halfbyte.layers import attention_interface
from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.layers.attention_interface import NAME, masks_for_sdpa_alone
from halfbyte.layers.packed_row import NotPackable, packed_row
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from tests.checkpoint.families import tiny_model

LENGTHS = (30, 1, 47, 20)
WINDOW = 16
_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
}
FAMILIES = {
    "mistral": MistralConfig(**_SIZES),
    "gpt_oss": GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}


def _models(family):
    config = copy.deepcopy(FAMILIES[family])
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in theirs.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, std=2.0)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()
    ours.load_state_dict(theirs.state_dict())
    attention_interface.use(ours)
    assert ours.config._attn_implementation == attention_interface.NAME
    ours.requires_grad_(False)
    return ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_sinks_are_those_of_transformers(family):
    ours, theirs = _models(family)
    ids = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        # With padding before them, the masks are transformers' own.
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        padded = [model(ids, attention_mask=mask).logits[0, 9:] for model in (ours, theirs)]
        torch.testing.assert_close(*padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family):
    ours, theirs = _models(family)
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answers = [model.generate(ids, **options) for model in (ours, theirs)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_longer_than_the_window_are_what_they_are_alone(family):
    ours, _ = _models(family)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 100, (1, n), generator=generator) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad():
        with packed_row(LENGTHS) as row:
            together = ours(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
        assert (row.attention_calls, row.window) == (2, None)
        for own, document in zip(together.split(LENGTHS, 1), documents, strict=True):
            torch.testing.assert_close(own, ours(document).logits, rtol=1e-4, atol=1e-5)


def _inputs():
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(1, 2, sum(LENGTHS), 8, generator=generator) for _ in range(3))


def test_what_is_not_causal_attention_is_an_error_in_a_packed_row():
    q, k, v = _inputs()
    module = torch.nn.Module()
    wanted = causal_attention(q, k, v, scale=0.3, lengths=LENGTHS).transpose(1, 2)
    sizes = {"batch_size": 1, "q_length": sum(LENGTHS), "kv_length": sum(LENGTHS)}
    with packed_row(LENGTHS) as row:
        assert attention_interface._mask(**sizes) is None
        out, _ = attention_interface._interface(module, q, k, v, None, scaling=0.3)
        assert torch.equal(out, wanted)
        for options in ({"softcap": 30.0}, {"dropout": 0.1}, {"is_causal": False}):
            with pytest.raises(NotPackable, match="not plain causal"):
                attention_interface._interface(module, q, k, v, None, scaling=0.3, **options)
        with pytest.raises(NotPackable, match="sees other tokens"):
            attention_interface._interface(module, q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None)
        # A chunk, or a window that is not the configuration's.
        assert attention_interface._mask(**sizes, local_size=50) is None
        assert row.window == 50
        with pytest.raises(NotPackable, match="longer than its attention window of 20 tokens"):
            attention_interface._mask(**sizes, local_size=20)
        with pytest.raises(NotPackable, match="a mask of its own"):
            attention_interface._mask(**sizes, use_vmap=True)
    out, _ = attention_interface._interface(module, q, k, v, None, scaling=0.3)
    assert not torch.equal(out, wanted)


def test_values_of_another_width_are_attended_to_by_document():
    q, k, v = _inputs()
    v = v[..., :6]
    module = torch.nn.Module()
    module.num_key_value_groups = 1
    with packed_row(LENGTHS):
        found, _ = attention_interface._interface(module, q, k, v, None, scaling=0.3)
    parts = zip(*(x.split(LENGTHS, 2) for x in (q, k, v)), strict=True)
    for own, part in zip(found.split(LENGTHS, 1), parts, strict=True):
        wanted, _ = attention_interface._interface(module, *part, None, scaling=0.3)
        torch.testing.assert_close(own, wanted)


def test_sparse_attention_keeps_its_mask() -> None:
    """transformers masks what an indexer has not selected for two attentions alone, by name."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    ranks |= {"v_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
    sparse = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    model = tiny_model("deepseek_v32", **sizes, **ranks, **sparse)
    built = build(model.config, BaseRecipe("none", compute_dtype=torch.float32))
    for name, tensor in model.state_dict().items():
        load_tensor(built, name, tensor)
    finalize(built)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.allclose(built(input_ids=ids).logits, expected, atol=1e-5)
        built.set_attn_implementation(NAME)
        assert not torch.allclose(built(input_ids=ids).logits, expected, atol=1e-2)
    assert masks_for_sdpa_alone(model)
    assert not masks_for_sdpa_alone(tiny_model("llama"))
