"""Predicts the time of an optimizer step with a roofline model, at measured fractions of the peak.

A step is matrix products, whose time is that of their operations, and everything else, whose time
is that of its bytes. With P weights in linear layers, N tokens per step, and a the fraction of
layers recomputed in backward:

    products     2·N·(2·P + a·R)         forward, the input's gradient, and recomputed forward; in
                                         fused layers without the last product (R weights instead
                                         of P), whose result is not needed, and with an attention
                                         checkpoint without attention's output projection
    head         2·V·H·N·2
    attention    2·T·Q·N per layer       forward, causal, and recomputed unless checkpointed;
                                         backward takes 2.5 times that
    decoding     2·(packed + decoded)    bytes: once per direction for tokens that go through the
                                         layers together (a packed part, else all micro-batches of
                                         a step), for layers whose decoded weights are not kept
    elementwise  (3 + 0.3·a)·kept        bytes, as measured (`MOVED`); and 2 + a times the copies of
                                         adapters
    rounding     3·widths                bytes, of products in 8 bits: of their inputs, forward and
                                         again, and of the gradients of their outputs
    optimizer    12 + 2·moments          bytes per trained parameter

Transfers of offloaded inputs and of streamed weights overlap with computation; only the excess
counts. On a GPU kernels
also have to be launched. Fused layers are launched as CUDA graphs; if Python launches each kernel,
and is slower than the GPU, the host's time counts.

Fractions of the peak. On an H100 the bare products of a Llama-2-7B layer reach 688 of 989 TFLOP/s
at 8192 tokens, at the power limit (benchmarks/results/2026-11-24_gpu_linear.json), and a copy moves
3.02 of 3.35 TB/s. Other GPUs are assumed to reach the same fractions, which was not measured.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from halfbyte.errors import ConfigError
from halfbyte.plan.activation_cost import FP8_SPEEDUP
from halfbyte.plan.holding import Packed, held
from halfbyte.plan.ledger import Run
from halfbyte.plan.model_shape import ModelShape
from halfbyte.runtime import device as devices
from halfbyte.runtime.device import DeviceSpec

PRODUCT_SHARE = 688 / 989
COPY_SHARE = 3.02 / 3.35
# Attention's products are small, and softmax is between them: smaller yet where documents are
# shorter than `_LONG`, and heads narrower than `_WIDE_HEAD`. Products of models narrower than
# `_WIDE` are small, too. Of SmolLM2's step on chats an H200's kernels took 28 ms: attention 9.4
# where long rows of wide heads would take 1.7, products 11.5 where wide ones would take 4.1.
ATTENTION_SHARE = 0.5
# Long parts on Hopper take cuDNN's kernels: 616 TFLOP/s forward and 547 backward of 65,536 tokens,
# of 688 (2026-11-30_gpu_attention.json).
LONG_ATTENTION_SHARE = 0.82
_LONG, _WIDE_HEAD, _WIDE = 2048, 128, 1600
# How often what a layer keeps goes through memory between its products, forward and backward, and
# when it is recomputed: gpu_step_forms.json, 4x2048, less all the rest.
MOVED, MOVED_AGAIN = 3.0, 0.3
# A processor's step against its own products of 1024x1024x1024: cpu_step.json, "halfbyte-nf4-bf16".
CPU_SHARE = 0.8

# Seconds in which Python launches a layer's forward, rerun and backward for one micro-batch:
# 3441 ms for 16 micro-batches and 32 layers, on the host of an H100, without CUDA graphs.
LAUNCH_SECONDS = 3.441 / 16 / 32


# Bytes per second of an NVMe disk, sequentially, and of copies between two GPUs by NVLink.
DISK_BANDWIDTH, NVLINK_BANDWIDTH = 3e9, 200e9

# A kernel takes at least 3 µs on a GPU, and a layer's forward, recomputation and backward launch
# about 80 besides the products.
_SMALL_KERNELS = 80 * 3e-6


class GpuSpec(NamedTuple):
    """How fast a device is, where `DeviceSpec` is what its kernels can do.

    A driver does not tell of speeds: they are the makers' figures, or measured. So they are a table
    apart, and only forecasts depend on it, and how wide a model must be for attention's output to
    be offloaded.

    Attributes:
        name: Its name.
        memory: Bytes available to a process.
        flops: Operations per second of products in the training dtype, as reached in practice.
        bandwidth: Bytes per second that a copy reads and writes.
        link: Bytes per second to and from the host.
        itemsize: Bytes of the training dtype.
        device: ``cuda`` or ``cpu``.
        measured: Whether these were measured on this machine.
        capability: CUDA compute capability of a GPU.
        num_sms: Number of its streaming multiprocessors.
        nvlink: Whether GPUs of this kind are usually connected by NVLink.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    itemsize: int = 2
    device: str = "cuda"
    measured: bool = False
    capability: tuple[int, int] = (0, 0)
    num_sms: int = 0
    nvlink: bool = False

    @property
    def has_peer_access(self) -> bool:
        """Whether GPUs of this kind can read each other's memory: GeForce drivers refuse it."""
        return not self.name.startswith("RTX")

    @property
    def peer_link(self) -> float:
        """Bytes per second from another GPU of the machine."""
        return NVLINK_BANDWIDTH if self.nvlink else self.link

    @property
    def gpu(self) -> DeviceSpec:
        """The properties that kernels, and so the memory of a step, depend on."""
        return DeviceSpec(self.name, self.capability, self.num_sms, int(self.memory))

    @property
    def checkpoint_width(self) -> int:
        """The width at which a layer takes as long as offloading its input and attention.

        These are three activations as wide as the residual stream, 6 bytes per token and width in
        16 bits. A Llama layer has 12 weights per square of its width, each used once in forward.
        Without flash attention more than its output is kept, in 32 bits all attention weights,
        which is too much to offload at any width.
        """
        flash = self.itemsize == 2 and self.gpu.has_flash_attention
        return int(self.flops / (4 * self.link)) if flash else sys.maxsize


