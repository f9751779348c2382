"""The layer engine: we own the loop over a decoder's layers.

A decoder is a list of layers. On a GPU, layers that are known (layers/decoder_layer.py) are run
fused; then the examples of a step are packed into a few parts (engine/packing.py), which go through
forward, loss and backward one after the other, as CUDA graphs where they can be captured
(engine/forward_backward.py). So memory is that of a part, whatever the step. Elsewhere every
micro-batch of an optimizer step passes through layer l before any goes through layer l + 1
(layer-major accumulation). With either,

    forward    for l: decode layer l's weights once; for each micro-batch: run it; keep the layer's
               input and, on a GPU, x Aᵀ of its adapters, or all that its backward needs
    loss       for each micro-batch: final norm and head over its supervised positions only
    backward   for l, last first: decode once; for each micro-batch: recompute what is missing, run
               the layer's own small autograd graph, hand the gradient to the layer before

A module that is trained whole gets its gradient where it stands: norms within their layer's graph,
the head from the loss, the embedding from a graph around the decoder's entry.

What is kept is chosen layer by layer to fit a memory budget (`ActivationPolicy`), last of all the
decoded weights themselves. The arithmetic is the same under every policy, and so are the results,
bit for bit.

It works for any transformers decoder: the decoder is run with its layers stubbed, which records
the keyword arguments (masks, positions, rotary tables) each layer would be called with; then the
layers are called with them, here. Before the engine is used, ``LayerEngine.probe`` compares its
loss with the model's own on a few tokens (engine/choose.py).

Right padding needs no mask: with causal attention a position never sees what comes after it, and
the padding's own positions are not supervised.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.engine.buckets import Buckets, divide, own_shape
from halfbyte.engine.cuda_graphs import CapturedPasses
from halfbyte.engine.forward_backward import LayerInput, Passes
from halfbyte.engine.packing import Batch, PackedBatch, lengths_of, part_of_shape, parts_of
from halfbyte.engine.weights import ResidentWeights, WeightProvider, acquired
from halfbyte.layers.attention import Documents, can_pack
from halfbyte.layers.cross_entropy import head_loss
from halfbyte.layers.decoder_layer import AttentionCheckpoint, fused
from halfbyte.layers.elementwise import rms_norm
from halfbyte.layers.families import is_known_norm
from halfbyte.layers.vocabulary import FrozenHead
from halfbyte.linear.group import LoraActivationCache
from halfbyte.linear.lora import (
    DropoutClock,
    adapters,
    dropout_clock,
    frozen_linears,
    trained_whole,
)
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import QuantizedWeight
from halfbyte.runtime.device import is_out_of_memory

# Lengths of rows whose rotary tables are kept: one of 2048 tokens takes 1 MB, and data that cannot
# be packed may have as many lengths.
_MOST_TABLES = 16
_FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm")


class EngineError(Exception):
    """The model's layers cannot be called one by one; says why."""


class _Stop(Exception):
    """Raised by the last stub: what lies behind the layers is not wanted."""


