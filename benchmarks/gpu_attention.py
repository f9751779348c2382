"""Causal attention on a GPU: the time of each kernel there is, forward and backward.

    python benchmarks/gpu_attention.py --tokens 16384 65536

Queries, keys and values are views of one product's output, as a layer has them. TFLOP/s count
4 T² H D / 2 forward and 2.5 times that backward, whatever a kernel computes again. Errors are those
of the output and the gradients against float64, at 512 tokens, relative to the largest element. A
kernel that fails is reported with its exception; those of wheels that are not installed, likewise.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from measuring import require_cuda, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, GROUPS, DIM = 32, 8, 128


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a layer calls for rows without packing."""
    from halfbyte.layers.attention import attend

    return attend(q, k, v, None, DIM**-0.5).view(q.shape)


def ours_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a layer calls for four documents of unequal lengths in a row."""
    from halfbyte.layers.attention import Documents, attend

    t = q.shape[1]
    cu = torch.tensor([0, t // 8, t // 2, t - t // 8, t], dtype=torch.int32, device=q.device)
    return attend(q, k, v, Documents(cu, t // 2), DIM**-0.5).view(q.shape)


def one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a layer calls for a row of one document and room for more."""
    from halfbyte.layers.attention import Documents, attend

    t = q.shape[1]
    cu = torch.tensor([0, t, t], dtype=torch.int32, device=q.device)
    return attend(q, k, v, Documents(cu, t), DIM**-0.5).view(q.shape)


def long_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a layer calls for a long row: heads in groups in backward, which overwrites."""
    from halfbyte.layers.long_attention import attend_long

    return attend_long(q, k, v, None, DIM**-0.5).view(q.shape)


def long_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a layer calls for a long row of four documents and a gap, which the host knows."""
    from halfbyte.layers.attention import Documents
    from halfbyte.layers.long_attention import attend_long

    t = q.shape[1]
    ends = [0, t // 8 - 5, t // 2, t - t // 8 + 3, t - 99, t]
    lengths = tuple(b - a for a, b in pairwise(ends))
    documents = Documents(torch.tensor(ends, dtype=torch.int32, device=q.device), t, lengths)
    return attend_long(q, k, v, documents, DIM**-0.5).view(q.shape)


def sdpa(backend: SDPBackend, *, repeat: bool = False) -> Attention:
    """Torch's attention with one kernel; heads of keys and values repeated, if asked for."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if repeat:
            k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)
        return out.transpose(1, 2)

    return call


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    found: Any = flash_attn_func(q, k, v, causal=True)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


KERNELS: dict[str, Attention] = {
    "halfbyte": ours,
    "halfbyte, one document": one_document,
    "halfbyte, four documents": ours_packed,
    "halfbyte, long part": long_parts,
    "halfbyte, long part, documents": long_documents,
    "torch flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "torch cuDNN, heads repeated": sdpa(SDPBackend.CUDNN_ATTENTION, repeat=True),
    "flash-attn-4": flash4,
}


class _Frontend:
    """cuDNN's graphs through nvidia-cudnn-frontend, built once for a shape."""

    def __init__(self, tokens: int) -> None:
        import cudnn

        self.handle = cudnn.create_handle()
        self.backward_graph: Any = None
        sizes = {"q": HEADS, "k": GROUPS, "v": GROUPS}
        row = (HEADS + 2 * GROUPS) * DIM
        types = dict(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )

        def inputs(graph: Any) -> list[Any]:
            return [
                graph.tensor(
                    name=n,
                    dim=[1, h, tokens, DIM],
                    stride=[tokens * row, DIM, row, 1],
                    data_type=cudnn.data_type.BFLOAT16,
                )
                for n, h in sizes.items()
            ]

        def out_like(tensor: Any, heads: int) -> None:
            tensor.set_output(True).set_dim([1, heads, tokens, DIM])
            tensor.set_stride([tokens * heads * DIM, DIM, heads * DIM, 1])

        def built(graph: Any) -> Any:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            return graph

        forward = cudnn.pygraph(**types, handle=self.handle)
        q, k, v = inputs(forward)
        o, stats = forward.sdpa(
            q=q, k=k, v=v, attn_scale=DIM**-0.5, generate_stats=True, use_causal_mask=True
        )
        out_like(o, HEADS)
        stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)
        self.forward_graph, self.forward_keys = built(forward), (q, k, v, o, stats)
        back = cudnn.pygraph(**types, handle=self.handle)
        q, k, v = inputs(back)
        stride = [tokens * HEADS * DIM, DIM, HEADS * DIM, 1]
        full = dict(dim=[1, HEADS, tokens, DIM], stride=stride)
        o, do = (back.tensor(name=n, data_type=cudnn.data_type.BFLOAT16, **full) for n in "od")
        stats = back.tensor(
            name="s",
            dim=[1, HEADS, tokens, 1],
            stride=[HEADS * tokens, tokens, 1, 1],
            data_type=cudnn.data_type.FLOAT,
        )
        grads = back.sdpa_backward(
            q=q, k=k, v=v, o=o, dO=do, stats=stats, attn_scale=DIM**-0.5, use_causal_mask=True
        )
        for grad, heads in zip(grads, sizes.values(), strict=True):
            out_like(grad, heads)
        self.backward_graph, self.backward_keys = built(back), (q, k, v, o, do, stats, *grads)
        most = max(g.get_workspace_size() for g in (self.forward_graph, self.backward_graph))
        self.workspace = torch.empty(most, dtype=torch.uint8, device="cuda")

    def run(self, graph: Any, keys: Any, tensors: list[Tensor]) -> None:
        import cudnn

        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = dict(zip(keys, tensors, strict=True))
        graph.execute(pack, self.workspace, handle=self.handle)


