"""Codes come out of streams of bits as they were put in, and blocks have their own scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint.quantized_sources import arithmetic
from halfbyte.checkpoint.quantized_sources.arithmetic import (
    dequantize_blocks,
    dequantize_columns,
    exponents,
    unpack,
    unpack_e2m1,
)
from tests.checkpoint.quantized_models import pack


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.sampled_from([16, 32]))
def test_codes_are_what_was_packed(bits: int, columns: int, rows: int, word: int) -> None:
    g = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
    unpacked = unpack(pack(codes, bits, word), bits)
    assert unpacked.dtype == torch.uint8
    assert unpacked.shape[1] - columns < -(-word // bits)
    assert unpacked[:, :columns].equal(codes.byte())
    assert not unpacked[:, columns:].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_each_block_has_its_scale(
    rows: int, columns: int, height: int, width: int, with_zeros: bool
) -> None:
    g = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), generator=g)
    grid = (-(-rows // height), -(-columns // width))
    scales, zeros = torch.rand(grid, generator=g), torch.randint(0, 16, grid, generator=g)
    own_zeros = zeros if with_zeros else None
    found = dequantize_blocks(codes, scales, (height, width), torch.float32, own_zeros)
    for i in range(rows):
        for j in range(columns):
            place = (i // height, j // width)
            zero = int(zeros[place]) if with_zeros else 0
            assert found[i, j] == (int(codes[i, j]) - zero) * scales[place]


def test_large_weights_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (3, 50, 24), generator=g)
    scales, groups = torch.rand(3, 13, 3, generator=g), torch.randint(0, 3, (24,), generator=g)
    own = torch.rand(50, 3, generator=g)

    def decoded() -> tuple[Tensor, Tensor]:
        blocks = dequantize_blocks(codes, scales, (4, 8), torch.float32)
        return blocks, dequantize_columns(codes[0], own, own, groups, torch.float32)

    whole = decoded()
    assert whole[1].equal((codes[0] - own[:, groups]) * own[:, groups])
    monkeypatch.setattr(arithmetic, "_CHUNK", 24 * 7)
    parts = decoded()
    assert parts[0].equal(whole[0])
    assert parts[1].equal(whole[1])


def test_a_scale_may_be_for_all_experts_or_for_one() -> None:
    codes = torch.ones(2, 3, 4)
    scales = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    found = dequantize_blocks(codes, scales, (3, 4), torch.float32)
    assert found.equal(codes * scales)
    found = dequantize_blocks(codes, scales[:1], (3, 4), torch.float32)
    assert found.equal(2 * codes)


def test_fp4_and_exponents_are_the_numbers_of_their_formats() -> None:
    values = unpack_e2m1(torch.arange(16, dtype=torch.uint8))
    for code in range(16):
        exponent, mantissa = (code >> 1) & 3, code & 1
        size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert values[2 * code] == (-size if code & 8 else size)
        assert values[2 * code + 1] == 0  # the high half of a byte is the second number
    codes = torch.arange(255, dtype=torch.uint8)
    assert exponents(codes).equal(2.0 ** (codes.double() - 127).float())
    assert exponents(torch.tensor([255], dtype=torch.uint8)).isnan().all()
