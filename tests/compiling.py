"""Compiles every Triton kernel that a GPU would be given, without one; run by test_compiling.

    python -m tests.compiling h100

The dispatch is asked, as if the device were there (tests/devices.py), which kernels run on it and
with which constants. Prints one line a kernel: its name, and the shared memory it needs in bytes.

A specialisation takes 0.1 to 1.2 s, two thirds of it in LLVM and ptxas. How a product on tensor
cores is compiled depends on the architecture, so each gets all of those. Of any other kernel the
oldest and one of the newest get all specialisations (`ALL_OF_EACH`), the rest the first.
"""

import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte.layers import triton_elementwise, triton_kv_cache, triton_qk_norm
from halfbyte.linear import (
    triton_experts,
    triton_fp8,
    triton_gemv,
    triton_lora,
    triton_matmul,
    triton_routing,
    triton_swiglu,
)
from halfbyte.linear.glu import Glu
from halfbyte.optim import triton_adamw
from halfbyte.quant import e4m3, triton_blockwise, triton_e4m3, triton_mxfp4, triton_records
from halfbyte.runtime import device as devices
from tests.devices import DEVICES

POINTERS = {"scale_codes": "*u8", "codes": "*i32", "cell_codes": "*i32"}
POINTERS |= dict.fromkeys(("order", "offsets", "tiles", "first_tiles", "counts", "totals"), "*i32")
INTEGERS = {
    *(
        "rows",
        "columns",
        "stride",
        "words",
        "outputs",
        "row_words",
        "row_quads",
        "x_stride",
        "inputs",
    ),
    *("numel", "nbytes", "blocks", "groups", "second", "third", "dy_stride", "p_stride"),
    *("outputs0", "outputs1", "outputs2", "g_count", "b_count", "g_numel", "b_numel"),
    *("g_programs", "g_stride", "inner", "outer_stride", "inner_stride", "size", "tokens"),
    *("q_heads", "k_heads", "half", "table_stride", "gate_stride", "up_stride"),
    *("q_out_batch", "q_out_token", "k_out_batch", "k_out_token"),
    *("q_batch", "q_token", "k_batch", "k_token", "inner_stride"),
    *("base", "first", "experts", "out_stride", "slots", "spans"),
}


def tensor(dtype: str, *block: int) -> str:
    return f"tensordesc<{dtype}[{','.join(map(str, block))}]>"


def tiles(dtype: str, part: int) -> dict[str, str]:
    """The descriptors of triton_matmul' products, with the tiles it uses."""
    left, right, result = tensor(dtype, 128, 64), tensor(dtype, 64, 256), tensor(dtype, 128, 256)
    return {
        **{"x": left, "dy0": left, "dy1": left, "dy2": left, "y": result, "dx": result},
        **{"weight": tensor(dtype, 256, 64), "p": tensor(dtype, 128, part)},
        **{"weight0": right, "weight1": right, "weight2": right, "g": tensor(dtype, 128, part)},
        **{"a": tensor(dtype, part, 256), "b": tensor(dtype, 256, part)},
    }


def gated_tiles(dtype: str, part: int) -> dict[str, str]:
    """The descriptors of a gated MLP's forward, whose weights are blocks of two pages."""
    return {
        **dict.fromkeys(("inner", "gate", "up"), tensor(dtype, 128, 128)),
        **{"x": tensor(dtype, 128, 64), "weights": tensor(dtype, 2, 128, 64)},
        **{"p": tensor(dtype, 128, part), "b0": tensor(dtype, 2, 128, part)},
        "b1": tensor(dtype, 2, 128, part),
    }


ROWS, WIDTH, INNER = 8192, 4096, 11008  # Llama-2-7B's, in a step of 8192 tokens
CPU = torch.device("cpu")
ALL_OF_EACH = ("t4", "h100")
PRODUCTS = {"_product_tile", "_grouped_product", "_add_low_rank", "_attend_part"}
# Query heads per head of keys, and width: Llama-3-8B's, SmolLM2's, and a wide one.
CACHED_HEADS = ((4, 128), (3, 64), (8, 256))


