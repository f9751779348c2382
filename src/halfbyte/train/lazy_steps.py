"""The steps of a run whose data is encoded while it is trained on.

Steps get the next examples of a stream (`halfbyte.data.example_stream`), so they are made in order,
and a checkpoint says how far the stream has come.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Example, MicroBatch, collate
from halfbyte.data.example_stream import ExampleStream, Position, Taken
from halfbyte.errors import DataError

_KEPT = 16  # steps whose rows, and whose end in the stream, are known: more than are in work


class LazySteps:
    """The micro-batches of the next step of a run.

    Attributes:
        per_epoch: Steps of an epoch, had each row one example.
        total: Steps of the run.
    """

    def __init__(
        self, rows: int | None, sample: Sequence[Example], config: TrainConfig, pad_id: int
    ) -> None:
        """Plan the steps.

        Args:
            rows: Rows of an epoch; None if the data has no end.
            sample: The first examples of the run, which stand for all in plans.
            config: The options.
            pad_id: The padding token.
        """
        self._config, self._pad_id, self._sample = config, pad_id, sample
        self._per_step = config.batch_size * config.gradient_accumulation_steps
        if rows is None:
            assert config.max_steps is not None
            self.per_epoch = self.total = config.max_steps
        else:
            self.per_epoch = -(-rows // self._per_step)
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
        taken = self._stream.take(self._per_step)
        if not taken:
            raise DataError(
                f"the data ended after {self._stream.position.rows:,} rows, before step "
                f"{step + 1:,} of {self.total:,}; give fewer --max-steps, or more data"
            )
        batches = list(_divided(taken, self._config.batch_size))
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
        found = []
        repeated = -(-self._per_step // len(self._sample))
        sample = [Taken("", one) for one in self._sample] * repeated
        for start in range(0, len(sample), self._per_step):
            chosen = sample[start : start + self._per_step]
            found.append(
                [
                    [len(one.example.tokens) for one in batch]
                    for batch in _divided(chosen, self._config.batch_size)
                ]
            )
        longest = max(found, key=lambda step: (len(step), sum(map(sum, step))))
        most = [[self._config.max_length, *longest[0][1:]], *longest[1:]]
        return [*found, most]


def _divided(taken: list[Taken], size: int) -> Iterator[list[Taken]]:
    """Yield the micro-batches of a step, the longest examples first."""
    taken = sorted(taken, key=lambda one: len(one.example.tokens), reverse=True)
    for start in range(0, len(taken), size):
        yield taken[start : start + size]
