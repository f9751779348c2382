"""The training loop: normalisation, clipping, resuming, loss scale, and memory that runs out."""

import json
import math
import time
import weakref
from functools import partial

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig

from halfbyte.config.schema import TrainConfig
from halfbyte.engine import forward_backward
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import Buckets
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import HOST_SHARE, MARGIN, MemoryPlan
from halfbyte.engine.objective import CrossEntropy
from halfbyte.engine.packing import Batch
from halfbyte.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    OutOfMemoryError,
    UserError,
)
from halfbyte.linear.lora import adapter_parameters, frozen_linears
from halfbyte.plan.policy import ActivationPolicy, StepCost, peak
from halfbyte.runtime.device import is_out_of_memory
from halfbyte.train import step_memory
from halfbyte.train.loss_scale import LossScale
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer
from tests.engine.test_forward_backward import HostOffloader, Recorded
from tests.engine.test_layerwise import FAMILIES, SIZES, batches_of, model_of


def config(**options):
    return TrainConfig(model="-", data="-", output="-", **options)


def trainer(model, **options):
    made = config(**options)
    schedule = Schedule(made.learning_rate, "constant", 0, 10)
    return Trainer(LayerEngine(model), adapter_parameters(model), made, schedule)


def split(whole, size):
    starts = range(0, len(whole.input_ids), size)
    return [Batch(whole.input_ids[s : s + size], whole.labels[s : s + size]) for s in starts]


