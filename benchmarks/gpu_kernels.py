"""Times decoding, encoding and products of 4-bit weights on a GPU, compared with the peers.

    python benchmarks/gpu_kernels.py

NF4, blocks of 64, double quantisation, bfloat16; the linear shapes of Llama-2-7B and Llama-3-8B.
Each time is compared with bitsandbytes', Unsloth's (decoding only) and the time of a device copy of
as many bytes, all measured in this run. Peers read the same packed tensors as we do, and write into
the same rotated buffers. Unsloth is imported last, since it patches other packages; its row *own
buffer* is the call its training makes, into its one buffer, called one by one only.

    copy      a copy of 2 GB: bytes read and written per second
    quantize  its kernels in a graph; events around the call, and wall time, both including the wait
              for the check that all was finite; bytes differing from bitsandbytes
    matmul    x·Wᵀ for few rows of x; error against float64 over the exact NF4 values
    decode    to bfloat16; whether the result is bitsandbytes' bit for bit
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from measuring import (
    Row,
    copies_of,
    device_us,
    from_bitsandbytes,
    reason,
    relative_error,
    require_cuda,
    settle_unsloth,
    take_turns,
    write,
)
from torch import Tensor

from halfbyte.quant import dequantize, dequantize_all, quantize

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (14336, 4096), (4096, 14336)]
MATMUL_SHAPES = SHAPES[:3]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECTIONS = ("quantize", "matmul", "decode")
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight; the offset is 4 more in all
BFLOAT16 = torch.bfloat16


def weights_of(shape: tuple[int, int], count: int, device: str = "cuda") -> list[Tensor]:
    return [torch.randn(shape, device=device).mul_(0.02).to(BFLOAT16) for _ in range(count)]


def encoded(weight: Tensor) -> tuple[Tensor, Any]:
    """Bitsandbytes' codes and nested state."""
    return quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def copy_gb_per_s(nbytes: int, rounds: int = 21) -> float:
    """Bytes read and written a second by copies that move `nbytes` in all."""
    count, size = copies_of(nbytes), nbytes // 2
    sources, targets = (
        [torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(count)]
        for _ in range(2)
    )
    copies = {"copy": lambda i: targets[i % count].copy_(sources[i % count])}
    row = take_turns(copies, count, rounds)["copy"]
    # A graph makes of it a transfer that is slower than the same call outside (2.4 and 3.0 TB/s).
    return float(2 * size / min(row["us"], row["eager_us"]) / 1e3)


def differences(weight: Tensor) -> dict[str, int]:
    """Elements in which our packed weight is not bitsandbytes'."""
    ours, theirs = quantize(weight).tensors(), from_bitsandbytes(*encoded(weight)).tensors()
    return {
        name: int((ours[name].view(torch.uint8) != theirs[name].view(torch.uint8)).sum())
        if ours[name].dim()
        else int(not torch.equal(ours[name], theirs[name]))
        for name in ours
    }


def quantizing(shape: tuple[int, int], copy: float) -> dict[str, Row]:
    numel = shape[0] * shape[1]
    weights = weights_of(shape, copies_of((2 + PACKED) * numel))
    contestants = {"halfbyte": quantize, "bitsandbytes": encoded}
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(18):
        for name, run in contestants.items():
            weight = weights[turn % len(weights)]
            on_device = device_us(lambda run=run, weight=weight: run(weight))
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(weights[(turn + 1) % len(weights)])
            torch.cuda.synchronize()
            wall = (time.perf_counter() - start) * 1e6
            if turn > 2:  # the first compile, and load code
                times.setdefault((name, "us"), []).append(on_device)
                times.setdefault((name, "wall_us"), []).append(wall)
    from halfbyte.quant.triton_blockwise import encode, encode_scales

    rows: dict[str, Row] = {name: {} for name in contestants}
    for (name, figure), taken in times.items():
        rows[name][figure] = round(statistics.median(taken), 1)

    def kernels(i: int) -> object:
        scales = encode(weights[i % len(weights)].view(-1), "nf4", 64)[1]
        return encode_scales(scales, scales.mean())

    rows |= take_turns({"halfbyte, its launches": kernels}, len(weights))
    rows["halfbyte"]["differing_bytes"] = {
        str(dtype).removeprefix("torch."): differences(weights[0].to(dtype))
        for dtype in (BFLOAT16, torch.float32, torch.float16)
    }
    rows["at copy speed"] = {"us": round((2 + PACKED) * numel / copy / 1e3, 1)}
    return rows


