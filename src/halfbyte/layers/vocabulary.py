"""Packed vocabulary matrices: the embedding and the output head.

Both derive from `FrozenLinear`: with the same packed weight [V, H] and buffers, they are loaded,
saved, counted and merged like packed linears. They take no adapter. An embedding decodes the rows
that are looked up. A head is decoded a few rows of the vocabulary at a time for the loss
(`pieces`), so the whole decoded matrix never exists in training.

An embedding that is not packed can stay in host memory (`HostEmbedding`): a token reads one row of
it, 8 kB for a 7B model, and the rest of its 0.3 to 1 GB would be idle on the GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, gcd

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from halfbyte.layers.multimodal import ties_head
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.quant import SCALE_BLOCK, QuantizedWeight, dequantize
from halfbyte.quant.blockwise import DYNAMIC_SIGNED
from halfbyte.quant.format import gpu_kernels
from halfbyte.quant.weight import levels_of
from halfbyte.runtime.host_memory import host_memory

_CHUNK = 2**20  # elements of looked-up rows decoded at a time


class FrozenHead(FrozenLinear):
    """An output head whose weight [V, H] may be packed: a linear that takes no adapter."""


class FrozenEmbedding(FrozenLinear):
    """An embedding whose weight [V, H] is packed: rows are decoded when they are looked up.

    Args:
        quantized: A description of the weight; its tensors may be on the meta device.
        dtype: dtype of the rows it returns.
    """

    def __init__(self, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        vocabulary, width = quantized.shape
        super().__init__(width, vocabulary, quantized=quantized)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., H] for token ids int64 [...].

        Raises:
            IndexError: If an id is negative or too large.
        """
        assert self.quantized is not None
        return decode_rows(self.quantized, ids, self.dtype)


class HostEmbedding(nn.Module):
    """A frozen embedding whose weight stays in page-locked host memory; the GPU reads rows there.

    The weight is neither a parameter nor a buffer, so that nothing moves it to the GPU.

    Args:
        weight: [V, H], any dtype, on any device; it is copied.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=True)
        self.weight.copy_(weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., H] for token ids int64 [...], on the device of the ids."""
        if not ids.is_cuda:
            return functional.embedding(ids, self.weight)
        from halfbyte.layers.triton_elementwise import look_up  # it imports triton

        return look_up(self.weight, ids)


def embedding_to_host(model: PreTrainedModel) -> int:
    """Move the embedding of a model on a GPU to host memory, if possible.

    It is not possible if the embedding is trained, packed, tied to the head or does more than look
    up rows, or if there are no kernels to read it.

    Returns:
        The number of bytes freed on the GPU.
    """
    embedding = model.get_input_embeddings()
    plain = type(embedding) is nn.Embedding and embedding.weight.is_cuda
    tied = getattr(model.get_output_embeddings(), "weight", None) is embedding.weight
    if not plain or tied or embedding.weight.requires_grad or gpu_kernels() is None:
        return 0
    model.set_input_embeddings(HostEmbedding(embedding.weight))
    return int(embedding.weight.nbytes)


