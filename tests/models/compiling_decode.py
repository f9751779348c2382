"""Compiles the kernels of a step of decoding for a GPU that is not here; run by test_gpu_decode.

    python -m tests.models.compiling_decode h100

As tests/compiling.py, whose loop it is, with kernels of its own.
"""

from halfbyte.layers import triton_kv_cache
from tests import compiling

SHAPES = {"llama3-8b": (4, 128), "smollm2": (3, 64), "wide": (8, 256)}


def kernels(kind: str):
    """Yields (kernel, types that differ from the usual, constants, options)."""
    names = ("q", "k", "v", "cos", "sin", "keys", "values", "out")
    types = dict.fromkeys(names, f"*{kind}") | {"positions": "*i64", "scale": "fp32"}
    integers = ("q_heads", "heads", "capacity", "window", "q_stride", "k_stride", "v_stride")
    types |= dict.fromkeys(integers, "i32")
    for repeat, width in SHAPES.values():
        turned = {"half": width // 2, "lanes": width // 2, "count": triton_kv_cache.TURNED}
        yield triton_kv_cache._turn_and_store, types, turned, {"num_warps": 4}
        step, options = triton_kv_cache.shape_of(repeat, width, 2)
        yield triton_kv_cache._attend_part, types, step, options
        joined = {"width": width, "lanes": step["lanes"], "parts": 8}
        yield triton_kv_cache._join_parts, types, joined, {"num_warps": 1}
    step, options = triton_kv_cache.shape_of(4, 128, 4)
    yield triton_kv_cache._attend_part, types | dict.fromkeys(names, "*fp32"), step, options


if __name__ == "__main__":
    compiling.kernels = kernels
    compiling.hopper_kernels = lambda kind: []
    compiling.main()
