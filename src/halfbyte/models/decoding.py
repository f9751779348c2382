"""Runs the decoders of known families token by token, with a KV cache.

transformers' layers work for every model and need a hundred launches per token; these are the same
modules (layers/decoder_layer.py says which), run for inference: linears of one input as one product
(projections.py), fused elementwise operations (elementwise.py), keys and values at fixed addresses
(kv_cache.py). The same layers run in two modes:

    prefill    prompts packed into a row, without padding; logits of the last token of each
    step       one token of every slot; it needs nothing from the host, so it can be a CUDA graph

How weights are stored depends on the rows of a step (`open`): decoded once and kept, as stacks, if
memory allows. For one row of a large model they stay packed, since reading 4 bits instead of 16
decides the speed. Otherwise each layer is decoded when it runs, into one buffer.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from halfbyte.layers.attention import Documents, attend
from halfbyte.layers.elementwise import add_rms_norm, rms_norm, rotary, swiglu
from halfbyte.layers.families import FAMILIES, LayerSpec, spec_of
from halfbyte.layers.kv_cache import KVCache, attend_cached, turn_and_store
from halfbyte.layers.vocabulary import FrozenHead
from halfbyte.linear.layer_stream import stream_of
from halfbyte.linear.lora import adapters
from halfbyte.models.projections import Projections, stacked
from halfbyte.quant.format import gpu_kernels
from halfbyte.runtime.matmul import product

# Rotary embeddings that depend on positions only; others also depend on the sequence length.
_ROTARY = ("default", "linear", "llama3", "yarn")
# Elements of a layer from which its products with one row are bound by memory. Below, launches
# dominate, and a stack needs fewer.
_LARGE_LAYER = 2**24
# A prompt row is padded to a multiple of this many tokens: Triton specialises kernels for multiples
# of 16.
_ROUND = 16
# Bytes of a GPU that are left free of decoded weights.
_HEADROOM = 2 * 10**9

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def why_not(model: PreTrainedModel) -> str | None:
    """Return why `Decoder` cannot run a model, or None if it can."""
    name = type(model).__name__
    known = [spec.model for spec in FAMILIES]
    if name not in known or not type(model).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(known)}"
    if model.device.type == "cuda" and gpu_kernels() is None:
        return "Triton is not available"
    decoder: Any = model.get_decoder()
    kind = decoder.rotary_emb.rope_type
    if kind not in _ROTARY:
        return f"its rotary embedding ({kind}) depends on the length of the sequence"
    if any(adapter.drops for adapter in adapters(model).values()):
        return "dropout is on"
    if (stream := stream_of(model)) is not None and stream.streamed:
        return "its weights are not on the device, but copied there when needed"
    return next((why for layer in decoder.layers if (why := _why_not_layer(layer))), None)


def _why_not_layer(layer: nn.Module) -> str | None:
    spec = spec_of(layer)
    if spec is None:
        return f"its layers are {type(layer).__name__}"
    return "it is a mixture of experts" if spec.mixture_of(layer) else spec.why_not(layer)


class _Norm(NamedTuple):
    """A norm's weight, read once, since one that is trained in full is cast on each access."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any) -> "_Norm":
        return cls(norm.weight.detach(), norm.variance_epsilon)


