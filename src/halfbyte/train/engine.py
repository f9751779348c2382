"""The layer engine: we own the loop over a decoder's layers.

A decoder is a list of layers. Every micro-batch of an optimizer step passes through layer l before
any goes through layer l + 1 (layer-major accumulation):

    forward    for l: decode layer l's weights once; for each micro-batch: run it; keep the layer's
               input (``recompute``), or what its backward needs (``save``)
    loss       for each micro-batch: final norm and head over its supervised positions only
    backward   for l, last first: decode once; for each micro-batch: rebuild what is missing, run
               the layer's own small autograd graph, hand the gradient to the layer before

A module that is trained whole gets its gradient where it stands: norms within their layer's graph,
the head from the loss, the embedding from a graph around the decoder's entry.

So a weight is decoded once per direction per optimizer step, not once per micro-batch, and how
much is kept is chosen layer by layer to fit a memory budget. The arithmetic is the same under
every such choice, and so are the results, bit for bit.

It works for any transformers decoder: the decoder is run with its layers stubbed, which records
the keyword arguments (masks, positions, rotary tables) each layer would be called with; then the
layers are called with them, here. Before the engine is used, ``LayerEngine.probe`` compares its
loss with the model's own on a few tokens. A model it does not reproduce trains under
``PlainEngine``, and the reason is announced.

Right padding needs no mask: with causal attention a position never sees what comes after it, and
the padding's own positions are not supervised.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.lora import DropoutClock, dropout_clock, frozen_linears, trained_whole
from halfbyte.model.layer import fused
from halfbyte.model.loss import head_loss
from halfbyte.model.vocabulary import FrozenHead
from halfbyte.nf4 import QuantizedWeight
from halfbyte.nf4.linear import WeightScratch

_FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm")


class Batch(NamedTuple):
    """One micro-batch on the device.

    Attributes:
        input_ids: int64 [B, T], right padded.
        labels: int64 [B, T], already shifted; -100 where nothing is supervised.
    """

    input_ids: Tensor
    labels: Tensor


class EngineError(Exception):
    """The model's layers cannot be called one by one; says why."""


class _Stop(Exception):
    """Raised by the last stub: what lies behind the layers is not wanted."""


@dataclass
class _Kept:
    """What forward left for one layer and one micro-batch: its input, and its output if saved."""

    x: Tensor
    y: Tensor | None