class Halved(CrossEntropy):
    """The same loss, of twice as many terms."""

    def count_terms(self, batches):
        return 2 * super().count_terms(batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_is_divided_by_the_terms_of_its_objective(dtype):
    results = []
    for objective in (CrossEntropy(), Halved()):
        made = trainer(model_of(FAMILIES["llama"], dtype=dtype))
        made.engine.objective = objective
        results.append(made.step(0, batches_of([(2, 17)])))
    one, half = results
    assert half.loss == pytest.approx(one.loss / 2, rel=1e-6)
    assert half.grad_norm == pytest.approx(one.grad_norm / 2, rel=1e-3)


def test_one_by_eight_is_two_by_four_is_eight_by_one():
    """Rows differ in their supervised tokens, so a mean of means would be another loss."""
    (whole,) = batches_of([(8, 21)])
    whole.labels[3, 2:] = -100
    results = {}
    for size in (1, 2, 4, 8):
        model = model_of(FAMILIES["llama"])
        made = trainer(model, max_grad_norm=0.0)
        made.memory.policy = ActivationPolicy(3)
        results[size] = made.step(0, split(whole, size))
    for size in (2, 4, 8):
        assert results[size].loss == pytest.approx(results[1].loss, rel=1e-6)
        assert results[size].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    labelled = int((whole.labels != -100).sum())
    logits = model_of(FAMILIES["llama"])(whole.input_ids).logits
    mean = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), whole.labels.flatten(), reduction="sum"
    )
    assert results[1].loss == pytest.approx(mean.item() / labelled, rel=1e-5)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory_is_torchs_adamw(max_grad_norm, weight_decay):
    options = {
        "learning_rate": 1e-2,
        "max_grad_norm": max_grad_norm,
        "weight_decay": weight_decay,
        "adam_beta1": 0.8,
    }
    ours, theirs = model_of(FAMILIES["llama"]), model_of(FAMILIES["llama"])
    made = trainer(ours, **options)
    reference = list(adapter_parameters(theirs).values())
    optimizer = torch.optim.AdamW(
        reference, lr=1e-2, betas=(0.8, 0.999), weight_decay=weight_decay, foreach=False
    )
    for step in range(4):
        batches = batches_of([(2, 13), (2, 9)])
        made.memory.policy = ActivationPolicy(3)
        made.step(step, batches)
        total = sum(int((b.labels != -100).sum()) for b in batches)
        for batch in batches:
            logits = theirs(input_ids=batch.input_ids).logits
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
            ).div(total).backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(reference, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(adapter_parameters(ours).values(), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_loraplus_steps_as_peft_s_optimizer_does():
    """From equal gradients; Adam's first steps are as long as the learning rate."""
    model = model_of(FAMILIES["llama"])
    wrapped = nn.ModuleDict({"model": nn.Module()})
    for name, parameter in adapter_parameters(model).items():
        copy = nn.Parameter(parameter.detach().clone())
        wrapped["model"].register_parameter(name.replace(".", "_") + "_weight_default", copy)
    theirs = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)
    made = trainer(model, learning_rate=1e-2, loraplus_lr_ratio=8.0, max_grad_norm=0.0)
    for step in range(2):
        made.clear_gradients = lambda: None  # to see the gradients afterwards
        made.memory.policy = ActivationPolicy(3)
        made.step(step, batches_of([(2, 13)]))
        for one, other in zip(
            adapter_parameters(model).values(), wrapped.parameters(), strict=True
        ):
            other.grad = one.grad.clone()
            one.grad.zero_()
        theirs.step()
    for one, other in zip(adapter_parameters(model).values(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_modules_trained_whole_step_at_the_plain_rate():
    made = trainer(model_of(FAMILIES["llama"], modules_to_save=("lm_head",)), loraplus_lr_ratio=8.0)
    ratios = {
        name: group["ratio"]
        for name, parameter in made.parameters.items()
        for group in made.optimizer.param_groups
        if any(parameter is one for one in group["params"])
    }
    assert ratios.pop("lm_head.weight") == 1.0
    assert {name[-8]: ratio for name, ratio in ratios.items()} == {"A": 1.0, "B": 8.0}


def test_a_step_is_counted_as_a_change_of_what_it_changed():
    """Torch's fused AdamW does not, and caches of what depends on A and B would go stale."""
    model = model_of(FAMILIES["llama"])
    made = trainer(model)
    before = {name: p._version for name, p in adapter_parameters(model).items()}
    made.memory.policy = ActivationPolicy(3)
    made.step(0, batches_of([(1, 9)]))
    assert all(p._version > before[name] for name, p in adapter_parameters(model).items())


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_dora_trains_as_plain_autograd_over_its_formula(quant):
    """The engine, three steps; the plain model decodes each weight and writes W' out."""
    options = {"learning_rate": 1e-2, "max_grad_norm": 0.0}
    ours, theirs = (model_of(FAMILIES["qwen2"], quant=quant, use_dora=True) for _ in range(2))
    made = trainer(ours, **options)
    reference = list(adapter_parameters(theirs).values())
    for linear in frozen_linears(theirs).values():
        linear.forward = partial(dora, linear)
    optimizer = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.0, foreach=False)
    for step in range(3):
        batches = batches_of([(2, 13), (2, 9)])
        made.memory.policy = ActivationPolicy(step)
        made.step(step, batches)
        total = sum(int((b.labels != -100).sum()) for b in batches)
        for batch in batches:
            logits = theirs(input_ids=batch.input_ids).logits
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
            ).div(total).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(adapter_parameters(ours).values(), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def dora(linear, x):
    """A layer with DoRA, as the paper writes it (its section 4.3)."""
    adapter = linear.adapter
    weight = linear.dense(x.dtype) + adapter.config.scaling * adapter.lora_B @ adapter.lora_A
    lengths = adapter.lora_magnitude_vector / torch.linalg.norm(weight, dim=1).detach()
    return nn.functional.linear(x, lengths[:, None] * weight, linear.bias)


def test_a_loss_that_is_no_number_changes_nothing():
    model = model_of(FAMILIES["llama"])
    made = trainer(model)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    model.model.norm.weight.data.fill_(math.nan)
    made.memory.policy = ActivationPolicy(3)
    with pytest.raises(NonFiniteLossError, match="step 5: loss nan"):
        made.step(4, batches_of([(1, 9)]))
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_state_round_trip_continues_bit_for_bit(ratio):
    batches = batches_of([(2, 13)])
    straight = model_of(FAMILIES["llama"])
    one = trainer(straight, loraplus_lr_ratio=ratio)
    for step in range(4):
        one.policy = ActivationPolicy(3)
        one.step(step, batches)
    first = model_of(FAMILIES["llama"])
    before = trainer(first, loraplus_lr_ratio=ratio)
    for step in range(2):
        before.policy = ActivationPolicy(3)
        before.step(step, batches)
    second = model_of(FAMILIES["llama"])
    after = trainer(second, loraplus_lr_ratio=ratio)
    for name, parameter in adapter_parameters(second).items():
        parameter.data.copy_(adapter_parameters(first)[name])
    after.load_optimizer_state(before.optimizer_state())
    for step in range(2, 4):
        after.policy = ActivationPolicy(0)
        after.step(step, batches)
    for name, parameter in adapter_parameters(second).items():
        assert torch.equal(parameter, adapter_parameters(straight)[name])


def test_a_state_of_another_parameter_is_refused():
    made = trainer(model_of(FAMILIES["llama"]))
    made.step(0, batches_of([(2, 13)]))
    state = made.optimizer_state() | {"model.other.lora_A.weight.exp_avg": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"'model\.other\.lora_A\.weight\.exp_avg', of no"):
        made.load_optimizer_state(state)


def kept_of(made):
    """All that a step may change, copied."""
    state = {name: value.clone() for name, value in made.optimizer_state().items()}
    return [p.detach().clone() for p in made.parameters.values()], state


def same(one, other):
    return (
        all(map(torch.equal, one[0], other[0]))
        and one[1].keys() == other[1].keys()
        and all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    )


# --- a run of steps -----------------------------------------------------------------------------

RUN = [[(2, 13)], [(1, 9), (2, 5)], [(3, 7)], [(1, 21)]]


def test_a_run_makes_the_steps_that_are_made_one_by_one():
    one, other = (trainer(model_of(FAMILIES["llama"]), learning_rate=1e-2) for _ in range(2))
    wanted = [one.step(number, batches_of(shapes)) for number, shapes in enumerate(RUN)]
    found = {}
    other.train(range(2), lambda n: batches_of(RUN[n]), found.__setitem__)
    other.train(range(2, 4), lambda n: batches_of(RUN[n]), found.__setitem__)
    assert list(found) == [0, 1, 2, 3]
    for step, result in found.items():
        assert result[:4] == wanted[step][:4]
    assert same(kept_of(one), kept_of(other))


def test_the_buffer_of_decoded_weights_is_freed_until_the_next_step():
    one, other = (trainer(model_of(FAMILIES["llama"]), learning_rate=1e-2) for _ in range(2))
    for number, shapes in enumerate(RUN):
        wanted = one.step(number, batches_of(shapes))
        other.free_buffer()
        assert other.engine.weights.nbytes == 0 < one.engine.weights.nbytes
        assert other.step(number, batches_of(shapes))[:4] == wanted[:4]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_next_step_s_batches_are_made_while_a_gpu_is_at_work(monkeypatch, device):
    made, events = trainer(model_of(FAMILIES["llama"])), []
    monkeypatch.setattr(made, "_device", device)
    engine_step, finished = made.engine.step, made._finished

    def batches(number):
        events.append(f"batches {number}")
        return batches_of(RUN[number])

    def stepped(*args):
        events.append("queued")
        return engine_step(*args)

    def looked(number, queued):
        events.append(f"result {number}")
        return finished(number, queued)

    monkeypatch.setattr(made.engine, "step", stepped)
    monkeypatch.setattr(made, "_finished", looked)
    made.train([1, 2, 3], batches, lambda number, _: events.append(f"done {number}"))
    ahead = [
        "batches 1",
        *("queued", "batches 2", "result 1", "done 1"),
        *("queued", "batches 3", "result 2", "done 2"),
        *("queued", "result 3", "done 3"),
    ]
    in_turn = [f"{what} {n}" for n in (1, 2, 3) for what in ("batches", "queued", "result", "done")]
    in_turn = ["queued" if event.startswith("queued") else event for event in in_turn]
    assert events == (ahead if device == "cuda" else in_turn)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_that_is_stopped_has_made_the_steps_it_reported(monkeypatch, device):
    made, other = (trainer(model_of(FAMILIES["llama"]), learning_rate=1e-2) for _ in range(2))
    monkeypatch.setattr(made, "_device", device)
    found = {}
    made.train(
        range(4), lambda n: batches_of(RUN[n]), found.__setitem__, stopped=lambda: len(found) == 2
    )
    assert list(found) == [0, 1]
    for number in found:
        other.step(number, batches_of(RUN[number]))
    assert same(kept_of(made), kept_of(other))
    assert not made._gradients.any()


def test_a_run_of_no_steps_asks_for_nothing():
    trainer(model_of(FAMILIES["llama"])).train([], pytest.fail, pytest.fail)


def test_what_a_step_s_batches_took_is_told_with_it():
    made, found = trainer(model_of(FAMILIES["llama"])), {}

    def batches(number):
        time.sleep(0.05 * number)
        return batches_of([(1, 5)])

    made.train([0, 2, 0], batches, lambda number, result: found.setdefault(number, result))
    assert found[0].data_seconds < 0.1 <= found[2].data_seconds


# --- loss scale ---------------------------------------------------------------------------------


def test_only_float16_has_a_loss_scale():
    assert trainer(model_of(FAMILIES["llama"])).loss_scale is None
    assert trainer(model_of(FAMILIES["llama"], dtype=torch.bfloat16)).loss_scale is None
    assert trainer(model_of(FAMILIES["llama"], dtype=torch.float16)).loss_scale is not None


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("factor", [2.0**-14, 2.0**5, 2.0**15])
def test_what_the_loss_is_scaled_by_changes_no_update(max_grad_norm, factor):
    options = {"learning_rate": 1e-2, "max_grad_norm": max_grad_norm}
    plain, scaled = (trainer(model_of(FAMILIES["llama"]), **options) for _ in range(2))
    scaled.loss_scale = LossScale(factor)
    for number, shapes in enumerate(RUN):
        wanted, got = (made.step(number, batches_of(shapes)) for made in (plain, scaled))
        assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
        assert not got.skipped
    assert scaled.loss_scale.clean == len(RUN)
    assert not scaled.engine.messages
    begin = adapter_parameters(model_of(FAMILIES["llama"])).values()
    pairs = zip(plain.parameters.values(), scaled.parameters.values(), begin, strict=True)
    for one, other, before in pairs:
        assert not torch.equal(one, before)
        torch.testing.assert_close(other, one, rtol=1e-3, atol=2e-5)


def overflowing(made, monkeypatch, steps):
    """Have a gradient overflow in the steps of these numbers."""
    step, count = made.engine.step, iter(range(1000))

    def overflows(*args):
        loss = step(*args)
        if next(count) in steps:
            next(iter(made.parameters.values())).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(made.engine, "step", overflows)


def test_a_step_that_overflows_is_left_out_and_told(monkeypatch):
    made, other = (trainer(model_of(FAMILIES["llama"]), learning_rate=1e-2) for _ in range(2))
    for one in (made, other):
        one.loss_scale = LossScale()
        one.step(0, batches_of(RUN[0]))
    overflowing(made, monkeypatch, {0})
    before = kept_of(made)
    result = made.step(1, batches_of(RUN[1]))
    assert result.skipped
    assert math.isfinite(result.loss)
    assert result.grad_norm == math.inf
    assert same(kept_of(made), before)
    assert made.loss_scale.state() == {"factor": 16.0, "clean": 0, "skipped": 1}
    (note,) = made.engine.messages
    assert note.startswith("step 2: gradients overflow in float16, the update is skipped")
    # Nothing is left of it in the next.
    other.loss_scale.factor = 16.0
    assert made.step(2, batches_of(RUN[2]))[:4] == other.step(2, batches_of(RUN[2]))[:4]
    assert same(kept_of(made), kept_of(other))


def test_without_a_loss_scale_an_overflow_ends_the_run(monkeypatch):
    made = trainer(model_of(FAMILIES["llama"]))
    overflowing(made, monkeypatch, {0})
    before = kept_of(made)[0]
    with pytest.raises(NonFiniteLossError, match=r"gradient norm inf\. Nothing was updated"):
        made.step(0, batches_of(RUN[0]))
    assert all(map(torch.equal, kept_of(made)[0], before))


def test_a_loss_that_is_not_finite_is_no_matter_of_scale():
    made = trainer(model_of(FAMILIES["llama"]))
    made.loss_scale = LossScale()
    made.engine.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="step 1: the loss is not finite"):
        made.step(0, batches_of(RUN[0]))
    assert made.loss_scale.skipped == 0


@pytest.mark.parametrize("scale", [None, LossScale()])
def test_a_step_that_supervises_nothing_has_no_loss(scale):
    made = trainer(model_of(FAMILIES["llama"]))
    made.loss_scale = scale
    (batch,) = batches_of([(1, 9)])
    result = made.step(0, [batch._replace(labels=torch.full_like(batch.labels, -100))])
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)


