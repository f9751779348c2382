"""A run's memory is predicted, and the prediction is held against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.model.build import BaseRecipe
from halfbyte.plan.activations import Dial
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
    assert predicted.ledger.base == base.audit.total_bytes
    numel = sum(parameter.numel() for parameter in parameters.values())
    assert 0 <= predicted.ledger.total("trained") - 16 * numel < 2 * 256 * len(parameters)
    return predicted


def test_it_is_of_the_largest_step_seen(prediction: Prediction) -> None:
    def kept(*shapes: tuple[int, int]) -> int:
        prediction.see(shapes)
        return prediction.ledger.kept

    first = kept((2, 10), (1, 20))
    assert kept((1, 5)) == first
    assert kept((2, 10), (2, 10), (2, 20)) == 2 * first


@pytest.mark.parametrize(("factor", "says"), [(1.02, ""), (1.2, "by more than 5 %"), (0.8, "by")])
def test_what_is_off_is_said(prediction: Prediction, factor: float, says: str) -> None:
    prediction.see([(2, 10)])
    record, line = prediction.against(round(factor * prediction.ledger.peak), 5)
    assert record["step"] == 5
    assert record["off"] == pytest.approx(factor - 1, abs=1e-6)
    assert record["within"] == (not says)
    assert f"({100 * (factor - 1):+.1f} %)" in line
    assert says in line
    total: Any = sum(entry["nbytes"] for entry in record["ledger"] if entry["group"] == "base")
    assert total == prediction.ledger.base
