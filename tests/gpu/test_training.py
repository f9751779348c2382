"""The same code on a GPU: plain PyTorch decoding, transformers' sdpa, and the CPU's losses."""

import pytest
import torch

from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.linear.lora import adapter_parameters
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import dequantize, quantize
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_decoding_is_the_cpus_to_the_bit(quant_type, double_quant):
    torch.manual_seed(0)
    packed = quantize(torch.randn(129, 77), quant_type=quant_type, double_quant=double_quant)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        on_gpu = dequantize(packed.to("cuda"), dtype)
        assert torch.equal(on_gpu.cpu(), dequantize(packed, dtype))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_gradients_are_the_cpus(family):
    batches = batches_of([(2, 17), (1, 9)])
    model = model_of(FAMILIES[family])
    loss = LayerEngine(model).step(batches, 20.0, ActivationPolicy(2))
    true = gradients(model)
    model.to("cuda")
    engine, reason = choose_engine(model, "cuda")
    assert isinstance(engine, LayerEngine), reason
    on_gpu = [Batch(b.input_ids.cuda(), b.labels.cuda()) for b in batches]
    got = engine.step(on_gpu, 20.0, ActivationPolicy(2))
    assert float(got) == pytest.approx(float(loss), rel=1e-4)
    for name, gradient in gradients(model).items():
        scale = max(1.0, float(true[name].abs().max()))
        assert (gradient.cpu() - true[name]).abs().max() <= 1e-4 * scale, name


def test_the_adapters_learn_in_bfloat16():
    model = model_of(FAMILIES["llama"], dtype=torch.bfloat16).to("cuda")
    engine = LayerEngine(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    (batch,) = batches_of([(4, 33)])
    batch = Batch(batch.input_ids.cuda(), batch.labels.cuda())
    count = float((batch.labels != -100).sum())
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(float(engine.step([batch], count, ActivationPolicy(1))))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
