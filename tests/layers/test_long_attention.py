"""Attention in pieces and groups of heads, in place, against autograd through the formula."""

from itertools import pairwise

import pytest
import torch

from halfbyte.layers import long_attention
from halfbyte.layers.attention import Documents, attend, copy_heads
from halfbyte.layers.attention_checkpoint import CheckpointedAttention
from halfbyte.layers.long_attention import (
    REFERENCE,
    Piece,
    _LongAttention,
    attend_long,
    head_groups,
    pieces_of,
)

LENGTHS = [(40,), (3, 17, 0, 5, 20), (20, 20), (16, 3, 2, 1, 18), (1, 39), (2, 3, 35)]


@pytest.fixture
def small(monkeypatch):
    """Documents of 16 tokens or more are long, are filled to multiples of 8, and all run here."""
    monkeypatch.setattr(long_attention, "SHORT", 16)
    monkeypatch.setattr(long_attention, "GROUP", 64)
    monkeypatch.setattr(long_attention, "_rounded", lambda n: -(-n // 8) * 8)
    monkeypatch.setattr(long_attention, "_Several", Several)


class Several:
    """Stands for torch's variable-length kernel: one document after the other."""

    def __init__(self, documents, piece):
        first, last = piece.documents
        self.lengths = documents.lengths[first:last]

    def each(self, *tensors):
        ends = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        for start, stop in pairwise(ends):
            yield [x[:, start:stop] for x in tensors]

    def forward(self, q, k, v, scale):
        found = [REFERENCE.forward(*each, scale) for each in self.each(q, k, v)]
        return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2)

    def backward(self, dy, q, k, v, out, lse, scale):
        parts = self.each(dy, q, k, v, out, lse.transpose(1, 2))
        found = [REFERENCE.backward(*each, lse.transpose(1, 2), scale) for *each, lse in parts]
        return tuple(torch.cat(each, 1) for each in zip(*found, strict=True))


def inputs(tokens=40, heads=4, groups=2, width=8):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1, tokens, heads + 2 * groups, width, generator=generator).double()
    return [x.requires_grad_() for x in torch.split(whole, [heads, groups, groups], 2)]


def exact(q, k, v, lengths, scale):
    """The formula for each document, for autograd to differentiate: float64, [1, T, H · D]."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    found = [
        REFERENCE.forward(q[:, a:b], k[:, a:b], v[:, a:b], scale)[0] for a, b in pairwise(ends)
    ]
    return torch.cat(found, 1).flatten(2)


def documents_of(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Documents(ends, max(lengths), tuple(lengths))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_output_and_gradients_are_those_of_each_document(lengths, small):
    q, k, v = inputs()
    documents = documents_of(lengths)
    wanted = exact(q, k, v, lengths, 0.3)
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    true = torch.autograd.grad(wanted, (q, k, v), dy)
    # Views of one tensor, which backward overwrites.
    one, two, three = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = _LongAttention.apply(one, two, three, documents, 0.3, REFERENCE)
    torch.testing.assert_close(out.flatten(2), wanted)
    found = torch.autograd.grad(out, (one, two, three), dy.view(out.shape))
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].data_ptr() == one.data_ptr()


@pytest.mark.parametrize("lengths", [(40,), (3, 17, 20)])
def test_a_checkpoint_takes_output_and_log_sum_exp_along(lengths, small):
    q, k, v = inputs()
    documents = documents_of(lengths)

    def attention(q, k, v, documents, scale):
        return _LongAttention.apply(q, k, v, documents, scale, REFERENCE).flatten(2)

    wanted = exact(q, k, v, lengths, 0.3)
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    true = torch.autograd.grad(wanted, (q, k, v), dy)
    kept = CheckpointedAttention(q, k, v, documents, 0.3, attention)
    tensors = [x.clone() for x in kept.tensors]
    assert tensors[0].numel() == 40 * 4 * 8
    assert len(tensors) == 2
    again = kept.again(q, k, v, tensors)
    for a, b in zip(torch.autograd.grad(again, (q, k, v), dy), true, strict=True):
        torch.testing.assert_close(a, b)


def test_documents_are_divided_into_long_ones_and_runs_of_short_ones(small):
    assert pieces_of((3, 17, 0, 5, 15), 40) == [
        Piece(0, 3, (0, 1), 3),
        Piece(3, 20, None, 27),
        Piece(20, 40, (3, 5), 40),
    ]
    assert pieces_of((40,), 40) == [Piece(0, 40, None, 40)]


@pytest.mark.parametrize("tokens", [2048, 20_000, 65_536, 250_001])
def test_few_lengths_are_prepared_and_little_is_added(tokens):
    filled = long_attention._rounded(tokens)
    assert tokens <= filled <= 1.07 * tokens
    lengths = {long_attention._rounded(n) for n in range(tokens, 2 * tokens, 97)}
    assert len(lengths) <= 34


@pytest.mark.parametrize(("tokens", "calls"), [(8192, 1), (16_384, 2), (65_536, 8), (262_144, 8)])
def test_backward_takes_as_many_heads_as_keep_the_device_busy(tokens, calls):
    found = head_groups(tokens, 32, 8)
    assert len(found) == calls
    assert [h for q, _ in found for h in range(q.start, q.stop)] == list(range(32))
    assert [h for _, k in found for h in range(k.start, k.stop)] == list(range(8))


def test_on_a_cpu_it_is_attend():
    q, k, v = (x.float().detach() for x in inputs())
    documents = documents_of((3, 37))
    wanted = attend(q, k, v, documents, 0.3)
    assert torch.equal(attend_long(q, k, v, documents, 0.3), wanted)
    torch.testing.assert_close(wanted, exact(q, k, v, (3, 37), 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "offset"), [(8, 0), (8, 1), (6, 0), (16, 2)])
def test_heads_are_copied_whatever_their_places(dtype, width, offset):
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 5, 4, width + 8, generator=generator).to(dtype)
    x = memory[..., offset : offset + width][:, :, 1:3]
    to = torch.zeros(3, 5, 7, width, dtype=dtype)
    copy_heads(to[:, :, 2:4], x)
    assert torch.equal(to[:, :, 2:4], x)
    assert not to[:, :, :2].any()
    assert not to[:, :, 4:].any()
