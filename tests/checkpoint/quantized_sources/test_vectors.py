"""What the libraries have quantised is decoded as they decode it (``make_vectors`` says which)."""

import json

import pytest
from safetensors import safe_open

from halfbyte.checkpoint.quantized_sources import (
    awq,
    compressed_tensors,
    gptq,
    hqq,
)
from tests.checkpoint.quantized_sources.finding import decode, under
from tests.checkpoint.quantized_sources.make_vectors import VECTORS

METHODS = {
    "gptq": gptq.find,
    "awq": awq.find,
    "compressed-tensors": compressed_tensors.find,
    "hqq": hqq.find,
}
with safe_open(VECTORS, "pt") as _file:
    CONFIGS = {name: json.loads(text) for name, text in sorted(_file.metadata().items())}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_weight_is_what_the_library_decodes(case: str) -> None:
    config = CONFIGS[case]
    with safe_open(VECTORS, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{case}/")]  # noqa: SIM118
        tensors = {key.removeprefix(f"{case}/"): file.get_tensor(key) for key in keys}
    expected = tensors.pop("decoded")
    ours = decode(METHODS[config["quant_method"]], config, under("a", tensors))
    assert ours.dtype == expected.dtype
    error = (ours.float() - expected.float()).abs().max()
    if case == "awq-gemv_fast":
        # Its files have scale · zero point rounded to float16, up to 15 scales.
        assert 0 < error <= 2**-11 * (15 * tensors["scales"].float()).max()
    elif config["quant_method"] == "hqq":
        # The library also rounds code - zero point to float16, of up to 255; we round once.
        bits = tensors["nbits"].item()
        assert error <= 2**-10 * (2**bits * tensors["scale"].float()).max()
    else:
        assert error == 0


def test_every_method_and_layout_has_its_vectors() -> None:
    assert len(CONFIGS) == 8 + 3 + 20 + 10
    assert {config["quant_method"] for config in CONFIGS.values()} == METHODS.keys()
    formats = {config.get("format") for config in CONFIGS.values()}
    assert formats >= {"pack-quantized", "float-quantized", "nvfp4-pack-quantized"}
