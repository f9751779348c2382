"""The encoders of GGUF's K-quants: q3_k, q4_k, q5_k and q6_k, bit-identical to ggml's.

The decoders are in ``gguf_blocks``. A block of 256 numbers has sub-blocks of 16 or 32, each with a
scale (and a minimum), which are themselves rounded to 6 or 8 bits with one float16 for the block.
Scales are found by a search: a few grids are tried, and for each the scale that is best for its
codes in the sense of weighted least squares. The specification is ggml's reference code
(``ggml-quants.c``: ``make_qkx2_quants``, ``make_qx_quants``, ``make_q3_quants``); to give its bits,
sums are accumulated number by number, in its order. Here, all sub-blocks of a tensor go through
each step together: a value is a row, a sub-block a column.

Tensors are float32 [numbers of a sub-block, sub-blocks], as are codes; scales [sub-blocks].
"""

import torch
from torch import Tensor

_LEAST = 1e-15  # a sub-block of smaller numbers is zeros


def to_q4_k(blocks: Tensor) -> Tensor:
    """Encode blocks, float32 [N, 256], as uint8 [N, 144]."""
    head, codes = _scales_and_minima(blocks, 15, first=-1.0, steps=20)
    low, high = codes.view(-1, 4, 2, 32).unbind(2)
    return torch.cat((head, (low | (high << 4)).flatten(1)), 1)


def to_q5_k(blocks: Tensor) -> Tensor:
    """Encode blocks, float32 [N, 256], as uint8 [N, 176]."""
    head, codes = _scales_and_minima(blocks, 31, first=-0.5, steps=15)
    low, high = (codes & 15).view(-1, 4, 2, 32).unbind(2)
    fifth = _packed(codes >> 4, 1)
    return torch.cat((head, fifth, (low | (high << 4)).flatten(1)), 1)


def to_q6_k(blocks: Tensor) -> Tensor:
    """Encode blocks, float32 [N, 256], as uint8 [N, 210]."""
    values = blocks.view(-1, 16).T.contiguous()
    scales, codes = _symmetric(values, 32)
    largest = _of_largest_size(scales.view(-1, 16))
    inverse = torch.where(largest.abs() < _LEAST, 0.0, _over(-128, largest))
    rounded = _nearest(inverse[:, None] * scales.view(-1, 16)).clamp(max=127)
    step = torch.where(inverse == 0, 0.0, inverse.reciprocal()).half()
    decoded = (step.float()[:, None] * rounded).view(-1)
    again = _nearest(values / decoded).clamp(-32, 31)
    codes = torch.where((decoded == 0) | (inverse == 0).repeat_interleave(16), codes, again)
    codes = torch.where((inverse == 0).repeat_interleave(16), -32.0, codes)
    whole = (codes + 32).to(torch.uint8).T.reshape(-1, 2, 4, 32)
    a, b, c, d = (whole & 15).unbind(2)
    low = torch.stack((torch.cat((a, b), -1), torch.cat((c, d), -1)), -2)
    first, second = low.unbind(-2)
    parts = (
        (first | (second << 4)).flatten(1),
        _packed(whole.flatten(1) >> 4, 2),
        rounded.to(torch.int8).view(torch.uint8),
        step[:, None].view(torch.uint8),
    )
    return torch.cat(parts, 1)


def to_q3_k(blocks: Tensor) -> Tensor:
    """Encode blocks, float32 [N, 256], as uint8 [N, 110]."""
    values = blocks.view(-1, 16).T.contiguous()
    scales, codes = _symmetric_by_exchange(values, 4)
    largest = _of_largest_size(scales.view(-1, 16))
    zero = largest == 0
    inverse = torch.where(zero, 0.0, _over(-32, largest))
    rounded = _nearest(inverse[:, None] * scales.view(-1, 16)).clamp(-32, 31)
    rounded = torch.where(zero[:, None], -32.0, rounded)
    step = torch.where(zero, 0.0, inverse.reciprocal()).half()
    decoded = (step.float()[:, None] * rounded).view(-1)
    again = _nearest(values / decoded).clamp(-4, 3)
    codes = torch.where(decoded == 0, codes, again)
    whole = (codes + 4).to(torch.uint8).T.reshape(-1, 256)
    bits = (rounded + 32).to(torch.uint8)
    low, high = bits & 15, bits >> 4
    parts = (
        _packed(whole >> 2, 1),
        _packed(whole & 3, 2),
        low[:, :8] | (low[:, 8:] << 4),
        sum_of_bits(high.view(-1, 4, 4), 2),
        step[:, None].view(torch.uint8),
    )
    return torch.cat(parts, 1)


