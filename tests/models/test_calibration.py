"""Mean squares of the linears' inputs, against those that hooks on transformers' model see."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.checkpoint.base_model import load_base
from halfbyte.linear.lora import frozen_linears
from halfbyte.models.build import BaseRecipe
from halfbyte.models.calibration import TEXT, input_moments
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_the_inputs(tmp_path: Path, *, tied: bool) -> None:
    directory = write_tiny_model(tmp_path / "model", tied=tied)
    base = load_base(directory, BaseRecipe(quant="none"))
    found = input_moments(base.model, base.tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs: dict[str, list[torch.Tensor]] = {}
    for path, module in theirs.named_modules():
        if isinstance(module, nn.Linear):
            seen = inputs.setdefault(f"{path}.weight", [])
            module.register_forward_pre_hook(
                lambda _, x, seen=seen: seen.append(x[0].flatten(0, 1))
            )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
    ids = [token for text in paragraphs for token in tokenizer(text + "\n\n")["input_ids"]]
    with torch.no_grad():
        for part in torch.tensor(ids).split(512):
            theirs(input_ids=part[None])
    if tied:
        inputs["model.embed_tokens.weight"] = inputs["lm_head.weight"]
    assert found.keys() == inputs.keys()
    for name, parts in inputs.items():
        torch.testing.assert_close(
            found[name], torch.cat(parts).square().mean(0), rtol=1e-4, atol=0
        )


def test_nothing_is_left_behind(directory: Path) -> None:
    base = load_base(directory, BaseRecipe())
    before = input_moments(base.model, base.tokenizer)
    assert not any(m._forward_pre_hooks for m in frozen_linears(base.model).values())
    after = input_moments(base.model, base.tokenizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
