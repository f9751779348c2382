"""Adapters of experts: values and gradients against the formula, and torch's grouped products."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from halfbyte.linear.expert_lora import (
    ExpertLoRA,
    grouped_matmul,
    grouped_outer,
    matmul_by_torch,
    outer_by_torch,
)
from halfbyte.linear.experts import ExpertLinear

_EXPERTS, _ROWS, _COLUMNS, _RANK = 4, 24, 40, 3
# The third expert has no rows, and the last two rows no expert.
_OFFSETS = torch.tensor([0, 5, 6, 6, 14], dtype=torch.int32)


def _linear(*, transposed: bool, swaps: bool = False) -> ExpertLinear:
    generator = torch.Generator().manual_seed(0)
    linear = ExpertLinear((_EXPERTS, _ROWS, _COLUMNS), transposed=transposed, dtype=torch.float64)
    weights = torch.randn(_EXPERTS, _ROWS, _COLUMNS, generator=generator, dtype=torch.float64)
    linear.weight = torch.nn.Parameter(weights, requires_grad=False)
    linear.swaps_factors = swaps
    adapter = ExpertLoRA(linear, r=_RANK, scaling=1.5).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    linear.adapter = adapter
    return linear


@pytest.mark.parametrize(("transposed", "swaps"), [(False, False), (True, False), (True, True)])
def test_values_and_gradients_are_those_of_the_changed_weight(
    transposed: bool, swaps: bool
) -> None:
    linear = _linear(transposed=transposed, swaps=swaps)
    adapter, weight = linear.adapter, linear.weight
    assert isinstance(adapter, ExpertLoRA)
    assert weight is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, linear.in_features, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    y = linear(x, _OFFSETS)
    weighted = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (y * weighted).sum().backward()
    got = [x.grad, adapter.lora_A.grad, adapter.lora_B.grad]

    # PEFT's einsum over its own layout, added to the stored weight.
    a = adapter.lora_A.detach().reshape(_EXPERTS, _RANK, -1).requires_grad_()
    b = adapter.lora_B.detach().reshape(-1, _RANK, _EXPERTS).requires_grad_()
    other = x.detach().requires_grad_()
    result = "e i o" if transposed and not swaps else "e o i"
    changed = weight + 1.5 * torch.einsum(f"o r e, e r i -> {result}", b, a)
    expected = torch.zeros_like(y)
    for expert, (start, stop) in enumerate(pairwise(_OFFSETS.tolist())):
        matrix = changed[expert] if transposed else changed[expert].t()
        expected[start:stop] = other[start:stop] @ matrix
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad((expected * weighted).sum(), [other, a, b])
    for gradient, one in zip(got, wanted, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, one.reshape(gradient.shape), rtol=1e-9, atol=1e-9)
    for expert in range(_EXPERTS):
        delta = adapter.float().delta(expert)
        wide = (changed - weight)[expert].detach().float()
        torch.testing.assert_close(delta, wide, rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_gradient_for_its_input_trains_as_well() -> None:
    linear = _linear(transposed=False)
    y = linear(torch.ones(16, _COLUMNS, dtype=torch.float64), _OFFSETS)
    y.sum().backward()
    assert isinstance(linear.adapter, ExpertLoRA)
    assert linear.adapter.lora_A.grad is not None


@pytest.mark.parametrize("rank", [8, 3])
def test_torch_s_grouped_products_are_those_of_the_loop(rank: int) -> None:
    """What a GPU runs, in bfloat16, on the CPU; with ranks that it does not take as they are."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, h = draw(16, 64), draw(16, rank)
    for weights, rows in ((draw(_EXPERTS, rank, 64).mT, x), (draw(_EXPERTS, 32, rank).mT, h)):
        got = matmul_by_torch(rows, weights, _OFFSETS)
        torch.testing.assert_close(got, grouped_matmul(rows, weights, _OFFSETS))
        assert not got[14:].any()
    for a, b in ((x, h), (h, x)):
        outer = outer_by_torch(a, b, _OFFSETS)
        torch.testing.assert_close(outer, grouped_outer(a, b, _OFFSETS))
        assert not outer[2].any()
