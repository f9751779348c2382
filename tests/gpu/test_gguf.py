"""Blocks of GGUF files on a GPU: the bits that they decode to on the CPU, and back."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from halfbyte.checkpoint import gguf_blocks
from halfbyte.checkpoint.base_model import open_base
from halfbyte.checkpoint.gguf_blocks import decode, encode
from tests.checkpoint.gguf_models import write_gguf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", [*gguf_blocks._DECODERS, Kind.IQ4_NL], ids=lambda kind: kind.name)
def test_blocks_decode_to_the_same_bits(kind):
    raw = np.random.default_rng(0).integers(0, 256, 3001 * GGML_QUANT_SIZES[kind][1], np.uint8)
    here = torch.from_numpy(raw)
    there = decode(here.cuda(), kind)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), decode(here, kind), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_numbers_are_rounded_to_the_same_bits(kind):
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(512, 256, generator=draw) * 10 ** torch.empty(512, 1).uniform_(
        -9, 4, generator=draw
    )
    value[-50:] = torch.randint(-3, 4, (50, 256), generator=draw)  # equal extremes of both signs
    value[0] = 0
    assert encode(value.cuda(), kind).cpu().equal(encode(value, kind))


def test_matrices_come_on_the_gpu_as_they_do_on_the_cpu(tmp_path):
    source = open_base(write_gguf(tmp_path / "m.gguf", Kind.Q4_1))
    here = dict(source.tensors())
    for name, value in source.tensors("cuda"):
        assert value.is_cuda == (value.dim() == 2)
        assert value.cpu().equal(here[name])