def multiplying(shape: tuple[int, int], m: int, copy: float) -> dict[str, Row]:
    n, k = shape
    packed = [encoded(weight) for weight in weights_of(shape, copies_of(PACKED * n * k))]
    ours = [from_bitsandbytes(*one) for one in packed]
    plain = [dequantize_4bit(*one) for one in packed[: copies_of(2 * n * k)]]
    buffers = [torch.empty_like(weight) for weight in plain]
    x = torch.randn(m, k, device="cuda").to(BFLOAT16)
    y = torch.empty(m, n, dtype=BFLOAT16, device="cuda")

    def fused(i: int) -> Tensor:
        from halfbyte.linear.triton_gemv import small_product

        return small_product(x, ours[i % len(ours)])

    def decoded(i: int) -> Tensor:
        buffer = buffers[i % len(buffers)]
        dequantize(ours[i % len(ours)], BFLOAT16, out=buffer)
        return torch.mm(x, buffer.t(), out=y)

    def theirs(i: int) -> Tensor:
        codes, state = packed[i % len(packed)]
        return bnb.matmul_4bit(x, codes, quant_state=state)

    contestants: dict[str, Callable[[int], Tensor]] = {
        "halfbyte fused": fused,
        "halfbyte decode + cuBLAS": decoded,
        "bitsandbytes": theirs,
        "cuBLAS bf16": lambda i: torch.mm(x, plain[i % len(plain)].t(), out=y),
    }
    exact = dequantize(ours[0], torch.float32, impl="torch").double()
    reference = x.double() @ exact.t()
    errors: dict[str, float | None] = {}
    for name, run in contestants.items():
        y.fill_(float("nan"))
        try:
            errors[name] = float(f"{relative_error(run(0), reference):.3g}")
        except Exception:  # its row says why
            errors[name] = None
    rows = take_turns(contestants, len(packed), rounds=11)
    for name, row in rows.items():
        row["relative_error"] = errors[name]
    rows["at copy speed"] = {"us": round((PACKED * n * k + 2 * m * (n + k)) / copy / 1e3, 2)}
    return rows


def decoding(shape: tuple[int, int], copy: float, unsloth: Any) -> dict[str, Row]:
    numel = shape[0] * shape[1]
    nbytes = (PACKED + 2) * numel
    count = copies_of(nbytes)
    packed = [encoded(weight) for weight in weights_of(shape, count)]
    ours = [from_bitsandbytes(*one) for one in packed]
    out = [torch.empty(shape, dtype=BFLOAT16, device="cuda") for _ in packed]
    contestants: dict[str, Callable[[int], Tensor]] = {
        "halfbyte": lambda i: dequantize(ours[i % count], BFLOAT16, out=out[i % count]),
        "bitsandbytes": lambda i: dequantize_4bit(*packed[i % count], out=out[i % count]),
    }
    own: dict[str, Callable[[int], Tensor]] = {}
    if not isinstance(unsloth, str):
        contestants["Unsloth"] = lambda i: unsloth(*packed[i % count], out=out[i % count])
        own["Unsloth, own buffer"] = lambda i: unsloth(*packed[i % count], use_global_buffer=True)
    expected = dequantize_4bit(*packed[0])
    equal: dict[str, bool | None] = {}
    for name, run in (contestants | own).items():
        out[0].fill_(float("nan"))
        try:
            equal[name] = torch.equal(run(0), expected)
        except Exception:  # its row says why
            equal[name] = None
    rows = take_turns(contestants, count)
    for name, row in take_turns(own, count).items():  # a graph gives it other buffers
        rows[name] = {key: value for key, value in row.items() if "eager" in key or key == "failed"}
    for name, row in rows.items():
        row["equals_bitsandbytes"] = equal[name]
    if isinstance(unsloth, str):
        rows["Unsloth"] = {"failed": unsloth}
    same = copy_gb_per_s(round(nbytes))
    rows["copy of as many bytes"] = {"us": round(nbytes / same / 1e3, 2)}
    rows["at copy speed"] = {"us": round(nbytes / copy / 1e3, 2)}
    for row in rows.values():
        for figure in ("us", "eager_us"):
            if figure in row:
                rate = nbytes / row[figure] / 1e3
                row[figure.replace("us", "gb_per_s")] = round(rate)
                row[figure.replace("us", "share_of_copy")] = round(rate / copy, 3)
    return rows