def kernels(kind: str):
    """Yields (kernel, types that differ from the usual, constants, options).

    Args:
        kind: The 16-bit type that products on the device are in, ``bf16`` or ``fp16``.
    """
    yield from format_kernels(kind)
    yield from row_kernels(kind)
    yield from layer_kernels(kind)
    yield from optimizer_kernels()
    yield from adapter_kernels(kind)
    yield from decode_kernels(kind)
    if devices.spec_of(CPU).has_tensor_cores:
        yield from expert_kernels(kind)
    if devices.spec_of(CPU).has_fp8:
        yield from rounding_kernels(kind)
    if devices.spec_of(CPU).is_hopper:
        yield from fp8_kernels(kind)
        yield from hopper_kernels(kind, ((16, False), (16, True), (64, True), (128, True)))
        # float16 may be asked for; sizes, layouts and memory are those of bfloat16.
        yield from hopper_kernels("fp16", ((64, True),))


def format_kernels(kind: str):
    plain = {"enable_fp_fusion": False}
    for double, dtype in ((True, f"*{kind}"), (False, f"*{kind}"), (True, "*fp32")):
        flat = {"count": 3, "block_words": 8, "double": double}
        flat |= {"lanes": triton_blockwise.LANES, "unroll": triton_blockwise.UNROLL}
        yield (
            triton_blockwise._decode_flat,
            {"weights": "*i64", "out": dtype},
            flat,
            {"num_warps": 8, **plain},
        )
    for transposed in (True, False):
        tile = {"block_size": 64, "double": True, "transposed": transposed}
        tile |= {"tile_rows": 64, "tile_columns": 64}
        yield triton_blockwise._decode_tile, {"out": f"*{kind}", "codes": "*u8"}, tile, plain
    flat = {"count": 3, "lanes": triton_blockwise.LANES, "unroll": triton_blockwise.UNROLL}
    for dtype in (f"*{kind}", "*fp32"):
        types = {"weights": "*i64", "out": dtype}
        yield triton_mxfp4._decode_mxfp4, types, flat, {"num_warps": 8}
    flat = {"lanes": triton_blockwise.LANES, "unroll": triton_blockwise.UNROLL}
    for double in (True, False):
        types = {"out": f"*{kind}", "stride": "i32"}
        records = flat | {"block_words": 8, "double": double}
        yield triton_records._decode_records, types, records, {"num_warps": 8, **plain}
    types = {"out": f"*{kind}", "stride": "i32", "scales": "*u8"}
    yield triton_records._decode_mxfp4_records, types, flat, {"num_warps": 8}
    for transposed in (True, False):
        tile = {"transposed": transposed, "tile_rows": 64, "tile_columns": 64}
        types = {"out": f"*{kind}", "codes": "*u8", "scales": "*u8"}
        yield triton_mxfp4._decode_mxfp4_tile, types, tile, {}
    # What is packed comes as it was saved, whatever products are in.
    for signed, block_size, dtype in ((True, 64, "*bf16"), (False, 4096, "*fp16")):
        blocks = {"block_size": block_size, "rows": max(1, 1024 // block_size), "signed": signed}
        types = {"weight": dtype, "codes": "*u8"}
        yield (
            triton_blockwise._encode_blocks,
            types,
            blocks,
            {"num_warps": max(1, block_size // 1024)},
        )
    yield triton_blockwise._encode_scales, {}, {"block_size": 256, "rows": 4}, {}


def row_kernels(kind: str):
    product = {"num_stages": 1, "enable_fp_fusion": False}
    one = {"block_quads": 2, "double": True, "lanes": 128, "rounded": kind == "bf16"}
    types = {"y": f"*{kind}", "x": "*i32", "planes": "*i32"}
    types |= {f"codes{i}": "*i32" for i in (1, 2)} | {f"scale_codes{i}": "*u8" for i in (1, 2)}
    for members in (3, 1):
        yield triton_gemv._product_row, types, one | {"members": members}, product
    if not devices.spec_of(CPU).has_tensor_cores:
        return
    yield triton_gemv._sum_products, {"y": f"*{kind}"}, {"split": 4, "lanes": 512}, {}
    for rows in (16, 32, 64):
        few = {"block_words": 8, "double": True, "tile_outputs": 64, "tile_rows": rows}
        few |= {"step": 32 if rows <= 32 else 16, "split": 4}
        yield triton_gemv._product_tile, {"x": f"*{kind}"}, few, product


def layer_kernels(kind: str):
    names = ("x", "y", "h", "dx", "dy", "dh", "h_out", "residual", "weight", "cos", "sin")
    sixteen = dict.fromkeys((*names, "gate", "up", "d_both"), f"*{kind}")
    norm = {"add": True, "lanes": 4096}
    yield triton_elementwise._norm, {**sixteen, "eps": "fp32"}, norm, {"num_warps": 8}
    yield triton_elementwise._norm_backward, sixteen, norm, {"num_warps": 8}
    loss = {"capped": True, "with_grad": True, "lanes": 4096}
    kinds = {"logits": f"*{kind}", "targets": "*i64", "softcap": "fp32"}
    yield triton_elementwise._cross_entropy, kinds, loss, {"num_warps": 8}
    looked = {"out": f"*{kind}", "table": f"*{kind}", "ids": "*i64"}
    yield triton_elementwise._look_up, looked, {"lanes": 1024}, {}
    turned = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{kind}")
    turns = {"lanes": 64, "q_lanes": 32, "k_lanes": 8}
    yield triton_elementwise._rotate, sixteen | turned, turns | {"backward": True}, {}
    turned |= dict.fromkeys(("dq", "dk", "q_weight", "k_weight"), f"*{kind}")
    turned |= {"q_eps": "fp32", "k_eps": "fp32"}
    for kernel in (triton_qk_norm._norm_rotate, triton_qk_norm._norm_rotate_backward):
        yield kernel, sixteen | turned, turns, {"num_warps": triton_qk_norm._WARPS}
    yield triton_elementwise._gate, sixteen, {"lanes": 2048}, {"num_warps": 8}
    gate = {"remake": True, "lanes": 2048}
    yield triton_elementwise._gate_backward, sixteen, gate, {"num_warps": 8}


def optimizer_kernels():
    plain = {"enable_fp_fusion": False}
    doubles = {"constants": "*fp64", "count": "i32"}
    yield triton_adamw._prepare, doubles, {"lanes": 256}, plain
    # Whatever products are in, a parameter may be trained in any of these.
    types = ((tl.bfloat16, True), (tl.bfloat16, False), (tl.float32, False), (tl.float16, True))
    for dtype, master in types:
        kind = {"dtype": dtype, "master": master, "blocks": triton_adamw.BLOCKS, "shuffled": True}
        types = {"rows": "*i64", "owners": "*i32", "tables": "*i32"}
        options = {"num_warps": triton_adamw.WARPS, "maxnreg": triton_adamw.REGISTERS, **plain}
        yield triton_adamw._update, types, kind, options


def adapter_kernels(kind: str):
    """Yields those of every GPU; the others sum dB by cuBLAS."""
    job = {"kind": tl.float32, "count": 14, "lanes": triton_lora._LANES}
    yield triton_lora._lay_out, {"out": f"*{kind}", "table": "*i64"}, job, {"num_warps": 4}
    types = dict.fromkeys(("out", "left", "right"), f"*{kind}")
    types |= {"out_stride": "i32", "left_stride": "i32"}
    sizes = [(True, 16), (False, 32), (False, 48), (True, 128)]
    if not devices.spec_of(CPU).has_tensor_cores:
        sizes = [(one, rank) for one, rank in sizes if rank <= triton_lora._SCALAR_RANK]
    for transposed, ranks in sizes:
        tile = {"rank": ranks, "ranks": ranks, "part": min(64, ranks & -ranks)}
        tile |= {"transposed": transposed, "tile_m": triton_lora._LOW_RANK_ROWS}
        tile |= {"tile_n": triton_lora._LOW_RANK_COLUMNS}
        yield triton_lora._add_low_rank, types, tile, {"num_warps": triton_lora._LOW_RANK_WARPS}


def decode_kernels(kind: str):
    """Yields those of a step of decoding."""
    names = ("q", "k", "v", "cos", "sin", "keys", "values", "out")
    types = dict.fromkeys(names, f"*{kind}") | {"positions": "*i64", "scale": "fp32"}
    integers = ("q_heads", "heads", "capacity", "window", "q_stride", "k_stride", "v_stride")
    types |= dict.fromkeys(integers, "i32")
    for repeat, width in CACHED_HEADS:
        turned = {"half": width // 2, "lanes": width // 2, "count": triton_kv_cache.TURNED}
        yield triton_kv_cache._turn_and_store, types, turned, {"num_warps": 4}
        step, options = triton_kv_cache.shape_of(repeat, width, 2)
        yield triton_kv_cache._attend_part, types, step, options
        joined = {"width": width, "lanes": step["lanes"], "parts": 8}
        yield triton_kv_cache._join_parts, types, joined, {"num_warps": 1}
    step, options = triton_kv_cache.shape_of(4, 128, 4)
    yield triton_kv_cache._attend_part, types | dict.fromkeys(names, "*fp32"), step, options


def expert_kernels(kind: str):
    """Yields those of a mixture of 128 experts, and of one with gpt-oss's activation."""
    sorting = {"span": triton_routing._SPAN, "lanes": 64, "e": 128}
    types = {"index": "*i64", "slots": "i32"}
    yield triton_routing._count_slots, types, sorting, {"num_warps": 8}
    yield triton_routing._sort_slots, types, sorting, {"num_warps": 8}
    yield triton_routing._scan_counts, {}, {"lanes": 1024}, {"num_warps": 4}
    tiling = {"tile_rows": 128, "lanes": 64, "e": 128}
    yield triton_routing._find_tiles, {}, tiling, {"num_warps": 8}
    types = {"slots": f"*{kind}", "y": f"*{kind}", "index": "*i64"}
    yield triton_routing._sum_slots, types, {"top_k": 8, "lanes": 1024}, {"num_warps": 4}
    swiglu, gpt_oss = Glu(), Glu(True, 7.0, 1.702, 1.0)
    types = dict.fromkeys(("h", "d_inner", "row_scale"), f"*{kind}")
    for glu in (gpt_oss, swiglu):
        step = {**glu._asdict(), "programs": 4 * devices.spec_of(CPU).num_sms}
        step |= {"rows": triton_experts._GLU_ROWS, "lanes": triton_experts._GLU_LANES}
        yield triton_experts._glu_backward, types, step, {"num_warps": 8}
    plain = dict.fromkeys(("gather", "scatter", "biased", "scaled", "gated"), False)
    gather, scatter = plain | {"gather": True}, plain | {"scatter": True}
    products = (
        (True, gather | {"gated": True}, swiglu),
        (True, gather | {"gated": True, "biased": True}, gpt_oss),
        (True, gather | {"biased": True}, swiglu),
        (True, scatter | {"scaled": True, "biased": True}, swiglu),
        (False, gather, swiglu),
        (False, scatter, swiglu),
    )
    tma = devices.spec_of(CPU).is_hopper
    small, large = triton_routing.SMALL_TILE, triton_routing.LARGE_TILE
    # All with the tile of many rows; the others differ in sizes only.
    cases = [(large, False, one) for one in products]
    cases += [(tile_m, True, products[0]) for tile_m in ((small, large) if tma else (small,))]
    for tile_m, few, (transposed, flags, glu) in cases:
        tile = triton_experts.tile_of(CPU, tile_m, few)
        types = dict.fromkeys(("out", "x", "weight", "bias", "row_scale"), f"*{kind}")
        if tma:
            block = (tile.n, tile.k) if transposed else (tile.k, tile.n)
            if flags["gated"] and not glu.interleaved:
                block = (2, tile.n // 2, tile.k)
            types["weight"] = tensor(kind, 1, *block)
            if not flags["gather"]:
                types["x"] = tensor(kind, tile_m, tile.k)
        programs = tile.per_sm * devices.spec_of(CPU).num_sms
        sizes = {"tile_m": tile_m, "tile_n": tile.n, "tile_k": tile.k, "flat": tile.flat}
        step = {"top_k": 8, "transposed": transposed, "tma": tma, "programs": programs}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        yield (
            triton_experts._grouped_product,
            types,
            step | flags | glu._asdict() | sizes,
            options,
        )


def rounding_kernels(kind: str):
    """Yields what decodes to e4m3, and rounds to it."""
    for double in (True, False):
        step = {"double": double, "span": 2, "compiled": True}
        options = {"num_warps": 4, "enable_fp_fusion": False}
        types = {"codes": "*i64", "units": "i32", "row_units": "i32", "out": "*i32"}
        flat = {"block_units": 2, "width": 2, "lanes": triton_e4m3._LANES_DECODED}
        yield triton_e4m3._decode_e4m3, types, step | flat, options
        step |= {"block_pairs": 4, "lanes": triton_e4m3._QUADS, "pairs": triton_e4m3._PAIRS}
        types = {"codes": "*i64", "row_pairs": "i32", "across": "*i32"}
        yield triton_e4m3._decode_across, types, step, options
    types = {"out": "*fp8e4nv"} | dict.fromkeys(("x0", "x1", "x2"), f"*{kind}")
    types |= dict.fromkeys([f"{n}{i}" for n in ("size", "stride") for i in range(3)], "i32")
    for parts, scaled in ((1, False), (3, True)):
        step = {"parts": parts, "scaled": scaled, "lanes": triton_e4m3._LANES}
        step |= {"whole": parts == 1, "compiled": True, "smallest": e4m3.SMALLEST}
        yield triton_e4m3._quantize_rows, types, step, {"num_warps": 8}


def fp8_kernels(kind: str):
    """Yields FP8 products: with a rotary embedding, of a gradient, of high ranks, and gated."""
    m, n, k = triton_fp8.TILE_M, triton_fp8.TILE_N, triton_fp8.TILE_K
    tile = {"programs": devices.spec_of(CPU).num_sms, "tile_m": m, "tile_n": n, "tile_k": k}
    options = {"num_warps": 8, "num_stages": 3}
    for rank, half, across in ((16, 64, False), (16, 0, True), (48, 0, True), (128, 64, False)):
        flat, part = triton_matmul.flat_of(1, rank)
        types = {"x": tensor("fp8e4nv", m, k), "weight": tensor("fp8e4nv", n, k)}
        types |= {"y": tensor(kind, m, n), "p": tensor(kind, m, part)}
        types |= {"b": tensor(kind, part, n) if across else tensor(kind, n, part)}
        types |= {"cos": f"*{kind}", "sin": f"*{kind}", "turned": "i32"}
        step = {"half": half, "scaled": not across, "across": across}
        step |= {"rank": rank, "part": part, "flat": flat, **tile}
        yield triton_fp8._fp8_product, types, step, options
    for rank, keep in ((16, True), (16, False), (64, True)):
        flat, part = triton_matmul.flat_of(1, 2 * rank)
        types = gated_tiles(kind, part) | {"x": tensor("fp8e4nv", m, k)}
        types |= {"weights": tensor("fp8e4nv", 2, n // 2, k)}
        step = {"keep": keep, "rank": rank, "part": part, "flat": flat, **tile, "tile_n": n // 2}
        yield triton_fp8._fp8_gated, types, step, options


def hopper_kernels(kind: str, cases: tuple[tuple[int, bool], ...]):
    """Yields the kernels for ranks, each with what is optional (rotary, kept products) or without.

    With it a kernel does all that it does without, and more.
    """
    ranks = {rank for rank, _ in cases}
    tile = {"programs": devices.spec_of(CPU).num_sms, "tile_m": triton_matmul.TILE_M}
    tile |= {"tile_n": 256, "tile_k": triton_matmul.TILE_K}
    options = {"num_warps": 8, "num_stages": 3}
    for rank, whole in cases:
        flat, part = triton_matmul.flat_of(1, rank)
        step = {"rank": rank, "part": part, "flat": flat, "half": 64 * whole, **tile}
        turn = {"cos": f"*{kind}", "sin": f"*{kind}", "turned": "i32"}
        yield triton_matmul._forward, tiles(kind, part) | turn, step, options
    sets = ((1, 16), (1, 64), (1, 128), (3, 16), (2, 64))
    for members, rank in ((members, rank) for members, rank in sets if rank in ranks):
        flat, part = triton_matmul.flat_of(members, rank * members)
        step = {"members": members, "ranks": rank * members, "part": part, "flat": flat, **tile}
        yield triton_matmul._backward, tiles(kind, part), step, options
    for rank, whole in cases:
        flat, part = triton_matmul.flat_of(1, 2 * rank)
        step = {"rank": rank, "part": part, "flat": flat, **tile, "tile_n": triton_swiglu._TILE_N}
        step |= {"keep": whole, "swapped": whole}
        yield triton_swiglu._gated_forward, gated_tiles(kind, part), step, options
    names = ("d_inner", "gate", "up", "p", "g_last", "b", "g_parts")
    sums = {"rank": triton_swiglu._PASS_RANK, "compiled": True}
    sums |= {"span": triton_swiglu.backward_span(ROWS, INNER, CPU)}
    sums |= {"tile_m": triton_swiglu._PASS_ROWS, "tile_n": triton_swiglu._PASS_COLUMNS}
    options = {"num_warps": 4, "num_stages": 3}
    yield triton_swiglu._gated_backward, dict.fromkeys(names, f"*{kind}"), sums, options
    span = triton_lora.pass_span([WIDTH] * 3, torch.empty(ROWS, 48, device="meta"))
    sums = {"rank": 16, "span": span, "tile_m": triton_lora._PASS_ROWS}
    sums |= {"tile_n": triton_lora._PASS_COLUMNS}
    types = dict.fromkeys(("dy0", "dy1", "dy2", "p", "b"), f"*{kind}")
    types |= {"dy_stride0": "i32", "dy_stride1": "i32", "dy_stride2": "i32"}
    yield triton_lora._adapter_pass, types, sums, {"num_warps": 8, "num_stages": 3}
    types = {"g": f"*{kind}", "scaling0": "fp32", "scaling1": "fp32", "scaling2": "fp32"}
    types |= {"spans": "i32", "tiles": "i32"}
    parts = {"members": 3, "rank": 16, "tile_n": 256, "lanes": 512, "flipped": True}
    yield triton_lora._sum_parts, types, parts, {}


def main() -> None:
    spec = DEVICES[sys.argv[1]]
    devices.spec_of = lambda _: spec
    kind = "bf16" if spec.has_bfloat16 else "fp16"
    major, minor = spec.capability
    seen, compiled_once = set(), set()
    for kernel, types, constants, options in kernels(kind):
        names = kernel.arg_names
        assert set(constants) == {p.name for p in kernel.params if p.is_constexpr}, kernel.__name__
        kinds = {
            name: "constexpr"
            if name in constants
            else types.get(name) or POINTERS.get(name) or ("i32" if name in INTEGERS else "*fp32")
            for name in names
        }
        if (
            kernel in compiled_once
            and kernel.__name__ not in PRODUCTS
            and sys.argv[1] not in ALL_OF_EACH
        ):
            continue
        compiled_once.add(kernel)
        # One that is a copy of another would be counted, and compile nothing.
        one = (kernel.__name__, str(kinds), str(constants), str(options))
        assert one not in seen, one
        seen.add(one)
        free = set(getattr(kernel, "do_not_specialize", []) or [])
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if (kinds[name][0] == "*" or kinds[name] == "i32") and name not in free
        }
        source = ASTSource(
            kernel,
            kinds,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        target = GPUTarget("cuda", 10 * major + minor, 32)
        compiled = triton.compile(source, target=target, options=options)
        print(kernel.__name__, compiled.metadata.shared, flush=True)


if __name__ == "__main__":
    main()
