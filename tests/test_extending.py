"""The code of docs/extending.md does what is said there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data import formats
from halfbyte.linear.decoded_cache import DecodedWeightCache
from tests.engine.test_weights import made, stepped
from tests.linear.test_decoded_weight import adapted, drawn, exactly, run

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


def test_a_number_format() -> None:
    linear, x = adapted([7], block("A number format")["Int8Rows"]())[0], drawn()
    (weight,) = linear.group.weights(torch.float64)
    assert weight.data.dtype == torch.int8
    rounded = weight.data.double() * weight.scale[:, None]
    true = linear.decode(torch.float64)
    step = true.abs().amax(1, keepdim=True) / 127
    assert ((rounded - true).abs() <= step * 0.5000001).all()
    for opened in (False, True):
        with DecodedWeightCache().opened([linear] if opened else [], torch.float64):
            got = run([linear], x)
        for found, wanted in zip(got, exactly([linear], [rounded], x), strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_data_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    block("A data format")
    row = {"question": "Two and two?", "answer": "Four."}
    name = formats.detect_format([row])
    assert name == "question/answer"
    read = formats.to_conversation(row, "1", name)
    assert (read.prompt, read.expected) == ([{"role": "user", "content": "Two and two?"}], "Four.")
