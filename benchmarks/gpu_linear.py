"""The seven linears of one decoder layer, forward and backward with LoRA, against bare products.

    python benchmarks/gpu_linear.py --shape llama2-7b

*bare* is the minimum of any such layer: x·Wᵀ and dY·W of the seven weights, bfloat16 cuBLAS into
existing tensors. Contestants also compute the adapters' part (r = 16) and all their gradients. Each
runs for a while before it is timed and they take turns without a pause, so the GPU is warm and at
its power limit (W and MHz are in the rows); the time relative to *bare* is the cost of QLoRA, or
LoRA. *graph* is a CUDA graph's replay, without launches from the host, relative to a graph of
*bare*.

Unsloth comes last, with its own *bare*, since its import patches PEFT and bitsandbytes. Its MLP
includes SwiGLU and computes the gradient of the MLP's input only. Before anything is timed, 64
tokens are compared with float64 over each contestant's exact weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from lora_layers import (
    ALPHA,
    INPUT_OF,
    RANK,
    Batch,
    Contestant,
    Tensors,
    differentiate,
    make_batch,
    ours,
    peft,
    unsloth,
)
from measuring import PowerMeter, Row, captured, reason, relative_error, require_cuda, steady, write

WIDTHS = {"llama2-7b": (4096, 4096, 11008), "llama3-8b": (4096, 1024, 14336)}  # hidden, k/v, MLP
GRAPH_TOKENS = 2048  # beyond, the host is far ahead of the card anyway
VARIANTS = ("halfbyte-nf4", "halfbyte-bf16", "peft", "unsloth")


def shapes_of(hidden: int, kv: int, mlp: int) -> dict[str, tuple[int, int]]:
    rows = (hidden, kv, kv, hidden, mlp, mlp, hidden)
    columns = (hidden, hidden, hidden, hidden, hidden, hidden, mlp)
    return dict(zip(INPUT_OF, zip(rows, columns, strict=True), strict=True))


def errors_of(one: Contestant, batch: Batch, names: Collection[str] = tuple(INPUT_OF)) -> Row:
    """The largest relative error of any output, dX, dA and dB of `names`, against float64."""
    sources = list(dict.fromkeys(INPUT_OF[name] for name in names))
    part = Contestant(
        lambda inputs: {n: y for n, y in one.outputs(inputs).items() if n in names},
        {n: one.a[n] for n in names},
        {n: one.b[n] for n in names},
        one.exact,
    )
    with torch.no_grad():
        got = {f"y {n}": y for n, y in part.outputs(batch.inputs).items()}
    kinds = [f"dx {n}" for n in sources] + [f"{kind} {n}" for kind in ("da", "db") for n in names]
    got |= dict(zip(kinds, differentiate(part, batch, sources), strict=True))
    true: Tensors = {}
    for name in names:
        w, a, b = one.exact(name), one.a[name].detach().double(), one.b[name].detach().double()
        x = batch.inputs[INPUT_OF[name]].detach().double()[0]
        dy, s = batch.gradients[name].double()[0], ALPHA / RANK
        true[f"y {name}"] = x @ w.T + s * ((x @ a.T) @ b.T)
        dx = f"dx {INPUT_OF[name]}"
        true[dx] = true.get(dx, 0) + dy @ w + s * ((dy @ b) @ a)
        true[f"da {name}"] = s * ((dy @ b).T @ x)
        true[f"db {name}"] = s * (dy.T @ (x @ a.T))
    found: Row = {}
    for name, reference in true.items():
        error = relative_error(got[name].reshape(reference.shape), reference)
        found[name.split()[0]] = max(found.get(name.split()[0], 0.0), error)
    return {kind: float(f"{error:.3g}") for kind, error in found.items()}


def bare_products(weights: Tensors, batch: Batch) -> Callable[[], None]:
    plan = []
    for name, weight in weights.items():
        x, dy = batch.inputs[INPUT_OF[name]].detach()[0], batch.gradients[name][0]
        plan.append((x, weight.t(), torch.empty_like(dy)))
        plan.append((dy, weight, torch.empty_like(x)))

    def run() -> None:
        for left, right, out in plan:
            torch.mm(left, right, out=out)

    return run


def turns(runs: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, Row]:
    """Every run timed once a round; the first works longer before, the others find a warm card."""
    meter = PowerMeter()
    rows: dict[str, Row] = {name: {"rounds_ms": [], "power_w": [], "sm_mhz": []} for name in runs}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    warm = args.warm
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            times = steady(run, warm=warm, measure=args.measure)
            power = meter.between(start + warm, time.perf_counter())
            warm = args.settle
            taken[name] += times
            rows[name]["rounds_ms"].append(round(statistics.median(times), 4))
            for key, value in power.items():
                rows[name][key].append(value)
    meter.close()
    for name, row in rows.items():
        row["ms"] = round(statistics.median(taken[name]), 4)
    for name, row in rows.items():
        base = "bare graph" if name.endswith("graph") and "bare graph" in rows else "bare"
        row["ratio"] = round(row["ms"] / rows[base]["ms"], 3)
        kind = f"{name:22s} {row['ms']:9.3f} ms  {row['ratio']:6.3f} of {base}"
        print(f"  {kind:52s} {row['power_w']} W {row['sm_mhz']} MHz", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(WIDTHS), default="llama2-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--warm", type=float, default=1.5, help="seconds of work at first")
    parser.add_argument("--settle", type=float, default=0.4, help="seconds of it at each change")
    parser.add_argument("--measure", type=float, default=1.0, help="seconds timed, each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    shapes = shapes_of(*WIDTHS[args.shape])
    weights, initial = {}, {}
    for name, (rows, columns) in shapes.items():
        weights[name] = torch.randn(rows, columns, device="cuda").mul_(0.02).to(torch.bfloat16)
        a, b = torch.randn(RANK, columns, device="cuda"), torch.randn(rows, RANK, device="cuda")
        initial[name] = a * columns**-0.5, b * 0.02
    found: dict[str, Any] = {"errors": {}}
    contestants: dict[str, Contestant] = {}
    for name in args.only:
        if name.startswith("halfbyte"):
            contestants[name] = ours(weights, initial, quant=name == "halfbyte-nf4")
    if "peft" in args.only or "unsloth" in args.only:
        layer, of_peft = peft(weights, initial)
        if "peft" in args.only:
            contestants["peft"] = of_peft
    check = make_batch(shapes, 64, "cuda")
    for name, one in contestants.items():
        found["errors"][name] = errors_of(one, check)
        print(f"largest relative errors of {name:14s} {found['errors'][name]}", flush=True)
    batches = {tokens: make_batch(shapes, tokens, "cuda") for tokens in args.tokens}
    for tokens, batch in batches.items():
        print(f"\n{args.shape}, {tokens} tokens")
        runs: dict[str, Callable[[], object]] = {"bare": bare_products(weights, batch)}
        for name, one in contestants.items():
            runs[name] = lambda one=one, batch=batch: differentiate(one, batch)
        if tokens <= GRAPH_TOKENS:
            for name in [name for name in runs if name != "peft"]:
                try:
                    runs[f"{name} graph"] = captured(runs[name]).replay
                except Exception as error:
                    found[f"{tokens} {name} graph"] = reason(error)
                    print(f"  {name} in no graph: {reason(error)}")
        if contestants:
            found[f"{tokens} tokens"] = turns(runs, args)
            work = 4 * tokens * sum(weight.numel() for weight in weights.values())
            bare = found[f"{tokens} tokens"]["bare"]
            bare["tflop_per_s"] = round(work / bare["ms"] / 1e9, 1)
    if "unsloth" in args.only:
        try:
            theirs = unsloth(layer, of_peft)
            took = {n: type(y.grad_fn).__name__ for n, y in theirs.outputs(check.inputs).items()}
            errors = errors_of(theirs, check, ("q_proj", "k_proj", "v_proj", "o_proj"))
        except Exception as error:
            found["unsloth"] = {"failed": reason(error)}
            print(f"\nUnsloth: {reason(error)}")
        else:
            found["unsloth"] = {"note": "its MLP includes SwiGLU", "functions": took}
            found["errors"]["unsloth, q k v o"] = errors
            print(f"\nUnsloth's functions: {took}\n  largest relative errors, q k v o: {errors}")
            sources = ("attention", "output", "mlp")
            for tokens, batch in batches.items():
                print(f"\n{args.shape}, {tokens} tokens, after Unsloth's import")
                runs = {"bare": bare_products(weights, batch)}
                runs["unsloth"] = lambda batch=batch: differentiate(theirs, batch, sources)
                found[f"{tokens} tokens, after Unsloth's import"] = turns(runs, args)
    timing = {key: getattr(args, key) for key in ("warm", "settle", "measure", "rounds")}
    write("gpu_linear", args.output, shape=args.shape, rank=RANK, timing_s=timing, rows=found)


if __name__ == "__main__":
    main()
