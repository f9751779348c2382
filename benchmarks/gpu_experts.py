"""Times the products of a mixture of experts on a GPU, compared with torch's grouped_mm.

    python benchmarks/gpu_experts.py                    two shapes, 2048 and 8192 tokens
    python benchmarks/gpu_experts.py --tune             every product with many tiles instead

Each kernel is compared with ``torch.nn.functional.grouped_mm`` (CUTLASS) on the same bfloat16
weights and sorted copies of the rows, which it needs and whose making is not counted for it. Errors
are against float64, of some experts.

Then the experts of a layer, forward and backward with gradients of x and of the routing weights:
transformers' module with our packed experts (layers/gated_experts.py), in NF4 and for gpt-oss in
MXFP4, decoding different amounts at a time, and recomputed as our engine does; transformers' own
with bfloat16 weights, frozen, by ``grouped_mm``, as it is and under torch.utils.checkpoint; and the
five bare products that the work consists of; and peers with experts in NF4, bitsandbytes' and
Unsloth's, which are not captured. Unsloth is the site's where PYTHONPATH has it.

A variant that fails has its reason in the table, and the others go on.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import bitsandbytes
import torch
from measuring import (
    Row,
    captured,
    device_us,
    reason,
    relative_error,
    require_cuda,
    settle_unsloth,
    write,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte.layers.experts import freeze_experts
from halfbyte.layers.gated_experts import outputs_unread
from halfbyte.linear import experts as linear_experts
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.glu import Glu
from halfbyte.linear.triton_experts import Tile, gated_backward, grouped_product
from halfbyte.linear.triton_routing import Routing, routing_of, sum_over_k
from halfbyte.quant import PackedWeight, dequantize, quantize, quantize_mxfp4

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
    """Experts with their weights, packed and decoded, and a batch for them.

    gate_up is [E, 2 I, H] and down [E, H, I]; the packed weight of an expert is as in the files of
    the model: NF4 in the orientation of transformers' parameter, MXFP4 always [out, in].
    """

    shape: Shape
    x: Tensor
    dy: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    kind: str
    packed: list[tuple[PackedWeight, PackedWeight]]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def layer_of(shape: Shape, tokens: int, device: str, kind: str = "") -> Layer:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device)
        return values.mul_(scale).to(KIND)

    def packed(matrix: Tensor) -> PackedWeight:
        """Packs a matrix, and overwrites it by what that decodes to."""
        if kind == "MXFP4":
            found: PackedWeight = quantize_mxfp4(matrix)
            matrix.copy_(dequantize(found))
        else:
            stored = matrix.t() if shape.biased else matrix
            found = quantize(stored.contiguous())
            stored.copy_(dequantize(found))
        return found

    e, h, i = shape.experts, shape.hidden, shape.inner
    gate_up, down = drawn(e, 2 * i, h, scale=0.03), drawn(e, h, i, scale=0.03)
    logits = torch.randn(tokens, e, generator=generator, device=device)
    top = logits.topk(shape.top_k, dim=1)
    return Layer(
        shape,
        drawn(tokens, h),
        drawn(tokens, h),
        top.indices,
        top.values.softmax(1).to(KIND),
        gate_up,
        down,
        kind,
        [(packed(one), packed(two)) for one, two in zip(gate_up, down, strict=True)]
        if kind
        else [],
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


def their_experts(layer: Layer, implementation: str = "grouped_mm") -> torch.nn.Module:
    """Transformers' module on the meta device."""
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
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: torch.nn.Module = Experts(config)
    module.requires_grad_(False)
    return module


def with_values(layer: Layer, module: torch.nn.Module) -> torch.nn.Module:
    """Our decoded weights, and the biases, in transformers' orientation."""
    values = {"gate_up_proj": layer.gate_up, "down_proj": layer.down}
    if layer.shape.biased:
        values = {name: value.transpose(1, 2).contiguous() for name, value in values.items()}
    for name, value in (values | biases_of(layer)).items():
        if name in module._parameters:
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return module


def biases_of(layer: Layer) -> dict[str, Tensor]:
    if layer.gate_up_bias is None or layer.down_bias is None:
        return {}
    return {"gate_up_proj_bias": layer.gate_up_bias, "down_proj_bias": layer.down_bias}


