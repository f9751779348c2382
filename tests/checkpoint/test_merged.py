"""A merged model computes, in transformers, what base and adapter compute here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.checkpoint.base_model import LoadedBase, load_base
from halfbyte.checkpoint.merged import write_merged
from halfbyte.errors import OutputError
from halfbyte.lora import LoRAConfig, adapter_state, attach, load_adapter_state
from halfbyte.model.build import BaseRecipe, frozen_linears
from tests.tiny import write_tiny_model

PROMPT = torch.arange(3, 43)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits  # type: ignore[no-any-return]


def adapted(tmp_path: Path, *, quant: Any = "nf4", tied: bool = True) -> LoadedBase:
    directory = write_tiny_model(tmp_path / "base", tied=tied)
    loaded = load_base(directory, BaseRecipe(quant=quant))
    attach(loaded.model, LoRAConfig(r=4, target_modules=("q_proj", "down_proj")), seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(loaded.model).items()
    }
    load_adapter_state(loaded.model, state)
    return loaded


@pytest.mark.parametrize("quant", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_computes_what_was_trained(tmp_path: Path, quant: str, tied: bool) -> None:
    loaded = adapted(tmp_path, quant=quant, tied=tied)
    expected = logits(loaded.model)
    seen: list[tuple[int, int]] = []
    out = write_merged(
        loaded.model,
        loaded.tokenizer,
        loaded.model.config,
        tmp_path / "out",
        torch.float32,
        progress=lambda done, total: seen.append((done, total)),
        shard_bytes=100_000,
    )
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 120_000 for file in files)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert logits(merged).sub(expected).abs().max() < 1e-5
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in merged.parameters())
    # The model in memory is what it was, and its adapter did make a difference.
    assert logits(loaded.model).equal(expected)
    untrained = load_base(tmp_path / "base", BaseRecipe(quant=quant)).model  # type: ignore[arg-type]
    assert logits(untrained).sub(expected).abs().max() > 1e-2


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    loaded = adapted(tmp_path)
    out = write_merged(loaded.model, loaded.tokenizer, loaded.model.config, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16
    path = "model.layers.1.mlp.down_proj"
    linear = frozen_linears(loaded.model)[path]
    adapter: Any = linear.adapter
    exact = linear.decode(torch.float32).double() + adapter.config.scaling * (
        adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    )
    weight = merged.get_submodule(path).weight.detach()
    # Half a unit in the last place, and float32's own rounding of the sum.
    assert (weight.double() - exact).abs().le(exact.abs() * (2**-8 + 2**-20) + 1e-9).all()


def test_it_is_a_directory_like_any_other(tmp_path: Path) -> None:
    loaded = adapted(tmp_path)
    out = write_merged(loaded.model, loaded.tokenizer, loaded.model.config, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert (out / "generation_config.json").exists()
    assert load_base(out, BaseRecipe()).model.config.tie_word_embeddings


def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    loaded = adapted(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    arguments = (loaded.model, loaded.tokenizer, loaded.model.config, tmp_path / "out")
    with pytest.raises(OutputError, match="it exists already"):
        write_merged(*arguments)
    assert (tmp_path / "out" / "precious").exists()
    write_merged(*arguments, replace=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