def test_the_loss_scale_goes_into_a_checkpoint_and_back(monkeypatch):
    first, second, plain = (trainer(model_of(FAMILIES["llama"])) for _ in range(3))
    first.loss_scale, second.loss_scale = LossScale(), LossScale()
    overflowing(first, monkeypatch, {1})
    for number in range(4):
        first.step(number, batches_of(RUN[0]))
    state = json.loads(json.dumps(first.progress()))
    assert state == {"loss_scale": {"factor": 16.0, "clean": 2, "skipped": 1}}
    second.load_progress({"data": "of others", **state})
    assert second.progress() == state
    second.load_progress({})  # of a run before there was one
    assert second.progress() == state
    with pytest.raises(CheckpointError, match="got 3e-17"):
        second.load_progress({"loss_scale": state["loss_scale"] | {"factor": 3e-17}})
    assert plain.progress() == {}
    plain.load_progress(state)
    assert plain.loss_scale is None


# --- when memory runs out -----------------------------------------------------------------------

# 220 tokens in a part of 256, or in two of 128.
LENGTHS = [70, 60, 50, 40]
LADDER = [
    "decoded weights are no longer kept",
    "1 of 3 layers keep their activations",
    "0 of 3 layers keep their activations",
    "inputs of recomputed layers wait in host memory",
    "parts have at most 128 tokens",
    "CUDA graphs are given up",
]
MOST = ActivationPolicy(3, decoded=2)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text.")


