"""Linears with adapters on a GPU: the fused products, and sets that share their input."""

import pytest
import torch
from torch import nn

from halfbyte.layers.mlp import gated_mlp
from halfbyte.layers.qkv import turned_heads
from halfbyte.linear import group
from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.quant import quantize

gpu = pytest.importorskip(
    "halfbyte.layers.triton_elementwise", reason="needs Triton", exc_type=ImportError
)
triton_swiglu = pytest.importorskip("halfbyte.linear.triton_swiglu", exc_type=ImportError)
triton_matmul = pytest.importorskip("halfbyte.linear.triton_matmul", exc_type=ImportError)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(outputs, inputs, rank, quant=True, together=True, targets="all-linear"):
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
    if together:
        LinearGroup(list(module.children()))
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
    from halfbyte.linear import triton_matmul

    module = layer(outputs, inputs, rank, quant)
    true = exact(module, rows)
    calls = []
    original = triton_matmul.forward
    monkeypatch.setattr(triton_matmul, "forward", lambda *args: calls.append(1) or original(*args))
    fused = run(module, rows)
    assert calls
    monkeypatch.setattr(triton_matmul, "fits", lambda *_: False)
    plain = errors(run(module, rows), true)
    for name, error in errors(fused, true).items():
        assert error <= 1.1 * plain[name] + 1e-4, (name, error, plain[name])


@pytest.mark.parametrize("rows", [100, 2100])
def test_a_set_gives_what_its_linears_give_alone(rows):
    together = layer((512, 256, 256), 256, 16)
    alone = layer((512, 256, 256), 256, 16, together=False)
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
    scratch = DecodedWeightCache()
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
    from halfbyte.linear import triton_gemv

    module = layer((512, 256), 256, 16)
    calls = []
    original = triton_gemv.small_product
    monkeypatch.setattr(
        triton_gemv, "small_product", lambda *args: calls.append(1) or original(*args)
    )
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
    from halfbyte.linear import triton_lora

    module = layer((512, 256, 128), 200, 24)
    updates = [linear.adapter.update(None) for linear in module.children()]
    pairs = [updates[0][:3], None, updates[2][:3]]
    (cast_adapters,) = triton_lora.cast_adapters_of(
        [triton_lora.Factors(pairs, [512, 256, 128], 200)], torch.bfloat16
    )
    assert cast_adapters.rank == 32
    assert torch.equal(cast_adapters.a[:24], updates[0].a.bfloat16())
    assert torch.equal(cast_adapters.a[64:88], updates[2].a.bfloat16())
    assert torch.equal(cast_adapters.b[:512, :24], (2.0 * updates[0].b).bfloat16())
    assert torch.equal(cast_adapters.b[768:, :24], (2.0 * updates[2].b).bfloat16())
    assert int((cast_adapters.a != 0).sum()) == 48 * 200
    assert int((cast_adapters.b != 0).sum()) == 24 * (512 + 128)


def mlp(rank, quant=True, targets="all-linear"):
    """Gate, up and down of an MLP as l0, l1, l2."""
    module = layer([2816, 2816], 1024, rank, quant, targets=targets)
    down = layer([1024], 2816, rank, quant)
    module.l2 = down.l0
    return module


def run_mlp(module, rows, *, read=True):
    torch.manual_seed(1)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = gated_mlp(x, module.l0, module.l1, module.l2, read=read)
    dy = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    found = torch.autograd.grad(y, [x, *adapter_parameters(module).values()], dy)
    with torch.no_grad():
        alone = gated_mlp(x, module.l0, module.l1, module.l2)
    return [y.detach(), alone, *found]


@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize("rows", [2048, 2500, 4096])
@pytest.mark.parametrize("quant", [True, False])
def test_the_gate_in_the_products_gives_the_bits_of_a_gate_by_itself(
    rows, rank, quant, monkeypatch
):
    module = mlp(rank, quant)
    together = run_mlp(module, rows)
    assert torch.equal(together[0], together[1])
    unread = run_mlp(module, rows, read=False)
    with monkeypatch.context() as patch:
        patch.setattr(triton_swiglu, "gated_forward", forward_apart)
        apart = run_mlp(module, rows)
    for one, same, other in zip(together[2:], unread[2:], apart[2:], strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one, other)
    assert torch.equal(together[0], apart[0])


def forward_apart(x, weights, p, cast_adapters, *, keep):
    both = triton_matmul.forward(x, weights, p, cast_adapters, [len(w) for w in weights])
    return gpu.swiglu(*both.split(len(weights[0]), 1)), both


@pytest.mark.parametrize("rows", [300, 2048])
@pytest.mark.parametrize("targets", ["all-linear", ["l0"]])
def test_a_gated_mlp_is_as_exact_as_its_chain(rows, targets, monkeypatch):
    module = mlp(16, targets=targets)
    found = run_mlp(module, rows)
    with monkeypatch.context() as patch:
        patch.setattr(group, "_for_kernels", lambda _: False)
        chain = run_mlp(module, rows)
    torch.manual_seed(1)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16).double().requires_grad_()
    named = adapter_parameters(module)
    wide = {n: p.detach().double().requires_grad_() for n, p in named.items()}

    def linear(name, x):
        w = getattr(module, name).decode(torch.bfloat16).double()
        a = next((p for n, p in wide.items() if n.startswith(f"{name}.") and "lora_A" in n), None)
        if a is None:
            return x @ w.t()
        b = next(p for n, p in wide.items() if n.startswith(f"{name}.") and "lora_B" in n)
        return x @ (w + 2 * b @ a).t()

    y = linear("l2", nn.functional.silu(linear("l0", x)) * linear("l1", x))
    dy = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16).double()
    true = [y, y, *torch.autograd.grad(y, [x, *wide.values()], dy)]
    for mine, theirs, exactly in zip(found, chain, true, strict=True):
        error, other = ((t.double() - exactly).norm() / exactly.norm() for t in (mine, theirs))
        assert error <= 1.1 * other + 1e-4


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("shape", [(2, 1100), (1, 2048)])
@pytest.mark.parametrize("outputs", [[1024, 256, 256], [1024, 128, 128]])
def test_heads_turned_in_the_product_have_the_bits_of_those_turned_by_themselves(
    outputs, shape, size, monkeypatch
):
    module = layer(outputs, 1024, 16)
    torch.manual_seed(1)
    x = torch.randn(*shape, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.rand(1, shape[1], size // 2, device="cuda").repeat(1, 1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def run():
        heads = turned_heads(x, list(module.children()), cos, sin)
        torch.manual_seed(2)
        dys = [torch.randn_like(head) for head in heads]
        wanted = [x, *adapter_parameters(module).values()]
        return [head.detach().clone() for head in heads], torch.autograd.grad(heads, wanted, dys)

    together = run()
    with monkeypatch.context() as patch:
        patch.setattr(triton_matmul.Turn, "fits", False)
        apart = run()
    with monkeypatch.context() as patch:
        patch.setattr(group, "_for_kernels", lambda _: False)
        chain = run()
    for one, other, plain in zip(*map(flat, (together, apart, chain)), strict=True):
        assert torch.equal(one, other)
        assert (one - plain).float().norm() <= 0.02 * plain.float().norm()


def flat(results):
    return [*results[0], *results[1]]
