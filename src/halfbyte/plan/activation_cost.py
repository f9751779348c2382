"""The activations a decoder layer keeps for backward, in bytes per token, and the peak of backward.

The terms are those of ``linear.group``, ``layers.elementwise`` and ``layers.decoder_layer``,
function by function. H is the width of the residual stream, Q of all queries, K of all keys, I of
the MLP, e the bytes of an activation:

    recompute   the layer's input                                             e·H
    save        in addition:
      norms       their outputs, and the sum between them                      3·e·H
      projected   q, k, v after the projection (one product: one tensor)       e·(Q + 2K)
      attention   rotated q and k, the output of attention                     e·(2Q + K)
      mlp         gate, up, and their product (on a GPU made in backward)      3·e·I or 2·e·I
      adapters    x Aᵀ of each linear                                          e·Σr
      statistics  of norms and of attention, float32                           4·(2 + heads)
    offload     nothing on the device but what is being transferred: inputs and, in wide models,
                  the attention checkpoint                                   e·(H + Q) + 4·heads

On a GPU recomputed layers keep `adapters` with their input, on the device even if the input is
offloaded, so that x is read only once for them. There r is the padded rank of the adapters' copies.

Layers run by transformers' own code keep more: norms keep the float32 copy they compute in (instead
of what it is a copy of), and the MLP silu(gate). If heads have norms, q and k before these are kept
too.

In backward the layer's own activations exist in any case (saved, or recomputed), and at the peak,
in the middle of the MLP, also the gradients of gate and up. Fused on a GPU these overwrite gate and
up, and the peak is at that moment: the gradient of their product exists and, on Hopper up to a rank
of `GATED_RANK`, the separate partial sums of tiles and spans for the adapters
(`linear.triton_swiglu`). If the MLP is narrow the peak is in attention's backward. The MLP's
activations are freed by then, and there are

    gradients   of the stream, of attention's output, of q, k and v           e·(H + 2Q + 2K)
    float32     of q, accumulated                                             4·Q
    all heads   of k and v, for each of the queries' heads, if fewer          2·e·Q

On a GPU without flash attention (before Ampere), k and v are copied for each of the queries' heads
in forward, too, and the copies are kept. There is no varlen attention there, so micro-batches are
not packed.

A mixture of experts keeps its input (one of `norms`) and what the router said, and computes the
rest again in backward. For k experts per token of inner width I there are, while it runs,

    forward     the experts' inner activations and their outputs             e·k·(I + H)
    backward    gate and up, the gradient of inner, that of its input        e·k·(3I + H)
    decoded     a few experts at a time, whatever the tokens

On a GPU, if n experts are decoded at a time and n < k, as with all inputs offloaded, then what is
inside the experts is that of n experts: the terms with I are e·n·I and e·n·3I.

Long parts of layers without experts are recomputed by tiles on a GPU (`layers.tiled_layer`). Then
only these exist for all tokens, and everything else for a tile:

    forward     q, k, v and attention's output, later the stream after attention
    backward    q, k, v, attention's output and the stream after it; in attention's backward the
                gradient of its output instead of the stream, and sums for a group of heads

The gradients of q, k and v take the place of these, those of the stream that of the output's, and
x Aᵀ is not kept.

In addition there is the residual stream itself, as wide as a layer's input, several times. On a CPU
this is its gradient. CUDA graphs have tensors of their own, so while they are captured there are

    the entry, which is layer 0's input, whether or not it is offloaded
    the last output, whose memory is reused for its gradient
    the gradient of the layer before, from the second layer on

Saved layers also keep the copies of their adapters used in products, independent of the tokens.

On a GPU a layer may also keep its decoded weights from step to step, instead of the shared buffer
into which the others are decoded in turn.
"""

from dataclasses import dataclass

from halfbyte.linear.sequence_tiles import is_long, tile_tokens
from halfbyte.plan.model_shape import ModelShape
from halfbyte.runtime.device import DeviceSpec

