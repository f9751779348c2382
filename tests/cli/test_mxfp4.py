"""gpt-oss in MXFP4 through the commands: trained, merged, read back, and described truly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import cli
from tests.checkpoint.mxfp4_models import write_gpt_oss


def test_it_is_trained_and_merged_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = write_gpt_oss(tmp_path / "model"), tmp_path / "data.jsonl", tmp_path / "out"
    row = {"prompt": "The capital of France is", "completion": " Paris."}
    data.write_text(f"{json.dumps(row)}\n" * 4)
    words = ["train", "--model", model, "--data", data, "--output", out, "--max-steps", "2"]
    words += ["--learning-rate", "0.01", "--lora-r", "4", "--warmup-steps", "0", "--device", "cpu"]
    words += ["--samples", "0"]
    assert cli.main([str(word) for word in words]) == 0
    told = capsys.readouterr().err
    assert "are in MXFP4; they are used as they are" in told
    card = (out / "README.md").read_text()
    assert "trained with halfbyte: LoRA on a base with experts in MXFP4." in card
    assert json.loads((out / "halfbyte.json").read_text())["recipe"]["experts"] == "mxfp4"
    merged = tmp_path / "merged"
    words = ["merge", model, out, merged, "--verify", "--data", data, "--device", "cpu"]
    capsys.readouterr()
    assert cli.main([*map(str, words), "--min-agreement", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["into"] == "decoded"
    assert found["distances"].keys() == {"decoded", "no adapter"}
    before, after = (load_file(path / "model.safetensors") for path in (model, merged))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if ".experts." in name)


def test_it_is_not_quantised_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_gpt_oss(tmp_path / "model")
    assert cli.main(["quantize", str(model), str(tmp_path / "packed")]) == 2
    assert "already packed in 4 bits" in capsys.readouterr().err
