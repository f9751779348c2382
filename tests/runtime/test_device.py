"""What GPUs are taken to be, and what a GPU that Triton left behind is given."""

import logging
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from halfbyte.quant import format as quant_format
from halfbyte.runtime import device as devices
from halfbyte.runtime.device import INTERPRETER, DeviceSpec, spec_of
from tests.devices import DEVICES

gpu = pytest.importorskip(
    "halfbyte.quant.triton_blockwise", reason="needs Triton", exc_type=ImportError
)
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "shared", "triton", "bfloat16", "hopper"),
    [
        ("v100", 96, False, False, False),
        ("t4", 64, True, False, False),
        ("a100", 163, True, True, False),
        ("3090", 99, True, True, False),
        ("4090", 99, True, True, False),
        ("l4", 99, True, True, False),
        ("h100", 227, True, True, True),
        ("h200", 227, True, True, True),
        ("b200", 227, True, True, False),
        ("5090", 99, True, True, False),
    ],
)
def test_what_a_gpu_can_follows_from_its_capability(name, shared, triton, bfloat16, hopper):
    spec = DEVICES[name]
    assert spec.shared_memory == shared << 10
    assert spec.runs_triton == triton
    assert spec.has_bfloat16 == spec.has_tensor_cores == bfloat16
    assert spec.is_hopper == hopper
    with pytest.raises(FrozenInstanceError):
        spec.num_sms = 1


def test_a_capability_that_is_not_in_the_table_is_the_last_before_it():
    future = DeviceSpec("of tomorrow", (13, 5), 200, 0)
    assert future.shared_memory == 99 << 10
    assert DeviceSpec("of yesterday", (3, 5), 13, 0).shared_memory == 48 << 10


def test_the_driver_is_asked_once(monkeypatch):
    asked = []

    class Properties:
        name, major, minor = "NVIDIA L4", 8, 9
        multi_processor_count, total_memory = 58, 23_581_229_056

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties
    )
    spec_of.cache_clear()
    try:
        assert spec_of(CUDA) == spec_of(CUDA) == DEVICES["l4"]
        assert asked == [CUDA]
        assert spec_of(torch.device("cpu")) == INTERPRETER
    finally:
        spec_of.cache_clear()


def test_no_other_file_asks_what_a_gpu_is():
    properties = re.compile(
        r"get_device_(properties|capability|name)|multi_?processor_?count|total_memory|max_shared_mem"
    )
    source = Path(devices.__file__).parents[1]
    asking = {path for path in source.rglob("*.py") if properties.search(path.read_text())}
    assert asking == {Path(devices.__file__)}


@pytest.mark.parametrize("name", DEVICES)
def test_a_gpu_that_triton_left_behind_runs_plain_torch_and_is_told_so(monkeypatch, caplog, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES[name])
    found = quant_format.gpu_kernels.__wrapped__
    with caplog.at_level(logging.WARNING, "halfbyte"):
        kernels = found()
    if name == "v100":
        assert kernels is None
        assert "Tesla V100-SXM2-16GB has compute capability 7.0" in caplog.text
        assert "plain PyTorch" in caplog.text
    else:
        assert kernels is gpu
        assert not caplog.records
