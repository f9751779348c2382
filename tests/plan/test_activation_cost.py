"""What a layer is said to keep is what autograd really keeps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.engine.buckets import divide
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_profile import saved_bytes
from halfbyte.engine.packing import Batch
from halfbyte.linear import experts
from halfbyte.linear.lora import LoRAConfig, attach
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.plan import activation_cost
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import (
    FRAGMENTATION,
    SMALLEST_PART,
    Run,
    fitted,
    largest,
    ledger,
    policy_of,
)
from halfbyte.plan.model_shape import ModelShape, config_of, shape_of, shape_of_config
from halfbyte.plan.policy import ActivationPolicy, peak
from halfbyte.runtime import device as devices
from halfbyte.train.step_memory import SMALLEST_PART as SMALLEST_OF_A_RUN
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
        load_tensor(model, name, tensor.detach())
    finalize(model)
    attach(model, LoRAConfig(r=16), seed=0)
    engine = LayerEngine(model, fuse=fuse)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    measured, given = saved_bytes(engine, *engine.embed(engine.make_parts([Batch(ids, ids)])))
    if dtype != torch.float32 and not fuse:
        measured += given  # the engine holds the input, and autograd a copy of it
    shape = shape_of(reference, family)
    layer = Run(Holding.of(recipe), fused=fuse, device="cpu").layer(shape)
    # The rotary tables are there once for all layers; whether they are counted is the engine's.
    tables = 2 * LENGTH * (shape.query // shape.heads) * dtype.itemsize
    assert measured - layer.saved * BATCH * LENGTH in (0, tables)
    assert given == layer.input * BATCH * LENGTH


def test_the_policy_says_what_is_kept(llama: ModelShape) -> None:
    run = Run(length=100)
    layer, cost = run.layer(llama), run.step_cost(llama)
    assert layer.input == 8192
    assert layer.lora == layer.kept()["adapters"] == 2 * 7 * 16
    assert layer.attention_checkpoint == 2 * 8192 + 4 * 32
    assert cost.kept(ActivationPolicy()) == 32 * 100 * (8192 + layer.lora)
    assert cost.kept(ActivationPolicy(32)) == 32 * (100 * layer.saved + layer.copies)
    assert cost.kept(ActivationPolicy(0, 32)) == 100 * (8192 + 32 * layer.lora)
    away, checkpointed = ActivationPolicy(0, 31), ActivationPolicy(0, 31, 31)
    assert cost.kept(away) == cost.kept(checkpointed) == 100 * (2 * 8192 + 32 * layer.lora)
    some = 30 * layer.saved + 8192 + 2 * layer.lora
    assert cost.kept(ActivationPolicy(30, 2)) == 100 * some + 30 * layer.copies
    assert cost.host_bytes(ActivationPolicy(0, 32)) == 32 * 100 * 8192
    assert cost.host_bytes(checkpointed) == 31 * 100 * (3 * 8192 + 128)
    # What was saved need not be computed again.
    assert cost.saved_part == 100 * (layer.saved - layer.input - layer.lora)


def test_layers_are_offloaded_but_for_those_near_the_saved_ones(llama: ModelShape) -> None:
    run = Run()
    assert policy_of(llama, run, 5, offload=True) == ActivationPolicy(5, 26, 26)
    assert policy_of(llama, run, 31, offload=True) == ActivationPolicy(31)
    assert policy_of(llama, run, 5, offload=False) == ActivationPolicy(5)
    narrow = replace(llama, hidden=512)
    assert policy_of(narrow, run, 5, offload=True) == ActivationPolicy(5, 26)
    # With products in 8 bits the bus has time for fewer.
    fast = policy_of(llama, replace(run, fp8=True), 5, offload=True)
    assert 0 < fast.attention_checkpoints < fast.offloaded == 26
    foreign = replace(llama, fusable=False)
    assert policy_of(foreign, run, 5, offload=True) == ActivationPolicy(5, 26)


def test_what_waits_together_is_a_part_where_examples_are_packed_and_else_the_step(
    llama: ModelShape,
) -> None:
    """Five micro-batches of 20 tokens: one part of 100, or five that wait for each other."""
    packed = Run(length=20, micro_batches=5)
    apart = replace(packed, gpu=DEVICES["t4"])  # no flash attention
    assert (packed.packs, packed.parts, packed.part_tokens) == (True, 1, 100)
    assert (apart.packs, apart.parts, apart.part_tokens) == (False, 5, 20)
    assert packed.tokens_under_way == apart.tokens_under_way == 100
    layer, cost = apart.layer(llama), apart.step_cost(llama)
    assert (cost.input, cost.part_input) == (100 * 8192, 20 * 8192)
    # The checkpoints of the layer under way and the one before, but for those of the part itself.
    away, checkpointed = (ActivationPolicy(0, 31, count) for count in (0, 31))
    cost = replace(cost, loss=0)
    more, less = (peak(cost, policy, graphs=False).allocated for policy in (checkpointed, away))
    assert more - less == 180 * layer.attention_checkpoint


@pytest.mark.parametrize("name", DEVICES)
def test_what_a_gates_backward_sums_apart_follows_from_the_gpu(
    llama: ModelShape, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = pytest.importorskip("halfbyte.linear.triton_swiglu", exc_type=ImportError)
    adapters = pytest.importorskip("halfbyte.linear.triton_lora", exc_type=ImportError)
    spec, cpu = DEVICES[name], torch.device("cpu")
    monkeypatch.setattr(devices, "spec_of", lambda _: spec)
    layer = replace(Run().layer(llama), gpu=spec)
    cast_adapters = adapters.CastAdapters(torch.empty(0), torch.empty(0), layer.rank)
    for tokens in (1, 100, 512, 2048, 8192):
        if not gated.backward_fits(cast_adapters, cast_adapters, cpu):
            assert layer.gated_sums(tokens) == 0
            continue
        columns = llama.intermediate
        spans = -(-tokens // gated.backward_span(tokens, columns, cpu))
        by_tile = 2 * -(-columns // gated._PASS_COLUMNS) * tokens * layer.rank * 2
        assert layer.gated_sums(tokens) == by_tile + spans * 3 * layer.rank * columns * 4


def test_fewer_multiprocessors_sum_over_longer_spans(llama: ModelShape) -> None:
    small, large = (
        replace(Run().layer(llama), gpu=replace(DEVICES["h100"], num_sms=count)).gated_sums(2048)
        for count in (60, 132)
    )
    assert small < large


def test_without_flash_attention_keys_and_values_of_all_heads_are_kept() -> None:
    shape = shape_of_config(config_of("llama3-8b"), "llama3-8b")
    flash = Run().layer(shape)
    other = replace(flash, gpu=DEVICES["t4"])
    assert other.kept()["attention"] - flash.kept()["attention"] == 2 * 2 * shape.query
    for those in (flash, other):
        even = replace(those, shape=replace(shape, key_value=shape.query))
        assert even.kept()["attention"] == 2 * shape.query


# The widths of Llama-2-7B, in 16 bits: of its stream, queries and keys, and of its MLP.
WIDE, INNER = 2 * 4096, 2 * 11008
# What its functions give, but the MLP's: norms and their sum, q, k, v, attention; statistics.
OUTSIDE = (3 + 3 + 1) * WIDE + 4 * (2 + 32)


@pytest.mark.parametrize(
    ("capability", "rank", "tokens", "inner"),
    [
        # On Hopper one kernel makes gate, up and their product, and only that is kept.
        ((9, 0), 16, 2048, 1),
        ((9, 0), 32, 5000, 1),
        # Too few rows for it, or too high a rank; and on any other GPU there are all three.
        ((9, 0), 16, 2047, 3),
        ((9, 0), 64, 2048, 3),
        ((7, 5), 16, 2048, 3),
        ((8, 0), 16, 2048, 3),
        ((8, 9), 16, 100, 3),
        ((10, 0), 16, 8192, 3),
    ],
    ids=str,
)
def test_what_a_forward_has_beside_input_and_output(
    llama: ModelShape, capability: tuple[int, int], rank: int, tokens: int, inner: int
) -> None:
    gpu = replace(DEVICES["h100"], capability=capability)
    run = Run(rank=rank, length=tokens, gpu=gpu)
    layer, cost = run.layer(llama), run.step_cost(llama)
    assert layer.forward(tokens) == tokens * (OUTSIDE + inner * INNER)
    # Of a saved layer: the product is not kept, nor is what the MLP adds to the stream.
    assert layer.forward_saved(tokens) == tokens * (INNER + WIDE)
    assert cost.forward == layer.forward(tokens)
    assert cost.forward_saved == layer.forward_saved(tokens)


def test_a_forward_is_that_of_one_part(llama: ModelShape) -> None:
    """Also where micro-batches wait for each other."""
    apart = Run(length=20, micro_batches=5, gpu=DEVICES["t4"])
    assert (apart.tokens_under_way, apart.part_tokens) == (100, 20)
    layer, cost = apart.layer(llama), apart.step_cost(llama)
    assert (cost.forward, cost.forward_saved) == (layer.forward(20), layer.forward_saved(20))


def test_a_forward_with_fewer_heads_of_keys() -> None:
    """Without flash attention k and v are there for each of the queries' heads, too."""
    shape = shape_of_config(config_of("llama3-8b"), "llama3-8b")
    keys, inner = 2 * 1024, 2 * 14336
    outside = (3 + 1 + 1) * WIDE + 2 * keys + 4 * (2 + 32)
    flash = Run(gpu=DEVICES["a100"]).layer(shape)
    other = Run(gpu=DEVICES["t4"]).layer(shape)
    assert flash.forward(100) == 100 * (outside + 3 * inner)
    assert other.forward(100) == 100 * (outside + 2 * WIDE + 3 * inner)
    assert flash.forward_saved(100) == other.forward_saved(100) == 100 * (inner + WIDE)


