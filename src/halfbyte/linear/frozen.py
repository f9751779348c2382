"""The frozen linear layer: a packed or plain weight that is not trained, and an adapter slot.

Whether this is QLoRA or LoRA is a property of the weight: ``FrozenLinear`` holds either packed
4-bit tensors or a plain 16/32-bit weight, and ``dense`` returns W in the dtype of the product. The
products, of one linear or of several with the same input, are in group.py; when weights are decoded
is up to the caller (decoded_cache.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.linear.decoded_weight import DENSE, DecodedWeight, WeightLayout
from halfbyte.linear.group import LinearGroup
from halfbyte.quant.format import dequantize
from halfbyte.quant.weight import QuantizedWeight, QuantType, empty_like_quantized

# The tensors of a QuantizedWeight, which a FrozenLinear holds as buffers under the same names.
_PACKED = ("codes", "scales", "scale_codes", "scale_scales", "scale_offset")


class FrozenLinear(nn.Module):
    """A linear layer whose weight is not trained: packed 4-bit, or plain 16/32-bit.

    A 4-bit weight is held as plain buffers (``codes``, ``scales`` …; no tensor or parameter
    subclass, no second copy of the state) and accessed through ``quantized``. A plain one is held
    as the parameter ``weight``, without gradient. ``adapter`` is None or the adapter set by
    ``lora.attach``; ``why_no_adapter`` says why it must not get one, or is None, and
    ``is_parameter_in_peft`` whether PEFT can adapt its weight only as a parameter. ``group`` is the
    set of linears it is multiplied together with, ``layout`` the format its weight is decoded to.
    ``ensure_loaded`` is called before its weight is read, if that may be elsewhere
    (layer_stream.py).

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias [out_features].
        quantized: A description of the packed weight (its tensors may be on the meta device), or
            None for a plain weight.
        dtype: dtype of the bias and of a plain weight.
        device: Device of the bias and of a plain weight.
    """

    bias: Tensor | None
    weight: Tensor | None
    ensure_loaded: Callable[[], None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        quantized: QuantizedWeight | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.adapter: nn.Module | None = None
        self.why_no_adapter: str | None = None
        self.is_parameter_in_peft = False
        self._quantized: QuantizedWeight | None = None
        self.layout: WeightLayout = DENSE
        self.group = LinearGroup([self])

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(*shape, dtype=dtype, device=device), requires_grad=False
            )

        self.register_parameter("bias", empty(out_features) if bias else None)
        self.register_parameter("weight", None)
        if quantized is None:
            self.weight = empty(out_features, in_features)
        else:
            self.set_quantized(quantized)

    @classmethod
    def like(
        cls,
        linear: nn.Linear,
        *,
        quant: QuantType | None,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
    ) -> "FrozenLinear":
        """Return an empty layer of the shape of ``linear``, on the meta device."""
        quantized = None
        if quant is not None:
            quantized = empty_like_quantized(
                (linear.out_features, linear.in_features),
                dtype,
                quant_type=quant,
                block_size=block_size,
                double_quant=double_quant,
            )
        return cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quantized=quantized,
            dtype=dtype,
        )

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        held = self._buffers["codes"] if self.weight is None else self.weight
        assert held is not None
        return held.device

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The packed weight, whose tensors are the buffers, or None if the weight is plain."""
        if self.ensure_loaded is not None:
            self.ensure_loaded()
        return self._quantized

    def set_quantized(self, quantized: QuantizedWeight) -> None:
        """Replace the packed weight; its tensors become this module's buffers.

        Raises:
            ValueError: If its shape is not [out_features, in_features].
        """
        expected = (self.out_features, self.in_features)
        if tuple(quantized.shape) != expected:
            raise ValueError(
                f"a packed weight of shape {expected} is expected here, got {quantized.shape}"
            )
        self.weight = None
        for name in _PACKED:
            self.register_buffer(name, getattr(quantized, name))
        self._quantized = quantized

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the weight by name."""
        if self.ensure_loaded is not None:
            self.ensure_loaded()
        return self.frozen_tensors()

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the weight by name, whether or not their values are loaded."""
        if self._quantized is not None:
            return self._quantized.tensors()
        assert self.weight is not None
        return {"weight": self.weight}

    def set_frozen_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the weight refer to other tensors of the same names, dtypes and shapes."""
        if self._quantized is None:
            self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        else:
            self.set_quantized(replace(self._quantized, **tensors))  # type: ignore[arg-type]

    def opened(self, dtype: torch.dtype) -> DecodedWeight | None:
        """Return W [out, in] if a `DecodedWeightCache` holds it for ``dtype``, else None."""
        layer = self.group.open_layer
        return layer.weights.get(self) if layer is not None and layer.dtype == dtype else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in ``dtype``: the cached copy if there is one, else newly decoded."""
        held = self.opened(dtype)
        return held.data if held is not None and held.layout is DENSE else self.decode(dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in ``dtype``, bypassing the cache: a packed weight is decoded."""
        if (quantized := self.quantized) is not None:
            return dequantize(quantized, dtype)
        assert self.weight is not None
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out] for x [..., in], in the dtype of x."""
        y = self.group.output(self, x)
        # An adapter may post-process the product, however that was computed (DoRA does).
        adapter: Any = self.adapter
        rescaled: Tensor = adapter.rescale(y) if getattr(adapter, "rescales", False) else y
        return rescaled

    def unread(self, x: Tensor) -> Tensor:
        """Return a placeholder for y [..., out] whose values are not read.

        It has the backward of y. If that needs y, or y is computed with other outputs, it is y.
        """
        if getattr(self.adapter, "rescales", False):
            return self(x)  # type: ignore[no-any-return]
        return self.group.output(self, x, read=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenLinear":
        # `module.to(bfloat16)` and `.half()` cast every floating tensor, and rounding the scales to
        # bfloat16 would change the weight. Viewed as integers, packed tensors are moved, not cast.
        buffers = self._buffers
        floats = {name: held for name in _PACKED if (held := buffers.get(name)) is not None}
        floats = {name: held for name, held in floats.items() if held.is_floating_point()}
        buffers.update({name: held.view(torch.int32) for name, held in floats.items()})
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in floats:
            moved = buffers[name]
            assert moved is not None
            buffers[name] = moved.view(torch.float32)
        self._see_buffers()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._see_buffers()  # load_state_dict(assign=True) replaces the buffers

    def _see_buffers(self) -> None:
        if self._quantized is not None:
            tensors: dict[str, Any] = {name: self._buffers[name] for name in _PACKED}
            self._quantized = replace(self._quantized, **tensors)

    def extra_repr(self) -> str:
        """Return the sizes and the kind of the weight, for ``print(model)``."""
        kind = "plain" if self._quantized is None else self._quantized.quant_type
        return (
            f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, {kind}"
        )
