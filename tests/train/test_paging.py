"""Runs whose optimizer state pages: the same adapter, resumed in any mode, told in the journal."""

import io
import json
from itertools import permutations

import pytest
import torch
from rich.console import Console

from halfbyte.config.schema import TrainConfig
from halfbyte.engine import memory_policy
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import MemoryPlan
from halfbyte.engine.packing import Batch
from halfbyte.errors import ConfigError, OutOfMemoryError
from halfbyte.linear.lora import adapter_parameters
from halfbyte.optim import AdamW, buckets
from halfbyte.optim.paging import Paging
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.report import open_report
from halfbyte.report.live import LiveScreen, PlainScreen
from halfbyte.train import run as train_run
from halfbyte.train import step_memory, trainer
from halfbyte.train.schedule import Schedule
from halfbyte.train.step_memory import StepMemory
from halfbyte.train.trainer import Trainer
from tests.engine.test_layerwise import FAMILIES, batches_of, model_of
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"Count to {i}.", "completion": "one two three " * i} for i in range(1, 9)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Lets AdamW page though there is only a CPU, in small groups."""

    def paging(made, **options):
        optimizer = AdamW(made, **options)
        optimizer.paging = options["paging"]
        return optimizer

    monkeypatch.setattr(trainer, "AdamW", paging)
    monkeypatch.setattr("halfbyte.engine.choose.pack_documents", lambda *_: "as on a GPU")
    monkeypatch.setattr(buckets, "GROUP_BYTES", 8192)


def run(model, data, output, optim, **options):
    made = TrainConfig(
        model=str(model),
        data=str(data),
        output=output,
        optim=optim,
        **{"compute_dtype": "float32", "device": "cpu", "samples": 0} | options,
        lora_r=64,
        max_steps=4,
        batch_size=2,
        gradient_accumulation_steps=1,
        save_steps=2,
    )
    with open_report(output, quiet=True) as report:
        train_run.train(made, report)
    events = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    return (output / "adapter_model.safetensors").read_bytes(), events


def steps_of(events):
    return [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("paging", ["auto", "explicit"])
def test_a_paged_run_is_the_same_run_and_says_what_it_moved(
    model, data, tmp_path, monkeypatch, on_a_gpu, paging
):
    plain, resident = run(model, data, tmp_path / "plain", "adamw_8bit")
    calls = iter([False, True, True, False])
    monkeypatch.setattr(StepMemory, "is_short", lambda self, batches: next(calls))
    paged, events = run(model, data, tmp_path / "paged", "paged_adamw_8bit", paging=paging)
    assert paged == plain
    found = steps_of(events)
    assert [event["loss"] for event in found] == [event["loss"] for event in steps_of(resident)]
    moved = [event["paged_bytes"] for event in found]
    if paging == "auto":
        assert moved[0] == moved[3] == 0
        assert moved[1] == moved[2] == 2 * found[0]["optimizer_device_bytes"] > 0
    else:
        state = found[0]["optimizer_host_bytes"]
        assert 0 < found[0]["optimizer_device_bytes"] < state
        # What is prefetched for a step is counted with it, so every byte comes in and goes out.
        assert moved == [2 * state] * 4
    assert all(event["paging_ms"] >= 0 for event in found)


@pytest.mark.parametrize("activations", ["recompute", "auto"])
def test_the_plan_knows_which_step_is_tight(
    model, data, tmp_path, monkeypatch, on_a_gpu, activations
):
    """A budget one byte below what the largest step takes with the state beside it."""
    plans, sizes = [], []
    fit, tight = Trainer.fit, StepMemory.is_short

    def recorded(self, *args):
        plans.append(fit(self, *args))
        return plans[-1]

    def counted(self, batches):
        sizes.append(sum(batch.input_ids.numel() for batch in batches))
        return tight(self, batches)

    monkeypatch.setattr(Trainer, "fit", recorded)
    monkeypatch.setattr(StepMemory, "is_short", counted)
    for module in (train_run, memory_policy):
        monkeypatch.setattr(module, "used_memory", lambda device: 0)
    plain, roomy = run(model, data, tmp_path / "roomy", "paged_adamw_8bit", activations="recompute")
    assert not any(event["paged_bytes"] for event in steps_of(roomy))
    paged, events = run(
        model,
        data,
        tmp_path / "tight",
        "paged_adamw_8bit",
        activations=activations,
        memory_budget=plans[0].predicted_bytes - 1,
    )
    assert paged == plain
    moved = [event["paged_bytes"] > 0 for event in steps_of(events)]
    assert moved == [size == max(sizes) for size in sizes[4:]]
    assert sum(moved) == 1
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert plans[1].summary() in notes


MODES = [("adamw_8bit", "auto"), ("paged_adamw_8bit", "auto"), ("paged_adamw_8bit", "explicit")]


@pytest.mark.parametrize(("before", "after"), list(permutations(MODES, 2)), ids=str)
def test_a_run_resumes_in_another_mode(model, data, tmp_path, on_a_gpu, before, after):
    plain, _ = run(model, data, tmp_path / "plain", before[0])
    where = tmp_path / "run"
    run(model, data, where, before[0], paging=before[1])
    (where / "checkpoint-4").rename(tmp_path / "lost")
    resumed, events = run(model, data, where, after[0], resume=True, paging=after[1])
    assert resumed == plain
    assert len(steps_of(events)) == 4


def test_another_width_is_another_run(model, data, tmp_path):
    run(model, data, tmp_path / "run", "paged_adamw_32bit")
    run(model, data, tmp_path / "run", "adamw", resume=True)
    with pytest.raises(ConfigError, match="optim was 'adamw', is 'adamw_8bit'"):
        run(model, data, tmp_path / "run", "paged_adamw_8bit", resume=True)


def test_on_a_cpu_one_line_says_that_there_is_nothing_to_page_from(model, data, tmp_path):
    plain, _ = run(model, data, tmp_path / "plain", "adamw")
    paged, events = run(model, data, tmp_path / "paged", "paged_adamw_32bit", paging="managed")
    assert paged == plain
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert sum("there is nothing to page from on cpu" in line for line in notes) == 1
    assert "paged_bytes" not in steps_of(events)[0]


def test_paging_is_for_paged_optimizers():
    with pytest.raises(ValueError, match="`paging` needs `optim` paged_adamw_32bit or"):
        TrainConfig(model="-", data="-", output="-", paging="managed")


def made_trainer(paging, model=None, **options):
    """A trainer that pages, by `on_a_gpu`; without clipping, it updates layer by layer."""
    model = model or model_of(FAMILIES["llama"])
    made = TrainConfig(
        model="m", data="d", output="o", optim="paged_adamw_32bit", paging=paging,
        learning_rate=1e-2, **options,
    )  # fmt: skip
    schedule = Schedule(1e-2, "constant", 0, 3)
    return Trainer(LayerEngine(model), adapter_parameters(model), made, schedule)


def planned(made, monkeypatch, shapes, *, least=10**12, **plan):
    """Have a trainer fit a run to a plan that holds if the state on the device is small enough.

    Returns the bytes of state that were asked for, one after the other.
    """
    asked = []

    def plan_memory(engine, shapes, activations, budget, device, *, state_bytes, documents):
        asked.append(state_bytes)
        if state_bytes > least:
            raise ConfigError("too small")
        return MemoryPlan(ActivationPolicy(), 3, 0, **plan)

    monkeypatch.setattr(step_memory, "plan_memory", plan_memory)
    made.fit(shapes, [[n for b, n in step for _ in range(b)] for step in shapes])
    return asked


def zeros(*shapes):
    return [Batch(torch.zeros(s, dtype=torch.int64), torch.zeros(s)) for s in shapes]


@pytest.mark.parametrize("paging", ["auto", "managed"])
def test_a_step_is_tight_when_its_tokens_need_more_than_there_is(monkeypatch, on_a_gpu, paging):
    made = made_trainer(paging)
    shapes = [[(2, 100)], [(2, 100), (2, 300)]]
    assert not made.memory.is_short(zeros((2, 1000)))  # nothing is known
    planned(made, monkeypatch, shapes, budget=1000, predicted_bytes=1200, used=200)
    assert made.memory.is_short(zeros((2, 100), (2, 300)))
    # 640 of 800 tokens, 800 bytes, and 800 are free.
    assert not made.memory.is_short(zeros((2, 320)))
    assert made.memory.is_short(zeros((2, 321)))
    planned(made, monkeypatch, shapes, budget=1000, predicted_bytes=900, used=200)
    assert not made.memory.is_short(zeros((2, 400)))


def test_a_packed_step_takes_what_its_largest_part_takes(monkeypatch, on_a_gpu):
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    made = made_trainer("auto")
    made.engine = made.memory.engine = LayerEngine(made.engine.model, fuse=True)
    made._device = made.memory._device = "cuda"
    shapes = [[(4, 200)]]
    planned(made, monkeypatch, shapes, budget=1000, predicted_bytes=1200, used=200)
    assert made.engine.buckets.largest.numel == 896
    assert not made.memory.is_short(zeros((1, 716)))
    assert made.memory.is_short(zeros((1, 717)))  # of 896 tokens, 800 of 1000 bytes
    # Many parts take no more than one.
    planned(made, monkeypatch, shapes, budget=1000, predicted_bytes=1000, used=200)
    assert not made.memory.is_short(zeros((8, 1000)))


def test_only_state_that_can_leave_is_sent_away(monkeypatch, on_a_gpu):
    for paging in ("explicit", "off"):
        made = made_trainer("explicit", max_grad_norm=1.0)
        made.optimizer.paging = paging
        planned(made, monkeypatch, [[(2, 100)]], budget=1000, predicted_bytes=1200, used=200)
        assert not made.memory.is_short(zeros((2, 100)))


def test_state_that_may_leave_is_left_out_only_where_it_has_to_be(monkeypatch, on_a_gpu):
    made, shapes = made_trainer("auto", max_grad_norm=1.0), [[(2, 100)]]
    state = made.optimizer.state_bytes
    plan = {"budget": 1000, "predicted_bytes": 900, "used": 200}
    for mode, least, asked, beside in (
        ("off", state, [state], 0),
        ("auto", state, [state], 0),
        ("auto", 0, [state, 0], state),
    ):
        made.optimizer.paging = mode
        assert planned(made, monkeypatch, shapes, least=least, **plan) == asked
        assert made.memory.plan.state_off_device == beside
    made.optimizer.paging = "explicit"  # never all of it is on the device
    (asked,) = planned(made, monkeypatch, shapes, least=state - 1, **plan)
    assert asked == made.optimizer.device_bytes() < state
    assert made.memory.plan.state_off_device == 0
    made.optimizer.paging = "off"
    with pytest.raises(ConfigError, match="too small"):
        planned(made, monkeypatch, shapes, least=0, **plan)
    # A step fits when it does so with what was left out.
    made.optimizer.paging = "auto"
    for beside, tight in ((100, False), (101, True)):
        made.memory.plan = MemoryPlan(ActivationPolicy(), 3, 0, **plan, state_off_device=beside)
        assert made.memory.is_short(zeros((2, 100))) == tight


def test_the_display_says_where_the_state_is_and_what_it_cost():
    stream = io.StringIO()
    live = LiveScreen(Console(file=stream, force_terminal=True, width=200))
    for screen in (PlainScreen(stream), live):
        screen.begin(total_steps=1, start_step=0, metadata={})
        paging = Paging(33_500_000, 640_000_000, 1_280_000_000, 6.25)
        screen.step({"step": 1, "loss": 1.0, **paging._asdict()})
    figures = ("state 34 MB on the GPU", "640 MB on the host", "moved 1.28 GB", "waited 6.2 ms")
    assert "  ".join(figures) in stream.getvalue()
    live.close()
    assert "   ".join(figures) in str(live._numbers(live._pace))


def test_layers_are_updated_as_soon_as_their_gradients_are_final(monkeypatch, on_a_gpu):
    """In explicit paging without clipping; the parameters end as they do otherwise."""
    results, calls = [], []
    early = AdamW.step_parameters

    def watched(self, parameters, **options):
        calls.append(len(list(parameters)))
        return early(self, parameters, **options)

    monkeypatch.setattr(AdamW, "step_parameters", watched)
    for clip in (0.0, 1e9):  # so high a limit clips nothing
        made = model_of(FAMILIES["llama"])
        trainer = made_trainer("explicit", made, max_grad_norm=clip)
        trainer.memory.policy = ActivationPolicy(1)
        for number in range(3):
            trainer.step(number, batches_of([(2, 13)]))
        results.append([p.detach().clone() for p in adapter_parameters(made).values()])
        assert calls == [14] * 9
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_step_that_has_begun_to_update_is_not_made_again(monkeypatch, on_a_gpu, fails_at):
    """In explicit paging without clipping: layers would be updated twice."""
    made = made_trainer("explicit", max_grad_norm=0.0)
    made.memory.policy = ActivationPolicy(3)
    update, calls = made.engine.on_layer_backward, []

    def fails(layer, loss):
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        calls.append(layer)
        update(layer, loss)

    made.engine.on_layer_backward = fails
    if not fails_at:
        before = [p.detach().clone() for p in made.parameters.values()]
        with pytest.raises(OutOfMemoryError, match="Nothing was updated in this step"):
            # Every attempt fails before the first layer is updated.
            made.step(0, batches_of([(2, 13)]))
        assert made.memory.fallbacks
        assert all(map(torch.equal, made.parameters.values(), before))
        return
    with pytest.raises(OutOfMemoryError, match="Some layers were updated in this step"):
        made.step(0, batches_of([(2, 13)]))
    assert calls == [2, 1][:fails_at]
    assert not made.memory.fallbacks
