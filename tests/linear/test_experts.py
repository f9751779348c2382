"""The packed weights of experts: bitsandbytes' bytes, and products against float64."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from halfbyte.linear.experts import ExpertLinear, expert_linears
from halfbyte.quant import empty_like_quantized, quantize


def _experts(weights: Tensor, *, packed: bool, transposed: bool) -> ExpertLinear:
    count, rows, columns = weights.shape
    like = None
    if packed:
        like = empty_like_quantized(
            (rows, columns), weights.dtype, quant_type="nf4", block_size=64, double_quant=True
        )
    linear = ExpertLinear(
        (count, rows, columns), transposed=transposed, like=like, dtype=weights.dtype
    )
    if packed:
        for expert, matrix in enumerate(weights):
            linear.set_packed(expert, quantize(matrix))
    else:
        linear.weight = torch.nn.Parameter(weights, requires_grad=False)
    return linear


def test_each_expert_has_the_bytes_that_bitsandbytes_gives_its_matrix() -> None:
    weights = torch.randn(3, 48, 80, generator=torch.Generator().manual_seed(0))
    linear = _experts(weights, packed=True, transposed=False)
    assert linear.weight is None
    for matrix, packed in zip(weights, linear.packed, strict=True):
        codes, state = bnb.quantize_4bit(
            matrix, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(packed.codes, codes.flatten())
        assert packed.scale_codes is not None
        assert torch.equal(packed.scale_codes, state.absmax)
        assert packed.scale_offset == state.offset


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_product_and_gradient_are_those_of_each_experts_weight(
    packed: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.linear.experts.DECODED_BYTES", 2 * 4 * 64 * 96)  # two experts
    generator = torch.Generator().manual_seed(1)
    linear = _experts(
        torch.randn(5, 64, 96, generator=generator), packed=packed, transposed=transposed
    )
    n_in, n_out = (64, 96) if transposed else (96, 64)
    assert (linear.in_features, linear.out_features) == (n_in, n_out)
    counts = [4, 0, 3, 0, 2]  # and one row of no expert
    offsets = torch.tensor([0, 4, 4, 7, 7, 9], dtype=torch.int32)
    x = torch.randn(10, n_in, generator=generator, requires_grad=True)
    dy = torch.randn(10, n_out, generator=generator)
    y = linear(x, offsets)
    y.backward(dy)
    weights = linear.decode(0, 5, torch.float64)
    weights = weights if transposed else weights.mT
    of_rows = torch.cat([weights[e].expand(n, -1, -1) for e, n in enumerate(counts)])
    expected = torch.einsum("ri,rio->ro", x.detach()[:9].double(), of_rows)
    torch.testing.assert_close(y[:9].double(), expected, rtol=1e-5, atol=1e-4)
    assert x.grad is not None
    dx = torch.einsum("ro,rio->ri", dy[:9].double(), of_rows)
    torch.testing.assert_close(x.grad[:9].double(), dx, rtol=1e-5, atol=1e-4)
    assert not y[9].any()
    assert not x.grad[9].any()


def test_casting_a_module_keeps_packed_bytes() -> None:
    weights = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(2))
    linear = _experts(weights, packed=True, transposed=False)
    before = linear.decode(0, 2, torch.float32)
    linear.to(torch.bfloat16)
    assert torch.equal(linear.decode(0, 2, torch.float32), before)
    other = _experts(torch.zeros(2, 32, 64), packed=True, transposed=False)
    other.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(other.decode(0, 2, torch.float32), before)


def test_weight_of_another_shape_is_rejected() -> None:
    linear = _experts(torch.zeros(2, 32, 64), packed=True, transposed=False)
    with pytest.raises(ValueError, match="an expert's weight"):
        linear.set_packed(0, quantize(torch.zeros(64, 32)))


def test_experts_are_found_by_path() -> None:
    model = torch.nn.ModuleDict(
        {"a": _experts(torch.ones(2, 32, 64), packed=False, transposed=False)}
    )
    assert list(expert_linears(model)) == ["a"]
    assert "experts=2, in=64, out=32, plain" in repr(model)
