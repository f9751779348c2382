"""The experts of a layer as one operation, in Triton's interpreter, against float64."""

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

from halfbyte.layers import gated_experts
from halfbyte.layers.experts import freeze_experts
from halfbyte.linear import experts as linear_experts
from halfbyte.linear.glu import Glu
from halfbyte.quant import empty_like_quantized, quantize

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)
_MODULES: dict[str, Any] = {
    "qwen3": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=5),
    ),
    "gpt-oss": (
        GptOssExperts,
        GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=5),
    ),
    "without gate": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=64, moe_intermediate_size=32, n_routed_experts=5),
    ),
}


def _module(kind: str, dtype: torch.dtype) -> nn.Module:
    made, config = copy.deepcopy(_MODULES[kind])
    config._experts_implementation = "eager"
    module: nn.Module = made(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        parameter.requires_grad_(False)
    return module.to(dtype)


def _packed(module: nn.Module) -> dict[str, Tensor]:
    """Pack the linears of a module; the decoded weights, in float64."""
    values = {n: p.detach().clone() for n, p in module.named_parameters() if p.dim() == 3}

    def like(_path: str, shape: tuple[int, int], _transposed: bool) -> Any:
        return empty_like_quantized(
            shape, torch.float16, quant_type="nf4", block_size=32, double_quant=True
        )

    freeze_experts(module, like, torch.float16)  # type: ignore[arg-type]
    decoded = {}
    for name, value in values.items():
        linear: Any = getattr(module, name)
        for expert, matrix in enumerate(value):
            linear.set_packed(expert, quantize(matrix, block_size=32))
        decoded[name] = linear.decode(0, len(value), torch.float16).double()
    return decoded


def _close(got: Tensor, exact: Tensor) -> bool:
    """Within a few roundings of float16."""
    return bool((got.double() - exact).norm() <= 3 * 2**-11 * exact.norm())


@interpreted
# NumPy says so of rows that are not written yet: a tile is computed whole.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_forward_and_backward_are_those_of_float64(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip(
        "halfbyte.linear.triton_experts", reason="needs Triton", exc_type=ImportError
    )
    module, exact = _module(kind, torch.float16), _module(kind, torch.float64)
    for name, decoded in _packed(module).items():
        getattr(exact, name).data = decoded
    for name in ("gate_up_proj_bias", "down_proj_bias") if kind == "gpt-oss" else ():
        getattr(exact, name).data = getattr(module, name).double()
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(9, 64, generator=generator).half() for _ in range(2))
    weights, index = torch.randn(9, 4, generator=generator).softmax(1).topk(2)  # none to the last

    def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        y = module(inputs[0], index, inputs[1])
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]

    monkeypatch.setattr(linear_experts, "DECODED_BYTES", 2 * 2 * 64 * 64)  # two experts, or four
    for place in (gated_experts, linear_experts):
        monkeypatch.setattr(place, "expert_kernels", lambda _: kernels)
    launched = []
    sum_over_k = kernels.sum_over_k
    monkeypatch.setattr(
        kernels, "sum_over_k", lambda *args: launched.append(args) or sum_over_k(*args)
    )
    got, expected = results(module, torch.float16), results(exact, torch.float64)
    assert len(launched) == 2
    assert got[2].dtype == torch.float16
    for one, other in zip(got, expected, strict=True):
        assert _close(one, other)
    with gated_experts.outputs_unread():
        unread, *gradients = results(module, torch.float16)
    assert not unread.any()
    for one, other in zip(gradients, got[1:], strict=True):
        assert torch.equal(one, other)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_the_rows_of_one_expert_at_a_time_give_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip(
        "halfbyte.linear.triton_experts", reason="needs Triton", exc_type=ImportError
    )
    for place in (gated_experts, linear_experts):
        monkeypatch.setattr(place, "expert_kernels", lambda _: kernels)
    module: Any = _module(kind, torch.float16)
    _packed(module)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(9, 64, generator=generator).half() for _ in range(2))
    weights, index = torch.randn(9, 5, generator=generator).softmax(1).topk(3)
    index[:, 0], index[:, 1], index[:, 2] = 1, torch.arange(9) % 2 * 3, 4  # 1 and 4 have all tokens
    index[3, 2] = 5  # no expert
    sizes, gated_backward = list[int](), kernels.gated_backward

    def recorded(h: Tensor, d_inner: Tensor, *args: Any, **kwargs: Any) -> None:
        assert len(h) == len(d_inner)
        sizes.append(len(h))
        gated_backward(h, d_inner, *args, **kwargs)

    monkeypatch.setattr(kernels, "gated_backward", recorded)

    def results(experts: int) -> list[Tensor]:
        sizes.clear()
        for linear in (module.gate_up_proj, module.down_proj):
            linear.decoded_bytes = experts * 2 * 64 * 64
        inputs = [x.clone().requires_grad_(), weights.half().requires_grad_()]
        y = module(inputs[0], index, inputs[1])
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    expected = results(5)
    assert sizes == [27]
    assert all(one.isfinite().all() for one in expected)
    for experts, launched in ((1, [9] * 5), (2, [18] * 3)):
        for one, other in zip(results(experts), expected, strict=True):
            assert torch.equal(one, other)
        assert sizes == launched


