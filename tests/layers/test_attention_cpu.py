"""Blockwise attention against the formula in float64, and against torch's own in low precision."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.layers.attention_cpu import QUERY_BLOCK, causal_attention


def inputs(batch, heads, groups, length, width, dtype):
    torch.manual_seed(length)
    return [
        torch.randn(batch, length, count, width).transpose(1, 2).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def formula(q, k, v, scale, window=None, sinks=None):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = scale * q @ k.transpose(-1, -2)
    unseen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    if window is not None:
        unseen |= torch.ones_like(unseen).tril(-window)
    scores = scores.masked_fill(unseen, -torch.inf)
    if sinks is not None:  # as transformers' gpt-oss: one more column, dropped after the softmax
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v
    return torch.softmax(scores, -1) @ v


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


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, QUERY_BLOCK, QUERY_BLOCK + 9, 1000])
def test_windows_and_sinks(window, sunk):
    tensors = inputs(2, 6, 2, 2 * QUERY_BLOCK + 3, 8, torch.float64)
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(7)) if sunk else None
    got = causal_attention(*tensors, scale=0.3, window=window, sinks=sinks)
    wanted = formula(*tensors, 0.3, window, sinks)
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
