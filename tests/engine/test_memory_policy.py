"""The memory plan: more memory never keeps less, and too little is an error that says enough."""

import dataclasses
import math
import mmap
import os
import re
from contextlib import suppress

import pytest
import torch

from halfbyte.engine import layerwise, memory_policy, memory_profile
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import Buckets
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import (
    HeapTrimmer,
    MemoryPlan,
    keep_few_products,
    peak_memory,
    plan_memory,
    used_memory,
)
from halfbyte.engine.weights import acquired
from halfbyte.errors import ConfigError
from halfbyte.linear import sequence_tiles
from halfbyte.plan.ledger import OVERHEAD
from halfbyte.plan.policy import ActivationPolicy, StepCost, peak
from halfbyte.runtime import device as devices
from halfbyte.runtime.device import DeviceSpec
from tests.engine.test_layerwise import FAMILIES, batches_of, model_of

SHAPES = [[(8, 200), (8, 150)], [(4, 100)]]


@pytest.fixture(scope="module")
def engine():
    return LayerEngine(model_of(FAMILIES["llama"]))


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """Memory in use does not move while a test looks."""
    monkeypatch.setattr(memory_policy, "used_memory", lambda device: 1_000_000)
    monkeypatch.setattr(memory_policy, "free_memory", lambda device: 10_000_000_000)


def least(engine):
    with pytest.raises(ConfigError, match="is too small") as error:
        plan_memory(engine, SHAPES, "auto", 2_000_000, "cpu")
    said = re.search(r"needs about ([\d.]+) GB", str(error.value))
    return float(said[1]) * 1e9


def test_without_a_budget_everything_that_fits_is_kept(engine):
    plan = plan_memory(engine, SHAPES, "auto", None, "cpu")
    assert plan.policy.saved == plan.layers == 3
    assert plan.predicted_bytes <= plan.budget == 8_001_000_000


def test_what_is_kept_grows_with_the_budget_and_stays_in_it(engine):
    floor = least(engine) + 5_000_000  # the message rounds to 10 MB
    kept = []
    for extra in range(0, 40_000_000, 2_000_000):
        plan = plan_memory(engine, SHAPES, "auto", int(floor + extra), "cpu")
        assert plan.predicted_bytes <= plan.budget
        kept.append(plan.policy.saved)
    assert kept == sorted(kept)
    assert kept[-1] == 3
    assert len(set(kept)) > 1


def test_the_largest_step_decides(engine):
    whole = plan_memory(engine, SHAPES, "save", None, "cpu")
    small = plan_memory(engine, SHAPES[1:], "save", None, "cpu")
    assert whole.saved_bytes == pytest.approx(7 * small.saved_bytes, rel=0.05)


@pytest.mark.parametrize(("activations", "layers"), [("save", 3), ("recompute", 0)])
def test_what_is_asked_for_is_done(engine, activations, layers):
    plan = plan_memory(engine, SHAPES, activations, None, "cpu")
    assert plan.policy.saved == layers
    least = plan.predicted_bytes
    # Pages of the process come and go between the two.
    assert plan_memory(engine, SHAPES, activations, least + 50_000_000, "cpu").policy == plan.policy
    with pytest.raises(ConfigError, match=r"too small.*or leave activations at auto"):
        plan_memory(engine, SHAPES, activations, 2_000_000, "cpu")


def test_modules_trained_whole_are_counted(engine):
    """Their moments, and a gradient that is not yet added."""
    whole = LayerEngine(model_of(FAMILIES["llama"], modules_to_save=("lm_head",)))
    one, other = (
        plan_memory(e, SHAPES, "recompute", None, "cpu").predicted_bytes for e in (engine, whole)
    )
    assert other - one == 4 * 120 * 32 * 4


def test_plain_autograd_has_no_plan():
    plan = plan_memory(AutogradEngine(model_of(FAMILIES["llama"])), SHAPES, "auto", None, "cpu")
    assert "transformers" in plan.summary()


