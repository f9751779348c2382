"""Norms, rotary turns and gates: against transformers, float64, and in Triton's interpreter."""

import os

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from halfbyte.layers import elementwise
from halfbyte.layers.elementwise import add_rms_norm, rms_norm, rotary, swiglu

IMPLEMENTATIONS = ["plain", "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    if request.param == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles here, so tests/gpu/ tests these")
        gpu = pytest.importorskip(
            "halfbyte.layers.triton_elementwise", reason="needs Triton", exc_type=ImportError
        )
        monkeypatch.setattr(elementwise, "_kernels", lambda _: gpu)
    return request.param


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    given = [drawn(*o.shape, dtype=o.dtype, seed=90 + i) for i, o in enumerate(outs)]
    return outs, torch.autograd.grad(outs, leaves, given)


def agree(got, wanted, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 48), (1, 1, 1), (5, 130), (0, 4)])
def test_the_norm_is_transformers(implementation, dtype, shape):
    x, weight = drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype, seed=1)
    module = LlamaRMSNorm(shape[-1], eps=1e-5)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    got, got_gradients = gradients(lambda x: rms_norm(x, weight, 1e-5), x)
    wanted, wanted_gradients = gradients(module, x)
    agree(got + got_gradients, wanted + wanted_gradients, dtype)
    if shape[0]:
        r = drawn(*shape, dtype=dtype, seed=2)

        def plain(x, r):
            h = x + r
            return module(h), h

        got, got_gradients = gradients(lambda x, r: add_rms_norm(x, r, weight, 1e-5), x, r)
        wanted, wanted_gradients = gradients(plain, x, r)
        agree(got + got_gradients, wanted + wanted_gradients, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(4, 8), (3, 64), (1, 2), (33, 96)])
def test_the_turn_is_transformers(implementation, dtype, heads, size):
    config = LlamaConfig(hidden_size=heads * size, num_attention_heads=heads, head_dim=size)
    positions = torch.arange(7)[None] + 3
    cos, sin = LlamaRotaryEmbedding(config)(drawn(1, dtype=dtype), positions)
    x = drawn(2, 7, heads, size, dtype=dtype)
    fewer = drawn(2, 7, max(1, heads // 2), size, dtype=dtype, seed=1)
    # Copies, because leaves may not be written over.
    got, got_gradients = gradients(lambda q, k: rotary(q * 1, k * 1, cos, sin), x, fewer)

    def theirs(q, k):
        wide = (t.float().transpose(1, 2) for t in (q, k))
        turned = apply_rotary_pos_emb(*wide, cos.float(), sin.float())
        return tuple(t.transpose(1, 2).to(dtype) for t in turned)

    wanted, wanted_gradients = gradients(theirs, x, fewer)
    agree(got + got_gradients, wanted + wanted_gradients, dtype)


def test_every_sequence_may_have_its_own_positions(implementation):
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, head_dim=8)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    cos, sin = LlamaRotaryEmbedding(config)(drawn(1), positions)
    x = drawn(2, 3, 2, 8)
    together, _ = rotary(x * 1, x * 1, cos, sin)
    for i in range(2):
        one = slice(i, i + 1)
        alone, _ = rotary(x[one] * 1, x[one] * 1, cos[one], sin[one])
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 48, 2049])
def test_the_gate_is_transformers(implementation, dtype, size):
    gate, up = drawn(2, 3, size, dtype=dtype), drawn(2, 3, size, dtype=dtype, seed=1)
    act = ACT2FN[LlamaConfig().hidden_act]
    got, got_gradients = gradients(swiglu, gate, up)

    def theirs(gate, up):
        return (act(gate.float()) * up.float()).to(dtype)

    wanted, wanted_gradients = gradients(theirs, gate, up)
    agree(got + got_gradients, wanted + wanted_gradients, dtype)


def test_columns_of_one_product_are_read_where_they_lie(implementation):
    both = drawn(2, 3, 96)
    gate, up = both.split(48, -1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    q = both[..., :64].view(2, 3, 4, 16)
    k = both[..., 64:].view(2, 3, 2, 16)
    cos, sin = drawn(1, 3, 8).repeat(1, 1, 2), drawn(1, 3, 8, seed=1).repeat(1, 1, 2)
    weight = drawn(16, seed=2)
    for x in (q, k):
        assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))
    alone = rotary(q.contiguous(), k.contiguous(), cos, sin)
    for one, other in zip(rotary(q, k, cos, sin), alone, strict=True):
        assert torch.equal(one, other)


def test_the_backward_of_the_norm_is_that_of_its_formula():
    x = drawn(3, 10).double().requires_grad_()
    weight = drawn(10, seed=1).double()
    y, rstd = elementwise.plain_rms_norm(x, weight, 1e-5)
    dy = drawn(3, 10, seed=2).double()
    (wanted,) = torch.autograd.grad(y, x, dy)
    got = elementwise.plain_rms_norm_backward(dy, x.detach(), weight, rstd.detach())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_comes_beside_the_norm_is_added(implementation):
    x = torch.randn(3, 5, 24, dtype=torch.float32)
    weight = torch.rand(24) + 0.5
    results = []
    for function in (
        elementwise.rms_norm_beside,
        lambda x, weight, eps: (elementwise.rms_norm(x, weight, eps), x),
    ):
        leaf = x.clone().requires_grad_()
        y, beside = function(leaf, weight, 1e-5)
        assert torch.equal(beside, x)
        (y.square().sum() + (3 * beside).sum()).backward()
        results.append((y.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