class _ByFrontend(torch.autograd.Function):
    graphs: ClassVar[dict[int, _Frontend]] = {}

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[1]
        if t not in _ByFrontend.graphs:
            _ByFrontend.graphs[t] = _Frontend(t)
        graph = _ByFrontend.graphs[t]
        o = torch.empty(1, t, HEADS, DIM, dtype=q.dtype, device=q.device)
        stats = torch.empty(1, HEADS, t, 1, dtype=torch.float32, device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        graph.run(graph.forward_graph, graph.forward_keys, [q, k, v, o.transpose(1, 2), stats])
        ctx.save_for_backward(q, k, v, o, stats)
        ctx.graph = graph
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, o, stats = ctx.saved_tensors
        t = o.shape[1]
        made = [
            torch.empty(1, t, h, DIM, dtype=q.dtype, device=q.device)
            for h in (HEADS, GROUPS, GROUPS)
        ]
        outs = [x.transpose(1, 2) for x in made]
        given = [q, k, v, o.transpose(1, 2), grads[0].contiguous().transpose(1, 2), stats, *outs]
        ctx.graph.run(ctx.graph.backward_graph, ctx.graph.backward_keys, given)
        return tuple(made)


def frontend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _ByFrontend.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]


KERNELS["cuDNN's frontend"] = frontend


def inputs_of(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    whole = torch.randn(tokens, (HEADS + 2 * GROUPS) * DIM, device="cuda").to(dtype)
    parts = torch.split(whole, [HEADS * DIM, GROUPS * DIM, GROUPS * DIM], 1)
    return [part.view(1, tokens, -1, DIM).requires_grad_() for part in parts]


def seconds(run: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure(kernel: Attention, tokens: int, count: int) -> dict[str, float]:
    q, k, v = inputs_of(tokens)
    dy = torch.randn_like(q)
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def both() -> None:  # a backward may overwrite, so it cannot be timed alone
        out = kernel(q, k, v)
        torch.autograd.grad(out, (q, k, v), dy.view(out.shape))

    both()
    peak = torch.cuda.max_memory_allocated() - base
    forward = seconds(lambda: kernel(q, k, v), count)
    backward = seconds(both, count) - forward
    flops = 2 * tokens**2 * HEADS * DIM
    return {
        "forward_ms": round(forward * 1e3, 2),
        "backward_ms": round(backward * 1e3, 2),
        "forward_tflops": round(flops / forward / 1e12),
        "backward_tflops": round(2.5 * flops / backward / 1e12),
        "peak_gb": round(peak / 1e9, 2),
    }


def error(kernel: Attention, tokens: int = 512) -> float:
    """The largest error of output and gradients, relative to the largest element of each."""
    torch.manual_seed(0)
    given = inputs_of(tokens)
    dy = torch.randn_like(given[0])

    def results(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
        out = attention(inputs[0], inputs[1], inputs[2])
        grads = torch.autograd.grad(out, inputs, dy.to(out.dtype))
        return [out.detach(), *grads]

    exact = [x.detach().double().requires_grad_() for x in given]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu_(1)
        scores = (q @ k.mT / math.sqrt(DIM)).masked_fill(unseen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    pairs = zip(results(kernel, given), results(reference, exact), strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 32768, 65536])
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    require_cuda()
    rows: dict[str, Any] = {}
    for name in args.only:
        rows[name] = {}
        try:
            if "documents" not in name:
                rows[name]["error"] = round(error(KERNELS[name]), 5)
            for tokens in args.tokens:
                rows[name][str(tokens)] = measure(KERNELS[name], tokens, args.count)
        except Exception as problem:  # a kernel that cannot be had does not lose the others' rows
            rows[name]["failed"] = f"{type(problem).__name__}: {problem}"[:200]
        torch.cuda.empty_cache()
        print(f"{name:30s}", json.dumps(rows[name]), flush=True)
        write("gpu_attention", args.output, rows=rows)


if __name__ == "__main__":
    main()
