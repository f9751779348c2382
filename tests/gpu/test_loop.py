"""A whole run on a GPU: packed documents, graphs, the policy, resuming; what it reports is true."""

import json
from itertools import cycle

import pytest
import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.report import open_report
from halfbyte.train import run as train_run
from tests.tiny import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"Count to {i}.", "completion": "one two three " * i} for i in range(1, 17)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def run(model, data, output, **options):
    config = TrainConfig(
        model=str(model),
        data=str(data),
        eval_data=str(data),
        output=output,
        device="cuda",
        **{"max_steps": 12, "batch_size": 4, "gradient_accumulation_steps": 2} | options,
        lora_r=8,
        learning_rate=5e-3,
        samples=1,
    )
    with open_report(output, quiet=True) as report:
        train_run.train(config, report)
    events = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"], events


def test_a_run_learns_in_graphs_over_packed_documents(model, data, tmp_path):
    losses, events = run(model, data, tmp_path / "out")
    assert losses[-1] < 0.95 * losses[0]
    (engine,) = [event["engine"] for event in events if "engine" in event]
    assert "fused, documents packed, CUDA graphs" in engine
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    notes = [event.get("text", "") for event in events if event["event"] == "note"]
    assert not any("no CUDA graphs" in line for line in notes)


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "save"},
        {"activations": "recompute"},
        {"activations": "offload"},
        {"cuda_graphs": False},
    ],
    ids=str,
)
def test_how_it_is_run_changes_nothing(model, data, tmp_path, options):
    losses, _ = run(model, data, tmp_path / "a")
    others, _ = run(model, data, tmp_path / "b", **options)
    assert losses == others


@pytest.mark.parametrize("activations", ["offload", "save"])
def test_a_deterministic_run_is_the_same_to_the_bit(model, data, tmp_path, activations):
    options = {"deterministic": True, "activations": activations, "lora_dropout": 0.0}
    one, _ = run(model, data, tmp_path / "a", **options)
    other, _ = run(model, data, tmp_path / "b", **options)
    assert one == other
    files = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_adapters_begin_with_what_packing_lost(model, data, tmp_path):
    fresh, _ = run(model, data, tmp_path / "a", max_steps=2)
    begun, events = run(model, data, tmp_path / "b", max_steps=2, init_lora_weights="qera")
    assert fresh[0] != begun[0]
    notes = [event.get("text", "") for event in events if event["event"] == "note"]
    assert any("% of the quantisation error" in line for line in notes)


def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(model, data, tmp_path):
    whole, _ = run(model, data, tmp_path / "whole", save_steps=4)
    step = train_run.Trainer._queue

    def interrupted(self, number, *args, **options):
        if number == 6:
            raise KeyboardInterrupt
        return step(self, number, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run.Trainer, "_queue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, tmp_path / "cut", save_steps=4)
    losses, _ = run(model, data, tmp_path / "cut", save_steps=4, resume=True)
    assert losses[-8:] == pytest.approx(whole[-8:], rel=1e-6)


@pytest.mark.parametrize("paging", ["explicit", "auto", "managed"])
def test_paging_changes_no_bit_and_a_run_resumes_without(
    model, data, tmp_path, monkeypatch, paging
):
    """Every second step is made to be short of memory; at the end the state moves in once more."""
    is_short = "halfbyte.train.step_memory.StepMemory.is_short"
    monkeypatch.setattr(is_short, lambda self, batches: next(turns))
    turns = cycle([False, True])
    common = {"deterministic": True, "save_steps": 6}
    losses, _ = run(model, data, tmp_path / "a", optim="adamw_8bit", **common)
    paged = common | {"optim": "paged_adamw_8bit", "paging": paging}
    others, events = run(model, data, tmp_path / "b", **paged)
    assert others == losses
    moved = [event["paged_bytes"] for event in events if event["event"] == "step"]
    assert [here > 0 for here in moved] == [paging == "explicit", True] * 6
    files = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    trained = files[0].read_bytes()
    assert files[1].read_bytes() == trained
    for name, options in (("b", common | {"optim": "adamw_8bit"}), ("a", paged)):
        (tmp_path / name / "checkpoint-12").rename(tmp_path / f"lost-{name}")
        run(model, data, tmp_path / name, resume=True, **options)
    assert [file.read_bytes() == trained for file in files] == [True, True]


def test_another_batch_split_is_the_same_training(model, data, tmp_path):
    """The documents of a step are laid out anew, whatever micro-batches they came as."""
    one, _ = run(model, data, tmp_path / "a", batch_size=8, gradient_accumulation_steps=1)
    other, _ = run(model, data, tmp_path / "b", batch_size=1, gradient_accumulation_steps=8)
    assert one == other
