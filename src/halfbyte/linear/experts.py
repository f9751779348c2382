"""The frozen weights of all experts of a layer: one linear layer each, packed one by one.

transformers keeps the experts of a mixture as 3-D parameters, [experts, rows, columns], which
bitsandbytes leaves in 16 bits. Here each expert's matrix is packed on its own, with exactly the
bytes that it would have as a linear layer. The packed tensors of an expert are adjacent, one record
of bytes, and the records of a layer are one tensor. So a range of experts is a range of bytes.

``ExpertLinear`` multiplies rows that are sorted by expert. It decodes a few experts at a time into
a buffer, so that neither all decoded weights of a layer nor a temporary of their size exists.
Backward decodes them again and computes no gradient of the weights. On a GPU, a chunk is one launch
of triton_experts.py, and the host does not wait for the offsets.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.format import PackedWeight, dequantize_all, gpu_kernels
from halfbyte.runtime import device as devices
from halfbyte.runtime.matmul import product

# Bytes of decoded weights at a time. On an H200, half as many take 13 % more time for the experts
# of a layer at 2048 tokens and 4 % at 8192; four times as many take 8 % and 1 % less
# (2026-11-30_gpu_experts_peers.json). The least decodes one expert at a time.
DECODED_BYTES = 256 * 2**20
LARGE_DECODED_BYTES, LEAST_DECODED_BYTES = 2**30, 16 * 2**20

# Alignment of the tensors within a record, sufficient for all kernels; as in arena.py.
_ALIGNED = 256


class ExpertLinear(nn.Module):
    """One linear of every expert of a layer; its weights are not trained.

    Packed weights are held as the buffer ``records``, uint8 [experts, bytes], and accessed through
    ``packed``. Plain ones are the parameter ``weight`` [experts, rows, columns], without gradient.

    Args:
        shape: (experts, rows, columns).
        transposed: Whether rows are inputs and columns outputs; otherwise it is the reverse, as in
            ``nn.Linear``.
        like: A description of an expert's packed weight [rows, columns], its tensors on the meta
            device, or None for plain weights.
        dtype: dtype of plain weights.

    Attributes:
        num_experts: Number of experts.
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        transposed: As given.
        adapter: None, or the adapter of the experts (expert_lora.py).
        decoded_bytes: Bytes of weights that are decoded at a time, by default `DECODED_BYTES`. It
            changes no result.
        swaps_factors: Whether PEFT takes rows for outputs though they are inputs, so that its B has
            the inputs.
        ensure_loaded: Called before weights are read, if they may be elsewhere (layer_stream.py).
    """

    weight: Tensor | None
    decoded_bytes: int | None = None
    ensure_loaded: Callable[[], None] | None = None

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        transposed: bool,
        like: PackedWeight | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_experts, *self.matrix = shape
        rows, columns = self.matrix
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        self.transposed = transposed
        self.adapter: nn.Module | None = None
        self.swaps_factors = False
        self._like = like
        self._packed: tuple[PackedWeight, ...] = ()
        self.register_parameter("weight", None)
        if like is None:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.weight = nn.Parameter(empty, requires_grad=False)
        else:
            self._take_records(
                torch.empty(shape[0], _record_bytes(like), dtype=torch.uint8, device="meta")
            )

    @property
    def packed(self) -> tuple[PackedWeight, ...]:
        """The packed weight [rows, columns] of each expert; empty if they are plain."""
        return self._packed

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weight.device if self.weight is not None else self._records.device

    @property
    def _records(self) -> Tensor:
        """The packed weights, uint8 [experts, bytes]."""
        records = self._buffers["records"]
        assert records is not None
        return records

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return the tensor that holds all weights, by name, whether or not it is loaded."""
        return {"records": self._records} if self.weight is None else {"weight": self.weight}

    def set_frozen_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold the weights in another tensor of the same dtype and shape."""
        if self.weight is None:
            self._take_records(tensors["records"])
        else:
            self.weight = nn.Parameter(tensors["weight"], requires_grad=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all experts by name, [experts, ...]; views of what is held."""
        if self.ensure_loaded is not None:
            self.ensure_loaded()
        return self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        if self.weight is not None:
            return {"weight": self.weight}
        assert self._like is not None
        found, start = dict[str, Tensor](), 0
        for name, tensor in self._like.tensors().items():
            found[name] = self._records[:, start : start + tensor.nbytes].view(tensor.dtype)
            start += _padded(tensor)
        return found

    def set_packed(self, expert: int, weight: PackedWeight) -> None:
        """Set the packed weight of one expert; its bytes are copied.

        The memory of all experts is allocated with the first, on its device, if there is none.

        Raises:
            ValueError: If it is not of the expected shape and format.
        """
        assert self._like is not None
        expected, came = (_description(one) for one in (self._like, weight))
        if came != expected:
            raise ValueError(f"an expert's weight {expected} is expected here, got {came}")
        if self.device.type == "meta":
            # Zeros, so that the bytes between the tensors are the same in every run.
            self._take_records(torch.zeros_like(self._records, device=weight.codes.device))
        for name, tensor in weight.tensors().items():
            getattr(self._packed[expert], name).copy_(tensor)

    def set_plain(self, expert: int, weight: Tensor) -> None:
        """Set the plain weight of one expert; memory as for `set_packed`."""
        assert self.weight is not None
        if self.device.type == "meta":
            empty = torch.empty_like(self.weight, device=weight.device)
            self.weight = nn.Parameter(empty, requires_grad=False)
        self.weight[expert].copy_(weight)

    def decode(
        self, first: int, last: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return the weights of the experts ``first`` to ``last`` - 1, [experts, rows, columns].

        Args:
            first: The first expert.
            last: The one after the last.
            dtype: dtype of the result.
            out: Memory for at least as many weights, in ``dtype``; plain weights do not need it.
        """
        if self.ensure_loaded is not None:
            self.ensure_loaded()
        if self.weight is not None:
            return self.weight[first:last].to(dtype)
        if out is None:
            out = torch.empty(last - first, *self.matrix, dtype=dtype, device=self.device)
        else:
            out = out.flatten()[: (last - first) * self.matrix[0] * self.matrix[1]]
            out = out.view(last - first, *self.matrix)
        packed = self._packed[first]
        if self.device.type == "cuda" and gpu_kernels() is not None:
            from halfbyte.quant import triton_records

            if triton_records.fits(packed):
                triton_records.decode_records(packed, self._records.shape[1], out)
                return out
        dequantize_all(self._packed[first:last], dtype, outs=list(out))
        return out

    def at_a_time(self, dtype: torch.dtype) -> int:
        """Return how many experts are decoded at a time: ``decoded_bytes`` of them."""
        if self.weight is not None:
            return self.num_experts
        each = self.matrix[0] * self.matrix[1] * dtype.itemsize
        return min(self.num_experts, max(1, (self.decoded_bytes or DECODED_BYTES) // each))

    def chunks(
        self, dtype: torch.dtype, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of the experts to decode at a time, of ``start`` to ``stop`` - 1."""
        count, stop = self.at_a_time(dtype), self.num_experts if stop is None else stop
        for first in range(start, stop, count):
            yield first, min(first + count, stop)

    def decoded(
        self, dtype: torch.dtype, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the first expert and the weights of each of `chunks`, decoded into one buffer.

        Weights are valid until the next are decoded.
        """
        buffer: Tensor | None = None
        for first, last in self.chunks(dtype, start, stop):
            weights = self.decode(first, last, dtype, buffer)
            buffer = None if self.weight is not None else (weights if buffer is None else buffer)
            yield first, weights
            del weights

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return the product of each row with the weight of its expert, [rows, out].

        Args:
            x: Rows sorted by expert, [rows, in].
            offsets: int32 [experts + 1]: the first row of each expert, and the one after the last.
                Rows after that belong to no expert, and their results are 0.
        """
        if self.adapter is not None:
            return self.adapter(x, self, offsets)  # type: ignore[no-any-return]
        return _GroupedProduct.apply(x, self, offsets)  # type: ignore[no-any-return, no-untyped-call]

    def _take_records(self, records: Tensor) -> None:
        """Hold ``records``, and see the tensors of each expert in it."""
        assert self._like is not None
        self.register_buffer("records", records)
        shapes = {name: tensor.shape for name, tensor in self._like.tensors().items()}
        tensors: list[dict[str, Any]] = [{} for _ in range(len(records))]
        for name, held in self._tensors().items():
            for of_expert, row in zip(tensors, held, strict=True):
                of_expert[name] = row.view(shapes[name])
        self._packed = tuple(replace(self._like, **of_expert) for of_expert in tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._see_records()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._see_records()  # load_state_dict(assign=True) replaces the buffer

    def _see_records(self) -> None:
        if self._like is not None:
            self._take_records(self._records)

    def extra_repr(self) -> str:
        """Return the sizes and the kind of the weights, for ``print(model)``."""
        kind = "plain" if self._like is None else self._like.quant_type
        return f"experts={self.num_experts}, in={self.in_features}, out={self.out_features}, {kind}"


def expert_linears(model: nn.Module) -> dict[str, ExpertLinear]:
    """Return every ``ExpertLinear`` of ``model`` by its path, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpertLinear)}


class _GroupedProduct(torch.autograd.Function):
    """The products of rows with the weights of their experts; decodes in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: ExpertLinear, offsets: Tensor) -> Tensor:
        ctx.linear, ctx.offsets = linear, offsets
        return grouped_product(x, linear, offsets, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(grads[0].contiguous(), ctx.linear, ctx.offsets, backward=True)
        return dx, None, None


def expert_kernels(x: Tensor) -> Any:
    """Return the Triton kernels of experts (triton_experts.py), or None if they do not fit x."""
    fit = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    if not fit or gpu_kernels() is None or not devices.spec_of(x.device).has_tensor_cores:
        return None
    from halfbyte.linear import triton_experts

    return triton_experts


@torch.no_grad()
def grouped_product(x: Tensor, linear: ExpertLinear, offsets: Tensor, *, backward: bool) -> Tensor:
    """Return x Wᵀ [rows, out] for rows sorted by expert, or dy W [rows, in] if ``backward``.

    The version in plain PyTorch is the specification. It needs the offsets on the host; only
    experts that have rows are decoded, as far as their chunk is.
    """
    y = x.new_zeros(len(x), linear.in_features if backward else linear.out_features)
    if (kernels := expert_kernels(x)) is not None:
        routing = kernels.routing_of_sorted(offsets, len(x))
        transposed = linear.transposed == backward
        for first, weights in linear.decoded(x.dtype):
            kernels.grouped_product(x, weights, routing, first, y, transposed=transposed)
        return y
    bounds: list[int] = offsets.tolist()
    buffer: Tensor | None = None
    for first, last in linear.chunks(x.dtype):
        if bounds[first] == bounds[last]:
            continue
        weights = linear.decode(first, last, x.dtype, buffer)
        buffer = None if linear.weight is not None else (weights if buffer is None else buffer)
        for weight, (start, stop) in zip(weights, pairwise(bounds[first : last + 1]), strict=True):
            if start < stop:
                y[start:stop] = product(
                    x[start:stop], weight.t() if linear.transposed != backward else weight
                )
    return y


def _description(weight: PackedWeight) -> tuple[Any, ...]:
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in weight.tensors().items()}
    return tuple(weight.shape), weight.quant_type, weight.block_size, layout


def _record_bytes(weight: PackedWeight) -> int:
    return sum(map(_padded, weight.tensors().values()))


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED
