"""MXFP4 between the order of gpt-oss's files and that of GGUF's: no value, and no bit, changes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from halfbyte.checkpoint import gguf_mxfp4
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.gguf_blocks import decode
from halfbyte.checkpoint.gguf_export import write_gguf
from halfbyte.checkpoint.gguf_mxfp4 import from_blocks, to_blocks
from halfbyte.checkpoint.merged import Merged, write_merged
from halfbyte.errors import CheckpointError
from halfbyte.models.build import BaseRecipe
from halfbyte.quant import MXFP4Weight, dequantize, quantize_mxfp4
from halfbyte.quant.mxfp4 import LARGEST_SCALE
from tests.checkpoint.mxfp4_models import write_gpt_oss


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


def test_a_gguf_file_s_experts_are_kept_as_they_are(tmp_path: Path) -> None:
    """Exported, read as a base, and merged to safetensors: the same bytes all the way."""
    directory = write_gpt_oss(tmp_path / "model")
    source, path = open_base(directory), tmp_path / "model.gguf"
    write_gguf(source, path, "mxfp4", base=source)
    read = open_base(path)
    for parameter in source.parameters:
        own = next(p for p in read.parameters if p.name == parameter.name)
        assert (own.shape, own.packed, own.mxfp4) == (
            parameter.shape,
            parameter.packed,
            parameter.mxfp4,
        )
        if parameter.mxfp4:
            value, expected = read.tensor(own.name), source.tensor(own.name)
            assert isinstance(value, MXFP4Weight)
            assert isinstance(expected, MXFP4Weight)
            assert torch.equal(value.codes, expected.codes)
            assert torch.equal(value.scales, expected.scales)
    base = load_base(path, BaseRecipe())
    assert base.model.halfbyte_recipe.experts == "mxfp4"
    assert base.memory_report.mxfp4_parameters == base.memory_report.quantized_parameters > 0
    out = write_merged(Merged(read, base.model), tmp_path / "merged")
    files, merged = (load_file(p / "model.safetensors") for p in (directory, out))
    assert merged.keys() == files.keys()
    packed = [name for name, value in files.items() if value.dtype == torch.uint8]
    assert len(packed) == 8
    assert all(torch.equal(merged[name], files[name]) for name in packed)
    again = load_base(out, BaseRecipe()).model
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        expected = base.model(ids).logits
        # Attention is rounded to bfloat16 from the file's q8_0.
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=2e-3)
