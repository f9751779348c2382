"""FP8 products with adapters in Triton's interpreter, against the specification."""

import os

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.layers.elementwise import plain_rotary
from halfbyte.layers.mlp import gated_mlp
from halfbyte.layers.qkv import turned_heads
from halfbyte.linear import fp8, fp8_check, group
from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.fp8_check import check_kernels
from halfbyte.linear.fp8_choice import use_fp8
from halfbyte.linear.lora import adapter_parameters
from halfbyte.quant import e4m3, triton_e4m3
from tests.linear.test_fp8 import WIDTH, drawn, linears, run

kernels = pytest.importorskip(
    "halfbyte.linear.triton_fp8", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)


@pytest.fixture(params=[True, False], ids=["one contraction", "torch"])
def on_gpu(request, monkeypatch):
    """As if on a GPU: what asks for one is told so, and kernels are interpreted."""
    mm = torch.mm

    def typed(left, right, *, out_dtype=None, **options):
        return mm(left, right, **options).to(out_dtype or left.dtype)

    def scaled(x, x_scale, weight, scale, dtype):
        y = (x.double() * x_scale) @ weight.double().t()
        return (y if scale is None else y * scale).to(dtype)

    monkeypatch.setattr(group, "_for_kernels", lambda _: True)
    monkeypatch.setattr(fp8, "_by_units", lambda _: True)
    monkeypatch.setattr(kernels, "fits", lambda *_: request.param)
    monkeypatch.setattr(kernels, "scaled_product", scaled)
    monkeypatch.setattr(torch, "mm", typed)
    return request.param


# What follows the products is the same with torch's, and slow in the interpreter.
one_contraction = pytest.mark.parametrize("on_gpu", [True], indirect=True)

CASES = [
    # outputs, inputs, rank, rows
    ([256, 64], 192, 16, 130),
    ([256, 256, 256], 64, 16, 65),
    ([48], 272, 32, 33),
]


@pytest.mark.parametrize(("outputs", "inputs", "rank", "rows"), CASES)
def test_one_contraction_is_that_of_float64(outputs, inputs, rank, rows):
    x, weight = drawn(rows, inputs, seed=0), drawn(sum(outputs), inputs, seed=1) * 0.1
    p = drawn(rows, rank * len(outputs), seed=2).half()
    b = drawn(sum(outputs), rank, seed=3).half()
    a = drawn(rank * len(outputs), sum(outputs), seed=4).half()
    (x_hat, x_scale), (w_hat, w_scale) = e4m3.quantize_rows(x), e4m3.encode(weight)
    wide = x_hat.double() * x_scale
    y = kernels.product(x_hat, x_scale, w_hat, w_scale, p, b, rank, outputs)
    parts = zip(p.double().split(rank, 1), b.double().split(outputs), strict=True)
    exact = wide @ (w_hat.double() * w_scale[:, None]).t()
    exact += torch.cat([left @ right.t() for left, right in parts], 1)
    assert (y.double() - exact).norm() <= 2**-10 * exact.norm()
    y = kernels.product(x_hat, x_scale, w_hat, None, p, a, rank * len(outputs), None)
    exact = wide @ w_hat.double().t() + p.double() @ a.double()
    assert (y.double() - exact).norm() <= 2**-10 * exact.norm()


def close(got, wanted):
    """Of the same numbers, rounded to e4m3 with other scales, or after a rounding to float16.

    The kernels round the gradients of all linears of one input with one scale a row, the
    specification those of each. Roundings differ by 2.6 % of a number, root mean square, each.
    """
    return (got.float() - wanted.float()).norm() <= 0.04 * wanted.float().norm()


@pytest.mark.parametrize(
    ("on_gpu", "outs", "opened"),
    [
        (True, [64], False),
        (True, [256, 256, 48], True),
        (False, [64], True),
        (False, [64, 48], True),
    ],
    indirect=["on_gpu"],
)
def test_linears_are_those_of_the_specification(on_gpu, outs, opened, monkeypatch):
    module, made = linears(outs)
    use_fp8(made)
    x = drawn(2, 19, WIDTH, seed=20).half()
    dys = [drawn(2, 19, o, seed=30 + i).half() for i, o in enumerate(outs)]
    with DecodedWeightCache().opened(made if opened else [], torch.float16):
        got = run(module, made, x, dys)
    assert made[0].group.fused(x, [m.adapter.update(x) for m in made]) is not None
    monkeypatch.undo()
    wanted = run(module, made, x.float(), [dy.float() for dy in dys])
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


@one_contraction
def test_rotated_heads_are_those_of_the_specification(on_gpu, monkeypatch):
    size = 64
    module, made = linears([256, 256, 64])
    use_fp8(made)
    x, angles = drawn(2, 19, WIDTH, seed=20).half(), torch.rand(1, 19, size // 2)
    cos, sin = ((6 * f(angles.repeat(1, 1, 2))).half() for f in (torch.cos, torch.sin))
    dys = [drawn(2, 19, o // size, size, seed=30 + i).half() for i, o in enumerate((256, 256, 64))]

    def heads(x, cos, sin, dys):
        x = x.clone().requires_grad_()
        ys = turned_heads(x, made, cos, sin)
        factors = list(adapter_parameters(module).values())
        return [*(y.clone() for y in ys), *torch.autograd.grad(ys, [x, *factors], dys)]

    with DecodedWeightCache().opened(made, torch.float16):
        got = heads(x, cos, sin, [dy.clone() for dy in dys])
    monkeypatch.undo()
    wanted = heads(x.float(), cos.float(), sin.float(), [dy.float() for dy in dys])
    assert plain_rotary(wanted[0], cos, sin).shape == wanted[0].shape
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


@one_contraction
def test_a_gated_mlp_is_that_of_the_specification(on_gpu, monkeypatch):
    module, made = linears([256, 256])
    last_module, last = linears([WIDTH], 256)
    use_fp8([*made, *last])
    x, dy = drawn(2, 19, WIDTH, seed=20).half(), drawn(2, 19, WIDTH, seed=21).half()

    def mlp(x, dy):
        x = x.clone().requires_grad_()
        y = gated_mlp(x, *made, *last)
        factors = [*adapter_parameters(module).values(), *adapter_parameters(last_module).values()]
        return [y, *torch.autograd.grad(y, [x, *factors], dy)]

    with DecodedWeightCache().opened([*made, *last], torch.float16):
        got = mlp(x, dy)
    monkeypatch.undo()
    wanted = mlp(x.float(), dy.float())
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


def test_kernels_are_compared_with_the_specification_before_a_run():
    check_kernels(torch.device("cpu"), torch.float16)


@pytest.fixture
def few(monkeypatch):
    """Small tensors are checked."""
    monkeypatch.setattr(fp8_check, "_ROWS", 5)
    monkeypatch.setattr(fp8_check, "_OUTPUTS", (16, 48))


def test_a_wrong_transposed_copy_ends_a_run(monkeypatch, few):
    decode = triton_e4m3.decode

    def wrong(q, out, across, scale):
        decode(q, out, across, scale)
        across[: len(across) // 16] = 0

    monkeypatch.setattr(triton_e4m3, "decode", wrong)
    with pytest.raises(ConfigError, match="transposed weights differ from the specification"):
        check_kernels(torch.device("cpu"), torch.float16)


def test_a_wrong_product_ends_a_run(monkeypatch, few):
    product = kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args: product(*args) * 1.1)
    with pytest.raises(ConfigError, match="products of forward differ"):
        check_kernels(torch.device("cpu"), torch.float16)