def test_a_forward_that_is_not_multiplied_in_16_bits_has_what_it_would_keep(
    llama: ModelShape,
) -> None:
    """In 32 bits, fused, gate and up and their product are kept; else autograd is not counted."""
    wide = Run(holding=Holding(itemsize=4)).layer(llama)
    adapters = 4 * 7 * 16
    everything = 2 * (OUTSIDE - 4 * (2 + 32) + 3 * INNER) + adapters + 4 * (2 + 32)
    assert wide.forward(100) == 100 * everything == 100 * (wide.saved - wide.input)
    assert wide.forward_saved(100) == 0
    for run in (Run(fused=False), Run(device="cpu"), Run(device="cpu", fused=False)):
        layer = run.layer(llama)
        assert (layer.forward(100), layer.forward_saved(100)) == (0, 0)


def test_one_kernel_runs_from_as_many_rows_as_is_said() -> None:
    products = pytest.importorskip("halfbyte.linear.triton_matmul", exc_type=ImportError)
    gated = pytest.importorskip("halfbyte.linear.triton_swiglu", exc_type=ImportError)
    assert activation_cost._FEWEST_ROWS == products.FEWEST_ROWS
    assert activation_cost.GATED_RANK == gated._PASS_RANK


@pytest.mark.parametrize(("rank", "filled"), [(4, 16), (16, 16), (24, 32)])
def test_products_with_a_are_kept_on_a_gpu_in_16_bits_alone(
    llama: ModelShape, rank: int, filled: int
) -> None:
    run = Run(rank=rank)
    for those in (run, replace(run, fused=False)):
        layer = those.layer(llama)
        assert layer.lora == layer.kept()["adapters"] == 2 * 7 * filled
    for those in (replace(run, device="cpu"), replace(run, holding=Holding(itemsize=4))):
        layer = those.layer(llama)
        assert layer.lora == 0
        assert layer.kept()["adapters"] == layer.itemsize * 7 * rank
        cost = replace(those, length=100).step_cost(llama)
        holes = FRAGMENTATION[those.device]
        assert cost.kept(ActivationPolicy()) == 32 * int(holes * 100 * layer.input)


