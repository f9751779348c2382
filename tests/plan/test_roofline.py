"""The roofline, against what was measured; and the advice, where it is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.errors import ConfigError
from halfbyte.plan.advice import MOST, Way, advice, choices, longest_context, usable, ways
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import PART_TOKENS, Run, fitted, ledger, policies_of, policy_of
from halfbyte.plan.model_shape import ModelShape, config_of, shape_of_config, shape_of_known
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.roofline import (
    CARDS,
    DISK_BANDWIDTH,
    LAUNCH_SECONDS,
    GpuSpec,
    card_named,
    gpu_of_driver,
    measure_machine,
    step_seconds,
)
from tests.devices import DEVICES


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return shape_of_config(config_of("llama2-7b"), "llama2-7b")


@pytest.fixture(scope="module")
def smol() -> ModelShape:
    return shape_of_config(config_of("smollm2-135m"), "smollm2-135m")


@pytest.mark.parametrize(
    ("quant", "keep", "batch", "length", "milliseconds", "gigabytes"),
    [
        ("nf4", "notes", 1, 512, 51.0, 4.57),
        ("nf4", "notes", 2, 512, 83.6, 4.67),
        ("nf4", "notes", 1, 2048, 146.7, 4.86),
        ("nf4", "notes", 4, 2048, 540.7, 6.02),
        ("nf4", "offload", 1, 2048, 156.4, 4.829),
        ("nf4", "offload", 4, 2048, 568.6, 5.881),
        ("nf4", "save", 4, 2048, 430.0, 33.757),
        ("none", "notes", 1, 512, 40.0, 13.76),
        ("none", "notes", 1, 2048, 138.2, 14.05),
        ("none", "notes", 4, 2048, 525.2, 15.2),
    ],
)
def test_steps_of_a_7b_on_an_h100_are_as_measured(
    llama: ModelShape,
    quant: str,
    keep: str,
    batch: int,
    length: int,
    milliseconds: float,
    gigabytes: float,
) -> None:
    """benchmarks/results/2026-11-24_gpu_step_{notes,forms}.json; in CUDA graphs."""
    policy = {
        "offload": ActivationPolicy(0, 31),
        "notes": ActivationPolicy(0, 31, 31),
        "save": ActivationPolicy(32),
    }[keep]
    run = Run(
        Holding(quant),
        batch=batch,
        length=length,
        optimizer="adamw_8bit",
        policy=policy,
        embedding_on_host=True,
    )
    predicted = step_seconds(llama, run, CARDS["h100"]).total
    assert predicted * 1000 == pytest.approx(milliseconds, rel=0.05)
    assert ledger(llama, run).peak / 1e9 == pytest.approx(gigabytes, rel=0.01)
    for by_hand in (replace(run, fused=False), replace(run, graphs=False)):
        assert step_seconds(llama, by_hand, CARDS["h100"]).total >= 32 * 0.006


@pytest.mark.parametrize(
    ("quant", "itemsize", "gigabytes"),
    [("nf4", 2, 1.601), ("nf4", 4, 2.188), ("none", 2, 1.748), ("none", 4, 2.552)],
)
def test_peaks_on_a_cpu_are_those_of_four_runs(
    smol: ModelShape, quant: str, itemsize: int, gigabytes: float
) -> None:
    """benchmarks/results/2026-11-24_cpu_memory.json: SmolLM2-135M, 4x256 tokens, all kept."""
    holding = Holding(quant, itemsize=itemsize)
    run = Run(holding, batch=4, length=256, fused=False, device="cpu", policy=ActivationPolicy(30))
    assert ledger(smol, run).peak / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_time_follows_what_is_done(llama: ModelShape) -> None:
    def seconds(run: Run) -> Any:
        return step_seconds(llama, run, CARDS["h100"])

    one = Run(length=2048)
    again, kept = seconds(one), seconds(replace(one, policy=ActivationPolicy(32)))
    assert again.products == pytest.approx((3 - 11008 * 4096 / 202_375_168) / 2 * kept.products)
    four = seconds(replace(one, micro_batches=4))
    assert four.decoding == again.decoding  # once for all micro-batches of a part
    assert four.products == pytest.approx(4 * again.products)
    eight = seconds(replace(one, micro_batches=8))
    assert eight.decoding == pytest.approx(2 * again.decoding)  # of two parts
    apart = replace(one, micro_batches=8, fused=False)
    assert seconds(apart).decoding == pytest.approx(again.decoding)  # once for all, layer by layer
    # Graphs are of packed parts of layers that are known; else Python launches each part's kernels.
    assert eight.launching == 0
    for by_hand, parts in ((apart, 8), (replace(one, micro_batches=8, graphs=False), 2)):
        assert seconds(by_hand).launching == pytest.approx(parts * 32 * LAUNCH_SECONDS)
    foreign = replace(llama, fusable=False)
    assert step_seconds(foreign, one, CARDS["h100"]).launching == 32 * LAUNCH_SECONDS
    # Attention sees a document, whatever it is packed with.
    twice = seconds(replace(one, batch=2))
    long = seconds(replace(one, length=4096))
    assert long.attention == pytest.approx(2 * twice.attention)
    assert long.products == pytest.approx(twice.products)
    away = replace(one, policy=ActivationPolicy(0, 32))
    assert seconds(away).waiting == 0
    slow = CARDS["h100"]._replace(link=1e9)
    assert step_seconds(llama, away, slow).total == pytest.approx(2 * 2048 * 32 * 8192 / 1e9)


def test_notes_are_worth_their_way_where_the_bus_is_faster_than_a_layer(llama: ModelShape) -> None:
    policy = ActivationPolicy(0, 31, 31)
    run = Run(length=2048, policy=policy)
    cost = run.step_cost(llama)
    for name, card in CARDS.items():
        if card.capability < (8, 0):  # no flash attention
            assert card.checkpoint_width > 1e9
            continue
        seconds = step_seconds(llama, run, card)
        # Passes: neither down nor, with checkpoints, o is computed again.
        forward = seconds.products / 2.7 + seconds.attention / 3.53
        away = replace(run, checkpoint_width=card.checkpoint_width)
        chosen = policy_of(llama, away, 0, offload=True)
        assert cost.host_bytes(chosen) / card.link <= 1.1 * forward, name
        if chosen.attention_checkpoints < chosen.offloaded:  # two more would be too many
            more = cost.host_bytes(chosen) + 2 * cost.attention
            assert more / card.link >= 0.9 * forward, name
    assert 2048 < CARDS["h100"].checkpoint_width < 4096 < CARDS["b200"].checkpoint_width
    assert policy_of(llama, run, 0, offload=True) == policy
    wide = replace(run, checkpoint_width=CARDS["b200"].checkpoint_width)
    assert 0 < policy_of(llama, wide, 0, offload=True).attention_checkpoints < 31


def test_cards_by_name() -> None:
    assert card_named("A100").name == "A100 80 GB"
    assert card_named("RTX 4090").name == "RTX 4090"
    with pytest.raises(ConfigError, match="expected one of t4, 3060, 4060, 4080, 3090"):
        card_named("voodoo2")


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10G", None),
    ],
)
def test_cards_by_what_the_driver_calls_them(driver: str, card: str | None) -> None:
    assert gpu_of_driver(driver) == (CARDS[card] if card else None)


def test_cards_are_what_their_drivers_say() -> None:
    for name, spec in DEVICES.items():
        card = gpu_of_driver(spec.name)
        if card is None:
            assert name in ("v100", "5090")
            continue
        assert card.gpu.capability == spec.capability
        assert card.gpu.num_sms == spec.num_sms
        assert card.memory == pytest.approx(spec.memory, rel=0.02)


def test_this_machine_is_measured() -> None:
    card = measure_machine()
    assert card.measured
    assert 1e9 < card.flops < 1e16
    assert 1e8 < card.bandwidth < 1e14
    assert card.memory > 1e8


def found(shape: ModelShape, card: GpuSpec, **changes: Any) -> list[Way]:
    return ways(shape, replace(Run(length=2048, gpu=card.gpu), **changes), card, card.memory)


def test_ways_of_a_7b_on_cards_of_all_sizes(llama: ModelShape) -> None:
    fits = {
        name: [way.fits for way in found(llama, card, length=512)]
        for name, card in CARDS.items()
        if name in ("4090", "h100")
    }
    assert fits == {"4090": [True] * 6, "h100": [True] * 6}
    small = CARDS["4090"]._replace(memory=8e9)
    names = {way.name: way for way in found(llama, small)}
    assert not names["16-bit LoRA"].fits
    assert names["QLoRA"].fits
    message = advice(list(names.values()), small.memory)
    assert message.startswith("Take QLoRA (--quant nf4): 16-bit LoRA would need 15.")


def test_lora_is_advised_where_it_fits_and_is_as_fast(llama: ModelShape) -> None:
    card = CARDS["h200"]
    roomy = found(llama, card)
    message = advice(roomy, card.memory)
    assert message.startswith("Take 16-bit LoRA (--quant none): it fits")
    # Not what it takes where all is kept and decoded, which is more than LoRA takes.
    qlora = roomy[1]
    assert qlora.run.policy.decoded == 32
    assert qlora.seconds.decoding == 0.0
    assert qlora.least < roomy[0].ledger.needed < qlora.ledger.needed
    assert message.endswith(f"would do with {qlora.least / 1e9:.1f} GB, every layer recomputed.")


def test_qlora_is_advised_where_it_leaves_room_to_be_faster(llama: ModelShape) -> None:
    card = CARDS["4090"]
    message = advice(found(llama, card, micro_batches=4), card.memory)
    assert "16-bit LoRA fits too" in message
    assert "run more layers again" in message


def test_offloading_is_advised_where_nothing_else_fits(llama: ModelShape) -> None:
    card = CARDS["4090"]._replace(memory=7.5e9)
    message = advice(found(llama, card, length=6144), card.memory)
    assert message.startswith("Take QLoRA + offload (--quant nf4 --activations offload): 16-bit")


def test_short_examples_go_in_smaller_parts_before_nothing_fits(llama: ModelShape) -> None:
    """As many tokens as above, of three examples."""
    card = CARDS["4090"]._replace(memory=7.5e9)
    budget = usable(card.memory, "cuda")
    qlora = found(llama, card, micro_batches=3)[1]
    assert qlora.fits
    assert (qlora.run.parts, qlora.run.part_tokens) == (3, 2048)
    assert qlora.ledger.needed <= budget
    together = replace(qlora.run, part_size=PART_TOKENS, policy=ActivationPolicy())
    assert together.part_tokens == 6144
    assert ledger(llama, together).needed > budget
    # Not where they are not packed.
    turing = card._replace(capability=(7, 5))
    assert not found(llama, turing, micro_batches=3)[1].fits


def test_nothing_fits_is_said_with_what_would(llama: ModelShape) -> None:
    tiny = CARDS["t4"]._replace(memory=1.5e9)
    assert "Take a smaller model or a larger card" in advice(found(llama, tiny), 1.5e9)
    short = CARDS["4090"]._replace(memory=3e9)
    message = advice(found(llama, short, length=100_000), 3e9)
    assert "Nothing fits" in message
    assert "tokens would fit" in message


@pytest.mark.parametrize("name", ["4090", "t4"])
def test_longest_largest_and_biggest_are_the_last_that_fit(llama: ModelShape, name: str) -> None:
    card = CARDS[name]
    budget = usable(card.memory, "cuda")
    several = found(llama, card)
    assert any(way.fits for way in several)
    for way in several:
        offload = "offload" in way.name or way.run.waits is not None
        policies = policies_of(llama, way.run, 0, offload=offload)
        streamed = llama.layers if way.run.waits else 0
        tried = [replace(policy, streamed=streamed) for policy in policies]
        run = replace(way.run, batch=1, micro_batches=1)

        def fits(run: Run, tried: list[ActivationPolicy] = tried) -> bool:
            while (smaller := run.with_smaller_parts()) is not None:
                run = smaller
            runs = (replace(run, policy=policy) for policy in tried)
            return any(ledger(llama, each).needed <= budget for each in runs)

        assert fits(replace(run, length=way.longest or 1)) == (way.longest is not None)
        assert not fits(replace(run, length=(way.longest or 0) + 1))
        assert fits(replace(run, batch=way.most or 1)) == (way.most is not None)
        if run.packs:  # parts are as small as need be, however many there are
            assert way.most == MOST
        else:
            assert not fits(replace(run, batch=(way.most or 0) + 1))


def test_a_70b_fits_on_a_small_card_if_its_weights_wait_on_the_host() -> None:
    shape = shape_of_known("70b")
    assert shape is not None
    run = Run(length=1024, micro_batches=8, optimizer="adamw_8bit", embedding_on_host=True)
    card = CARDS["4060"]
    several = {way.name: way for way in ways(shape, run, card, card.memory, host_memory=64e9)}
    assert not several["QLoRA + offload"].fits
    host = several["QLoRA + host"]
    assert host.fits
    assert 35e9 < host.ledger.on_host < 64e9
    assert host.run.policy.streamed > 70
    # Copying 35 GB twice takes less time on this bus than the products on this card.
    assert host.seconds.waiting == 0
    # Without room in host memory, the disk; a step then waits for it.
    several = {way.name: way for way in ways(shape, run, card, card.memory, host_memory=16e9)}
    assert not several["QLoRA + host"].fits
    disk = several["QLoRA + disk"]
    assert disk.fits
    assert disk.ledger.on_host < 16e9
    message = advice(list(several.values()), card.memory)
    assert message.startswith("Take QLoRA + disk (--quant nf4 --weights disk)")
    few = replace(run, micro_batches=1)
    several = {way.name: way for way in ways(shape, few, card, card.memory, host_memory=16e9)}
    reading = 2 * several["QLoRA + disk"].run.policy.streamed * 0.44e9 / DISK_BANDWIDTH
    assert several["QLoRA + disk"].seconds.total == pytest.approx(reading, rel=0.1)


def test_state_waits_on_the_host_too_where_only_that_makes_room() -> None:
    """``halfbyte plan 70b --gpu-memory 8GB --host-memory 64GB``."""
    shape = shape_of_known("70b")
    assert shape is not None
    run, card = Run(micro_batches=8, embedding_on_host=True), CARDS["4060"]
    found = ways(shape, run, card, 8e9, host_memory=64e9)
    several = {way.name: way for way in found}
    assert "QLoRA + host" in several
    assert not several["QLoRA + host"].fits
    paged = several["QLoRA + host + paging"]
    assert paged.fits
    assert paged.option == "--quant nf4 --weights host --optim paged_adamw_32bit"
    assert paged.ledger.on_host < 64e9
    assert advice(found, 8e9).startswith(f"Take QLoRA + host + paging ({paged.option})")
    larger = {way.name for way in ways(shape, run, card, 12e9, host_memory=64e9)}
    assert "QLoRA + host + paging" not in larger


def test_gpus_that_share_the_weights_hold_their_part() -> None:
    shape = shape_of_known("llama2-70b")
    assert shape is not None
    run, card = Run(length=2048), CARDS["h200"]
    several = {way.name: way for way in ways(shape, run, card, card.memory, gpus=2)}
    whole, half = (several[name].ledger.base for name in ("QLoRA", "QLoRA + shard"))
    plain = 2 * 32000 * 8192 * 2  # embedding and head in 16 bits, and norms
    assert half - plain == pytest.approx((whole - plain) / 2, rel=0.01)


def test_the_largest_model_is_near_one_that_fits() -> None:
    """Llama-2-13B and -70B stand about where the 7B's proportions, scaled, say."""
    shape = shape_of_config(config_of("llama2-7b"), "7b")
    larger = shape_of_config(config_of("llama2-13b"), "13b")
    run = Run(length=1024)
    need = ledger(larger, run).needed
    card = CARDS["4090"]._replace(memory=(need + 0.6e9) / 0.98)
    way = next(way for way in ways(shape, run, card, card.memory) if way.name == "QLoRA")
    assert way.parameters == pytest.approx(larger.parameters, rel=0.05)


