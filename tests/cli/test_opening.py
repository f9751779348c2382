"""What a command may replace: models, and nothing that it reads."""

from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint.peft import save_adapter
from halfbyte.cli import main
from halfbyte.cli.opening import as_trained, require_free
from halfbyte.config.schema import BaseOptions
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.linear.lora import LoRAConfig


@pytest.mark.parametrize("out", ["base", "models", "link", "models/../base"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_read_is_not_replaced(tmp_path: Path, out: str, overwrite: bool) -> None:
    for name in ("base", "models", "models/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("base")
    inputs = None, tmp_path / "models" / "inner", str(tmp_path / "base")
    with pytest.raises(OutputError, match="is read, so"):
        require_free(tmp_path / out, *inputs, overwrite=overwrite)


def test_another_model_is_replaced_and_a_name_on_the_hub_is_no_directory(tmp_path: Path) -> None:
    for name in ("base", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    require_free(tmp_path / "old", tmp_path / "base", "org/model", overwrite=True)
    require_free(tmp_path / "new", tmp_path / "base", tmp_path / "new", overwrite=False)
    require_free(tmp_path / "base" / "packed", tmp_path / "base", overwrite=False)


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
