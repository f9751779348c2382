"""The frozen linear against a plain computation, in values, gradients and what it keeps."""

import copy
import itertools

import pytest
import torch
from torch import nn

from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.fused_lora import LowRank
from halfbyte.quant import dequantize, quantize


class Update(nn.Module):
    """An adapter whose parts a test chooses."""

    def __init__(self, a, b, scaling, keep=None):
        super().__init__()
        self.a, self.b, self.scaling, self.keep = a, b, scaling, keep

    @property
    def factors(self):
        return self.a, self.b, self.scaling

    def update(self, x):
        return LowRank(*self.factors, self.keep)


def layer(out=7, inp=10, *, quant="nf4", bias=True, double_quant=True, dtype=torch.float64):
    torch.manual_seed(out * inp)
    weight = torch.randn(out, inp)
    packed = None
    if quant is not None:
        packed = quantize(weight, quant_type=quant, block_size=32, double_quant=double_quant)
    made = FrozenLinear(inp, out, bias=bias, quantized=packed, dtype=dtype, device="cpu")
    if packed is None:
        made.weight.data.copy_(weight)
    if bias:
        made.bias.data.copy_(torch.randn(out))
    return made


def plain(made, x, a=None, b=None, scaling=0.0, keep=None):
    weight = made.dense(x.dtype)
    y = x @ weight.T + (0 if made.bias is None else made.bias.to(x.dtype))
    if a is not None:
        dropped = x if keep is None else x * keep
        y = y + scaling * ((dropped @ a.T) @ b.T)
    return y


@pytest.mark.parametrize("quant", ["nf4", "fp4", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_gradients_in_float64(quant, bias, dropped):
    made = layer(quant=quant, bias=bias)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    keep = (torch.rand(2, 3, 10) > 0.3).double() / 0.7 if dropped else None

    def through(x, a, b):
        made.adapter = Update(a, b, 0.37, keep)
        return made(x)

    torch.testing.assert_close(through(x, a, b), plain(made, x, a, b, 0.37, keep))
    assert torch.autograd.gradcheck(through, (x, a, b))


def test_without_an_adapter():
    made = layer()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(made(x), plain(made, x))
    assert torch.autograd.gradcheck(made, (x,))


@pytest.mark.parametrize("frozen", [{"x"}, {"a"}, {"b"}, {"x", "a"}, {"x", "b"}])
def test_only_the_gradients_that_are_wanted(frozen):
    made = layer()
    wants = {name: name not in frozen for name in "xab"}
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=wants["x"])
    a = torch.randn(2, 10, dtype=torch.float64, requires_grad=wants["a"])
    b = torch.randn(7, 2, dtype=torch.float64, requires_grad=wants["b"])
    made.adapter = Update(a, b, 0.5)
    probe = torch.randn(4, 7, dtype=torch.float64)
    got = torch.autograd.grad((made(x) * probe).sum(), [t for t in (x, a, b) if t.requires_grad])
    expected = plain(made, x, a, b, 0.5)
    wanted = torch.autograd.grad(
        (expected * probe).sum(), [t for t in (x, a, b) if t.requires_grad]
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_no_rows():
    made = layer(dtype=torch.float32)
    x = torch.empty(0, 10, requires_grad=True)
    y = made(x)
    assert y.shape == (0, 7)
    y.sum().backward()
    assert x.grad.shape == (0, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_plain_product(dtype):
    """Against float64 truth, the fused form errs no more than a chain of plain operations."""
    made = layer(96, 130, bias=False, dtype=dtype)
    torch.manual_seed(1)
    x = torch.randn(50, 130).to(dtype)
    a, b = torch.randn(8, 130) / 11, torch.randn(96, 8)
    made.adapter = Update(a, b, 2.0)
    truth = plain(made, x.double(), a.double(), b.double(), 2.0)
    low = plain(made, x, a.to(dtype), b.to(dtype), 2.0)
    error = (made(x).double() - truth).abs().max()
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert error <= (low.double() - truth).abs().max() + rounding


def test_the_decoded_weight_is_not_kept():
    made = layer(64, 64, bias=False, dtype=torch.float32)
    a, b = torch.randn(2, 64, requires_grad=True), torch.randn(64, 2, requires_grad=True)
    made.adapter = Update(a, b, 1.0)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    )
    x = torch.randn(5, 64, requires_grad=True)
    with hooks:
        made(x)
    assert sorted(kept) == [(2, 64), (5, 2), (5, 64), (64, 2)]


def test_a_layer_is_decoded_once_while_it_is_open():
    layers = [layer(6, 8, dtype=torch.float32), layer(9, 6, dtype=torch.float32)]
    scratch = DecodedWeightCache()
    x = torch.randn(3, 8)
    alone = layers[1](layers[0](x))
    with scratch.opened(layers, torch.float32):
        for _ in range(3):
            together = layers[1](layers[0](x))
    assert scratch.decodes == 2
    assert torch.equal(alone, together)
    assert all(one.opened(torch.float32) is None for one in layers)


def test_slots_are_reused_and_grow():
    scratch = DecodedWeightCache()
    small, large = layer(4, 8, dtype=torch.float32), layer(40, 8, dtype=torch.float32)
    x = torch.randn(2, 8)
    addresses = []
    for one in (small, large, small, large):
        with scratch.opened([one], torch.float32):
            addresses.append(one.opened(torch.float32).data.data_ptr())
            assert torch.equal(
                one.opened(torch.float32).data, dequantize(one.quantized, torch.float32)
            )
            torch.testing.assert_close(one(x), plain(one, x))
    assert addresses[1] == addresses[2] == addresses[3]


def test_what_was_decoded_last_need_not_be_again():
    scratch = DecodedWeightCache()
    one, other = layer(4, 8, dtype=torch.float32), layer(6, 8, dtype=torch.float32)
    for linear, again, decodes in (
        (one, False, 1),
        (one, True, 1),
        (one, False, 2),
        (other, True, 3),
        (one, True, 4),
    ):
        with scratch.opened([linear], torch.float32, again=again):
            assert torch.equal(
                linear.opened(torch.float32).data, dequantize(linear.quantized, torch.float32)
            )
        assert scratch.decodes == decodes


def test_what_is_kept_stays_decoded_beside_what_is_not():
    scratch = DecodedWeightCache()
    kept, other = layer(4, 8, dtype=torch.float32), layer(6, 8, dtype=torch.float32)
    scratch.keep([[kept]], torch.float32)
    assert scratch.decodes == 1  # at once
    for one in (kept, other, kept, other, kept):
        with scratch.opened([one], torch.float32):
            assert torch.equal(
                one.opened(torch.float32).data, dequantize(one.quantized, torch.float32)
            )
    assert scratch.decodes == 3
    kept.set_quantized(quantize(torch.randn(4, 8)))
    with scratch.opened([kept], torch.float32):
        assert torch.equal(
            kept.opened(torch.float32).data, dequantize(kept.quantized, torch.float32)
        )
    assert scratch.decodes == 4
    scratch.keep([], torch.float32)
    for _ in range(2):
        with scratch.opened([kept], torch.float32):
            assert torch.equal(
                kept.opened(torch.float32).data, dequantize(kept.quantized, torch.float32)
            )
    assert scratch.decodes == 6


def test_all_that_is_kept_leaves_no_other_buffer():
    scratch = DecodedWeightCache()
    layers = [[layer(4, 8)], [layer(40, 8)]]
    for linears in layers:
        with scratch.opened(linears, torch.float32):
            pass
    assert scratch._shared.buffer is not None
    scratch.keep(layers, torch.float32)
    assert scratch._shared.buffer is None
    sizes = [place.buffer.numel() for place in scratch._own.values()]
    assert sizes == [256, 4 * 40 * 8]  # whole multiples of 256


def test_an_error_closes_what_was_opened():
    made = layer(dtype=torch.float32)
    with pytest.raises(RuntimeError), DecodedWeightCache().opened([made], torch.float32):
        made(torch.randn(2, 3))
    assert made.opened(torch.float32) is None


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.float]
)
def test_casting_the_module_leaves_the_packed_weight_alone(double_quant, cast):
    made = layer(dtype=torch.float32, double_quant=double_quant)
    before = {name: t.clone() for name, t in made.quantized.tensors().items()}
    cast(made)
    after = made.quantized.tensors()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_moving_to_meta_and_back_in_place():
    made = layer(dtype=torch.float32).to("meta")
    assert {t.device.type for t in made.quantized.tensors().values()} == {"meta"}
    assert made.quantized.scale_scales.dtype == torch.float32


