"""A step that is not finite: the run stops, skips it or rewinds, and says which rows it had."""

import json
import math
import os

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import CheckpointError, NonFiniteLossError
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.train import nonfinite
from halfbyte.train.nonfinite import rows_in_words
from halfbyte.train.run import train
from halfbyte.train.trainer import Trainer
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.train.interrupting import break_off

NAME = "adapter_model.safetensors"
BAD = "zzz"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32, tied=False)


@pytest.fixture(autouse=True)
def _overflowing(monkeypatch):
    """A token that one row has, and no other, has an embedding that is not finite."""
    init, (*_, token) = LayerEngine.__init__, tiny_tokenizer()(BAD)["input_ids"]

    def overflowing(self, model, **options):
        init(self, model, **options)
        model.get_input_embeddings().weight.data[token] = math.inf

    monkeypatch.setattr(LayerEngine, "__init__", overflowing)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Line 6 has the token."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}", "completion": "Paris"} for n in range(8)]
    rows[5]["prompt"] = BAD
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model, data, output, **options):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "epochs": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lora_r": 2,
        "quant": "none",
        "target_modules": "q_proj,v_proj",
        "compute_dtype": "float32",
        "device": "cpu",
        "samples": 0,
    }
    return TrainConfig(model=str(model), data=str(data), output=output, **settings | options)


def run(made):
    with open_report(made.output, quiet=True) as report:
        return train(made, report)


def events(output, kind):
    return [one for one in read_journal(output / "journal.jsonl") if one["event"] == kind]


def bad_steps(model, data, tmp_path):
    """The steps (1-based) that contain the row, of two epochs of four."""
    run(config(model, data, tmp_path / "probe", on_nonfinite="skip"))
    return [one["step"] for one in events(tmp_path / "probe", "warning")]


def test_stop_names_the_tensor_and_the_row_and_resuming_repeats_it(model, data, tmp_path):
    made = config(model, data, tmp_path / "run")
    with pytest.raises(NonFiniteLossError) as first:
        run(made)
    text = str(first.value)
    assert "Nothing was updated" in text
    assert "The first tensor that is not finite is the output of model." in text
    assert f"in line 6 of {data}" in text
    step = events(made.output, "warning")[0]["step"]
    assert {name for name in os.listdir(made.output) if "checkpoint" in name} == {
        f"checkpoint-{n}" for n in (step - 2, step - 1) if n >= 0 and (n or step == 1)
    }
    found = json.loads((made.output / f"nonfinite-{step}.json").read_text())
    assert found["where"]["lines"] == ["6"]
    assert found["loss"] == "nan"
    (row,) = [one for one in found["rows"] if one["line"] == "6"]
    tokenizer = tiny_tokenizer()
    assert BAD in tokenizer.decode(row["tokens"])
    assert len(row["labels"]) == len(row["tokens"])
    assert len(found["rows"]) == 2
    with pytest.raises(NonFiniteLossError) as again:
        run(made.model_copy(update={"resume": True}))
    assert str(again.value) == text
    assert json.loads((made.output / f"nonfinite-{step}.json").read_text()) == found
    # Without the step it goes on, as a run that skips from the beginning.
    run(made.model_copy(update={"resume": True, "on_nonfinite": "skip"}))
    run(config(model, data, tmp_path / "skip", on_nonfinite="skip"))
    assert (made.output / NAME).read_bytes() == (tmp_path / "skip" / NAME).read_bytes()


def test_skip_leaves_the_step_out_and_counts_it(model, data, tmp_path):
    made = config(model, data, tmp_path / "run", on_nonfinite="skip")
    result = run(made)
    assert result.skipped_steps == 2
    assert math.isfinite(result.final_loss)
    warnings = events(made.output, "warning")
    assert [one["kind"] for one in warnings] == ["nonfinite"] * 2
    steps = events(made.output, "step")
    assert [one["step"] for one in steps] == list(range(1, 9))
    skipped = [one["step"] for one in steps if one.get("skipped")]
    assert skipped == [one["step"] for one in warnings]
    assert (events(made.output, "finish")[0])["skipped_steps"] == 2
    page = (made.output / "report.html").read_text()
    assert "The first tensor that is not finite" in page


