"""What a command may replace: what a command of the same kind wrote, and nothing that it reads."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint.peft import save_adapter
from halfbyte.cli import main
from halfbyte.cli.opening import as_trained, claim_directory
from halfbyte.config.schema import BaseOptions
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.linear.lora import LoRAConfig


def claim(directory: Path, *inputs: str | Path | None, **options: bool | str) -> None:
    with claim_directory(directory, *inputs, **options):  # type: ignore[arg-type]
        pass


def model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"halfbyte_version": "0.1.0"}))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def export(directory: Path, content: bytes = b"GGUF...") -> Path:
    directory.mkdir()
    (directory / "model.gguf").write_bytes(content)
    (directory / "Modelfile").write_text("FROM ./model.gguf\n")
    return directory


@pytest.mark.parametrize("out", ["base", "models", "link", "models/../base"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_read_is_not_replaced(tmp_path: Path, out: str, overwrite: bool) -> None:
    for name in ("base", "models/inner"):
        model(tmp_path / name)
    (tmp_path / "link").symlink_to("base")
    inputs = None, tmp_path / "models" / "inner", str(tmp_path / "base")
    with pytest.raises(OutputError, match="is read, so"):
        claim(tmp_path / out, *inputs, overwrite=overwrite)


def test_another_model_is_replaced_and_a_name_on_the_hub_is_no_directory(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    model(tmp_path / "old")
    claim(tmp_path / "old", base, "org/model", overwrite=True)
    claim(tmp_path / "new", base, tmp_path / "new", overwrite=False)
    claim(base / "packed", base, overwrite=False)
    claim(export(tmp_path / "exported"), base, overwrite=True, kind="export")


SPOIL: dict[str, Callable[[Path], object]] = {
    "contains notes, which": lambda out: (out / "notes").write_text("mine"),
    "contains adapter.json, which": lambda out: (out / "adapter.json").mkdir(),
    "was not written by halfbyte": lambda out: (out / "config.json").write_text("{}"),
    "was not written by": lambda out: (out / "config.json").write_text("[" * 100_000),
    "contains no model": lambda out: (out / "config.json").unlink(),
}


@pytest.mark.parametrize("reason", SPOIL)
def test_a_model_with_anything_of_others_is_not_replaced(tmp_path: Path, reason: str) -> None:
    out = model(tmp_path / "out")
    SPOIL[reason](out)
    with pytest.raises(OutputError, match=f"{reason}.*so --overwrite does not replace it"):
        claim(out, overwrite=True)


def test_an_export_is_replaced_only_if_it_is_one(tmp_path: Path) -> None:
    for count, content in enumerate((b"my notes", b"", b"GGU")):
        out = export(tmp_path / str(count), content)
        with pytest.raises(OutputError, match="was not written by halfbyte"):
            claim(out, overwrite=True, kind="export")
        assert (out / "model.gguf").read_bytes() == content
    with pytest.raises(OutputError, match="contains no model"):
        claim(model(tmp_path / "model"), overwrite=True, kind="export")
    os.mkfifo(export(tmp_path / "pipe") / "adapter.gguf")
    with pytest.raises(OutputError, match="was not written by halfbyte"):
        claim(tmp_path / "pipe", overwrite=True, kind="export")


@pytest.mark.parametrize("command", ["merge", "export", "quantize"])
def test_commands_do_not_replace_their_base(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    adapter = [str(tmp_path / "adapter")] if command != "quantize" else []
    code = main([command, str(tmp_path), *adapter, str(tmp_path), "--overwrite"])
    assert code == 2
    assert "is read, so" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"quant": "int8"}, "`quant`: expected 'nf4', 'fp4' or 'none', got 'int8'"),
        ({"block_size": 65}, "`block_size`: expected a power of 2"),
        ({"double_quant": [1]}, "`double_quant`: expected true or false"),
        ({"quant": "none", "quantize_head": True}, "need `quant` nf4 or fp4"),
    ],
)
def test_a_recorded_recipe_is_checked(tmp_path: Path, recipe: object, message: str) -> None:
    pair = {f"q.lora_{name}.weight": torch.ones(2, 2) for name in "AB"}
    save_adapter(tmp_path, pair, LoRAConfig(r=2), base={"name": "m"}, recipe=recipe)
    with pytest.raises(CheckpointError, match=f"recipe in halfbyte.json: .*{message}"):
        as_trained(BaseOptions(model="m"), tmp_path)
