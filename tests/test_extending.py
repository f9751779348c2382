"""The code of docs/extending.md does what is said there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data import formats
from halfbyte.plan import roofline
from halfbyte.runtime import device as devices
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


def test_another_gpu_is_given_what_its_generation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_lora = pytest.importorskip("halfbyte.linear.triton_lora", exc_type=ImportError)
    triton_swiglu = pytest.importorskip("halfbyte.linear.triton_swiglu", exc_type=ImportError)
    adapters, cpu = (
        triton_lora.CastAdapters(torch.empty(0), torch.empty(0), 16),
        torch.device("cpu"),
    )
    assert triton_swiglu.backward_fits(adapters, adapters, cpu)  # the interpreter is as a Hopper
    monkeypatch.setattr(devices, "spec_of", devices.spec_of)  # the code sets it: undone at the end
    monkeypatch.setattr(roofline, "CARDS", dict(roofline.CARDS))
    spec = block("A GPU")["spec"]
    assert not triton_swiglu.backward_fits(adapters, adapters, cpu)
    listed = roofline.gpu_of_driver(spec.name)
    assert listed is not None
    assert listed.gpu.capability == spec.capability
    assert listed.memory == pytest.approx(spec.memory, rel=0.001)


def test_a_data_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    block("A data format")
    row = {"question": "Two and two?", "answer": "Four."}
    name = formats.detect_format([row])
    assert name == "question/answer"
    read = formats.to_conversation(row, "1", name)
    assert (read.prompt, read.expected) == ([{"role": "user", "content": "Two and two?"}], "Four.")