def decoding_a_layer(copy: float) -> dict[str, Row]:
    """The seven weights of a Llama-2-7B layer, by us in one launch."""
    shapes = [SHAPES[0]] * 4 + [SHAPES[1]] * 2 + [SHAPES[2]]
    packed = [encoded(weights_of(shape, 1)[0]) for shape in shapes]
    ours = [from_bitsandbytes(*one) for one in packed]
    sizes = [q.numel for q in ours]
    pieces = torch.empty(sum(sizes), dtype=BFLOAT16, device="cuda").split(sizes)
    outs = [piece.view(q.shape) for piece, q in zip(pieces, ours, strict=True)]

    def theirs(i: int) -> None:
        for one, out in zip(packed, outs, strict=True):
            dequantize_4bit(*one, out=out)

    rows = take_turns(
        {
            "halfbyte": lambda i: dequantize_all(ours, BFLOAT16, outs=outs),
            "bitsandbytes": theirs,
        },
        1,
    )
    nbytes = (PACKED + 2) * sum(sizes)
    rows["at copy speed"] = {"us": round(nbytes / copy / 1e3, 2)}
    for row in rows.values():
        row["share_of_copy"] = round(nbytes / row["us"] / 1e3 / copy, 3)
    return rows


def import_unsloth() -> Any:
    """Unsloth's decoder, or why there is none."""
    settle_unsloth()
    try:
        import unsloth  # noqa: F401
        from unsloth.kernels.utils import fast_dequantize
    except Exception as error:
        return reason(error)
    return fast_dequantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="M, for matmul")
    parser.add_argument("--without-unsloth", action="store_true", help="its import takes a while")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    copy = copy_gb_per_s(4_000_000_000, rounds=5)
    print(f"copy of 2 GB: {copy:.0f} GB/s, read and written")
    rows: dict[str, dict[str, Row]] = {}

    def show(title: str, found: dict[str, Row]) -> None:
        rows[title] = found
        print(f"\n{title}")
        for name, row in found.items():
            print(f"  {name:26s}", *(f"{key}={value}" for key, value in row.items()), flush=True)

    if "quantize" in args.only:
        for n, k in SHAPES:
            show(f"quantize {n}x{k} from bfloat16", quantizing((n, k), copy))
    if "matmul" in args.only:
        for n, k in MATMUL_SHAPES:
            for m in args.rows:
                show(f"matmul {m}x{k} with {n}x{k}", multiplying((n, k), m, copy))
    if "decode" in args.only:
        show("decode a layer of Llama-2-7B", decoding_a_layer(copy))
        unsloth = "left out" if args.without_unsloth else import_unsloth()
        for n, k in SHAPES:
            show(f"decode {n}x{k} to bfloat16", decoding((n, k), copy, unsloth))
    print(f"\n{'':34s}", "microseconds in a graph (quantize: around the call); (share of copy)")
    for title, found in rows.items():
        cells = []
        for name, row in found.items():
            share = f" ({row['share_of_copy']})" if "share_of_copy" in row else ""
            cells.append(f"{name} {row.get('us', row.get('eager_us', '-'))}{share}")
        print(f"{title:34s}", " | ".join(cells))
    write("gpu_kernels", args.output, copy_gb_per_s=round(copy), rows=rows)


if __name__ == "__main__":
    main()
