"""Linears with adapters on a GPU: the fused products, and sets that share their input."""

import pytest
import torch
from torch import nn

from halfbyte.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.nf4 import quantize
from halfbyte.nf4.linear import FrozenLinear
from halfbyte.nf4.scratch import WeightScratch
from halfbyte.nf4.shared import SharedInput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(outputs, inputs, rank, quant=True, shared=True, targets="all-linear"):
    torch.manual_seed(0)
    module = nn.Module()
    for i, out in enumerate(outputs):
        w = torch.randn(out, inputs, device="cuda", dtype=torch.bfloat16) * inputs**-0.5
        linear = FrozenLinear(
            inputs, out, quantized=quantize(w) if quant else None, dtype=w.dtype, device="cuda"
        )
        if not quant:
            linear.weight.data.copy_(w)
        setattr(module, f"l{i}", linear)
    if shared:
        SharedInput(list(module.children()))
    attach(module, LoRAConfig(r=rank, alpha=2 * rank, target_modules=targets), seed=0)
    for parameter in adapter_parameters(module).values():
        nn.init.normal_(parameter, std=0.05)
    return module


def run(module, rows, dtype=torch.bfloat16):
    torch.manual_seed(1)
    inputs = module.l0.in_features
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype, requires_grad=True)
    ys = [linear(x) for linear in module.children()]
    torch.manual_seed(2)
    torch.autograd.backward(ys, [torch.randn_like(y) for y in ys])
    gradients = {name: p.grad for name, p in adapter_parameters(module).items()}
    for p in adapter_parameters(module).values():
        p.grad = None
    return {**{f"y{i}": y.detach() for i, y in enumerate(ys)}, "dx": x.grad, **gradients}


def exact(module, rows):
    """In float64, from the weights as bfloat16 has them."""
    torch.manual_seed(1)
    linears = list(module.children())
    x = torch.randn(rows, linears[0].in_features, device="cuda", dtype=torch.bfloat16).double()
    torch.manual_seed(2)
    found, dx = {}, torch.zeros_like(x)
    for i, linear in enumerate(linears):
        w = linear.decode(torch.bfloat16).double()
        dy = torch.randn(rows, linear.out_features, device="cuda", dtype=torch.bfloat16).double()
        y = x @ w.t()
        dx += dy @ w
        if linear.adapter is not None:
            a, b = linear.adapter.lora_A.double(), linear.adapter.lora_B.double()
            s = linear.adapter.config.scaling
            y += s * x @ a.t() @ b.t()
            dx += s * dy @ b @ a
            found[f"l{i}.lora_A.weight"] = s * (dy @ b).t() @ x
            found[f"l{i}.lora_B.weight"] = s * dy.t() @ (x @ a.t())
        found[f"y{i}"] = y.detach()
    return {**{name: t.detach() for name, t in found.items()}, "dx": dx.detach()}


def errors(got, true):
    return {
        name: float((got[name].double() - t.detach()).norm() / t.detach().norm())
        for name, t in true.items()
    }


CASES = [
    ((512,), 256, 16),
    ((264,), 200, 8),
    ((1024, 256, 256), 512, 16),
    ((576, 192, 192), 576, 24),
    ((1408, 1408), 512, 64),
    ((768,), 768, 128),
]


@pytest.mark.parametrize(("outputs", "inputs", "rank"), CASES)
@pytest.mark.parametrize("rows", [7, 512, 2048, 2500])
@pytest.mark.parametrize("quant", [True, False])
def test_fused_products_are_as_exact_as_the_plain_ones(
    outputs, inputs, rank, rows, quant, monkeypatch
):
    from halfbyte.nf4 import gpu_products

    module = layer(outputs, inputs, rank, quant)
    true = exact(module, rows)
    calls = []
    original = gpu_products.forward
    monkeypatch.setattr(gpu_products, "forward", lambda *args: calls.append(1) or original(*args))
    fused = run(module, rows)
    assert calls
    monkeypatch.setattr(gpu_products, "fits", lambda *_: False)
    plain = errors(run(module, rows), true)
    for name, error in errors(fused, true).items():
        assert error <= 1.1 * plain[name] + 1e-4, (name, error, plain[name])


@pytest.mark.parametrize("rows", [100, 2100])
def test_a_set_gives_what_its_linears_give_alone(rows):
    together = layer((512, 256, 256), 256, 16)
    alone = layer((512, 256, 256), 256, 16, shared=False)
    one, other = run(together, rows), run(alone, rows)
    for name, value in one.items():
        if name == "dx":
            assert (value - other[name]).norm() <= 0.01 * value.norm()
        else:
            assert torch.equal(value, other[name]), name


def test_results_do_not_depend_on_what_ran_before():
    module = layer((512, 256), 256, 16)
    first = run(module, 3000)
    for _ in range(3):
        again = run(module, 3000)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("opened", [True, False])
def test_an_adapter_that_has_learnt_is_seen(opened):
    """Also when it was written to without counting, as torch's fused AdamW does."""
    module = layer((512,), 256, 16)
    scratch = WeightScratch()
    before = run(module, 2048)["y0"]
    optimizer = torch.optim.AdamW(adapter_parameters(module).values(), lr=0.1, fused=True)
    for parameter in adapter_parameters(module).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with scratch.opened([module.l0] if opened else [], torch.bfloat16):
        after = run(module, 2048)["y0"]
    assert not torch.equal(before, after)
    assert errors({"y0": after}, {"y0": exact(module, 2048)["y0"]})["y0"] < 4e-3


def test_a_linear_of_a_set_may_have_no_adapter():
    module = layer((512, 256, 256), 256, 16, targets=("l0", "l2"))
    true = exact(module, 2048)
    for name, error in errors(run(module, 2048), true).items():
        assert error < 6e-3, name


def test_a_few_rows_without_gradients_take_the_packed_weight(monkeypatch):
    from halfbyte.nf4 import gpu_rows

    module = layer((512, 256), 256, 16)
    calls = []
    original = gpu_rows.small_product
    monkeypatch.setattr(gpu_rows, "small_product", lambda *args: calls.append(1) or original(*args))
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = module.l0(x)
        module.l1(x)
    assert len(calls) == 2
    w = module.l0.decode(torch.bfloat16).double()
    a, b = module.l0.adapter.lora_A.double(), module.l0.adapter.lora_B.double()
    true = x.double() @ w.t() + 2.0 * x.double() @ a.t() @ b.t()
    assert (y.double() - true).norm() <= 6e-3 * true.norm()


def test_a_shadow_is_rounded_once_from_the_scaled_adapter():
    from halfbyte.nf4 import gpu_adapters

    module = layer((512, 256, 128), 200, 24)
    updates = [linear.adapter.update(None) for linear in module.children()]
    pairs = [updates[0][:3], None, updates[2][:3]]
    (shadow,) = gpu_adapters.shadows_of(
        [gpu_adapters.Factors(pairs, [512, 256, 128], 200)], torch.bfloat16
    )
    assert shadow.rank == 32
    assert torch.equal(shadow.a[:24], updates[0].a.bfloat16())
    assert torch.equal(shadow.a[64:88], updates[2].a.bfloat16())
    assert torch.equal(shadow.b[:512, :24], (2.0 * updates[0].b).bfloat16())
    assert torch.equal(shadow.b[768:, :24], (2.0 * updates[2].b).bfloat16())
    assert int((shadow.a != 0).sum()) == 48 * 200
    assert int((shadow.b != 0).sum()) == 24 * (512 + 128)
