"""The memory plan: more memory never keeps less, and too little is an error that says enough."""

import dataclasses
import mmap
import os
import re

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.train import footprint as footprints
from halfbyte.train import memory
from halfbyte.train.engine import LayerEngine, PlainEngine
from halfbyte.train.footprint import Footprint
from halfbyte.train.memory import (
    ActivationPlan,
    Ceiling,
    keep_few_products,
    peak_memory,
    plan_activations,
    used_memory,
)
from tests.train.test_engine import FAMILIES, batches_of, model_of

SHAPES = [[(8, 200), (8, 150)], [(4, 100)]]


@pytest.fixture(scope="module")
def engine():
    return LayerEngine(model_of(FAMILIES["llama"]))


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """Memory in use does not move while a test looks."""
    monkeypatch.setattr(memory, "used_memory", lambda device: 1_000_000)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000_000_000)


def least(engine):
    with pytest.raises(ConfigError, match="is too small") as error:
        plan_activations(engine, SHAPES, "auto", 2_000_000, "cpu")
    said = re.search(r"needs about ([\d.]+) GB", str(error.value))
    return float(said[1]) * 1e9


def test_without_a_budget_everything_that_fits_is_kept(engine):
    plan = plan_activations(engine, SHAPES, "auto", None, "cpu")
    assert plan.saved_layers == plan.layers == 3
    assert plan.predicted_bytes <= plan.budget == 8_001_000_000


def test_what_is_kept_grows_with_the_budget_and_stays_in_it(engine):
    floor = least(engine) + 5_000_000  # the message rounds to 10 MB
    kept = []
    for extra in range(0, 40_000_000, 2_000_000):
        plan = plan_activations(engine, SHAPES, "auto", int(floor + extra), "cpu")
        assert plan.predicted_bytes <= plan.budget
        kept.append(plan.saved_layers)
    assert kept == sorted(kept)
    assert kept[-1] == 3
    assert len(set(kept)) > 1


def test_the_largest_step_decides(engine):
    whole = plan_activations(engine, SHAPES, "save", None, "cpu")
    small = plan_activations(engine, SHAPES[1:], "save", None, "cpu")
    assert whole.saved_bytes == pytest.approx(7 * small.saved_bytes, rel=0.05)


@pytest.mark.parametrize(("activations", "layers"), [("save", 3), ("recompute", 0)])
def test_what_is_asked_for_is_done(engine, activations, layers):
    plan = plan_activations(engine, SHAPES, activations, 2_000_000, "cpu")
    assert plan.saved_layers == layers


def test_modules_trained_whole_are_counted(engine):
    """Their moments, and a gradient that is not yet added."""
    whole = LayerEngine(model_of(FAMILIES["llama"], modules_to_save=("lm_head",)))
    one, other = (
        plan_activations(e, SHAPES, "recompute", None, "cpu").predicted_bytes
        for e in (engine, whole)
    )
    assert other - one == 4 * 120 * 32 * 4


def test_plain_autograd_has_no_plan():
    plan = plan_activations(PlainEngine(model_of(FAMILIES["llama"])), SHAPES, "auto", None, "cpu")
    assert "transformers" in plan.line()


def test_the_line_says_how_many_are_run_again(engine):
    assert "run again" not in plan_activations(engine, SHAPES, "save", None, "cpu").line()
    line = plan_activations(engine, SHAPES, "recompute", None, "cpu").line()
    assert "0 of 3 layers keep their activations, 3 are run again" in line


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
    monkeypatch.setattr(memory, "give_back", lambda: given.append(True))
    look = Ceiling(ActivationPlan(3, 3, 10, budget, 900, room=100))
    for used, times in ((held, 0), (held + 1, 1), (held + 1, 2)):
        monkeypatch.setattr(memory, "used_memory", lambda device, used=used: used)
        look()
        assert len(given) == times


def test_the_heap_is_looked_at_before_each_layer_and_the_loss(engine):
    looks = []
    engine.passes.between = lambda: looks.append(True)
    engine.step(batches_of([(2, 9)]), 1.0, saved_layers=1)
    assert len(looks) == 2 * len(engine.layers) + 1


# --- the dial on a GPU ---------------------------------------------------------------------------

MEASURED = Footprint(
    layers=8,
    used=1000,
    kept=10,
    thin=1,
    noted=7,
    noted_part=5,
    saved=100,
    down=20,
    loss=30,
    up=150,
    saved_part=90,
    own=25,
    decoded=50,
)


def turned(budget, activations="auto", asked=True, measured=MEASURED):
    return memory._turned(measured, activations, budget if asked else None, budget, 40)