class LayerEngine:
    """Runs optimizer steps over a decoder, layer by layer.

    Args:
        model: A model of ``models.build``, adapters attached.
        fuse: Whether to run layers with the fused operations of layers/decoder_layer.py, if it
            knows all.
        graphs: Whether passes may be captured as CUDA graphs.

    Attributes:
        scratch: Where decoded weights live, and the count of how many were decoded.
        fused: How many layers are run fused: all or none.
        trained: For each layer, the parameters that are trained in it.
        buckets: The shapes of parts, if a run has chosen any.
        max_seqlen: Tokens of the longest document that will come, where that is known: a run with
            one that is longer than an attention window is not packed.
        finished: Called with a layer's number and the loss when the layer's gradients are final,
            while those below it are still to come. With it there are no CUDA graphs.
        mark: Called with ``forward``, ``loss`` and ``backward`` as a step comes to each.
        messages: Messages for a person; whoever logs them empties the list.

    Raises:
        EngineError: If the decoder's layers, final norm or head are not where they should be.
    """

    name = "layer engine"
    layers: list[nn.Module]
    norm: nn.Module
    head: nn.Linear | FrozenHead
    clock: DropoutClock | None

    def __init__(self, model: PreTrainedModel, *, fuse: bool = False, graphs: bool = False) -> None:
        self.model = model
        self.decoder: Any = model.get_decoder()
        count = model.config.get_text_config().num_hidden_layers
        lists = [m for m in self.decoder.children() if isinstance(m, nn.ModuleList)]
        lists = [m for m in lists if len(m) == count]
        norms = [n for n in _FINAL_NORMS if isinstance(getattr(self.decoder, n, None), nn.Module)]
        head = model.get_output_embeddings()
        if len(lists) != 1:
            raise EngineError(
                f"{len(lists)} lists of {count} layers in {type(self.decoder).__name__}"
            )
        if (
            len(norms) != 1
            or not isinstance(head, nn.Linear | FrozenHead)
            or getattr(head, "bias", None) is not None
        ):
            raise EngineError("no single final norm, or an output head with a bias")
        self.layers = list(lists[0])
        fast = [run for layer in self.layers if fuse and (run := fused(layer)) is not None]
        self._fused = fast if len(fast) == count else []
        self.fused = len(self._fused)
        self.norm = getattr(self.decoder, norms[0])
        self.head = head
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.softcap = float(softcap or 0)
        self.linears = [list(frozen_linears(layer).values()) for layer in self.layers]
        # Nothing before the lowest trained layer wants a gradient: backward ends there.
        trained = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        trains = [bool(those) for those in trained]
        behind = {*lists[0].parameters(), *self.norm.parameters()}
        self.entry_trained = any(
            p.requires_grad for p in self.decoder.parameters() if p not in behind
        )
        self.first_trained = [self.entry_trained or trains[0], *trains[1:], True].index(True)
        self.weights: WeightProvider = ResidentWeights(self.linears, self.dtype)
        self.buckets: Buckets | None = None
        self.max_seqlen = 0
        self._decoded = 0
        self.clock = dropout_clock(model)
        self._drops = any(adapter.config.dropout for adapter in adapters(model).values())
        self.tuple_output = self._told_window = False
        self.messages: list[str] = []
        self.mark: Callable[[str], None] = lambda part: None
        self.finished: Callable[[int, Tensor], None] | None = None
        self.trained = trained
        self.passes = Passes(trained, self.first_trained, self.entry_trained, self.weights)
        self._tables: dict[int, tuple[Tensor, ...]] = {}  # rotary, by tokens of a row
        within = [parameter for those in trained for parameter in those]
        self._graphs = CapturedPasses(self.passes, within) if graphs else None
        self.why_no_graphs = "" if graphs else "not asked for"
        if graphs and (why := self._host_decides()):
            self._graphs, self.why_no_graphs = None, why

    def _host_decides(self) -> str:
        """Return why passes cannot be captured: what the host does anew for each step."""
        if not self._fused:
            return "its layers are not fused"
        if self._drops:
            return "dropout masks are drawn by the host"
        if self.entry_trained:
            return "the embedding is trained"
        if any(adapter.rescales for adapter in adapters(self.model).values()):
            return "DoRA's norms are looked after by the host"
        return ""

    def summary(self) -> str:
        """Return how steps are run, for a person."""
        message = f"layer engine over {len(self.layers)} layers"
        if self.fused:
            message += ", fused"
            message += ", documents packed" if self.packs else ", documents not packed"
            why = self.why_no_graphs or "documents are not packed"
            message += ", CUDA graphs" if self.captures else f", no CUDA graphs: {why}"
        return message

    @property
    def captures(self) -> bool:
        """Whether passes can be CUDA graphs."""
        return self._graphs is not None and self.packs and self.finished is None

    @property
    def graphs(self) -> int:
        """How many shapes of parts are CUDA graphs."""
        return 0 if self._graphs is None else len(self._graphs)

    def stop_capturing(self, why: str) -> None:
        """Use no CUDA graphs from now on."""
        if self._graphs is not None:
            self.forget_graphs()
            self._graphs, self.why_no_graphs = None, why
            self.messages.append(f"no CUDA graphs from here on: {why}")

    def forget_graphs(self) -> None:
        """Let go of all graphs that were captured, and of their memory."""
        if self._graphs is not None and self._graphs.nbytes:
            self._graphs.forget()
            torch.cuda.empty_cache()

    @property
    def packs(self) -> bool:
        """Whether the examples of a step may be laid out anew."""
        if not self._fused or self._drops:
            return False
        flash = can_pack(self.dtype, self.model.device, self._fused[0].head_dim)
        return flash and self._sees_all(self.max_seqlen)

    def opened(self, layer: int) -> AbstractContextManager[LoraActivationCache]:
        """Have a layer's weights ready for as long as the context lasts."""
        return acquired(self.weights, layer)

    @property
    def decoded_bytes(self) -> int:
        """What the decoded weights of a layer take; nothing where they are not packed."""
        packed = (linear.quantized for linear in self.linears[-1])
        return self.dtype.itemsize * sum(q.numel for q in packed if q is not None)

    def keep_decoded(self, layers: int) -> None:
        """Keep the weights of the last ``layers`` layers decoded from now on."""
        if layers == self._decoded:
            return
        self._decoded = layers
        self.forget_graphs()  # they read weights where these were
        self.weights.keep(layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and products."""
        dtype: torch.dtype = self.model.halfbyte_recipe.compute_dtype
        return dtype

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def head_weight(self) -> Tensor | QuantizedWeight:
        """The output head's weight [V, H], as it is held."""
        packed = self.head.quantized if isinstance(self.head, FrozenHead) else None
        if packed is not None:
            return packed
        assert self.head.weight is not None
        return self.head.weight.detach()

    @torch.no_grad()
    def probe(self, vocabulary: int, device: str) -> None:
        """Compare this engine's loss with the model's own forward on a few tokens.

        Raises:
            EngineError: If they differ by more than rounding, or the layers cannot be called.
        """
        got, wanted = self.probed(vocabulary, device)
        # Same products in the same dtype; only the order of sums differs.
        if not torch.allclose(got, wanted, rtol=1e-4 if self.dtype == torch.float32 else 2e-2):
            raise EngineError(
                f"run layer by layer, the loss of a probe is {got:.6f}, not {wanted:.6f}"
            )

    @torch.no_grad()
    def probed(self, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
        """Return the loss of a few tokens as it is computed here, and as the model computes it.

        Raises:
            EngineError: If the layers cannot be called.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (2, 9), generator=generator).to(device)
        output_kinds: list[bool] = []
        watch = self.layers[0].register_forward_hook(
            lambda _module, _args, output: output_kinds.append(isinstance(output, tuple))
        )
        try:
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        finally:
            watch.remove()
        self.tuple_output = output_kinds == [True]
        targets = ids[:, 1:]
        wanted = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        try:
            return self.loss([Batch(ids[:, :-1], targets)]), wanted
        except (TypeError, AttributeError, RuntimeError) as error:
            raise EngineError(f"its layers cannot be called one by one: {error}") from error

    def step(self, batches: Sequence[Batch], normaliser: float, policy: ActivationPolicy) -> Tensor:
        """Add the gradients of one optimizer step to the adapters' ``.grad``.

        Args:
            batches: The step's micro-batches.
            normaliser: What the summed loss is divided by: the supervised tokens of the step.
            policy: What is kept for backward.

        Returns:
            The loss: float32 scalar on the device, summed over tokens and divided.
        """
        parts = self.prepare(batches)
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        # Packed parts go one after the other, micro-batches through each layer together.
        together = [[part] for part in parts] if self._packed(parts) else [parts]
        for number, some in enumerate(together, start=1):
            self._forward_backward(some, normaliser, policy, total, last=number == len(together))
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
        self.mark("forward")
        layer_inputs = self.embed(parts)
        graphs, shape = self._graphs, parts[0].shape
        if graphs is not None and not (self.captures and len(parts) == 1 and graphs.has(shape)):
            graphs = None
        if graphs is None:
            hidden = self.passes.forward(layer_inputs, policy)
        else:
            hidden = [graphs.forward(shape, layer_inputs[0])]
            layer_inputs = []  # the graphs have copies
        self.mark("loss")
        self.passes.between()
        grads: list[Tensor] = []
        for part, x in zip(parts, hidden, strict=True):
            loss, grad = self.loss_and_grad(x, part, normaliser)
            total += loss
            grads.append(grad)
        self.mark("backward")
        if graphs is not None:
            graphs.backward(shape, grads[0])
            return
        del hidden, x, grad  # the passes let go of theirs, layer by layer
        entries = [layer_input.x for layer_input in layer_inputs] if self.entry_trained else []
        done = self.finished if last else None
        self.passes.backward(
            layer_inputs, grads, None if done is None else lambda i: done(i, total)
        )
        for entry, grad in zip(entries, grads, strict=False):
            torch.autograd.backward(entry, grad)

    def capture(
        self, policy: ActivationPolicy, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Capture the passes over parts of every planned shape as CUDA graphs, the largest first.

        Everything that a step runs is compiled by that, too. Gradients must be zero, and still are
        then.

        Args:
            policy: What is kept for backward.
            progress: Called with (done, total): each shape is compiled, and captured.

        Raises:
            torch.OutOfMemoryError: If there is too little memory.
        """
        graphs = self._graphs
        if graphs is None or not self.captures or self.buckets is None:
            return
        self.forget_graphs()
        shapes, tell = self.buckets.shapes, progress or (lambda done, total: None)
        try:
            # All are compiled before the first is captured: what that takes, graphs' memory is not
            # yet beside.
            for number, shape in enumerate(shapes):
                held = graphs.hold(self.embed([part_of_shape(shape, self.model.device)])[0])
                self.passes.warm_up(held, policy, whole=number == 0)
                for supervised in {min(17, shape.numel), shape.numel}:  # aligned and not
                    self.loss_and_grad(
                        held.x, part_of_shape(shape, self.model.device, supervised), 1.0
                    )
                tell(number + 1, 2 * len(shapes))
            for number, shape in enumerate(shapes, start=1):
                held = graphs.hold(self.embed([part_of_shape(shape, self.model.device)])[0])
                try:
                    graphs.capture(shape, held, policy)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    self.stop_capturing(f"capturing one failed: {error}".splitlines()[0])
                    return
                tell(len(shapes) + number, 2 * len(shapes))
        finally:
            for parameter in self.model.parameters():  # the loss adds to a head that is trained
                if parameter.grad is not None:
                    parameter.grad.zero_()

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """Return the summed token loss of ``batches``, float32 scalar; no gradients."""
        parts = self.prepare(batches)
        layer_inputs = self.embed(parts)
        hidden = [layer_input.x for layer_input in layer_inputs]
        for index in range(len(self.layers)):
            with self.opened(index):
                for i, layer_input in enumerate(layer_inputs):
                    hidden[i] = layer_input.run(index, hidden[i], layer_input.layer_args, read=True)
        losses = [self._loss(h, part) for h, part in zip(hidden, parts, strict=True)]
        return torch.stack(losses).sum()

    def saved_bytes(self, batch: Batch) -> tuple[int, int]:
        """Measure what one layer keeps for ``batch``: (bytes when saved, bytes when recomputed)."""
        (layer_input,) = self.embed(self.prepare([batch]))
        return self.saved_bytes_of(layer_input)

    def saved_bytes_of(self, layer_input: LayerInput) -> tuple[int, int]:
        """Measure what one layer keeps for a part: (bytes when saved, bytes when recomputed)."""
        seen: dict[int, int] = {}
        there = [*self.layers[-1].parameters(), *layer_input.layer_args]
        weights = {tensor.untyped_storage().data_ptr() for tensor in there}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            # As it is, an output that is saved would keep the graph it is saved in, for good.
            return tensor.detach()

        index = len(self.layers) - 1
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with self.opened(index), torch.enable_grad(), hooks:
            x = layer_input.x.detach().requires_grad_()
            y = layer_input.run(index, x, layer_input.layer_args, read=True)
        return sum(seen.values()), y.nbytes

    def loss_and_grad(
        self, hidden: Tensor, part: PackedBatch, normaliser: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a part, divided, and its gradient by the last layer's output."""
        rows = hidden.flatten(0, 1).index_select(0, part.rows).requires_grad_()
        loss = self._head_loss(rows, part.targets) / normaliser
        loss.backward()  # type: ignore[no-untyped-call]
        grad = torch.zeros_like(hidden)
        if rows.grad is not None:
            grad.flatten(0, 1).index_copy_(0, part.rows, rows.grad)
        return loss.detach(), grad

    def _loss(self, hidden: Tensor, part: PackedBatch) -> Tensor:
        return self._head_loss(hidden.flatten(0, 1).index_select(0, part.rows), part.targets)

    def _head_loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        norm: Any = self.norm
        if self._fused and is_known_norm(norm) and not norm.weight.requires_grad:
            rows = rms_norm(rows, norm.weight, norm.variance_epsilon)
        else:
            rows = norm(rows)
        return head_loss(
            rows,
            self.head_weight,
            targets,
            softcap=self.softcap,
            trained=trained_whole(self.head).get("weight"),
        )

    def prepare(self, batches: Sequence[Batch]) -> list[PackedBatch]:
        """Return the parts of a step, on the device."""
        device = self.model.device
        if self._fused and not self._sees_all(max(lengths_of(batches))):
            if not self._told_window:
                self._told_window = True
                self.messages.append("documents longer than the attention window: layers not fused")
            return parts_of(batches, device, pack=False)
        return parts_of(batches, device, pack=self.packs, buckets=self.buckets)

    def part_sizes(self, lengths: Sequence[int]) -> list[int]:
        """Return the tokens of the parts that documents of these lengths are packed into."""
        if self.buckets is None:
            return [own_shape([lengths[i] for i in part]).numel for part in divide(lengths)]
        parts = self.buckets.divide(lengths)
        return [self.buckets.fit([lengths[i] for i in part]).numel for part in parts]

    def _sees_all(self, max_seqlen: int) -> bool:
        """Return whether attention of fused layers sees all of a document of so many tokens."""
        return all(max_seqlen <= (layer.window or max_seqlen) for layer in self._fused)

    def _packed(self, parts: Sequence[PackedBatch]) -> bool:
        """Return whether parts were packed, so that they are independent of micro-batches."""
        max_seqlen = max(p.max_seqlen if p.documents is None else 0 for p in parts)
        return self.packs and self._sees_all(max_seqlen)

    def embed(self, parts: Sequence[PackedBatch]) -> list[LayerInput]:
        """Return the parts as they enter layer 0."""
        if self._fused and (
            self._packed(parts) or self._sees_all(max(p.max_seqlen for p in parts))
        ):
            return [self._fused_input(i, part) for i, part in enumerate(parts)]
        # The arguments depend on the shape of the micro-batch alone, so equal shapes share them.
        by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        layer_inputs = []
        for i, part in enumerate(parts):
            x, recorded = self._record(part.ids)
            calls = by_shape.setdefault(tuple(part.ids.shape), recorded)
            layer_inputs.append(LayerInput(x, (), self._recorded_run(i, calls)))
        return layer_inputs

    def _recorded_run(self, micro_batch: int, calls: list[dict[str, Any]]) -> Any:
        clock, layers = self.clock, self.layers

        def run(
            layer: int,
            x: Tensor,
            _layer_args: tuple[Tensor, ...],
            *,
            read: bool,
            checkpoint: AttentionCheckpoint | None = None,
        ) -> Tensor:
            if clock is not None:
                clock.micro_batch = micro_batch
            output = layers[layer](x, **calls[layer])
            result: Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return run

    def _fused_input(self, micro_batch: int, part: PackedBatch) -> LayerInput:
        with torch.set_grad_enabled(self.entry_trained):
            x = self.decoder.get_input_embeddings()(part.ids)
        tables = self._rotary_tables(x, part)
        layer_args = tables if part.documents is None else (*tables, part.documents.cu_seqlens)

        # Not `self`: what is captured is kept by the engine, and a cycle keeps its memory too long.
        clock, layers, max_seqlen = self.clock, self._fused, part.max_seqlen

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
            documents = Documents(cu_seqlens[0], max_seqlen) if cu_seqlens else None
            return layers[layer](x, cos, sin, documents, read=read, checkpoint=checkpoint)

        return LayerInput(x, layer_args, run)

    def _rotary_tables(self, x: Tensor, part: PackedBatch) -> tuple[Tensor, ...]:
        """Return cosines and sines [1, T, head_dim] of a batch's positions."""
        tables = self._tables.get(part.max_seqlen) if part.documents is None else None
        if tables is None:
            with torch.no_grad():
                tables = self.decoder.rotary_emb(x, part.positions)
            if part.documents is None:  # all rows of a length have the same positions
                if len(self._tables) == _MOST_TABLES:
                    del self._tables[next(iter(self._tables))]  # the oldest
                self._tables[part.max_seqlen] = tables
        return tables

    def _record(self, input_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        arguments: list[dict[str, Any]] = []
        entry: list[Tensor] = []

        def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise EngineError("its decoder passes arguments by position")
            entry.append(hidden_states)
            arguments.append(kwargs)
            if len(arguments) == len(self.layers):
                raise _Stop
            return (hidden_states,) if self.tuple_output else hidden_states

        for layer in self.layers:
            layer.forward = stub
        try:
            with suppress(_Stop), torch.set_grad_enabled(self.entry_trained):
                self.decoder(input_ids=input_ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        if len(arguments) != len(self.layers):
            raise EngineError(f"its decoder called {len(arguments)} of {len(self.layers)} layers")
        layer_args = [value for call in arguments for value in call.values()]
        layer_args += [part for value in layer_args if isinstance(value, tuple) for part in value]
        if any(isinstance(value, Tensor) and value.requires_grad for value in layer_args):
            raise EngineError("what is trained before its layers goes into them by other ways, too")
        return entry[0], arguments
