"""The commands on models of more than text: trained and merged, or refused before anything else."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from halfbyte import cli
from halfbyte.checkpoint.peft import save_adapter
from halfbyte.linear.lora import LoRAConfig
from tests.multimodal import write_multimodal
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    row = {"prompt": "Where?", "completion": "Paris"}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_decoder_is_trained_and_merged_into_the_whole_model(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter, merged = tmp_path / "model", tmp_path / "adapter", tmp_path / "merged"
    whole = write_multimodal(model, "gemma3")
    options = f"--model {model} --data {data} --output {adapter} --quant none --max-steps 2"
    fast = "--learning-rate 0.05 --warmup-steps 0 --compute-dtype float32 --device cpu"
    assert cli.main(["train", *options.split(), *fast.split()]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "only the text decoder of Gemma3ForConditionalGeneration is loaded; its enc" in said
    assert cli.main(["plan", str(model), "--card", "4090"]) == 0
    assert "only the text decoder of Gemma3" in " ".join(capsys.readouterr().err.split())
    options = "--no-measure --into decoded --dtype float32 --device cpu"
    assert cli.main(["merge", str(model), str(adapter), str(merged), *options.split()]) == 0

    theirs = AutoModelForImageTextToText.from_pretrained(merged)
    base = AutoModelForImageTextToText.from_pretrained(model)
    assert type(theirs) is type(base) is type(whole)
    live = peft.PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(logits(theirs), logits(live), rtol=0, atol=1e-4)
    assert not torch.allclose(logits(live), logits(whole), atol=1e-3)
    for checkpoint in adapter.glob("checkpoint-*"):
        fields = json.loads((checkpoint / "adapter_config.json").read_text())
        paths = fields["target_modules"]
        assert all(path.startswith("model.language_model.layers.") for path in paths)


COMMANDS = {
    "plan": "{model}",
    "train": "--model {model} --data {data} --output {out}",
    "eval": "--model {model} --data {data}",
    "generate": "--model {model} --prompt hi",
    "quantize": "{model} {out}",
    "merge": "{model} {adapter} {out}",
    "export": "{model} {out}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_families_are_refused_in_one_sentence(
    tmp_path: Path, data: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter, out = tmp_path / "model", tmp_path / "adapter", tmp_path / "out"
    config: Any = AutoConfig.for_model("paligemma")
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    config.save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    # Not its weights: that would be the next complaint.
    safetensors.torch.save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    state = {f"q_proj.lora_{factor}.weight": torch.zeros(1, 1) for factor in "AB"}
    save_adapter(adapter, state, LoRAConfig(r=1), base={"name": "m"}, recipe={})
    words = COMMANDS[command].format(model=model, adapter=adapter, data=data, out=out)
    assert cli.main([command, *words.split()]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "PaliGemmaForConditionalGeneration cannot be trained: the tokens of" in said
    assert "Traceback" not in said
    assert not out.exists()
