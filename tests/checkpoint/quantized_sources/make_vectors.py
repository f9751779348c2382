"""Writes vectors.safetensors: linears that the libraries themselves have quantised, and decode.

The tests do not need the libraries: this script was run once, in an environment of its own with
auto_gptq 0.7.1 (its wheel, unpacked: it imports CUDA code when installed), AutoAWQ 0.2.9 (its
sources: it cannot be installed beside today's transformers), compressed-tensors 0.20.1, hqq 0.2.8
and transformers:

    python -m tests.checkpoint.quantized_sources.make_vectors AUTO_GPTQ AUTO_AWQ

Each case has its ``quantization_config`` in the metadata, its tensors as ``case/leaf``, and what
the library decodes them to as ``case/decoded``.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

VECTORS = Path(__file__).with_name("vectors.safetensors")
ROWS, COLUMNS, GROUP = 32, 32, 16
Case = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]

_generator = torch.Generator().manual_seed(0)


def _linear(columns: int = COLUMNS) -> nn.Linear:
    linear = nn.Linear(columns, ROWS, bias=False).requires_grad_(False)
    linear.weight.data = torch.randn(ROWS, columns, generator=_generator).half()
    return linear


def _run(path: Path, name: str, **modules: types.ModuleType) -> types.ModuleType:
    """Runs one file of a library that cannot be imported as a whole."""
    source = path.read_text().replace("from auto_gptq.nn_modules.qlinear import", "# ")
    module = types.ModuleType(name)
    sys.modules |= modules
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _uniform(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns scales and zero points of groups, with room for rounding."""
    low = weight.amin(-1).clamp(max=0)
    scales = ((weight.amax(-1).clamp(min=0) - low) / (2**bits - 2)).half().float()
    return scales, (-low / scales).round().clamp(1, 2**bits - 1)


