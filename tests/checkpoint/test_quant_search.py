"""``quant_search`` from the recipe to the bytes: in memory, in a written model, in the cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint import cache
from halfbyte.checkpoint.base_model import LoadedBase, importances, load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.cache import cached
from halfbyte.checkpoint.identity import PACKING, differences, identity_of
from halfbyte.cli.opening import RECIPE_FIELDS
from halfbyte.linear.lora import frozen_linears
from halfbyte.models.build import BaseRecipe
from halfbyte.models.calibration import input_moments
from halfbyte.quant.scale_search import search
from halfbyte.train.loading import recipe_metadata
from tests.tiny import write_tiny_model

SEARCHED = BaseRecipe(quant_search=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def packed(base: LoadedBase) -> dict[str, torch.Tensor]:
    held = {path: linear.quantized for path, linear in frozen_linears(base.model).items()}
    return {f"{path}.{n}": t for path, q in held.items() if q for n, t in q.tensors().items()}


def assert_same(one: LoadedBase, other: LoadedBase) -> None:
    ours, theirs = packed(one), packed(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_linear_is_searched_with_its_own_inputs(directory: Path) -> None:
    plain = load_base(directory, BaseRecipe())
    moments = input_moments(plain.model, plain.tokenizer)
    source = open_base(directory)
    for path, linear in frozen_linears(load_base(source, SEARCHED).model).items():
        weight = source.tensor(f"{path}.weight")
        assert isinstance(weight, torch.Tensor)
        wanted = search(weight, importance=moments[f"{path}.weight"])
        assert linear.quantized is not None
        assert torch.equal(linear.quantized.codes, wanted.codes)
        assert not torch.equal(linear.quantized.codes, search(weight).codes)


def test_what_is_written_is_what_is_held(directory: Path, tmp_path: Path) -> None:
    out = write_quantized(directory, tmp_path / "out", SEARCHED)
    assert_same(load_base(out, BaseRecipe()), load_base(directory, SEARCHED))


def test_the_bytes_do_not_depend_on_what_is_computed_in(directory: Path) -> None:
    low = load_base(directory, replace(SEARCHED, compute_dtype=torch.bfloat16))
    assert_same(low, load_base(directory, SEARCHED))


def test_files_that_are_packed_stay_as_they_are(directory: Path, tmp_path: Path) -> None:
    out = write_quantized(directory, tmp_path / "out", BaseRecipe())
    assert importances(open_base(out), SEARCHED) == {}
    assert importances(open_base(directory), replace(SEARCHED, quant="none")) == {}
    assert_same(load_base(out, SEARCHED), load_base(directory, BaseRecipe()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_is_searched_with_its_own_inputs(tmp_path: Path, *, tied: bool) -> None:
    source = open_base(write_tiny_model(tmp_path / "model", tied=tied))
    plain = load_base(source, BaseRecipe())
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    weight = source.tensor(name)
    assert isinstance(weight, torch.Tensor)
    wanted = search(weight, importance=input_moments(plain.model, plain.tokenizer)[name])
    found = packed(load_base(source, replace(SEARCHED, quantize_head=True)))
    assert torch.equal(found["lm_head.codes"], wanted.codes)


def test_the_cache_keeps_the_two_apart(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_base(directory, BaseRecipe(), packed_copy=cached)
    assert_same(load_base(directory, SEARCHED, packed_copy=cached), load_base(directory, SEARCHED))
    assert len(list(cache.cache_directory().iterdir())) == 2


def test_the_command_line_hands_on_all_that_decides_the_bytes() -> None:
    assert RECIPE_FIELDS == PACKING


def test_an_adapter_of_a_searched_base_is_told_from_others(directory: Path) -> None:
    searched, plain = load_base(directory, SEARCHED), load_base(directory, BaseRecipe())
    card = {"base": identity_of(searched), "recipe": recipe_metadata(SEARCHED)}
    assert differences(card, searched) == []
    assert "quant_search was True, now it is False" in differences(card, plain)
    # Adapters from before there was a search are of bases without one.
    older = {"base": identity_of(plain), "recipe": recipe_metadata(BaseRecipe())}
    del older["recipe"]["quant_search"]
    assert differences(older, plain) == []
    assert "quant_search was False, now it is True" in differences(older, searched)
