"""A model known by its headers is the model, as far as anyone looks at names and bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem, get_session

from halfbyte.checkpoint.base_model import open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.hub_headers import fetch_headers
from halfbyte.errors import CheckpointError
from halfbyte.models.build import BaseRecipe
from tests.checkpoint.quantized_models import gptq, write_quantized_model
from tests.tiny import write_tiny_model


class Counting(DirFileSystem):  # type: ignore[misc]
    """A hub of directories, which counts what is read."""

    read = 0

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        raw: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        self.read += len(raw)
        return raw


@pytest.fixture
def hub(tmp_path: Path) -> Counting:
    write_tiny_model(tmp_path / "org" / "plain", hidden=256, tied=False)
    write_tiny_model(tmp_path / "org" / "sharded", hidden=256, max_shard_size="600KB")
    recipe = BaseRecipe("fp4", block_size=128)
    write_quantized(tmp_path / "org" / "plain", tmp_path / "org" / "packed", recipe)
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write_quantized_model(tmp_path / "org" / "gptq", gptq, packing, hidden=256)
    return Counting(path=str(tmp_path), fs=LocalFileSystem())


@pytest.mark.parametrize("name", ["org/plain", "org/sharded", "org/packed", "org/gptq"])
def test_headers_stand_for_the_files(hub: Counting, tmp_path: Path, name: str) -> None:
    laid_out = tmp_path / "laid out"
    laid_out.mkdir()
    fetch_headers(name, laid_out, files=hub)
    whole, headers = open_base(tmp_path / name), open_base(laid_out)
    assert headers.parameters == whole.parameters
    assert headers.config.to_dict() | {"_name_or_path": ""} == whole.config.to_dict() | {
        "_name_or_path": ""
    }
    assert headers.fitted(BaseRecipe()) == whole.fitted(BaseRecipe())
    assert hub.read < 60_000 < whole.total_bytes


def test_what_is_not_there_is_told(hub: Counting, tmp_path: Path) -> None:
    (tmp_path / "org" / "empty").mkdir()
    for name, says in (("org/none", "not available on the"), ("org/empty", "no safetensors files")):
        with pytest.raises(CheckpointError, match=says):
            fetch_headers(name, tmp_path, files=hub)


def test_a_header_that_lies_is_refused(hub: Counting, tmp_path: Path) -> None:
    path = tmp_path / "org" / "plain" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[:8] = (2**60).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        fetch_headers("org/plain", tmp_path, files=hub)


def test_a_hub_that_cannot_be_reached_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = sys.modules[type(get_session()).__module__.partition(".")[0]]

    def unreachable(*_: Any, **__: Any) -> None:
        raise client.ConnectError("no such host")

    monkeypatch.setattr(HfFileSystem, "ls", unreachable)
    with pytest.raises(
        CheckpointError, match=r"org/x is no local directory .* not available .*: no such host"
    ):
        fetch_headers("org/x", tmp_path)