def test_more_memory_never_keeps_less_and_a_budget_is_kept_to():
    least = int(memory.MARGIN * (min(MEASURED.peak(0, away) for away in (0, 7)) + 40)) + 1
    plans = [turned(budget) for budget in range(least, least + 1200, 10)]
    assert all(memory.MARGIN * plan.predicted_bytes <= plan.budget for plan in plans)
    saved = [plan.saved_layers for plan in plans]
    assert saved == sorted(saved)
    assert saved[0] == 0
    assert saved[-1] == 8
    assert set(saved) == set(range(9))


def test_inputs_leave_only_where_that_keeps_more():
    for plan in (turned(budget) for budget in range(1400, 2600, 10)):
        stay = memory.MARGIN * (MEASURED.peak(plan.saved_layers, 0) + 40)
        assert (plan.offloaded_layers == 0) == (stay <= plan.budget)
        assert plan.host_bytes == plan.offloaded_layers * (10 + 7 * plan.notes)
        with_notes = MEASURED.peak(plan.saved_layers, plan.offloaded_layers, notes=True) + 40
        fit = plan.offloaded_layers > 0 and memory.MARGIN * with_notes <= plan.budget
        assert plan.notes == fit


@pytest.mark.parametrize("activations", ["auto", "save"])
def test_decoded_weights_stay_in_what_all_activations_leave(activations):
    full = int(memory.MARGIN * (MEASURED.peak(8, 0) + 40)) + 1
    plans = [turned(budget, activations) for budget in range(full - 200, full + 600, 10)]
    for plan in plans:
        assert plan.decoded_layers == 0 or plan.saved_layers == 8
        assert plan.decoded_layers == 0 or memory.MARGIN * plan.predicted_bytes <= plan.budget
        assert ("their decoded weights" in plan.line()) == (plan.decoded_layers > 0)
    decoded = [plan.decoded_layers for plan in plans]
    assert decoded == sorted(decoded)
    # Where all stay, no buffer is left for the others: the last comes for nothing.
    assert set(decoded) == {0, 1, 2, 3, 4, 5, 6, 8}
    assert plans[-1].predicted_bytes - MEASURED.peak(8, 0) - 40 == 7 * MEASURED.decoded


def test_a_base_that_is_not_packed_keeps_nothing_decoded():
    plan = turned(10_000, measured=dataclasses.replace(MEASURED, decoded=0))
    assert (plan.saved_layers, plan.decoded_layers) == (8, 0)


@pytest.mark.parametrize(("saved", "offloaded"), [(0, 0), (0, 7), (5, 0), (5, 2), (8, 0)])
def test_what_is_thin_stays_on_the_card(saved, offloaded):
    without = dataclasses.replace(MEASURED, thin=0).peak(saved, offloaded)
    assert MEASURED.peak(saved, offloaded) - without == (8 - saved) * MEASURED.thin


def test_a_budget_for_no_plan_says_the_least_that_would_do():
    with pytest.raises(ConfigError, match="run again from host memory this run needs"):
        turned(1100)
    assert turned(1100, asked=False).saved_layers == 0  # nobody asked: it is tried


def test_the_host_s_memory_is_a_limit_too(monkeypatch):
    tight = min(budget for budget in range(1000, 3000) if turned_fits(budget))
    assert turned(tight).offloaded_layers
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.raises(ConfigError):
        turned(tight)


def test_notes_are_left_only_where_the_host_has_room(monkeypatch):
    for room, notes in ((7 * 17, True), (7 * 17 - 1, False)):
        free = room / memory.HOST_SHARE
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        plan = turned(1, "offload")
        assert (plan.offloaded_layers, plan.notes) == (7, notes)
        assert plan.host_bytes <= room
        assert ("without attention" in plan.line()) == notes


def turned_fits(budget):
    try:
        return bool(turned(budget))
    except ConfigError:
        return False


@pytest.mark.parametrize(
    ("activations", "saved", "offloaded"), [("save", 8, 0), ("recompute", 0, 0), ("offload", 0, 7)]
)
def test_what_is_asked_for_is_done_on_a_gpu_too(activations, saved, offloaded):
    plan = turned(1, activations)
    assert (plan.saved_layers, plan.offloaded_layers) == (saved, offloaded)
    assert ("from host memory" in plan.line()) == bool(offloaded)


def test_measuring_leaves_gradients_as_they_were(monkeypatch):
    """Also those that the loss adds to: of a head and a norm trained whole."""
    made = LayerEngine(model_of(FAMILIES["llama"], modules_to_save=("lm_head", "norm")), fuse=True)
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in parameters]
    monkeypatch.setattr(footprints, "_peak", lambda run: (run(), 1)[1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    found = footprints.footprint(made, batches_of([(2, 9)]))
    assert found.kept == 2 * 9 * 32 * 4
    assert found.saved > found.saved_part > found.kept
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))


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
