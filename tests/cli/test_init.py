"""``halfbyte init``: the configuration that it writes is what the planner says, and trains."""

import json
from pathlib import Path

import pytest

from halfbyte.cli import main
from halfbyte.config.reading import load_config
from tests.tiny import write_tiny_model


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": "a " * n}, {"role": "assistant", "content": "b"}]}
        for n in range(1, 61)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["init", "model", "train.jsonl", "--gpu-memory", "24GB"]


def test_it_writes_a_configuration_that_trains(words, tmp_path, capsys):
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    text = (tmp_path / "halfbyte.yaml").read_text()
    config, notes = load_config(tmp_path / "halfbyte.yaml", {})
    assert not notes
    assert {name: getattr(config, name) for name in found["options"]} | {
        "output": str(config.output), "data": found["options"]["data"]
    } == found["options"]  # fmt: skip
    # The tiny model fits with room to spare: its base stays exact, and nothing is truncated.
    assert config.quant == "none"
    assert config.max_length == 256
    assert "60 of 60 rows usable" in text
    assert "100.0% of the examples are not longer" in text
    assert "8 steps an epoch" in text
    more = ["--device", "cpu", "--max-steps", "1", "--samples", "0"]
    assert main(["train", "halfbyte.yaml", *more]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_less_memory_takes_four_bits_or_says_that_nothing_fits(words, tmp_path, capsys):
    small = [*words[:3], "--card", "t4", "--gpu-memory", "100kB", "--output", "small.yaml"]
    assert main(small) == 0
    assert "Nothing fits" in " ".join((tmp_path / "small.yaml").read_text().split())
    capsys.readouterr()


def test_it_replaces_nothing_unasked(words, tmp_path, capsys):
    (tmp_path / "halfbyte.yaml").write_text("mine")
    assert main(words) == 2
    assert "halfbyte.yaml exists" in capsys.readouterr().err
    assert (tmp_path / "halfbyte.yaml").read_text() == "mine"


def test_missing_data_is_said(words, tmp_path, capsys):
    assert main(["init", "model", "none.jsonl"]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "halfbyte.yaml").exists()