def gptq(root: Path) -> Iterator[Case]:
    """AutoGPTQ packs, and computes with the identity."""
    module = _run(root / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear_cuda")
    for bits in (2, 3, 4, 8):
        for desc_act in (False, True):
            linear = _linear()
            index = torch.arange(COLUMNS) // GROUP
            if desc_act:
                index = index[torch.randperm(COLUMNS, generator=_generator)]
            weight = linear.weight.float()
            groups = torch.stack([weight[:, index == i] for i in range(COLUMNS // GROUP)], 1)
            scales, zeros = _uniform(groups, bits)
            held = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False, weight_dtype=torch.float16)
            held.pack(linear, scales.half(), zeros, index.int())
            held.autogptq_cuda_available = False
            decoded = held.half()(torch.eye(COLUMNS).half()).T
            config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
            name = f"gptq-{bits}{'-act' * desc_act}"
            yield name, config | {"desc_act": desc_act}, held.state_dict(), decoded


def awq(root: Path) -> Iterator[Case]:
    """AutoAWQ packs; its own code decodes gemm, and the others have the same numbers."""
    tools = types.ModuleType("awq.utils.module")
    tools.try_import = lambda name: (None, "")  # type: ignore[attr-defined]
    device = types.ModuleType("awq.utils.utils")
    device.get_best_device = lambda: "cpu"  # type: ignore[attr-defined]
    packing = _run(root / "awq/utils/packing_utils.py", "packing_utils")
    names = {
        "awq": types.ModuleType("awq"),
        "awq.utils": types.ModuleType("awq.utils"),
        "awq.utils.module": tools,
        "awq.utils.utils": device,
        "awq.utils.packing_utils": packing,
    }
    linear, size = _linear(128), 32
    scales, zeros = _uniform(linear.weight.float().view(ROWS, -1, size), 4)
    decoded = None
    for version in ("gemm", "gemv", "gemv_fast"):
        module = _run(root / f"awq/modules/linear/{version}.py", version, **names)
        kind = {"gemm": "GEMM", "gemv": "GEMV", "gemv_fast": "GEMVFast"}[version]
        own = [t.T.contiguous() if version == "gemm" else t for t in (scales, zeros)]
        held = getattr(module, f"WQLinear_{kind}").from_linear(linear, 4, size, False, *own)
        if decoded is None:
            decoded = packing.dequantize_gemm(held.qweight, held.qzeros, held.scales, 4, size).T
        config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version}
        yield f"awq-{version}", config, held.state_dict(), decoded


def compressed_tensors() -> Iterator[Case]:
    """compressed-tensors compresses and decompresses."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    group = {"strategy": "group", "group_size": 32}
    cases: list[tuple[str, dict[str, Any]]] = [
        *(
            ("pack-quantized", {"num_bits": bits, "symmetric": symmetric, **how})
            for bits in (3, 4, 8)
            for symmetric in (True, False)
            for how in (group, {"strategy": "channel"})
        ),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [12, 24]},
        ),
        (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **group}),
        ("mxfp8-quantized", {"num_bits": 8, "type": "float", **group}),
    ]
    for number, (form, args) in enumerate(cases):
        extra = {"scale_dtype": torch.uint8} if form.startswith("mx") else {}
        weights = QuantizationArgs(**args, **extra)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        weight = _linear().weight.data.bfloat16()
        parts, over = weight.float(), -1
        if weights.strategy in ("group", "tensor_group"):
            parts = parts.view(ROWS, -1, weights.group_size)
        elif weights.strategy == "block":
            height, width = weights.block_structure
            padded = torch.zeros(-(-ROWS // height) * height, -(-COLUMNS // width) * width)
            padded[:ROWS, :COLUMNS] = parts
            parts = padded.view(len(padded) // height, height, -1, width).transpose(1, 2).flatten(2)
        elif weights.strategy == "tensor":
            parts = parts.flatten()
        low, high = parts.amin(over), parts.amax(over)
        low, high = (v.reshape(-1, 1) if weights.strategy == "channel" else v for v in (low, high))
        low, high = (v.reshape(1) if weights.strategy == "tensor" else v for v in (low, high))
        state: dict[str, Any] = {"weight": weight}
        if form.startswith("nv"):
            state["weight_global_scale"] = generate_gparam(low.min().view(1), high.max().view(1))
        scale, zero = calculate_qparams(low, high, weights, state.get("weight_global_scale"))
        floating = not form.startswith(("nv", "mx"))
        state["weight_scale"] = scale.bfloat16() if floating else scale
        state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(form)
        held = compressor.compress(state, scheme)
        decoded = compressor.decompress(held, scheme)["weight"]
        if weights.symmetric:
            held.pop("weight_zero_point", None)
        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        }
        yield f"{form}-{number}", config, held, decoded.bfloat16()


def hqq() -> Iterator[Case]:
    """HQQ quantises and dequantises."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            how = BaseQuantizeConfig(nbits=bits, group_size=16, axis=axis)
            held = HQQLinear(_linear(), how, compute_dtype=torch.float16, device="cpu")
            config = {"quant_method": "hqq", "quant_config": how, "skip_modules": ["lm_head"]}
            yield f"hqq-{bits}-{axis}", config, held.state_dict(), held.dequantize()


def main(auto_gptq: str, auto_awq: str) -> None:
    """Writes the file."""
    tensors: dict[str, Tensor] = {}
    configs: dict[str, str] = {}
    every = (gptq(Path(auto_gptq)), awq(Path(auto_awq)), compressed_tensors(), hqq())
    for name, config, state, decoded in (case for cases in every for case in cases):
        configs[name] = json.dumps(config)
        for leaf, tensor in {**state, "decoded": decoded}.items():
            tensors[f"{name}/{leaf}"] = tensor.detach().contiguous().clone()
    save_file(tensors, VECTORS, metadata=configs)


if __name__ == "__main__":
    main(*sys.argv[1:])
