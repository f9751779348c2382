"""Splits examples into the micro-batches of each optimizer step.

An optimizer step takes ``batch_size * gradient_accumulation_steps`` examples of a shuffled epoch,
sorts them by length, longest first, and splits them into micro-batches. Sorting *within* the step
saves most of the padding and changes nothing else: the step's gradient is a sum over the same
examples in any order. The longest come first, so that a step too large for memory fails early.

With ``pack_tokens``, ``batch_size`` counts packs of documents (data/packing.py). A step has the
documents of its packs, and its micro-batches are as many documents, sorted by length, as fit into
``batch_size * pack_tokens`` tokens with padding: engines that pack do so over all micro-batches of
a step, and others need no more memory than ``batch_size`` rows of the longest documents.

The order is a pure function of (seed, epoch), and any step can be computed from its number: a run
resumes from the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.packing import pack
from halfbyte.data.templates import Example

IGNORED = -100
"""The label of a position that is not supervised; the value PyTorch's cross-entropy ignores."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A batch of examples, padded on the right.

    A decoder is causal, so padding on the right does not affect any token: it needs neither an
    attention mask nor a dedicated padding token. Labels come from each example's mask, never from
    comparison with the padding id, so an end-of-turn token that is also used as padding is learned.

    Attributes:
        input_ids: int64 [B, T], T being the length of the longest example.
        labels: int64 [B, T], already shifted: ``labels[b, t]`` is the token to predict at position
            t, or -100. The last position is -100.
        lengths: int64 [B], the tokens of each example without padding.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        """Number of positions with a label."""
        return int(np.count_nonzero(self.labels != IGNORED))


def collate(examples: Sequence[Example], *, pad_id: int = 0) -> MicroBatch:
    """Pads examples to a `MicroBatch`. ``pad_id`` may be any token."""
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
    input_ids = np.full((len(examples), int(lengths.max())), pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :length] = example.tokens
        labels[row, : length - 1] = np.where(example.labels_mask, example.tokens, IGNORED)[1:]
    return MicroBatch(input_ids, labels, lengths)


class StepPlan(Sequence[list[MicroBatch]]):
    """The optimizer steps of one epoch, computed on access."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        epoch: int,
        pad_id: int = 0,
        pack_tokens: int | None = None,
        count: int | None = None,
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._per_step = batch_size * gradient_accumulation_steps
        self._pad_id = pad_id
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        self._order = generator.permutation(len(examples))
        self._pack_tokens = pack_tokens
        if pack_tokens is not None:
            lengths = np.fromiter((len(e.tokens) for e in examples), np.int64, len(examples))
            self.packs = pack(self._order, lengths, pack_tokens, at_least=count or 0)
        rows = len(self._order) if pack_tokens is None else len(self.packs)
        self._count = count or -(-rows // self._per_step)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, step: int) -> list[MicroBatch]: ...

    @overload
    def __getitem__(self, step: slice) -> list[list[MicroBatch]]: ...

    def __getitem__(self, step: int | slice) -> list[MicroBatch] | list[list[MicroBatch]]:
        if isinstance(step, slice):
            return [self[index] for index in range(*step.indices(len(self)))]
        return [
            collate([self._examples[index] for index in batch], pad_id=self._pad_id)
            for batch in self.rows(step)
        ]

    def lengths(self, step: int) -> list[list[int]]:
        """The number of tokens of each example, by micro-batch, without collating them."""
        return [[self._length(index) for index in batch] for batch in self.rows(step)]

    def rows(self, step: int) -> list[list[int]]:
        """The indices of a step's examples, by micro-batch, the longest first."""
        step = range(len(self))[step]
        if self._pack_tokens is not None:
            return self._packed_rows(self.packs.of_step(step, len(self)).tolist())
        start = step * self._per_step
        chosen = self._order[start : start + self._per_step].tolist()
        chosen.sort(key=self._length, reverse=True)
        size = self._batch_size
        return [chosen[first : first + size] for first in range(0, len(chosen), size)]

    def _packed_rows(self, chosen: list[int]) -> list[list[int]]:
        chosen.sort(key=self._length, reverse=True)
        assert self._pack_tokens is not None
        most, batches, first = self._batch_size * self._pack_tokens, [], 0
        while first < len(chosen):
            size = max(1, most // self._length(chosen[first]))
            batches.append(chosen[first : first + size])
            first += size
        return batches

    def _length(self, index: int) -> int:
        return len(self._examples[index].tokens)


def steps(
    examples: Sequence[Example],
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    seed: int,
    epoch: int,
    pad_id: int = 0,
    pack_tokens: int | None = None,
    count: int | None = None,
) -> StepPlan:
    """The optimizer steps of an epoch.

    Every example occurs once; the last step may be smaller than the others.

    Args:
        examples: The training examples.
        batch_size: Examples, or packs, per micro-batch, at most.
        gradient_accumulation_steps: Micro-batches per optimizer step, at most.
        seed: Seed of the run, non-negative.
        epoch: 0-based; the order depends on it and ``seed`` only.
        pad_id: The padding token.
        pack_tokens: Most tokens of a pack of examples; None: examples are not packed.
        count: With packs, the number of steps, between which an epoch's packs are divided evenly;
            by default as many as there are steps of ``batch_size * gradient_accumulation_steps``.
            Epochs of other orders have a few packs more or less, and are given the same number.

    Returns:
        A sequence with one list of micro-batches for each optimizer step.
    """
    return StepPlan(
        examples,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
        epoch=epoch,
        pad_id=pad_id,
        pack_tokens=pack_tokens,
        count=count,
    )
