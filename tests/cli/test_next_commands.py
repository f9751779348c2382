"""Commands that are printed can be pasted, whatever the paths are."""

import json
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.next_commands import (
    after_export,
    after_training,
    after_writing_model,
    beside,
    served_name,
)


def read(line: str) -> Any:
    """A command of ours as its own parser reads it from a shell's words."""
    words = shlex.split(line)
    assert Path(words[0]).name == "halfbyte" or words[:3] == ["python", "-m", "halfbyte"]
    name, *argv = words[words.index("halfbyte") + 1 if words[0] == "python" else 1 :]
    return import_module(f"halfbyte.cli.{name}").COMMAND.read(argv).options


def adapter(directory: Path, **fields: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 16} | fields))
    return directory


@pytest.mark.parametrize("name", ["out", "my run; rm -rf $HOME", 'it\'s "ours" & `x`\n', "--x"])
def test_after_training_every_command_means_what_was_done(tmp_path: Path, name: str) -> None:
    out, model, data = adapter(tmp_path / name), str(tmp_path / f"m {name}"), f"{tmp_path}/t est"
    lines, warnings = after_training(model, out, revision="v1", data=data)
    assert warnings == []
    chat, evaluated, merged, exported = map(read, lines[:4])
    assert (chat.model, chat.revision, chat.adapter) == (model, "v1", str(out))
    assert (evaluated.data, evaluated.adapter) == (data, str(out))
    for options, what in ((merged, "merged"), (exported, "gguf")):
        assert (options.model, options.adapter, options.revision) == (model, str(out), "v1")
        assert str(options.out) == f"{out}-{what}"
    assert shlex.split(lines[4])[:5] == ["vllm", "serve", model, "--revision", "v1"]
    modules = shlex.split(lines[4])[-1]
    assert modules == f"{served_name(out)}={out}"


def test_what_cannot_serve_an_adapter_is_said_and_not_offered(tmp_path: Path) -> None:
    lines, warnings = after_training("m", adapter(tmp_path / "a", modules_to_save=["lm_head"]))
    assert not any("vllm" in line for line in lines)
    assert warnings == [
        "vLLM cannot serve it without merging: modules trained in full (lm_head)",
        "llama.cpp cannot load it without merging: modules trained in full (lm_head)",
    ]
    lines, warnings = after_training("m", adapter(tmp_path / "b", rank_pattern={"v_proj": 40}))
    assert "--max-lora-rank 64" in lines[-1]
    lines, _ = after_training("m.gguf", adapter(tmp_path / "c"))
    assert not any("vllm" in line for line in lines)


def test_a_directory_that_exists_is_not_proposed(tmp_path: Path) -> None:
    assert beside(tmp_path / "out", "merged") == f"{tmp_path}/out-merged"
    (tmp_path / "out-merged").mkdir()
    assert beside(tmp_path / "out", "merged") == f"{tmp_path}/out-merged-2"


def test_after_a_model_and_an_export(tmp_path: Path) -> None:
    out, base = tmp_path / "My Model", tmp_path / "base model.gguf"
    base.touch()
    chat, served = after_writing_model(out)
    assert read(chat).model == str(out)
    assert shlex.split(served) == ["vllm", "serve", str(out)]
    assert [shlex.split(line) for line in after_export(out, base=None)] == [
        ["llama-server", "-m", f"{out}/model.gguf"],
        ["ollama", "create", "my-model", "-f", f"{out}/Modelfile"],
        ["ollama", "run", "my-model"],
    ]
    with_base = ["llama-server", "-m", str(base), "--lora", f"{out}/adapter.gguf"]
    assert shlex.split(after_export(out, base=str(base))[0]) == with_base
    assert "llama-server" not in after_export(out, base="owner/name")[0]


@pytest.mark.parametrize(
    ("name", "served"), [("Out 1", "out-1"), ("ünï", "n"), ("..x..", "x"), ("日本", "model")]
)
def test_names_that_ollama_accepts(tmp_path: Path, name: str, served: str) -> None:
    assert served_name(tmp_path / name) == served
