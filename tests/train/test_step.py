"""One optimizer step: schedules, normalisation, clipping, and the state that resumes."""

import math
from functools import partial

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import get_scheduler

from halfbyte.errors import NonFiniteLossError
from halfbyte.lora import adapter_parameters, frozen_linears
from halfbyte.train.config import TrainConfig
from halfbyte.train.engine import Batch, LayerEngine
from halfbyte.train.step import Schedule, Stepper
from tests.train.test_engine import FAMILIES, batches_of, model_of


def config(**options):
    return TrainConfig(model="-", data="-", output="-", **options)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    ours = Schedule(0.5, kind, warmup, 20)
    for step in range(20):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_ratio_unless_steps_are_given():
    assert Schedule.of(config(warmup_ratio=0.03), 101).warmup_steps == 4
    assert Schedule.of(config(warmup_ratio=0.03, warmup_steps=0), 101).warmup_steps == 0


def stepper(model, **options):
    made = config(**options)
    schedule = Schedule(made.learning_rate, "constant", 0, 10)
    return Stepper(LayerEngine(model), adapter_parameters(model), made, schedule)


def split(whole, size):
    starts = range(0, len(whole.input_ids), size)
    return [Batch(whole.input_ids[s : s + size], whole.labels[s : s + size]) for s in starts]


def test_one_by_eight_is_two_by_four_is_eight_by_one():
    """Rows differ in their supervised tokens, so a mean of means would be another loss."""
    (whole,) = batches_of([(8, 21)])
    whole.labels[3, 2:] = -100
    results = {}
    for size in (1, 2, 4, 8):
        model = model_of(FAMILIES["llama"])
        made = stepper(model, max_grad_norm=0.0)
        results[size] = made.run(0, split(whole, size), saved_layers=3)
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
    made = stepper(ours, **options)
    reference = list(adapter_parameters(theirs).values())
    optimizer = torch.optim.AdamW(
        reference, lr=1e-2, betas=(0.8, 0.999), weight_decay=weight_decay, foreach=False
    )
    for step in range(4):
        batches = batches_of([(2, 13), (2, 9)])
        made.run(step, batches, saved_layers=3)
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
    made = stepper(model, learning_rate=1e-2, loraplus_lr_ratio=8.0, max_grad_norm=0.0)
    for step in range(2):
        made.clear_gradients = lambda: None  # to see the gradients afterwards
        made.run(step, batches_of([(2, 13)]), saved_layers=3)
        for one, other in zip(
            adapter_parameters(model).values(), wrapped.parameters(), strict=True
        ):
            other.grad = one.grad.clone()
            one.grad.zero_()
        theirs.step()
    for one, other in zip(adapter_parameters(model).values(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_modules_trained_whole_step_at_the_plain_rate():
    made = stepper(model_of(FAMILIES["llama"], modules_to_save=("lm_head",)), loraplus_lr_ratio=8.0)
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
    made = stepper(model)
    before = {name: p._version for name, p in adapter_parameters(model).items()}
    made.run(0, batches_of([(1, 9)]), saved_layers=3)
    assert all(p._version > before[name] for name, p in adapter_parameters(model).items())


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_dora_trains_as_plain_autograd_over_its_formula(quant):
    """The engine, three steps; the plain model decodes each weight and writes W' out."""
    options = {"learning_rate": 1e-2, "max_grad_norm": 0.0}
    ours, theirs = (model_of(FAMILIES["qwen2"], quant=quant, use_dora=True) for _ in range(2))
    made = stepper(ours, **options)
    reference = list(adapter_parameters(theirs).values())
    for linear in frozen_linears(theirs).values():
        linear.forward = partial(dora, linear)
    optimizer = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.0, foreach=False)
    for step in range(3):
        batches = batches_of([(2, 13), (2, 9)])
        made.run(step, batches, saved_layers=step)
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
    made = stepper(model)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="step 5: loss nan"):
        made.run(4, batches_of([(1, 9)]), saved_layers=3)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_state_round_trip_continues_bit_for_bit(ratio):
    batches = batches_of([(2, 13)])
    straight = model_of(FAMILIES["llama"])
    one = stepper(straight, loraplus_lr_ratio=ratio)
    for step in range(4):
        one.run(step, batches, saved_layers=3)
    first = model_of(FAMILIES["llama"])
    before = stepper(first, loraplus_lr_ratio=ratio)
    for step in range(2):
        before.run(step, batches, saved_layers=3)
    second = model_of(FAMILIES["llama"])
    after = stepper(second, loraplus_lr_ratio=ratio)
    for name, parameter in adapter_parameters(second).items():
        parameter.data.copy_(adapter_parameters(first)[name])
    after.load_optimizer_state(before.optimizer_state())
    for step in range(2, 4):
        after.run(step, batches, saved_layers=0)
    for name, parameter in adapter_parameters(second).items():
        assert torch.equal(parameter, adapter_parameters(straight)[name])
