"""The code of docs/extending.md does what is said there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data import formats
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.plan import roofline
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.runtime import device as devices
from tests.engine.test_layerwise import FAMILIES, gradients, model_of
from tests.engine.test_objective import engines, step_of
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
    store = block("A place where weights live")["CompressedLayers"]
    loss, wanted = stepped(made(), 1)
    engine = LayerEngine(model_of(FAMILIES["llama"], store=store), fuse=True)
    assert isinstance(engine.weights.stream.source, store)
    got, found = stepped(engine, 1)
    assert torch.equal(got, loss)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


@pytest.mark.parametrize("kind", ["packed", "unpacked", "autograd"])
def test_an_objective_has_the_gradients_of_plain_pytorch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPO as its paper writes it, over transformers' own forward."""
    objective = block("An objective")["DPO"](beta=0.2)
    objective.reference = torch.tensor([-90.0, -70.0, -130.0, -50.0, -30.0, -60.0])
    batches = step_of([[17, 9, 26, 8], [5, 12]])
    assert objective.count_terms(batches) == 3
    model = model_of(FAMILIES["llama"])
    sums = []
    for batch in batches:
        logps = model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
        own = logps.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]
        sums += list((own * (batch.labels != -100)).sum(1))
    margins = [
        (sums[i] - objective.reference[i]) - (sums[i + 1] - objective.reference[i + 1])
        for i in (0, 2, 4)
    ]
    wanted = -sum(torch.log(torch.sigmoid(0.2 * margin)) for margin in margins) / 3
    wanted.backward()
    true = gradients(model)
    engine = engines(model, monkeypatch)[kind]
    engine.objective = objective
    got = engine.step(batches, objective.count_terms(batches), ActivationPolicy(1))
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        assert true[name].norm() > 0
        assert (gradient - true[name]).norm() <= 2e-5 * true[name].norm(), name


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
    preferred = formats.preferred_formats([row])
    assert preferred == ("question/answer",)
    read = formats.to_conversation(row, "1", preferred)
    assert (read.prompt, read.expected) == ([{"role": "user", "content": "Two and two?"}], "Four.")
