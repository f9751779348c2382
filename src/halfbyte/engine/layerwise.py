"""The layer engine: an explicit loop over a decoder's layers.

On a GPU, supported layers (layers/decoder_layer.py) are run fused, and the examples of a step are
packed into a few parts (engine/packing.py), which go through forward, loss and backward one after
the other, as CUDA graphs if they can be captured (engine/forward_backward.py). So memory depends on
the size of a part, not of a step. Other layers are packed like that, without graphs, if they can be
restricted to documents (engine/packing_check.py). Otherwise, and on a CPU, every part of a step
passes through layer l before any passes through layer l + 1 (layer-major accumulation): packed on a
CPU, if the model can be restricted to documents, else a micro-batch. In all cases,

    forward    for l: decode layer l's weights once; for each part: run it; keep the layer's
               input and, on a GPU, x Aᵀ of its adapters, or everything its backward needs
    loss       for each part: final norm and head over its supervised positions only
    backward   for l, last first: decode once; for each part: recompute what is missing, run
               the layer's own small autograd graph, pass the gradient to the previous layer

Modules that are trained in full get their gradients in place: norms within their layer's graph, the
head from the loss, the embedding from a graph around the decoder's input.

Which tensors are kept is chosen per layer to fit a memory budget (`ActivationPolicy`); decoded
weights come last. Results are bit-identical under every policy, since the arithmetic is the same.

Any transformers decoder is supported: it is run with its layers stubbed, which records the keyword
arguments (masks, positions, rotary tables) of each layer, and then the layers are called with these
here. Before the engine is used, its loss on a few tokens is compared with the model's own
(engine/choose.py).

Steps minimise an `Objective` (engine/objective.py), cross entropy by default.

Right padding needs no mask: with causal attention no position attends to later ones, and padding
positions are not supervised.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.engine.buckets import Buckets, PartShape, UnpaddedParts, divide, own_shape
from halfbyte.engine.cuda_graphs import CapturedPasses
from halfbyte.engine.forward_backward import LayerInput, Passes
from halfbyte.engine.logit_scale import logit_scale
from halfbyte.engine.neftune import EmbeddingNoise
from halfbyte.engine.objective import CROSS_ENTROPY, Objective
from halfbyte.engine.packing import (
    Batch,
    PackedBatch,
    lengths_of,
    part_of_shape,
    parts_of,
    tiles_of_loss,
)
from halfbyte.engine.recorded_layers import EngineError, record, recorded_run
from halfbyte.engine.rotary_tables import RotaryTables
from halfbyte.engine.weights import WeightProvider, acquired, provider_of
from halfbyte.layers.attention import Documents, can_pack
from halfbyte.layers.decoder_layer import AttentionCheckpoint, fused
from halfbyte.layers.elementwise import rms_norm
from halfbyte.layers.families import is_known_norm
from halfbyte.layers.long_attention import name_of
from halfbyte.layers.multimodal import decoder_layers, text_decoder
from halfbyte.layers.vocabulary import FrozenHead, HostHead
from halfbyte.linear.layer_stream import spread, stream_of
from halfbyte.linear.lora import (
    DropoutClock,
    adapters,
    dropout_clock,
    frozen_linears,
)
from halfbyte.linear.modules_to_save import trained_whole
from halfbyte.linear.sequence_tiles import TILE_TOKENS, is_long, launches_unnoticed
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import QuantizedWeight
from halfbyte.runtime.device import is_out_of_memory

_FINAL_NORMS = (
    *("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm"),
    *("embedding_norm", "norm_f"),  # LFM2, Mamba
)


def _number(index: int, part: PackedBatch) -> int:
    """Return the micro-batch of a step that decides on the masks of dropout in a part."""
    return index if part.number is None else part.number


class LayerEngine:
    """Runs optimizer steps over a decoder, layer by layer.

    Args:
        model: A model of ``models.build``, adapters attached.
        fuse: Whether to run layers with the fused operations of layers/decoder_layer.py, if all are
            supported.
        graphs: Whether passes may be captured as CUDA graphs.

    Attributes:
        tuple_output: The number of values of the tuple that layers return, or 0 if they return a
            tensor; set by the probe (engine/choose.py).
        fused: Number of fused layers: all or none.
        width: The width of the residual stream.
        dtype: The dtype of activations and products.
        decoded_bytes: Size of a layer's decoded weights; 0 if they are not packed.
        trained: The trained parameters of each layer.
        noise: Added to the embeddings in steps, if asked for.
        objective: The objective that steps minimise.
        buckets: The shapes of parts, if a run has chosen any.
        unpadded: How documents are packed on a CPU, if they can be (engine/packing_check.py).
        packable: Whether layers that are not fused can be packed on a GPU; set by the same check.
        window: The longest document that may be packed then, or None for any.
        max_seqlen: Tokens of the longest document of a run, if known: if it is longer than an
            attention window, the run is not packed.
        most_parts: Parts of the run's largest step, if known.
        parts_together: How many packed parts go through each layer together on a GPU, eagerly. One,
            unless weights are streamed and take longer to arrive than a part takes to compute:
            they are copied once for all of these.
        on_layer_backward: Called with a layer's index and the loss once the layer's gradients are
            final, before backward of the layers below. Disables CUDA graphs.
        on_phase: Called with ``forward``, ``loss`` and ``backward`` when a step starts each.
        messages: Messages for the user; cleared by the code that logs them.

    Raises:
        EngineError: If the decoder's layers, final norm or head cannot be identified.
    """

    name = "layer engine"
    layers: list[nn.Module]
    norm: nn.Module
    head: nn.Linear | FrozenHead | HostHead
    clock: DropoutClock | None
    noise: EmbeddingNoise | None = None

    def __init__(self, model: PreTrainedModel, *, fuse: bool = False, graphs: bool = False) -> None:
        self.model = model
        self.decoder: Any = text_decoder(model)
        config = model.config.get_text_config()
        try:
            self.layers = decoder_layers(model)
        except ValueError as error:
            raise EngineError(str(error)) from error
        norms = [n for n in _FINAL_NORMS if isinstance(getattr(self.decoder, n, None), nn.Module)]
        head = model.get_output_embeddings()
        if (
            len(norms) != 1
            or not isinstance(head, nn.Linear | FrozenHead | HostHead)
            or getattr(head, "bias", None) is not None
        ):
            raise EngineError("no single final norm, or an output head with a bias")
        runs = [run for layer in self.layers if fuse and (run := fused(layer)) is not None]
        self._fused = runs if len(runs) == len(self.layers) else []
        self.fused = len(self._fused)
        self.norm = getattr(self.decoder, norms[0])
        self.head = head
        self._logit_scale = logit_scale(config)
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
        self.width = int(config.hidden_size)
        self.dtype: torch.dtype = model.halfbyte_recipe.compute_dtype
        self.linears = [list(frozen_linears(layer).values()) for layer in self.layers]
        packed = [linear for linear in self.linears[-1] if linear.quantized is not None]
        self.decoded_bytes = sum(
            m.layout.nbytes([(m.out_features, m.in_features)], self.dtype) for m in packed
        )
        # Nothing before the lowest trained layer requires a gradient: backward ends there.
        trained = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        of_layers = (p for layer in self.layers for p in layer.parameters())
        after_entry = {*of_layers, *self.norm.parameters()}
        self.entry_trained = any(
            p.requires_grad for p in self.decoder.parameters() if p not in after_entry
        )
        lowest = next((i for i, those in enumerate(trained) if those), len(trained))
        self.first_trained = 0 if self.entry_trained else lowest
        self.objective: Objective = CROSS_ENTROPY
        self.buckets: Buckets | None = None
        self.unpadded: UnpaddedParts | None = None
        self.packable = False
        self.window: int | None = None
        self.max_seqlen = 0
        self.most_parts = self.parts_together = 1
        self._decoded = 0
        self.clock = dropout_clock(model)
        self._drops = any(adapter.config.dropout for adapter in adapters(model).values())
        self.tuple_output, self._window_reported = 0, False
        self.messages: list[str] = []
        self.on_phase: Callable[[str], None] = lambda phase: None
        self.on_layer_backward: Callable[[int, Tensor], None] | None = None
        self.trained = trained
        weights = provider_of(model, self.linears, self.dtype)
        self.passes = Passes(trained, self.first_trained, self.entry_trained, weights)
        self._tables = RotaryTables(self.decoder)
        parameters = [parameter for layer in trained for parameter in layer]
        self._graphs = CapturedPasses(self.passes, parameters) if graphs else None
        self.why_no_graphs = "" if graphs else "not asked for"
        if graphs and (why := self._why_not_captured()):
            self._graphs, self.why_no_graphs = None, why

    def _why_not_captured(self) -> str:
        """Return why passes cannot be captured (host work in each step), or ""."""
        if not self._fused:
            return "its layers are not fused"
        stream = stream_of(self.model)
        if stream is not None and not stream.source.can_be_captured:
            return "weights are read from the disk by the host"
        if self._drops:
            return "dropout masks are drawn by the host"
        if self.entry_trained:
            return "the embedding is trained"
        if any(adapter.rescales for adapter in adapters(self.model).values()):
            return "DoRA's norms are looked after by the host"
        return ""

    def summary(self) -> str:
        """Return a description of how steps are run, for the user."""
        message = f"layer engine over {len(self.layers)} layers"
        if self.unpadded is not None or (self.packable and self.packs):
            message += ", documents packed"
        if self.fused:
            message += ", fused"
            message += ", documents packed" if self.packs else ", documents not packed"
            why = "parts are long" if self._launches_unnoticed else "documents are not packed"
            why = self.why_no_graphs or why
            message += ", CUDA graphs" if self.captures else f", no CUDA graphs: {why}"
            if self.model.device.type == "cuda" and self.tiles(self.max_seqlen):
                name = name_of(self.model.device, self.dtype, self._fused[-1].head_dim)
                message += f", attention of long documents by {name}"
        return message

    @property
    def captures(self) -> bool:
        """Whether passes can be CUDA graphs."""
        eager = self.on_layer_backward is not None or self.parts_together > 1
        eager = eager or self._launches_unnoticed
        return self._graphs is not None and self.packs and not eager

    @property
    def _launches_unnoticed(self) -> bool:
        """Whether the GPU is busy for longer than Python launches, in the largest part of a run."""
        if self.buckets is None:
            return False
        largest = self.buckets.largest
        return launches_unnoticed(largest.rows, largest.tokens, self.width)

    def tiles(self, tokens: int) -> bool:
        """Return whether recomputed layers run a part of so many tokens by tiles."""
        return bool(self._fused) and self._fused[-1].can_tile and is_long(1, tokens)

    @property
    def num_graphs(self) -> int:
        """Number of shapes captured as CUDA graphs."""
        return 0 if self._graphs is None else len(self._graphs)

    def stop_capturing(self, why: str) -> None:
        """Disable CUDA graphs."""
        if self._graphs is not None:
            self.forget_graphs()
            self._graphs, self.why_no_graphs = None, why
            self.messages.append(f"no CUDA graphs from here on: {why}")

    def forget_graphs(self) -> None:
        """Free all captured graphs and their memory."""
        if self._graphs is not None and self._graphs.nbytes:
            self._graphs.forget()
            torch.cuda.empty_cache()

    @property
    def packs(self) -> bool:
        """Whether the documents of a step are packed, across micro-batches."""
        if self.unpadded is not None:
            return self.objective.separable
        if self._drops or not self.objective.separable or not self._sees_all(self.max_seqlen):
            return False
        if not self._fused:
            return self.packable
        if self._tables.exceeds_limit(self.max_seqlen):
            return False
        return can_pack(self.dtype, self.model.device, self._fused[0].head_dim)

    def keep_decoded(self, layers: int) -> None:
        """Keep the weights of the last ``layers`` layers decoded."""
        if layers == self._decoded:
            return
        self._decoded = layers
        self.forget_graphs()  # they read weights where these were
        self.weights.keep(layers)

    def stream_weights(self, layers: int) -> None:
        """Stream the weights of so many layers; for a model with a `LayerStream`."""
        stream = stream_of(self.model)
        if stream is None or layers == len(stream.streamed):
            return
        self.forget_graphs()  # they read weights where these were
        self.weights.forget()
        count = len(self.layers)
        stream.stream_all_but(spread(count, count - layers))

    @property
    def weights(self) -> WeightProvider:
        """The provider of the layers' weights; can be replaced between steps."""
        return self.passes.weights

    @weights.setter
    def weights(self, provider: WeightProvider) -> None:
        self.forget_graphs()  # they read weights where these were
        self.passes.weights = provider

    @property
    def head_weight(self) -> Tensor | QuantizedWeight:
        """The output head's weight [V, H], packed or not."""
        if isinstance(self.head, HostHead):
            return self.head.loaded(self.model.device)
        packed = self.head.quantized if isinstance(self.head, FrozenHead) else None
        if packed is not None:
            return packed
        assert self.head.weight is not None
        return self.head.weight.detach()

    def step(self, batches: Sequence[Batch], normaliser: float, policy: ActivationPolicy) -> Tensor:
        """Add the gradients of one optimizer step to the adapters' ``.grad``.

        Args:
            batches: The step's micro-batches.
            normaliser: Divisor of the loss: ``objective.count_terms(batches)``.
            policy: The activation policy.

        Returns:
            The loss: float32 scalar on the device, summed over parts and divided.
        """
        parts = self.make_parts(batches, self.objective)
        if (router := self.passes.router_loss) is not None:
            factor = self.objective.count_terms(batches) / normaliser
            router.begin_step(sum(lengths_of(batches)), factor)
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        # Packed parts run one after the other on a GPU, or a few of them together; others all
        # together, layer by layer.
        count = self.parts_together if self._runs_apart(parts) else len(parts)
        together = [parts[i : i + count] for i in range(0, len(parts), count)]
        for number, group in enumerate(together, start=1):
            self._forward_backward(group, normaliser, policy, total, last=number == len(together))
        return total

    def _forward_backward(
        self,
        parts: Sequence[PackedBatch],
        normaliser: float,
        policy: ActivationPolicy,
        total: Tensor,
        *,
        last: bool,
    ) -> None:
        """Add the gradients of some parts, and their loss to ``total``."""
        self.on_phase("forward")
        layer_inputs = self.embed(parts)
        graphs, shape = self._graphs, parts[0].shape
        if graphs is not None and not (self.captures and len(parts) == 1 and graphs.has(shape)):
            graphs = None
        if (router := self.passes.router_loss) is not None:
            router.begin(parts)
        entries = [layer_input.x for layer_input in layer_inputs] if self.entry_trained else []
        if graphs is None:
            hidden = self.passes.forward(layer_inputs, policy)
            if self.tiles(max(part.ids.numel() for part in parts)):
                # The passes keep what backward needs of them.
                layer_inputs = [each._replace(x=each.x.new_empty(0)) for each in layer_inputs]
        else:
            hidden = [graphs.forward(shape, layer_inputs[0])]
            layer_inputs = []  # the graphs have copies
        self.on_phase("loss")
        self.passes.before_layer()
        grads: list[Tensor] = []
        for part, x in zip(parts, hidden, strict=True):
            loss, grad = self.loss_and_grad(x, part, normaliser, self.objective)
            total += loss
            grads.append(grad)
        total += 0 if router is None else router.loss()
        self.on_phase("backward")
        if graphs is not None:
            graphs.backward(shape, grads[0])
            return
        del hidden, x, grad  # the passes free theirs layer by layer
        done = self.on_layer_backward if last else None
        self.passes.backward(
            layer_inputs, grads, None if done is None else lambda i: done(i, total)
        )
        for entry, grad in zip(entries, grads, strict=False):
            torch.autograd.backward(entry, grad)

    def capture(
        self, policy: ActivationPolicy, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Capture the passes over parts of every planned shape as CUDA graphs, the largest first.

        This also compiles every kernel of a step. Gradients must be zero, and are still zero after.

        Args:
            policy: The activation policy.
            progress: Called with (done, total); each shape is compiled and captured.

        Raises:
            torch.OutOfMemoryError: If there is too little memory.
        """
        graphs = self._graphs
        if graphs is None or not self.captures or self.buckets is None:
            return
        self.forget_graphs()
        shapes, progress = self.buckets.shapes, progress or (lambda done, total: None)
        try:
            # All shapes are compiled before the first is captured, because compiling takes memory
            # as well, before graphs hold theirs.
            for number, shape in enumerate(shapes):
                static = graphs.to_static(self.embed([part_of_shape(shape, self.model.device)])[0])
                self.passes.warm_up(static, policy, whole=number == 0)
                for supervised in {min(17, shape.numel), shape.numel}:  # aligned and unaligned
                    self.loss_and_grad(
                        static.x, part_of_shape(shape, self.model.device, supervised), 1.0
                    )
                progress(number + 1, 2 * len(shapes))
            for number, shape in enumerate(shapes, start=1):
                static = graphs.to_static(self.embed([part_of_shape(shape, self.model.device)])[0])
                try:
                    graphs.capture(shape, static, policy)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    self.stop_capturing(f"capturing one failed: {error}".splitlines()[0])
                    return
                progress(len(shapes) + number, 2 * len(shapes))
        finally:
            for parameter in self.model.parameters():  # the loss adds to the grad of a trained head
                if parameter.grad is not None:
                    parameter.grad.zero_()

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], objective: Objective = CROSS_ENTROPY) -> Tensor:
        """Return the loss of ``batches``, summed, float32 scalar; no gradients.

        Args:
            batches: Micro-batches, as of a step.
            objective: The objective to evaluate; by default cross entropy, whatever steps minimise.
        """
        parts = self.make_parts(batches, objective)
        layer_inputs = self.embed(parts)
        hidden = [layer_input.x for layer_input in layer_inputs]
        for index in range(len(self.layers)):
            with acquired(self.weights, index, forward_only=True):
                for i, layer_input in enumerate(layer_inputs):
                    hidden[i] = layer_input.run(index, hidden[i], layer_input.layer_args, read=True)
        losses = [
            self._loss_of_rows(x.flatten(0, 1).index_select(0, tile.rows), tile, objective)
            for x, part in zip(hidden, parts, strict=True)
            for tile in self._tiles_of_loss(x, part, objective)
        ]
        return torch.stack(losses).sum()

    def loss_and_grad(
        self,
        hidden: Tensor,
        part: PackedBatch,
        normaliser: float,
        objective: Objective = CROSS_ENTROPY,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a part, divided, and its gradient w.r.t. the last layer's output.

        Of a long part, the loss is computed for a tile of its supervised positions at a time, if
        the objective is a sum over tokens.
        """
        total, grad = torch.zeros((), device=hidden.device), None
        for tile in self._tiles_of_loss(hidden, part, objective):
            rows = hidden.flatten(0, 1).index_select(0, tile.rows).requires_grad_()
            loss = self._loss_of_rows(rows, tile, objective) / normaliser
            loss.backward()  # type: ignore[no-untyped-call]
            if grad is None:
                grad = torch.zeros_like(hidden)
            if rows.grad is not None:
                grad.flatten(0, 1).index_copy_(0, tile.rows, rows.grad)
            total += loss.detach()
            del rows, loss
        assert grad is not None
        return total, grad

    def _tiles_of_loss(
        self, hidden: Tensor, part: PackedBatch, objective: Objective
    ) -> Iterable[PackedBatch]:
        tiled = objective.by_tokens and is_long(*hidden.shape[:2])
        return tiles_of_loss(part, TILE_TOKENS) if tiled else [part]

    def _loss_of_rows(self, rows: Tensor, part: PackedBatch, objective: Objective) -> Tensor:
        """Return the loss of a part, from the last layer's output at its supervised positions."""
        norm: Any = self.norm
        if self._fused and is_known_norm(norm) and not norm.weight.requires_grad:
            rows = rms_norm(rows, norm.weight, norm.variance_epsilon)
        else:
            rows = norm(rows)
        if self._logit_scale != 1:
            rows = rows * self._logit_scale
        return objective.loss_of_hidden(
            rows,
            self.head_weight,
            part.targets,
            part.segments,
            softcap=self.softcap,
            trained=trained_whole(self.head).get("weight"),
        )

    def make_parts(
        self, batches: Sequence[Batch], objective: Objective = CROSS_ENTROPY
    ) -> list[PackedBatch]:
        """Return the parts of a step on the device, with the inputs of an objective."""
        pack, longest = self.packs and objective.separable, max(lengths_of(batches))
        if self._fused and self._tables.exceeds_limit(longest):
            pack = False
        if not self._sees_all(longest):
            pack = False
            if not self._window_reported:
                self._window_reported = True
                what = "layers not fused" if self._fused else "not packed"
                self.messages.append(f"documents longer than the attention window: {what}")
        return parts_of(
            batches,
            self.model.device,
            pack=pack,
            buckets=self.unpadded or self.buckets,
            segments=objective.needs_segments,
        )

    def part_shapes(self, lengths: Sequence[int]) -> list[PartShape]:
        """Return the shape of each part that documents of these lengths are packed into."""
        if self.unpadded is not None:
            return self.unpadded.shapes(lengths)
        if self.buckets is None:
            return [own_shape([lengths[i] for i in part]) for part in divide(lengths)]
        parts = self.buckets.divide(lengths)
        return [self.buckets.fit([lengths[i] for i in part]) for part in parts]

    def _sees_all(self, max_seqlen: int) -> bool:
        """Return whether a document of ``max_seqlen`` tokens fits the layers' attention windows."""
        windows = [self.window, *(layer.window for layer in self._fused)]
        return all(max_seqlen <= (window or max_seqlen) for window in windows)

    def _runs_apart(self, parts: Sequence[PackedBatch]) -> bool:
        """Return whether parts were packed for a GPU, where memory depends on the largest."""
        if self.unpadded is not None:
            return False
        max_seqlen = max(p.max_seqlen if p.documents is None else 0 for p in parts)
        return self.packs and self._sees_all(max_seqlen)

    def embed(self, parts: Sequence[PackedBatch]) -> list[LayerInput]:
        """Return the inputs of layer 0 for each part."""
        if self._fused and (
            self._runs_apart(parts) or self._sees_all(max(p.max_seqlen for p in parts))
        ):
            return [self._fused_input(_number(i, part), part) for i, part in enumerate(parts)]
        # Without documents the arguments depend only on the shape, so equal shapes share them.
        by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        layer_inputs = []
        for i, part in enumerate(parts):
            lengths = part.lengths
            if self.noise is not None:
                self.noise.spans = part.spans
            x, calls = record(
                self.decoder, self.layers, part, lengths, self.tuple_output, self.entry_trained
            )
            if not lengths:
                calls = by_shape.setdefault(tuple(part.ids.shape), calls)
            run = recorded_run(self.layers, self.clock, _number(i, part), calls, lengths)
            layer_inputs.append(LayerInput(x, (), run))
        return layer_inputs

    def _fused_input(self, micro_batch: int, part: PackedBatch) -> LayerInput:
        if self.noise is not None:
            self.noise.spans = part.spans
        with torch.set_grad_enabled(self.entry_trained):
            x = self.decoder.get_input_embeddings()(part.ids)
        tables = self._tables.of(x, part, self._fused[0].head_dim)
        layer_args = tables if part.documents is None else (*tables, part.documents.cu_seqlens)

        # Not `self`: the engine keeps captures, and a reference cycle would delay freeing memory.
        clock, layers, max_seqlen = self.clock, self._fused, part.max_seqlen
        # A graph would be replayed for other documents.
        known = tuple(part.lengths) if is_long(*part.ids.shape) and not self.captures else ()

        def run(
            layer: int,
            x: Tensor,
            layer_args: tuple[Tensor, ...],
            *,
            read: bool,
            checkpoint: AttentionCheckpoint | None = None,
        ) -> Tensor:
            if clock is not None:
                clock.micro_batch = micro_batch
            cos, sin, *cu_seqlens = layer_args
            documents = Documents(cu_seqlens[0], max_seqlen, known) if cu_seqlens else None
            return layers[layer](x, cos, sin, documents, read=read, checkpoint=checkpoint)

        return LayerInput(x, layer_args, run)
