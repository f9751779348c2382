"""Times the products of a mixture of experts on a GPU, compared with torch's grouped_mm.

    python benchmarks/gpu_experts.py                    two shapes, 2048 and 8192 tokens
    python benchmarks/gpu_experts.py --tune             every product with many tiles instead

Each kernel is compared with ``torch.nn.functional.grouped_mm`` (CUTLASS) on the same bfloat16
weights and sorted copies of the rows, which it needs and whose making is not counted for it. Errors
are against float64, of some experts.

Then the experts of a layer, forward and backward with gradients of x and of the routing weights:
ours with weights packed in NF4, which are decoded chunk by chunk in both directions, and h computed
again in backward; transformers' own with bfloat16 weights, frozen, by ``grouped_mm``, as it is and
under torch.utils.checkpoint; and the five bare products that the work consists of.

A variant that fails has its reason in the table, and the others go on.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import Row, captured, device_us, reason, relative_error, require_cuda, write
from torch import Tensor

from halfbyte.linear.glu import Glu
from halfbyte.linear.triton_experts import Tile, gated_backward, grouped_product
from halfbyte.linear.triton_routing import Routing, routing_of, sum_over_k
from halfbyte.quant import QuantizedWeight, dequantize_all, quantize

KIND = torch.bfloat16


class Shape(NamedTuple):
    """The experts of a layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    glu: Glu
    biased: bool


SHAPES = {
    "qwen3": Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, Glu(), biased=False),
    "gpt-oss": Shape("gpt-oss-20b", 32, 4, 2880, 2880, Glu(True, 7.0, 1.702, 1.0), biased=True),
}
# Smaller ones, to see that the script works where products are interpreted.
TINY = {
    name: shape._replace(experts=4, top_k=2, hidden=64, inner=32) for name, shape in SHAPES.items()
}


class Layer(NamedTuple):
    """Experts with their weights, decoded and packed, and a batch for them.

    gate_up is [E, 2 I, H] and down [E, H, I], the first transposed in memory for ``torch``.
    """

    shape: Shape
    x: Tensor
    dy: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    packed: list[tuple[QuantizedWeight, QuantizedWeight]]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def layer_of(shape: Shape, tokens: int, device: str, pack: bool = True) -> Layer:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device)
        return values.mul_(scale).to(KIND)

    e, h, i = shape.experts, shape.hidden, shape.inner
    gate_up, down = drawn(e, 2 * i, h, scale=0.03), drawn(e, h, i, scale=0.03)
    packed = []
    if pack:
        for expert in range(e):
            packed.append((quantize(gate_up[expert]), quantize(down[expert])))
            outs = [gate_up[expert], down[expert]]
            dequantize_all(packed[-1], KIND, outs=outs)
    logits = torch.randn(tokens, e, generator=generator, device=device)
    top = logits.topk(shape.top_k, dim=1)
    weights = top.values.softmax(1).to(KIND)
    return Layer(
        shape,
        drawn(tokens, h),
        drawn(tokens, h),
        top.indices,
        weights,
        gate_up,
        down,
        packed,
        drawn(e, 2 * i, scale=0.1) if shape.biased else None,
        drawn(e, h, scale=0.1) if shape.biased else None,
    )


class Buffers(NamedTuple):
    """Where products are written."""

    h: Tensor
    inner: Tensor
    d_inner: Tensor
    slots: Tensor
    d_scale: Tensor


def buffers_of(layer: Layer) -> Buffers:
    s, shape, new = layer.index.numel(), layer.shape, layer.x.new_empty
    d_scale = torch.empty(s, dtype=torch.float32, device=layer.x.device)
    inner, d_inner = new(s, shape.inner), new(s, shape.inner)
    return Buffers(new(s, 2 * shape.inner), inner, d_inner, new(s, shape.hidden), d_scale)


def products(layer: Layer, routing: Routing, b: Buffers) -> dict[str, tuple[partial[None], Tensor]]:
    """The launches of a layer with all its experts, and where each leaves its result."""
    scale, glu = layer.weights.view(-1), layer.shape.glu
    gate_up = {"transposed": True, "gather": True, "bias": layer.gate_up_bias}
    up = partial(grouped_product, layer.x, layer.gate_up, routing, 0)
    down = partial(grouped_product, b.inner, layer.down, routing, 0)
    d_inner = partial(grouped_product, layer.dy, layer.down, routing, 0)
    dx = partial(grouped_product, b.h, layer.gate_up, routing, 0)
    return {
        "gate_up + glu": (partial(up, b.inner, glu=glu, **gate_up), b.inner),
        "gate_up": (partial(up, b.h, **gate_up), b.h),
        "down, scaled": (
            partial(
                down,
                b.slots,
                transposed=True,
                scatter=True,
                row_scale=scale,
                bias=layer.down_bias,
            ),
            b.slots,
        ),
        "d_inner": (partial(d_inner, b.d_inner, transposed=False, gather=True), b.d_inner),
        "dx": (partial(dx, b.slots, transposed=False, scatter=True), b.slots),
    }