def test_the_line_says_how_many_are_recomputed(engine):
    assert "recomputed" not in plan_memory(engine, SHAPES, "save", None, "cpu").summary()
    line = plan_memory(engine, SHAPES, "recompute", None, "cpu").summary()
    assert "0 of 3 layers keep their activations, 3 are recomputed in backward" in line


def test_memory_in_use_is_seen(monkeypatch):
    monkeypatch.undo()
    before = used_memory("cpu")
    held = mmap.mmap(-1, 100_000_000)  # not of a heap, which may have been kept
    held.write(b"1" * 100_000_000)
    assert used_memory("cpu") - before > 90_000_000
    assert peak_memory("cpu") >= used_memory("cpu") - 1_000_000
    held.close()


@pytest.mark.parametrize(("budget", "held"), [(910, 810), (1000, 827)])
def test_near_its_prediction_or_budget_a_run_gives_holes_back(monkeypatch, budget, held):
    given = []
    monkeypatch.setattr(memory_policy, "give_back", lambda: given.append(True))
    look = HeapTrimmer(MemoryPlan(ActivationPolicy(3), 3, 10, budget, 900, room=100))
    for used, times in ((held, 0), (held + 1, 1), (held + 1, 2)):
        monkeypatch.setattr(memory_policy, "used_memory", lambda device, used=used: used)
        look()
        assert len(given) == times


def test_the_heap_is_looked_at_before_each_layer_and_the_loss(engine):
    looks = []
    engine.passes.before_layer = lambda: looks.append(True)
    engine.step(batches_of([(2, 9)]), 1.0, ActivationPolicy(1))
    assert len(looks) == 2 * len(engine.layers) + 1


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "share"), [(25, 0.25), (None, None), (300, 1.0)])
def test_a_budget_is_torchs_limit_for_as_long_as_a_run_lasts(monkeypatch, budget, share):
    limits = []
    spec = DeviceSpec("small", (9, 0), num_sms=1, memory=100)
    monkeypatch.setattr(devices, "spec_of", lambda _: spec)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    with memory_policy.memory_limit("cpu", budget):
        assert not limits
    with suppress(ValueError), memory_policy.memory_limit("cuda", budget):
        assert limits == [share] * (share is not None)
        raise ValueError
    assert limits == [share, 1.0] * (share is not None)


COST = StepCost(
    layers=8,
    input=10,
    part_input=10,
    lora=1,
    saved=100,
    attention=7,
    attention_part=7,
    forward=20,
    forward_saved=15,
    backward=150,
    saved_part=85,
    loss=30,
    layer_args=5,
    decoded=50,
)
USED, BESIDE = 1000, 40


def planned(budget, activations="auto", asked=True, cost=COST, graphs=True):
    planner = memory_policy._Planner(cost, USED, BESIDE, budget, graphs, "cuda")
    return planner.plan(activations, asked=asked)


def reserved(policy, cost=COST, graphs=True):
    return USED + BESIDE + peak(cost, policy, graphs=graphs).reserved


def fits(policy, budget, graphs=True):
    return memory_policy.MARGIN * reserved(policy, graphs=graphs) <= budget


@pytest.mark.parametrize("graphs", [False, True])
def test_more_memory_never_keeps_less_and_a_budget_is_kept_to(graphs):
    away = ActivationPolicy.offloading(8)
    lowest = min(reserved(policy, graphs=graphs) for policy in (ActivationPolicy(), away))
    least = int(memory_policy.MARGIN * lowest) + 1
    plans = [planned(budget, graphs=graphs) for budget in range(least, least + 1200, 10)]
    assert all(memory_policy.MARGIN * plan.reserved_bytes <= plan.budget for plan in plans)
    assert all(plan.predicted_bytes <= plan.reserved_bytes for plan in plans)
    assert {plan.predicted_bytes < plan.reserved_bytes for plan in plans} == {graphs}
    saved = [plan.policy.saved for plan in plans]
    assert saved == sorted(saved)
    assert saved[0] == 0
    assert saved[-1] == 8
    assert set(saved) == set(range(9))


