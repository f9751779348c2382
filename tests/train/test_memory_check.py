"""A run's memory is predicted, and the prediction is held against what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.config.reading import check
from halfbyte.config.schema import TrainConfig
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.roofline import CARDS
from halfbyte.report import open_report
from halfbyte.runtime import device as devices
from halfbyte.train.memory_check import Prediction
from halfbyte.train.run import train
from tests.devices import DEVICES
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
        policy=ActivationPolicy(2),
    )
    predicted.see([(1, 1)], 1.0, lengths=[1])
    assert predicted.ledger.base == base.memory_report.total_bytes
    numel = sum(parameter.numel() for parameter in parameters.values())
    assert 0 <= predicted.ledger.total("trained") - 16 * numel < 2 * 256 * len(parameters)
    return predicted


def test_it_is_of_the_largest_step_seen(prediction: Prediction) -> None:
    def kept(*shapes: tuple[int, int]) -> int:
        lengths = [length for batch, length in shapes for _ in range(batch)]
        prediction.see(shapes, 1.0, lengths=lengths)
        return prediction.ledger.kept

    first = kept((2, 10), (1, 20))
    assert kept((1, 5)) == first
    # What each of two layers keeps is rounded.
    assert kept((2, 10), (2, 10), (2, 20)) == pytest.approx(2 * first, abs=2)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prediction:
    """Of a run on a GPU that packs documents."""
    spec = DEVICES["h100"]
    monkeypatch.setattr(devices, "spec_of", lambda _: spec)
    return Prediction(
        open_base(write_tiny_model(tmp_path / "model")),
        BaseRecipe(compute_dtype=torch.bfloat16, device="cuda"),
        {},
        rank=8,
        optimizer="adamw",
        fused=True,
        policy=ActivationPolicy(),
        graphs=True,
    )


def test_memory_of_packed_documents_is_that_of_the_largest_part(packed: Prediction) -> None:
    packed.see([(4, 300)], 1.0, lengths=[300, 100, 20, 10], parts=[512])
    first = packed.ledger
    assert first.graphs
    assert first.cost.input == first.cost.part_input == 512 * 64 * 2
    packed.see([(4, 500)] * 2, 1.0, lengths=[500] * 8, parts=[512] * 8)
    assert packed.ledger.needed == first.needed
    packed.see([(1, 600)], 1.0, lengths=[600], parts=[640])
    assert packed.ledger.cost.input == 640 * 64 * 2


def test_after_memory_ran_out_it_is_of_what_is_done_now(packed: Prediction) -> None:
    packed.see([(1, 512)], 1.0, lengths=[512], parts=[512])
    before = packed.ledger
    saved = ActivationPolicy(2)
    packed.use(saved, graphs=False)
    after = packed.ledger
    assert (before.policy, after.policy) == (ActivationPolicy(), saved)
    assert (before.graphs, after.graphs) == (True, False)
    assert after.needed == after.peak
    assert after.kept == after.cost.kept(saved) > before.kept


def test_time_follows_from_parts_and_what_documents_attend_to(packed: Prediction) -> None:
    card = CARDS["h100"]

    def predicted(lengths: list[int], parts: list[int], took: float = 1.0) -> float:
        packed._steps.clear()
        for seconds in (9.0, 9.0, took, 2 * took):  # the first two compile
            packed.see([(1, sum(lengths))], seconds, lengths=lengths, parts=parts)
        measured, seconds = packed.seconds(card)
        assert measured == 1.5 * took
        return seconds

    def attention(tokens: int) -> float:
        """Of two layers 64 wide, with 4 heads of 16: forward, again and backward.

        Documents below 2048 tokens, and heads below 128, reach less of the card.
        """
        share = 0.5 * min(1.0, tokens / 2048) ** 0.5 * 16 / 128
        return 2 * tokens * 64 * 8192 * 2 * (1 + 2.5 + 1) / (card.flops * share)

    long, short = predicted([8192], [8192]), predicted([1024] * 8, [8192])
    # Σ n² / Σ n tokens are attended to.
    assert long - short == pytest.approx(attention(8192) - attention(1024), rel=1e-6)
    mixed = predicted([4096] + [512] * 8, [8192])
    assert long - mixed == pytest.approx(attention(8192) - attention(2304), rel=1e-6)
    # Each part decodes, and launches its kernels.
    assert predicted([1024] * 8, [1024] * 8) > short
    # What fills parts up is computed, too.
    assert predicted([1024] * 7, [8192]) == pytest.approx(short, rel=1e-6)


def test_what_is_reserved_is_told_beside_what_is_predicted(packed: Prediction) -> None:
    packed.see([(1, 512)], 1.0, lengths=[512], parts=[512])
    heard: Any = Heard()
    packed.tell(heard, packed.ledger.peak, 5, reserved=2 * packed.ledger.needed)
    (record,), (line,) = heard.records, heard.lines
    assert record["predicted_reserved_bytes"] == packed.ledger.needed > packed.ledger.peak
    assert record["reserved_bytes"] == 2 * packed.ledger.needed
    assert " GB reserved, " in line
    assert "off by more" not in line


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
        prediction.see([(2, 10)], seconds, lengths=[10, 10])
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
    records = [event for event in events if event["event"] == "memory"]
    assert [event["step"] for event in records] == [5, 8]
    begun = next(event for event in events if event["event"] == "begin")
    for event in records:
        base = sum(line["nbytes"] for line in event["ledger"] if line["group"] == "base")
        assert base == begun["base_bytes"]
        assert event["measured_bytes"] > base
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert sum(text.startswith("memory: ") for text in notes) == 2
