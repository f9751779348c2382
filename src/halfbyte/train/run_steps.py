"""Which examples each step of a run trains on, as a function of the step's number.

So a checkpoint needs only the number of steps made, and a step can be named by its rows.
"""

import math
from collections.abc import Sequence

from halfbyte.config.schema import TrainConfig
from halfbyte.data import Example, MicroBatch, steps
from halfbyte.data.batching import StepPlan

# In a long run, the lengths of this many steps, or of one epoch, determine the shapes of its parts.
_LOOK_AHEAD = 4096


class RunSteps:
    """The micro-batches of any step of a run.

    Attributes:
        per_epoch: Steps of an epoch.
        total: Steps of the run.
    """

    def __init__(self, examples: Sequence[Example], config: TrainConfig, pad_id: int) -> None:
        self._examples, self._config, self._pad_id = examples, config, pad_id
        self._held: tuple[int, StepPlan] | None = None
        self.per_epoch = 0
        self.per_epoch = len(self._epoch(0))
        asked = math.ceil(config.epochs * self.per_epoch)
        self.total = config.max_steps if config.max_steps is not None else max(1, asked)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        epoch, index = divmod(step, self.per_epoch)
        return self._epoch(epoch)[index]

    def rows(self, step: int) -> list[list[int]]:
        """Return the indices of a step's examples, by micro-batch."""
        epoch, index = divmod(step, self.per_epoch)
        return self._epoch(epoch).rows(index)

    def lengths(self) -> list[list[list[int]]]:
        """Return the tokens of each example, by step and micro-batch.

        Of the whole run, or of its first epoch or `_LOOK_AHEAD` steps, whichever is more.
        """
        found = []
        for step in range(min(self.total, max(self.per_epoch, _LOOK_AHEAD))):
            epoch, index = divmod(step, self.per_epoch)
            found.append(self._epoch(epoch).lengths(index))
        return found

    def packs(self) -> int:
        """Return the number of packs of the first epoch, with the option `packing`."""
        return len(self._epoch(0).packs)

    def _epoch(self, epoch: int) -> StepPlan:
        """Return the steps of an epoch; the last one asked for is kept."""
        if self._held is None or self._held[0] != epoch:
            plan = steps(
                self._examples,
                batch_size=self._config.batch_size,
                gradient_accumulation_steps=self._config.gradient_accumulation_steps,
                seed=self._config.seed,
                epoch=epoch,
                pad_id=self._pad_id,
                pack_tokens=self._config.max_length if self._config.packing else None,
                count=self.per_epoch if self._config.packing else None,
            )
            self._held = (epoch, plan)
        return self._held[1]