def test_state_dict_round_trip():
    one, other = layer(dtype=torch.float32), layer(dtype=torch.float32)
    other.codes.zero_()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 10)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda one, other: one.to("meta"),
        lambda one, other: one.to("meta").to_empty(device="cpu"),
        lambda one, other: one.half(),
        lambda one, other: one.load_state_dict(other.state_dict()),
        lambda one, other: one.load_state_dict(other.state_dict(), assign=True),
        lambda one, other: copy.deepcopy(one),
        lambda one, other: one.set_quantized(other.quantized),
    ],
    ids=["meta", "empty", "half", "load", "assign", "copy", "set"],
)
def test_the_packed_weight_is_made_of_the_buffers_whatever_becomes_of_them(double_quant, change):
    one, other = (layer(dtype=torch.float32, double_quant=double_quant) for _ in range(2))
    changed = change(one, other)
    one = changed if isinstance(changed, FrozenLinear) else one
    tensors, buffers = one.quantized.tensors(), dict(one.named_buffers())
    assert tensors.keys() == buffers.keys()
    assert all(tensor is buffers[name] for name, tensor in tensors.items())


def test_a_packed_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(7, 10\) is expected here, got \(10, 7\)"):
        layer().set_quantized(quantize(torch.randn(10, 7)))


def test_all_ways_of_opening_agree():
    """Opened or not, twice or once: the same bits."""
    made = layer(33, 65, dtype=torch.float32)
    made.adapter = Update(torch.randn(3, 65), torch.randn(33, 3), 0.1)
    x = torch.randn(5, 65)
    results = []
    scratch = DecodedWeightCache()
    for opened, _ in itertools.product((True, False), range(2)):
        if opened:
            with scratch.opened([made], torch.float32):
                results.append(made(x))
        else:
            results.append(made(x))
    assert all(torch.equal(results[0], one) for one in results)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_an_output_nobody_reads_is_not_made_and_has_the_same_gradients(
    adapted, dropped, monkeypatch
):
    made = layer()
    a, b = torch.randn(2, 10).double().requires_grad_(), torch.randn(7, 2).double().requires_grad_()
    keep = (torch.rand(3, 10) > 0.3).double() / 0.7 if dropped else None
    made.adapter = Update(a, b, 0.37, keep) if adapted else None
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    dy, wanted = torch.randn(3, 7, dtype=torch.float64), [x, a, b] if adapted else [x]
    true = torch.autograd.grad(made(x), wanted, dy)
    monkeypatch.setattr("halfbyte.linear.group._plain_forward", None)
    y = made.unread(x)
    assert y.shape == (3, 7)
    monkeypatch.undo()
    for got, exact in zip(torch.autograd.grad(y, wanted, dy), true, strict=True):
        assert torch.equal(got, exact)
