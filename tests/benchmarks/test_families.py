"""The sweep over model families, on one family per cause, and the table it writes.

Each row trains a tiny model and compares it with transformers + PEFT, see benchmarks/families.py.
"""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("families")


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        ("mamba", "layer engine"),  # its scan reads weights, and PEFT refuses some targets
        ("deepseek_v3", "layer engine"),  # experts are converted, and PEFT takes their names
        ("bert", "refused"),
    ],
)
def test_a_family_ends_as_the_table_says(
    families: Any, tmp_path: Path, row: str, outcome: str
) -> None:
    assert families.examine(row, tmp_path)["outcome"] == outcome


def test_what_differs_is_a_defect(families: Any, tmp_path: Path) -> None:
    families._write_model("llama", tmp_path / "model")
    families._train(tmp_path / "model", tmp_path, "none")
    card = tmp_path / "none" / "adapter_config.json"
    text = card.read_text()
    card.write_text(text.replace('"down_proj",', ""))
    with pytest.raises(families.Defect, match="PEFT"):
        families.compare(tmp_path / "model", tmp_path / "none")


def test_the_table_has_a_line_for_each_row(families: Any) -> None:
    rows = {
        "llama": {
            "outcome": "layer engine",
            "note": "",
            "class": "LlamaForCausalLM",
            "base_logits": 2e-6,
            "logits": 1e-6,
            "gradients": 2e-4,
            "gradients_float64": 3e-7,
        },
        "bert": {"outcome": "refused", "note": "an\nencoder | so", "class": "BertLMHeadModel"},
    }
    table = families.table(rows)
    assert "2 rows: trains on the layer engine 1, refused 1." in table
    assert "logits is 2e-06, of gradients 3e-07 (in float64 where float32 rounds more" in table
    assert "| bert | BertLMHeadModel | refused | an encoder \\| so |" in table
