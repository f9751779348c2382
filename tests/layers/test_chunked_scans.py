"""Recurrent states in chunks against the formulas token by token, and against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from halfbyte.layers.chunked_scans import CHUNK, Chunks, gated_delta_rule, mamba2_scan

LENGTHS = (3, 2 * CHUNK + 5, 1, CHUNK)


def delta_inputs(dtype=torch.float64, strength=1.0, lengths=LENGTHS):
    torch.manual_seed(0)
    tokens, keys, heads = sum(lengths), 2, 4
    q, k = (torch.nn.functional.normalize(torch.randn(tokens, keys, 6), dim=-1) for _ in range(2))
    v, g = torch.randn(tokens, heads, 5), -strength * torch.rand(tokens, heads)
    beta = torch.rand(tokens, heads)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)]


def mamba_inputs(dtype=torch.float64, strength=1.0, lengths=LENGTHS):
    torch.manual_seed(0)
    tokens, heads = sum(lengths), 4
    x, dt, a = torch.randn(tokens, heads, 5), torch.rand(tokens, heads), -strength * torch.rand(4)
    b, c = (torch.randn(tokens, 2, 6) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in (x, dt, a, b, c)]


def delta_by_token(q, k, v, g, beta):
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    state, outs = q.new_zeros(v.shape[1], v.shape[2], k.shape[2]), []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        change = (v[t] - torch.einsum("hvk,hk->hv", state, k[t])) * beta[t][:, None]
        state = state + change[:, :, None] * k[t][:, None]
        outs.append(torch.einsum("hvk,hk->hv", state, q[t]))
    return torch.stack(outs)


def mamba_by_token(x, dt, a, b, c):
    b, c = (y.repeat_interleave(x.shape[1] // y.shape[1], 1) for y in (b, c))
    state, outs = x.new_zeros(*x.shape[1:], b.shape[2]), []
    for t in range(len(x)):
        written = (x[t] * dt[t][:, None])[:, :, None] * b[t][:, None]
        state = state * (a * dt[t]).exp()[:, None, None] + written
        outs.append(torch.einsum("hpn,hn->hp", state, c[t]))
    return torch.stack(outs)


SCANS = {
    "gated delta rule": (gated_delta_rule, delta_inputs, delta_by_token, ()),
    "mamba 2": (mamba2_scan, mamba_inputs, mamba_by_token, (2,)),
}


def of_documents(function, inputs, whole, lengths=LENGTHS):
    """The outputs of documents, each alone; inputs at the positions ``whole`` have no tokens."""
    outs, first = [], 0
    for length in lengths:
        own = [x if i in whole else x[first : first + length] for i, x in enumerate(inputs)]
        outs.append(function(*own))
        first += length
    return torch.cat(outs)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("strength", [0.0, 1.0, 40.0])
def test_formula(name, strength):
    function, make, by_token, whole = SCANS[name]
    inputs = make(strength=strength)
    found, wanted = function(*inputs, LENGTHS), of_documents(by_token, inputs, whole)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    probe = torch.randn_like(wanted)
    one, other = (torch.autograd.grad((out * probe).sum(), inputs) for out in (found, wanted))
    for got, true in zip(one, other, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SCANS)
def test_no_worse_than_transformers_in_float32(name):
    function, make, by_token, whole = SCANS[name]
    exact, inputs = make(), make(torch.float32)
    if name == "mamba 2":

        def theirs(x, dt, a, b, c):
            return granite.mamba2_chunk_scan(x[None], dt[None], a, b[None], c[None], 32)[0]
    else:

        def theirs(q, k, v, g, beta):  # it scales queries itself
            q = q * q.shape[-1] ** 0.5
            return qwen.torch_chunk_gated_delta_rule(*(x[None] for x in (q, k, v, g, beta)))[0][0]

    results = []
    for out, given_ in (
        (function(*inputs, LENGTHS), inputs),
        (of_documents(theirs, inputs, whole), inputs),
        (of_documents(by_token, exact, whole), exact),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), given_)])
    for got, other, true in zip(*results, strict=True):
        assert (got.double() - true).norm() <= 2 * (
            other.double() - true
        ).norm() + 1e-7 * true.norm()


@pytest.mark.parametrize("name", SCANS)
def test_a_document_does_not_change_another_by_a_bit(name):
    function, make, _, whole = SCANS[name]
    inputs = [x.detach() for x in make(torch.float32)]
    before = function(*inputs, LENGTHS)
    first, stop = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    for i, x in enumerate(inputs):
        if i not in whole:
            x[first:stop] = x[first:stop].flip(0)
    after = function(*inputs, LENGTHS)
    assert not torch.equal(before[first:stop], after[first:stop])
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[stop:], after[stop:])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=8))
def test_chunks(lengths):
    chunks = Chunks(lengths, torch.device("cpu"))
    x = torch.arange(1, sum(lengths) + 1)[:, None]
    split = chunks.split(x)
    assert torch.equal(chunks.join(split), x)
    assert len(split) == sum(chunks.per_step) == sum(-(-n // CHUNK) for n in lengths)
    assert int((split == 0).sum()) == len(split) * CHUNK - sum(lengths)
    starts = set(torch.tensor([0, *lengths]).cumsum(0).add(1).tolist())
    # The first chunk of each document begins with its first token, the others with no document's.
    assert {int(one[0]) for one in split[: chunks.per_step[0]]} == starts - {sum(lengths) + 1}
    assert not {int(one[0]) for one in split[chunks.per_step[0] :]} & starts
