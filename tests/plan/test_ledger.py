"""The ledger's bytes are those that building and loading really make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.errors import ConfigError
from halfbyte.layers.multimodal import build_whole
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.optim.buckets import pieces_of
from halfbyte.plan.holding import Holding, Packed
from halfbyte.plan.ledger import (
    OVERHEAD,
    PRODUCT,
    TOUCHED_LATER,
    Run,
    ledger,
    product_bytes,
    products_kept,
)
from halfbyte.plan.model_shape import KNOWN, ModelShape, config_of, shape_of, shape_of_config
from halfbyte.quant import empty_like_quantized
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer, write_tiny_model

RECIPES = [
    BaseRecipe(),
    BaseRecipe(double_quant=False, block_size=128),
    BaseRecipe("fp4", compute_dtype=torch.bfloat16),
    BaseRecipe("none"),
    BaseRecipe("none", compute_dtype=torch.bfloat16),
    BaseRecipe(quantize_head=True),
    BaseRecipe(quantize_head=True, quantize_embeddings=True),
]
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {"hidden_size": 96, "intermediate_size": 100}),
    ("phi3", {}),
    ("gpt_neox", {}),
    ("gemma2", {"head_dim": 16}),
    ("mamba", {}),
    ("gpt2", {}),
    ("falcon", {}),
    ("mixtral", {"num_local_experts": 2}),
    ("gpt_oss", {"num_local_experts": 3}),
    ("nemotron_h", {"n_routed_experts": 4}),
]


def base_bytes(shape: ModelShape, recipe: BaseRecipe) -> int:
    return ledger(shape, Run(Holding.of(recipe))).base


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=str)
def test_the_base_has_these_bytes_once_it_is_built(
    family: str, changes: dict[str, Any], recipe: BaseRecipe
) -> None:
    reference = tiny_model(family, **changes)
    if family == "gpt2":  # whose Conv1D becomes a linear layer, so the files' values are transposed
        reference = build_whole(reference.config).to_empty(device="cpu")
        reference.tie_weights()
        for parameter in reference.parameters():
            torch.nn.init.normal_(parameter)
    if recipe.quantize_head and not shape_of(reference, family).vocabulary_packs:
        with pytest.raises(ConfigError, match="cannot be packed"):
            build(reference.config, recipe)
        return
    model = build(reference.config, recipe)
    for name, tensor in reference.named_parameters():
        load_tensor(model, name, tensor.detach())
    report = finalize(model)
    assert base_bytes(shape_of(reference, family), recipe) == report.total_bytes
    assert base_bytes(shape_of_config(reference.config, family), recipe) == report.total_bytes


@pytest.mark.parametrize("recipe", RECIPES[:4], ids=str)
def test_a_model_of_files_has_these_bytes_once_it_is_loaded(
    tmp_path: Path, recipe: BaseRecipe
) -> None:
    source = open_base(write_tiny_model(tmp_path / "model", tied=False))
    files = {p.name: (p.nbytes, p.packed) for p in source.parameters}
    shape = shape_of(source.skeleton, "tiny", files=files)
    assert base_bytes(shape, recipe) == load_base(source, recipe).memory_report.total_bytes
    assert sum(weight.comes or 0 for weight in shape.weights) == source.total_bytes


def test_a_packed_model_has_these_bytes_and_what_it_holds_plain_stays_plain(tmp_path: Path) -> None:
    reference = tiny_model("llama", tie_word_embeddings=False)
    reference.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    recipe = BaseRecipe("fp4", double_quant=False, block_size=128)
    write_quantized(tmp_path / "plain", tmp_path / "packed", recipe)
    source = open_base(tmp_path / "packed")
    fitted = source.fitted(BaseRecipe())
    files = {p.name: (p.nbytes, p.packed) for p in source.parameters}
    shape = shape_of(source.skeleton, "packed", files=files)
    assert base_bytes(shape, fitted) == load_base(source, BaseRecipe()).memory_report.total_bytes
    # As a file that holds one linear in 16 bits would have it.
    some = "model.layers.0.mlp.down_proj.weight"
    mixed = shape_of(source.skeleton, "mixed", files=files | {some: (4 * 64 * 96, False)})
    numel = 64 * 96
    packed = sum(Packed.of(numel, 128, double_quant=False))
    assert base_bytes(mixed, fitted) - base_bytes(shape, fitted) == 4 * numel - packed


@given(
    numel=st.integers(0, 300_000),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    double_quant=st.booleans(),
)
def test_packed_bytes_are_those_of_the_format(
    numel: int, block_size: int, double_quant: bool
) -> None:
    q = empty_like_quantized(
        (numel,), torch.float32, quant_type="nf4", block_size=block_size, double_quant=double_quant
    )
    assert sum(Packed.of(numel, block_size, double_quant=double_quant)) == q.nbytes


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_adapters_are_those_that_are_attached(targets: tuple[str, ...]) -> None:
    reference = tiny_model("llama")
    model = build(reference.config, BaseRecipe("none"))
    attach(model, LoRAConfig(r=5, target_modules=targets or "all-linear"), seed=0)
    numel = sum(p.numel() for p in adapter_parameters(model).values())
    entries = ledger(shape_of(reference, "tiny"), Run(rank=5, targets=targets))
    trained = [line.nbytes for line in entries.lines if line.group == "trained"]
    assert trained[:2] == [4 * numel, 4 * numel]
    assert 8 * numel <= trained[2] <= 8 * numel + 2 * 256 * 28


@given(
    numels=st.lists(st.integers(1, 10_000) | st.integers(4_190_000, 4_200_000), max_size=5),
    bits=st.sampled_from([8, 32]),
)
def test_optimizer_state_is_what_adamw_lays_out(numels: list[int], bits: int) -> None:
    parameters = [torch.empty(n, device="meta") for n in numels]
    laid_out = sum(piece.nbytes for piece in pieces_of(parameters, bits=bits, master=False))
    shape = ModelShape("none", (), False, 1, 1, 1, 1, 1, 1, 100)
    for paged in ("", "paged_"):
        wide = "paged_adamw_32bit" if paged else "adamw"
        optimizer: Any = f"{paged}adamw_8bit" if bits == 8 else wide
        entries = ledger(shape, Run(trained=tuple(numels), optimizer=optimizer))
        assert entries.on_host == (laid_out if paged else 0)
        assert entries.total("trained") == 8 * sum(numels) + (0 if paged else laid_out)


def test_figures_of_llama2_7b_are_those_an_h100_measured() -> None:
    """Without one: resident NF4 base 3.87 GB; load peak 3.95 GB; 16-bit base 13.48 GB."""
    shape = shape_of_config(config_of("llama2-7b"), "llama2-7b")
    entries = ledger(shape, Run())
    assert entries.base == 3_865_592_704
    assert entries.load_peak == pytest.approx(3.952732160e9, rel=0.03)
    assert ledger(shape, Run(Holding("none"))).base == 13_476_831_232


def test_loading_peaks_with_a_tensor_in_flight_beside_what_it_becomes() -> None:
    shape = shape_of(tiny_model("llama", tie_word_embeddings=True), "tiny")
    last = shape.weights[-1]
    run = Run(Holding(itemsize=4))
    entries = ledger(shape, run)
    assert (
        entries.base
        <= entries.load_peak
        <= entries.base + 2 * max(weight.numel for weight in shape.weights)
    )
    assert last.name == "model.norm.weight"


def test_names_of_shapes_are_the_models_they_say() -> None:
    billions = {"llama2-7b": 6.74, "llama3-8b": 8.03, "qwen3-8b": 8.19, "smollm2-135m": 0.1345}
    for name, count in billions.items():
        shape = shape_of_config(config_of(name), name)
        assert shape.parameters / 1e9 == pytest.approx(count, rel=2e-3)
    assert {"llama2-7b", "llama3-8b"} <= set(KNOWN)


def test_a_shape_in_fields_and_a_name_that_is_changed() -> None:
    config = config_of("model_type=qwen2, hidden_size=64,num_hidden_layers=3")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 64, 3)
    assert config_of("llama2-7b,num_hidden_layers=2").num_hidden_layers == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("llama9-7b", "expected one of"),
        ("llama2-7b,layers", "expected FIELD=VALUE"),
        ("hidden=64", "llama has no hidden"),
        ("model_type=nonsense,hidden_size=64", "transformers cannot make nonsense"),
    ],
)
def test_a_shape_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of(text)


def test_an_embedding_may_wait_on_the_host() -> None:
    for tied in (False, True):
        shape = shape_of(tiny_model("llama", tie_word_embeddings=tied), "tiny")
        here, away = (ledger(shape, Run(embedding_on_host=on_host)) for on_host in (False, True))
        moved = 0 if tied else 400 * 64 * 2
        assert here.base - away.base == away.on_host == moved


def test_what_stays_plain_is_named_once_for_all_layers() -> None:
    shape = shape_of(tiny_model("mixtral", num_local_experts=2, tie_word_embeddings=False), "moe")
    names = [line.name for line in ledger(shape, Run()).lines if line.group == "base"]
    assert "model.layers.*.mlp.gate.weight, bf16" in names
    assert "lm_head.weight, bf16" in names
    assert len(names) == len(set(names)) < 12


def test_on_a_cpu_compiled_products_are_counted_up_to_what_is_kept() -> None:
    def products(itemsize: int, *shapes: tuple[int, int]) -> float:
        return product_bytes([shapes], itemsize) / PRODUCT[itemsize]

    assert products(4, (4, 256)) == 17
    assert products(2, (4, 256)) == 17 + 4 * 5  # attention's, too
    assert products(2, (4, 256), (4, 256), (4, 257)) == 2 * 17 + 9 * 5
    assert products_kept([[(1, 8)] * 9]) == 256
    many = [[(1, length) for length in range(8, 18)]]
    assert products_kept(many) == 320
    assert product_bytes(many * 3, 4) == int(170 * PRODUCT[4])
    lengths = [[(1, length)] for length in range(8, 108)]
    assert product_bytes(lengths, 4) == int(256 * PRODUCT[4])


def test_on_a_cpu_the_process_is_what_it_was_before_the_run() -> None:
    shape = shape_of(tiny_model("llama"), "tiny")
    run = Run(device="cpu", shapes=(((1, 8), (1, 9)), ((1, 9),)))
    products = product_bytes(run.shapes, 2)
    assert ledger(shape, run).overhead == OVERHEAD["cpu"] + products
    known = ledger(shape, replace(run, process=10**9))
    assert known.overhead == 10**9 + TOUCHED_LATER + products


def test_on_a_cpu_products_of_packed_documents_are_counted() -> None:
    shapes, documents = [[(1, 300), (1, 200)], [(1, 300)]], [[200, 100, 150, 50], [100, 200]]
    # Two shapes of linears; the blocks of the longest document, and the last of each length.
    count = 2 * 17 + 5 * (4 + 4)
    assert product_bytes(shapes, 2, documents) == int(count * PRODUCT[2])
    assert product_bytes(shapes, 4, documents) == int(2 * 17 * PRODUCT[4])
    assert products_kept(shapes, documents) == 256
    assert products_kept([[(1, 9000)]], [list(range(1, 61))]) == 32 + 10 * 60
    run = Run(device="cpu", batch=2, micro_batches=4, length=512)
    assert (run.parts, run.part_tokens) == (2, 2048)
    assert replace(run, length=4096).part_tokens == 4096
    assert replace(run, packs_on_cpu=False).part_tokens == 1024
    assert replace(run, micro_batches=1).part_tokens == 1024