@pytest.mark.parametrize("graphs", [False, True])
def test_inputs_leave_only_where_that_keeps_more(graphs):
    left = set()
    least = int(memory_policy.MARGIN * reserved(ActivationPolicy.offloading(8), graphs=graphs)) + 1
    for plan in (planned(budget, graphs=graphs) for budget in range(least, 2600, 5)):
        policy = plan.policy
        stays = fits(ActivationPolicy(policy.saved), plan.budget, graphs)
        assert (policy.offloaded == 0) == stays
        assert plan.host_bytes == policy.offloaded * 10 + policy.attention_checkpoints * 7
        with_attention = ActivationPolicy.offloading(8, policy.saved, checkpoint_share=1.0)
        fit = policy.offloaded > 0 and fits(with_attention, plan.budget, graphs)
        assert policy.attention_checkpoints == fit * policy.offloaded
        left.add((policy.offloaded > 0, policy.attention_checkpoints > 0))
    assert left == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("activations", ["auto", "save"])
def test_decoded_weights_stay_in_what_all_activations_leave(activations):
    full = int(memory_policy.MARGIN * reserved(ActivationPolicy(8))) + 1
    first = full - 200 if activations == "auto" else full
    plans = [planned(budget, activations) for budget in range(first, full + 600, 10)]
    for plan in plans:
        decoded = plan.policy.decoded
        assert decoded == 0 or plan.policy.saved == 8
        assert decoded == 0 or memory_policy.MARGIN * plan.reserved_bytes <= plan.budget
        assert ("their decoded weights" in plan.summary()) == (decoded > 0)
    decoded = [plan.policy.decoded for plan in plans]
    assert decoded == sorted(decoded)
    # Where all stay, no buffer is left for the others: the last comes for nothing.
    assert set(decoded) == {0, 1, 2, 3, 4, 5, 6, 8}
    assert plans[-1].reserved_bytes - reserved(ActivationPolicy(8)) == 7 * COST.decoded


def test_a_base_that_is_not_packed_keeps_nothing_decoded():
    plan = planned(10_000, cost=dataclasses.replace(COST, decoded=0))
    assert plan.policy == ActivationPolicy(8)


def test_a_budget_for_no_plan_says_the_least_that_would_do():
    with pytest.raises(ConfigError, match="recomputed in backward from host memory this run needs"):
        planned(1100)
    assert planned(1100, asked=False).policy.saved == 0  # nobody asked: it is tried


def test_the_least_that_is_said_to_do_does():
    cost = dataclasses.replace(COST, backward=10**9)
    with pytest.raises(ConfigError, match="is too small") as error:
        planned(1100, cost=cost)
    said = float(re.search(r"needs about ([\d.]+) GB", str(error.value))[1]) * 1e9
    assert planned(int(said) + 10_000_000, cost=cost)  # it rounds to 10 MB
    with pytest.raises(ConfigError):
        planned(int(said) - 10_000_000, cost=cost)


def test_the_host_s_memory_is_a_limit_too(monkeypatch):
    tight = min(budget for budget in range(1000, 3000) if planned_fits(budget))
    assert planned(tight).policy.offloaded
    monkeypatch.setattr(memory_policy, "free_memory", lambda device: 0)
    with pytest.raises(ConfigError):
        planned(tight)


def test_attention_waits_only_where_the_host_has_room(monkeypatch):
    for room, attention in ((7 * 17, True), (7 * 17 - 1, False)):
        free = room / memory_policy.HOST_SHARE
        monkeypatch.setattr(memory_policy, "free_memory", lambda device, free=free: free)
        plan = planned(5000, "offload")
        assert plan.policy == ActivationPolicy(0, 7, 7 * attention)
        assert plan.host_bytes <= room
        assert ("without attention" in plan.summary()) == attention


