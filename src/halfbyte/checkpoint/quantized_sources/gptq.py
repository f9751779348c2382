"""GPTQ, as AutoGPTQ and GPTQModel write it.

A linear of shape [out, in] is four tensors:

    qweight   int32 [in · bits / 32, out]       codes, packed along in
    qzeros    int32 [groups, out · bits / 32]   zero points, packed along out
    scales    float [groups, out]
    g_idx     int32 [in]                        the group of each input

and W[o, i] = scales[g, o] · (code[i, o] - zero[g, o]) with g = g_idx[i]. Codes are a stream of
bits, the low ones of a word first; with 3 bits they cross words. In the first version of the format
(``checkpoint_format: gptq``) files have the zero points minus one, in ``gptq_v2`` themselves. Zero
points are as many bits as codes, so in version 1 a stored one with all bits set is 0. With
``desc_act`` the groups are not contiguous. Without it, g_idx may be left out.

Sources: auto_gptq 0.7.1, ``nn_modules/qlinear/qlinear_cuda.py``; GPTQModel, ``qlinear/torch.py``.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.quantized_sources.arithmetic import (
    dequantize_blocks,
    dequantize_columns,
    unpack,
)
from halfbyte.checkpoint.quantized_sources.weight import (
    FLOAT_TYPES,
    Found,
    Headers,
    Options,
    Read,
    StoredWeight,
)

_BITS = (2, 3, 4, 8)

# How a model was made, by which tool, and for which kernel.
_HOW_IT_WAS_MADE = (
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "dataset"),
    *("tokenizer", "batch_size", "pad_token_id", "model_seqlen", "max_input_length", "backend"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "cache_block_outputs"),
    *("modules_in_block_to_quantize", "model_name_or_path", "model_file_base_name", "meta"),
    *("exllama_config", "use_exllama", "disable_exllama", "use_cuda_fp16", "act_group_aware"),
    *("pack_impl", "offload_to_disk", "offload_to_disk_path", "sym", "lm_head", "is_marlin_format"),
)


def find(options: Options, headers: Headers, dtype: torch.dtype) -> Found:
    """Find the weights of a model quantised by GPTQ.

    Args:
        options: Its ``quantization_config``.
        headers: Its files.
        dtype: The decoded dtype of weights whose scales are float32.

    Raises:
        CheckpointError: If an option is not supported, or a tensor is missing or does not fit.
    """
    bits, group_size = options.choice("bits", _BITS, 4), options.group_size(128)
    desc_act = options.choice("desc_act", (False, True), False)
    options.choice("pack_dtype", ("int32",), "int32")
    made_as = options.choice("format", ("gptq", "gptq_v2"), "gptq")
    version = options.choice("checkpoint_format", ("gptq", "gptq_v2"), made_as)
    if options.get("is_marlin_format"):
        raise options.wrong("is_marlin_format", True, "the layout of GPTQ itself")
    # GPTQModel's exceptions, by patterns of names: what they change can be seen in the shapes.
    several = bool(options.get("dynamic"))
    options.ignore(*_HOW_IT_WAS_MADE)
    options.finish()
    weights = []
    for prefix in headers.with_suffix(".qweight"):
        layout = _layout(headers, prefix, bits, group_size, several=several)
        inputs, outputs, groups = layout.inputs, layout.outputs, layout.groups
        members = [f"{prefix}.{leaf}" for leaf in ("qweight", "qzeros", "scales")]
        scales = headers.expect(members[2], FLOAT_TYPES, (groups, outputs))
        index = headers.get(f"{prefix}.g_idx")
        if index is not None:
            members.append(headers.expect(index.name, torch.int32, (inputs,)).name)
        elif desc_act:
            raise headers.wrong(f"{prefix}.g_idx", "is missing, and with desc_act it is needed")
        kept = dtype if scales.dtype == torch.float32 else scales.dtype
        decode = partial(_decode, headers, layout, kept, int(version == "gptq"), index is not None)
        shape = (outputs, inputs)
        weights.append(StoredWeight(f"{prefix}.weight", tuple(members), shape, kept, decode))
    groups_of = "whole rows" if group_size == -1 else f"groups of {group_size}"
    return Found(weights, f"GPTQ ({bits} bits, {groups_of})", [])


class _Layout(NamedTuple):
    """The sizes of one weight."""

    prefix: str
    bits: int
    inputs: int
    outputs: int
    groups: int
    group_size: int


def _layout(headers: Headers, prefix: str, bits: int, group_size: int, *, several: bool) -> _Layout:
    """Return the sizes of a weight, from its tensors if the options have exceptions."""
    words, outputs = headers.matrix(f"{prefix}.qweight", torch.int32)
    groups, columns = headers.matrix(f"{prefix}.qzeros", torch.int32)
    index = headers.get(f"{prefix}.g_idx")
    if several and index is not None and len(index.shape) == 1 and index.shape[0]:
        bits, group_size = words * 32 // index.shape[0], -(-index.shape[0] // groups)
    if bits not in _BITS:
        raise headers.wrong(f"{prefix}.qweight", f"has codes of {bits} bits")
    inputs = words * 32 // bits
    size = inputs if group_size == -1 else group_size
    if groups != -(-inputs // size) or columns != -(-outputs * bits // 32):
        raise headers.wrong(
            f"{prefix}.qzeros",
            f"has shape {[groups, columns]} for a weight of {[outputs, inputs]} in {bits} bits and "
            f"groups of {size}",
        )
    return _Layout(prefix, bits, inputs, outputs, groups, size)


def _decode(
    headers: Headers, layout: _Layout, dtype: torch.dtype, offset: int, indexed: bool, read: Read
) -> Tensor:
    prefix, bits = layout.prefix, layout.bits
    zeros = unpack(read(f"{prefix}.qzeros"), bits)[:, : layout.outputs]
    zeros = ((zeros + offset) & (2**bits - 1)).T
    scales = read(f"{prefix}.scales").T
    codes = unpack(read(f"{prefix}.qweight").T, bits)
    if indexed:
        groups = read(f"{prefix}.g_idx")
        low, high = groups.aminmax()
        if not 0 <= low <= high < layout.groups:
            raise headers.wrong(
                f"{prefix}.g_idx",
                f"names groups {int(low)} to {int(high)}, and there are {layout.groups}",
            )
        in_order = torch.arange(layout.inputs, device=groups.device) // layout.group_size
        if not groups.equal(in_order.to(groups.dtype)):
            return dequantize_columns(codes, scales, zeros, groups, dtype)
    return dequantize_blocks(codes, scales, (1, layout.group_size), dtype, zeros)
