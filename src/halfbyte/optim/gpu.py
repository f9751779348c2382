"""The rule on a GPU, in Triton: one launch for all parameters.

An update moves bytes, 16 for a float32 parameter with 8-bit state and 28 with 32-bit state, and
little is computed with them. So there is one kernel, started once; each program finds its parameter
in a table of addresses, and what depends on parameter and step in a row of `Scalars` that a first,
tiny launch computes on the device. Nothing waits for the host: the gradient's scale is read from
memory, and one that is not finite makes both launches change nothing.

Encoding must find the nearest of 256 levels. The leading digits of a value, as bits, are the number
of a cell; a table says which level is below the cell's midpoints, of which it has at most one, and
one comparison with that decides between this level and the next.

Bit for bit the plain PyTorch of rule.py: products and sums are not fused
(``enable_fp_fusion=False``), quotients and roots are those of IEEE 754.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.blockwise import SMALLEST_SCALE
from halfbyte.optim.layout import Piece
from halfbyte.optim.rule import BLOCK, FIRST_CELL, LAST_CELL, Scalars, bounds, cells, table

BLOCKS, WARPS = 4, 4  # blocks of 256 elements, and warps, in a program
_COLUMNS = tl.constexpr(11)
_SCALARS = tl.constexpr(len(Scalars._fields))
_FIRST_CELL, _LAST_CELL = tl.constexpr(FIRST_CELL), tl.constexpr(LAST_CELL)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)

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
def _spread(scale):
    """One value a block, as one an element."""
    blocks: tl.constexpr = scale.shape[0]
    return tl.reshape(tl.broadcast_to(scale[:, None], (blocks, 256)), (blocks * 256,))


@triton.jit
def _encode(x, scale, cells, middles, signed: tl.constexpr):
    """The code of each value, from the largest magnitude of each block."""
    # Triton takes a constant below the least normal float32 for a float64.
    least = tl.full(scale.shape, _SMALLEST_SCALE, tl.float32)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.maximum(scale, least))
    y = x * _spread(inverse)
    bits = y.to(tl.int32, bitcast=True)
    cell = tl.maximum(((bits & 0x7FFFFFFF) >> 16) - _FIRST_CELL, 0)
    cell = tl.minimum(cell, _LAST_CELL)  # what is no number stays within the table, too
    below = tl.load(cells + cell).to(tl.int32)
    if signed:
        # Zero is 127, and the level below a value under zero is the one with more magnitude.
        below = tl.maximum(127 + (below ^ (bits >> 31)), 0)
    code = below + (y > tl.load(middles + below)).to(tl.int32)
    return code if signed else tl.maximum(code, (x > 0.0).to(tl.int32))


@triton.jit
def _apply(
    row,
    chunk,
    own,
    factor,
    signed_levels,
    unsigned_levels,
    signed_middles,
    unsigned_middles,
    signed_cells,
    unsigned_cells,
    coded: tl.constexpr,
    dtype: tl.constexpr,
    master: tl.constexpr,
    blocks: tl.constexpr,
):
    """The rule for a chunk of a piece whose state is 8 bits wide (coded) or 32."""
    start = chunk * (blocks * 256)
    # Nothing is inside when the gradient's scale is not finite.
    count = tl.where(factor - factor == 0.0, tl.load(row + 1).to(tl.int32) - start, 0)
    where = tl.arange(0, blocks * 256)
    inside = where < count
    weights = tl.load(row + 2).to(tl.pointer_type(dtype)) + start
    grads = tl.load(row + 3).to(tl.pointer_type(dtype)) + start
    held = tl.load(row + 8).to(tl.pointer_type(tl.float32)) + start
    g = tl.load(grads + where, mask=inside, other=0.0).to(tl.float32) * factor
    if master:
        p = tl.load(held + where, mask=inside, other=0.0)
    else:
        p = tl.load(weights + where, mask=inside, other=0.0).to(tl.float32)
    kind: tl.constexpr = tl.uint8 if coded else tl.float32
    m_at = tl.load(row + 4).to(tl.pointer_type(kind)) + start
    v_at = tl.load(row + 5).to(tl.pointer_type(kind)) + start
    m = tl.load(m_at + where, mask=inside, other=0)
    v = tl.load(v_at + where, mask=inside, other=0)
    if coded:
        block = tl.arange(0, blocks)
        has = block * 256 < count
        m_scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + chunk * blocks + block
        v_scales = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + chunk * blocks + block
        m_scale = tl.load(m_scales, mask=has, other=0.0)
        v_scale = tl.load(v_scales, mask=has, other=0.0)
        m = tl.load(signed_levels + m.to(tl.int32)) * _spread(m_scale)
        v = tl.load(unsigned_levels + v.to(tl.int32)) * _spread(v_scale)
    m = m * tl.load(own + 3) + g * tl.load(own + 4)
    v = v * tl.load(own + 5) + (g * g) * tl.load(own + 6)
    step = tl.div_rn(m, tl.sqrt_rn(v) * tl.load(own + 2) + tl.load(own + 7))
    p = p * tl.load(own) - step * tl.load(own + 1)
    if master:
        tl.store(held + where, p, mask=inside)
    if dtype == tl.bfloat16 and not master:
        number = tl.load(row + 9)
        key = _hash((tl.load(own + 8).to(tl.int64) * 0x9E3779B9 + number).to(tl.uint32))
        place = (tl.load(row + 10) + start).to(tl.uint32) + where.to(tl.uint32)
        bits = p.to(tl.int32, bitcast=True) + (_hash(key + place) & 0xFFFF).to(tl.int32)
        p = (bits & -65536).to(tl.float32, bitcast=True)
    tl.store(weights + where, p.to(dtype), mask=inside)
    if coded:
        # What is not inside is zero, and no maximum.
        m = tl.where(inside, m, 0.0)
        m_scale = tl.max(tl.reshape(tl.abs(m), (blocks, 256)), axis=1)
        v_scale = tl.max(tl.reshape(v, (blocks, 256)), axis=1)
        tl.store(m_scales, m_scale, mask=has)
        tl.store(v_scales, v_scale, mask=has)
        m = _encode(m, m_scale, signed_cells, signed_middles, True).to(tl.uint8)
        v = _encode(v, v_scale, unsigned_cells, unsigned_middles, False).to(tl.uint8)
    tl.store(m_at + where, m, mask=inside)
    tl.store(v_at + where, v, mask=inside)


@triton.jit
def _update(
    rows,
    owners,
    scalars,
    scale,
    signed_levels,
    unsigned_levels,
    signed_middles,
    unsigned_middles,
    signed_cells,
    unsigned_cells,
    dtype: tl.constexpr,
    master: tl.constexpr,
    blocks: tl.constexpr,
):
    # A row is a piece: first program, elements, parameter, gradient, both moments, their scales
    # (zero where they are not coded), master copy, number of the parameter, first element.
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * _COLUMNS
    chunk = program - tl.load(row).to(tl.int32)
    own = scalars + tl.load(row + 9) * _SCALARS
    factor = tl.load(scale)
    if tl.load(row + 6) != 0:
        _apply(
            row,
            chunk,
            own,
            factor,
            signed_levels,
            unsigned_levels,
            signed_middles,
            unsigned_middles,
            signed_cells,
            unsigned_cells,
            True,
            dtype,
            master,
            blocks,
        )
    else:
        _apply(
            row,
            chunk,
            own,
            factor,
            signed_levels,
            unsigned_levels,
            signed_middles,
            unsigned_middles,
            signed_cells,
            unsigned_cells,
            False,
            dtype,
            master,
            blocks,
        )


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context to launch a kernel in: Triton looks at the current device only."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _cells(signed: bool, device: torch.device) -> Tensor:
    """rule.cells in bytes, so that what a warp asks for lies in few lines of the first cache."""
    return cells(signed, device).to(torch.uint8)


def prepare(steps: Tensor, active: Tensor, lr: Tensor, constants: Tensor, scale: Tensor) -> Tensor:
    """Count a step and compute `Scalars`, as rule.scalars_of does.

    Args:
        steps: float32 ``[n]``, counted up where ``active``, unless ``scale`` is not finite.
        active: float32 ``[n]``, 1 for parameters that are about to be updated, else 0.
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
    """One launch over the pieces of one group whose parameters have one type.

    Its table is on the device, and is sent anew, without waiting, when an address has changed.
    """

    def __init__(self, pieces: Sequence[Piece], memory: Tensor, base: int) -> None:
        """Note where the state is: ``memory`` is the run of bytes from ``base`` on."""
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
        grads: Sequence[Tensor | None],
        scalars: Tensor,
        scale: Tensor,
    ) -> None:
        """Update; parameters and gradients by number, `Scalars` from `prepare`."""
        numbers = [piece.index for piece in self._pieces]
        held = [grad for i in numbers if (grad := grads[i]) is not None]
        addresses = [
            (parameters[i].data_ptr(), grad.data_ptr())
            for i, grad in zip(numbers, held, strict=True)
        ]
        if addresses != self._addresses:
            if strange := {grad.dtype for grad in held} - {parameters[numbers[0]].dtype}:
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
                table(True, device),
                table(False, device),
                bounds(True, device),
                bounds(False, device),
                _cells(True, device),
                _cells(False, device),
                dtype=_TYPES[dtype],
                master=self._pieces[0].master,
                blocks=self._blocks,
                num_warps=WARPS,
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
    """The tensor on a device; the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