def test_rewind_goes_back_to_the_newest_checkpoint(model, data, tmp_path, monkeypatch):
    """What was learned since then is gone, with the optimizer's state."""
    steps = bad_steps(model, data, tmp_path)
    made = config(model, data, tmp_path / "run", on_nonfinite="rewind", save_steps=3)
    run(made)
    notes = [one["text"] for one in events(made.output, "warning")]
    saved = [3 * ((step - 1) // 3) for step in steps]
    assert [
        f"Back to the state after step {n}; it is left out" in t
        for n, t in zip(saved, notes, strict=True)
    ] == [True, True]

    # The same, made of steps: those whose updates survive, and no others.
    lost = {n for step, back in zip(steps, saved, strict=True) for n in range(back + 1, step + 1)}
    other = config(model, data, tmp_path / "other", on_nonfinite="skip")
    step = LayerEngine.step

    def without(self, *args):
        without.count += 1
        return step(self, *args) * (math.nan if without.count in lost else 1.0)

    without.count = 0
    monkeypatch.setattr(LayerEngine, "step", without)
    run(other)
    one, two = (load_file(path / NAME) for path in (made.output, other.output))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_rewinds_resumes_byte_for_byte(model, data, tmp_path):
    options = {"on_nonfinite": "rewind", "save_steps": 2}
    whole = config(model, data, tmp_path / "whole", **options)
    run(whole)
    broken = config(model, data, tmp_path / "broken", **options)
    break_off(broken, 7)
    result = run(broken.model_copy(update={"resume": True}))
    assert (whole.output / NAME).read_bytes() == (broken.output / NAME).read_bytes()
    assert result.skipped_steps == 2


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [("MOST_IN_A_ROW", 3, "4 steps in a row"), ("LEAST_STEPS", 2, "2 of 2 steps")],
)
def test_too_many_end_the_run_and_are_not_saved_as_made(
    model, data, tmp_path, monkeypatch, limit, value, said
):
    step = LayerEngine.step
    monkeypatch.setattr(LayerEngine, "step", lambda self, *args: step(self, *args) * math.nan)
    monkeypatch.setattr(nonfinite, limit, value)
    made = config(model, data, tmp_path / "run", on_nonfinite="skip")
    texts = []
    for resume in (False, True):
        with pytest.raises(NonFiniteLossError, match=f"These are {said}, so the run ends") as end:
            run(made.model_copy(update={"resume": resume}))
        texts.append(str(end.value))
    assert texts[0] == texts[1]


def test_where_layers_may_be_updated_early_a_step_cannot_be_skipped():
    given = {"model": "-", "data": "-", "output": "-", "optim": "paged_adamw_32bit"}
    given |= {"paging": "explicit", "max_grad_norm": 0.0}
    with pytest.raises(ValidationError, match="skip needs `max_grad_norm` with `paging` explicit"):
        TrainConfig(**given, on_nonfinite="skip")
    assert TrainConfig(**given, on_nonfinite="rewind").on_nonfinite == "rewind"


def test_after_an_early_update_the_state_is_not_saved(model, data, tmp_path, monkeypatch):
    """The upper layers were updated before the gradient of a lower one was known."""
    made = config(model, data, tmp_path / "run", max_steps=1)
    step, finished = LayerEngine.step, Trainer._finished

    def early(self, *args):  # as on a GPU with explicit paging and without clipping
        self._early = True
        return finished(self, *args)

    def overflows(self, *args):
        loss = step(self, *args)
        next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(math.inf)
        return torch.ones_like(loss)

    monkeypatch.setattr(LayerEngine, "step", overflows)
    monkeypatch.setattr(Trainer, "_finished", early)
    with pytest.raises(NonFiniteLossError, match=r"Some layers were updated\..*newest checkpoint"):
        run(made)
    assert not list(made.output.glob("checkpoint-*"))


def test_a_loss_that_never_changes_is_warned_of(model, data, tmp_path):
    """One row, which is learned with a learning rate that changes nothing in float32."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "completion": "Paris"}) + "\n")
    made = config(
        model, tmp_path / "one.jsonl", tmp_path / "run", max_steps=25, learning_rate=1e-30
    )
    run(made)
    (warning,) = events(made.output, "warning")
    assert (warning["step"], warning["kind"]) == (21, "constant")
    assert "without any change" in (made.output / "report.html").read_text()


def test_a_resumed_run_watches_on_from_where_it_was(model, data, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "completion": "Paris"}) + "\n")
    options = {"max_steps": 25, "learning_rate": 1e-30, "save_steps": 15}
    made = config(model, tmp_path / "one.jsonl", tmp_path / "run", **options)
    run(made)
    before = events(made.output, "warning")
    (made.output / "checkpoint-25" / "run_state.json").unlink()
    run(made.model_copy(update={"resume": True}))
    again = events(made.output, "warning")
    assert [one["step"] for one in again] == [one["step"] for one in before] == [21]


def test_counts_that_are_damaged_are_refused():
    counts = nonfinite.NonFiniteSteps.__new__(nonfinite.NonFiniteSteps)
    with pytest.raises(CheckpointError, match="expected counts of skipped steps, got 3"):
        counts.load(3)


def test_rows_in_words():
    assert rows_in_words(["3"], "a.jsonl") == "line 3 of a.jsonl"
    assert rows_in_words(["3", "7", "3"], "a.jsonl") == "lines 3, 7 of a.jsonl"
    many = rows_in_words([str(n) for n in range(20)], "a.jsonl")
    assert many == "lines 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of a.jsonl"