def our_experts(layer: Layer) -> torch.nn.Module:
    """Transformers' module with our packed weights."""
    module = their_experts(layer)
    freeze_experts(module, lambda path, *_: layer.packed[0]["down" in path], KIND)
    for expert, (gate_up, down) in enumerate(layer.packed):
        module.gate_up_proj.set_packed(expert, gate_up)
        module.down_proj.set_packed(expert, down)
    return with_values(layer, module)


def run(layer: Layer, module: torch.nn.Module, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward; with recomputation as our engine or torch does it."""
    x = layer.x.detach().requires_grad_()
    weights = layer.weights.detach().requires_grad_()
    if not recompute:
        y = module(x, layer.index, weights)
    elif expert_linears(module):
        with torch.no_grad():
            y = module(x, layer.index, weights)
        with outputs_unread():
            unread = module(x, layer.index, weights)
        return y, *torch.autograd.grad(unread, (x, weights), layer.dy)
    else:
        y = checkpoint(module, x, layer.index, weights, use_reentrant=False)
    return y.detach(), *torch.autograd.grad(y, (x, weights), layer.dy)


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

    def record(name: str, run: Callable[[], tuple[Tensor, ...]]) -> None:
        row = rows[name] = {}
        if layer.x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        attempt(row, "eager_ms", partial(eager_ms, run))
        if layer.x.is_cuda:
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if exact and "failed" not in row:
            attempt(row, "errors_y_dx_dw", partial(relative_errors, run, tuple(exact)))
        if graphs and "failed" not in row:
            attempt(row, "ms", partial(milliseconds, run, launches=1))

    module = our_experts(layer)
    for megabytes in (128, 256, 1024):
        linear_experts.DECODED_BYTES = megabytes * 2**20
        name = f"halfbyte {layer.kind}, {megabytes} MB"
        record(name, partial(run, layer, module, False))
    record(f"halfbyte {layer.kind}, recomputed", partial(run, layer, module, True))

    def decode() -> tuple[Tensor, ...]:
        for linear in expert_linears(module).values():
            for _ in linear.decoded(KIND):
                pass
        return ()

    timed = partial(milliseconds, launches=2) if graphs else eager_ms
    attempt(rows.setdefault("  decoding of one pass", {}), "ms", partial(timed, decode))
    del module
    routing, b = routing_of(layer.index, shape.experts), buffers_of(layer)
    for buffer in b:
        buffer.normal_(std=0.1)
    runs = sorted_products(layer, routing, b)
    names = ("gate_up", "down, scaled", "gate_up", "d_inner", "dx")

    def bare() -> None:
        for name in names:
            runs[name]()

    attempt(rows.setdefault("five bare grouped_mm", {}), "ms", partial(timed, bare))
    try:
        module = with_values(layer, their_experts(layer))
    except Exception as error:  # the table says why
        rows["transformers bf16"] = {"failed": reason(error)}
        return rows
    for name, recompute in (("transformers bf16", False), ("transformers bf16, recomputed", True)):
        record(name, partial(run, layer, module, recompute))
    return rows


# Peers, each in a process of its own: they patch what others are made of


def packed_by_bitsandbytes(layer: Layer) -> torch.nn.Module:
    """Its parametrization: a parameter is decoded whenever it is read."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = with_values(layer, their_experts(layer))
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(module, name, compress_statistics=True, blocksize=64)
    return module


def packed_for_unsloth(layer: Layer) -> torch.nn.Module:
    """What its patches of transformers make of experts when a model is loaded in 4 bits."""
    from bitsandbytes.nn import Params4bit

    module = with_values(layer, their_experts(layer, "unsloth"))
    for name in ("gate_up_proj", "down_proj"):
        value = getattr(module, name).data
        packed = Params4bit(value, requires_grad=False, compress_statistics=True, quant_type="nf4")
        packed = packed.to(value.device)
        packed._original_shape = value.shape
        setattr(module, name, packed)
    return module


PEERS = {"bitsandbytes": packed_by_bitsandbytes, "unsloth": packed_for_unsloth}


def decoded_by_peer(module: torch.nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    if getattr(value, "quant_state", None) is None:
        return value.detach()
    decoded = bitsandbytes.functional.dequantize_4bit(value.data, value.quant_state)
    return decoded.reshape(value._original_shape)


def peer_rows(name: str, shape: Shape, tokens: int) -> dict[str, Row]:
    """Rows of one peer, run in its process."""
    layer, rows = layer_of(shape, tokens, "cuda", "NF4"), dict[str, Row]()
    module = PEERS[name](layer)
    values = {key: decoded_by_peer(module, key) for key in ("gate_up_proj", "down_proj")}
    if shape.biased:
        values = {key: value.transpose(1, 2) for key, value in values.items()}
    layer = layer._replace(gate_up=values.pop("gate_up_proj"), down=values.pop("down_proj"))
    exact = exact_experts(layer)
    for suffix, recompute in (("", False), (", recomputed", True)):
        row = rows[f"{name} NF4{suffix}"] = {}
        torch.cuda.reset_peak_memory_stats()
        launch = partial(run, layer, module, recompute)
        attempt(row, "eager_ms", partial(eager_ms, launch))
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if "failed" not in row:
            attempt(row, "errors_y_dx_dw", partial(relative_errors, launch, exact))
    return rows


def run_peer(name: str, shape: str, tokens: int) -> dict[str, Row]:
    """Runs this script for one peer; its rows, or why there are none."""
    command = [sys.executable, __file__, "--peer", name, "--shape", shape, "--tokens", str(tokens)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        line = next(one for one in done.stdout.splitlines()[::-1] if one.startswith("{"))
        return dict(json.loads(line))
    except subprocess.TimeoutExpired as error:
        return {name: {"failed": reason(error)}}
    except StopIteration:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {name: {"failed": said[-1][:300] if said else f"exit code {done.returncode}"}}


def relative_errors(
    run: Callable[[], tuple[Tensor, ...]], exact: tuple[Tensor, ...]
) -> list[float]:
    pairs = zip(run(), exact, strict=True)
    return [float(f"{relative_error(got, wanted):.3g}") for got, wanted in pairs]


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
    layer = layer_of(shape, tokens, "cuda")
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
        layer = layer_of(shape, tokens, "cuda")
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
    sections = ("kernels", "blocks")
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--peer", choices=list(PEERS), help="print the rows of one peer only")
    parser.add_argument("--without-peers", action="store_true", help="they import for a while")
    parser.add_argument("--tune", action="store_true", help="many tiles instead")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, without times")
    parser.add_argument("--out", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    if args.dry:
        global KIND
        KIND = torch.float16  # Triton's interpreter has no bfloat16 products
    else:
        require_cuda()
    if args.peer:
        if args.peer == "unsloth":
            settle_unsloth()
            import unsloth  # noqa: F401
        with torch.enable_grad():
            rows = peer_rows(args.peer, SHAPES[args.shape[0]], args.tokens[0])
        print(json.dumps(rows))
        return
    begin = time.perf_counter()
    found: dict[str, dict[str, Row]] = {}
    with torch.no_grad():
        for name, tokens in itertools.product(args.shape, [16] if args.dry else args.tokens):
            shape = (TINY if args.dry else SHAPES)[name]
            if args.tune:
                continue
            device = "cpu" if args.dry else "cuda"
            each = tokens * shape.top_k / shape.experts
            title = f"{shape.name}, {tokens} tokens ({each:.0f} rows an expert)"
            if "kernels" in args.only:
                timed = eager_ms if args.dry else milliseconds
                found[title] = kernels(layer_of(shape, tokens, device), timed)
                show(title, found[title])
            for kind in ("NF4", "MXFP4") if shape.biased else ("NF4",):
                if "blocks" not in args.only:
                    continue
                layer, own = layer_of(shape, tokens, device, kind), f"{title}, a layer in {kind}"
                with torch.enable_grad():
                    found[own] = blocks(layer, graphs=not args.dry)
                del layer
                if kind == "NF4" and not (args.dry or args.without_peers):
                    torch.cuda.empty_cache()
                    for peer in PEERS:
                        found[own] |= run_peer(peer, name, tokens)
                show(own, found[own])
        for name in args.shape if args.tune else ():
            found[name] = tune(SHAPES[name], args.tokens)
            show(name, best(found[name]))
    print(f"\n{time.perf_counter() - begin:.0f} s")
    if not args.dry:
        write("gpu_experts", args.out, rows=found)


if __name__ == "__main__":
    sys.exit(main())