def test_buffers_have_rows_for_all_where_a_token_may_have_an_expert_twice() -> None:
    module: Any = _module("qwen3", torch.float16)
    _packed(module)
    for linear in (module.gate_up_proj, module.down_proj):
        linear.decoded_bytes = 1  # one expert at a time
    experts = gated_experts._experts_of(module)
    assert experts is not None
    index = torch.tensor([[1, 1, 4]] * 9)  # 18 rows of expert 1
    assert gated_experts._blocks(experts, index, torch.float16)[1] == 9
    module.__class__ = type("DeepseekV4Experts", (type(module),), {})
    experts = gated_experts._experts_of(module)
    assert experts is not None
    blocks, rows = gated_experts._blocks(experts, index, torch.float16)
    assert (len(blocks), rows) == (1, 27)


@pytest.mark.parametrize(
    ("kind", "expected"), [("qwen3", Glu()), ("gpt-oss", Glu(True, 7.0, 1.702, 1.0))]
)
def test_the_activation_of_a_module_is_recognised(kind: str, expected: Glu) -> None:
    module: Any = _module(kind, torch.float32)
    assert gated_experts.glu_of(module) == expected
    other: Any = _module(kind, torch.float32)
    other._apply_gate = lambda h: torch.tanh(h[..., ::2]) * h[..., 1::2]
    assert gated_experts.glu_of(other) is None
    wide: Any = _module("gpt-oss", torch.float32)
    wide.limit = 70.0
    assert gated_experts.glu_of(wide) == Glu(True, 70.0, 1.702, 1.0)
    trained: Any = _module("qwen3", torch.float32)
    trained.act_fn = nn.PReLU()
    assert gated_experts.glu_of(trained) is None


def test_what_is_computed_otherwise_is_left_to_separate_operations() -> None:
    assert gated_experts._experts_of(_module("without gate", torch.float16)) is None
    module: Any = _module("gpt-oss", torch.float16)
    _packed(module)
    assert gated_experts._experts_of(module) is not None
    module.down_proj_bias.requires_grad_()
    assert gated_experts._experts_of(module) is None
    module.down_proj_bias.requires_grad_(False)
    module.gate_up_proj.adapter = nn.Identity()
    assert gated_experts._experts_of(module) is None
    assert gated_experts.gated_experts(module, torch.zeros(2, 64), *[torch.zeros(2, 2)] * 2) is None


_TINY = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1},
}
_MODELS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "glm4_moe": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
        **{"first_k_dense_replace": 0, "n_shared_experts": 1},
    },
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
        **{"first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_shared_experts": 1},
    },
}


def _tiny(kind: str) -> Any:
    changes = _TINY | _MODELS[kind]
    if kind == "deepseek_v3":
        del changes["head_dim"]
    config = AutoConfig.for_model(kind, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("kind", _MODELS)
def test_no_gradient_of_a_layer_that_ends_with_experts_depends_on_their_output(kind: str) -> None:
    model = _tiny(kind)
    layer = model.model.layers[0]
    assert gated_experts.ends_with_experts(layer)
    (experts,) = [m for m in layer.modules() if hasattr(m, "is_transposed")]
    ids = torch.arange(12)[None]
    given: dict[str, Any] = {}
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    model(ids, use_cache=False)
    x, *args = given["args"]
    found = []
    for unread in (False, True):
        if unread:
            experts.register_forward_hook(lambda _module, _args, y: y - y.detach())
        leaves = [x.detach().clone().requires_grad_(), *layer.parameters()]
        y = layer(leaves[0], *args, **given["kwargs"])
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        found.append((y.detach(), torch.autograd.grad(y, leaves, dy, allow_unused=True)))
    (one, gradients), (other, expected) = found
    assert not torch.equal(one, other)
    assert set(map(type, gradients)) <= {Tensor, type(None)}
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert torch.equal(got, wanted)


def test_other_layers_compute_what_their_experts_return() -> None:
    assert not gated_experts.ends_with_experts(nn.Linear(2, 2))