def test_as_many_layers_are_saved_as_the_budget_allows(llama: ModelShape) -> None:
    run = Run(length=2048)
    tight = ledger(llama, run).needed
    assert fitted(llama, run, tight - 1) is None
    assert fitted(llama, run, tight) == run
    roomy = fitted(llama, run, 80e9)
    assert roomy is not None
    assert roomy.policy == ActivationPolicy(32, decoded=32)
    assert roomy.policy.summary(32) == "all saved, 32 decoded"
    between = ledger(llama, replace(run, policy=ActivationPolicy(32))).needed + 4e9
    partly = fitted(llama, run, between)
    assert partly is not None
    assert 0 < partly.policy.decoded < 32
    assert ledger(llama, partly).needed <= between
    plain = replace(run, holding=Holding(quant="none"))
    lora = fitted(llama, plain, 80e9)
    assert lora is not None
    assert lora.policy == ActivationPolicy(32)
    some = fitted(llama, run, 10e9)
    assert some is not None
    assert 0 < some.policy.saved < 32
    assert ledger(llama, some).peak < ledger(llama, some).needed <= 10e9
    one_more = replace(some, policy=ActivationPolicy(some.policy.saved + 1))
    assert ledger(llama, one_more).needed > 10e9
    away = fitted(llama, run, tight - 1, offload=True)
    assert away is not None
    assert away.policy.attention_checkpoints == away.policy.offloaded > 0
    assert ledger(llama, away).on_host == away.policy.offloaded * 2048 * (3 * 8192 + 128)


