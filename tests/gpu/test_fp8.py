"""FP8 on a GPU: kernels against the specification, and steps with and without graphs."""

import pytest
import torch

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.linear import triton_fp8
from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.decoded_weight import DENSE
from halfbyte.linear.fp8 import FP8
from halfbyte.linear.fp8_check import check_kernels
from halfbyte.linear.fp8_choice import use_fp8
from halfbyte.linear.lora import frozen_linears
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import e4m3, quantize, triton_e4m3
from halfbyte.runtime import device as devices
from tests.gpu.test_engine import EQUAL, MIXED, engines, examples, on_gpu, taken, zero
from tests.gpu.test_products import layer, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and devices.spec_of(torch.device("cuda")).has_fp8),
        reason="needs a GPU with FP8 units",
    ),
]


def drawn(*shape, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


@pytest.mark.parametrize(
    ("out", "inputs", "block", "double"),
    [(4096, 4096, 64, True), (4096, 11008, 64, True), (48, 192, 64, True), (96, 256, 32, False)],
)
def test_weights_are_decoded_as_plain_pytorch_does(out, inputs, block, double):
    q = quantize(drawn(out, inputs), quant_type="nf4", block_size=block, double_quant=double)
    whole = torch.zeros(inputs, out + 32, dtype=e4m3.DTYPE, device="cuda")
    data = torch.zeros(out, inputs, dtype=e4m3.DTYPE, device="cuda")
    across, scale = whole[:, 16 : 16 + out], torch.zeros(out, device="cuda")
    triton_e4m3.decode(q, data, across, scale)
    wanted, wanted_scale = e4m3.decode(q)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(data.float(), wanted.float())
    assert torch.equal(across.t().float(), wanted.float())
    assert not whole[:, :16].float().any()
    assert not whole[:, 16 + out :].float().any()


@pytest.mark.parametrize("sizes", [(4096,), (11008,), (4096, 1024, 1024), (11008, 11008), (48,)])
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_are_rounded_as_plain_pytorch_does(sizes, scaled):
    parts = [drawn(67, size) for size in sizes]
    parts[0][3] = 0
    factors = torch.exp2(drawn(sum(sizes)).float().round()) if scaled else None
    data, scale = triton_e4m3.quantize_rows(parts, factors)
    wanted, wanted_scale = e4m3.quantize_rows(torch.cat(parts, 1), factors)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(data.float(), wanted.float())


def test_kernels_pass_the_check_before_a_run():
    check_kernels(torch.device("cuda"))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("sizes", [(4096,), (4096, 1024)])
def test_what_is_not_finite_stays_so(bad, sizes):
    parts = [drawn(5, size) for size in sizes]
    parts[-1][2, 7] = bad
    data, scale = triton_e4m3.quantize_rows(parts)
    wide = data.float() * scale
    assert wide[[0, 1, 3, 4]].isfinite().all()
    assert not wide[2].isfinite().all()


@pytest.mark.parametrize("rows", [300, 2304])
@pytest.mark.parametrize("outputs", [[512], [512, 256, 256], [272, 80]])
def test_linears_are_those_of_float64(rows, outputs):
    module = layer(outputs, 576, 16)
    linears = list(module.children())
    use_fp8(linears)
    assert {linear.layout for linear in linears} == {FP8}
    with DecodedWeightCache().opened(linears, torch.bfloat16):
        got = run(module, rows)
        torch.manual_seed(1)
        x = torch.randn(rows, 576, device="cuda", dtype=torch.bfloat16)
        rounded, x_scale = e4m3.quantize_rows(x)
        for i, linear in enumerate(linears):
            data, scale = e4m3.decode(linear.quantized)
            a, b, s = linear.adapter.factors
            wanted = (rounded.double() * x_scale) @ (data.double() * scale[:, None]).t()
            wanted += s * (x.double() @ a.double().t()) @ b.double().t()
            assert (got[f"y{i}"].double() - wanted).norm() <= 0.008 * wanted.norm()
    # The gradients are those without FP8 but for rounding twice to three bits.
    for linear in linears:
        linear.layout = DENSE
    exact = run(module, rows)
    for name, tensor in exact.items():
        cosine = torch.cosine_similarity(got[name].flatten().float(), tensor.flatten().float(), 0)
        assert cosine > 0.998, name


def test_the_gated_product_is_product_and_gate():
    p, b = drawn(2304, 32), drawn(2048, 16, scale=0.1)
    x, x_scale = e4m3.quantize_rows(drawn(2304, 576))
    data, scale = e4m3.encode(drawn(2048, 576, scale=0.05))
    inner, both = triton_fp8.gated_product(x, x_scale, data, scale, p, b, 16, keep=True)
    whole = triton_fp8.product(x, x_scale, data, scale, p, b, 16, [1024, 1024])
    assert torch.equal(both, whole)
    gate, up = whole.float().chunk(2, 1)
    assert (
        torch.equal(inner, (gate * torch.sigmoid(gate) * up).bfloat16())
        or (inner.float() - gate * torch.sigmoid(gate) * up).norm() <= 2**-8 * inner.float().norm()
    )


@pytest.mark.parametrize("lengths", [MIXED, EQUAL])
@pytest.mark.parametrize("saved", [0, 1])
def test_graphs_change_no_bit(lengths, saved):
    model = on_gpu("llama")
    zero(model)
    plain_loss = LayerEngine(model, fuse=True).step(examples(lengths), 50.0, ActivationPolicy(1))
    taken(model)
    use_fp8(frozen_linears(model.model).values())
    policy = ActivationPolicy(saved)
    plain, fast = engines(model, examples(lengths), policy)
    for seed in range(3):
        batches = examples(lengths, seed)
        wanted = plain.step(batches, 50.0, policy)
        true = taken(model)
        assert torch.equal(fast.step(batches, 50.0, policy), wanted), seed
        for name, gradient in taken(model).items():
            assert torch.equal(gradient, true[name]), (seed, name)
    loss = plain.step(examples(lengths), 50.0, policy)
    assert float(loss) == pytest.approx(float(plain_loss), rel=0.02)
