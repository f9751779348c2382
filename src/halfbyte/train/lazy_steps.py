"""The steps of a run whose data is encoded while it is trained on.

Steps get the next examples of a stream (`halfbyte.data.example_stream`), so they are made in order,
and a checkpoint says how far the stream has come.
"""

import math
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, MicroBatch, collate
from halfbyte.data.example_stream import EncodedRow, ExampleStream, Position, Taken
from halfbyte.errors import DataError

_KEPT = 16  # steps whose rows, and whose end in the stream, are known: more than are in work


class LazySteps:
    """The micro-batches of the next step of a run.

    Attributes:
        per_epoch: Steps of an epoch, had each row one example.
        total: Steps of the run.
    """

    def __init__(self, rows: int | None, sample: Dataset, config: TrainConfig, pad_id: int) -> None:
        """Plan the steps.

        Args:
            rows: Rows of an epoch; None if the data has no end.
            sample: The first examples of the run, which stand for all in plans.
            config: The options.
            pad_id: The padding token.
        """
        self._config, self._pad_id, self._sample = config, pad_id, sample.examples
        self._per_step = config.batch_size * config.gradient_accumulation_steps
        # With packs, as many examples as have the tokens of the packs of a step.
        self._tokens = self._per_step * config.max_length if config.packing else None
        of_step = float(self._per_step)
        if self._tokens is not None:
            of_step = max(1.0, self._tokens * sample.report.rows / sample.report.tokens)
        if rows is None:
            assert config.max_steps is not None
            self.per_epoch = self.total = config.max_steps
        else:
            self.per_epoch = max(1, math.ceil(rows / of_step))
            asked = max(1, math.ceil(config.epochs * self.per_epoch))
            self.total = config.max_steps or asked
        self._stream: ExampleStream | None = None
        self._next = 0
        self._lines: dict[int, list[list[str]]] = {}
        self._ends: dict[int, Position] = {}

    def begin(self, step: int, stream: ExampleStream) -> None:
        """Take the examples of ``step`` (0-based) and all later ones from a stream."""
        self._next, self._stream = step, stream
        self._ends = {step: stream.position}

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of the next step.

        Raises:
            DataError: The data has ended.
        """
        assert self._stream is not None
        if step != self._next:
            raise ValueError(f"expected step {self._next}, the next one, got {step}")
        taken = self._take(self._stream)
        if not taken:
            raise DataError(
                f"the data ended after {self._stream.position.rows:,} rows, before step "
                f"{step + 1:,} of {self.total:,}; give fewer --max-steps, or more data"
            )
        batches = list(self._divided(taken))
        self._next = step + 1
        self._lines[step] = [[one.line for one in batch] for batch in batches]
        self._ends[self._next] = self._stream.position
        for known in (self._lines, self._ends):
            for old in [number for number in known if number < step - _KEPT]:
                del known[old]
        return [collate([one.example for one in batch], pad_id=self._pad_id) for batch in batches]

    def lines(self, step: int) -> list[list[str]]:
        """Return the lines of a step's examples, by micro-batch, of one of the last steps."""
        return self._lines[step]

    def position(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint after ``step`` steps says about the data, as JSON values."""
        return {"data_position": list(self._ends[step])}

    def lengths(self) -> list[list[list[int]]]:
        """Return the tokens of each example, by step and micro-batch, of steps that may occur.

        They are those of the sample, and the first again with an example of ``max_length``.
        """
        found: list[list[list[int]]] = []
        sample = (EncodedRow("", [one]) for one in cycle(self._sample))
        stream = ExampleStream(sample, Position(), 1)
        while stream.position.rows < len(self._sample):
            batches = self._divided(self._take(stream))
            found.append([[len(one.example.tokens) for one in batch] for batch in batches])
        longest = max(found, key=lambda step: (len(step), sum(map(sum, step))))
        others = longest[0][1:]
        if self._tokens is not None:
            others = [self._config.max_length] * (self._config.batch_size - 1)
        return [*found, [[self._config.max_length, *others], *longest[1:]]]

    def summary(self) -> str:
        """Return how steps are packed."""
        return (
            f"a step has as many documents as have {self._tokens:,} tokens; by the first "
            f"{len(self._sample):,} documents, an epoch is {self.per_epoch:,} steps"
        )

    def _take(self, stream: ExampleStream) -> list[Taken]:
        if self._tokens is None:
            return stream.take(self._per_step)
        return stream.take(self._tokens, self._tokens)

    def _divided(self, taken: list[Taken]) -> Iterator[list[Taken]]:
        """Yield the micro-batches of a step, the longest examples first.

        With packs they have as many examples as `halfbyte.data.batching` says.
        """
        taken = sorted(taken, key=lambda one: len(one.example.tokens), reverse=True)
        start = 0
        while start < len(taken):
            size = self._config.batch_size
            if self._tokens is not None:
                longest = len(taken[start].example.tokens)
                size = max(1, size * self._config.max_length // longest)
            yield taken[start : start + size]
            start += size
