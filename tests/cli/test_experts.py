"""Mixtures of experts through the commands: what is printed about them is true."""

import json
from pathlib import Path

import pytest

from halfbyte import cli
from tests.checkpoint.families import tiny_model
from tests.checkpoint.mxfp4_models import write_gpt_oss
from tests.tiny import tiny_tokenizer


def test_adapters_of_experts_and_what_they_are_merged_into_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = write_gpt_oss(tmp_path / "model"), tmp_path / "data.jsonl", tmp_path / "out"
    row = {"prompt": "The capital of France is", "completion": " Paris."}
    data.write_text(f"{json.dumps(row)}\n" * 4)
    words = ["train", "--model", model, "--data", data, "--output", out, "--max-steps", "1"]
    words += ["--target-parameters", "experts,mlp.router.weight", "--device", "cpu"]
    assert cli.main([*map(str, words), "--samples", "0"]) == 0
    printed = capsys.readouterr().err
    assert "trained, on 8 linear layers and 4 weights of experts and 2 routers" in printed
    words = ["merge", model, out, tmp_path / "merged", "--into", "decoded", "--no-measure"]
    assert cli.main([*map(str, words), "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "added to the decoded mxfp4 weights that it was trained on" in printed


def test_a_packed_mixture_is_not_offered_to_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, packed = tmp_path / "model", tmp_path / "packed"
    tiny_model("qwen3_moe", moe_intermediate_size=32, num_experts=4).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    assert cli.main(["quantize", str(model), str(packed), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "transformers does not" in printed.err
    assert "halfbyte chat" in printed.out + printed.err
    assert "vllm" not in printed.out + printed.err