def test_where_the_host_has_room_for_few_inputs_only_every_nth_waits(monkeypatch):
    for room, every in ((70, 1), (69, 2), (40, 2), (39, 3), (20, 4), (10, 8)):
        free = room / memory_policy.HOST_SHARE
        monkeypatch.setattr(memory_policy, "free_memory", lambda device, free=free: free)
        plan = planned(5000, "offload")
        assert (plan.policy.every, plan.policy.attention_checkpoints) == (every, 0)
        assert plan.policy.offloaded == 7
        assert plan.host_bytes <= room
        assert (f"every {every}th layer" in plan.summary()) == (every > 1)


def planned_fits(budget):
    try:
        return bool(planned(budget))
    except ConfigError:
        return False


@pytest.mark.parametrize(
    ("activations", "saved", "offloaded"), [("save", 8, 0), ("recompute", 0, 0), ("offload", 0, 7)]
)
def test_what_is_asked_for_is_done_on_a_gpu_too(activations, saved, offloaded):
    plan = planned(1, activations, asked=False)
    assert (plan.policy.saved, plan.policy.offloaded) == (saved, offloaded)
    assert ("from host memory" in plan.summary()) == bool(offloaded)
    least = math.ceil(memory_policy.MARGIN * plan.reserved_bytes)
    assert planned(least, activations).policy == plan.policy
    says = "keeping its activations" if saved else "recomputed in backward"
    with pytest.raises(ConfigError, match=f"{says}.*or leave activations at auto"):
        planned(least - 1, activations)


def test_what_is_in_use_is_counted_once(engine, monkeypatch):
    """The buffer of decoded weights is there already, and is of the peak; state is not there."""
    asked = []
    monkeypatch.setattr(
        memory_policy, "measured_cost", lambda _, parts: (asked.append(parts), COST)[1]
    )
    monkeypatch.setattr(memory_policy, "_largest", lambda *_: ["the largest"])
    with acquired(engine.weights, 0):
        buffer = engine.weights.nbytes
    assert buffer > 0
    plan = plan_memory(engine, SHAPES, "recompute", None, "cuda", state_bytes=300)
    assert asked == [["the largest"]]
    assert plan.used == 1_000_000 - buffer
    step = peak(COST, ActivationPolicy(), graphs=False).reserved
    assert plan.reserved_bytes == plan.used + 300 + step
    monkeypatch.setattr(LayerEngine, "captures", True)
    plan = plan_memory(engine, SHAPES, "recompute", None, "cuda", state_bytes=300)
    step = peak(COST, ActivationPolicy(), graphs=True)
    beside = plan.used + 300 + int(OVERHEAD["cuda"])  # graphs have a workspace of their own
    assert plan.reserved_bytes == beside + step.reserved
    assert plan.predicted_bytes == beside + step.allocated


def test_what_is_measured_is_the_largest_step_or_the_largest_part(engine, monkeypatch):
    shapes = [[(4, 100)], [(8, 200), (8, 150)], [(4, 300)]]
    parts = memory_policy._largest(engine, shapes, "cpu")
    assert [tuple(part.ids.shape) for part in parts] == [(8, 200), (8, 150)]
    fused = LayerEngine(model_of(FAMILIES["llama"]), fuse=True)
    monkeypatch.setattr(layerwise, "can_pack", lambda *_: True)
    fused.buckets = Buckets.of([[100, 30, 7], [600, 512]], width=32, part_tokens=700)
    (part,) = memory_policy._largest(fused, shapes, "cpu")
    assert part.shape == fused.buckets.largest
    assert part.ids.numel() == len(part.rows) == fused.buckets.largest.numel


