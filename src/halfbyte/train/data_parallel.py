"""Data parallel steps: each process has a share of a step's documents, and gradients are summed.

    share       the documents that `engine/dealing.py` gives to this process, none if there are few
    gradients   of the sum of its token losses, divided by the supervised tokens of the whole step,
                which every process knows
    sum         over all processes, in one flat buffer, with what else has to be known by all
    update      the same arithmetic on the same bits in every process; with ``shard`` each updates a
                part of the parameters (optim/sharded_state.py), and gets the other parts

The sum begins after backward, not beside it: the gradients of adapters are small. 160 MB for
a 7B model with r = 16, where a link between GPUs moves hundreds of GB a second, and a step takes
half a second. To overlap it would gain little, and a process could no longer repeat its share after
it has run out of memory. It ends before the update, which
must not see half a sum when a process fails: so parameters are always those after a whole step.

Behind the gradients, in the same buffer, there are the loss, and for each process the number of the
signal that asked it to stop, and the seconds of its share of the step before. So all processes stop
after the same step, and each knows who is slow, without another message.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.config.schema import TrainConfig
from halfbyte.data import MicroBatch
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.dealing import own_batches, portions
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import Shapes
from halfbyte.engine.packing import Batch, lengths_of
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import adapters
from halfbyte.optim.buckets import gradients_in_one
from halfbyte.optim.sharded_state import SharedState
from halfbyte.runtime.distributed import PendingSum, ProcessGroup

_STOP = 1000.0  # asked to stop, but not by a signal


class DataParallel:
    """The share of this process in steps, and the sum of gradients; all of it in a single process.

    Args:
        processes: The processes of the run.
        engine: Computes gradients.
        parameters: The trained parameters; their gradients are allocated.
        config: The options of the run.

    Attributes:
        processes: As given.
        current: The share that was asked for last.
        gradients: float32, of all parameters.
        wants_stop: Returns the signal that asked this process to stop, 0 if another thing did, or
            None.
        stop: What any process was asked by the step that was summed last, likewise.
        seconds: The seconds of each process's share in the step before that; none at first.
    """

    def __init__(
        self,
        processes: ProcessGroup,
        engine: LayerEngine | AutogradEngine,
        parameters: Sequence[nn.Parameter],
        config: TrainConfig,
    ) -> None:
        self.processes, self._engine, self._config = processes, engine, config
        self._parameters = list(parameters)
        several = processes.size > 1
        if several and config.router_aux_loss_coef:
            raise ConfigError(
                "`router_aux_loss_coef` needs a single process: the loss is an average over parts "
                "of a step, which several processes would divide otherwise. Leave it out, or start "
                "one process"
            )
        whole = gradients_in_one(parameters, 1 + 2 * processes.size if several else 0)
        self._buffer, self._beside = whole, whole[:0]
        if several:
            self._beside = whole[-1 - 2 * processes.size :]
        self.current: Sequence[Batch] = ()
        self.gradients = whole[: len(whole) - len(self._beside)]
        self.wants_stop: Callable[[], int | None] = lambda: None
        self.stop: int | None = None
        self.seconds: list[float] = []
        self._last: tuple[Any, Any] | None = None
        self._next: tuple[Any, Any] | None = None
        self._views: _Views | None = None

    # --- shares -----------------------------------------------------------------------------------

    def share(self, step: int, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the micro-batches of a step that this process computes; maybe none."""
        rank, size = self.processes.rank, self.processes.size
        if size == 1:
            self.current = batches
            return batches
        units = self._units(lengths_of(batches), [len(batch.input_ids) for batch in batches])
        self.current = own_batches(batches, rank, size, step, rows=self._rows, units=units)
        return self.current

    def micro_batches(self, step: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """Return the share that was asked for last, given the micro-batches of its whole step."""
        if self.processes.size == 1:
            return step
        return [
            MicroBatch(one.input_ids.numpy(), one.labels.numpy(), np.array(one.lengths))
            for one in self.current
        ]

    def shares(
        self, shapes: Shapes, lengths: Sequence[Sequence[int]]
    ) -> tuple[Shapes, Sequence[Sequence[int]]]:
        """Return shapes and lengths, as of `Trainer.fit`, of the shares of all processes."""
        if self.processes.size == 1:
            return shapes, lengths
        steps = [
            (own, self._units(own, [rows for rows, _ in micro_batches]))
            for micro_batches, own in zip(shapes, lengths, strict=True)
        ]
        return portions(steps, self.processes.size, self._rows)

    def in_words(self) -> str:
        """Return how a step is dealt out."""
        config, size = self._config, self.processes.size
        count = config.batch_size * config.gradient_accumulation_steps
        what = "packs" if config.packing else "examples"
        kind = "GPUs" if self._buffer.is_cuda else "processes"
        text = f"{count} {what} a step in all, dealt out to {size} {kind} by tokens"
        if self._together:
            text += ", in whole micro-batches, on which dropout depends"
        return text

    @property
    def _together(self) -> bool:
        """Whether a document's gradient depends on those that are computed with it."""
        drops = any(one.config.dropout for one in adapters(self._engine.model).values())
        return drops or not self._engine.objective.separable

    def _units(self, lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]] | None:
        if not self._together:
            return None
        engine = self._engine
        if isinstance(engine, LayerEngine) and engine.packs and engine.unpadded is not None:
            return engine.unpadded.divide(lengths)
        documents = iter(range(len(lengths)))
        return [[next(documents) for _ in range(count)] for count in rows]

    def _rows(self, longest: int) -> int:
        """Return the most documents of a micro-batch (data/batching.py)."""
        config = self._config
        if config.packing:
            return max(1, config.batch_size * config.max_length // longest)
        return config.batch_size

    # --- sums -------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Compute the gradients of a step (0-based) in the block."""
        self.processes.now_at(f"step {step + 1}")
        began = self._now()
        yield
        if self.processes.size > 1:
            self._next = (began, self._now())

    def _now(self) -> Any:
        if self.processes.size == 1 or not self._buffer.is_cuda:
            return time.perf_counter()
        now: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        now.record()
        return now

    def begin_sum(self, loss: Tensor) -> PendingSum | None:
        """Begin to sum the gradients and a loss, float32 scalar; None in a single process."""
        rank, size, beside = self.processes.rank, self.processes.size, self._beside
        if size == 1:
            return None
        beside.zero_()
        beside[0] = loss
        asked = self.wants_stop()
        if asked is not None:
            beside[1 + rank] = float(asked or _STOP)
        if self._last is not None:
            beside[1 + size + rank] = _elapsed(*self._last)
        self._last = self._next
        return self.processes.begin_sum(self._buffer)

    def summed_loss(self) -> Tensor:
        """Return the loss of all processes, once the sum has ended."""
        return self._beside[0].clone()

    # --- the optimizer state of several processes ------------------------------------------------

    def shared_state(self) -> SharedState | None:
        """Return how the processes of this machine share the optimizer state; None: they do not."""
        if not self._config.shard or self.processes.size == 1:
            return None
        processes, locked = self.processes, self._buffer.is_cuda
        return SharedState(
            processes.rank_on_this_host,
            processes.on_this_host,
            partial(processes.shared_memory, page_locked=locked),
        )

    def exchange(self, parts: Sequence[tuple[Tensor, slice]]) -> None:
        """Give all processes the parameters that each has updated.

        They pass through the memory of the gradients, which have been used: each process puts its
        part there, and zeros elsewhere, and all are summed.

        Args:
            parts: Parameters that were updated here, and which elements of each, flat; in each step
                the same.

        Raises:
            ProcessFailed: As `PendingSum.wait`; parameters are those of different steps then.
        """
        if self._views is None:
            self._views = _Views.of(parts, self._parameters)
        views = self._views
        self.gradients.zero_()
        if self.processes.host == 0:  # each machine has updated all of them
            _copy(views.sent, views.updated)
        self.processes.sum_(self.gradients)
        _copy(views.parameters, views.received)

    def read(self) -> None:
        """Read what the sum says beside gradients and loss; the device has computed it."""
        size = self.processes.size
        if size > 1:
            said = self._beside[1:].tolist()
            asked = [signal for signal in said[:size] if signal]
            self.stop = (0 if asked[0] == _STOP else int(asked[0])) if asked else None
            self.seconds = said[size:] if any(said[size:]) else []


class _Views(NamedTuple):
    """Parameters and gradients, flat, as they are exchanged; made once, for there are hundreds.

    Attributes:
        updated: The parts of parameters that this process updates.
        sent: The same parts of the gradients.
        parameters: All of every parameter.
        received: All of every gradient.
    """

    updated: list[Tensor]
    sent: list[Tensor]
    parameters: list[Tensor]
    received: list[Tensor]

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, slice]], parameters: Sequence[Tensor]) -> "_Views":
        return cls(
            [_flat(p)[part] for p, part in parts],
            [_flat(p.grad)[part] for p, part in parts],
            [_flat(p) for p in parameters],
            [_flat(p.grad) for p in parameters],
        )


def _flat(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().view(-1)


def _copy(to: list[Tensor], tensors: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, tensors)


def _elapsed(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended)) / 1e3