class _Layer:
    """A decoder layer for inference; for training see `fused` in decoder_layer.py."""

    def __init__(self, layer: Any, spec: LayerSpec, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        q, k, v, o, gate, up, down = spec.linears_of(layer)
        self.qkv, self.out = Projections([q, k, v], dtype), Projections([o], dtype)
        self.gated, self.down = Projections([gate, up], dtype), Projections([down], dtype)
        self._first, self._second, *heads = map(_Norm.of, spec.norms_of(layer))
        self._head_norms = heads
        self.width, self.scale = int(attention.head_dim), float(attention.scaling)
        config = attention.config
        self.window: int | None = getattr(
            attention, "sliding_window", getattr(config, "sliding_window", None)
        )

    @property
    def sets(self) -> tuple[Projections, ...]:
        return self.qkv, self.out, self.gated, self.down

    def __call__(
        self,
        delta: Tensor,
        stream: Tensor | None,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        stacks: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """Return the MLP output and the residual stream it has yet to be added to.

        Args:
            delta: The MLP output of the previous layer, [rows, hidden].
            stream: The stream without it, or None for the first layer.
            attention: Returns [rows, H · width] for q, k and v [rows, heads, width].
            stacks: The stacks of `sets`.
        """
        if stream is None:
            stream, y = delta, rms_norm(delta, *self._first)
        else:
            y, stream = add_rms_norm(delta, stream, *self._first)
        parts = self.qkv(y, stacks[0])
        heads = [part.view(len(part), -1, self.width) for part in parts]
        for i, norm in enumerate(self._head_norms):
            heads[i] = rms_norm(heads[i][None], *norm)[0]
        (o,) = self.out(attention(*heads), stacks[1])
        y, stream = add_rms_norm(o, stream, *self._second)
        gate, up = self.gated(y, stacks[2])
        (delta,) = self.down(swiglu(gate, up), stacks[3])
        return delta, stream


class Decoder:
    """Runs a model of a supported family, which must not change in the meantime.

    Args:
        model: A model for which `why_not` returns None.
        memory_limit: Total bytes of a GPU that torch may reserve; None for the free memory.

    Attributes:
        cache: The KV cache, allocated by `open`.
        device: Device of the model and the cache.
    """

    cache: KVCache

    def __init__(self, model: PreTrainedModel, *, memory_limit: int | None = None) -> None:
        decoder: Any = model.get_decoder()
        self.device: torch.device = model.device
        self._dtype: torch.dtype = model.halfbyte_recipe.compute_dtype
        self._layers = []
        for layer in decoder.layers:
            spec = spec_of(layer)
            assert spec is not None  # checked by `why_not`
            self._layers.append(_Layer(layer, spec, self._dtype))
        self._adapters = list(adapters(model).values())
        self._norm = _Norm.of(decoder.norm)
        self._rotary = decoder.rotary_emb
        self._embedding: Any = model.get_input_embeddings()
        self._embedded = _read_once(self._embedding, nn.Embedding)
        self._head: Any = model.get_output_embeddings()
        self._head_weight = _read_once(self._head, nn.Linear)
        config = model.config.get_text_config()
        self._groups = int(config.num_key_value_heads)
        self._kept: list[list[Tensor | None]] = []
        self._buffer: Tensor | None = None
        self.memory_limit = memory_limit
        self._packed_rows = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes per token of a slot in the cache: keys and values of all layers."""
        width = self._layers[0].width
        return 2 * len(self._layers) * self._groups * width * self._dtype.itemsize

    def open(self, slots: int, capacity: int, most: int = 0) -> None:
        """Allocate the cache, and store weights in the fastest form for steps of ``slots`` rows.

        Args:
            slots: Number of concurrent sequences.
            capacity: Tokens per slot.
            most: Maximum later capacity; memory for it is reserved when weights are stored.
        """
        self.cache = KVCache(
            len(self._layers),
            slots,
            self._groups,
            capacity,
            self._layers[0].width,
            self._dtype,
            self.device,
        )
        self._set_turn()
        # While the cache grows, old and new keys, or old values and all new tensors, coexist.
        growth = max(0, 3 * most // 2 - capacity) if most > capacity else 0
        self._hold(slots, growth * slots * self.slot_bytes)

    def grow(self, capacity: int) -> None:
        """Increase the capacity of each slot, which reallocates the cache."""
        self.cache.grow(capacity)
        self._set_turn()

    def _set_turn(self) -> None:
        positions = torch.arange(self.cache.capacity, device=self.device)[None]
        like = torch.empty(0, dtype=self._dtype, device=self.device)
        cos, sin = self._rotary(like, positions)
        self._turn = cos[0].contiguous(), sin[0].contiguous()

    def compile_ahead(self) -> None:
        """Compile the kernels of prefill and of a step in parallel; leaves the cache empty."""
        if self.device.type != "cuda":
            return
        from halfbyte.runtime.compile_ahead import compiling_ahead  # it imports triton

        tokens = torch.zeros(self.cache.keys.shape[1], dtype=torch.int64, device=self.device)
        with compiling_ahead() as ahead:
            self.prefill([[0]], [0])
            if not ahead.needless:
                self.step(self.embed(tokens), tokens)
        self.cache.clear()
        for adapter in self._adapters:
            adapter.forget()

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [..., hidden] of tokens int64 [...]."""
        if self._embedded is not None:
            return functional.embedding(tokens, self._embedded)
        return self._embedding(tokens)  # type: ignore[no-any-return]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Store the keys and values of prompts, and return the logits of each last token.

        Args:
            prompts: Token ids, at least one each; all of them together must fit in memory.
            slots: The slot of each.

        Returns:
            [prompts, vocabulary].
        """
        lengths = [len(prompt) for prompt in prompts]
        fill = -sum(lengths) % _ROUND
        ids = torch.tensor([i for prompt in prompts for i in prompt] + [0] * fill)
        positions = torch.cat([torch.arange(n) for n in (*lengths, fill)])
        of_slot = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
        ends = torch.tensor([0, *lengths, fill]).cumsum(0)
        ids, positions, of_slot, ends = (t.to(self.device) for t in (ids, positions, of_slot, ends))
        tokens = sum(lengths)
        turn = self._turn[0][positions][None], self._turn[1][positions][None]
        places = of_slot, positions[:tokens]

        def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = self._layers[index]
            q, k = (x[0] for x in rotary(q[None], k[None], *turn))
            self.cache.store(index, k[:tokens], v[:tokens], *places)
            if layer.window is not None and max(lengths) > layer.window:
                bounds = [0, *_sums([*lengths, fill])]
                return _attend_windows(q, k, v, bounds, layer.scale, layer.window)
            documents = Documents(ends.int(), max(*lengths, fill))
            return attend(q[None], k[None], v[None], documents, layer.scale)[0]

        hidden = self._run(self.embed(ids), attention, ends[1 : len(prompts) + 1] - 1)
        return self._logits(hidden)

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the logits [slots, vocabulary] of one new token in each slot.

        Args:
            x: The tokens' embeddings, [slots, hidden].
            positions: int64 [slots], their positions, all less than the cache's capacity.
        """

        def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer, keys, values = self._layers[index], self.cache.keys, self.cache.values
            keys, values = keys[index], values[index]
            q = turn_and_store(q, k, v, self._turn, positions, keys, values)
            return attend_cached(q, keys, values, positions, layer.scale, layer.window)

        return self._logits(self._run(x, attention))

    def _run(self, x: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """Return the output of the final norm for all rows, or for some."""
        delta, stream = x, None
        # For the rows of prompts decoding pays off, and packed kernels would have to be compiled.
        packed = rows is None and len(x) <= self._packed_rows
        for index, layer in enumerate(self._layers):

            def own(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                return attention(index, q, k, v)

            delta, stream = layer(delta, stream, own, self._stacks(index, packed=packed))
        assert stream is not None
        if rows is not None:
            delta, stream = delta[rows], stream[rows]
        return add_rms_norm(delta, stream, *self._norm)[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._head_weight is not None:
            return product(hidden, self._head_weight)
        return self._head(hidden)  # type: ignore[no-any-return]

    def _hold(self, rows: int, reserved: int) -> None:
        """Decide how weights are stored; see the top of this file.

        Args:
            rows: Rows of a step.
            reserved: Bytes of the GPU needed for other purposes.
        """
        self._kept, self._buffer = [], None
        self._packed_rows = self._most_packed_rows()
        large = _elements(self._layers[0]) >= _LARGE_LAYER
        wanted = [
            [s.elements if s.packed or not large else 0 for s in layer.sets]
            for layer in self._layers
        ]
        total = sum(map(sum, wanted))
        on_gpu = self.device.type == "cuda"
        stays_packed = rows == 1 and large and self._packed_rows > 0
        needed = total * self._dtype.itemsize + reserved + _HEADROOM
        room = on_gpu and free_bytes(self.device, self.memory_limit) > needed
        if room and not stays_packed:
            memory = torch.empty(total, dtype=self._dtype, device=self.device)
            pieces = torch.split(memory, [sum(sizes) for sizes in wanted])
            self._kept = [
                stacked(layer.sets, sizes, piece)
                for layer, sizes, piece in zip(self._layers, wanted, pieces, strict=True)
            ]

    def _most_packed_rows(self) -> int:
        """Return the maximum rows for which packed weights can be multiplied without decoding."""
        sets = [one for layer in self._layers for one in layer.sets]
        if self.device.type != "cuda" or not any(one.packed for one in sets):
            return 0
        from halfbyte.linear.triton_gemv import most_rows  # it imports triton

        return min(most_rows(self._dtype, q) for one in sets for q in one.packed)

    def _stacks(self, index: int, *, packed: bool) -> Sequence[Tensor | None]:
        """Return the stacks of a layer's sets, None for weights that stay packed."""
        if self._kept:
            return self._kept[index]
        sets = self._layers[index].sets
        if packed:
            return [None] * len(sets)
        sizes = [one.elements if one.packed else 0 for one in sets]
        if self._buffer is None or len(self._buffer) < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=self._dtype, device=self.device)
        return stacked(sets, sizes, self._buffer[: sum(sizes)])


def _elements(layer: _Layer) -> int:
    return sum(one.elements for one in layer.sets)


def free_bytes(device: torch.device, limit: int | None = None) -> int:
    """Return the bytes that can still be allocated on a GPU, including torch's cache.

    Args:
        device: The GPU.
        limit: Total bytes that torch may reserve, or None for no limit.
    """
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    if limit is not None:
        free = min(free, limit - reserved)
    return max(0, int(free + reserved - torch.cuda.memory_allocated(device)))


def _read_once(module: Any, plain: type[nn.Module]) -> Tensor | None:
    """Return the weight of a plain module, cast if it is trained in full; None for any other."""
    names = (plain.__name__, f"Parametrized{plain.__name__}")
    if isinstance(module, FrozenHead) or type(module).__name__ not in names:
        return None
    weight: Tensor = module.weight.detach()
    return weight


def _sums(numbers: Sequence[int]) -> list[int]:
    total, sums = 0, []
    for number in numbers:
        total += number
        sums.append(total)
    return sums


def _attend_windows(
    q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float, window: int
) -> Tensor:
    """Return [T, H · width]: causal sliding-window attention within documents.

    Args:
        q: [T, H, width].
        k: [T, G, width].
        v: Likewise.
        bounds: The start of each document, and the end of the last.
        scale: Factor of the scores.
        window: Maximum keys attended to, including the query's own.
    """
    parts = []
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        at = torch.arange(stop - start, device=q.device)
        back = at[:, None] - at
        heads = [x[None, start:stop].transpose(1, 2) for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(
            heads[0],
            heads[1],
            heads[2],
            attn_mask=(back >= 0) & (back < window),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.transpose(1, 2).flatten(2)[0])
    return torch.cat(parts)