def test_each_policy_and_each_optimizer_is_told(llama: ModelShape) -> None:
    run = Run(length=2048)
    found = {choice.value: choice for choice in choices(llama, run)}
    modes = {"adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"}
    assert set(found) == {"save", "recompute", "offload"} | modes
    assert found["save"].nbytes > found["recompute"].nbytes > found["offload"].nbytes
    assert found["offload"].on_host == 31 * 2048 * (3 * 8192 + 128)
    state = found["adamw"].nbytes
    assert found["paged_adamw_32bit"].on_host == state
    assert found["adamw"].peak - found["paged_adamw_32bit"].peak == state
    assert state / 4.1 < found["adamw_8bit"].nbytes < state / 3.8
    on_cpu = choices(llama, replace(run, device="cpu"))
    assert not any(choice.on_host for choice in on_cpu)


def test_the_longest_context_follows_from_the_memory_of_the_host(llama: ModelShape) -> None:
    """Attention is recomputed, and then fewer inputs wait there, before sequences are shorter."""
    h100 = CARDS["h100"]
    run = replace(found(llama, h100)[0].run, holding=Holding(), batch=1, micro_batches=1)
    longest, policies = [], []
    for host in (30e9, 60e9, 120e9):
        several = ways(llama, run, h100, 24e9, host_memory=host)
        way = next(way for way in several if way.name == "QLoRA + offload")
        longest.append(way.longest or 0)
        at = replace(run, length=131_072, embedding_on_host=True)
        tight = fitted(llama, at, usable(24e9, "cuda"), offload=True, host=host)
        assert tight is not None
        policies.append((tight.policy.attention_checkpoints > 0, tight.policy.every))
        assert ledger(llama, tight).on_host <= host
    assert longest == sorted(longest)
    assert policies == [(False, 2), (False, 1), (True, 1)]
    best = longest_context(several)
    assert best is not None
    assert best.longest == max(way.longest or 0 for way in several)
