"""Compares a run's memory and time with the plan's prediction.

Bytes are predicted from the files' headers, the sizes of trained tensors, the shapes of the steps
so far and the activation policy. Nothing is measured except, on a CPU, the memory of Python and its
libraries before the model is loaded. An error of more than ``TOLERANCE`` is logged. Seconds come
from the table of GPUs, or on a CPU from a short timing of its products; the first steps, which
compile and capture, are not compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from halfbyte.checkpoint.base_model import BaseSource
from halfbyte.data import MicroBatch
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import Ledger, OptimizerMode, Run, ledger
from halfbyte.plan.model_shape import ModelShape, shape_of
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.roofline import GpuSpec, gpu_of_driver, measure_machine, step_seconds
from halfbyte.runtime import device as devices

if TYPE_CHECKING:
    from halfbyte.report import RunReport

TOLERANCE = 0.05
FIRST_LOOK = 5  # steps, after which all permanent tensors have been allocated
_UNTIMED = 2


def shape_of_source(source: BaseSource) -> ModelShape:
    """Return the shape of the model in ``source``, from its headers."""
    files = {
        p.name: (p.nbytes if p.packed else math.prod(p.shape) * p.dtype.itemsize, p.packed)
        for p in source.parameters
    }
    return shape_of(source.skeleton, source.name, files=files)


class _Seen(NamedTuple):
    """A finished step: its parts, the mean sequence length in attention, its seconds."""

    largest: int
    tokens: int
    parts: int
    attended: int
    seconds: float


class Prediction:
    """The predicted memory and time of a run.

    Args:
        source: The base model's files.
        recipe: How its weights are stored.
        parameters: The trained parameters, by name.
        rank: The rank of most adapters.
        optimizer: The optimizer's name.
        pages: Whether its state is always on the host.
        fused: Whether layers are run by ``layers.decoder_layer``.
        policy: What is kept for backward.
        graphs: Whether passes are CUDA graphs.
        embedding_on_host: Whether the embedding is in host memory.
        process: Bytes of the process before the base model was loaded (CPU).
        waits: Where the frozen weights of layers wait, if not on the device.
        shards: The processes that they are divided among.
        fp8: Whether products with packed linears are in 8 bits.
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
        policy: ActivationPolicy,
        graphs: bool = False,
        embedding_on_host: bool = False,
        process: int | None = None,
        waits: Literal["host", "disk", "gpus"] | None = None,
        shards: int = 1,
        fp8: bool = False,
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
            policy=policy,
            graphs=graphs,
            gpu=devices.spec_of(torch.device(recipe.device)),
            embedding_on_host=embedding_on_host,
            trained=tuple(parameter.numel() for parameter in parameters.values()),
            process=process,
            waits=waits,
            shards=shards,
            fp8=fp8,
        )
        self._shapes: dict[tuple[tuple[int, int], ...], None] = {}
        self._documents: dict[tuple[int, ...], None] = {}  # packed
        self._steps: list[_Seen] = []
        self._captured = 0
        self._measured: GpuSpec | None = None

    def use(self, policy: ActivationPolicy, *, graphs: bool) -> None:
        """Predict for another policy from now on, after memory ran out."""
        self._run = replace(self._run, policy=policy, graphs=graphs)

    def see(
        self,
        shapes: Iterable[Sequence[int]],
        seconds: float,
        *,
        lengths: Sequence[int],
        parts: Sequence[int] | None = None,
        captured: int = 0,
    ) -> None:
        """Record a finished step.

        Args:
            shapes: The (B, T) of its micro-batches.
            seconds: How long it took.
            lengths: The tokens of each document or, if rows are padded, of each row.
            parts: If documents are packed, the size of each part in tokens.
            captured: The largest part whose passes were captured as CUDA graphs, in tokens: memory
                is that of this one from the beginning.
        """
        self._captured = max(self._captured, captured)
        step = tuple((batch, length) for batch, length in shapes)
        if parts:
            step = tuple((1, size) for size in parts)
            self._documents[tuple(lengths)] = None
        self._shapes[step] = None
        parts = parts or [batch * length for batch, length in step]
        # A token attends to its document, so on average to as many.
        attended = sum(n * n for n in lengths) // max(1, sum(lengths))
        self._steps.append(_Seen(max(parts), sum(parts), len(parts), max(1, attended), seconds))

    @property
    def ledger(self) -> Ledger:
        """The ledger of the largest step so far."""
        largest = max(self._captured, *(seen.largest for seen in self._steps))
        tokens = max(seen.tokens for seen in self._steps)
        run = replace(
            self._run,
            largest_part=largest,
            step_tokens=tokens,
            shapes=tuple(self._shapes),
            documents=tuple(self._documents),
        )
        return ledger(self._shape, run)

    def seconds(self, card: GpuSpec) -> tuple[float, float]:
        """Return the mean seconds of a step, measured and predicted; NaN before there are any."""
        timed = self._steps[_UNTIMED:]
        runs = [
            replace(
                self._run,
                length=seen.attended,
                micro_batches=seen.parts,
                largest_part=-(-seen.tokens // seen.parts),
                step_tokens=seen.tokens,
            )
            for seen in timed
        ]
        predicted = [step_seconds(self._shape, run, card).total for run in runs]
        count = len(timed) or math.nan
        return sum(seen.seconds for seen in timed) / count, sum(predicted) / count

    def tell(
        self, report: "RunReport", measured: int, step: int, *, reserved: int | None = None
    ) -> None:
        """Compare the prediction with the measurement, and log both.

        Args:
            report: Where to log.
            measured: Peak memory, in bytes.
            step: The number of steps so far.
            reserved: Peak of the memory torch has reserved on a GPU, in bytes.
        """
        if not self._steps:  # this process had no documents yet
            return
        entries = self.ledger
        off = measured / entries.peak - 1
        line = (
            f"memory: peak {measured / 1e9:.2f} GB in {step} steps, "
            f"{entries.peak / 1e9:.2f} GB predicted ({100 * off:+.1f} %)"
        )
        if abs(off) > TOLERANCE:
            line += f": off by more than {100 * TOLERANCE:.0f} %"
        record: dict[str, Any] = {"step": step, "measured_bytes": measured}
        record |= {"predicted_bytes": entries.peak, "off": off}
        if reserved is not None:
            line += f"; {reserved / 1e9:.2f} GB reserved, {entries.needed / 1e9:.2f} predicted"
            record |= {"reserved_bytes": reserved, "predicted_reserved_bytes": entries.needed}
        card = self._card()
        if card is not None and len(self._steps) > _UNTIMED:
            took, predicted = self.seconds(card)
            line += f"; {took:.3g} s a step, {predicted:.3g} predicted"
            record |= {"measured_seconds": took, "predicted_seconds": predicted}
        report.note(line)
        lines = [entry._asdict() for entry in entries.all_lines()]
        report.record("memory", record | {"ledger": lines})

    def _card(self) -> GpuSpec | None:
        if self._run.device == "cpu":
            self._measured = self._measured or measure_machine()
            return self._measured
        # Not measured, since the buffers would count towards the peak.
        return gpu_of_driver(self._run.gpu.name)


def sizes_of(engine: LayerEngine | AutogradEngine, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Return the lengths of a step's sequences in attention, and the sizes of its parts."""
    lengths = [int(n) for batch in batches for n in batch.lengths]
    if isinstance(engine, LayerEngine) and engine.packs:
        parts = [shape.numel for shape in engine.part_shapes(lengths)]
        captured = 0
        if engine.buckets is not None and engine.num_graphs:
            captured = engine.buckets.shapes[0].numel  # the largest is captured first
        return {"lengths": lengths, "parts": parts, "captured": captured}
    if isinstance(engine, AutogradEngine) and engine.unpadded is not None:
        return {"lengths": lengths, "parts": [batch.tokens for batch in batches]}
    return {"lengths": [n for b in batches for n in [b.input_ids.shape[1]] * len(b.lengths)]}