# linear/triton_swiglu.py: columns of a tile, most rows of a span and least, programs an
# SM at least, highest rank.
_TILE, _SPAN, _SHORTEST, _PROGRAMS, GATED_RANK = 128, 1024, 32, 3, 32
# linear/triton_matmul.py: rows from which Hopper's kernels run.
_FEWEST_ROWS = 2048

# layers/long_attention.py: tokens times heads of one call of attention's backward.
_GROUP = 1 << 18

# The width of a layer that takes an H100 as long as offloading its input and attention;
# `GpuSpec.checkpoint_width` of others.
CHECKPOINT_WIDTH = 3072

# Products in 8 bits against those in bfloat16, both with adapters, at 8192 tokens of a 7B model:
# 2026-11-30_gpu_fp8.json. Other GPUs with FP8 units have twice the arithmetic, too.
FP8_SPEEDUP = 1.8


def checkpoint_share(width: int, length: int, narrowest: int, *, fp8: bool = False) -> float:
    """Return of how many layers an attention checkpoint can be offloaded beside their forward.

    The bus has to move the input of every layer, and with a checkpoint twice as much on top.

    Args:
        width: Width of the residual stream.
        length: Tokens of a document.
        narrowest: `GpuSpec.checkpoint_width`: products of a layer as wide as that take as long as
            all three, per token.
        fp8: Whether products are in 8 bits.
    """
    # Attention has 2 · length · width operations per token, at half of the products' rate; products
    # have 24 · width².
    speed = FP8_SPEEDUP if fp8 else 1.0
    moved = 3 * (width / speed + length / 6) / narrowest  # of these three, beside a layer
    return min(1.0, max(0.0, (moved - 1) / 2))


# linear/experts.py: bytes of experts decoded at a time, and with all inputs offloaded.
DECODED_BYTES, LEAST_DECODED_BYTES = 256 << 20, 16 << 20

