"""The AdamW update on a GPU, in Triton: one launch for all parameters.

An update moves 16 bytes per float32 parameter with 8-bit state and 28 with 32-bit state. So there
is one kernel, launched once; each program finds its parameter in a table of addresses, and the
values that depend on parameter and step in a row of `Scalars`, which a first, tiny launch computes
on the device. Nothing waits for the host: the gradient's scale is read from memory, and if it is
not finite both launches change nothing.

With 8-bit state the update is bound by instructions: the memory bandwidth of an H100 allows 185 per
element. A lookup in a table in memory costs more in the load unit than it saves, so levels and
codes are computed (dynamic.py), and the constants of a decade are shuffled out of a register of the
warp. This takes 90, including loads and stores. A block of 256 is eight elements per lane of one
warp, in vectors of four; a chunk that is incomplete or not aligned is loaded and stored one by one.

Moments have the bits of reference.py, and with 32-bit state parameters, too: products and sums are
not fused (``enable_fp_fusion=False``), quotients and roots are those of IEEE 754. With 8-bit state
root and reciprocal are the hardware's approximations, since exact ones take 40 instructions: the
relative difference of an update is within 10⁻⁶, a thousandth of the error of eight bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.optim.buckets import StateChunk
from halfbyte.optim.dynamic import LEAST, ZERO_SIGNED, ZERO_UNSIGNED, tables
from halfbyte.optim.reference import BLOCK, Scalars
from halfbyte.quant.blockwise import SMALLEST_SCALE

# Blocks of 256 elements and warps per program; registers per lane.
BLOCKS, WARPS, REGISTERS = 4, 4, 64
_COLUMNS = tl.constexpr(11)
_SCALARS = tl.constexpr(len(Scalars._fields))
_LEAST = tl.constexpr(LEAST)
_ZERO_SIGNED, _ZERO_UNSIGNED = tl.constexpr(ZERO_SIGNED), tl.constexpr(ZERO_UNSIGNED)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)

# Seven tables of 32 entries: a lane loads its entry of each.
_LOADING = tl.constexpr(
    "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; mad.wide.u32 at, lane, 4, $7; "
    + " ".join(f"ld.global.nc.b32 ${i}, [at+{128 * i}];" for i in range(7))
    + " }"
)
_LOADED = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,l")
_SEVEN_INTEGERS = tl.constexpr((tl.int32,) * 7)
# Four bytes, each as the third of an integer whose first is 0x4B or 0x4F.
_SIGNED_BYTES, _UNSIGNED_BYTES = (
    tl.constexpr(" ".join(f"prmt.b32 ${i}, $4, {first}, 0x45{i}5;" for i in range(4)))
    for first in (0x4B, 0x4F)
)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _prepare(steps, active, lr, constants, scale, out, count, lanes: tl.constexpr):
    """Counts the step of every active parameter, and computes its scalars."""
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    inside = lane < count
    factor = tl.load(scale)
    counts = tl.where(factor - factor == 0.0, tl.load(active + lane, mask=inside, other=0.0), 0.0)
    step = tl.load(steps + lane, mask=inside, other=1.0) + counts
    tl.store(steps + lane, step, mask=inside)
    t = step.to(tl.float64)
    rate = tl.load(lr + lane, mask=inside, other=0.0).to(tl.float64)
    beta1 = tl.load(constants + lane * 6, mask=inside, other=0.0)
    beta2 = tl.load(constants + lane * 6 + 1, mask=inside, other=0.0)
    eps = tl.load(constants + lane * 6 + 2, mask=inside, other=0.0)
    weight_decay = tl.load(constants + lane * 6 + 3, mask=inside, other=0.0)
    log1 = tl.load(constants + lane * 6 + 4, mask=inside, other=-1.0)
    log2 = tl.load(constants + lane * 6 + 5, mask=inside, other=-1.0)
    row = out + lane * _SCALARS
    tl.store(row, (1 - rate * weight_decay).to(tl.float32), mask=inside)
    tl.store(row + 1, (rate / (1 - tl.exp(t * log1))).to(tl.float32), mask=inside)
    tl.store(row + 2, (1 / tl.sqrt(1 - tl.exp(t * log2))).to(tl.float32), mask=inside)
    tl.store(row + 3, beta1.to(tl.float32), mask=inside)
    tl.store(row + 4, (1 - beta1).to(tl.float32), mask=inside)
    tl.store(row + 5, beta2.to(tl.float32), mask=inside)
    tl.store(row + 6, (1 - beta2).to(tl.float32), mask=inside)
    tl.store(row + 7, eps.to(tl.float32), mask=inside)
    tl.store(row + 8, step, mask=inside)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rows(tables, shuffled: tl.constexpr):
    """The seven tables: their addresses, or one register each, with one entry per lane."""
    if shuffled:
        return tl.inline_asm_elementwise(
            _LOADING, _LOADED, [tables.to(tl.int64)], dtype=_SEVEN_INTEGERS, is_pure=True, pack=1
        )
    else:
        t = tables
        return t, t + 32, t + 64, t + 96, t + 128, t + 160, t + 192


@triton.jit
def _pick(row, index, shuffled: tl.constexpr):
    """The entry selected by the last five bits of the index, int32."""
    if shuffled:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;",
            "=r,r,r",
            [row, index],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(row + (index & 31))


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _decode(codes, scales, one, signed: tl.constexpr, shuffled: tl.constexpr):
    """The level of each code, as `dynamic.levels` has it."""
    # A byte in the fraction of a power of two, less that power: 256 times the code, or 2¹⁶ times.
    if shuffled:
        shifted = tl.inline_asm_elementwise(
            _SIGNED_BYTES if signed else _UNSIGNED_BYTES,
            "=r,=r,=r,=r,r",
            [codes],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        shifted = (codes.to(tl.int32) << 8) | (0x4B000000 if signed else 0x4F000000)
    if signed:
        middle = _float(shifted) - (8388608.0 + 127 * 256)
        number = tl.abs(middle) + 128  # 128 · (2·position + 1)
    else:
        number = _float(shifted) - (2147483648.0 - 3 * 32768)
    bits = _bits(number)
    fraction = _float((bits & 0x007FFFFF) | one)
    level = _float(_pick(scales, bits >> 23, shuffled)) * tl.fma(fraction, 9.0, -8.0)
    if signed:
        level = _float(_bits(level) | (_bits(middle) & -2147483648))
    return level


@triton.jit
def _encode(y, row1, row2, row3, signed: tl.constexpr, zero: tl.constexpr, shuffled: tl.constexpr):
    """The nearest code of each value in [-1, 1]; `dynamic.bounds` by its formula."""
    size = tl.maximum(tl.abs(y), _LEAST)
    bits = _bits(size)
    index = (bits + _pick(row1, bits >> 23, shuffled)) >> 23
    factor, summand = _float(_pick(row2, index, shuffled)), _float(_pick(row3, index, shuffled))
    place = tl.minimum(size * factor + summand, tl.fma(summand, 2.25, 0.125))
    if signed:
        place = tl.maximum(_float(_bits(place) | (_bits(y) & -2147483648)), -127.0)
    return _bits(place + zero)


@triton.jit
def _rounded(p, row, own, places):
    """Returns p rounded to bfloat16 at random, as float32."""
    number = tl.load(row + 9)
    key = _hash((tl.load(own + 8).to(tl.int64) * 0x9E3779B9 + number).to(tl.uint32))
    bits = _bits(p) + (_hash(key + places.to(tl.uint32)) & 0xFFFF).to(tl.int32)
    return _float(bits & -65536)


@triton.jit
def _advance(p, g, m, v, own, exact: tl.constexpr, shuffled: tl.constexpr):
    """The rule between loads and stores: the new p, m and v."""
    m = m * tl.load(own + 3) + g * tl.load(own + 4)
    v = v * tl.load(own + 5) + (g * g) * tl.load(own + 6)
    if exact:
        step = tl.div_rn(m, tl.sqrt_rn(v) * tl.load(own + 2) + tl.load(own + 7))
    else:
        root = tl.sqrt(v) * tl.load(own + 2) + tl.load(own + 7)
        if shuffled:
            step = m * tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [root], tl.float32, is_pure=True, pack=1
            )
        else:
            step = m / root
    return p * tl.load(own) - step * tl.load(own + 1), m, v


@triton.jit
def _at(column, start, dtype: tl.constexpr, whole: tl.constexpr):
    """Address of a chunk, given that of its piece; aligned to four elements if whole."""
    at = tl.load(column).to(tl.pointer_type(dtype))
    if whole:
        at = tl.multiple_of(at, 4 * (dtype.primitive_bitwidth // 8))
    return at + start


@triton.jit
def _read(at, where, count, whole: tl.constexpr):
    if whole:
        return tl.load(at + where)
    else:
        return tl.load(at + where, mask=where < count, other=0)


@triton.jit
def _write(at, where, count, value, whole: tl.constexpr):
    if whole:
        tl.store(at + where, value)
    else:
        tl.store(at + where, value, mask=where < count)


@triton.jit
def _apply(
    row,
    start,
    count,
    own,
    factor,
    tables,
    coded: tl.constexpr,
    whole: tl.constexpr,
    shuffled: tl.constexpr,
    dtype: tl.constexpr,
    master: tl.constexpr,
    blocks: tl.constexpr,
):
    """The rule for the `count` elements from `start` on of a piece, in 8 bits (coded) or 32."""
    # A block is in one warp: two times four adjacent elements per lane.
    block = tl.arange(0, blocks)[:, None, None]
    where = block * 256 + tl.arange(0, 2)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    kind: tl.constexpr = tl.uint8 if coded else tl.float32
    weights, grads = _at(row + 2, start, dtype, whole), _at(row + 3, start, dtype, whole)
    m_at, v_at = _at(row + 4, start, kind, whole), _at(row + 5, start, kind, whole)
    held = _at(row + 8, start, tl.float32, whole)
    g = _read(grads, where, count, whole).to(tl.float32) * factor
    m, v = _read(m_at, where, count, whole), _read(v_at, where, count, whole)
    if master:
        p = _read(held, where, count, whole)
    else:
        p = _read(weights, where, count, whole).to(tl.float32)
    if coded:
        m_scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + start // 256 + block
        v_scales = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + start // 256 + block
        has = block * 256 < count
        m_scale = tl.load(m_scales, mask=has, other=0.0)
        v_scale = tl.load(v_scales, mask=has, other=0.0)
    if shuffled:
        # Prevents the compiler from moving loads below this, so that all are in flight together.
        tl.inline_asm_elementwise(
            "bar.warp.sync -1; mov.b32 $0, $1;", "=r,r", [count], tl.int32, is_pure=False, pack=1
        )
    if coded:
        r = _rows(tables, shuffled)
        one = tl.load(tables + 31)  # of two constants in a LOP3, one must be in a register
        m = _decode(m, r[0], one, True, shuffled) * m_scale
        v = _decode(v, r[0], one, False, shuffled) * v_scale
    p, m, v = _advance(p, g, m, v, own, not coded, shuffled)
    if master:
        _write(held, where, count, p, whole)
    if dtype == tl.bfloat16 and not master:
        p = _rounded(p, row, own, tl.load(row + 10) + start + where)
    _write(weights, where, count, p.to(dtype), whole)
    if coded:
        if not whole:
            m = tl.where(where < count, m, 0.0)
            v = tl.where(where < count, v, 0.0)
        m_scale, v_scale = _largest(m), _largest(v)
        tl.store(m_scales, m_scale, mask=has)
        tl.store(v_scales, v_scale, mask=has)
        y = m * _inverse(m_scale)
        m = _encode(y, r[1], r[2], r[3], True, _ZERO_SIGNED, shuffled).to(tl.uint8)
        y = v * _inverse(v_scale)
        code = _encode(y, r[4], r[5], r[6], False, _ZERO_UNSIGNED, shuffled)
        v = tl.where(v > 0.0, code, 0).to(tl.uint8)
    _write(m_at, where, count, m, whole)
    _write(v_at, where, count, v, whole)


@triton.jit
def _largest(x):
    """The largest magnitude of each block; floats that are not negative compare as integers."""
    bits = _bits(tl.max(tl.abs(x), 1, keep_dims=True))
    return _float(tl.max(bits, 2, keep_dims=True))


@triton.jit
def _inverse(scale):
    # Triton takes a constant below the least normal float32 for a float64.
    least = tl.full(scale.shape, _SMALLEST_SCALE, tl.float32)
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.maximum(scale, least))


@triton.jit
def _update(
    rows,
    owners,
    scalars,
    scale,
    tables,
    shuffled: tl.constexpr,
    dtype: tl.constexpr,
    master: tl.constexpr,
    blocks: tl.constexpr,
):
    # A row is a piece: first program, elements, parameter, gradient, both moments, their scales
    # (zero if not coded), master copy, index of the parameter, first element.
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * _COLUMNS
    start = (program - tl.load(row).to(tl.int32)) * (blocks * 256)
    own = scalars + tl.load(row + 9) * _SCALARS
    factor = tl.load(scale)
    # The mask is empty if the gradient's scale is not finite.
    count = tl.where(factor - factor == 0.0, tl.load(row + 1).to(tl.int32) - start, 0)
    whole = (count >= blocks * 256) & (((tl.load(row + 2) | tl.load(row + 3)) & 15) == 0)
    coded = tl.load(row + 6) != 0
    if coded & whole:
        _apply(row, start, count, own, factor, tables, True, True, shuffled, dtype, master, blocks)
    elif coded:
        _apply(row, start, count, own, factor, tables, True, False, shuffled, dtype, master, blocks)
    elif whole:
        _apply(row, start, count, own, factor, tables, False, True, shuffled, dtype, master, blocks)
    else:
        _apply(
            row, start, count, own, factor, tables, False, False, shuffled, dtype, master, blocks
        )


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context to launch a kernel in: Triton looks at the current device only."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def prepare(steps: Tensor, active: Tensor, lr: Tensor, constants: Tensor, scale: Tensor) -> Tensor:
    """Count a step and compute `Scalars`, as rule.scalars_of does.

    Args:
        steps: float32 ``[n]``, counted up where ``active``, unless ``scale`` is not finite.
        active: float32 ``[n]``, 1 for parameters to be updated, else 0.
        lr: float32 ``[n]``.
        constants: float64 ``[n, 6]``: β1, β2, ε, λ, log β1, log β2.
        scale: float32 scalar.

    Returns:
        float32 ``[n, len(Scalars)]``.
    """
    count = len(steps)
    out = steps.new_empty(count, len(Scalars._fields))
    with _on(steps):
        _prepare[(triton.cdiv(count, 256),)](
            steps, active, lr, constants, scale, out, count, lanes=256, enable_fp_fusion=False
        )
    return out


class Launch:
    """One launch over the pieces of one group whose parameters have one dtype.

    Its table is on the device, and is copied again, asynchronously, when an address has changed.
    """

    def __init__(self, pieces: Sequence[StateChunk], memory: Tensor, base: int) -> None:
        """Store the location of the state: ``memory`` is the range of bytes from ``base`` on."""
        self._pieces = pieces
        self._state = [
            {name: view.data_ptr() for name, view in piece.views(memory, base).items()}
            for piece in pieces
        ]
        self._blocks = BLOCKS
        programs = [triton.cdiv(piece.count, BLOCKS * BLOCK) for piece in pieces]
        self._firsts = [sum(programs[:i]) for i in range(len(programs))]
        owners = torch.arange(len(pieces), dtype=torch.int32).repeat_interleave(
            torch.tensor(programs)
        )
        self._owners = _sent(owners, memory.device)
        self._addresses: list[tuple[int, int]] = []
        self._rows = self._owners

    def __call__(
        self,
        parameters: Sequence[Tensor],
        grads: Mapping[int, Tensor],
        scalars: Tensor,
        scale: Tensor,
    ) -> None:
        """Update; parameters and gradients by index, `Scalars` from `prepare`."""
        numbers = [piece.index for piece in self._pieces]
        addresses = [(parameters[i].data_ptr(), grads[i].data_ptr()) for i in numbers]
        if addresses != self._addresses:
            if strange := {grads[i].dtype for i in numbers} - {parameters[numbers[0]].dtype}:
                raise TypeError(f"a gradient must be of its parameter's type, not {strange}")
            self._addresses = addresses
            self._rows = self._table(parameters[numbers[0]].itemsize)
        device = self._rows.device
        dtype = parameters[numbers[0]].dtype
        with _on(self._rows):
            _update[(len(self._owners),)](
                self._rows,
                self._owners,
                scalars,
                scale,
                tables(device),
                shuffled=device.type == "cuda",
                dtype=_TYPES[dtype],
                master=self._pieces[0].master,
                blocks=self._blocks,
                num_warps=WARPS,
                maxnreg=REGISTERS,
                enable_fp_fusion=False,
            )

    def _table(self, itemsize: int) -> Tensor:
        rows = []
        for first, piece, state, (weights, grads) in zip(
            self._firsts, self._pieces, self._state, self._addresses, strict=True
        ):
            skipped = piece.start * itemsize
            row = [first, piece.count, weights + skipped, grads + skipped]
            names = ("exp_avg", "exp_avg_sq", "exp_avg_scales", "exp_avg_sq_scales", "master")
            rows.append([*row, *(state.get(n, 0) for n in names), piece.index, piece.start])
        return _sent(torch.tensor(rows, dtype=torch.int64), self._owners.device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, copied asynchronously."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