class HostHead(nn.Module):
    """A frozen output head whose weight is in page-locked host memory, and copied for each loss.

    It is needed for a moment between forward and backward, when little else is on the GPU. The
    weight is neither a parameter nor a buffer, so that nothing moves it to the GPU.

    Args:
        weight: [V, H], any dtype, on any device; it is copied.
    """

    bias = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        memory = host_memory(weight.nbytes, page_locked=weight.is_cuda)
        self.weight = memory.view(weight.dtype).view(weight.shape).copy_(weight.detach())

    def loaded(self, device: torch.device) -> Tensor:
        """Return the weight [V, H] on a device; the copy is queued on the current stream."""
        return self.weight.to(device, non_blocking=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., V] for hidden states [..., H]."""
        return functional.linear(x, self.loaded(x.device))


def head_to_host(model: PreTrainedModel) -> int:
    """Move the output head of a model on a GPU to host memory, if possible.

    It is not possible if the head is trained, packed, tied to the embedding, or has a bias.

    Returns:
        The number of bytes freed on the GPU.
    """
    head = model.get_output_embeddings()
    biased = getattr(head, "bias", None) is not None
    plain = type(head) is nn.Linear and not biased and head.weight.is_cuda
    if not plain or head.weight.requires_grad or ties_head(model):
        return 0
    nbytes = int(head.weight.nbytes)
    model.set_output_embeddings(HostHead(head.weight))
    return nbytes


@torch.no_grad()
def decode_rows(q: QuantizedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows ``ids`` of a packed matrix, bit-identical to those of `dequantize`.

    Args:
        q: [V, H], H even. Blocks may cross rows.
        ids: int64 [...], on the device of ``q``.
        dtype: dtype of the result, [..., H].

    Raises:
        IndexError: If an id is negative or too large.
    """
    width = q.shape[1]
    run = gcd(width, q.block_size)  # each aligned run of this many elements shares a block
    runs = torch.arange(width // run, device=ids.device)
    levels = levels_of(q.quant_type)
    pairs = torch.cartesian_prod(levels, levels).to(ids.device)
    codes = q.codes.view(-1, run // 2)
    out = torch.empty(ids.numel(), width, dtype=dtype, device=ids.device)
    rows = max(1, _CHUNK // width)
    parts = zip(torch.split(ids.reshape(-1), rows), torch.split(out, rows), strict=True)
    for some, target in parts:
        which = (some[:, None] * len(runs) + runs).reshape(-1)
        # Not by indexing, which would accept a negative id and count from the end.
        packed = codes.index_select(0, which).int()
        values = pairs[packed].view(len(which), run)
        scales = _scales_of(q, which * run // q.block_size)
        target.copy_(values.mul_(scales[:, None]).view_as(target))
    return out.view(*ids.shape, width)


def _scales_of(q: QuantizedWeight, blocks: Tensor) -> Tensor:
    """Return the scales of some blocks; see ``QuantizedWeight.block_scales``."""
    if q.scales is not None:
        return q.scales[blocks]
    assert q.scale_codes is not None
    assert q.scale_scales is not None
    assert q.scale_offset is not None
    levels = DYNAMIC_SIGNED.to(blocks.device)[q.scale_codes[blocks].int()]
    return levels * q.scale_scales[blocks // SCALE_BLOCK] + q.scale_offset


def pieces(q: QuantizedWeight, dtype: torch.dtype, nbytes: int) -> Iterator[tuple[int, Tensor]]:
    """Decode a packed matrix [V, H], some rows at a time.

    Args:
        q: The matrix.
        dtype: dtype of the decoded pieces.
        nbytes: Approximate size of a decoded piece. Pieces start at block boundaries (with double
            quantisation, of blocks of scales), so unusual sizes can require larger ones.

    Yields:
        Index of the first row of a piece, and its rows [·, H], overwritten by the next piece.
    """
    rows, width = q.shape
    span = q.block_size * (SCALE_BLOCK if q.double_quant else 1)
    unit = span // gcd(width, span)
    step = min(rows, max(1, nbytes // (width * dtype.itemsize) // unit) * unit)
    buffer = torch.empty(step, width, dtype=dtype, device=q.codes.device)
    for start in range(0, rows, step):
        part = _rows_between(q, start, min(start + step, rows))
        yield start, dequantize(part, dtype, out=buffer[: part.shape[0]])


def _rows_between(q: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Return rows of ``q`` as a view; the first must start a block, and a block of scales."""
    width = q.shape[1]
    first, last = start * width, stop * width

    def cut(tensor: Tensor | None, elements: int) -> Tensor | None:
        return None if tensor is None else tensor[first // elements : ceil(last / elements)]

    codes = cut(q.codes, 2)
    assert codes is not None
    return replace(
        q,
        codes=codes,
        scales=cut(q.scales, q.block_size),
        scale_codes=cut(q.scale_codes, q.block_size),
        scale_scales=cut(q.scale_scales, q.block_size * SCALE_BLOCK),
        shape=(stop - start, width),
    )