def long_batches():
    made = []
    for number, length in enumerate(LENGTHS):
        (batch,) = batches_of([(1, length)])
        made.append(batch._replace(input_ids=(batch.input_ids + number) % 120))
    return made


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Return what makes a trainer on a CPU that has all rungs: it packs, captures and offloads."""
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    monkeypatch.setattr(forward_backward, "ActivationOffloader", HostOffloader)
    monkeypatch.setattr(step_memory, "SMALLEST_PART", 100)
    monkeypatch.setattr(step_memory.gc, "collect", lambda: 0)  # takes half a second here
    monkeypatch.setattr(step_memory, "free_memory", lambda device: 10**9)
    monkeypatch.setattr(step_memory, "used_memory", lambda device: 10**9)

    def make(policy=MOST, config=FAMILIES["llama"], cost=None, **options):
        plan = MemoryPlan(policy, 3, 0, budget=1000, predicted_bytes=900, cost=cost)
        monkeypatch.setattr(step_memory, "plan_memory", lambda *args, **kwargs: plan)
        model = model_of(config)
        made = trainer(model, learning_rate=1e-2, **options)
        made.engine = made.memory.engine = LayerEngine(model, fuse=True)
        made.engine._graphs = Recorded(made.engine)
        made._device = made.memory._device = "cuda"
        made.fit([[(1, n) for n in LENGTHS]], [LENGTHS])
        return made

    return make


def failing(made, monkeypatch, fails, error=OUT_OF_MEMORY):
    """Have the engine's step fail, its gradients half done, where ``fails(attempt, policy)``.

    Returns the policy of each attempt.
    """
    step, policies = made.engine.step, []

    def stepped(batches, normaliser, policy):
        policies.append(policy)
        if not fails(len(policies), policy):
            return step(batches, normaliser, policy)
        for parameter in made.parameters.values():
            parameter.grad.add_(1.0)
        raise error

    monkeypatch.setattr(made.engine, "step", stepped)
    return policies


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("failures", range(len(LADDER) + 1))
def test_a_step_is_made_again_with_less_until_it_fits(on_a_gpu, monkeypatch, failures, captured):
    wanted, made = on_a_gpu(), on_a_gpu()
    if captured:
        made.capture()
    policies = failing(made, monkeypatch, lambda attempt, _: attempt <= failures)
    results = [one.step(0, long_batches()) for one in (wanted, made)]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)
    assert not any(p.grad.any() for p in made.parameters.values())
    if failures < 5:  # in parts of other sizes, sums are in another order
        assert same(kept_of(made), kept_of(wanted))
    for one, other in zip(made.parameters.values(), wanted.parameters.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)
    # What was done, once each, and in the order of the ladder.
    assert [record["action"] for record in made.memory.fallbacks] == LADDER[:failures]
    json.dumps(made.memory.fallbacks)
    for record, before in zip(made.memory.fallbacks, policies, strict=False):
        assert record["step"] == 1
        assert record["reason"] == "CUDA out of memory. Tried to allocate 2 GiB."
        assert record["policy_before"] == before.__dict__
    notes = [
        note for note in made.engine.messages if note.startswith("out of GPU memory at step 1: ")
    ]
    assert [note.partition(": ")[2].partition(",")[0] for note in notes] == LADDER[:failures]
    assert made.memory.policy == policies[-1]
    order = [MOST, *map(ActivationPolicy, (3, 1, 0)), *[ActivationPolicy(0, 2)] * 3]
    assert policies == order[: failures + 1]
    # Graphs are there again, of the shapes there are now, by the policy there is now.
    graphs = made.engine._graphs
    assert (graphs is None) == (failures == len(LADDER))
    if captured and graphs is not None:
        assert list(graphs.captured) == list(made.engine.buckets.shapes)
        assert graphs.policy == made.memory.policy
        assert len(graphs.played) == (2 if failures == 5 else 1)
    # So it stays.
    made.memory.fallbacks.clear()
    made.step(1, long_batches())
    assert not made.memory.fallbacks
    assert policies[-1] == policies[-2]


@pytest.mark.parametrize(("most", "tried"), [(2, [3, 1]), (1, [3, 1]), (0, [3, 1, 0])])
def test_so_many_layers_are_saved_as_fit(on_a_gpu, monkeypatch, most, tried):
    made = on_a_gpu(ActivationPolicy(3))
    policies = failing(made, monkeypatch, lambda _, policy: policy.saved > most)
    made.step(0, long_batches())
    assert [policy.saved for policy in policies] == tried
    assert made.memory.policy == ActivationPolicy(tried[-1])


COST = StepCost(
    layers=3, input=1000, part_input=1000, lora=10, saved=9000, attention=500, attention_part=500,
    forward=2000, forward_saved=2500, backward=12_000, saved_part=8000, loss=3000, layer_args=100,
    decoded=4000,
)  # fmt: skip


@pytest.mark.parametrize(("fits", "most", "tried"), [(2, 3, [2]), (1, 3, [1]), (2, 1, [2, 1])])
def test_how_many_fit_is_known_from_what_a_layer_takes(on_a_gpu, monkeypatch, fits, most, tried):
    made = on_a_gpu(ActivationPolicy(3), cost=COST)
    used = 10**9 - made.engine.weights.nbytes
    room = MARGIN * (used + peak(COST, ActivationPolicy(fits), graphs=True).reserved)
    monkeypatch.setattr(step_memory, "free_memory", lambda device: int(room - used) + 1)
    policies = failing(made, monkeypatch, lambda n, policy: n == 1 or policy.saved > most)
    made.step(0, long_batches())
    assert [policy.saved for policy in policies] == [3, *tried]


@pytest.mark.parametrize("cost", [COST, None])
def test_what_waits_on_the_host_stays_there(on_a_gpu, monkeypatch, cost):
    """Or fewer layers saved would take more memory, not less."""
    before, after = (ActivationPolicy.offloading(3, saved) for saved in (1, 0))
    made = on_a_gpu(before, cost=cost)
    policies = failing(made, monkeypatch, lambda attempt, _: attempt <= 2)
    made.step(0, long_batches())
    assert policies == [before, after, after]
    assert [record["action"] for record in made.memory.fallbacks] == [LADDER[2], LADDER[4]]


def test_where_the_host_has_no_room_nothing_waits_there(on_a_gpu, monkeypatch):
    made = on_a_gpu(ActivationPolicy(), cost=COST)
    needed = COST.host_bytes(ActivationPolicy.offloading(3))
    monkeypatch.setattr(step_memory, "free_memory", lambda device: int(needed / HOST_SHARE) - 1)
    failing(made, monkeypatch, lambda attempt, _: attempt == 1)
    made.step(0, long_batches())
    assert [record["action"] for record in made.memory.fallbacks] == LADDER[4:5]


def test_attention_that_is_kept_on_the_host_is_given_up_first(on_a_gpu, monkeypatch):
    policy = ActivationPolicy.offloading(3, checkpoint_share=1.0)
    made = on_a_gpu(policy)
    policies = failing(made, monkeypatch, lambda attempt, _: attempt <= 2)
    made.step(0, long_batches())
    assert policies == [policy, *[ActivationPolicy.offloading(3)] * 2]
    said = [record["action"] for record in made.memory.fallbacks]
    assert said == ["attention is recomputed, too", LADDER[4]]


def test_a_step_that_never_fits_ends_the_run_and_updates_nothing(on_a_gpu, monkeypatch):
    made = on_a_gpu()
    made.capture()
    made.step(0, long_batches())
    before = kept_of(made)
    policies = failing(made, monkeypatch, lambda *_: True)
    with pytest.raises(OutOfMemoryError, match=r"step 2 does not .* 1\.00 GB are free") as caught:
        made.step(1, long_batches())
    assert isinstance(caught.value, UserError)
    assert f"Tried: {'; '.join(LADDER)}. Nothing was updated in this step" in str(caught.value)
    assert len(policies) == len(LADDER) + 1
    assert [record["action"] for record in made.memory.fallbacks] == LADDER
    assert same(kept_of(made), before)
    assert not any(p.grad.any() for p in made.parameters.values())


def test_a_step_that_does_not_fit_into_the_budget_names_it(on_a_gpu, monkeypatch):
    made = on_a_gpu()
    made.memory.config = made.config.model_copy(update={"memory_budget": 2_500_000_000})
    failing(made, monkeypatch, lambda *_: True)
    with pytest.raises(
        OutOfMemoryError, match=r"step 1 does not fit into memory_budget 2\.50 GB\."
    ):
        made.step(0, long_batches())


def test_on_a_cpu_and_of_one_layer_there_is_nowhere_to_offload_to(on_a_gpu, monkeypatch):
    single = LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    one, cpu = on_a_gpu(ActivationPolicy(), single), on_a_gpu(ActivationPolicy())
    cpu._device = cpu.memory._device = "cpu"
    for made in (one, cpu):
        failing(made, monkeypatch, lambda *_: True)
        with pytest.raises(OutOfMemoryError):
            made.step(0, long_batches())
        assert [record["action"] for record in made.memory.fallbacks] == LADDER[4:]


def test_plain_autograd_has_nothing_left_to_try(monkeypatch):
    model = model_of(FAMILIES["llama"])
    schedule = Schedule(1e-3, "constant", 0, 10)
    made = Trainer(AutogradEngine(model), adapter_parameters(model), config(), schedule)
    failing(made, monkeypatch, lambda *_: True)
    with pytest.raises(OutOfMemoryError, match="Tried: there was no fallback left"):
        made.step(0, batches_of(RUN[0]))
    assert not made.memory.fallbacks


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_other_errors_are_not_swallowed(on_a_gpu, monkeypatch, error, out):
    assert is_out_of_memory(error) == out
    made = on_a_gpu()
    policies = failing(made, monkeypatch, lambda attempt, _: attempt == 1, error)
    if out:
        made.step(0, long_batches())
        assert len(made.memory.fallbacks) == 1
        return
    with pytest.raises(type(error), match=str(error)):
        made.step(0, long_batches())
    assert not made.memory.fallbacks
    assert policies == [MOST]


def test_nothing_of_an_attempt_is_alive_when_the_next_is_prepared(on_a_gpu, monkeypatch):
    """The error's traceback has frames, and these have tensors."""
    made, alive = on_a_gpu(), []
    step, fall_back = made.engine.step, made.memory.fall_back

    def stepped(*args):
        if alive:
            return step(*args)
        large = torch.zeros(10)
        alive.append(weakref.ref(large))
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            raise torch.OutOfMemoryError("CUDA out of memory") from None

    def fallen_back(number, error, *, updating):
        assert alive[0]() is None
        fall_back(number, error, updating=updating)

    monkeypatch.setattr(made.engine, "step", stepped)
    monkeypatch.setattr(made.memory, "fall_back", fallen_back)
    made.step(0, long_batches())
    assert len(made.memory.fallbacks) == 1


