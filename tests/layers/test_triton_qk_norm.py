"""Norm and rotary embedding of q and k in one: against transformers, float64 and the sequence."""

import os

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from halfbyte.layers import elementwise
from halfbyte.layers.elementwise import qk_norm_rotary, rms_norm, rotary

EPS = 1e-5, 1e-3
# Heads of q and of k, and their size. The 33 are two blocks of a program; halves of 40 and 48 are
# no powers of two.
SHAPES = [(4, 2, 8), (3, 1, 80), (1, 1, 2), (33, 5, 96), (8, 8, 128)]


@pytest.fixture
def triton(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here, so tests/gpu/ tests these")
    kernels = pytest.importorskip(
        "halfbyte.layers.triton_elementwise", reason="needs Triton", exc_type=ImportError
    )
    monkeypatch.setattr(elementwise, "_kernels", lambda _: kernels)


@pytest.fixture(params=["plain", "triton"])
def implementation(request):
    if request.param == "triton":
        request.getfixturevalue("triton")
    return request.param


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def inputs(q_heads, k_heads, size, *, dtype=torch.float32, batch=2, tokens=5):
    """One product of q, k and v, weights, and tables that differ between the sequences."""
    product = drawn(batch, tokens, (q_heads + 2 * k_heads) * size, dtype=dtype) * 3
    weights = [drawn(size, dtype=dtype, seed=seed) for seed in (1, 2)]
    positions = torch.arange(tokens) + 11 * torch.arange(batch)[:, None]
    config = Qwen3Config(head_dim=size, num_attention_heads=q_heads, hidden_size=size)
    cos, sin = Qwen3RotaryEmbedding(config)(product, positions)
    return product, weights, cos, sin


def heads_of(product, q_heads, k_heads, size):
    parts = product.split([q_heads * size, k_heads * size, k_heads * size], -1)
    return [part.unflatten(-1, (-1, size)) for part in parts]


def results(function, product, weights, cos, sin, shape):
    """q and k, normed and rotated, and the gradient of the product that they are columns of."""
    leaf = product.detach().clone().requires_grad_()
    q, k, v = heads_of(leaf, *shape)
    outs = [*function(q, k, *weights, *EPS, cos, sin), v]
    given = [drawn(*o.shape, dtype=torch.float16, seed=90 + i) for i, o in enumerate(outs)]
    given = [dy.to(o.dtype) for dy, o in zip(given, outs, strict=True)]
    (grad,) = torch.autograd.grad(outs, [leaf], given)
    return [outs[0].detach(), outs[1].detach(), *heads_of(grad, *shape)[:2]]


def sequence(q, k, q_weight, k_weight, q_eps, k_eps, cos, sin):
    return rotary(rms_norm(q, q_weight, q_eps), rms_norm(k, k_weight, k_eps), cos, sin)


def exact(q, k, q_weight, k_weight, q_eps, k_eps, cos, sin):
    """In the dtype of the arguments, float64."""
    outs = []
    for x, weight, eps in ((q, q_weight, q_eps), (k, k_weight, k_eps)):
        y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
        first, second = y.chunk(2, -1)
        c, s = (table.chunk(2, -1)[0][:, :, None] for table in (cos, sin))
        outs.append(torch.cat([first * c - second * s, second * c + first * s], -1))
    return outs


def distances(got, true):
    return [float((g.double() - t).norm() / t.norm()) for g, t in zip(got, true, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(implementation, shape):
    product, weights, cos, sin = inputs(*shape)
    got = results(qk_norm_rotary, product, weights, cos, sin, shape)
    wide = [product.double(), [w.double() for w in weights], cos.double(), sin.double()]
    assert max(distances(got, results(exact, *wide, shape))) < 3e-7


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
def test_the_kernels_are_closer_to_float64_than_the_sequence(triton, shape):
    """They round once in each direction, the sequence three times in forward and twice back."""
    product, weights, cos, sin = inputs(*shape, dtype=torch.float16, tokens=3)
    ours = results(qk_norm_rotary, product, weights, cos, sin, shape)
    wide = [product.double(), [w.double() for w in weights], cos.double(), sin.double()]
    true = results(exact, *wide, shape)
    rounded_once = [t.half() for t in true]
    once, usual = (
        distances(rounded_once, true),
        distances(results(sequence, product, weights, cos, sin, shape), true),
    )
    for error, least, most in zip(distances(ours, true), once, usual, strict=True):
        assert error <= 1.02 * least
        assert error < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_cpu_it_is_the_sequence_to_the_bit(dtype):
    shape = (4, 2, 16)
    product, weights, cos, sin = inputs(*shape, dtype=dtype)
    got = results(qk_norm_rotary, product, weights, cos, sin, shape)
    for one, other in zip(got, results(sequence, product, weights, cos, sin, shape), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def test_it_is_transformers(implementation):
    shape = (4, 2, 16)
    product, weights, cos, sin = inputs(*shape)

    def theirs(q, k, q_weight, k_weight, q_eps, k_eps, cos, sin):
        normed = []
        for x, weight, eps in ((q, q_weight, q_eps), (k, k_weight, k_eps)):
            norm = Qwen3RMSNorm(shape[-1], eps=eps)
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
            normed.append(norm(x).transpose(1, 2))
        return [x.transpose(1, 2) for x in apply_rotary_pos_emb(*normed, cos, sin)]

    got = results(qk_norm_rotary, product, weights, cos, sin, shape)
    wanted = results(theirs, product, weights, cos, sin, shape)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_what_is_kept_is_q_and_k_as_given_and_a_float32_of_each_head(implementation):
    shape = (4, 2, 16)
    product, weights, cos, sin = inputs(*shape)
    before = product.clone()
    q, k, _ = heads_of(product.requires_grad_(), *shape)
    out, _ = qk_norm_rotary(q, k, *weights, *EPS, cos, sin)
    kept = out.grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept[:2]] == [q.data_ptr(), k.data_ptr()]
    assert kept[0].untyped_storage().data_ptr() == product.untyped_storage().data_ptr()
    assert torch.equal(product, before)  # nothing was overwritten
    known = {t.data_ptr() for t in (q, k, *weights, cos, sin)}
    own = [t for t in kept if t.data_ptr() not in known]
    assert [(t.dtype, t.shape) for t in own] == [
        (torch.float32, (2, 5, 4)),
        (torch.float32, (2, 5, 2)),
    ]


def test_strided_heads_and_gradients_give_the_same(triton):
    shape = (4, 2, 16)
    product, weights, cos, sin = inputs(*shape)
    q, k, _ = heads_of(product, *shape)
    # Laid out as [B, heads, T, n], as attention of padded rows returns gradients.
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    grads = [drawn(*x.shape, seed=3) for x in (q, k)]
    grads_apart = [dy.transpose(1, 2).contiguous().transpose(1, 2) for dy in grads]
    found = []
    for ones, dys in (((q, k), grads), (apart, grads_apart)):
        leaves = [x.detach().requires_grad_() for x in ones]
        outs = qk_norm_rotary(*leaves, *weights, *EPS, cos, sin)
        found.append([*outs, *torch.autograd.grad(outs, leaves, dys)])
    for one, same in zip(*found, strict=True):
        assert torch.equal(one, same)


def test_no_tokens_give_none(implementation):
    shape = (4, 2, 16)
    product, weights, cos, sin = inputs(*shape, tokens=0)
    got = results(qk_norm_rotary, product, weights, cos[:1], sin[:1], shape)
    assert [tuple(x.shape) for x in got] == [(2, 0, 4, 16), (2, 0, 2, 16)] * 2
