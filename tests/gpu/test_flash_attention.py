"""Flash attention with windows, sinks and documents against the formula in float64."""

import pytest
import torch

from halfbyte.layers.attention import Documents
from halfbyte.layers.flash_attention import flash_attention, runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def formula(q, k, v, scale, lengths, window, sinks):
    outs = []
    for one in zip(*(x.transpose(1, 2).split(lengths, 2) for x in (q, k, v)), strict=True):
        a, b, c = one
        repeat, length = a.shape[1] // b.shape[1], a.shape[2]
        b, c = b.repeat_interleave(repeat, 1), c.repeat_interleave(repeat, 1)
        unseen = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
        if window is not None:
            unseen |= torch.ones_like(unseen).tril(-window)
        scores = (scale * a @ b.transpose(-1, -2)).masked_fill(unseen, -torch.inf)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        weights = torch.softmax(scores, -1)[..., :length]
        outs.append((weights @ c).transpose(1, 2))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("window", [None, 1, 128, 1000])
@pytest.mark.parametrize("lengths", [(300,), (130, 1, 257)])
@pytest.mark.parametrize("width", [64, 128])
def test_output_and_gradients(sunk, window, lengths, width):
    generator = torch.Generator("cuda").manual_seed(0)
    total = sum(lengths)
    tensors = [
        torch.randn(1, total, heads, width, device="cuda", generator=generator).bfloat16()
        for heads in (8, 2, 2)
    ]
    sinks = torch.randn(8, device="cuda", generator=generator) * 3 if sunk else None
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    documents = None if len(lengths) == 1 else Documents(ends, max(lengths))
    dy = torch.randn(1, total, 8, width, device="cuda", generator=generator).bfloat16()
    scale = width**-0.5
    results = []
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        inputs = [x.to(kind).requires_grad_() for x in tensors]
        if kind is torch.float32:  # ours, in bfloat16
            inputs = [x.detach().clone().requires_grad_() for x in tensors]
            assert runs(inputs[0])
            y = flash_attention(
                *inputs, scale=scale, documents=documents, window=window, sinks=sinks
            )
        else:
            y = formula(*inputs, scale, lengths, window, sinks)
        results.append([y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))])
    for true, ours, plain in zip(*results, strict=True):
        # With a window of one token, the gradients of q and k are 0.
        allowed = 1.5 * (plain.double() - true).norm() + 1e-4 * true.norm().clamp(min=1.0)
        assert (ours.double() - true).norm() <= allowed


def test_rows_of_a_batch_are_documents():
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (
        torch.randn(3, 70, heads, 64, device="cuda", generator=generator).bfloat16()
        for heads in (4, 2, 2)
    )
    together = flash_attention(q, k, v, scale=0.1, window=16)
    for row in range(3):
        alone = flash_attention(*(x[row : row + 1] for x in (q, k, v)), scale=0.1, window=16)
        assert torch.equal(alone[0], together[row])
