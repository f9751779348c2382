"""Measures how close a merged model is to the live adapter, before it is written.

The live adapter answers held-out text once, and its logits are kept on the CPU. Each candidate then
answers the same text through the same model in memory, with its linears replaced temporarily: a
candidate's weight is computed when a layer is called, and freed after its product. So there is only
one copy of the model, and the measured weights are rounded or packed as they will be written.

A written file is also a candidate: read back one tensor at a time, it must agree with the adapter
just as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.source import BaseSource
from halfbyte.data import IGNORED, Example, collate
from halfbyte.engine.packing import Batch
from halfbyte.layers.experts import expert_parameters
from halfbyte.layers.vocabulary import FrozenEmbedding
from halfbyte.linear.experts import ExpertLinear, expert_linears
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.lora import parameter_adapters
from halfbyte.models.build import frozen_linears
from halfbyte.runtime.matmul import product
from halfbyte.train.evaluate import as_batch

HELD_OUT = Path(__file__).with_name("held_out.jsonl")
"""Questions and answers of everyday prose, for those who have kept nothing of their own back."""

# Bytes of float32 logits: kept of the live adapter, alive in one forward, compared at a time.
_KEPT, _ALIVE, _COMPARED = 1 << 30, 256 << 20, 32 << 20


@dataclass(frozen=True)
class Distance:
    """The distance of a model's outputs from the live adapter's.

    Attributes:
        kl: KL(live ‖ model) in nats, mean over the positions.
        largest_gap: Largest difference of two logits.
        top1_agreement: Share of positions whose likeliest token is the same.
        forgotten: Examples that the live adapter reproduces exactly, and the model does not.
    """

    kl: float
    largest_gap: float
    top1_agreement: float
    forgotten: int


class Reference(NamedTuple):
    """Held-out text, and the live adapter's outputs.

    Attributes:
        batches: The text; its supervised positions are compared.
        logits: For each batch float32 [positions, V], on the CPU.
        left_out: Examples for whose logits there was no room.
    """

    batches: list[Batch]
    logits: list[Tensor]
    left_out: int

    @property
    def positions(self) -> int:
        """Number of compared positions."""
        return sum(len(logits) for logits in self.logits)

    @property
    def by_heart(self) -> int:
        """Number of examples that the live adapter reproduces exactly, by greedy decoding."""
        pairs = zip(self.batches, self.logits, strict=True)
        return sum(int(_by_heart(batch, logits).sum()) for batch, logits in pairs)


def _by_heart(batch: Batch, logits: Tensor) -> Tensor:
    """Return of which examples each supervised token is the likeliest; bool [examples]."""
    supervised = batch.labels != IGNORED
    wrong = torch.zeros_like(supervised)
    wrong[supervised] = logits.argmax(1).cpu() != batch.labels[supervised]
    return ~wrong.any(1)


def reference(model: PreTrainedModel, examples: Sequence[Example]) -> Reference:
    """Return what ``model`` answers to ``examples``; of many, as many as 1 GiB of logits allows."""
    row = 4 * int(model.config.get_text_config().vocab_size)
    chosen: list[Example] = []
    room = _KEPT
    for example in examples:
        room -= row * int(example.labels_mask.sum())
        if chosen and room < 0:
            break
        chosen.append(example)
    chosen.sort(key=lambda example: len(example.tokens), reverse=True)
    batches, start = [], 0
    while start < len(chosen):
        together = max(1, _ALIVE // (row * len(chosen[start].tokens)))
        batch = collate(chosen[start : start + together])
        batches.append(as_batch(batch))
        start += together
    logits = [_logits(model, batch).cpu() for batch in batches]
    return Reference(batches, logits, len(examples) - len(chosen))


def distance(model: PreTrainedModel, candidate: BaseSource | None, live: Reference) -> Distance:
    """Return the distance of ``candidate`` from the live adapter.

    What is no frozen linear (norms, embeddings) takes the candidate's values in ``model``, rounded
    as they are, and keeps them: candidates have these in common.

    Args:
        model: The model in memory, with the adapter that ``live`` was measured with.
        candidate: A ``Merged`` of it, or the source that was written; None is the bare base.
        live: What ``reference`` returned.

    Raises:
        CheckpointError: If a file ends early.
    """
    kl, gap, same, forgotten = 0.0, 0.0, 0, 0
    with _replaced(model, candidate), _without_updates(model, candidate):
        for batch, wanted in zip(live.batches, live.logits, strict=True):
            got = _logits(model, batch)
            forgotten += int((_by_heart(batch, wanted) & ~_by_heart(batch, got)).sum())
            rows = max(1, _COMPARED // (4 * got.shape[1]))
            for start in range(0, len(got), rows):
                p, q = wanted[start : start + rows].to(got.device), got[start : start + rows]
                gap = max(gap, float((p - q).abs().max()))
                same += int((p.argmax(1) == q.argmax(1)).sum())
                p, q = p.double().log_softmax(1), q.double().log_softmax(1)
                kl += float((p.exp() * (p - q)).sum())
    return Distance(kl / live.positions, gap, same / live.positions, forgotten)


def distances(
    model: PreTrainedModel,
    candidates: Mapping[Any, BaseSource],
    live: Reference,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Distance]:
    """Return ``distance`` of each candidate by its name, and of the bare base as "no adapter"."""
    found: dict[str, Distance] = {}
    for name, candidate in [*candidates.items(), ("no adapter", None)]:
        found[name] = distance(model, candidate, live)
        if progress is not None:
            progress(len(found), len(candidates) + 1)
    return found


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    device = model.device
    logits: Tensor = model(input_ids=batch.input_ids.to(device), use_cache=False).logits
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)
    return logits[rows.to(device), columns.to(device)].float()


class _Stand(nn.Module):
    """Replaces a frozen linear temporarily: computes with a candidate's weight."""

    def __init__(self, linear: FrozenLinear, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.bias, self._weight, self._linear = linear.bias, weight, (linear,)  # no submodule

    def forward(self, x: Tensor) -> Tensor:
        linear = self._linear[0]
        weight = self._weight()
        if isinstance(linear, FrozenEmbedding):
            return nn.functional.embedding(x, weight.to(x.device, linear.dtype))
        y = product(x.reshape(-1, x.shape[-1]), weight.to(x.device, x.dtype))
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _ExpertStand(nn.Module):
    """Replaces a linear of experts temporarily: computes with a candidate's weights."""

    def __init__(self, candidate: BaseSource, name: str, num_experts: int) -> None:
        super().__init__()
        self._weights, self.num_experts = partial(_dense, candidate, name), num_experts
        self._transposed = expert_parameters(candidate.skeleton)[name][1]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        weights = self._weights().to(x.device, x.dtype)
        count, rows, columns = weights.shape
        plain = ExpertLinear((count, rows, columns), transposed=self._transposed, dtype=x.dtype)
        plain.weight = nn.Parameter(weights, requires_grad=False)
        y: Tensor = plain(x, offsets)
        return y


@contextmanager
def _replaced(model: PreTrainedModel, candidate: BaseSource | None) -> Iterator[None]:
    linears, experts = frozen_linears(model), expert_linears(model)
    stands: dict[str, nn.Module] = {}
    if candidate is None:
        stands = {
            path: _Stand(linear, partial(linear.decode, torch.float32))
            for path, linear in linears.items()
        }
    else:
        names = {parameter.name for parameter in candidate.parameters}
        tied: dict[str, str] = candidate.skeleton.all_tied_weights_keys
        for path, linear in linears.items():
            name = f"{path}.weight"
            name = name if name in names else tied[name]
            stands[path] = _Stand(linear, partial(_dense, candidate, name))
        for path, module in experts.items():
            stands[path] = _ExpertStand(candidate, path, module.num_experts)
        others = names - {f"{path}.weight" for path in linears} - experts.keys()
        for name in others - parameter_adapters(model).keys():
            path, _, leaf = name.rpartition(".")
            held: Tensor = getattr(model.get_submodule(path), leaf)
            held.detach().copy_(_dense(candidate, name))
    try:
        for path, stand in stands.items():
            model.set_submodule(path, stand)
        yield
    finally:
        for path, own in (*linears.items(), *experts.items()):
            model.set_submodule(path, own)


@contextmanager
def _without_updates(model: PreTrainedModel, candidate: BaseSource | None) -> Iterator[None]:
    """Have adapted parameters without their updates: the base's, or in routers a candidate's."""
    scalings, values = [], []
    for path, adapter in parameter_adapters(model).items():
        scalings.append((adapter, adapter.scaling))
        owner, _, leaf = path.rpartition(".")
        lists: Any = getattr(model.get_submodule(owner), "parametrizations", {})
        if candidate is not None and leaf in lists:
            held: Tensor = lists[leaf].original
            values.append((held, held.data))
            held.data = _dense(candidate, path).to(held)  # computed with the update
        adapter.scaling = 0.0
    try:
        yield
    finally:
        for adapter, scaling in scalings:
            adapter.scaling = scaling
        for held, value in values:
            held.data = value


def _dense(candidate: BaseSource, name: str) -> Tensor:
    """Return a weight of a source as a tensor, decoded to its own dtype if packed."""
    return dense(candidate.tensor(name))
