"""Attention that is computed once: gradients are those of attention that is computed again."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from halfbyte.layers.attention import Documents, attend
from halfbyte.layers.attention_checkpoint import CheckpointedAttention


def inputs(heads=4, groups=2, tokens=23, size=16, batch=2):
    generator = torch.Generator().manual_seed(0)
    # As they come from the projections: columns of one product.
    y = torch.randn(batch, tokens, (heads + 2 * groups) * size, generator=generator)
    parts = y.split([heads * size, groups * size, groups * size], -1)
    return [part.unflatten(-1, (-1, size)) for part in parts]


DOCUMENTS = Documents(torch.tensor([0, 5, 5, 23], dtype=torch.int32), 18)


def by_weights(q, k, v, documents, scale):
    """Attention that keeps all its weights, as torch's does where no other takes the shapes."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attention", [attend, by_weights])
@pytest.mark.parametrize(("documents", "batch"), [(None, 2), (None, 1), (DOCUMENTS, 1)])
def test_gradients_are_those_of_attention_itself(documents, batch, attention, monkeypatch):
    monkeypatch.setattr("halfbyte.layers.attention_checkpoint.attend", attention)
    given = inputs(batch=batch)
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = attention(*leaves, documents, 0.25)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    true = torch.autograd.grad(out, leaves, dy)
    attended = CheckpointedAttention(*given, documents, 0.25)
    assert torch.equal(attended.tensors[0], out)
    # They go, and come back as others; and so do q, k and v.
    away = [torch.empty(x.shape, dtype=x.dtype).copy_(x) for x in attended.tensors]
    for x in attended.tensors:
        x.fill_(torch.nan)
    anew = [x.requires_grad_() for x in inputs(batch=batch)]
    again = attended.again(*anew, away)
    assert torch.equal(again, out)
    found = torch.autograd.grad(again, anew, dy)
    for mine, exactly in zip(found, true, strict=True):
        assert torch.equal(mine, exactly)


def gradients(q, k, v):
    """Of attention itself, and of attention that was checkpointed, over the same inputs."""
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, None, 0.25)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    true = torch.autograd.grad(out, [q, k, v], dy)
    attended = CheckpointedAttention(q, k, v, None, 0.25)
    again = attended.again(q, k, v, attended.tensors)
    return zip(torch.autograd.grad(again, [q, k, v], dy), true, strict=True)


def test_inputs_may_be_one_view_of_one_tensor():
    q, k, _ = inputs()
    for mine, exactly in gradients(q, k, k.detach()):
        assert torch.equal(mine, exactly)


def test_no_tokens():
    """Tensors of no elements have the address of all that have none."""
    q, k, v = inputs(tokens=0)
    for mine, exactly in gradients(q, k, v):
        assert mine.shape == exactly.shape


def test_the_graph_holds_none_of_them():
    def holders(x):
        return torch._C._storage_Use_Count(x.untyped_storage()._cdata)

    given = inputs()
    alone = holders(given[0])
    attended = CheckpointedAttention(*given, None, 0.25)
    assert holders(given[0]) == alone
    for x in attended.tensors:
        assert holders(x) == holders(torch.empty(5))


def test_inputs_that_lie_otherwise_are_refused():
    attended = CheckpointedAttention(*inputs(), None, 0.25)
    q, k, v = (x.contiguous().requires_grad_() for x in inputs())
    out = attended.again(q, k, v, attended.tensors)
    with pytest.raises(RuntimeError, match="strides of q, k, v have changed"):
        out.sum().backward()
