"""Model cards from the files of a run, whatever these hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError
from halfbyte.report.model_card import model_card, write_model_card
from tests.report.test_page import FIELDS, JUNK, journal_lines, write_journal

EVIL = "x`|\n# not a heading\n---\n[a](b) <script>"


def adapter(directory: Path, **fields: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"r": 8, "base_model_name_or_path": "/home/me/base.gguf"} | fields
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def test_a_card_says_what_was_done(tmp_path: Path) -> None:
    lines = journal_lines(learning_rate=1e-4, quant="nf4", data="/home/me/train.jsonl")
    verdict = {"rows": 5, "usable": 4, "tokens": 100, "supervised_tokens": 60, "lines": ["secret"]}
    lines[2] |= {"data_verdict": verdict, "data_digest": "abc", "given": ["data"]}
    directory = adapter(write_journal(tmp_path / "run", lines))
    info = {
        "base": {"name": "/home/me/base.gguf", "fingerprint": "f00"},
        "recipe": {"quant": "nf4"},
    }
    (directory / "halfbyte.json").write_text(json.dumps(info))
    path = write_model_card(directory, "alice/orders", "acme/base", "mit")
    assert path is not None
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    assert card.data.to_dict() == {
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["halfbyte", "lora", "qlora"],
    }
    for text in (
        "# orders",
        "| training loss, last step | 1.0000 |",
        "| held-out loss | 1.2500 |",
        "| fingerprint of its files | `f00` |",
        "| rows | 5 |  |",
        "| SHA-256 of tokens and loss masks | `abc` |  |",
        "| `data` | `train.jsonl` |",
        "| torch | `2.13.0` |",
        'PeftModel.from_pretrained(model, "alice/orders")',
        "vllm serve acme/base --enable-lora --max-lora-rank 8 --lora-modules orders=alice/orders",
        "halfbyte export acme/base orders orders-gguf --format gguf-lora",
    ):
        assert text in card.text
    assert "/home/me" not in card.content
    assert "secret" not in card.content
    assert "fish" not in card.content  # an answer


def test_an_adapter_of_peft_has_a_card_too(tmp_path: Path) -> None:
    text = model_card(adapter(tmp_path / "x", use_dora=True), None, None, None)
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["halfbyte", "lora", "dora"]
    assert "vLLM does not load it by itself: DoRA." in text
    assert "base\\_model" not in text
    with pytest.raises(CheckpointError, match="does not exist"):
        model_card(tmp_path / "nowhere", None, None, None)


def test_only_our_own_card_is_replaced(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "x")
    assert write_model_card(directory, None, None, None) == directory / "README.md"
    assert write_model_card(directory, None, None, "mit") == directory / "README.md"
    kept = "".join(
        line
        for line in (directory / "README.md").read_text().splitlines(keepends=True)
        if "written by halfbyte" not in line
    )
    (directory / "README.md").write_text(kept)
    assert write_model_card(directory, None, None, None) is None
    assert (directory / "README.md").read_text() == kept


def test_foreign_text_stays_in_its_place(tmp_path: Path) -> None:
    lines = journal_lines(**{EVIL: EVIL})
    lines[2] |= {"given": [EVIL], "versions": {"torch": EVIL}, "machine": EVIL}
    directory = adapter(write_journal(tmp_path / "run", lines), base_model_name_or_path=EVIL)
    text = model_card(directory, None, None, None)
    metadata = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert metadata["library_name"] == "peft"
    headings = [
        line for line in text.splitlines() if line.startswith("#") and "written" not in line
    ]
    assert [line for line in headings if "not a heading" in line] == []
    assert all(line.count("`") % 2 == 0 for line in text.splitlines() if line.startswith("|"))


@settings(max_examples=30)
@example({"given": 1, "config": {"seed": 0}})
@given(st.dictionaries(st.sampled_from([*FIELDS, "machine", "data_digest"]), JUNK))
def test_whatever_a_journal_says_there_is_a_card(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    directory = adapter(tmp_path_factory.mktemp("run"))
    write_journal(directory, [{"event": "begin"} | fields, {"event": "step", "step": 1} | fields])
    path = write_model_card(directory, None, None, None)
    assert path is not None
    assert ModelCard.load(path).data.to_dict()["library_name"] == "peft"
