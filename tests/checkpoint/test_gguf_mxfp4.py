"""MXFP4 between the order of gpt-oss's files and that of GGUF's: no value, and no bit, changes."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.checkpoint import gguf_mxfp4
from halfbyte.checkpoint.gguf_blocks import decode
from halfbyte.checkpoint.gguf_mxfp4 import from_blocks, to_blocks
from halfbyte.errors import CheckpointError
from halfbyte.quant import MXFP4Weight, dequantize, quantize_mxfp4
from halfbyte.quant.mxfp4 import LARGEST_SCALE


def by_package(blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(over="ignore"):
        made = gguf.dequantize(blocks.flatten(0, -2).numpy(), GGMLQuantizationType.MXFP4)
    return torch.from_numpy(made)


def test_blocks_are_what_the_package_decodes_and_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_mxfp4, "_CHUNK", 7)
    w = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(0))
    q = quantize_mxfp4(w)
    blocks = to_blocks(q)
    assert blocks.shape == (3, 20, 51)
    assert torch.equal(by_package(blocks).view(w.shape), dequantize(q))
    # No value of these lies in the middle between two levels, where it would round otherwise.
    made = gguf.quantize(w.flatten(0, 1).numpy(), GGMLQuantizationType.MXFP4)
    same = torch.from_numpy(made).view(blocks.shape) == blocks
    negative_zero = (dequantize(q).view(-1, 32) == 0) & dequantize(q).view(-1, 32).signbit()
    touched = (negative_zero[:, :16] | negative_zero[:, 16:]).view(3, 20, 3, 16)
    assert torch.equal(same.view(3, 20, 3, 17)[..., 1:], ~touched)
    assert same.view(3, 20, 3, 17)[..., 0].all()
    again = from_blocks(blocks, "here")
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scales, q.scales)
    assert again.shape == q.shape


@given(st.lists(st.integers(0, 255), min_size=17 * 6, max_size=17 * 6))
def test_any_blocks_come_back(data: list[int]) -> None:
    blocks = torch.tensor(data, dtype=torch.uint8).view(2, 1, 51)
    blocks[..., ::17].clamp_(max=LARGEST_SCALE)
    q = from_blocks(blocks, "here")
    assert torch.equal(to_blocks(q), blocks)
    assert torch.equal(dequantize(q, torch.float32).view(2, 96), by_package(blocks))


def test_every_block_is_decoded_as_the_package_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1)
    scales = torch.arange(256).repeat_interleave(16).to(torch.uint8)
    blocks = torch.cat((scales[:, None], codes), 1)
    found = decode(blocks.view(-1), GGMLQuantizationType.MXFP4)
    expected = by_package(blocks).view(-1)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    with pytest.raises(CheckpointError, match=r"here has a scale of 2\^128"):
        from_blocks(blocks, "here")
    with pytest.raises(CheckpointError, match="no whole blocks"):
        from_blocks(blocks[:, :16], "here")


def test_rows_of_experts_can_be_taken_apart_as_blocks() -> None:
    """llama.cpp has gate and up apart; in gpt-oss their rows alternate."""
    q = quantize_mxfp4(torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)))
    gate = from_blocks(to_blocks(q)[:, ::2].contiguous(), "gate")
    assert isinstance(gate, MXFP4Weight)
    assert torch.equal(dequantize(gate), dequantize(q)[:, ::2])
