"""Adapters of experts and routers in a merged model: PEFT's merged weights, and the live logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.merged import Merged, write_merged
from halfbyte.checkpoint.peft import save_adapter
from halfbyte.data import Example
from halfbyte.linear.expert_lora import ExpertLoRA
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.lora import (
    LoRAConfig,
    adapter_state,
    attach,
    in_peft_terms,
    load_adapter_state,
)
from halfbyte.models.build import BaseRecipe
from halfbyte.tools.merge_evaluation import distances, reference
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "mlp.gate.weight",
        {
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
        },
    ),
    "gpt_oss": (
        "mlp.router.weight",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
}
IDS = torch.randint(3, 390, (2, 14), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", _FAMILIES)
def test_what_is_merged_is_what_peft_merges(family: str, tmp_path: Path) -> None:
    router, changes = _FAMILIES[family]
    directory, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    tiny_tokenizer().save_pretrained(directory)
    tiny_model(family, **changes).save_pretrained(directory)
    base = load_base(directory, BaseRecipe(quant="none"))
    config = LoRAConfig(r=2, alpha=4, target_parameters=("experts", router))
    adapted = attach(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(base.model).items()
    }
    load_adapter_state(base.model, state)
    in_peft = in_peft_terms(base.model, config, adapted)
    save_adapter(adapter_dir, state, in_peft, base={"name": "x"}, recipe={})
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, adapter_dir).merge_and_unload().state_dict()

    candidate = Merged(open_base(directory), base.model, "decoded", torch.float32)
    for parameter in candidate.parameters:
        value = candidate.tensor(parameter.name)
        assert isinstance(value, torch.Tensor)
        torch.testing.assert_close(value, theirs[parameter.name], rtol=1e-5, atol=1e-6)

    # Measured against the live adapter it is the same; the base is not, nor has it changed.
    examples = [Example(ids, ids >= 0, 1) for ids in IDS.int().numpy()]
    live = reference(base.model, examples)
    found = distances(base.model, {"decoded": candidate}, live)
    assert found["decoded"].kl < 1e-8
    assert found["no adapter"].kl > 1e-3
    with torch.no_grad():
        logits = base.model(input_ids=IDS, use_cache=False).logits
    written = write_merged(candidate, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("into", ["decoded", "original"])
def test_an_update_is_added_to_decoded_or_to_original_experts(into: Any, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    _, changes = _FAMILIES["qwen3_moe"]
    model = tiny_model("qwen3_moe", **changes)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path, BaseRecipe())
    attach(base.model, LoRAConfig(r=2, target_parameters=("experts",)), seed=0)
    candidate = Merged(open_base(tmp_path), base.model, into, torch.float32)
    for path, linear in expert_linears(base.model).items():
        assert isinstance(linear.adapter, ExpertLoRA)
        torch.nn.init.normal_(linear.adapter.lora_B)
        held = linear.decode(0, linear.num_experts, torch.float32)
        original = model.get_parameter(path).detach()
        assert not torch.equal(held, original)
        merged = candidate.tensor(path)
        assert isinstance(merged, torch.Tensor)
        for expert, weight in enumerate(original if into == "original" else held):
            change = linear.adapter.delta(expert)
            assert change.abs().max() > 0.01
            torch.testing.assert_close(merged[expert], weight + change)
