"""``halfbyte plan`` as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from halfbyte import cli
from halfbyte.checkpoint.base_model import load_base
from halfbyte.models.build import BaseRecipe
from halfbyte.plan import roofline
from tests.checkpoint.quantized_models import gptq, write_quantized_model
from tests.tiny import write_tiny_model

MACHINE = roofline.GpuSpec("a machine", 8e9, 1e11, 1e10, 1e10, 4, "cpu", True)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_machine", lambda: MACHINE)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["plan", *words, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_directory_is_planned_to_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model", tied=False)
    answer = planned(capsys, str(model))
    ways = {way["name"]: way for way in answer["ways"]}
    assert list(ways) == ["32-bit LoRA", "QLoRA", "QLoRA + 4-bit head"]
    for name, recipe in {
        "32-bit LoRA": BaseRecipe("none"),
        "QLoRA": BaseRecipe(),
        "QLoRA + 4-bit head": BaseRecipe(quantize_head=True),
    }.items():
        assert ways[name]["base_bytes"] == load_base(model, recipe).memory_report.total_bytes
        lines = [line for line in ways[name]["ledger"] if line["group"] == "base"]
        assert sum(line["nbytes"] for line in lines) == ways[name]["base_bytes"]
    assert answer["advice"].startswith("Take 32-bit LoRA")


@pytest.mark.parametrize("shape", ["llama2-7b", "Qwen3-8B"])
def test_a_known_shape_on_a_named_card_imports_neither_torch_nor_transformers(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", shape, "--card", "h100", "--json"]
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'transformers', 'numpy'))\n"  # importing raises
        "from halfbyte import cli\n"
        f"sys.exit(cli.main({['plan', *words]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == planned(capsys, *words[:-1])


def test_a_block_size_that_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "llama2-7b", "--card", "h100", "--block-size", "48"]
    assert cli.main(["plan", *words]) == 2
    assert "`block_size`: expected a power of 2 from 32 to 4096, got" in capsys.readouterr().err


def test_config_json_alone_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    by_config = planned(capsys, "--model", str(tmp_path))
    fields = "hidden_size=64,intermediate_size=128,num_hidden_layers=2"
    by_shape = planned(capsys, "--shape", fields)
    assert by_config["ways"] == by_shape["ways"]


def test_a_quantised_model_is_planned_as_what_it_decodes_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write_quantized_model(tmp_path / "gptq", gptq, packing)
    assert cli.main(["plan", str(tmp_path / "gptq"), "--json"]) == 0
    captured = capsys.readouterr()
    note = "its weights are quantised, GPTQ (4 bits, groups of 32), and are decoded first"
    assert note in " ".join(captured.err.split())
    ways = {way["name"]: way for way in json.loads(captured.out)["ways"]}
    for name, recipe in {"32-bit LoRA": BaseRecipe("none"), "QLoRA": BaseRecipe()}.items():
        held = load_base(tmp_path / "gptq", recipe).memory_report
        assert ways[name]["base_bytes"] == held.total_bytes


def test_a_person_reads_a_table_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--shape", "llama2-7b", "--gpu-memory", "16GB"]) == 0
    captured = capsys.readouterr()
    assert "seconds are those of T4; --card names another" in " ".join(captured.err.split())
    assert "3,238,002,688" in captured.out
    assert "longest sequence" in captured.out
    assert re.search(r"train with --memory-budget 1[345](\.\d)?GB", captured.out)
    assert "Take QLoRA (--quant nf4)" in captured.out
    assert max(len(line) for line in captured.out.splitlines()) <= 80


def test_a_gpu_that_packs_takes_any_batch_and_needs_more_than_the_peak(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--shape", "llama2-7b", "--card"]
    assert cli.main(["plan", *words, "4090"]) == 0
    packed = capsys.readouterr().out
    assert cli.main(["plan", *words, "t4"]) == 0
    apart = capsys.readouterr().out
    assert re.search(r"largest batch( +any)+", packed)
    assert re.search(r"largest batch( +(\d+|–))+", apart)
    assert "needs, GB" in packed
    assert "needs, GB" not in apart
    # Eight examples of 1024 tokens are one part, of which all is on its way together.
    for card in ("h100", "b200"):
        way = {way["name"]: way for way in planned(capsys, *words, card)["ways"]}["QLoRA + offload"]
        small = planned(capsys, *words, card, "--gpu-memory", "8GB")["ways"][2]
        assert way["needed_bytes"] > way["peak_bytes"]
        assert small["offloaded_layers"] > 0
        layers, checkpoints = small["offloaded_layers"], small["attention_checkpoints"]
        assert (checkpoints == layers) == (card == "h100")
        assert checkpoints > 0
        assert small["host_bytes"] - 262_144_000 == (
            8192 * (layers * 8192 + checkpoints * (2 * 8192 + 128))
        )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give either `model` or `shape`"),
        (["here", "--shape", "llama2-7b"], "give either `model` or `shape`"),
        (["--shape", "llama2-7b", "--card", "abacus"], "--card: expected one of"),
        (["--shape", "llama2-7b", "--gpu-memory", "much"], "expected a size such as 16GB"),
        (["--shape", "llama2-7b", "--gpu-memory", "24"], "24 has no unit; write 24GB or 24GiB"),
        (["--shape", "llama0"], "is not known"),
        (["--shape", "llama2-7b", "--block-size", "100"], "100"),
        (["--shape", "llama2-7b", "--target-modules", "q_proj,qkv"], "not have: qkv; it has: down"),
    ],
)
def test_what_cannot_be_planned_is_told(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    assert says in capsys.readouterr().err


def test_what_train_refuses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "model_type=bert,hidden_size=64,num_hidden_layers=1,num_attention_heads=2"
    assert cli.main(["plan", "--shape", shape, "--card", "4090"]) == 2
    assert "which sees the tokens it should predict" in capsys.readouterr().err
    model = write_tiny_model(tmp_path / "model")
    words = ["plan", str(model), "--card", "4090", "--target-modules", "query_key_value"]
    assert cli.main(words) == 2
    assert "target_modules names what this model does not have" in capsys.readouterr().err


def test_a_mixture_says_what_a_token_goes_through_and_each_format_s_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for shape, parts in {
        "qwen3-30b-a3b": (
            "30.53 B parameters",
            "a token goes through 8 of 128 in 48 layers, 3.35 B of its parameters",
            "61.06 GB in 16 bits",
            "16.69 GB in NF4 with double quantisation",
        ),
        "gpt-oss-20b": (
            "a token goes through 4 of 32 in 24 layers",
            "13.76 GB with its experts in MXFP4, as published",
        ),
    }.items():
        assert cli.main(["plan", "--shape", shape, "--card", "4090"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        for part in parts:
            assert part in text
