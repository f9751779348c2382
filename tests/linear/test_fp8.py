"""Linears in FP8: the specification on a CPU against float64, and what is refused."""

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.linear import fp8
from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.decoded_weight import DENSE
from halfbyte.linear.fp8 import FP8
from halfbyte.linear.fp8_choice import require_fp8, supports, use_fp8
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.quant import dequantize, e4m3, quantize
from halfbyte.runtime import device as devices
from tests.devices import DEVICES

WIDTH = 128


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linears(outs, inputs=WIDTH, *, adapters=True):
    """Packed linears that share an input, with adapters that have learnt something."""
    module = torch.nn.Module()
    for i, out in enumerate(outs):
        q = quantize(drawn(out, inputs, seed=i) * 0.1, quant_type="nf4", block_size=64)
        linear = FrozenLinear(inputs, out, quantized=q)
        setattr(module, f"p{i}", linear)
    made = list(module.children())
    LinearGroup(made)
    if adapters:
        names = tuple(f"p{i}" for i in range(len(outs)))
        attach(module, LoRAConfig(r=4, alpha=8, target_modules=names), seed=0)
        for i, parameter in enumerate(adapter_parameters(module).values()):
            parameter.data = drawn(*parameter.shape, seed=50 + i) * 0.1
    return module, made


def run(module, made, x, dys):
    x = x.clone().requires_grad_()
    ys = [linear(x) for linear in made]
    factors = list(adapter_parameters(module).values())
    return [*ys, *torch.autograd.grad(ys, [x, *factors], dys)]


@pytest.mark.parametrize("outs", [[64], [64, 32, 48]])
@pytest.mark.parametrize("opened", [True, False])
def test_products_are_those_of_the_rounded_numbers(outs, opened):
    module, made = linears(outs)
    assert use_fp8(made) == f"products of {len(outs)} linears in FP8"
    x, dys = drawn(2, 5, WIDTH, seed=20), [drawn(2, 5, o, seed=30 + o) for o in outs]
    with DecodedWeightCache().opened(made if opened else [], torch.float32):
        got = run(module, made, x, dys)
    rounded, scale = e4m3.quantize_rows(x.view(-1, WIDTH))
    x_hat = rounded.double() * scale
    dx = torch.zeros(10, WIDTH, dtype=torch.float64)
    for linear, y, dy in zip(made, got, dys, strict=False):
        data, w_scale = e4m3.decode(linear.quantized)
        a, b, s = linear.adapter.factors
        low = s * x.view(-1, WIDTH).double() @ a.double().t() @ b.double().t()
        wanted = x_hat @ (data.double() * w_scale[:, None]).t() + low
        torch.testing.assert_close(y.view(10, -1).double(), wanted, rtol=1e-5, atol=1e-5)
        d, d_scale = e4m3.quantize_rows(dy.view(10, -1), w_scale)
        dx += d.double() * d_scale @ data.double()
        dx += s * dy.view(10, -1).double() @ b.double() @ a.double()
    torch.testing.assert_close(got[len(outs)].view(10, -1).double(), dx, rtol=1e-5, atol=1e-4)


def test_the_error_is_within_the_rounding_of_e4m3():
    """Each factor of a term is off by 2**-4 at most."""
    _, made = linears([64], adapters=False)
    use_fp8(made)
    x = drawn(7, WIDTH, seed=1)
    true = dequantize(made[0].quantized, torch.float64)
    scale = e4m3.row_scales(e4m3.row_bounds(made[0].quantized)).double()
    x_scale = x.abs().amax(1, keepdim=True).double() / 448
    off_x = torch.maximum(x.abs().double() * 2**-4, x_scale * 2**-10)
    off_w = torch.maximum(true.abs() * 2**-4, scale[:, None] * 2**-10)
    bound = off_x @ true.abs().t() + x.abs().double() @ off_w.t() + off_x @ off_w.t()
    error = (made[0](x).double() - x.double() @ true.t()).abs()
    assert (error <= bound).all()
    relative = error.norm() / (x.double() @ true.t()).norm()
    assert 0.005 < relative < 0.06  # two independent roundings of 2.6 % each, root mean square


