"""What a layer is said to keep is what autograd really keeps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.lora import LoRAConfig, attach
from halfbyte.model.build import BaseRecipe, build, finish, place
from halfbyte.nf4 import device as devices
from halfbyte.plan.activations import Dial, Gpu, backward_bytes, host_bytes, kept_bytes
from halfbyte.plan.ledger import Holding, Run, fitted, largest, ledger
from halfbyte.plan.shape import ModelShape, config_of, shape_of, shape_of_config
from halfbyte.train.engine import Batch, LayerEngine
from tests.checkpoint.families import tiny_model
from tests.devices import DEVICES

BATCH, LENGTH = 4, 64


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return shape_of_config(config_of("llama2-7b"), "llama2-7b")


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_a_layer_keeps_what_the_terms_say(
    family: str, changes: dict[str, Any], dtype: torch.dtype, fuse: bool
) -> None:
    reference = tiny_model(family, hidden_size=256, intermediate_size=640, **changes)
    recipe = BaseRecipe(compute_dtype=dtype)
    model = build(reference.config, recipe)
    for name, tensor in reference.named_parameters():
        place(model, name, tensor.detach())
    finish(model)
    attach(model, LoRAConfig(r=16), seed=0)
    engine = LayerEngine(model, fuse=fuse)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    measured, given = engine.saved_bytes(Batch(ids, ids))
    if dtype != torch.float32 and not fuse:
        measured += given  # the engine holds the input, and autograd a copy of it
    shape = shape_of(reference, family)
    layer = Run(Holding.of(recipe), fused=fuse, device="cpu").layer(shape)
    # The rotary tables are there once for all layers; whether they are counted is the engine's.
    tables = 2 * LENGTH * (shape.query // shape.heads) * dtype.itemsize
    assert measured - layer.saved * BATCH * LENGTH in (0, tables)
    assert given == layer.input * BATCH * LENGTH


def test_the_dial_says_what_is_kept(llama: ModelShape) -> None:
    layer = Run().layer(llama)
    assert layer.input == 8192
    assert layer.thin == layer.kept()["adapters"] == 2 * 7 * 16
    assert kept_bytes(layer, Dial(), 100) == 32 * 100 * (8192 + layer.thin)
    assert kept_bytes(layer, Dial(32), 100) == 32 * (100 * layer.saved + layer.copies)
    assert kept_bytes(layer, Dial(0, 32), 100) == 100 * (8192 + 32 * layer.thin)
    assert Dial.turned(llama, 5, offload=True) == Dial(5, 26, True)
    assert Dial.turned(llama, 31, offload=True) == Dial(31)
    narrow = replace(llama, hidden=2048)
    assert Dial.turned(narrow, 5, offload=True) == Dial(5, 26)
    away = kept_bytes(layer, Dial(0, 31), 100)
    assert away == 100 * (2 * 8192 + 32 * layer.thin)
    assert layer.noted == 2 * 8192 + 4 * 32
    assert kept_bytes(layer, Dial(0, 31, True), 100) == away
    more = backward_bytes(layer, Dial(0, 31, True), 100, 40)
    assert more - backward_bytes(layer, Dial(0, 31), 100, 40) == 160 * layer.noted
    some = 30 * layer.saved + 8192 + 2 * layer.thin
    assert kept_bytes(layer, Dial(30, 2), 100) == 100 * some + 30 * layer.copies
    assert host_bytes(layer, Dial(0, 32), 100) == 32 * 100 * 8192
    assert host_bytes(layer, Dial(0, 31, True), 100) == 31 * 100 * (3 * 8192 + 128)
    # What was kept need not be made again.
    again, kept = (backward_bytes(layer, dial, 100, 100) for dial in (Dial(), Dial(32)))
    assert again - kept == 100 * (layer.saved - layer.input - layer.thin)


@pytest.mark.parametrize("name", DEVICES)
def test_what_a_gates_backward_sums_apart_follows_from_the_gpu(
    llama: ModelShape, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = pytest.importorskip("halfbyte.nf4.gpu_gated", exc_type=ImportError)
    adapters = pytest.importorskip("halfbyte.nf4.gpu_adapters", exc_type=ImportError)
    spec, cpu = DEVICES[name], torch.device("cpu")
    monkeypatch.setattr(devices, "spec_of", lambda _: spec)
    layer = replace(Run().layer(llama), gpu=Gpu(spec.capability, spec.num_sms))
    shadow = adapters.Shadow(torch.empty(0), torch.empty(0), layer.rank)
    for tokens in (1, 100, 512, 2048, 8192):
        if not gated.backward_fits(shadow, shadow, cpu):
            assert layer.gated_sums(tokens) == 0
            continue
        columns = llama.intermediate
        spans = -(-tokens // gated.backward_span(tokens, columns, cpu))
        by_tile = 2 * -(-columns // gated._PASS_COLUMNS) * tokens * layer.rank * 2
        assert layer.gated_sums(tokens) == by_tile + spans * 3 * layer.rank * columns * 4


def test_fewer_multiprocessors_sum_over_longer_spans(llama: ModelShape) -> None:
    small, large = (
        replace(Run().layer(llama), gpu=Gpu((9, 0), count)).gated_sums(2048) for count in (60, 132)
    )
    assert small < large


def test_without_flash_attention_keys_and_values_of_all_heads_are_kept() -> None:
    shape = shape_of_config(config_of("llama3-8b"), "llama3-8b")
    flash = Run().layer(shape)
    other = replace(flash, gpu=Gpu((7, 5), 40))
    assert other.kept()["attention"] - flash.kept()["attention"] == 2 * 2 * shape.query
    for those in (flash, other):
        even = replace(those, shape=replace(shape, key_value=shape.query))
        assert even.kept()["attention"] == 2 * shape.query


@pytest.mark.parametrize(("rank", "filled"), [(4, 16), (16, 16), (24, 32)])
def test_thin_products_are_kept_on_a_gpu_in_16_bits_alone(
    llama: ModelShape, rank: int, filled: int
) -> None:
    run = Run(rank=rank)
    for those in (run, replace(run, fused=False)):
        layer = those.layer(llama)
        assert layer.thin == layer.kept()["adapters"] == 2 * 7 * filled
    for those in (replace(run, device="cpu"), replace(run, holding=Holding(itemsize=4))):
        layer = those.layer(llama)
        assert layer.thin == 0
        assert layer.kept()["adapters"] == layer.itemsize * 7 * rank
        assert kept_bytes(layer, Dial(), 100) == 32 * 100 * layer.input


def test_the_dial_is_turned_as_far_as_the_budget_allows(llama: ModelShape) -> None:
    run = Run(length=2048)
    tight = ledger(llama, run).needed
    assert fitted(llama, run, tight - 1) is None
    assert fitted(llama, run, tight) == run
    roomy = fitted(llama, run, 80e9)
    assert roomy is not None
    assert roomy.dial == Dial(32, decoded=32)
    assert roomy.dial.line(32) == "all kept, 32 decoded"
    between = ledger(llama, replace(run, dial=Dial(32))).needed + 4e9
    partly = fitted(llama, run, between)
    assert partly is not None
    assert 0 < partly.dial.decoded < 32
    assert ledger(llama, partly).needed <= between
    plain = replace(run, holding=Holding(quant="none"))
    lora = fitted(llama, plain, 80e9)
    assert lora is not None
    assert lora.dial == Dial(32)
    some = fitted(llama, run, 10e9)
    assert some is not None
    assert 0 < some.dial.saved < 32
    assert ledger(llama, some).peak < ledger(llama, some).needed <= 10e9
    away = fitted(llama, run, tight - 1, offload=True)
    assert away is not None
    assert away.dial.notes
    assert ledger(llama, away).on_host == away.dial.offloaded * 2048 * (3 * 8192 + 128)


def test_largest_finds_the_last_that_fits() -> None:
    assert largest(lambda n: n <= 37, 1, 1000) == 37
    assert largest(lambda n: True, 1, 1000) == 1000
    assert largest(lambda n: False, 1, 1000) is None


def test_graphs_leave_no_room_for_the_loss(llama: ModelShape) -> None:
    entries = ledger(llama, Run(length=2048))
    step = entries.scratch + entries.kept + entries.backward
    assert entries.peak == entries.resident + step
    # The last output is the graphs' own; all else of the loss is not.
    assert entries.needed == entries.peak + entries.loss - 2048 * 8192
    plain = ledger(llama, Run(length=2048, fused=False))
    assert plain.needed == plain.peak
