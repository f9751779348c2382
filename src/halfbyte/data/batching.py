"""From examples to the micro-batches of each optimizer step.

An optimizer step takes ``batch_size * gradient_accumulation_steps`` examples of a shuffled epoch,
sorts them by length, longest first, and cuts them into micro-batches. Sorting *within* the step
saves most of the padding and changes nothing else: the step's gradient is a sum over the same
examples in any order. The longest come first, so that a step too big for memory fails at once.

The order is a pure function of (seed, epoch), and any step can be asked for by its number:
a resumed run needs no more than the step it had reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.templates import Example

IGNORED = -100
"""The label of a position that is not supervised; the value PyTorch's cross-entropy ignores."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A few examples side by side, padded on the right.

    A decoder is causal, so what is to the right of a token cannot reach it: padding needs neither
    an attention mask nor a padding token of its own. Labels come from each example's mask, never
    from comparing with the padding id, so an end-of-turn token that doubles as padding is learned.

    Attributes:
        input_ids: int64 [B, T], T being the longest example of the micro-batch.
        labels: int64 [B, T], shifted already: ``labels[b, t]`` is the token to be predicted from
            position t, or -100. The last position is -100.
        lengths: int64 [B], the tokens of each example before padding.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens without the padding."""
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        """Positions that have a label."""
        return int(np.count_nonzero(self.labels != IGNORED))


def collate(examples: Sequence[Example], *, pad_id: int = 0) -> MicroBatch:
    """Sets examples side by side; see `MicroBatch`. ``pad_id`` may be any token."""
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
    input_ids = np.full((len(examples), int(lengths.max())), pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :length] = example.tokens
        labels[row, : length - 1] = np.where(example.labels_mask, example.tokens, IGNORED)[1:]
    return MicroBatch(input_ids, labels, lengths)


class StepPlan(Sequence[list[MicroBatch]]):
    """The optimizer steps of one epoch, each made when it is asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        epoch: int,
        pad_id: int = 0,
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._per_step = batch_size * gradient_accumulation_steps
        self._pad_id = pad_id
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        self._order = generator.permutation(len(examples))

    def __len__(self) -> int:
        return -(-len(self._examples) // self._per_step)

    @overload
    def __getitem__(self, step: int) -> list[MicroBatch]: ...

    @overload
    def __getitem__(self, step: slice) -> list[list[MicroBatch]]: ...

    def __getitem__(self, step: int | slice) -> list[MicroBatch] | list[list[MicroBatch]]:
        if isinstance(step, slice):
            return [self[index] for index in range(*step.indices(len(self)))]
        chosen = self._chosen(step)
        return [
            collate(chosen[first : first + self._batch_size], pad_id=self._pad_id)
            for first in range(0, len(chosen), self._batch_size)
        ]

    def lengths(self, step: int) -> list[list[int]]:
        """The tokens of each example, micro-batch by micro-batch; nothing is collated for it."""
        lengths = [len(example.tokens) for example in self._chosen(step)]
        size = self._batch_size
        return [lengths[first : first + size] for first in range(0, len(lengths), size)]

    def _chosen(self, step: int) -> list[Example]:
        """The examples of a step, the longest first."""
        start = range(len(self))[step] * self._per_step
        chosen = [self._examples[index] for index in self._order[start : start + self._per_step]]
        return sorted(chosen, key=lambda example: len(example.tokens), reverse=True)


def steps(
    examples: Sequence[Example],
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    seed: int,
    epoch: int,
    pad_id: int = 0,
) -> StepPlan:
    """The optimizer steps of an epoch.

    Every example comes once; the last step may be smaller than the others.

    Args:
        examples: What is trained on.
        batch_size: Examples in a micro-batch, at most.
        gradient_accumulation_steps: Micro-batches in an optimizer step, at most.
        seed: Of the run, non-negative.
        epoch: Counted from 0; with ``seed`` it decides the order and nothing else does.
        pad_id: The token written to the right of shorter examples.

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
    )
