"""The choice of device and dtype, and its reasons."""

import os

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.model import precision
from halfbyte.model.precision import choose_device_and_dtype, deterministic


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


@pytest.mark.parametrize("wrong", [("tpu", "auto"), ("cpu", "float16")])
def test_unknown_names(wrong):
    with pytest.raises(ConfigError, match="must be auto"):
        choose_device_and_dtype(*wrong)


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
