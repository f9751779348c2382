"""Adapters of experts, routers and shared experts: PEFT's tensors, logits and gradients.

The oracle is transformers' model with PEFT's ``target_parameters``; its warnings are errors here.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint.base_model import LoadedBase, load_base, open_base
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.linear.lora import (
    LoRAConfig,
    adapter_parameters,
    adapter_state,
    attach,
    in_peft_terms,
    load_adapter_state,
    parameter_adapters,
)
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.ledger import Run, ledger
from halfbyte.plan.model_shape import shape_of
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

_SMALL: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_DEEPSEEK = _SMALL | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": _SMALL | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _SMALL | {"num_experts": 4, "head_dim": 16},
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "interleave_moe_layer_step": 1,
    },
    "nemotron_h": _SMALL
    | {
        "layers_block_type": ["moe", "attention"],
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 16,
        "head_dim": 16,
    },
}
_ROUTERS = {
    "mixtral": "mlp.gate.weight",
    "qwen2_moe": "mlp.gate.weight",
    "qwen3_moe": "mlp.gate.weight",
    "deepseek_v3": "mlp.gate.weight",
    "gpt_oss": "mlp.router.weight",
    "nemotron_h": "mixer.gate.weight",
}
IDS = torch.randint(3, 390, (2, 14), generator=torch.Generator().manual_seed(1))
TARGETS = IDS.roll(-1, 1)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    written: dict[str, Path] = {}

    def directory_of(family: str) -> Path:
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            tiny_tokenizer().save_pretrained(written[family])
            tiny_model(family, **_FAMILIES[family]).save_pretrained(written[family])
        return written[family]

    return directory_of


def base_of(directory: Path) -> LoadedBase:
    return load_base(directory, BaseRecipe(quant="none"))


def filled(model: Any, config: LoRAConfig) -> LoRAConfig:
    """Attach an adapter that changes something; return its configuration in PEFT's terms."""
    adapted = attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    return in_peft_terms(model, config, adapted)


def loss_of(model: Any) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=IDS, use_cache=False).logits
    return logits.detach(), nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())


