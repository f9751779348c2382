"""Whether a base is the one an adapter was trained on: what is let pass, and what is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoint.base_model import LoadedBase, load_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.identity import differences, identity_of
from halfbyte.models.build import BaseRecipe, frozen_linears
from tests.checkpoint.gguf_models import write_gguf
from tests.tiny import write_tiny_model

RECIPE = {"quant": "nf4", "double_quant": True, "block_size": 64, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(model_dir: Path) -> LoadedBase:
    return load_base(model_dir, BaseRecipe())


@pytest.fixture
def card(base: LoadedBase) -> dict[str, Any]:
    return {"base": identity_of(base), "recipe": RECIPE}


def test_a_base_is_itself_and_nothing_recorded_is_let_pass(
    base: LoadedBase, card: dict[str, Any]
) -> None:
    assert differences(card, base) == []
    assert differences({}, base) == []
    assert differences({"base": {"name": "x", "fingerprint": base.fingerprint}}, base) == []


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
def test_a_copy_that_is_packed_already_is_the_same_base(
    tmp_path: Path, model_dir: Path, source: str
) -> None:
    path = model_dir if source == "safetensors" else write_gguf(tmp_path / "m.gguf")
    one = load_base(path, BaseRecipe())
    card = {"base": identity_of(one), "recipe": RECIPE}
    copy = load_base(write_quantized(path, tmp_path / "copy", BaseRecipe()), BaseRecipe())
    assert copy.fingerprint != one.fingerprint
    assert differences(card, copy) == []
    assert differences({"base": card["base"] | {"weights": None}}, copy) == ["the weights differ"]


def test_a_packed_copy_need_not_say_how_its_scales_were_found(
    tmp_path: Path, model_dir: Path
) -> None:
    searched = BaseRecipe(quant_search=True)
    one = load_base(model_dir, searched)
    card = {"base": identity_of(one), "recipe": RECIPE | {"quant_search": True}}
    copy = write_quantized(model_dir, tmp_path / "copy", searched)
    assert differences(card, load_base(copy, BaseRecipe())) == []
    assert differences(card, load_base(model_dir, BaseRecipe())) == [
        "quant_search was True, now it is False"
    ]


@pytest.mark.parametrize(
    ("recipe", "messages"),
    [
        (BaseRecipe(quant="fp4"), ["quant was 'nf4', now it is 'fp4'"]),
        (BaseRecipe(block_size=128), ["block_size was 64, now it is 128"]),
        (BaseRecipe(quant="none", block_size=32), ["quant was 'nf4', now it is 'none'"]),
    ],
)
def test_another_recipe(
    model_dir: Path, card: dict[str, Any], recipe: BaseRecipe, messages: list[str]
) -> None:
    assert differences(card, load_base(model_dir, recipe)) == messages


@pytest.mark.parametrize("layer", [0, -1])
def test_other_weights(base: LoadedBase, card: dict[str, Any], layer: int) -> None:
    other = base._replace(fingerprint="other files")
    assert differences(card, other) == []
    held = list(frozen_linears(base.model).values())[layer].quantized
    assert held is not None
    held.codes.bitwise_not_()
    assert differences(card, other) == ["the weights differ"]


def test_a_plain_base_in_another_dtype_is_the_same(model_dir: Path) -> None:
    wide = load_base(model_dir, BaseRecipe(quant="none"))
    narrow = load_base(model_dir, BaseRecipe(quant="none", compute_dtype=torch.bfloat16))
    card = {"base": identity_of(wide) | {"fingerprint": "other"}, "recipe": {"quant": "none"}}
    assert differences(card, narrow) == []


def test_another_tokenizer_and_another_template(base: LoadedBase, card: dict[str, Any]) -> None:
    base.tokenizer.add_tokens(["<new>"])
    assert differences(card, base) == ["the tokenizer differs"]
    base.tokenizer.chat_template = "{{ messages }}"
    messages = ["the tokenizer differs", "the chat template differs"]
    assert differences(card, base) == messages
