"""Callbacks see what happens, cannot change it, and can end a run."""

import dataclasses
import gc
import json
import random
import traceback

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, ConfigError, RunStopped
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.train import metrics
from halfbyte.train.callbacks import Callbacks, EvaluationInfo, SaveInfo, StepInfo
from halfbyte.train.run import train
from tests.tiny import write_tiny_model

NAME = "adapter_model.safetensors"
TRAIN = [{"prompt": f"{n}", "completion": "Paris " * (1 + n % 5)} for n in range(8)]
TEST = [{"prompt": f"{n}", "completion": "Rome Paris"} for n in range(20, 28)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32)


def config(model, output, **options):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 4,
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "lora_r": 2,
        "lora_dropout": 0.1,
        "compute_dtype": "float32",
        "device": "cpu",
        "samples": 0,
    }
    return TrainConfig(model=str(model), data="rows", output=output, **settings | options)


def run(made, **given):
    with open_report(made.output, quiet=True) as report:
        return train(made, report, **{"train_data": TRAIN, "eval_data": TEST} | given)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    run(config(model, output))
    return output


class Seen:
    """Remembers what it was told."""

    def __init__(self):
        self.told = []

    def on_step(self, info):
        self.told.append(info)

    on_evaluate = on_save = on_step


def test_rows_of_a_program_train_as_those_of_a_file(model, plain, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
    made = config(model, tmp_path / "run").model_copy(update={"data": str(file)})
    run(made, train_data=None, eval_data=iter(TEST))
    assert (made.output / NAME).read_bytes() == (plain / NAME).read_bytes()
    # What goes on from rows of a program is compared with them.
    with pytest.raises(CheckpointError, match="the data is not that of"):
        run(made.model_copy(update={"resume": True}), train_data=TRAIN[::-1])


def test_they_are_told_what_the_journal_says(model, plain, tmp_path):
    seen, losses = Seen(), []
    more = Callbacks(on_step=lambda info: losses.append(info.loss))
    run(config(model, tmp_path / "run"), callbacks=[seen, more])
    records = read_journal(tmp_path / "run/journal.jsonl")
    steps = [one for one in records if one["event"] == "step"]
    told = {kind: [one for one in seen.told if type(one) is kind] for kind in map(type, seen.told)}
    for one, record in zip(told[StepInfo], steps, strict=True):
        for key, value in dataclasses.asdict(one).items():
            assert value == {"total_steps": 6, "skipped": False, **record}[key]
    assert losses == [one["loss"] for one in steps]
    evaluations = [one for one in records if one["event"] == "evaluation"]
    for one, record in zip(told[EvaluationInfo], evaluations, strict=True):
        assert (one.step, one.loss, one.rows) == (record["step"], record["loss"], 8)
    assert told[SaveInfo] == [
        SaveInfo(4, tmp_path / "run/checkpoint-4", final=False),
        SaveInfo(6, tmp_path / "run/checkpoint-6", final=False),
        SaveInfo(6, tmp_path / "run", final=True),
    ]
    order = [(type(one).__name__[:4], one.step) for one in seen.told]
    assert order[:6] == [
        ("Step", 1),
        ("Step", 2),
        ("Step", 3),
        ("Eval", 3),
        ("Step", 4),
        ("Save", 4),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.told[0].loss = 0.0


def all_modules():
    """The model's modules, which a callback is not given but could find."""
    return [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module)]


class Careless:
    """Does to everything global what it should not."""

    def on_step(self, info):
        random.random(), np.random.rand(), torch.rand(3)
        torch.manual_seed(info.step)
        np.random.seed(0)
        random.seed(0)
        torch.set_grad_enabled(info.step % 2 == 0)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        if info.step == 2:
            for module in all_modules():
                module.train()
                for parameter in module.parameters():
                    parameter.requires_grad_(parameter.is_floating_point())
        torch.set_default_device("meta")

    def on_evaluate(self, info):
        self.on_step(info)
        info.metrics["loss"] = -1.0  # a copy

    def on_save(self, info):
        self.on_step(info)


def test_a_run_with_callbacks_and_metrics_writes_the_same_bytes(
    model, plain, tmp_path, monkeypatch
):
    monkeypatch.setattr(metrics, "LONGEST_ANSWER", 4)

    def metric(samples, model, tokenizer):
        model.train()
        model.requires_grad_(True)
        torch.manual_seed(3)
        samples.clear()
        return {"zero": torch.zeros(())}

    result = run(
        config(model, tmp_path / "run"), callbacks=[Careless()], metrics=[metric, metric_of]
    )
    assert result.steps == 6
    assert (tmp_path / "run" / NAME).read_bytes() == (plain / NAME).read_bytes()
    keys = ("step", "loss", "grad_norm")
    first, second = (
        [
            tuple(map(one.get, keys))
            for one in read_journal(output / "journal.jsonl")
            if one["event"] in ("step", "evaluation")
        ]
        for output in (plain, tmp_path / "run")
    )
    assert first == second


def metric_of(samples):
    return {"length": float(np.mean([len(one["expected"]) for one in samples]))}


# --- ending a run ---------------------------------------------------------------------------------


def when(step, answer, name="on_step"):
    return Callbacks(**{name: lambda info: answer if info.step == step else None})


def test_one_can_stop_a_run_which_can_be_resumed(model, plain, tmp_path):
    made = config(model, tmp_path / "run")
    with pytest.raises(RunStopped, match=r"step 2 of 6, which is saved.*: fine_tune with the same"):
        run(made, callbacks=[when(2, "stop")])
    *before, record = read_journal(made.output / "journal.jsonl")
    assert record["event"] == "stopped"
    assert not [one for one in before if "is finished and saved first" in one.get("text", "")]
    run(made.model_copy(update={"resume": True}))
    assert (made.output / NAME).read_bytes() == (plain / NAME).read_bytes()


@pytest.mark.parametrize(("step", "name"), [(2, "on_step"), (3, "on_evaluate"), (4, "on_save")])
def test_one_can_finish_a_run(model, tmp_path, step, name):
    made = config(model, tmp_path / "run")
    result = run(made, callbacks=[when(step, "finish", name)])
    assert (result.steps, result.ended) == (step, f"a callback ({name}) asked for it")
    before = (made.output / NAME).read_bytes()
    *_, record = read_journal(made.output / "journal.jsonl")
    assert (record["event"], record["steps"]) == ("finish", step)
    again = run(made.model_copy(update={"resume": True}))  # without the callback: it has ended
    assert (again.steps, again.ended) == (step, result.ended)
    assert (made.output / NAME).read_bytes() == before


@pytest.mark.parametrize(("step", "name"), [(2, "on_step"), (3, "on_evaluate"), (4, "on_save")])
def test_an_exception_ends_a_run_with_its_steps_saved(model, plain, tmp_path, step, name):
    def broken(info):
        if info.step == step:
            raise KeyError("my mistake")

    made = config(model, tmp_path / "run")
    with pytest.raises(KeyError, match="my mistake") as caught:
        run(made, callbacks=[Callbacks(**{name: broken})])
    said = "".join(traceback.format_exception(caught.value))
    assert "in broken" in said  # the line that is to be corrected
    assert f"This was raised by the callback {name}. The steps made before are saved." in said
    assert f"checkpoint-{step}" in {path.name for path in made.output.iterdir()}
    *_, record = read_journal(made.output / "journal.jsonl")
    assert record["reason"].startswith("KeyError: 'my mistake'")
    run(made.model_copy(update={"resume": True}))
    assert (made.output / NAME).read_bytes() == (plain / NAME).read_bytes()


def test_what_is_hardly_meant_is_refused(model, tmp_path):
    made = config(model, tmp_path / "run")
    with pytest.raises(ConfigError, match="the callback on_step returned True: expected None, 's"):
        run(made, callbacks=[when(1, True)])
    assert (made.output / "checkpoint-1").is_dir()


class Misspelt:
    def on_steps(self, info):
        raise AssertionError


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Misspelt()], r"Misspelt\.on_steps is never called; did you mean `on_step`"),
        ([print], "builtin_function_or_method has none of on_step, on_evaluate, on_save"),
        ([Callbacks()], "Callbacks has none of"),
        (Callbacks(), r"expected a list of objects, got 'Callbacks': write callbacks=\[…\]"),
    ],
)
def test_callbacks_that_would_never_be_called_are_refused(model, tmp_path, callbacks, message):
    with pytest.raises(ConfigError, match=message):
        run(config(model, tmp_path / "run"), callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_the_public_names():
    assert halfbyte.Callbacks is Callbacks
    assert "Callbacks" in dir(halfbyte)
    json.dumps(dataclasses.asdict(StepInfo(1, 2, 0.5, 1.0, 1.0, 0.1, 3, 2, 0.1, False)))