# What is planned for where nothing else is said.
H100 = DeviceSpec("H100 80 GB", (9, 0), num_sms=132, memory=85_029_158_912)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes a token of one decoder layer.

    Attributes:
        shape: The model's widths.
        itemsize: Bytes of an activation.
        rank: What ranks of its adapters are filled up to, as they are multiplied with.
        ranks: Sum of these in a layer.
        copied: Elements of the copies of its adapters that it multiplies with.
        fused: Whether layers are run by ``layers.decoder_layer``.
        on_gpu: Whether they are on a GPU.
        gpu: Which, if they are.
        packed: Whether experts are packed.
        offloaded: Whether all inputs are offloaded, so that the fewest experts are decoded at once.
        fp8: Whether products round their input to 8 bits first.
    """

    shape: ModelShape
    itemsize: int
    rank: int
    ranks: int
    copied: int
    fused: bool
    on_gpu: bool
    gpu: DeviceSpec = H100
    packed: bool = True
    offloaded: bool = False
    fp8: bool = False

    @property
    def by_kernels(self) -> bool:
        """Whether layers are run by a GPU's kernels."""
        return self.fused and self.on_gpu

    @property
    def multiplied(self) -> bool:
        """Whether base and adapter are multiplied together, by ``linear.triton_matmul``."""
        return self.by_kernels and self.itemsize == 2

    @property
    def copies(self) -> int:
        """What a saved layer keeps whatever the tokens."""
        return self.itemsize * self.copied if self.by_kernels else 0

    @property
    def input(self) -> int:
        """The layer's input."""
        return self.itemsize * self.shape.hidden

    @property
    def lora(self) -> int:
        """What a recomputed layer keeps with its input: x Aᵀ of each linear."""
        return self.itemsize * self.ranks if self.on_gpu and self.itemsize == 2 else 0

    def is_tiled(self, tokens: int) -> bool:
        """Return whether a part of so many tokens is recomputed by tiles."""
        return self.by_kernels and self.shape.mixture is None and is_long(1, tokens)

    def kept(self) -> dict[str, int]:
        """Return the bytes that a layer keeps in addition to its input, by term."""
        s, e = self.shape, self.itemsize
        wide = e if self.fused else 4  # norms keep what they compute in
        norms = 2 * e * s.hidden + (e * s.hidden if wide == e else 2 * wide * s.hidden)
        projected = e * (s.query + 2 * s.key_value)
        attention = e * (2 * s.query + s.key_value)
        mlp = (3 if self.fused else 4) * e * s.intermediate
        if self.multiplied:
            mlp = 2 * e * s.intermediate  # their product is made in backward
        if s.mixture is not None:
            # Logits and probabilities of all experts; number, weight and place of the chosen ones.
            mlp = (e + 4) * s.mixture.experts + (e + 16) * s.mixture.per_token
        statistics = 4 * 2
        if self.on_gpu:
            statistics += 4 * s.heads
            if self.fused and not s.head_norms:
                attention = e * s.query  # q and k are turned where they are
            if not self.gpu.has_flash_attention and s.key_value < s.query:
                attention += 2 * e * s.query  # k and v, for each of the queries' heads
                if s.head_norms:
                    attention -= e * s.key_value  # k as it is turned, which is copied
        else:
            # Separate products: of them v alone lives on. Attention's output is laid out anew.
            projected = e * s.key_value
            attention += e * s.query
        if s.head_norms:
            projected = e * s.key_value + wide * (s.query + s.key_value)
            statistics += 4 * (s.heads + s.heads * s.key_value // s.query)
        return {
            "norms": norms,
            "projected": projected,
            "attention": attention,
            "mlp": mlp,
            "adapters": e * self.ranks,
            "statistics": statistics,
        }

    @property
    def attention_checkpoint(self) -> int:
        """What spares computing attention again: its output, and the stream after it."""
        return self.itemsize * (self.shape.hidden + self.shape.query) + 4 * self.shape.heads

    @property
    def saved(self) -> int:
        """What a saved layer keeps, its input included."""
        return self.input + sum(self.kept().values())

    def gated_sums(self, tokens: int) -> int:
        """Return what gate's backward has summed apart, of a part of so many tokens."""
        if not self.multiplied or self.rank > GATED_RANK or not self.gpu.is_hopper:
            return 0
        tiles, span = -(-self.shape.intermediate // _TILE), _SPAN
        while span > _SHORTEST and tiles * -(-tokens // span) < _PROGRAMS * self.gpu.num_sms:
            span //= 2
        by_tile = 2 * tiles * tokens * self.itemsize
        return self.rank * (by_tile + -(-tokens // span) * 3 * self.shape.intermediate * 4)

    def experts(self, tokens: int, *, backward: bool) -> int:
        """Return what a mixture of experts has while it runs, besides what it keeps."""
        if self.shape.mixture is None:
            return 0
        experts, per_token, inner, gated, _ = self.shape.mixture
        each = self.itemsize * (1 + gated) * inner * self.shape.hidden
        size = max(LEAST_DECODED_BYTES if self.offloaded else DECODED_BYTES, each)
        by_chunk = self.packed and self.on_gpu and gated
        computed = min(per_token, size // each) if by_chunk else per_token
        widths = per_token * self.shape.hidden + computed * (2 + gated if backward else 1) * inner
        buffer = min(size, experts * each) if self.packed else 0
        return self.itemsize * tokens * widths + buffer

    def forward(self, tokens: int) -> int:
        """Return what a recomputed layer's forward has when it has most, input and output apart.

        All that its functions give is there until it ends. On Hopper, gate and up are not, but only
        their product: both happen in one kernel.
        """
        if self.is_tiled(tokens):
            return self._tiled_forward(tokens)
        if not self.by_kernels:
            return self.experts(tokens, backward=False)
        kept = sum(self.kept().values()) - self.lora
        if self.shape.mixture is not None:
            return tokens * kept + self.experts(tokens, backward=False)
        if not self.multiplied:
            return tokens * kept
        inner = self.itemsize * self.shape.intermediate
        one_kernel = self.gpu.is_hopper and self.rank <= GATED_RANK and tokens >= _FEWEST_ROWS
        # In 8 bits: the input of the last product. Backward has rounded the gradients of gate and
        # up, too, in the place of the gradient of their product, which is as large.
        rounded = self.shape.intermediate if self.fp8 else 0
        return tokens * (rounded + (kept - inner if one_kernel else kept + inner))

    def forward_saved(self, tokens: int) -> int:
        """Return what a saved layer's forward has beside what it keeps and its output.

        That are the product of gate and up, and what the MLP adds to the stream.
        """
        if self.shape.mixture is not None:
            return self.experts(tokens, backward=False)
        inner = self.itemsize * (self.shape.intermediate + self.shape.hidden)
        inner += self.shape.intermediate if self.fp8 else 0
        return tokens * inner if self.multiplied else 0

    def gradients(self, tokens: int) -> int:
        """Return what backward holds beside a part's activations when it holds most."""
        s = self.shape
        if self.by_kernels:
            e, heads = self.itemsize, 2 if s.key_value < s.query else 0
            attention = e * (s.hidden + 2 * s.query + 2 * s.key_value + heads * s.query)
            gone = e * 2 * s.hidden + self.kept()["mlp"]
            mlp = tokens * e * s.intermediate + self.gated_sums(tokens)
            if s.mixture is not None:
                mlp = self.experts(tokens, backward=True)
            return max(mlp, tokens * (attention + 4 * s.query - gone))
        if s.mixture is not None:
            return self.experts(tokens, backward=True) + tokens * self.itemsize * s.hidden
        return tokens * self.itemsize * ((2 if self.fused else 3) * s.intermediate + s.hidden)

    def backward(self, tokens: int) -> int:
        """Return what is alive at the peak of a layer's backward, input and output apart."""
        if self.is_tiled(tokens):
            return self._tiled_backward(tokens)
        return tokens * (sum(self.kept().values()) - self.lora) + self.gradients(tokens)

    # --- by tiles ---------------------------------------------------------------------------------

    def _whole(self) -> tuple[int, int, int]:
        """Return the bytes a token of q, k, v; of attention's output; of the stream after it."""
        s, e = self.shape, self.itemsize
        return e * (s.query + 2 * s.key_value), e * s.query + 4 * s.heads, e * s.hidden

    def _tiled_forward(self, tokens: int) -> int:
        (heads, attended, stream), e = self._whole(), self.itemsize
        tile = tile_tokens(tokens)
        one_kernel = self.multiplied and self.gpu.is_hopper and tile >= _FEWEST_ROWS
        widths = (1 if one_kernel and self.rank <= GATED_RANK else 3) * self.shape.intermediate
        in_mlp = tile * e * (widths + 2 * self.shape.hidden)
        # The output exists only in the last.
        return max(tokens * (heads + attended - stream), tokens * stream + in_mlp)

    def _tiled_backward(self, tokens: int) -> int:
        (heads, attended, stream), e, s = self._whole(), self.itemsize, self.shape
        tile = tile_tokens(tokens)
        in_mlp = tile * e * (3 * s.intermediate + s.hidden) + self.gated_sums(tile)
        return max(
            tokens * (heads + attended + stream) + in_mlp,
            tokens * (heads + attended + e * s.query) + self._attention_sums(tokens),
        )

    def _attention_sums(self, tokens: int) -> int:
        """Return what attention's backward has for a group of heads beside q, k, v and outputs."""
        s, e = self.shape, self.itemsize
        groups = max(1, s.heads * s.key_value // s.query)
        each, width = s.heads // groups, s.query // s.heads
        sizes = (n for n in range(1, groups + 1) if groups % n == 0)
        size = next((n for n in sizes if tokens * n * each >= _GROUP), groups)
        # Of queries float32 and the result, and their sums; of keys and values each head's, summed.
        of_queries = each * (width * (4 + e + 2 * e * (each > 1)) + 4)
        return tokens * size * (of_queries + 2 * e * width)
