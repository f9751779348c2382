"""Blockwise attention against the formula in float64, and against torch's own in low precision."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.layers import attention_cpu
from halfbyte.layers.attention_cpu import (
    QUERY_BLOCK,
    NotPackable,
    causal_attention,
    masks_for_sdpa_alone,
    register,
)
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from tests.checkpoint.families import tiny_model


def inputs(batch, heads, groups, length, width, dtype):
    torch.manual_seed(length)
    return [
        torch.randn(batch, length, count, width).transpose(1, 2).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def formula(q, k, v, scale):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = scale * q @ k.transpose(-1, -2)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v


def gradients(out, tensors):
    torch.manual_seed(0)
    probe = torch.randn(out.shape).to(out.dtype)
    return torch.autograd.grad((out * probe).sum(), tensors)


@pytest.mark.parametrize("length", [1, 2, QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_formula(length, heads, groups):
    tensors = inputs(2, heads, groups, length, 8, torch.float64)
    # The softmax is float32 by design, so float64 inputs agree to float32's rounding.
    got, wanted = causal_attention(*tensors, scale=0.3), formula(*tensors, 0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(got, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_plain_low_precision(dtype):
    tensors = inputs(2, 6, 2, 150, 16, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = formula(*exact, 0.25)
    plain = formula(*tensors, 0.25)
    got = causal_attention(*tensors, scale=0.25)
    pairs = [(got, plain, truth)]
    pairs += zip(
        gradients(got, tensors), gradients(plain, tensors), gradients(truth, exact), strict=True
    )
    for one, low, true in pairs:
        # Root mean squares: twice the plain version's error, and half a unit in the last place.
        allowed = 2 * (low.double() - true).norm() + torch.finfo(dtype).eps / 2 * true.norm()
        assert (one.double() - true).norm() <= allowed


def test_the_future_does_not_reach_the_past():
    q, k, v = inputs(1, 4, 2, 100, 8, torch.float32)
    before = causal_attention(q, k, v, scale=1.0)
    with torch.no_grad():
        k[:, :, 70:] = 1e4
        v[:, :, 70:] = torch.nan
    after = causal_attention(q, k, v, scale=1.0)
    assert torch.equal(before[:, :, :64], after[:, :, :64])


def test_torch_agrees():
    q, k, v = inputs(2, 4, 2, 77, 16, torch.float32)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v, scale=0.25), wanted)


LENGTHS = [1, QUERY_BLOCK + 5, 17, 2 * QUERY_BLOCK]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_of_a_row_are_as_if_alone_bit_for_bit(dtype):
    tensors = inputs(1, 6, 2, sum(LENGTHS), 8, dtype)
    together = causal_attention(*tensors, scale=0.3, lengths=LENGTHS)
    found = gradients(together, tensors)
    alone, first = [], 0
    for length in LENGTHS:
        one = [x[:, :, first : first + length] for x in tensors]
        alone.append(causal_attention(*one, scale=0.3))
        first += length
    assert torch.equal(together, torch.cat(alone, 2))
    for one, other in zip(found, gradients(torch.cat(alone, 2), tensors), strict=True):
        assert torch.equal(one, other)


def test_a_packed_row_is_what_transformers_asks_for_or_an_error():
    q, k, v = (x.detach() for x in inputs(1, 2, 2, sum(LENGTHS), 8, torch.float32))
    module = torch.nn.Module()
    wanted = causal_attention(q, k, v, scale=0.3, lengths=LENGTHS).transpose(1, 2)
    with attention_cpu.packed_row(LENGTHS) as row:
        assert attention_cpu._mask(local_size=500) is None
        assert attention_cpu._mask(local_size=200, use_vmap=False) is None
        out, _ = attention_cpu._interface(module, q, k, v, None, scaling=0.3)
        assert torch.equal(out, wanted)
        assert (row.calls, row.window) == (1, 200)
        for options in ({"softcap": 30.0}, {"s_aux": q}, {"dropout": 0.1}, {"is_causal": False}):
            with pytest.raises(NotPackable, match="not plain causal"):
                attention_cpu._interface(module, q, k, v, None, scaling=0.3, **options)
        with pytest.raises(NotPackable, match="sees other tokens"):
            attention_cpu._interface(module, q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None)
        with pytest.raises(NotPackable, match="longer than its attention window of 100 tokens"):
            attention_cpu._mask(local_size=100)
        with pytest.raises(NotPackable, match="a mask of its own"):
            attention_cpu._mask(use_vmap=True)
    out, _ = attention_cpu._interface(module, q, k, v, None, scaling=0.3)
    assert not torch.equal(out, wanted)


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
        built.set_attn_implementation(register())
        assert not torch.allclose(built(input_ids=ids).logits, expected, atol=1e-2)
    assert masks_for_sdpa_alone(model)
    assert not masks_for_sdpa_alone(tiny_model("llama"))
