"""What lies between the products, fused, on a GPU: against its plain version and float64."""

import pytest
import torch

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.layers import elementwise
from halfbyte.layers.elementwise import (
    add_rms_norm,
    qk_norm_rotary,
    rms_norm,
    rms_norm_beside,
    rotary,
    swiglu,
)
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def drawn(*shape, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def results(function, inputs, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    given = [drawn(*o.shape, dtype=torch.bfloat16, seed=9 + i) for i, o in enumerate(outs)]
    grads = torch.autograd.grad(
        outs, leaves, [g.to(o.dtype) for g, o in zip(given, outs, strict=True)]
    )
    return [t.detach() for t in (*outs, *grads)]


def check(function, inputs, monkeypatch):
    """The kernels are no further from float64 than the plain versions are."""
    kernels = results(function, inputs, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "_kernels", lambda _: None)
        plain = results(function, inputs, torch.bfloat16)
        exact = results(function, inputs, torch.float64)
    for one, other, true in zip(kernels, plain, exact, strict=True):
        scale = true.double().norm()
        error = (one.double() - true.double()).norm() / scale
        assert error <= 1.1 * (other.double() - true.double()).norm() / scale + 1e-4


@pytest.mark.parametrize("shape", [(2, 300, 4096), (1, 7, 576), (3, 5, 130), (70000, 8)])
def test_norms(shape, monkeypatch):
    x, r = (drawn(*shape, dtype=torch.bfloat16, seed=i) for i in range(2))
    weight = drawn(shape[-1], dtype=torch.bfloat16, seed=2)

    def alone(x):
        return rms_norm(x, weight.to(x.dtype), 1e-5)

    def added(x, r):
        return add_rms_norm(x, r, weight.to(x.dtype), 1e-5)

    def beside(x):
        return rms_norm_beside(x, weight.to(x.dtype), 1e-5)

    check(alone, [x], monkeypatch)
    check(beside, [x], monkeypatch)
    check(added, [x, r], monkeypatch)


@pytest.mark.parametrize("heads", [1, 9, 32])
def test_turns(heads, monkeypatch):
    x = drawn(2, 129, heads * 64 + 32, dtype=torch.bfloat16)
    angle = torch.arange(129, device="cuda")[None, :, None] / 7.0 ** torch.arange(32, device="cuda")
    cos, sin = (t.repeat(1, 1, 2).bfloat16() for t in (angle.cos(), angle.sin()))

    def turn(x):
        x = x * 1  # a leaf may not be written over
        q = x[..., : heads * 64].view(2, 129, heads, 64)
        k = x[..., 32 : heads * 64 + 32].view(2, 129, heads, 64) * 2
        return rotary(q, k, cos.to(x.dtype), sin.to(x.dtype))

    check(turn, [x], monkeypatch)


@pytest.mark.parametrize(
    ("tokens", "q_heads", "k_heads", "size"),
    [(4099, 32, 4, 128), (129, 16, 8, 128), (130, 40, 8, 96), (7, 1, 1, 80), (1000, 3, 1, 8)],
)
def test_normed_turns(tokens, q_heads, k_heads, size, monkeypatch):
    widths = [heads * size for heads in (q_heads, k_heads, k_heads)]
    product = 3 * drawn(2, tokens, sum(widths), dtype=torch.bfloat16)
    weights = [drawn(size, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    half = size // 2
    at = torch.arange(2 * tokens, device="cuda").view(2, tokens, 1)  # each sequence has its own
    angle = at / 7.0 ** (torch.arange(half, device="cuda") / half)
    cos, sin = (t.repeat(1, 1, 2).bfloat16() for t in (angle.cos(), angle.sin()))

    def turn(product):
        q, k, v = (part.unflatten(-1, (-1, size)) for part in product.split(widths, -1))
        same = [t.to(product.dtype) for t in (*weights, cos, sin)]
        return *qk_norm_rotary(q, k, *same[:2], 1e-6, 1e-5, *same[2:]), v

    check(turn, [product], monkeypatch)


@pytest.mark.parametrize("size", [11008, 1536, 7])
def test_gates(size, monkeypatch):
    both = drawn(2, 65, 2 * size, dtype=torch.bfloat16)
    # Not of a leaf's own memory, which backward writes over.
    check(lambda both: swiglu(*torch.split(both * 1, size, -1)), [both], monkeypatch)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_step_through_fused_layers_is_the_cpus(family):
    batches = batches_of([(2, 17), (1, 9)])
    model = model_of(FAMILIES[family])
    loss = LayerEngine(model).step(batches, 20.0, ActivationPolicy(2))
    true = gradients(model)
    model.to("cuda")
    engine = LayerEngine(model, fuse=True)
    assert engine.fused == 3
    on_gpu = [type(b)(b.input_ids.cuda(), b.labels.cuda()) for b in batches]
    got = engine.step(on_gpu, 20.0, ActivationPolicy(1))
    assert float(got) == pytest.approx(float(loss), rel=1e-4)
    for name, gradient in gradients(model).items():
        scale = max(1.0, float(true[name].abs().max()))
        assert (gradient.cpu() - true[name]).abs().max() <= 1e-4 * scale, name
