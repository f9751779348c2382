"""Elementwise operations of a layer, by our kernels and by Liger's, on a GPU.

    python benchmarks/gpu_liger.py

Microseconds in a CUDA graph, at the widths of Llama-2-7B, and the time to copy as many bytes in a
graph. Buffers are not rotated: what fits into the L2 cache is found there by both.
"""

from collections.abc import Callable
from typing import Any

import torch
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from measuring import Row, captured, device_us, require_cuda, write
from torch import Tensor

from halfbyte.layers.elementwise import rms_norm, rotary, swiglu

CALLS = 20


def graph_us(run: Callable[[], object], calls: int = CALLS) -> float:
    """Microseconds of a call in a graph of many."""
    graph = captured(lambda: [run() for _ in range(calls)])
    for _ in range(3):
        graph.replay()
    return round(device_us(lambda: [graph.replay() for _ in range(5)]) / 5 / calls, 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def copy_rate() -> float:
    """Bytes a microsecond, read and written."""
    one, other = random(500_000_000), random(500_000_000)
    return 2 * one.nbytes / graph_us(lambda: other.copy_(one), 5)


def rows_of(tokens: int, rate: float) -> dict[str, Row]:
    """Our time, Liger's, and the limit, of each operation; ``rate`` is in bytes a microsecond."""
    x, dy, weight = random(tokens, 4096), random(tokens, 4096), random(4096)
    gate, up = random(tokens, 11008), random(tokens, 11008)
    q, k = random(1, tokens, 32, 128), random(1, tokens, 32, 128)
    cos, sin = random(1, tokens, 128), random(1, tokens, 128)
    heads = q.transpose(1, 2), k.transpose(1, 2)
    leaf = x.clone().requires_grad_()

    def liger_norm(x: Tensor) -> Any:
        return LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)

    def both_ways(norm: Callable[[Tensor], Tensor]) -> float:
        return graph_us(lambda: torch.autograd.grad(norm(leaf), [leaf], dy))

    def ours(x: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-5)

    return {
        "rms norm": {
            "ours": graph_us(lambda: ours(x)),
            "liger": graph_us(lambda: liger_norm(x)),
            "limit": round(2 * x.nbytes / rate, 1),
        },
        "rms norm, forward and backward": {
            "ours": both_ways(ours),
            "liger": both_ways(liger_norm),
        },
        "swiglu": {
            "ours": graph_us(lambda: swiglu(gate, up)),
            "liger": graph_us(lambda: LigerSiLUMulFunction.apply(gate, up)),
            "limit": round(3 * gate.nbytes / rate, 1),
        },
        "rotary": {
            "ours": graph_us(lambda: rotary(q, k, cos, sin)),
            "liger": graph_us(lambda: LigerRopeFunction.apply(*heads, cos, sin)),
            "limit": round(4 * q.nbytes / rate, 1),
        },
    }


def main() -> None:
    require_cuda()
    rate = copy_rate()
    rows = {str(tokens): rows_of(tokens, rate) for tokens in (2048, 8192)}
    for tokens, found in rows.items():
        for name, row in found.items():
            print(f"{tokens:5s} {name:32s}", row)
    write("gpu_liger", None, copy_gb_per_s=round(rate / 1e3), rows=rows)


if __name__ == "__main__":
    main()
