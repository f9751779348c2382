"""Packed copies in the cache: the same model, read without the original's weights."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoint import cache
from halfbyte.checkpoint.base_model import BaseSource, LoadedBase, load_base, open_base
from halfbyte.checkpoint.cache import cached
from halfbyte.checkpoint.directory import DirectorySource
from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.checkpoint.safetensors_file import SafetensorsFile
from halfbyte.models.build import BaseRecipe
from tests.checkpoint.families import tiny_model
from tests.checkpoint.gguf_models import write_gguf
from tests.tiny import tiny_tokenizer, write_tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def copies(home: Path) -> list[Path]:
    return sorted((home / "halfbyte" / "models").iterdir())


def assert_same(one: LoadedBase, other: LoadedBase) -> None:
    theirs = other.model.state_dict()
    assert one.model.state_dict().keys() == theirs.keys()
    for name, tensor in one.model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.equal(theirs[name]), name
    assert (one.name, one.fingerprint, one.memory_report) == (
        other.name,
        other.fingerprint,
        other.memory_report,
    )


def test_a_copy_that_another_process_is_writing_is_left_to_it(
    home: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, recipe = open_base(model_dir), BaseRecipe(block_size=128)
    copy = cached(source, recipe)
    shutil.rmtree(copies(home)[0])
    with output_lock(home / "halfbyte" / "models" / copies_name(copy)):
        assert cached(source, recipe) is source
        assert "is being written by process" in caplog.text
        assert [path.name for path in copies(home) if path.is_dir()] == []
    assert cached(source, recipe) is not source


def copies_name(copy: BaseSource) -> str:
    return copy._directory.name  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("packed_head", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_model_from_the_cache_is_the_model(
    tmp_path: Path, home: Path, model_dir: Path, kind: str, *, packed_head: bool
) -> None:
    source = model_dir if kind == "safetensors" else write_gguf(tmp_path / "m.gguf")
    recipe = BaseRecipe(quantize_head=packed_head, block_size=128)
    plain = load_base(source, recipe)
    assert_same(load_base(source, recipe, packed_copy=cached), plain)
    assert len(copies(home)) == 1
    assert_same(load_base(source, recipe, packed_copy=cached), plain)


def test_the_second_start_reads_the_copy_only(
    home: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base(model_dir, BaseRecipe(), packed_copy=cached)
    read: list[tuple[Path, str]] = []
    whole = SafetensorsFile.read

    def recorded(self: SafetensorsFile, name: str) -> torch.Tensor:
        read.append((self.path, name))
        return whole(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", recorded)
    load_base(model_dir, BaseRecipe(), packed_copy=cached)
    [copy] = copies(home)
    assert {path.parent for path, _ in read} == {copy}
    size = SafetensorsFile(copy / "model.safetensors").entries
    weights = {name: size[name].dtype for _, name in read if name.endswith("_proj.weight")}
    assert len(weights) == 14
    assert set(weights.values()) == {torch.uint8}


def test_another_recipe_or_another_base_has_another_copy(home: Path, tmp_path: Path) -> None:
    one = write_tiny_model(tmp_path / "one")
    recipes: list[dict[str, Any]] = [
        {},
        {"quant": "fp4"},
        {"block_size": 32},
        {"double_quant": False},
        {"quantize_head": True},
    ]
    for count, changes in enumerate(recipes, 1):
        load_base(one, BaseRecipe(**changes), packed_copy=cached)
        assert len(copies(home)) == count
    # What decides no byte of the copy: a copy for all. (Head and embedding are tied here.)
    load_base(one, BaseRecipe(quantize_head=True, quantize_embeddings=True), packed_copy=cached)
    load_base(one, BaseRecipe(compute_dtype=torch.bfloat16), packed_copy=cached)
    assert len(copies(home)) == count
    load_base(write_tiny_model(tmp_path / "two", layers=1), BaseRecipe(), packed_copy=cached)
    assert len(copies(home)) == count + 1


def test_nothing_to_pack_is_not_copied(home: Path, model_dir: Path) -> None:
    load_base(model_dir, BaseRecipe(quant="none"), packed_copy=cached)
    assert not home.exists()
    load_base(model_dir, BaseRecipe(), packed_copy=cached)
    [copy] = copies(home)
    load_base(copy, BaseRecipe(), packed_copy=cached)
    assert copies(home) == [copy]


def cut(copy: Path) -> None:
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(20_000)


def flip(copy: Path) -> None:
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(raw)


def other_card(copy: Path) -> None:
    card = json.loads((copy / "halfbyte_cache.json").read_text())
    (copy / "halfbyte_cache.json").write_text(json.dumps(card | {"format": 0}))


DAMAGE = {
    "cut": (cut, "in a file of"),
    "changed": (flip, "does not hold what was written"),
    "card of another": (other_card, "does not hold what was written"),
    "never finished": (lambda copy: (copy / "halfbyte_cache.json").unlink(), "does not exist"),
    "no configuration": (lambda copy: (copy / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_copy_is_told_and_made_anew(
    home: Path, model_dir: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    plain = load_base(model_dir, BaseRecipe(), packed_copy=cached)
    [copy] = copies(home)
    change, message = DAMAGE[damage]
    change(copy)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        assert_same(load_base(model_dir, BaseRecipe(), packed_copy=cached), plain)
    assert "is damaged, repacking" in caplog.text
    assert message in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        load_base(model_dir, BaseRecipe(), packed_copy=cached)
    assert caplog.text == ""
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_cache_that_cannot_be_written_stops_nothing(
    home: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file")
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        base = load_base(model_dir, BaseRecipe(), packed_copy=cached)
    assert "no packed copy of" in caplog.text
    assert base.memory_report.quantized_parameters > 0


def test_codes_of_another_kind_of_device_are_another_copy(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def stop(_source: Any, directory: Path, *_args: Any, **_kwargs: Any) -> None:
        made.append(directory)
        raise cache.OutputError("stopped")

    monkeypatch.setattr("halfbyte.checkpoint.cache.write_quantized", stop)
    source = DirectorySource(model_dir, "m")
    for device in ("cpu", "cuda", "cuda:1"):
        assert cache.cached(source, BaseRecipe(device=device)) is source
    assert made[0] != made[1] == made[2]


def test_experts_are_packed_in_the_cache(home: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_experts=3, moe_intermediate_size=48)
    model.save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    plain = load_base(tmp_path / "moe", BaseRecipe())
    assert_same(load_base(tmp_path / "moe", BaseRecipe(), packed_copy=cached), plain)
    [copy] = copies(home)
    assert_same(load_base(tmp_path / "moe", BaseRecipe(), packed_copy=cached), plain)
    entry = SafetensorsFile(copy / "model.safetensors").entries[
        "model.layers.1.mlp.experts.down_proj"
    ]
    assert (entry.dtype, entry.shape) == (torch.uint8, (3, 64 * 48 // 2))
