"""The choice of device and dtype, and its reasons."""

import os

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.runtime import device as devices
from halfbyte.runtime import precision
from halfbyte.runtime.precision import choose_device_and_dtype, deterministic
from tests.devices import DEVICES


@pytest.mark.parametrize(
    ("units", "dtype", "reason"),
    [
        ({"AMX": False, "AVX512-BF16": True}, torch.bfloat16, "AVX512-BF16"),
        ({"AMX": True, "AVX512-BF16": True}, torch.bfloat16, "AMX"),
        ({"AMX": False, "AVX512-BF16": False}, torch.float32, "neither"),
    ],
)
def test_a_cpu_multiplies_in_what_it_is_good_at(monkeypatch, units, dtype, reason):
    monkeypatch.setattr(precision, "cpu_matrix_units", lambda: units)
    device, chosen, why = choose_device_and_dtype("cpu", "auto")
    assert (device, chosen) == ("cpu", dtype)
    assert reason in why


def test_what_is_asked_for_is_taken():
    assert choose_device_and_dtype("cpu", "float32")[1] == torch.float32
    assert choose_device_and_dtype("cpu", "bfloat16")[1] == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match="use --device cpu"):
        choose_device_and_dtype("cuda", "auto")
    assert choose_device_and_dtype("auto", "auto")[0] == "cpu"


@pytest.mark.parametrize("wrong", [("tpu", "auto"), ("cpu", "float8")])
def test_unknown_names(wrong):
    with pytest.raises(ConfigError, match="must be auto"):
        choose_device_and_dtype(*wrong)


def test_float16_is_for_a_gpu():
    with pytest.raises(ConfigError, match="float16 is for a GPU; use auto"):
        choose_device_and_dtype("cpu", "float16")


GPU_DTYPES = {"t4": torch.float16, "v100": torch.float32}


@pytest.mark.parametrize("name", DEVICES)
def test_a_gpu_multiplies_in_what_it_has_units_and_kernels_for(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES[name])
    device, chosen, why = choose_device_and_dtype("auto", "auto")
    assert device == "cuda"
    assert chosen == GPU_DTYPES.get(name, torch.bfloat16)
    assert ("no bfloat16 units" in why) == (name in GPU_DTYPES)
    for asked in (torch.float32, torch.float16):
        got = choose_device_and_dtype("cuda", str(asked).removeprefix("torch."))
        assert got[1:] == (asked, "as requested")
    if name in GPU_DTYPES:
        with pytest.raises(ConfigError, match=f"{DEVICES[name].name}.* use auto, float16 or"):
            choose_device_and_dtype("cuda", "bfloat16")
    else:
        assert choose_device_and_dtype("cuda", "bfloat16")[1] == torch.bfloat16


def test_a_fixed_order_is_asked_for_while_it_is_wanted(monkeypatch):
    def asked():
        filled = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), filled

    before = asked()
    with deterministic(False):
        assert asked() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic():
        assert asked() == (True, False)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert asked() == before