def test_memory_that_runs_out_for_the_optimizer_s_state_is_found_elsewhere(on_a_gpu, monkeypatch):
    made = on_a_gpu()
    allocate, calls = made.optimizer.allocate, []

    def allocated():
        calls.append(1)
        if len(calls) == 1:
            raise OUT_OF_MEMORY
        allocate()

    monkeypatch.setattr(made.optimizer, "allocate", allocated)
    made.step(0, long_batches())
    assert [record["action"] for record in made.memory.fallbacks] == LADDER[:1]


def test_an_update_that_has_begun_is_not_made_again(on_a_gpu, monkeypatch):
    made = on_a_gpu()

    def fails(**kwargs):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(made.optimizer, "step", fails)
    with pytest.raises(OutOfMemoryError, match="Some layers were updated"):
        made.step(0, long_batches())
    assert not made.memory.fallbacks


@pytest.mark.parametrize("failures", range(len(LADDER) + 1))
def test_capturing_goes_down_the_same_ladder(on_a_gpu, monkeypatch, failures):
    made, calls, reports = on_a_gpu(), [], []
    capture = made.engine.capture

    def captured(policy, progress):
        if made.engine.captures:
            calls.append(policy)
            if len(calls) <= failures:
                raise OUT_OF_MEMORY
        capture(policy, progress)

    monkeypatch.setattr(made.engine, "capture", captured)
    made.capture(lambda *args: reports.append(args))
    assert [record["action"] for record in made.memory.fallbacks] == LADDER[:failures]
    assert len(calls) == min(failures + 1, len(LADDER))  # no more often than that
    assert made.optimizer_state()  # is there already
    assert bool(made.engine.num_graphs) == (failures < len(LADDER))
    # One shape is compiled, and captured.
    assert reports == ([(1, 2), (2, 2)] if made.engine.num_graphs else [])
    made.step(0, long_batches())


