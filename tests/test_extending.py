"""The code of docs/extending.md does what is said there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data import formats
from tests.engine.test_weights import made, stepped

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def block(heading: str) -> dict[str, Any]:
    """Run the code under a heading, and return what it defines."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 30
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def test_a_row_of_the_table_of_families() -> None:
    assert block("An architecture")["row"].layer == "OlmoDecoderLayer"


def test_weights_that_are_elsewhere_train_the_same() -> None:
    provider = block("A place where weights live")["HostWeights"]
    loss, wanted = stepped(made(), 1)
    engine = made(provider)
    for layer in engine.linears:
        for linear in layer:
            linear.quantized.codes.zero_()
    got, found = stepped(engine, 1)
    assert torch.equal(got, loss)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


def test_a_data_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    block("A data format")
    row = {"question": "Two and two?", "answer": "Four."}
    name = formats.detect_format([row])
    assert name == "question/answer"
    read = formats.to_conversation(row, "1", name)
    assert (read.prompt, read.expected) == ([{"role": "user", "content": "Two and two?"}], "Four.")