class LayerEngine:
    """Runs optimizer steps over a decoder, layer by layer.

    Args:
        model: A model of ``model.build``, adapters attached.
        fuse: Whether to run layers that `model.layer` knows with its fused operations.

    Attributes:
        scratch: Where decoded weights live, and the count of how many were decoded.
        fused: How many layers are run so.

    Raises:
        EngineError: If the decoder's layers, final norm or head are not where they should be.
    """

    name = "layer engine"
    layers: list[nn.Module]
    norm: nn.Module
    head: nn.Linear | FrozenHead
    clock: DropoutClock | None

    def __init__(self, model: PreTrainedModel, *, fuse: bool = False) -> None:
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
        fast = [fused(layer) if fuse else None for layer in self.layers]
        self.fused = sum(run is not None for run in fast)
        self._runs = [run or layer for run, layer in zip(fast, self.layers, strict=True)]
        self.norm = getattr(self.decoder, norms[0])
        self.head = head
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.softcap = float(softcap or 0)
        self.linears = [list(frozen_linears(layer).values()) for layer in self.layers]
        # Nothing before the lowest trained layer wants a gradient: backward ends there.
        trains = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        behind = {*lists[0].parameters(), *self.norm.parameters()}
        self.entry_trained = any(
            p.requires_grad for p in self.decoder.parameters() if p not in behind
        )
        self.first_trained = [self.entry_trained or trains[0], *trains[1:], True].index(True)
        self.scratch = WeightScratch()
        self.clock = dropout_clock(model)
        self.tuple_output = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and products."""
        dtype: torch.dtype = self.model.halfbyte_recipe.compute_dtype
        return dtype

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
            got = self.loss([Batch(ids[:, :-1], targets)])
        except (TypeError, AttributeError, RuntimeError) as error:
            raise EngineError(f"its layers cannot be called one by one: {error}") from error
        # Same products in the same dtype; only the order of sums differs.
        if not torch.allclose(got, wanted, rtol=1e-4 if self.dtype == torch.float32 else 2e-2):
            raise EngineError(
                f"run layer by layer, the loss of a probe is {got:.6f}, not {wanted:.6f}"
            )

    def step(self, batches: Sequence[Batch], normaliser: float, *, saved_layers: int) -> Tensor:
        """Add the gradients of one optimizer step to the adapters' ``.grad``.

        Args:
            batches: The step's micro-batches.
            normaliser: What the summed loss is divided by: the supervised tokens of the step.
            saved_layers: How many layers, counted from the last, keep what their backward needs;
                the others keep their input and are run again.

        Returns:
            The loss: float32 scalar on the device, summed over tokens and divided.
        """
        kept: list[list[_Kept]] = []
        first_saved = max(len(self.layers) - saved_layers, self.first_trained)
        hidden, calls = self._enter(batches)
        entries = list(hidden) if self.entry_trained else []
        for index in range(len(self.layers)):
            row: list[_Kept] = []
            wanted = self.entry_trained or index > self.first_trained
            with self._opened(index):
                for i, call in enumerate(calls):
                    x = hidden[i].detach().requires_grad_(wanted)
                    with torch.set_grad_enabled(index >= first_saved):
                        y = self._run(index, i, x, call)
                    row.append(_Kept(x, y if index >= first_saved else None))
                    hidden[i] = y.detach()
            if index >= self.first_trained:
                kept.append(row)

        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        grads: list[Tensor] = []
        for i, batch in enumerate(batches):
            x = hidden[i].requires_grad_()
            loss = self._tail(x, batch) / normaliser
            loss.backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            grads.append(x.grad)
            total += loss.detach()
        hidden.clear()

        for index in reversed(range(self.first_trained, len(self.layers))):
            row = kept.pop()
            with self._opened(index):
                for i, call in enumerate(calls):
                    held = row[i]
                    output = held.y
                    if output is None:
                        with torch.enable_grad():
                            output = self._run(index, i, held.x, call)
                    torch.autograd.backward(output, grads[i])
                    del output
                    if held.x.requires_grad:
                        assert held.x.grad is not None
                        grads[i] = held.x.grad
                    row[i] = _Kept(held.x.detach(), None)
        for i, entry in enumerate(entries):
            torch.autograd.backward(entry, grads[i])
        return total

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """Return the summed token loss of ``batches``, float32 scalar; no gradients."""
        hidden, calls = self._enter(batches)
        for index in range(len(self.layers)):
            with self._opened(index):
                for i, call in enumerate(calls):
                    hidden[i] = self._run(index, i, hidden[i], call)
        losses = [self._tail(h, batch) for h, batch in zip(hidden, batches, strict=True)]
        return torch.stack(losses).sum()

    def saved_bytes(self, batch: Batch) -> tuple[int, int]:
        """Measure what one layer keeps for ``batch``: (bytes when saved, bytes when recomputed)."""
        hidden, calls = self._enter([batch])
        seen: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.layers[-1].parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        index = len(self.layers) - 1
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with self._opened(index), torch.enable_grad(), hooks:
            x = hidden[0].detach().requires_grad_()
            y = self._run(index, 0, x, calls[0])
        return sum(seen.values()), y.nbytes

    def _run(self, index: int, micro_batch: int, x: Tensor, call: list[dict[str, Any]]) -> Tensor:
        if self.clock is not None:
            self.clock.micro_batch = micro_batch
        output = self._runs[index](x, **call[index])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _tail(self, hidden: Tensor, batch: Batch) -> Tensor:
        supervised = batch.labels != -100
        rows = self.norm(hidden[supervised])
        return head_loss(
            rows,
            self.head_weight,
            batch.labels[supervised],
            softcap=self.softcap,
            trained=trained_whole(self.head).get("weight"),
        )

    @contextmanager
    def _opened(self, index: int) -> Iterator[None]:
        with self.scratch.opened(self.linears[index], self.dtype):
            yield

    def _enter(self, batches: Sequence[Batch]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
        """Return each micro-batch's input to layer 0 and the arguments of every layer.

        The arguments depend on the shape of the micro-batch alone, so equal shapes share them.
        """
        hidden: list[Tensor] = []
        calls: list[list[dict[str, Any]]] = []
        by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for batch in batches:
            x, call = self._record(batch.input_ids)
            hidden.append(x)
            calls.append(by_shape.setdefault(tuple(batch.input_ids.shape), call))
        return hidden, calls

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
        given = [value for call in arguments for value in call.values()]
        given += [part for value in given if isinstance(value, tuple) for part in value]
        if any(isinstance(value, Tensor) and value.requires_grad for value in given):
            raise EngineError("what is trained before its layers goes into them by other ways, too")
        return entry[0], arguments


class PlainEngine:
    """The same steps under plain autograd over the whole model, one micro-batch at a time.

    For the models ``LayerEngine`` cannot take apart. Layers are checkpointed by transformers where
    it can, and each micro-batch decodes the weights anew.
    """

    name = "plain autograd"
    clock: DropoutClock | None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.clock = dropout_clock(model)
        if model.supports_gradient_checkpointing:
            # Renamed in transformers 5.23; the older name warns there.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
            for module in model.modules():
                # Checkpointing asks the layer whether it trains; what is inside it (dropout of the
                # base model) stays in eval mode.
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def step(self, batches: Sequence[Batch], normaliser: float, *, saved_layers: int) -> Tensor:
        """Add the gradients of one optimizer step; see ``LayerEngine.step``."""
        total = torch.zeros((), dtype=torch.float32, device=batches[0].input_ids.device)
        for i, batch in enumerate(batches):
            if self.clock is not None:
                self.clock.micro_batch = i
            with torch.enable_grad():
                loss = self._loss(batch) / normaliser
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """Return the summed token loss of ``batches``; no gradients."""
        return torch.stack([self._loss(batch) for batch in batches]).sum()

    def _loss(self, batch: Batch) -> Tensor:
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits
        supervised = batch.labels != -100
        return nn.functional.cross_entropy(
            logits[supervised].float(), batch.labels[supervised], reduction="sum"
        )


def choose_engine(model: PreTrainedModel, device: str) -> tuple[LayerEngine | PlainEngine, str]:
    """Return the engine for ``model`` and one line that says which, and why."""
    try:
        engine = LayerEngine(model)
        engine.probe(model.config.get_text_config().vocab_size, device)
    except EngineError as error:
        return PlainEngine(model), f"plain autograd, layer by layer is not possible: {error}"
    return engine, f"layer engine over {len(engine.layers)} layers"