def test_another_error_in_capturing_is_not_swallowed(on_a_gpu, monkeypatch):
    made = on_a_gpu()

    def fails(*args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(made.engine, "capture", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        made.capture()
    assert not made.memory.fallbacks


# --- before the first step ----------------------------------------------------------------------

# Two lie in a part of 1024 still when parts are to have 512 tokens: there is one part less.
NEARLY_HALVES = [[500] * 50]


def fitted(made, monkeypatch, lengths, fits, error=None):
    """Fit a run to a plan that is within its budget where ``fits(tokens of the largest part)``."""
    tried = []

    def plan_memory(engine, *args, **kwargs):
        tokens = engine.buckets.largest.numel
        tried.append(tokens)
        if error is not None and not fits(tokens):
            raise error
        reserved = 900 if fits(tokens) else 1100
        return MemoryPlan(ActivationPolicy(1), 3, 0, 1000, 900, reserved)

    monkeypatch.setattr(step_memory, "plan_memory", plan_memory)
    made.fit([[(1, n) for n in step] for step in lengths], lengths)
    return tried


@pytest.mark.parametrize("error", [None, ConfigError("too small"), OUT_OF_MEMORY])
@pytest.mark.parametrize("most", [8192, 1200, 700])
@pytest.mark.parametrize("lengths", [[[500] * 20 + [300] * 7] * 2, NEARLY_HALVES])
def test_parts_are_made_smaller_until_the_plan_fits(on_a_gpu, monkeypatch, lengths, most, error):
    made = on_a_gpu()
    tried = fitted(made, monkeypatch, lengths, lambda tokens: tokens <= most, error)
    assert tried[-1] <= most < min([*tried[:-1], 10**9])
    assert tried == sorted(set(tried), reverse=True)
    assert made.engine.buckets.largest.numel == tried[-1]
    assert made.memory.policy == ActivationPolicy(1)
    said = f"parts have at most {tried[-1]} tokens"
    notes = [note for note in made.engine.messages if note.startswith(said)]
    assert len(notes) == (len(tried) > 1)


@pytest.mark.parametrize(("lengths", "least"), [(LENGTHS, 128), (NEARLY_HALVES[0], 512)])
def test_where_parts_cannot_be_smaller_the_plan_is_what_it_is(
    on_a_gpu, monkeypatch, lengths, least
):
    made = on_a_gpu()
    assert fitted(made, monkeypatch, [lengths], lambda _: False)[-1] == least
    with pytest.raises(ConfigError, match="too small"):
        fitted(made, monkeypatch, [lengths], lambda _: False, ConfigError("too small"))
    with pytest.raises(OutOfMemoryError, match="step 1 does not fit"):
        fitted(made, monkeypatch, [lengths], lambda _: False, OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fitted(made, monkeypatch, [lengths], lambda _: False, RuntimeError("shape mismatch"))


def test_smaller_parts_are_smaller(on_a_gpu, monkeypatch):
    """Whatever the lengths, or a step that does not fit would be tried again without end."""
    made = on_a_gpu(ActivationPolicy())
    made.memory._lengths = NEARLY_HALVES
    made.engine.buckets = Buckets.of(NEARLY_HALVES, 32, 1024)
    assert made.engine.buckets.largest.numel == 1024
    made.memory._shrunk()
    assert made.engine.buckets.largest.numel == 512
    assert not made.memory._may_shrink()