def sum_of_bits(fields: Tensor, bits: int) -> Tensor:
    """Pack uint8 [N, fields of a byte, bytes], the first field lowest, into uint8 [N, bytes]."""
    out = fields[:, 0].clone()
    for place in range(1, fields.shape[1]):
        out |= fields[:, place] << (bits * place)
    return out


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, 256] of few bits as ggml does: 32 bytes hold every 32nd code of a stretch."""
    fields = codes.view(len(codes), -1, 8 // bits, 32)
    return torch.cat([sum_of_bits(part, bits) for part in fields.unbind(1)], 1)


def _nearest(values: Tensor) -> Tensor:
    # ggml rounds by adding 1.5 · 2^23, which rounds halves to even, as this does.
    return values.round()


def _over(number: float, divisor: Tensor) -> Tensor:
    # By a tensor: given a Python number, torch multiplies it by the reciprocal.
    return torch.full_like(divisor, number) / divisor


def _summed(terms: Tensor) -> Tensor:
    """Return the sum of each column of [numbers, N], added from the first row to the last."""
    total = terms[0].clone()
    for row in terms[1:]:
        total += row
    return total


def _of_largest_size(values: Tensor) -> Tensor:
    """Return the number of largest size of each row; the first, if several are as large."""
    return values.gather(1, values.abs().argmax(1, keepdim=True)).squeeze(1)


def _scales_and_minima(
    blocks: Tensor, most: int, *, first: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the first 16 bytes of q4_k's and q5_k's blocks, and the codes: uint8 [N, 256]."""
    values = blocks.view(-1, 32).T.contiguous()
    # In float64, since MKL's square root of float32 is not always the nearest.
    size = (_summed(values * values) / 32).double().sqrt().float()
    weights = size + values.abs()
    scales, minima, codes = _affine(values, weights, most, first, steps)
    rounded, halves = [], []
    for part in (scales.view(-1, 8), minima.view(-1, 8)):
        largest = part.amax(1)
        largest = torch.where(largest > 0, largest, 0.0)  # never -0
        inverse = torch.where(largest > 0, _over(63, largest), 0.0)
        rounded.append(_nearest(inverse[:, None] * part).clamp(max=63))
        halves.append((largest / torch.full_like(largest, 63)).half())
    step, least = (
        (half.float()[:, None] * part).view(-1) for half, part in zip(halves, rounded, strict=True)
    )
    codes = torch.where(step == 0, codes, _nearest((values + least) / step).clamp(0, most))
    bits, minimum_bits = (part.to(torch.uint8) for part in rounded)
    head = (
        torch.stack(halves, 1).view(torch.uint8),
        (bits[:, :4] & 63) | ((bits[:, 4:] >> 4) << 6),
        (minimum_bits[:, :4] & 63) | ((minimum_bits[:, 4:] >> 4) << 6),
        (bits[:, 4:] & 15) | ((minimum_bits[:, 4:] & 15) << 4),
    )
    return torch.cat(head, 1), codes.to(torch.uint8).T.reshape(-1, 256)


