"""A run's memory and time as the plan predicts them, held against what is measured.

Bytes are predicted from the files' headers, the trained tensors' sizes, the shapes of the steps
made so far, and what the plan does with activations: nothing of it is measured, but for what Python
and its libraries take on a CPU, before there is a model. Where they are off
by more than ``TOLERANCE``, that is said. Seconds come from the table of cards, or on a CPU from a
short timing of its products; the first steps compile and capture, and are left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halfbyte.checkpoint.base_model import BaseSource
from halfbyte.model.build import BaseRecipe
from halfbyte.plan.activations import Dial
from halfbyte.plan.ledger import Holding, Ledger, OptimizerMode, Run, ledger
from halfbyte.plan.shape import ModelShape, shape_of
from halfbyte.plan.speed import Card, card_of_driver, measure_machine, step_seconds

if TYPE_CHECKING:
    from halfbyte.report import RunReport

TOLERANCE = 0.05
FIRST_LOOK = 5  # steps: by then, everything that stays has been allocated
_UNTIMED = 2


def shape_of_source(source: BaseSource) -> ModelShape:
    """Return the shape of the model in ``source``; only headers have been read for it."""
    files = {
        p.name: (p.nbytes if p.packed else math.prod(p.shape) * p.dtype.itemsize, p.packed)
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
        pages: Whether its state is always on the host.
        fused: Whether layers are run by ``model.layer``.
        dial: What is kept for backward.
        embedding_on_host: Whether the embedding waits there.
        process: Bytes of the process before the base was loaded; for a CPU.
    """

    def __init__(
        self,
        source: BaseSource,
        recipe: BaseRecipe,
        parameters: Mapping[str, nn.Parameter],
        *,
        rank: int,
        optimizer: str,
        pages: bool = False,
        fused: bool,
        dial: Dial,
        embedding_on_host: bool = False,
        process: int | None = None,
    ) -> None:
        self._shape = shape_of_source(source)
        coded = optimizer.endswith("8bit")
        mode: OptimizerMode = "adamw_8bit" if coded else "adamw"
        if pages:
            mode = "paged_adamw_8bit" if coded else "paged_adamw_32bit"
        self._run = Run(
            Holding.of(recipe),
            rank,
            optimizer=mode,
            fused=fused,
            device=recipe.device,
            dial=dial,
            embedding_on_host=embedding_on_host,
            trained=tuple(parameter.numel() for parameter in parameters.values()),
            process=process,
        )
        self._shapes: dict[tuple[tuple[int, int], ...], None] = {}
        self._steps: list[tuple[int, int, float]] = []
        self._measured: Card | None = None

    def see(self, shapes: Iterable[Sequence[int]], seconds: float) -> None:
        """Take note of a step: the (B, T) of its micro-batches, and how long it took."""
        step = tuple((batch, length) for batch, length in shapes)
        self._shapes[step] = None
        tokens = [batch * length for batch, length in step]
        self._steps.append((max(tokens), sum(tokens), seconds))

    @property
    def ledger(self) -> Ledger:
        """The ledger of the largest step seen."""
        largest, tokens, _ = map(max, zip(*self._steps, strict=True))
        run = replace(self._run, length=largest, step_tokens=tokens, shapes=tuple(self._shapes))
        return ledger(self._shape, run)

    def seconds(self, card: Card) -> tuple[float, float]:
        """Return the mean seconds of a step, measured and predicted; NaN before there are any."""
        timed = self._steps[_UNTIMED:]
        runs = [replace(self._run, length=part, step_tokens=all_) for part, all_, _ in timed]
        predicted = [step_seconds(self._shape, run, card).total for run in runs]
        count = len(timed) or math.nan
        return sum(took for *_, took in timed) / count, sum(predicted) / count

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
        record: dict[str, Any] = {"step": step, "measured_bytes": measured}
        record |= {"predicted_bytes": entries.peak, "off": off}
        card = self._card()
        if card is not None and len(self._steps) > _UNTIMED:
            took, predicted = self.seconds(card)
            line += f"; {took:.3g} s a step, {predicted:.3g} predicted"
            record |= {"measured_seconds": took, "predicted_seconds": predicted}
        report.note(line)
        lines = [entry._asdict() for entry in entries.all_lines()]
        report.record("memory", record | {"ledger": lines})

    def _card(self) -> Card | None:
        if self._run.device == "cpu":
            self._measured = self._measured or measure_machine()
            return self._measured
        # Not measured: the buffers would count to the peak.
        return card_of_driver(torch.cuda.get_device_name())
