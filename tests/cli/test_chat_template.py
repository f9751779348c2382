"""A template that training was given goes with the adapter to every command that uses it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from halfbyte import cli
from halfbyte.checkpoint.base_model import open_base
from tests.tiny import tiny_llama, tiny_tokenizer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
SHORT = ("--compute-dtype", "float32", "--device", "cpu")


def call(*words: object) -> None:
    assert cli.main([*map(str, words)]) == 0


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a template, data, and an adapter trained on it with Alpaca's format."""
    ground = tmp_path_factory.mktemp("ground")
    tokenizer = tiny_tokenizer(None)
    model = tiny_llama(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(ground / "model")
    tokenizer.save_pretrained(ground / "model")
    (ground / "data.jsonl").write_text("\n".join([json.dumps(ROW)] * 8))
    template = "{%- for m in messages -%}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{%- endfor -%}"
    (ground / "own.jinja").write_text(template + "{{ 'assistant: ' if add_generation_prompt }}")
    given = (
        "--chat-template",
        ground / "own.jinja",
        "--save-steps",
        1,
        "--lora-r",
        2,
        "--max-steps",
        2,
    )
    words = ("--model", ground / "model", "--data", ground / "data.jsonl", "--samples", 0, *SHORT)
    call("train", *words, *given, "--output", ground / "out")
    return ground


def template(path: Path) -> str:
    return AutoTokenizer.from_pretrained(path).chat_template


def test_the_adapter_has_it_and_a_checkpoint_too(ground: Path) -> None:
    own = (ground / "own.jinja").read_text()
    assert template(ground / "out") == own
    for directory in ("out", "out/checkpoint-1"):
        card = json.loads((ground / directory / "halfbyte.json").read_text())
        assert card["chat_template"] == own


@pytest.mark.parametrize("adapter", ["out", "out/checkpoint-1"])
def test_eval_uses_it_and_names_another(
    ground: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", "--model", ground / "model", "--adapter", ground / adapter, *SHORT)
    words += ("--data", ground / "data.jsonl", "--no-exact-match", "--json")
    capsys.readouterr()
    call(*words)
    # "Yes." and the token that ends the turn, of every row.
    count = len(tiny_tokenizer(None)("Yes.").input_ids) + 1
    assert json.loads(capsys.readouterr().out)["supervised_tokens"] == 8 * count
    assert cli.main([*map(str, words), "--chat-template", "chatml"]) == 2
    assert "the chat template differs" in capsys.readouterr().err


def test_merged_and_exported_models_have_it_and_stop_where_it_ends_turns(
    ground: Path, tmp_path: Path
) -> None:
    own = (ground / "own.jinja").read_text()
    inputs = (ground / "model", ground / "out")
    call(
        "merge",
        *inputs,
        tmp_path / "merged",
        "--no-measure",
        "--into",
        "decoded",
        "--device",
        "cpu",
    )
    assert template(tmp_path / "merged") == own
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert ends == [0, 2]  # of the model, and <|im_end|>
    call("export", *inputs, tmp_path / "gguf", "--type", "f32", "--device", "cpu", "--no-verify")
    exported = tmp_path / "gguf" / "model.gguf"
    assert open_base(str(exported)).tokenizer().chat_template == own
    # Onto a GGUF file, whose keys are copied.
    plain = tmp_path / "plain"
    call("export", ground / "model", plain, "--type", "f32", "--no-verify")
    words = ("--type", "f32", "--device", "cpu", "--no-verify", "--allow-mismatch")
    call("export", plain / "model.gguf", ground / "out", tmp_path / "copy", *words)
    assert open_base(str(tmp_path / "copy" / "model.gguf")).tokenizer().chat_template == own
    assert open_base(str(plain / "model.gguf")).tokenizer().chat_template is None


def test_a_run_goes_on_without_the_file_and_another_from_its_adapter(
    ground: Path, tmp_path: Path
) -> None:
    own = (ground / "own.jinja").read_text()
    moved = tmp_path / "moved.jinja"
    words = ("--model", ground / "model", "--data", ground / "data.jsonl", "--samples", 0, *SHORT)
    moved.write_text(own)
    first = ("train", *words, "--chat-template", moved, "--output", tmp_path / "run")
    call(*first, "--max-steps", 1, "--lora-r", 2)
    moved.unlink()
    call("train", tmp_path / "run" / "config.yaml", "--resume")
    call(
        "train",
        *words,
        "--init-adapter",
        tmp_path / "run",
        "--max-steps",
        1,
        "--output",
        tmp_path / "next",
    )
    assert template(tmp_path / "next") == own
    assert json.loads((tmp_path / "next" / "halfbyte.json").read_text())["chat_template"] == own


def test_a_base_model_alone_takes_one(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("generate", "--model", ground / "model", "--prompt", "Hi", "--max-new-tokens", 2, *SHORT)
    plain = capsys.readouterr()
    words = ("--chat-template", "chatml", *SHORT, "--max-new-tokens", 2, "--prompt", "Hi")
    call("generate", "--model", ground / "model", *words)
    assert "chat template: chatml" in capsys.readouterr().err
    assert "chat template" not in plain.err
    assert (
        cli.main(
            [
                "generate",
                "--model",
                str(ground / "model"),
                "--chat-template",
                "gemma",
                "--prompt",
                "x",
            ]
        )
        == 2
    )
    assert (
        "needs the token '<start_of_turn>', which this model's tokenizer cuts"
        in capsys.readouterr().err
    )