def require_same(model: Any, theirs: Any) -> None:
    """Compare logits and the gradients of all adapters."""
    (got, loss), (expected, other) = loss_of(model), loss_of(theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    other.backward()
    wanted = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    own = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    assert own.keys() == wanted.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", _FAMILIES)
def test_peft_loads_ours_with_the_same_logits_and_gradients(
    family: str, directories: Any, tmp_path: Path
) -> None:
    base = base_of(directories(family))
    parameters = ("experts", _ROUTERS[family]) if family in _ROUTERS else ("experts",)
    config = LoRAConfig(r=3, alpha=5, target_parameters=parameters)
    in_peft = filled(base.model, config)
    state = adapter_state(base.model)
    save_adapter(tmp_path, state, in_peft, base={"name": "x"}, recipe={})
    plain = AutoModelForCausalLM.from_pretrained(directories(family), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    held = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert held.keys() == {f"base_model.model.{name}" for name in state}
    require_same(base.model, theirs)

    # And it is ours again.
    logits = loss_of(base.model)[0]
    attach(base.model, LoRAConfig(), seed=0)
    load_adapter(tmp_path).put_on(base.model)
    assert torch.equal(loss_of(base.model)[0], logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_we_load_peft_s_with_the_same_logits_and_gradients(
    family: str, directories: Any, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(directories(family), dtype=torch.float32)
    options: dict[str, Any] = {"target_modules": ["o_proj"]}
    if family == "qwen3_moe":  # the names of transformers 4, which PEFT converts; ranks are doubled
        options = {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}
    else:
        options["target_parameters"] = ["experts.down_proj", _ROUTERS[family]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, lora_alpha=3, init_lora_weights=False, task_type="CAUSAL_LM", **options
        )
        with pytest.warns(RuntimeWarning) if family == "qwen3_moe" else _no_warning():
            theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path)
    base = base_of(directories(family))
    adapter = load_adapter(tmp_path)
    adapter.require_layers_of(open_base(directories(family)).skeleton)
    adapter.put_on(base.model)
    ranks = {one.r for one in parameter_adapters(base.model).values()}
    assert ranks == ({2, 4} if family == "qwen3_moe" else {2})
    require_same(base.model, theirs)


class _no_warning:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_a_shared_expert_has_the_rank_of_its_pattern_in_peft(
    directories: Any, tmp_path: Path
) -> None:
    """PEFT looks under the parameter's path; that it warns of such a key is a mistake of its."""
    base = base_of(directories("deepseek_v3"))
    config = LoRAConfig(
        r=2,
        target_modules=r".*(q_a_proj|mlp.*(up|down)_proj)",
        rank_pattern={"down_proj": 4},
        alpha_pattern={"0.mlp.up_proj": 7},
    )
    in_peft = filled(base.model, config)
    assert set(in_peft.target_parameters) == {
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    }
    save_adapter(tmp_path, adapter_state(base.model), in_peft, base={"name": "x"}, recipe={})
    plain = AutoModelForCausalLM.from_pretrained(directories("deepseek_v3"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    require_same(base.model, theirs)
    logits = loss_of(base.model)[0]
    load_adapter(tmp_path).put_on(base_of(directories("deepseek_v3")).model)
    attach(base.model, LoRAConfig(), seed=0)
    load_adapter(tmp_path).put_on(base.model)
    assert torch.equal(loss_of(base.model)[0], logits)


def test_an_adapter_of_only_experts_has_no_modules(directories: Any, tmp_path: Path) -> None:
    base = base_of(directories("qwen3_moe"))
    config = LoRAConfig(target_modules=(), target_parameters=("experts.down_proj",))
    in_peft = filled(base.model, config)
    assert (in_peft.target_modules, in_peft.target_parameters) == ((), ("mlp.experts.down_proj",))
    save_adapter(tmp_path, adapter_state(base.model), in_peft, base={"name": "x"}, recipe={})
    plain = AutoModelForCausalLM.from_pretrained(directories("qwen3_moe"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    require_same(base.model, theirs)


def test_an_adapter_of_experts_does_not_fit_a_model_without(
    directories: Any, tmp_path: Path
) -> None:
    base = base_of(directories("qwen3_moe"))
    in_peft = filled(base.model, LoRAConfig(target_parameters=("experts",)))
    save_adapter(tmp_path, adapter_state(base.model), in_peft, base={"name": "x"}, recipe={})
    other = open_base(write_tiny_model(tmp_path / "llama"))
    with pytest.raises(
        CheckpointError, match=r"does not fit this model, which does not have .*exp"
    ):
        load_adapter(tmp_path).require_layers_of(other.skeleton)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ("mlp.nothing",)}, r"does not have.*: mlp.nothing; it has: .*gate"),
        ({"target_parameters": ("embed_tokens.weight",)}, "or what cannot get an adapter: embed"),
        ({"target_parameters": ("experts",), "dropout": 0.1}, "excludes lora_dropout"),
        ({"target_parameters": ("experts",), "use_dora": True}, "excludes lora_dropout"),
        (
            {"target_parameters": ("mlp.gate.weight",), "modules_to_save": ("mlp.gate",)},
            "both name model.layers.0.mlp.gate",
        ),
        ({"modules_to_save": ("down_proj",)}, r"frozen; give them adapters \(target_parameters\)"),
    ],
)
def test_what_cannot_be_a_target_is_told(
    changes: dict[str, Any], message: str, directories: Any
) -> None:
    model = base_of(directories("qwen3_moe")).model
    with pytest.raises(ConfigError, match=message):
        attach(model, LoRAConfig(**changes), seed=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_router_is_trained_in_full(family: str, directories: Any, tmp_path: Path) -> None:
    base = base_of(directories(family))
    config = LoRAConfig(r=2, modules_to_save=(_ROUTERS[family].removesuffix(".weight"),))
    in_peft = filled(base.model, config)
    save_adapter(tmp_path, adapter_state(base.model), in_peft, base={"name": "x"}, recipe={})
    plain = AutoModelForCausalLM.from_pretrained(directories(family), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    logits = loss_of(base.model)[0]
    torch.testing.assert_close(loss_of(theirs)[0], logits, rtol=1e-5, atol=1e-5)
    attach(base.model, LoRAConfig(), seed=0)
    load_adapter(tmp_path).put_on(base.model)
    assert torch.equal(loss_of(base.model)[0], logits)


def test_a_router_with_a_buffer_is_not_trained_in_full(directories: Any) -> None:
    """PEFT's copy of the module has DeepSeek's bias of experts, which gradients do not train."""
    model = base_of(directories("deepseek_v3")).model
    with pytest.raises(ConfigError, match="PEFT expects its buffers in the adapter; give it one"):
        attach(model, LoRAConfig(modules_to_save=("mlp.gate",)), seed=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_plan_counts_what_is_trained(family: str, directories: Any) -> None:
    wanted = ("experts", _ROUTERS[family])
    model = base_of(directories(family)).model
    attach(model, LoRAConfig(r=3, target_parameters=wanted), seed=0)
    trained = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    shape = shape_of(open_base(directories(family)).skeleton, family)
    lines = ledger(shape, Run(rank=3, parameters=wanted)).lines
    [nbytes] = [line.nbytes for line in lines if line.name == "their gradients, float32"]
    assert nbytes == 4 * trained
