"""The chunked loss against cross-entropy over all logits at once."""

import os

import pytest
import torch
import torch.nn.functional as F

from halfbyte.layers import cross_entropy
from halfbyte.layers.cross_entropy import head_logps, head_loss


def case(rows=37, hidden=12, vocabulary=50, dtype=torch.float32):
    torch.manual_seed(rows)
    h = torch.randn(rows, hidden).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, hidden).to(dtype)
    return h, head, torch.randint(0, vocabulary, (rows,))


def whole(h, head, targets, softcap=0.0):
    logits = (h @ head.T).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("rows_at_once", [16, 17, 1000])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_value_and_gradient(monkeypatch, rows_at_once, softcap):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda *_: rows_at_once)
    h, head, targets = case()
    got, wanted = head_loss(h, head, targets, softcap=softcap), whole(h, head, targets, softcap)
    torch.testing.assert_close(got, wanted)
    (one,) = torch.autograd.grad(got / 7, h)
    (other,) = torch.autograd.grad(wanted / 7, h)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_no_worse_than_the_whole_in_bfloat16():
    h, head, targets = case(dtype=torch.bfloat16)
    exact = h.detach().double().requires_grad_()
    truth = F.cross_entropy(exact @ head.double().T, targets, reduction="sum")
    (true,) = torch.autograd.grad(truth, exact)
    got = head_loss(h, head, targets)
    low = whole(h, head, targets)
    assert abs(got - truth) <= abs(low - truth) + 1e-5 * truth
    (one,), (other,) = torch.autograd.grad(got, h), torch.autograd.grad(low, h)
    allowed = (other.double() - true).abs().max() + 2**-8 * true.abs().max()
    assert (one.double() - true).abs().max() <= allowed


def test_a_float16_gradient_is_multiplied_once_in_float32():
    """The factor, 1 / tokens, has few bits in float16, or none."""
    h, head, targets = case(dtype=torch.float16)
    (whole_one,) = torch.autograd.grad(head_loss(h, head, targets), h)
    for tokens in (30_000, 1e6, 1e7):
        (one,) = torch.autograd.grad(head_loss(h, head, targets) / tokens, h)
        factor = torch.ones(()) / tokens
        assert torch.equal(one, (whole_one.float() * factor).half())
        assert one.any()


@pytest.mark.parametrize("factor", [2.0**15, 2.0**6, 2.0**-3])
def test_a_power_of_two_loses_nothing_of_a_float16_gradient(factor):
    h, head, targets = case(dtype=torch.float16)
    (one,) = torch.autograd.grad(head_loss(h, head, targets), h)
    scaled = torch.full((), factor)
    (other,) = torch.autograd.grad(head_loss(h, head, targets), h, scaled)
    held = (one.float() * factor).abs() <= torch.finfo(torch.float16).max
    normal = one.float().abs() * factor >= torch.finfo(torch.float16).smallest_normal
    both = held & normal
    assert both.float().mean() > 0.5
    assert torch.equal(other.float()[both] / factor, one.float()[both])


def test_nothing_supervised():
    h, head, targets = case(rows=0)
    got = head_loss(h, head, targets)
    assert got == 0
    got.backward()
    assert h.grad.shape == (0, 12)


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch):
    h, head, targets = case()
    monkeypatch.setattr(cross_entropy, "_gradient", None)
    with torch.no_grad():
        assert head_loss(h, head, targets).grad_fn is None
        assert head_logps(h, head, targets).grad_fn is None


@pytest.mark.parametrize("rows_at_once", [16, 1000])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_trained_head(monkeypatch, rows_at_once, softcap, dtype):
    """Float32 also where the products are not, and right where the hidden states want none."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda *_: rows_at_once)
    h, head, targets = case(dtype=dtype)
    trained = head.float().requires_grad_()
    wanted = whole(h.detach().float(), trained, targets, softcap)
    (true,) = torch.autograd.grad(wanted / 7, trained)
    for hidden in (h, h.detach()):
        got = head_loss(hidden, head, targets, softcap=softcap, trained=trained)
        (one,) = torch.autograd.grad(got / 7, trained)
        assert one.dtype == torch.float32
        allowed = 1e-5 if dtype == torch.float32 else 2e-2
        assert (one - true).abs().max() <= allowed * true.abs().max()


def logps_of(h, head, targets, softcap=0.0):
    logits = (h @ head.T).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("rows_at_once", [16, 17, 1000])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [37, 0])
def test_log_probabilities_and_their_gradients(monkeypatch, rows_at_once, softcap, trained, rows):
    """With a derivative of its own by each, of either sign."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda *_: rows_at_once)
    h, head, targets = case(rows)
    head.requires_grad_(trained)
    got = head_logps(h, head.detach(), targets, softcap=softcap, trained=head if trained else None)
    wanted = logps_of(h, head, targets, softcap)
    torch.testing.assert_close(got, wanted)
    leaves, derivatives = [h, head] if trained else [h], torch.randn(rows)
    ours = torch.autograd.grad(got, leaves, derivatives)
    theirs = torch.autograd.grad(wanted, leaves, derivatives)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_a_gradient_are_multiplied_once_in_float32(dtype):
    h, head, targets = case(dtype=dtype)
    (whole_one,) = torch.autograd.grad(head_loss(h, head, targets), h)
    derivatives = torch.randn(len(h)) / 30_000
    (one,) = torch.autograd.grad(head_logps(h, head, targets), h, derivatives)
    assert torch.equal(one, (whole_one.float() * -derivatives[:, None]).to(dtype))
    assert one.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_of_log_probabilities_has_the_bits_of_the_loss(dtype):
    h, head, targets = case(dtype=dtype)
    logps, loss = head_logps(h, head, targets), head_loss(h, head, targets)
    assert torch.equal(-logps.sum(), loss)  # of one chunk
    (one,), (other,) = torch.autograd.grad(-logps.sum(), h), torch.autograd.grad(loss, h)
    assert torch.equal(one, other)


def test_a_trained_head_alone_gets_its_gradient():
    """Where the hidden states want none: nothing below is trained."""
    h, head, targets = case()
    head.requires_grad_()
    derivatives = torch.randn(len(h))
    got = head_logps(h.detach(), head.detach(), targets, trained=head)
    (one,) = torch.autograd.grad(got, head, derivatives)
    (other,) = torch.autograd.grad(logps_of(h.detach(), head, targets), head, derivatives)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_huge_logits_stay_finite():
    h, head, targets = case()
    got = head_loss(h * 1e4, head, targets)
    assert torch.isfinite(got)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("size", [40, 4096, 5000])
def test_the_kernel_is_the_plain_loss(softcap, size):
    gpu = pytest.importorskip(
        "halfbyte.layers.triton_elementwise", reason="needs Triton", exc_type=ImportError
    )
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(7, size, generator=generator) * 4).requires_grad_()
    targets = torch.tensor([0, 1, 2, size - 1, size // 2, 3, 4])
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    true = F.cross_entropy(capped, targets, reduction="none")
    (slope,) = torch.autograd.grad(true.sum(), logits)
    held = logits.detach().clone()
    losses = gpu.cross_entropy_forward_backward(held, targets, softcap, with_grad=False)
    assert torch.equal(held, logits)
    assert torch.equal(
        gpu.cross_entropy_forward_backward(held, targets, softcap, with_grad=True), losses
    )
    torch.testing.assert_close(losses, true.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(held, slope, rtol=1e-4, atol=1e-6)
