"""Heads turned with their projections, in Triton's interpreter, against one after the other."""

import os

import pytest
import torch

from halfbyte.layers.elementwise import plain_rotary
from halfbyte.layers.qkv import turned_heads
from halfbyte.linear import group
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach

triton_matmul = pytest.importorskip(
    "halfbyte.linear.triton_matmul", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests this",
)
BATCH, TOKENS, WIDTH = 2, 37, 48


def projections(outputs, targets):
    module = torch.nn.Module()
    for i, (name, out) in enumerate(zip("qkv", outputs, strict=True)):
        linear = FrozenLinear(WIDTH, out, dtype=torch.float16, device="cpu")
        generator = torch.Generator().manual_seed(i)
        linear.weight.data = torch.randn(out, WIDTH, generator=generator).half() * 0.2
        setattr(module, f"{name}_proj", linear)
    LinearGroup(list(module.children()))
    attach(module, LoRAConfig(r=4, alpha=8, target_modules=targets), seed=0)
    for i, parameter in enumerate(adapter_parameters(module).values()):
        generator = torch.Generator().manual_seed(50 + i)
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def tables(size, each):
    """Angles, of every row its own or for all the same."""
    generator = torch.Generator().manual_seed(7)
    angles = torch.rand(BATCH if each else 1, TOKENS, size // 2, generator=generator).repeat(
        1, 1, 2
    )
    return (6 * angles).cos().half(), (6 * angles).sin().half()


def exact(module, x, cos, sin, dys):
    """Heads and gradients in float64 of the same float16 numbers."""
    x = x.double().requires_grad_()
    named = adapter_parameters(module)
    wide = {n: p.detach().double().requires_grad_() for n, p in named.items()}
    heads = []
    for name, linear in module.named_children():
        weight = linear.weight.double()
        for key in wide:
            if key.startswith(name) and "lora_A" in key:
                weight = weight + 2 * wide[key.replace("lora_A", "lora_B")] @ wide[key]
        heads.append((x @ weight.t()).unflatten(-1, (-1, cos.shape[-1])))
    heads[:2] = [turned(h, cos.double(), sin.double()) for h in heads[:2]]
    return heads, torch.autograd.grad(heads, [x, *wide.values()], [dy.double() for dy in dys])


def turned(x, cos, sin):
    one, two = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-two, one], -1) * sin[:, :, None]


SHAPES = [
    ([256, 256, 256], 32, ["q_proj", "k_proj", "v_proj"]),
    ([128, 64, 64], 64, ["q_proj", "v_proj"]),
    ([320, 32, 32], 32, ["k_proj"]),
    ([160, 80, 80], 80, ["q_proj"]),
]
# Every pair of a shape, whose tables, and where it is turned; not all three, of a second each.
CASES = [
    pytest.param(*shape, each, each == (number % 2 == 0), id=f"{number}-{each}")
    for number, shape in enumerate(SHAPES)
    for each in (True, False)
]


@pytest.mark.parametrize(("outputs", "size", "targets", "each", "fits"), CASES)
def test_heads_and_gradients_are_those_of_float64(outputs, size, targets, each, fits, monkeypatch):
    mm = torch.mm

    def typed(left, right, *, out_dtype=None, **options):
        return mm(left, right, **options).to(out_dtype or left.dtype)

    monkeypatch.setattr(group, "_for_kernels", lambda _: True)
    monkeypatch.setattr(triton_matmul, "fits", lambda *_: fits)
    monkeypatch.setattr(torch, "mm", typed)
    module = projections(outputs, targets)
    x = drawn(BATCH, TOKENS, WIDTH, seed=20)
    cos, sin = tables(size, each)
    leaf = x.clone().requires_grad_()
    heads = turned_heads(leaf, list(module.children()), cos, sin)
    dys = [drawn(*head.shape, seed=30 + i) for i, head in enumerate(heads)]
    wanted = [leaf, *adapter_parameters(module).values()]
    gradients = torch.autograd.grad(heads, wanted, dys)
    true_heads, true = exact(module, x, cos, sin, dys)
    for got, exactly in zip([*heads, *gradients], [*true_heads, *true], strict=True):
        assert got.shape == exactly.shape
        assert (got.double() - exactly).norm() <= 4 * 2**-10 * exactly.norm()


def test_on_a_cpu_it_is_one_after_the_other():
    module = projections([64, 64, 64], ["q_proj"])
    x, (cos, sin) = drawn(BATCH, TOKENS, WIDTH, seed=20).float(), tables(32, False)
    module.float()
    q, k, v = turned_heads(x, list(module.children()), cos.float(), sin.float())
    apart = [project(x).unflatten(-1, (-1, 32)) for project in module.children()]
    assert torch.equal(q, plain_rotary(apart[0], cos.float(), sin.float()))
    assert torch.equal(k, plain_rotary(apart[1], cos.float(), sin.float()))
    assert torch.equal(v, apart[2])