def _affine(
    values: Tensor, weights: Tensor, most: int, first: float, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales, minima and codes such that scale · code - minimum is near the values."""
    minimum, largest = values.amin(0).clamp(max=0), values.amax(0)
    flat = largest == minimum
    sum_w, sum_x = _summed(weights), _summed(weights * values)

    def codes_of(inverse: Tensor, minimum: Tensor) -> Tensor:
        # Where the extent is too small for its inverse, ggml's codes are 0.
        codes = _nearest(inverse * (values - minimum))
        return codes.nan_to_num(0, 0, 0).clamp(0, most)

    def error(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        gap = scale * codes + minimum - values
        return _summed(weights * (gap * gap))

    inverse = _over(most, largest - minimum)
    scale, best_codes = inverse.reciprocal(), codes_of(inverse, minimum)
    best = error(best_codes, scale, minimum)
    for step in range(steps + 1):
        # As ggml adds them: the literals are float32, the number of the step is an integer. The
        # next grid begins at the best minimum so far.
        grid = torch.tensor(first) + torch.tensor(0.1) * step + most
        inverse = _over(float(grid), largest - minimum)
        codes = codes_of(inverse, minimum)
        weighted = weights * codes
        sum_l, sum_l2 = _summed(weighted), _summed(weighted * codes)
        sum_xl = _summed(weighted * values)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        tried = (sum_w * sum_xl - sum_x * sum_l) / determinant
        offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = offset > 0
        tried, offset = torch.where(above, sum_xl / sum_l2, tried), offset.clamp(max=0)
        found = error(codes, tried, offset)
        better = (determinant > 0) & (found < best)
        best, best_codes = torch.where(better, found, best), torch.where(better, codes, best_codes)
        scale, minimum = torch.where(better, tried, scale), torch.where(better, offset, minimum)
    return torch.where(flat, 0.0, scale), -minimum, torch.where(flat, 0.0, best_codes)


def _symmetric(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return scales and codes from -most to most - 1, by trying grids."""
    extreme = _of_largest_size(values.T)
    zero = extreme.abs() < _LEAST
    divisor = torch.where(zero, 1.0, extreme)
    weights = values * values
    scale = codes = best = torch.zeros(())
    for step in (0, *range(-9, 0), *range(1, 10)):
        grid = torch.tensor(float(most)) + torch.tensor(0.1) * step
        tried = _nearest(_over(-float(grid), divisor) * values).clamp(-most, most - 1)
        sum_xl, sum_l2 = _summed(weights * values * tried), _summed(weights * tried * tried)
        if step == 0:
            scale = torch.where(sum_l2 == 0, 0.0, sum_xl / sum_l2)
            codes, best = tried, scale * sum_xl
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        codes = torch.where(better, tried, codes)
        scale = torch.where(better, sum_xl / sum_l2, scale)
        best = torch.where(better, scale * sum_xl, best)
    return torch.where(zero, 0.0, scale), torch.where(zero, -float(most), codes)


def _symmetric_by_exchange(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return scales and codes from -most to most - 1, improving one code after the other."""
    extreme = _of_largest_size(values.T)
    zero = extreme.abs() < _LEAST
    inverse = _over(-most, torch.where(zero, 1.0, extreme))
    codes = _nearest(inverse * values).clamp(-most, most - 1)
    weights = values * values
    sum_xl, sum_l2 = _summed(weights * values * codes), _summed(weights * codes * codes)
    for _ in range(5):
        before = codes.clone()
        for place, (value, weight) in enumerate(zip(values, weights, strict=True)):
            code = codes[place]
            rest_xl = sum_xl - weight * value * code
            rest_l2 = sum_l2 - weight * code * code
            new = _nearest(value * rest_l2 / rest_xl).clamp(-most, most - 1)
            new_xl = rest_xl + weight * value * new
            new_l2 = rest_l2 + weight * new * new
            gain = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            better = (rest_xl > 0) & (new != code) & (new_l2 > 0) & gain
            codes[place] = torch.where(better, new, code)
            sum_xl = torch.where(better, new_xl, sum_xl)
            sum_l2 = torch.where(better, new_l2, sum_l2)
        if codes.equal(before):
            break
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
    return torch.where(zero, 0.0, scale), torch.where(zero, -float(most), codes)
