"""The gated MLP as one operation, in Triton's interpreter, against the chain in float64."""

import os
from types import SimpleNamespace

import pytest
import torch

from halfbyte.layers.mlp import gated_mlp
from halfbyte.linear import group
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach

products = pytest.importorskip(
    "halfbyte.linear.triton_matmul", reason="needs Triton", exc_type=ImportError
)
triton_swiglu = pytest.importorskip(
    "halfbyte.linear.triton_swiglu", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests this",
)
ROWS, WIDTH, INNER = 37, 48, 72
ALL = ["gate_proj", "up_proj", "down_proj"]


class MLP(torch.nn.Module):
    """The linears of an MLP, with adapters that have learnt something."""

    def __init__(self, targets):
        super().__init__()
        sizes = {
            "gate_proj": (WIDTH, INNER),
            "up_proj": (WIDTH, INNER),
            "down_proj": (INNER, WIDTH),
        }
        for i, (name, (inputs, outputs)) in enumerate(sizes.items()):
            linear = FrozenLinear(inputs, outputs, dtype=torch.float16, device="cpu")
            generator = torch.Generator().manual_seed(i)
            linear.weight.data = torch.randn(outputs, inputs, generator=generator).half() * 0.2
            setattr(self, name, linear)
        LinearGroup([self.gate_proj, self.up_proj])
        attach(self, LoRAConfig(r=4, alpha=8, target_modules=targets), seed=0)
        for i, parameter in enumerate(adapter_parameters(self).values()):
            generator = torch.Generator().manual_seed(50 + i)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x, **options):
        return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, **options)


# Whether the gate is in the products of forward, and whether what is between those of backward is
# one kernel.
@pytest.fixture(
    params=[(True, True), (False, True), (False, False)],
    ids=["gate in the products", "gate by itself", "and kernels of their own in backward"],
)
def on_gpu(request, monkeypatch):
    """As if on a GPU: what asks for one is told so, and kernels are interpreted."""
    mm = torch.mm

    def typed(left, right, *, out_dtype=None, **options):
        return mm(left, right, **options).to(out_dtype or left.dtype)

    monkeypatch.setattr(group, "_for_kernels", lambda _: True)
    in_products, one_kernel = request.param
    monkeypatch.setattr(products, "fits", lambda *_: in_products)
    if not one_kernel:
        monkeypatch.setattr(triton_swiglu, "backward_fits", lambda *_: False)
    else:
        assert triton_swiglu.backward_fits(*[SimpleNamespace(rank=16)] * 2, torch.device("cpu"))
    monkeypatch.setattr(torch, "mm", typed)


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def exact(mlp, x, dy):
    """Output and gradients in float64 of the same float16 numbers."""
    x = x.double().requires_grad_()
    given = {n: p.detach().double().requires_grad_() for n, p in adapter_parameters(mlp).items()}

    def linear(name, x):
        weight = getattr(mlp, name).weight.double()
        for key in given:
            if key.startswith(name) and "lora_A" in key:
                weight = weight + 2 * given[key.replace("lora_A", "lora_B")] @ given[key]
        return x @ weight.t()

    inner = torch.nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x)
    y = linear("down_proj", inner)
    return y, torch.autograd.grad(y, [x, *given.values()], dy.double())


def run(mlp, x, dy, *, read=True):
    """Output and gradients, given that the layer's linears are open."""
    x = x.clone().requires_grad_()
    y = mlp(x, read=read)
    return y, torch.autograd.grad(y, [x, *adapter_parameters(mlp).values()], dy)


@pytest.mark.parametrize("targets", [ALL, ALL[1:], ALL[:1], ALL[2:]])
def test_output_and_gradients_are_those_of_float64(on_gpu, targets):
    mlp = MLP(targets)
    x, dy = drawn(2, ROWS, WIDTH, seed=20), drawn(2, ROWS, WIDTH, seed=21)
    y, gradients = run(mlp, x, dy)
    wanted, true = exact(mlp, x, dy)
    for got, exactly in zip([y, *gradients], [wanted, *true], strict=True):
        assert got.shape == exactly.shape
        assert (got.double() - exactly).norm() <= 4 * 2**-10 * exactly.norm()


def test_a_run_that_is_not_read_has_the_same_gradients(on_gpu):
    mlp = MLP(ALL)
    x, dy = drawn(ROWS, WIDTH, seed=20), drawn(ROWS, WIDTH, seed=21)
    y, true = run(mlp, x, dy)
    with torch.no_grad():
        assert torch.equal(mlp(x), y)
    stand_in, gradients = run(mlp, x, dy, read=False)
    assert stand_in.shape == y.shape
    for got, exactly in zip(gradients, true, strict=True):
        torch.testing.assert_close(got, exactly, rtol=2e-3, atol=2e-3)


def test_backward_runs_once(on_gpu):
    mlp = MLP(ALL)
    x = drawn(ROWS, WIDTH, seed=20).requires_grad_()
    y = mlp(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        torch.autograd.grad(y.sum(), x)
