"""A run's memory is predicted, and the prediction is held against what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.model.build import BaseRecipe
from halfbyte.plan.activations import Dial
from halfbyte.report import open_report
from halfbyte.train.config import TrainConfig, check
from halfbyte.train.loop import train
from halfbyte.train.predicting import Prediction
from tests.tiny import write_tiny_model


@pytest.fixture
def prediction(tmp_path: Path) -> Prediction:
    source = open_base(write_tiny_model(tmp_path / "model"))
    base = load_base(source, BaseRecipe())
    pattern = {"v_proj": 3}
    lora = LoRAConfig(r=8, rank_pattern=pattern, modules_to_save=("norm",))
    attach(base.model, lora, seed=0)
    parameters = adapter_parameters(base.model)
    predicted = Prediction(
        source,
        base.model.halfbyte_recipe,
        parameters,
        rank=8,
        optimizer="adamw",
        fused=False,
        dial=Dial(2),
    )
    predicted.see([(1, 1)], 1.0)
    assert predicted.ledger.base == base.audit.total_bytes
    numel = sum(parameter.numel() for parameter in parameters.values())
    assert 0 <= predicted.ledger.total("trained") - 16 * numel < 2 * 256 * len(parameters)
    return predicted


def test_it_is_of_the_largest_step_seen(prediction: Prediction) -> None:
    def kept(*shapes: tuple[int, int]) -> int:
        prediction.see(shapes, 1.0)
        return prediction.ledger.kept

    first = kept((2, 10), (1, 20))
    assert kept((1, 5)) == first
    assert kept((2, 10), (2, 10), (2, 20)) == pytest.approx(2 * first, abs=1)


class Heard:
    """A report that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def record(self, event: str, record: dict[str, Any]) -> None:
        assert event == "memory"
        self.records.append(record)


@pytest.mark.parametrize(("factor", "off"), [(1.02, False), (1.2, True), (0.8, True)])
def test_what_is_off_is_said(prediction: Prediction, factor: float, off: bool) -> None:
    for seconds in (9.0, 2.0, 4.0):
        prediction.see([(2, 10)], seconds)
    heard: Any = Heard()
    prediction.tell(heard, round(factor * prediction.ledger.peak), 5)
    (record,), (line,) = heard.records, heard.lines
    assert record["step"] == 5
    assert record["off"] == pytest.approx(factor - 1, abs=1e-6)
    assert f"({100 * (factor - 1):+.1f} %)" in line
    assert ("off by more than 5 %" in line) == off
    assert record["measured_seconds"] == 3.0  # the first two compile
    assert record["predicted_seconds"] > 0
    assert "; 3 s a step, " in line
    total = sum(entry["nbytes"] for entry in record["ledger"] if entry["group"] == "base")
    assert total == prediction.ledger.base


def test_a_run_tells_after_five_steps_and_at_the_end(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    row = {"prompt": "What is the capital of France?", "completion": "Paris."}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(row)] * 16))
    options = {"batch_size": 1, "gradient_accumulation_steps": 2, "device": "cpu", "samples": 0}
    names = {"model": model, "data": tmp_path / "data.jsonl", "output": tmp_path / "run"}
    made = check(TrainConfig, {name: str(path) for name, path in names.items()} | options)
    with open_report(made.output, quiet=True) as report:
        train(made, report)
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    told = [event for event in events if event["event"] == "memory"]
    assert [event["step"] for event in told] == [5, 8]
    begun = next(event for event in events if event["event"] == "begin")
    for event in told:
        base = sum(line["nbytes"] for line in event["ledger"] if line["group"] == "base")
        assert base == begun["base_bytes"]
        assert event["measured_bytes"] > base
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert sum(text.startswith("memory: ") for text in notes) == 2
