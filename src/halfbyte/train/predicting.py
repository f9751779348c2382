"""A run's memory as the ledger predicts it, held against what is measured.

The prediction is made from the files' headers, the trained tensors' sizes, the shapes of the steps
made so far, and what the plan does with activations: nothing of it is measured. Where it is off by
more than ``TOLERANCE``, that is said.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from halfbyte.checkpoint.base_model import BaseSource
from halfbyte.model.build import BaseRecipe
from halfbyte.plan.activations import Dial
from halfbyte.plan.ledger import Holding, Ledger, OptimizerMode, Run, ledger
from halfbyte.plan.shape import ModelShape, shape_of

if TYPE_CHECKING:
    from halfbyte.report import RunReport

TOLERANCE = 0.05
FIRST_LOOK = 5  # steps: by then, everything that stays has been allocated


def shape_of_source(source: BaseSource) -> ModelShape:
    """Return the shape of the model in ``source``; only headers have been read for it."""
    files = {
        p.name: (p.nbytes if p.packed else prod(p.shape) * p.dtype.itemsize, p.packed)
        for p in source.parameters
    }
    return shape_of(source.skeleton, source.name, files=files)


class Prediction:
    """What a run is predicted to hold.

    Args:
        source: The base model's files.
        recipe: How it is held.
        parameters: What is trained, by name.
        rank: Of most adapters.
        optimizer: Which AdamW.
        fused: Whether layers are run by ``model.layer``.
        dial: What is kept for backward.
    """

    def __init__(
        self,
        source: BaseSource,
        recipe: BaseRecipe,
        parameters: Mapping[str, nn.Parameter],
        *,
        rank: int,
        optimizer: OptimizerMode,
        fused: bool,
        dial: Dial,
    ) -> None:
        self._shape = shape_of_source(source)
        self._run = Run(
            Holding.of(recipe),
            rank,
            length=0,
            optimizer=optimizer,
            fused=fused,
            device=recipe.device,
            dial=dial,
            trained=tuple(parameter.numel() for parameter in parameters.values()),
            step_tokens=0,
        )

    def see(self, shapes: Iterable[Sequence[int]]) -> None:
        """Take note of a step: the (B, T) of its micro-batches."""
        tokens = [batch * length for batch, length in shapes]
        self._run = replace(
            self._run,
            length=max(self._run.length, *tokens),
            step_tokens=max(self._run.step_tokens or 0, sum(tokens)),
        )

    @property
    def ledger(self) -> Ledger:
        """The ledger of the largest step seen."""
        return ledger(self._shape, self._run)

    def tell(self, report: "RunReport", measured: int, step: int) -> None:
        """Hold the prediction against what was measured, and tell the journal and people.

        Args:
            report: Who is told.
            measured: Peak of the memory in use, in bytes.
            step: The steps made so far.
        """
        entries = self.ledger
        off = measured / entries.peak - 1
        line = (
            f"memory: {measured / 1e9:.2f} GB at the peak of {step} steps, "
            f"{entries.peak / 1e9:.2f} GB predicted ({100 * off:+.1f} %)"
        )
        if abs(off) > TOLERANCE:
            line += f": off by more than {100 * TOLERANCE:.0f} %"
        report.note(line)
        record = {"step": step, "measured_bytes": measured, "predicted_bytes": entries.peak}
        lines = [entry._asdict() for entry in entries.all_lines()]
        report.record("memory", record | {"off": off, "ledger": lines})