def sorted_products(layer: Layer, routing: Routing, b: Buffers) -> dict[str, Callable[[], Tensor]]:
    """The same products by torch, whose rows are sorted copies and stay sorted."""
    from torch.nn.functional import grouped_mm

    token = routing.order.long() // routing.top_k
    ends = routing.offsets[1:].clone()
    x, dy = layer.x[token], layer.dy[token]
    return {
        "gate_up": lambda: grouped_mm(x, layer.gate_up.transpose(1, 2), offs=ends),
        "down, scaled": lambda: grouped_mm(b.inner, layer.down.transpose(1, 2), offs=ends),
        "d_inner": lambda: grouped_mm(dy, layer.down, offs=ends),
        "dx": lambda: grouped_mm(b.h, layer.gate_up, offs=ends),
    }


def milliseconds(run: Callable[[], object], rounds: int = 7, launches: int = 4) -> float:
    """Median time of a call in a CUDA graph."""

    def several() -> None:
        for _ in range(launches):
            run()

    graph = captured(several)
    taken = [device_us(graph.replay) / launches for _ in range(rounds + 1)]
    return statistics.median(taken[1:]) / 1e3


def attempt(row: Row, name: str, run: Callable[[], object]) -> object:
    """The result of `run`, kept in `row`; if it fails, the reason."""
    try:
        row[name] = run()
    except Exception as error:  # the table says why
        row["failed"] = f"{name}: {reason(error)}"
    return row.get(name)


