"""Mixtures of experts on a GPU, against transformers' own classes in float64."""

import copy

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

from halfbyte.layers.experts import freeze_experts
from halfbyte.layers.gated_experts import outputs_unread
from halfbyte.linear import experts as linear_experts
from halfbyte.linear.experts import expert_linears
from halfbyte.quant import (
    dequantize,
    empty_like_mxfp4,
    empty_like_quantized,
    quantize,
    quantize_mxfp4,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXPERTS, TOP_K, HIDDEN, INNER = 20, 3, 320, 192
MODULES = {
    "qwen3": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS),
    ),
    "gpt-oss": (
        GptOssExperts,
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS),
    ),
    "without gate": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS),
    ),
}


def modules_of(name, kind, dtype, std=0.05):
    """A module with packed experts, and the same in float64."""
    made, config = copy.deepcopy(MODULES[name])
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    ours, exact = made(config).cuda().to(dtype), made(copy.deepcopy(config)).cuda().double()
    parameters = dict(ours.named_parameters())
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=std)
        parameter.requires_grad_(False)

    def like(_path, shape, transposed):
        if kind == "mxfp4":
            return empty_like_mxfp4(shape[::-1] if transposed else shape, dtype)
        formats = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
        return empty_like_quantized(shape, dtype, **formats) if kind == "nf4" else None

    pack = quantize_mxfp4 if kind == "mxfp4" else quantize
    freeze_experts(ours, like, dtype)
    for path, linear in expert_linears(ours).items():
        weights = parameters[path]
        turned = kind == "mxfp4" and ours.is_transposed
        if kind == "plain":
            linear.weight = torch.nn.Parameter(weights, requires_grad=False)
        for expert, matrix in enumerate(weights if linear.packed else ()):
            stored = (matrix.t() if turned else matrix).contiguous()
            linear.set_packed(expert, pack(stored))
        decoded = linear.decode(0, EXPERTS, dtype).double()
        parameters[path] = decoded.mT if turned else decoded
    for path, value in parameters.items():
        getattr(exact, path).data = value.double()
    return ours, exact.requires_grad_(False)


def inputs_of(tokens, dtype, spread=1.0):
    generator = torch.Generator("cuda").manual_seed(1)
    x, dy = (torch.randn(tokens, HIDDEN, generator=generator, device="cuda") for _ in range(2))
    logits = torch.randn(tokens, EXPERTS, generator=generator, device="cuda")
    logits[:, 3] = -torch.inf  # an expert without rows
    weights, index = (logits * spread).softmax(1).topk(TOP_K)
    return x.to(dtype), dy.to(dtype), weights.to(dtype), index


def results(module, x, dy, weights, index):
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    y = module(leaves[0], index, leaves[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("tokens", [1, 130, 900, 3001])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3", "nf4"),
        ("qwen3", "plain"),
        ("gpt-oss", "nf4"),
        ("gpt-oss", "mxfp4"),
        ("without gate", "nf4"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_and_gradients_are_those_of_float64(tokens, name, kind, dtype, monkeypatch):
    monkeypatch.setattr(linear_experts, "DECODED_BYTES", 7 * 2 * 2 * INNER * HIDDEN)
    ours, exact = modules_of(name, kind, dtype)
    x, dy, weights, index = inputs_of(tokens, dtype)
    got = results(ours, x, dy, weights, index)
    expected = results(exact, x.double(), dy.double(), weights.double(), index)
    # The gradients of one token's three weights are sums that cancel.
    count = 2 if tokens == 1 else 3
    for one, other in list(zip(got, expected, strict=True))[:count]:
        assert one.dtype == dtype
        assert error(one, other) <= torch.finfo(dtype).eps
    for one, other in zip(results(ours, x, dy, weights, index), got, strict=True):
        assert torch.equal(one, other)  # nothing depends on which program is first


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_a_clamped_activation(kind):
    """Of its output only: a gradient jumps where rounding moves a number across the limit."""
    ours, exact = modules_of("gpt-oss", kind, torch.bfloat16, std=0.3)
    x, _, weights, index = inputs_of(900, torch.bfloat16)
    expected = exact(x.double(), index, weights.double())
    assert error(ours(x, index, weights), expected) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_captured_pass_is_the_eager_one_with_another_routing(name):
    dtype = torch.bfloat16
    ours, _ = modules_of(name, "nf4", dtype)
    static = inputs_of(1000, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(ours, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(ours, *static)
    other = inputs_of(1000, dtype, spread=4.0)
    other[3].copy_(EXPERTS - 1 - other[3])
    for tensor, value in zip(static, other, strict=True):
        tensor.copy_(value)
    graph.replay()
    for one, eager in zip(captured, results(ours, *other), strict=True):
        assert torch.equal(one, eager)


def test_an_unread_output_has_the_same_gradients():
    ours, _ = modules_of("gpt-oss", "mxfp4", torch.bfloat16)
    inputs = inputs_of(500, torch.bfloat16)
    _, *expected = results(ours, *inputs)
    with outputs_unread():
        unread, *gradients = results(ours, *inputs)
    assert not unread.any()
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_experts_are_decoded_to_the_bits_of_each(kind):
    ours, _ = modules_of("gpt-oss", kind, torch.bfloat16)
    for linear in expert_linears(ours).values():
        decoded = linear.decode(2, 9, torch.bfloat16)
        for one, packed in zip(decoded, linear.packed[2:9], strict=True):
            assert torch.equal(one, dequantize(packed, torch.bfloat16, impl="torch"))