def _of_table(
    name: str,
    gigabytes: float,
    teraflops: float,
    gigabytes_s: float,
    link: float,
    capability: tuple[int, int],
    num_sms: int,
) -> GpuSpec:
    return GpuSpec(
        name,
        gigabytes * 1e9,
        teraflops * 1e12 * PRODUCT_SHARE,
        gigabytes_s * 1e9 * COPY_SHARE,
        link * 1e9,
        capability=capability,
        num_sms=num_sms,
        nvlink=name.startswith(("A100", "H100", "H200", "B200")),
    )


# The manufacturers' figures: memory available to a program, dense bfloat16 products with float32
# sums, memory bandwidth, effective PCIe bandwidth of page-locked copies, compute capability and
# streaming multiprocessors. The T4 has no bfloat16 units, so its products are those of float16.
CARDS = {
    "t4": _of_table("T4", 15.6, 65, 320, 12, (7, 5), 40),
    "3060": _of_table("RTX 3060", 12.6, 25.5, 360, 25, (8, 6), 28),
    "4060": _of_table("RTX 4060", 8.2, 30, 272, 13, (8, 9), 24),
    "4080": _of_table("RTX 4080", 16.8, 97.5, 717, 25, (8, 9), 76),
    "3090": _of_table("RTX 3090", 25.3, 71, 936, 25, (8, 6), 82),
    "4090": _of_table("RTX 4090", 25.3, 165, 1008, 25, (8, 9), 128),
    "l4": _of_table("L4", 23.6, 121, 300, 25, (8, 9), 58),
    "a10": _of_table("A10", 23.6, 125, 600, 25, (8, 6), 72),
    "a100-40": _of_table("A100 40 GB", 42.4, 312, 1555, 25, (8, 0), 108),
    "a100-80": _of_table("A100 80 GB", 85.0, 312, 2039, 25, (8, 0), 108),
    "h100": _of_table("H100 80 GB", 85.0, 989, 3350, 55, (9, 0), 132),
    "h200": _of_table("H200", 150.0, 989, 4800, 55, (9, 0), 132),
    "b200": _of_table("B200", 191.0, 2250, 8000, 55, (10, 0), 148),
}
HERE = "this-machine"