def test_gradients_point_where_those_in_16_bits_do():
    module, made = linears([64, 32, 48])
    x, dys = drawn(64, WIDTH, seed=20), [drawn(64, o, seed=30 + o) for o in (64, 32, 48)]
    wanted = run(module, made, x, dys)
    use_fp8(made)
    got = run(module, made, x, dys)
    for one, two in zip(wanted, got, strict=True):
        assert torch.cosine_similarity(one.flatten(), two.flatten(), 0) > 0.998


def test_activations_in_bfloat16_lose_no_more():
    _, made = linears([64], adapters=False)
    use_fp8(made)
    x = drawn(40, WIDTH, seed=1).bfloat16()
    narrow, wide = made[0](x), made[0](x.float())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).norm() < 2**-7 * wide.norm()
    half = made[0](drawn(40, WIDTH, seed=1).half() * 100)
    assert half.isfinite().all()


def test_all_of_a_group_compute_alike():
    _, made = linears([64, 40, 48], adapters=False)
    other = linears([64], adapters=False)[1]
    plain = FrozenLinear(32, 32, device="cpu")
    assert [supports(linear) for linear in (*made, plain)] == [True, False, True, False]
    message = use_fp8([*made, *other, plain])
    assert message.startswith("products of 1 linears in FP8; 4 stay in 16 bits")
    assert [linear.layout for linear in (*made, *other)] == [DENSE] * 3 + [FP8]


def test_places_are_adjacent_both_ways():
    shapes = [(64, WIDTH), (32, WIDTH), (48, WIDTH)]
    memory = torch.empty(FP8.nbytes(shapes, torch.bfloat16), dtype=torch.uint8)
    places = FP8.places(memory, shapes, torch.bfloat16)
    assert [tuple(place.data.shape) for place in places] == shapes
    assert [tuple(place.across.shape) for place in places] == [(WIDTH, out) for out, _ in shapes]
    for i, place in enumerate(places):
        place.data.view(torch.uint8).fill_(i)
        place.across.view(torch.uint8).fill_(i + 10)
        place.scale.fill_(i)
    numel = 144 * WIDTH
    both = memory[: 2 * numel].view(2, numel)
    assert both[0].view(144, WIDTH)[:, 0].tolist() == [0] * 64 + [1] * 32 + [2] * 48
    assert both[1].view(WIDTH, 144)[0].tolist() == [10] * 64 + [11] * 32 + [12] * 48
    assert memory[2 * numel :].view(torch.float32).tolist() == [0] * 64 + [1] * 32 + [2] * 48


def test_a_gpu_without_fp8_units_is_refused(monkeypatch):
    assert "emulated" in require_fp8("cpu", torch.float32)
    with pytest.raises(ConfigError, match="bfloat16 or float32"):
        require_fp8("cpu", torch.float16)
    for spec in DEVICES.values():
        monkeypatch.setattr(devices, "spec_of", lambda _, spec=spec: spec)
        if spec.capability >= (8, 9):
            assert require_fp8("cuda", torch.bfloat16) == ""
            with pytest.raises(ConfigError, match="leave compute_dtype at auto"):
                require_fp8("cuda", torch.float32)
        else:
            with pytest.raises(ConfigError, match=f"not for {spec.name}.*8.9"):
                require_fp8("cuda", torch.bfloat16)


def test_the_numbers_of_a_gpu_are_those_of_the_specification(monkeypatch):
    """With a transposed copy, as for a GPU's units."""
    monkeypatch.setattr(fp8, "_by_units", lambda _: True)
    monkeypatch.setattr(fp8, "gpu_kernels", lambda: None)
    module, made = linears([64, 32])
    use_fp8(made)
    x, dys = drawn(5, WIDTH, seed=20), [drawn(5, o, seed=30) for o in (64, 32)]
    with DecodedWeightCache().opened(made, torch.float32):
        assert all(linear.opened(torch.float32).across is not None for linear in made)
        got = run(module, made, x, dys)
    monkeypatch.undo()
    wanted = run(module, made, x, dys)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
