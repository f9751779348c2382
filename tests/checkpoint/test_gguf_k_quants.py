"""K-quants: every bit is that of ggml's own encoder, which xllamacpp's wheel brings."""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from halfbyte.checkpoint import gguf_blocks
from halfbyte.checkpoint.gguf_blocks import decode, encode

KINDS = [Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


@pytest.fixture(scope="module")
def ggml() -> Any:
    """Return ggml's encoder: of float32 [rows, columns] and a type, the bytes."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this machine")
    [library] = Path(xllamacpp.__file__).parent.glob("*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]

    def encoded(value: "np.ndarray[Any, Any]", kind: Kind) -> "np.ndarray[Any, Any]":
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros(value.size // block * nbytes, np.uint8)
        rows, columns = value.shape
        function(int(kind), value.ctypes.data, out.ctypes.data, 0, rows, columns, None)
        return out

    return encoded


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_ggml_s_encoding(ggml: Any, kind: Kind) -> None:
    """Numbers of all sizes, zeros, ties, one sign only, all alike, few that are not zero."""
    draw = np.random.default_rng(0)
    normal = draw.normal(size=(300, 256))
    parts = [
        normal * 10 ** draw.uniform(-9, 4, (300, 1)),
        normal * 10 ** draw.uniform(-3, 1, (300, 256)),
        *(np.full((1, 256), number) for number in (0.0, 1e-44, 3.0, -3.0)),
        draw.integers(-3, 4, (100, 256)),
        draw.integers(-254, 255, (100, 256)) / 2,
        np.where(draw.random((100, 256)) < 0.95, 0, normal[:100]),
        np.abs(normal[:50]),
    ]
    value = np.concatenate(parts).astype(np.float32)
    np.testing.assert_array_equal(encode(torch.from_numpy(value), kind).numpy(), ggml(value, kind))


NUMBERS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (1, 256), elements=NUMBERS), st.sampled_from(KINDS))
def test_any_block_is_ggml_s(ggml: Any, value: Any, kind: Kind) -> None:
    np.testing.assert_array_equal(encode(torch.from_numpy(value), kind).numpy(), ggml(value, kind))


@pytest.mark.parametrize(("kind", "bits"), list(zip(KINDS, (3, 4, 5, 6), strict=True)))
def test_an_error_is_a_part_of_the_step(kind: Kind, bits: int) -> None:
    value = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    back = decode(encode(value, kind), kind).view(64, 256)
    assert (back - value).abs().mean() < 4 * value.std() / 2**bits / 3


def test_it_does_not_depend_on_the_size_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(9, 512)
    whole = encode(value, Kind.Q4_K)
    encoder, _ = gguf_blocks._ENCODERS[Kind.Q4_K]
    monkeypatch.setitem(gguf_blocks._ENCODERS, Kind.Q4_K, (encoder, 768))
    assert encode(value, Kind.Q4_K).equal(whole)
