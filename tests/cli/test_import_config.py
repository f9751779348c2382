"""``halfbyte import-config``: the file it writes, and what it prints."""

import json

import pytest

from halfbyte.cli import main
from halfbyte.config.reading import load_config
from tests.config.importing.test_importing import AXOLOTL


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text(AXOLOTL)
    return tmp_path


def test_it_writes_a_file_that_train_reads(theirs, capsys):
    assert main(["import-config", "theirs.yaml"]) == 0
    out = capsys.readouterr().out
    assert "evals_per_epoch: 4" in out
    assert "train halfbyte.yaml" in out
    config, notes = load_config(theirs / "halfbyte.yaml", {})
    assert (config.model, config.max_length, notes) == ("org/model", 4096, [])
    text = (theirs / "halfbyte.yaml").read_text()
    assert "# sequence_len: 4096" in text
    assert "#   tf32: false — products are in `compute_dtype`" in text


def test_it_replaces_nothing_unasked(theirs, capsys):
    (theirs / "halfbyte.yaml").write_text("mine")
    assert main(["import-config", "theirs.yaml"]) == 2
    assert "halfbyte.yaml exists" in capsys.readouterr().err
    assert (theirs / "halfbyte.yaml").read_text() == "mine"
    assert main(["import-config", "theirs.yaml", "--overwrite"]) == 0


def test_what_is_to_be_set_is_said(theirs, capsys):
    (theirs / "theirs.yaml").write_text("base_model: x\nadapter: lora\nlearning_rate: 1.0e-4\n")
    assert main(["import-config", "theirs.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["to_be_set"] == ["data"]
    assert found["options"]["max_length"] == 512  # axolotl's default
    assert "# data: DATA" in (theirs / "halfbyte.yaml").read_text()