def card_named(name: str) -> GpuSpec:
    """Return a GPU of the table, or this machine, which is measured.

    Raises:
        ConfigError: If there is no such GPU in the table.
    """
    key = name.lower().replace(" ", "-").removeprefix("rtx-").removesuffix("-sxm")
    if key == HERE:
        return measure_machine()
    found = CARDS.get(key) or CARDS.get(key.removesuffix("-80")) or CARDS.get(f"{key}-80")
    if found is None:
        raise ConfigError(f"--card: expected one of {', '.join(CARDS)}, {HERE}, got {name!r}")
    return found


def gpu_of_driver(name: str) -> GpuSpec | None:
    """Return the GPU of the table whose name in the driver is ``name``, or None."""
    words = set(re.split(r"[\s-]+", name.lower()))
    for key, card in CARDS.items():
        kind, _, gigabytes = key.partition("-")
        if kind in words and (not gigabytes or f"{gigabytes}gb" in words):
            return card
    return None


class Seconds(NamedTuple):
    """The time of a step by part, in seconds.

    Attributes:
        products: Products of the linear layers.
        head: Products of the output head.
        attention: Its two products, forward and backward.
        decoding: Decoding 4-bit weights.
        elementwise: Elementwise operations and adapters.
        optimizer: The update.
        waiting: Waiting for transfers from the host.
        launching: The host's time for launching all of it, in parallel to the rest.
    """

    products: float
    head: float
    attention: float
    decoding: float
    elementwise: float
    optimizer: float
    waiting: float
    launching: float

    @property
    def total(self) -> float:
        """The time of a step."""
        return max(sum(self[:-1]), self.launching)