def errors(
    layer: Layer, routing: Routing, b: Buffers, name: str, got: Tensor, slots: bool
) -> float:
    """Relative error of the rows of three experts against float64."""
    offsets, order = routing.offsets.tolist(), routing.order.long()
    parts = []
    for e in {0, layer.shape.experts // 2, layer.shape.experts - 1}:
        rows = slice(offsets[e], offsets[e + 1])
        token, slot = order[rows] // routing.top_k, order[rows]
        bias, down_bias = layer.gate_up_bias, layer.down_bias
        if name.startswith("gate_up"):
            exact = layer.x[token].double() @ layer.gate_up[e].double().t()
            if bias is not None and slots:
                exact += bias[e].double()
            if "glu" in name:
                exact = layer.shape.glu(exact)
        elif name.startswith("down"):
            exact = b.inner[rows].double() @ layer.down[e].double().t()
            if slots:
                if down_bias is not None:
                    exact += down_bias[e].double()
                exact *= layer.weights.view(-1, 1)[slot].double()
        elif name == "d_inner":
            exact = layer.dy[token].double() @ layer.down[e].double()
        else:
            exact = b.h[rows].double() @ layer.gate_up[e].double()
        scattered = slots and name.startswith(("down", "dx"))
        parts.append((got[slot] if scattered else got[rows], exact))
    gots, exacts = zip(*parts, strict=True)
    return float(f"{relative_error(torch.cat(gots), torch.cat(exacts)):.3g}")


def flops(layer: Layer, name: str) -> float:
    shape = layer.shape
    width = 2 * shape.inner if name.startswith(("gate_up", "dx")) else shape.inner
    return 2.0 * layer.index.numel() * shape.hidden * width


def kernels(layer: Layer, timed: Callable[[Callable[[], object]], float]) -> dict[str, Row]:
    routing, b = routing_of(layer.index, layer.shape.experts), buffers_of(layer)
    for buffer in b:
        buffer.normal_(std=0.1)  # what a failed product does not write is not nonsense
    rows: dict[str, Row] = {}
    ours, theirs = products(layer, routing, b), sorted_products(layer, routing, b)
    for name, (run, out) in ours.items():
        row = rows[name] = {}
        attempt(row, "ms", partial(timed, run))
        attempt(row, "error", lambda: errors(layer, routing, b, name, out, True))  # noqa: B023
        if row.get("ms"):
            row["tflops"] = round(flops(layer, name) / row["ms"] / 1e9)
        if (peer := theirs.get(name)) is not None:
            other = rows[f"{name}, grouped_mm"] = {}
            attempt(other, "ms", partial(timed, peer))
            attempt(other, "error", lambda: errors(layer, routing, b, name, peer(), False))  # noqa: B023
            if other.get("ms"):
                other["tflops"] = round(flops(layer, name) / other["ms"] / 1e9)
                if "ms" in row:
                    row["of_grouped_mm"] = round(other["ms"] / row["ms"], 3)
    scale, glu, experts = layer.weights.view(-1), layer.shape.glu, layer.shape.experts
    gate = (b.h, b.d_inner, b.d_scale, scale, routing, 0, experts, glu)
    token = routing.order // routing.top_k
    others: dict[str, Callable[[], object]] = {
        "routing": lambda: routing_of(layer.index, experts),
        "torch.sort": lambda: torch.sort(layer.index.view(-1), stable=True),
        "gated backward": lambda: gated_backward(*gate),
        "sum over k": lambda: sum_over_k(b.slots, layer.index, layer.shape.experts),
        "copy of x sorted": lambda: torch.index_select(layer.x, 0, token),
    }
    for name, run in others.items():
        attempt(rows.setdefault(name, {}), "ms", partial(timed, run))
    return rows


# The experts of a layer, forward and backward


def chunks(layer: Layer, chunk: int, room: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first expert and the decoded weights of each chunk, in one buffer."""
    shape = layer.shape
    size = 2 * shape.inner * shape.hidden
    for first in range(0, shape.experts, chunk):
        packed = layer.packed[first : first + chunk]
        n = len(packed)
        gate_up = room[: n * size].view(n, 2 * shape.inner, shape.hidden)
        down = room[n * size : n * size * 3 // 2].view(n, shape.hidden, shape.inner)
        dequantize_all([one for one, _ in packed], KIND, outs=list(gate_up))
        dequantize_all([two for _, two in packed], KIND, outs=list(down))
        yield first, gate_up, down


def our_experts(layer: Layer, chunk: int, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, dx and the gradient of the routing weights."""
    routing, b = routing_of(layer.index, layer.shape.experts), buffers_of(layer)
    scale, glu = layer.weights.view(-1), layer.shape.glu
    up = {"transposed": True, "gather": True, "bias": layer.gate_up_bias}
    down = {"transposed": True, "scatter": True, "bias": layer.down_bias, "row_scale": scale}
    for first, gate_up, w_down in chunks(layer, chunk, room):
        grouped_product(layer.x, gate_up, routing, first, b.inner, glu=glu, **up)
        grouped_product(b.inner, w_down, routing, first, b.slots, **down)
    y = sum_over_k(b.slots, layer.index, layer.shape.experts)
    d_inner, dx = {"transposed": False, "gather": True}, {"transposed": False, "scatter": True}
    for first, gate_up, w_down in chunks(layer, chunk, room):
        n = len(gate_up)
        grouped_product(layer.x, gate_up, routing, first, b.h, **up)
        grouped_product(layer.dy, w_down, routing, first, b.d_inner, **d_inner)
        gated_backward(b.h, b.d_inner, b.d_scale, scale, routing, first, n, glu)
        grouped_product(b.h, gate_up, routing, first, b.slots, **dx)
    d_weights = b.d_scale.view(layer.weights.shape)
    if layer.down_bias is not None:
        d_weights += (layer.dy @ layer.down_bias.t()).gather(1, layer.index)
    return y, sum_over_k(b.slots, layer.index, layer.shape.experts), d_weights


def their_experts(layer: Layer) -> torch.nn.Module:
    """Transformers' module with our decoded weights."""
    shape = layer.shape
    if shape.biased:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = GptOssConfig(
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
        )
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = Qwen3MoeConfig(
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.inner,
        )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Experts(config)
    values = {"gate_up_proj": layer.gate_up, "down_proj": layer.down}
    if shape.biased:
        values = {name: value.transpose(1, 2).contiguous() for name, value in values.items()}
        assert layer.gate_up_bias is not None
        assert layer.down_bias is not None
        values |= {"gate_up_proj_bias": layer.gate_up_bias, "down_proj_bias": layer.down_bias}
    for name, value in values.items():
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return module


def run_theirs(
    layer: Layer, module: torch.nn.Module, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from torch.utils.checkpoint import checkpoint

    x = layer.x.detach().requires_grad_()
    weights = layer.weights.detach().requires_grad_()
    if recompute:
        y = checkpoint(module, x, layer.index, weights, use_reentrant=False)
    else:
        y = module(x, layer.index, weights)
    dx, d_weights = torch.autograd.grad(y, (x, weights), layer.dy)
    return y.detach(), dx, d_weights


def exact_experts(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward in float64, expert by expert."""
    x, dy = layer.x.double(), layer.dy.double()
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    d_weights = torch.zeros(layer.weights.shape, dtype=torch.float64, device=x.device)
    for e in range(layer.shape.experts):
        token, k = torch.where(layer.index == e)
        part = x[token].requires_grad_()
        weight = layer.weights[token, k].double().requires_grad_()
        with torch.enable_grad():
            h = part @ layer.gate_up[e].double().t()
            if layer.gate_up_bias is not None:
                h = h + layer.gate_up_bias[e].double()
            out = layer.shape.glu(h) @ layer.down[e].double().t()
            if layer.down_bias is not None:
                out = out + layer.down_bias[e].double()
            out = out * weight[:, None]
        d_part, d_weight = torch.autograd.grad(out, (part, weight), dy[token])
        y.index_add_(0, token, out.detach())
        dx.index_add_(0, token, d_part)
        d_weights[token, k] = d_weight
    return y, dx, d_weights


def blocks(layer: Layer, graphs: bool) -> dict[str, Row]:
    shape, rows = layer.shape, dict[str, Row]()
    exact: list[Tensor] = []
    attempt(rows.setdefault("float64", {}), "ready", lambda: exact.extend(exact_experts(layer)))
    if exact:
        del rows["float64"]

    def compare(run: Callable[[], tuple[Tensor, ...]]) -> list[float]:
        return [
            float(f"{relative_error(got, wanted):.3g}")
            for got, wanted in zip(run(), exact, strict=True)
        ]

    def record(name: str, run: Callable[[], tuple[Tensor, ...]]) -> None:
        row = rows[name] = {}
        if layer.x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        attempt(row, "eager_ms", partial(eager_ms, run))
        if layer.x.is_cuda:
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if exact and "failed" not in row:
            attempt(row, "errors_y_dx_dw", partial(compare, run))
        if graphs and "failed" not in row:
            attempt(row, "ms", partial(milliseconds, run, launches=1))

    each = 3 * shape.inner * shape.hidden
    for chunk in sorted({min(shape.experts, n) for n in (16, 32, shape.experts)}):
        room = layer.x.new_empty(chunk * each)
        record(f"halfbyte NF4, {chunk} at a time", partial(our_experts, layer, chunk, room))
    room = layer.x.new_empty(min(16, shape.experts) * each)

    def decode() -> tuple[Tensor, ...]:
        for _ in itertools.chain(*(chunks(layer, min(16, shape.experts), room) for _ in range(2))):
            pass
        return ()

    row = rows["  of it decoding, both times"] = {}
    attempt(
        row, "ms" if graphs else "eager_ms", partial(milliseconds if graphs else eager_ms, decode)
    )
    routing, b = routing_of(layer.index, shape.experts), buffers_of(layer)
    for buffer in b:
        buffer.normal_(std=0.1)
    runs = sorted_products(layer, routing, b)
    names = ("gate_up", "down, scaled", "gate_up", "d_inner", "dx")

    def bare() -> None:
        for name in names:
            runs[name]()

    row = rows["five bare grouped_mm"] = {}
    attempt(
        row, "ms" if graphs else "eager_ms", partial(milliseconds if graphs else eager_ms, bare)
    )
    try:
        module = their_experts(layer)
    except Exception as error:  # the table says why
        rows["transformers bf16"] = {"failed": reason(error)}
        return rows
    for name, recompute in (("transformers bf16", False), ("  with checkpoint", True)):
        record(name, partial(run_theirs, layer, module, recompute))
    return rows


def eager_ms(run: Callable[[], object], rounds: int = 5) -> float:
    """Median time of a call, as a program makes it."""
    for _ in range(2):
        run()
    if not torch.cuda.is_available():  # only whether it runs
        return 0.0
    torch.cuda.synchronize()
    return statistics.median(device_us(run) for _ in range(rounds)) / 1e3


# Tiles


def candidates() -> list[tuple[int, Tile]]:
    """Rows of a tile, and the rest of it."""
    found = []
    for rows, n, warps, stages, per_sm in (
        (128, 256, 8, 3, 1),
        (128, 256, 8, 4, 1),
        (128, 128, 8, 4, 1),
        (128, 128, 4, 3, 2),
        (64, 256, 4, 4, 1),
        (64, 256, 4, 3, 2),
        (64, 256, 8, 4, 1),
        (64, 128, 4, 4, 2),
        (64, 128, 4, 3, 3),
    ):
        found += [(rows, Tile(n, 64, warps, stages, per_sm, flat)) for flat in (True, False)]
    found += [(128, Tile(128, 128, 8, 3, 1, True)), (64, Tile(128, 128, 4, 3, 1, True))]
    return found


def try_tile(shape: Shape, tokens: int, rows: int, tile: Tile, timing: bool) -> dict[str, Row]:
    layer = layer_of(shape, tokens, "cuda", pack=False)
    return tile_times(layer, rows, tile, timing)


def tile_times(layer: Layer, rows: int, tile: Tile, timing: bool) -> dict[str, Row]:
    routing, b = routing_of(layer.index, layer.shape.experts, rows), buffers_of(layer)
    for buffer in b:
        buffer.normal_(std=0.1)
    found: dict[str, Row] = {}
    for name, (run, out) in products(layer, routing, b).items():
        row = found[name] = {}
        launch = partial(run, tile=tile)
        if timing:
            attempt(row, "ms", partial(milliseconds, launch, rounds=3))
            attempt(row, "error", partial(errors, layer, routing, b, name, out, True))
        else:
            attempt(row, "launched", launch)
    return found


def tune(shape: Shape, token_counts: list[int]) -> dict[str, Row]:
    """Times of each product by each tile; they are compiled in processes first."""
    tiles = candidates()
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(try_tile, shape, 128, rows, tile, False) for rows, tile in tiles]
        for job in jobs:
            job.exception()  # it fails again below, where there is a row for it
    found: dict[str, Row] = {}
    for tokens in token_counts:
        layer = layer_of(shape, tokens, "cuda", pack=False)
        for rows, tile in tiles:
            for name, row in tile_times(layer, rows, tile, True).items():
                found[f"{tokens} {name} | {rows}x{tile.n}x{tile.k} {tuple(tile[2:])}"] = row
                if row.get("ms"):
                    row["tflops"] = round(flops(layer, name) / row["ms"] / 1e9)
        for name, row in kernels(layer, milliseconds).items():
            if "grouped_mm" in name:
                found[f"{tokens} {name}"] = row
    return found


def show(title: str, rows: dict[str, Row]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        cells = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in row.items()
        }
        print(f"  {name:34s}", *(f"{key}={value}" for key, value in cells.items()), flush=True)


def best(found: dict[str, Row], count: int = 4) -> dict[str, Row]:
    """The fastest tiles of each product, and grouped_mm's time."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for name, row in found.items():
        groups.setdefault(name.split(" | ")[0], []).append((name, row))
    kept: dict[str, Row] = {}
    for group in groups.values():
        group.sort(key=lambda pair: pair[1].get("ms") or float("inf"))
        kept |= group[:count]
    failed = {name: row for name, row in found.items() if "failed" in row}
    return kept | failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--only", nargs="+", choices=("kernels", "blocks"))
    parser.add_argument("--tune", action="store_true", help="many tiles instead")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, without times")
    parser.add_argument("--out", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    if args.dry:
        global KIND
        KIND = torch.float16  # Triton's interpreter has no bfloat16 products
    else:
        require_cuda()
    begin = time.perf_counter()
    sections: dict[str, dict[str, Row]] = {}
    with torch.no_grad():
        for name, tokens in itertools.product(args.shape, [16] if args.dry else args.tokens):
            shape = (TINY if args.dry else SHAPES)[name]
            if args.tune:
                continue
            layer = layer_of(shape, tokens, "cpu" if args.dry else "cuda")
            each = layer.index.numel() / shape.experts
            title = f"{shape.name}, {tokens} tokens ({each:.0f} rows an expert)"
            if "kernels" in (args.only or ("kernels",)):
                timed = eager_ms if args.dry else milliseconds
                sections[title] = kernels(layer, timed)
                show(title, sections[title])
            if "blocks" in (args.only or ("blocks",)):
                title += ", forward and backward"
                with torch.enable_grad():
                    sections[title] = blocks(layer, graphs=not args.dry)
                show(title, sections[title])
            del layer
        for name in args.shape if args.tune else ():
            sections[name] = tune(SHAPES[name], args.tokens)
            show(name, best(sections[name]))
    print(f"\n{time.perf_counter() - begin:.0f} s")
    if not args.dry:
        write("gpu_experts", args.out, rows=sections)


if __name__ == "__main__":
    sys.exit(main())
