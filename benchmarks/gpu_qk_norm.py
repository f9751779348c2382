"""Times the norms of q's and k's heads and their rotation, as one kernel and as three, on a GPU.

    python benchmarks/gpu_qk_norm.py

Microseconds in a CUDA graph, bfloat16, q, k and v being columns of one product, by default of the
shape of Qwen3-30B-A3B. Buffers are rotated. *at copy speed* is the time of the bytes that one
kernel has to read and write, at the rate of a copy of as many. The error is against float64, and
that of the exact values rounded to bfloat16 is the least possible. With ``--tune``, blocks of heads
and numbers of warps of the one kernel are tried.
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from measuring import Row, copies_of, relative_error, require_cuda, take_turns, write
from torch import Tensor

from halfbyte.layers import triton_elementwise as separate
from halfbyte.layers import triton_qk_norm

EPS = 1e-6
BFLOAT16 = torch.bfloat16


class Heads:
    """Inputs, and the gradient of what is made of them."""

    def __init__(self, tokens: int, q_heads: int, k_heads: int, size: int) -> None:
        widths = [heads * size for heads in (q_heads, k_heads, k_heads)]
        columns = torch.randn(1, tokens, sum(widths), device="cuda").to(BFLOAT16)
        q, k, _ = (part.unflatten(-1, (-1, size)) for part in columns.split(widths, -1))
        self.x = q, k
        self.dy = torch.randn_like(q).contiguous(), torch.randn_like(k).contiguous()
        self.weights = tuple(torch.rand(size, device="cuda").to(BFLOAT16) + 0.5 for _ in "qk")
        angles = torch.arange(tokens, device="cuda")[:, None] / 1e6 ** (
            torch.arange(size // 2, device="cuda") / (size // 2)
        )
        tables = (angles.cos(), angles.sin())
        self.tables = tuple(table.repeat(1, 2)[None].to(BFLOAT16) for table in tables)
        self.rstds = self.forward()[2:]

    def forward(self) -> tuple[Tensor, ...]:
        """By one kernel."""
        return triton_qk_norm.qk_norm_rotary(*self.x, *self.weights, EPS, EPS, *self.tables)

    def backward(self) -> tuple[Tensor, ...]:
        """By one kernel."""
        return triton_qk_norm.qk_norm_rotary_backward(
            *self.dy, *self.x, *self.weights, *self.rstds, *self.tables
        )

    def separate_forward(self) -> tuple[Tensor, ...]:
        """By a kernel for each norm, and one that rotates."""
        normed = [
            separate.rms_norm(x, w, EPS)[0] for x, w in zip(self.x, self.weights, strict=True)
        ]
        return separate.rotary(*normed, *self.tables)

    def separate_backward(self) -> tuple[Tensor, ...]:
        """By the same three."""
        turned = separate.rotary(*self.dy, *self.tables, backward=True)
        parts = zip(turned, self.x, self.weights, self.rstds, strict=True)
        return tuple(separate.rms_norm_backward(dy, None, x, w, r) for dy, x, w, r in parts)

    def exact(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both directions by plain operations in float64."""
        leaves = [x.double().requires_grad_() for x in self.x]
        c, s = (table.double().chunk(2, -1)[0][:, :, None] for table in self.tables)
        outs = []
        for x, weight in zip(leaves, self.weights, strict=True):
            y = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
            y1, y2 = y.chunk(2, -1)
            outs.append(torch.cat([y1 * c - y2 * s, y2 * c + y1 * s], -1))
        grads = torch.autograd.grad(outs, leaves, [dy.double() for dy in self.dy])
        return tuple(out.detach() for out in outs), grads


def joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors[:2]])


def compared(heads: list[Heads], backward: bool) -> dict[str, Row]:
    """One kernel and three, their errors, and a copy of as many bytes as one has to move."""
    count, first = len(heads), heads[0]
    one, three = (
        (Heads.backward, Heads.separate_backward)
        if backward
        else (Heads.forward, Heads.separate_forward)
    )
    nbytes = (3 if backward else 2) * sum(x.numel() * x.element_size() for x in first.x)
    source, target = (
        [torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda") for _ in heads] for _ in "st"
    )
    contestants: dict[str, Callable[[int], object]] = {
        "one kernel": lambda i: one(heads[i % count]),
        "three kernels": lambda i: three(heads[i % count]),
        "at copy speed": lambda i: target[i % count].copy_(source[i % count]),
    }
    rows = take_turns(contestants, count)
    exact = joined(first.exact()[backward])
    for name, got in (
        ("one kernel", joined(one(first))),
        ("three kernels", joined(three(first))),
        ("at copy speed", exact.to(BFLOAT16)),
    ):
        rows[name]["relative_error"] = float(f"{relative_error(got, exact):.4g}")
    return rows


def tuned(heads: list[Heads]) -> dict[str, Row]:
    """Times of both directions by the most pairs of a block, and warps."""
    count, before = len(heads), (triton_qk_norm._PAIRS, triton_qk_norm._WARPS)
    rows: dict[str, Row] = {}
    for pairs, warps in product((512, 1024, 2048), (1, 2, 4, 8, 16)):
        if not 4 <= pairs // (32 * warps) <= 32:  # pairs of a thread
            continue
        triton_qk_norm._PAIRS, triton_qk_norm._WARPS = pairs, warps
        both: dict[str, Callable[[int], object]] = {
            "forward": lambda i: heads[i % count].forward(),
            "backward": lambda i: heads[i % count].backward(),
        }
        times = take_turns(both, count, rounds=7)
        rows[f"{pairs} pairs, {warps} warps"] = {name: times[name].get("us") for name in times}
    triton_qk_norm._PAIRS, triton_qk_norm._WARPS = before
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 4], help="of q and of k")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    shape = (args.tokens, *args.heads, args.size)
    heads = [Heads(*shape) for _ in range(copies_of(4 * args.tokens * sum(args.heads) * args.size))]
    rows = {name: compared(heads, name == "backward") for name in ("forward", "backward")}
    if args.tune:
        rows["tuned"] = tuned(heads)
    for title, found in rows.items():
        print(title)
        for name, row in found.items():
            print(f"  {name:24s}", *(f"{key}={value}" for key, value in row.items()), flush=True)
    write("gpu_qk_norm", args.output, shape=shape, rows=rows)


if __name__ == "__main__":
    main()