def step_seconds(
    shape: ModelShape, run: Run, card: GpuSpec, *, launch: float | None = None
) -> Seconds:
    """Predict the time of one optimizer step.

    Args:
        shape: The model.
        run: The step; its policy says how many layers are recomputed.
        card: The device.
        launch: Host time per layer and part, in seconds; by default 0 if passes are CUDA graphs,
            which requires packed examples, otherwise `LAUNCH_SECONDS`.
    """
    run = replace(run, fused=run.fused and shape.fusable)
    if launch is None:
        launch = 0.0 if run.graphs and run.packs else LAUNCH_SECONDS
    tokens, layer, e = run.tokens, run.layer(shape), run.holding.itemsize
    layers = max(1, shape.layers)
    # Weights are decoded, and inputs are offloaded and fetched, once per part.
    cost, passes = run.step_cost(shape), tokens / max(1, run.tokens_under_way)
    again = 1 - run.policy.saved / layers
    linears = shape.linears()
    numel = sum(weight.numel for weight in linears)
    last = sum(weight.numel for weight in linears if weight.name.endswith(".down_proj.weight"))
    rerun = numel - last if run.fused else numel
    if shape.mixture is not None:
        # Of their products, down is not computed again.
        active = shape.expert_parameters * shape.mixture.per_token // shape.mixture.experts
        numel, rerun = numel + active, rerun + active - active // (2 + shape.mixture.gated)
    # With an attention checkpoint, neither attention nor its output projection is recomputed.
    attention_kept = run.policy.attention_checkpoints / layers
    after = sum(weight.numel for weight in linears if weight.name.endswith(".o_proj.weight"))
    # Inputs that are not kept take another forward.
    sparse = run.policy.offloaded or layers - run.policy.saved
    twice = (sparse - -(-sparse // run.policy.every)) / layers
    decoding = {
        role: sum(
            sum(size) + weight.numel * e
            for weight in shape.weights
            if weight.role == role and isinstance(size := held(weight, shape, run.holding), Packed)
        )
        for role in ("linear", "experts")
    }
    kept = sum(layer.kept().values())
    adapters = e * sum(sum(weight.shape) for weight in run.adapted(shape)) / layers
    moved = (MOVED + MOVED_AGAIN * again) * kept + (2 + again) * adapters
    forward = 2 * run.length * shape.query * tokens * shape.layers
    trained = sum(run.rank * sum(weight.shape) for weight in run.adapted(shape))
    state = 2 if run.optimizer.endswith("8bit") else 8
    parts = tokens / max(1, run.part_tokens) if card.device == "cuda" else 0.0
    flops, attended = card.flops, ATTENTION_SHARE
    if card.device == "cuda":
        flops *= min(1.0, shape.hidden / _WIDE)
        head_dim = shape.query / max(1, shape.heads)
        attended *= min(1.0, run.length / _LONG) ** 0.5 * min(1.0, head_dim / _WIDE_HEAD)
        if layer.is_tiled(run.part_tokens) and run.gpu.is_hopper:
            attended *= LONG_ATTENTION_SHARE / ATTENTION_SHARE
    rounded = 0.0
    if run.multiplies_fp8 and shape.mixture is None:  # experts stay in 16 bits
        flops *= FP8_SPEEDUP
        inputs_of = 2 * shape.hidden + shape.query
        outputs_of = 2 * (shape.hidden + shape.intermediate) + shape.query + 2 * shape.key_value
        widths = (1 + again) * inputs_of + shape.intermediate + outputs_of
        rounded = 3 * tokens * shape.layers * widths / card.bandwidth
    found = Seconds(
        products=2
        * tokens
        * ((2 + twice) * numel + again * rerun - attention_kept * after)
        / flops,
        head=4 * shape.vocabulary * shape.hidden * tokens / card.flops,
        attention=forward * (1 + 2.5 + again + twice - attention_kept) / (card.flops * attended),
        decoding=2
        * passes
        * (decoding["linear"] * (1 - run.policy.decoded / layers) + decoding["experts"])
        / card.bandwidth,
        elementwise=rounded
        + shape.layers * (tokens * moved / card.bandwidth + parts * _SMALL_KERNELS),
        optimizer=trained * (12 + 2 * state) / card.bandwidth,
        waiting=0.0,
        launching=launch * shape.layers * parts,
    )
    # Transfers overlap with the products of their direction. Inputs go to the host in forward and
    # back in backward; streamed weights come in both, and a bus is as fast in both directions.
    inputs = cost.host_bytes(run.policy) * passes / card.link
    link = {"disk": DISK_BANDWIDTH, "gpus": card.peer_link}.get(run.waits or "", card.link)
    weights = run.policy.streamed * cost.weights * passes / link
    forward_share = 1 / (2 + again)
    waiting = max(0.0, max(inputs, weights) - forward_share * found.total)
    waiting += max(0.0, inputs + weights - (1 - forward_share) * found.total)
    return found._replace(waiting=waiting)


def measure_machine() -> GpuSpec:
    """Measure this machine: times products and a copy for about a second."""
    import torch

    from halfbyte.runtime.precision import choose_device_and_dtype

    device, dtype, _ = choose_device_and_dtype("auto", "auto")
    on_gpu = device == "cuda"
    # On a CPU both sides of the copy must fit into heap memory freed by the loss: with 2**24, a run
    # that measures this in the middle grew by 67 MB.
    size, count = (8192, 2**28) if on_gpu else (1024, 3 * 2**21)
    from halfbyte.runtime.matmul import product

    one = torch.randn(size, size).to(device, dtype)
    flops = 2 * size**3 / _fastest(lambda: product(one, one), on_gpu)
    here = torch.zeros(count, dtype=torch.float32, device=device)
    there = torch.empty_like(here)
    bandwidth = 2 * here.nbytes / _fastest(lambda: there.copy_(here), on_gpu)
    link = bandwidth
    if on_gpu:
        host = torch.empty(count // 4, dtype=torch.float32, pin_memory=True)
        link = host.nbytes / _fastest(lambda: host.copy_(here[: count // 4]), on_gpu)
    e = dtype.itemsize
    if not on_gpu:
        speeds = flops * CPU_SHARE, bandwidth, link
        return GpuSpec("this machine's processor", _available(), *speeds, e, device, True)
    spec, memory = devices.spec_of(torch.device(device)), float(torch.cuda.mem_get_info()[0])
    speeds = flops, bandwidth, link
    return GpuSpec(spec.name, memory, *speeds, e, device, True, spec.capability, spec.num_sms)


def _available() -> float:
    """Return the bytes of memory available to a new process, including reclaimable page cache."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _fastest(work: Callable[[], object], on_gpu: bool) -> float:
    """Return the seconds of the fastest of ten calls, after two for warm-up."""
    import time

    import torch

    times = []
    for _ in range(12):
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[2:])
