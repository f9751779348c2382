"""Scaled rotary embeddings go with the adapter to every command that uses it."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from halfbyte import cli
from halfbyte.checkpoint.base_model import open_base
from tests.tiny import tiny_llama, tiny_tokenizer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
SHORT = ("--compute-dtype", "float32", "--device", "cpu")


def call(*words: object) -> None:
    assert cli.main([*map(str, words)]) == 0


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ground = tmp_path_factory.mktemp("ground")
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(ground / "model")
    tokenizer.save_pretrained(ground / "model")
    (ground / "data.jsonl").write_text("\n".join([json.dumps(ROW)] * 8))
    train(ground, ground / "out", "--rope-scaling", "yarn:4")
    return ground


def train(ground: Path, output: Path, *more: object) -> None:
    words = ("--model", ground / "model", "--data", ground / "data.jsonl", "--samples", 0, *SHORT)
    call("train", *words, "--lora-r", 2, "--max-steps", 2, "--output", output, *more)


def card(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "halfbyte.json").read_text())
    return found


def test_the_adapter_has_it_and_one_that_starts_from_it(ground: Path, tmp_path: Path) -> None:
    assert card(ground / "out")["rope_scaling"] == "yarn:4"
    train(ground, tmp_path / "next", "--init-adapter", ground / "out")
    assert card(tmp_path / "next")["rope_scaling"] == "yarn:4"
    train(ground, tmp_path / "plain")
    assert "rope_scaling" not in card(tmp_path / "plain")


def test_eval_scales_as_training_did(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for adapter in (ground / "out", tmp_path / "unscaled"):
        if not adapter.exists():  # the same weights, without the note
            adapter.mkdir()
            for file in (ground / "out").iterdir():
                if file.is_file():
                    (adapter / file.name).write_bytes(file.read_bytes())
            less = {k: v for k, v in card(adapter).items() if k != "rope_scaling"}
            (adapter / "halfbyte.json").write_text(json.dumps(less))
        words = ("eval", "--model", ground / "model", "--adapter", adapter, *SHORT, "--json")
        capsys.readouterr()
        call(*words, "--data", ground / "data.jsonl", "--no-exact-match")
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1]


def test_merged_and_exported_models_have_it(ground: Path, tmp_path: Path) -> None:
    inputs = (ground / "model", ground / "out")
    into = ("--no-measure", "--into", "decoded", "--device", "cpu")
    call("merge", *inputs, tmp_path / "merged", *into)
    own, merged = (AutoConfig.from_pretrained(p) for p in (inputs[0], tmp_path / "merged"))
    assert merged.rope_parameters["rope_type"] == "yarn"
    assert merged.max_position_embeddings == 4 * own.max_position_embeddings
    call("export", *inputs, tmp_path / "gguf", "--type", "f32", "--device", "cpu", "--no-verify")
    read = open_base(str(tmp_path / "gguf" / "model.gguf")).config
    assert read.rope_parameters["rope_type"] == "yarn"
    assert read.rope_parameters["factor"] == 4


def test_programs_that_would_load_it_without_are_not_recommended(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(ground, tmp_path / "out", "--rope-scaling", "linear:2")
    said = capsys.readouterr().out
    assert "vLLM cannot serve it without merging: rotary embeddings scaled by linear:2" in said
    assert "llama.cpp cannot load it without merging" in said
    assert "vllm serve" not in said
    text = (tmp_path / "out" / "README.md").read_text()
    assert "trained with rotary embeddings scaled by `linear:2`" in text
    assert "vllm serve" not in text


def test_a_method_that_is_none_is_an_error(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--model", ground / "model", "--data", ground / "data.jsonl", *SHORT)
    words += ("--output", tmp_path / "out", "--rope-scaling", "ntk:2")
    assert cli.main([*map(str, words)]) == 2
    assert "rope_scaling: expected linear:4" in capsys.readouterr().err
