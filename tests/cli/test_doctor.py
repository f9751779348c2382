"""``halfbyte doctor``: it tells what there is, and sees what is wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from halfbyte import cli
from halfbyte.cli import doctor
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.layers import attention_cpu
from halfbyte.linear.decoded_weight import DENSE, DecodedWeight
from halfbyte.quant import QuantType, cpu, dequantize, quantize
from halfbyte.quant.blockwise import cuda_bounds
from halfbyte.tools import self_test


def checked(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, Any]:
    assert cli.main(["doctor", "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.fixture
def trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for real, but once for all tests in which training is not what is wrong.

    Three trainings are two of the self-test's 2.5 s. `test_every_part_is_right_in_either_dtype`
    makes all of them.
    """
    monkeypatch.setattr(self_test, "_train", _train)


_train = functools.cache(self_test._train)


def failed(answer: dict[str, Any]) -> list[str]:
    return [check["name"] for check in answer["self_test"] if not check["passed"]]


@pytest.mark.usefixtures("trained_once")
def test_a_person_reads_what_there_is_and_that_it_is_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in ("torch", "processor", "C++ compiler", "paging", "nothing to page", "✓"):
        assert expected in out
    assert "✗" not in out
    assert "All 9 passed (" in out


@pytest.mark.usefixtures("trained_once")
def test_a_program_reads_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    answer = checked(capsys, 0)
    assert answer["passed"]
    assert set(answer) == {"versions", "machine", "used", "self_test", "passed"}
    facts = {check["name"]: check["facts"] for check in answer["self_test"]}
    assert facts["packing and decoding, to the bit"]["cases"] >= 6
    learnt = facts["a tiny model learns"]
    assert learnt["last_loss"] < learnt["first_loss"] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_is_right_in_either_dtype(dtype: torch.dtype) -> None:
    assert all(check.passed for check in self_test.checks("cpu", dtype))


@pytest.mark.usefixtures("trained_once")
def test_a_decoder_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = cpu.kernels()
    if kernels is None:
        pytest.skip(cpu.describe())

    def off_by_one_bit(q: Any, out: torch.Tensor, variant: str = "", **_: Any) -> None:
        out.copy_(dequantize(q, out.dtype, impl="torch").view(out.shape))
        if variant == "scalar":
            out.view(-1)[-1] *= 1.001

    monkeypatch.setattr(kernels, "decode", off_by_one_bit)
    assert cli.main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert failed(answer) == ["packing and decoding, to the bit"]
    wrong = answer["self_test"][0]["facts"]["wrong"]
    assert "dequantise nf4 float32 (scalar)" in wrong
    assert all("(scalar)" in name for name in wrong)
    assert "wrong results on this machine: packing and decoding" in err


@pytest.mark.usefixtures("trained_once")
def test_a_linear_layer_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = DENSE.decode

    def wrong(*args: Any, **how: Any) -> list[DecodedWeight]:
        weights = right(*args, **how)
        for weight in weights:
            weight.data[3] = 0.0
        return weights

    monkeypatch.setattr(DENSE, "decode", wrong)
    assert "a 4-bit linear layer with adapter" in failed(checked(capsys, 1))


@pytest.mark.usefixtures("trained_once")
def test_attention_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention_cpu._Scores.weights
    monkeypatch.setattr(
        attention_cpu._Scores,
        "weights",
        lambda self, *args: right(self._replace(scale=1.1 * self.scale), *args),
    )
    assert "attention" in failed(checked(capsys, 1))


@pytest.mark.usefixtures("trained_once")
def test_an_engine_that_forgets_a_micro_batch_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = LayerEngine.step
    monkeypatch.setattr(
        LayerEngine,
        "step",
        lambda self, batches, *args, **kw: right(self, batches[:1], *args, **kw),
    )
    assert "layer engine against plain autograd" in failed(checked(capsys, 1))


def test_training_that_differs_from_itself_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = self_test._train, iter(range(9))

    def drifting(here: Any) -> Any:
        trained = right(here)
        trained.adapters[0].view(-1)[0] += 1e-6 * next(calls)
        return trained

    monkeypatch.setattr(self_test, "_train", drifting)
    assert failed(checked(capsys, 1)) == ["and learns it again, bit for bit"]


@pytest.mark.usefixtures("trained_once")
def test_only_what_is_to_repeat_is_held_to_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other parts compute as training does; all after cuBLAS has been told."""
    held: list[str] = []
    original, train = self_test.deterministic, self_test._train

    @contextmanager
    def recorded(wanted: bool) -> Iterator[None]:
        held.append(f"entered {wanted}")
        with original(wanted):
            yield
        held.append("left")

    monkeypatch.setattr(self_test, "deterministic", recorded)
    monkeypatch.setattr(self_test, "_train", lambda here: held.append("trained") or train(here))
    list(self_test.checks("cpu", torch.float32))
    assert held[:3] == ["entered False", "left", "trained"]
    assert held[3:] == ["entered False", "trained", "trained", "left"]


class _Driver:
    """A CUDA driver that answers with one attribute."""

    def __init__(self, managed: int, error: int = 0) -> None:
        self.managed, self.error = managed, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGet(self, device: Any, number: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, answer: Any, which: int, device: Any) -> int:
        assert which == 89
        answer._obj.value = self.managed
        return 0


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (_Driver(1), "managed memory (concurrentManagedAccess is 1)"),
        (_Driver(0), "concurrentManagedAccess is 0"),
        (_Driver(1, error=100), "the driver returns error 100"),
        (OSError("libcuda.so.1: not found"), "the driver cannot be queried (libcuda.so.1"),
    ],
)
def test_whether_state_can_page_is_asked_of_the_driver(
    driver: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert message in doctor.paging("cuda")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_gpu_may_take_the_neighbour_at_a_bound_only(quant_type: QuantType) -> None:
    bounds, _ = cuda_bounds(quant_type)
    weight = torch.linspace(-1, 1, 64 * 300)
    weight[5] = bounds[-1] * weight[:64].abs().max()
    plain = quantize(weight, quant_type=quant_type)
    assert self_test.same_but_at_bounds(plain, plain, weight)
    for place, fine in ((5, True), (7, False), (64 * 300 - 1, False)):
        codes = plain.codes.clone()
        codes[place // 2] ^= 1 if place % 2 else 16
        ours = dataclasses.replace(plain, codes=codes)
        assert self_test.same_but_at_bounds(ours, plain, weight) == fine
    scale_codes = plain.scale_codes.clone()
    scale_codes[:2] ^= 1
    ours = dataclasses.replace(plain, scale_codes=scale_codes)
    assert not self_test.same_but_at_bounds(ours, plain, weight)