def test_measuring_leaves_gradients_as_they_were(monkeypatch):
    """Also those that the loss adds to: of a head and a norm trained whole."""
    made = LayerEngine(model_of(FAMILIES["llama"], modules_to_save=("lm_head", "norm")), fuse=True)
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in parameters]
    above = 100_000
    monkeypatch.setattr(memory_profile, "_peak", lambda run: (run(), above)[1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    parts = made.make_parts(batches_of([(2, 9), (1, 9)]))
    found = memory_profile.measured_cost(made, parts)
    assert found.part_input == 2 * 9 * 32 * 4
    assert found.input == 3 * 9 * 32 * 4
    assert found.saved > found.saved_part > found.part_input
    assert (found.lora, found.attention) == (0, 0)
    # Beside a forward's output, and of a saved layer beside what it keeps.
    assert found.forward == above - found.part_input
    assert found.forward_saved == found.forward - found.saved_part
    assert found.backward == found.loss == above
    # What is measured of one and not of the other is never counted as less than nothing.
    above = found.saved_part - 1
    less = memory_profile.measured_cost(made, parts)
    assert (less.forward_saved, less.backward, less.saved_part) == (0, above, above)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))


def test_a_long_part_is_measured_but_what_it_would_save_on_a_shorter_one(monkeypatch):
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 12)
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 5)
    monkeypatch.setattr(memory_profile, "SHORTER", 8)
    made = LayerEngine(model_of(FAMILIES["llama"]), fuse=True)
    runs = []
    monkeypatch.setattr(memory_profile, "_peak", lambda run: (run(), runs.append(run), 50_000)[2])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    parts = made.make_parts(batches_of([(1, 40)]))
    found = memory_profile.measured_cost(made, parts)
    kept = memory_profile.saved_bytes(made, memory_profile._shorter(made))[0]
    assert found.saved == 5 * kept
    assert found.part_input == 40 * 32 * 4
    assert found.backward == 50_000
    assert found.tiled
    assert len(runs) == 5
    # Of a saved layer: both peaks, less its output and what it keeps beside the input.
    beside = 5 * (50_000 - 8 * 32 * 4 - (kept - 8 * 32 * 4))
    assert found.forward_saved == beside
    assert found.backward - found.saved_part == beside


@pytest.mark.parametrize(
    ("lengths", "capacity"), [([8, 8, 8], "256"), (range(8, 18), "320"), (range(8, 108), "1024")]
)
def test_as_many_compiled_products_are_kept_as_a_step_has(monkeypatch, lengths, capacity):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    for one in (name, "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(one, "")  # so that it is put back
        monkeypatch.delenv(one)
    keep_few_products([[(1, 8)], [(1, length) for length in lengths]])
    assert os.environ[name] == capacity
    assert os.environ["LRU_CACHE_CAPACITY"] == "1"
    keep_few_products([[(1, length) for length in range(8, 12)]])
    assert os.environ[name] == capacity


def test_parts_are_taken_together_where_copies_take_longer_than_one():
    """As many as hide the copies, or as fit; and what they keep is counted for all of them."""
    cost = dataclasses.replace(COST, weights=200, slots=2)
    budget = int(memory_policy.MARGIN * (reserved(ActivationPolicy(streamed=8), cost) + 60))
    planner = memory_policy._Planner(cost, USED, BESIDE, budget, True, "cuda", 2)
    alone = planner.plan("auto", asked=True)
    assert alone.policy.streamed > 2  # of which one part hides two
    found = set()
    for wanted in range(2, 20):
        plan = planner.plan_of_parts("auto", wanted, 2)
        if plan is None:
            continue
        found.add(plan.parts_together)
        assert plan.parts_together <= wanted
        assert memory_policy.MARGIN * plan.reserved_bytes <= budget
        step = peak(cost.of_parts(plan.parts_together), plan.policy, graphs=False)
        assert plan.reserved_bytes == USED + BESIDE + step.reserved
        assert f"for {plan.parts_together} parts of a step at a time" in plan.summary()
    assert 2 in found
    assert max(found) < 19  # more do not fit
    small = dataclasses.replace(planner, budget=int(memory_policy.MARGIN * (USED + BESIDE + 400)))
    assert small.plan_of_parts("auto", 4, 2) is None