def test_largest_finds_the_last_that_fits() -> None:
    assert largest(lambda n: n <= 37, 1, 1000) == 37
    assert largest(lambda n: True, 1, 1000) == 1000
    assert largest(lambda n: False, 1, 1000) is None


def test_graphs_leave_no_room_for_the_loss(llama: ModelShape) -> None:
    run = Run(length=2048)
    entries = ledger(llama, run)
    assert entries.peak == entries.resident + entries.step.allocated
    assert entries.needed == entries.peak + entries.cost.loss
    for eager in (replace(run, graphs=False), replace(run, fused=False)):
        assert ledger(llama, eager).needed == ledger(llama, eager).peak


@pytest.mark.parametrize("policy", [ActivationPolicy(), ActivationPolicy(32)], ids=str)
def test_memory_of_packed_examples_is_that_of_a_part(
    llama: ModelShape, policy: ActivationPolicy
) -> None:
    """However many parts; micro-batches that are not packed wait for each other."""
    one = Run(batch=4, length=2048, policy=policy)
    many = replace(one, micro_batches=8)
    assert (many.parts, many.part_tokens) == (8, 8192)
    assert ledger(llama, many).needed == ledger(llama, one).needed
    for changes in ({"fused": False}, {"gpu": DEVICES["t4"]}, {"holding": Holding(itemsize=4)}):
        one, many = (replace(run, **changes) for run in (one, many))
        more = ledger(llama, many).kept - ledger(llama, one).kept
        assert more > 6.9 * ledger(llama, one).kept


@given(batch=st.integers(1, 40), micro=st.integers(1, 40), length=st.integers(1, 20_000))
def test_parts_are_those_that_examples_are_divided_into(
    batch: int, micro: int, length: int
) -> None:
    run = Run(batch=batch, micro_batches=micro, length=length)
    parts = divide([length] * (batch * micro))
    assert run.parts == len(parts)
    assert run.part_tokens == max(map(len, parts)) * length
    assert run.tokens == batch * micro * length


@given(batch=st.integers(1, 200), length=st.integers(1, 20_000))
def test_parts_are_made_smaller_as_a_run_does(batch: int, length: int) -> None:
    assert SMALLEST_PART == SMALLEST_OF_A_RUN
    run = Run(batch=batch, length=length)
    while (smaller := run.with_smaller_parts()) is not None:
        assert smaller.part_tokens < run.part_tokens
        run = smaller
        parts = divide([length] * batch, run.part_size)
        assert run.part_tokens == max(map(len, parts)) * length
    assert run.part_tokens <= max(length, 1.25 * max(length, SMALLEST_PART))
    assert replace(run, part_size=8192, fused=False).with_smaller_parts() is None


def test_few_experts_decoded_at_a_time_have_few_rows() -> None:
    sizes = activation_cost.DECODED_BYTES, activation_cost.LEAST_DECODED_BYTES
    assert sizes == (experts.DECODED_BYTES, experts.LEAST_DECODED_BYTES)
    shape = shape_of_config(config_of("gpt-oss-20b"), "gpt-oss-20b")
    run = Run()
    offloaded = replace(run, policy=policy_of(shape, run, 0, offload=True))
    tokens, each = 2048, 2 * 2 * 2880 * 2880  # bytes of an expert's gate and up
    for backward, inner in ((False, 1), (True, 3)):
        all_rows, few = (
            way.layer(shape).experts(tokens, backward=backward) for way in (run, offloaded)
        )
        assert all_rows == 2 * 4 * tokens * (1 + inner) * 2880 + experts.DECODED_BYTES
        assert few == 2 * tokens * (4 + inner) * 2880 + each
    # Saved layers beside offloaded ones: `auto` decodes as many as otherwise.
    some = replace(run, policy=policy_of(shape, run, 1, offload=True))
    assert some.layer(shape) == run.layer(shape)
