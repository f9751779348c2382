"""Weights and models quantised as other libraries do it, packed bit by bit.

Codes, zero points and scales are random numbers, so a weight needs no quantiser. They are packed
into one long integer, which is cut into words: slow, and unlike what the decoders do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tests.tiny import write_tiny_model


class Quantized(NamedTuple):
    """The tensors of a linear, by the last part of their keys, and the weight, in float32."""

    tensors: dict[str, Tensor]
    weight: Tensor


def pack(codes: Tensor, bits: int, word: int = 32) -> Tensor:
    """Packs each row of codes: code i is bits i·bits to (i + 1)·bits of a long integer."""
    dtype = {16: torch.int16, 32: torch.int32}[word]
    rows = []
    for row in codes.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // word)
        words = [(number >> (i * word)) & (2**word - 1) for i in range(count)]
        rows.append([w - 2**word if w >= 2 ** (word - 1) else w for w in words])
    return torch.tensor(rows, dtype=dtype)


def _numbers(g: torch.Generator, shape: tuple[int, ...], bits: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=g)


def _scales(g: torch.Generator, *shape: int) -> Tensor:
    return (0.002 + 0.01 * torch.rand(shape, generator=g)).half()


def gptq(
    g: torch.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    desc_act: bool = False,
    version: int = 1,
) -> Quantized:
    """A linear as AutoGPTQ packs it."""
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    codes, zeros = _numbers(g, (rows, columns), bits), _numbers(g, (rows, groups), bits)
    scales = _scales(g, rows, groups)
    index = torch.arange(columns) // size
    if desc_act:
        index = index[torch.randperm(columns, generator=g)]
    stored = zeros if version == 2 else (zeros - 1) % 2**bits
    tensors = {
        "qweight": pack(codes, bits).T.contiguous(),
        "qzeros": pack(stored.T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": index.int(),
    }
    return Quantized(tensors, (codes - zeros[:, index]) * scales.float()[:, index])


def awq(
    g: torch.Generator, rows: int, columns: int, *, version: str = "gemm", group_size: int = 32
) -> Quantized:
    """A linear as AutoAWQ packs it."""
    size = columns if group_size == -1 else group_size
    groups = columns // size
    codes, zeros = _numbers(g, (rows, columns), 4), _numbers(g, (rows, groups), 4)
    scales = _scales(g, rows, groups)
    spread = torch.arange(columns) // size
    weight = (codes - zeros[:, spread]) * scales.float()[:, spread]
    if version == "gemm":
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        order = (torch.arange(rows)[::8, None] + order).flatten()
        tensors = {
            "qweight": pack(codes.T[:, order], 4),
            "qzeros": pack(zeros.T[:, order], 4),
            "scales": scales.T.contiguous(),
        }
        return Quantized(tensors, weight)
    multiple = 8 * {64: 2, 32: 4}.get(size, 1)
    width = -(-groups // multiple) * multiple
    padded = torch.zeros(rows, width, dtype=torch.float16)
    padded[:, :groups] = scales
    if version == "gemv":
        full = torch.zeros(rows, width, dtype=torch.int64)
        full[:, :groups] = zeros
        tensors = {"qweight": pack(codes, 4), "qzeros": pack(full, 4), "scales": padded}
        return Quantized(tensors, weight)
    offsets = -(scales * zeros.half())
    full = torch.zeros(rows, width, dtype=torch.float16)
    full[:, :groups] = offsets
    # Pairs of a row's 32 columns, then evens before odds among 8, then 4 rows of 64 columns.
    pairs = [32 * b + 8 * q + 2 * p + c for b in range(columns // 32) for p in range(4)
             for q in range(4) for c in range(2)]  # fmt: skip
    order = [8 * b + i for b in range(columns // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    ordered = codes[:, pairs][:, order]
    lines = [
        torch.cat([ordered[r + j, c : c + 64] for c in range(0, columns, 64) for j in range(4)])
        for r in range(0, rows, 4)
    ]
    tensors = {
        "qweight": pack(torch.stack(lines), 4, 16),
        "qzeros": full.T.contiguous(),
        "scales": padded.T.contiguous(),
    }
    exact = codes * scales.float()[:, spread] + offsets.float()[:, spread]
    return Quantized(tensors, exact)


def fp8(
    g: torch.Generator,
    rows: int,
    columns: int,
    *,
    block: tuple[int, int] | None = (128, 128),
    name: str = "weight_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """A linear in E4M3 with a scale for a block (the last may be smaller), or one in all."""
    weight = torch.randn(rows, columns, generator=g).to(torch.float8_e4m3fn)
    if block is None:
        scale = (0.01 + 0.1 * torch.rand((), generator=g)).to(scale_dtype)
        return Quantized({"weight": weight, name: scale}, weight.float() * scale.float())
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales = (0.01 + 0.1 * torch.rand(grid, generator=g)).to(scale_dtype)
    own = scales.float()[torch.arange(rows)[:, None] // block[0], torch.arange(columns) // block[1]]
    return Quantized({"weight": weight, name: scales}, weight.float() * own)


def int8(g: torch.Generator, rows: int, columns: int) -> Quantized:
    """A linear as bitsandbytes has it in 8 bits."""
    codes = torch.randint(-127, 128, (rows, columns), generator=g)
    scales = 0.1 + torch.rand(rows, generator=g)
    tensors = {
        "weight": codes.to(torch.int8),
        "SCB": scales,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Quantized(tensors, codes * (scales / 127)[:, None])


def hqq(
    g: torch.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    axis: int = 1,
    group_size: int = 32,
) -> Quantized:
    """A linear as HQQ saves it, its codes packed one by one."""
    count = rows * columns // group_size
    height, width = (count, group_size) if axis == 1 else (group_size, count)
    codes = _numbers(g, (height, width), bits)
    of_groups = (height, 1) if axis == 1 else (1, width)
    scales, zeros = _scales(g, *of_groups), (2**bits * torch.rand(of_groups, generator=g)).half()
    each = 10 if bits == 3 else 8 // bits
    words = torch.zeros(-(-height // each), width, dtype=torch.int64)
    for i in range(height):
        words[i % len(words)] += codes[i] << (bits * (each - 1 - i // len(words)))
    tensors = {
        "W_q": words.to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scales,
        "zero": zeros,
        "shape": torch.tensor([rows, columns]),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(group_size, dtype=torch.int32),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
    }
    weight = ((codes - zeros.float()) * scales.float()).view(rows, columns)
    return Quantized(tensors, weight)


def pack_quantized(
    g: torch.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    index: Tensor | None = None,
) -> Quantized:
    """A linear as compressed-tensors packs it; ``group_size`` -1 is a scale for each row.

    ``index`` is the group of each column, where they are not in order.
    """
    size = columns if group_size == -1 else group_size
    groups, half = columns // size, 2 ** (bits - 1)
    codes, zeros = _numbers(g, (rows, columns), bits), _numbers(g, (rows, groups), bits)
    scales = _scales(g, rows, groups).bfloat16()
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if symmetric:
        zeros = torch.full_like(zeros, half)
    else:
        tensors["weight_zero_point"] = pack(zeros.T, bits).T.contiguous()
    spread = torch.arange(columns) // size
    if index is not None:
        tensors["weight_g_idx"], spread = index.int(), index
    return Quantized(tensors, (codes - zeros[:, spread]) * scales.float()[:, spread])


def write_quantized_model(
    directory: Path,
    make: Callable[[torch.Generator, int, int], Quantized],
    packing: dict[str, Any],
    *,
    hidden: int = 64,
    head: bool = False,
) -> dict[str, Tensor]:
    """Writes a tiny Llama with quantised linears; returns what its weights decode to, by name."""
    write_tiny_model(directory, hidden=hidden, tied=not head)
    g = torch.Generator().manual_seed(2)
    path = directory / "model.safetensors"
    held, decoded = safetensors.torch.load_file(path), {}
    for name in list(held):
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            quantized = make(g, *held.pop(name).shape)
            prefix = name.removesuffix("weight")
            held |= {prefix + leaf: tensor for leaf, tensor in quantized.tensors.items()}
            decoded[name] = quantized.weight
    safetensors.torch.save_file(held, path)
    change_config(directory, quantization_config=packing)
    return decoded


def change_config(directory: Path, **changes: Any) -> None:
    """Changes fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
