"""Evaluation on held-out data: loss, perplexity and exact-match accuracy.

The loss is the mean over supervised tokens, computed by the training engine, so the logits of a
whole batch never exist at once. An answer matches if it equals the expected reply, ignoring
surrounding white space.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.config.data_sources import Data, is_sources
from halfbyte.data import Example, MicroBatch, collate, load_dataset
from halfbyte.data.in_memory import RowsInMemory
from halfbyte.data.templates import TrainOn
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.dealing import deal
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.runtime.device import is_out_of_memory
from halfbyte.runtime.distributed import ProcessGroup
from halfbyte.train.metadata import dataset_report
from halfbyte.train.metrics import LONGEST_ANSWER, Metric, answered, measured, require_metrics

# Micro-batches on a CPU, and tokens on a GPU, that go through a layer together: it is decoded once
# for all of them, and this many tokens keep a GPU busy.
_TOGETHER, _TOKENS_TOGETHER = 8, 16384
# Default examples per micro-batch.
_BATCH = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        loss: Mean token loss over the supervised tokens.
        perplexity: exp(loss).
        supervised_tokens: Their number.
        exact_match: Fraction of cases answered exactly, or None if no answers were generated.
        cases: Number of cases that were answered.
        samples: For each case ``prompt``, ``expected`` and ``got``.
        data: The report on the data, as in a run's journal.
        metrics: The values of the caller's own metrics.
    """

    loss: float
    perplexity: float
    supervised_tokens: int
    exact_match: float | None
    cases: int
    samples: list[dict[str, str]]
    data: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)


def as_batch(batch: MicroBatch) -> Batch:
    """Return a micro-batch as tensors on the CPU; the engine moves them to the device."""
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    return Batch(ids, labels, batch.lengths.tolist())


def evaluate_loss(
    engine: LayerEngine | AutogradEngine,
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Progress | None = None,
    processes: ProcessGroup | None = None,
) -> tuple[float, int]:
    """Return the mean token loss over ``examples``, and the number of supervised tokens.

    With several ``processes`` each computes a share, and all return the same; if one of them runs
    out of memory, all raise that.
    """
    processes = processes or ProcessGroup()
    if processes.size > 1:
        mine = deal([len(one.tokens) for one in examples], processes.size)[processes.rank]
        examples = [examples[index] for index in mine]
    failed, total, tokens = None, 0.0, 0
    try:
        if examples:
            total, tokens = _summed_loss(engine, examples, batch_size, progress)
    except RuntimeError as error:
        if processes.size == 1 or not is_out_of_memory(error):
            raise
        failed = error
    sums = processes.gather_object([total, tokens, failed is not None])
    if any(one for *_, one in sums):
        raise failed or torch.OutOfMemoryError("another process of the run is out of memory")
    tokens = sum(one for _, one, _ in sums)
    return math.fsum(one for one, *_ in sums) / tokens, tokens


def _summed_loss(
    engine: LayerEngine | AutogradEngine,
    examples: Sequence[Example],
    batch_size: int,
    progress: Progress | None,
) -> tuple[float, int]:
    """Return the summed token loss over ``examples``, and the number of supervised tokens."""
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    starts = range(0, len(order), batch_size)
    batches = (
        collate([examples[at] for at in order[start : start + batch_size].tolist()])
        for start in starts
    )
    done = tokens = 0
    # Summed on the device: reading each value would wait for it.
    total = torch.zeros((), dtype=torch.float64, device=engine.model.device)
    for together in _groups(batches, by_tokens=total.is_cuda):
        total += engine.loss([as_batch(batch) for batch in together])
        done += sum(len(batch.lengths) for batch in together)
        tokens += sum(batch.supervised_tokens for batch in together)
        if progress is not None:
            progress(done, len(order))
    return float(total), tokens


def _groups(batches: Iterable[MicroBatch], *, by_tokens: bool) -> Iterator[list[MicroBatch]]:
    """Group consecutive micro-batches that go through the layers together."""
    together: list[MicroBatch] = []
    tokens = 0
    for batch in batches:
        together.append(batch)
        tokens += batch.tokens
        if tokens >= _TOKENS_TOGETHER if by_tokens else len(together) == _TOGETHER:
            yield together
            together, tokens = [], 0
    if together:
        yield together


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data | Iterable[object],
    *,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    max_length: int = 1024,
    train_on: TrainOn = "assistant",
    batch_size: int | None = None,
    exact_match: bool = True,
    metrics: Sequence[Metric] = (),
    max_new_tokens: int = LONGEST_ANSWER,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> EvalResult:
    """Evaluate a model on a data file.

    Args:
        model: A model of ``models.build``, with or without adapters.
        tokenizer: Its tokenizer.
        data: Sources (`halfbyte.data.specs`), or rows (data/in_memory.py); in any row format.
        columns: For keys of a format, the rows' own.
        max_samples: Rows of each source that are used at most.
        max_length: Longer rows are truncated to this many tokens for the loss.
        train_on: Which tokens count for the loss.
        batch_size: Examples per batch; None: chosen for the device.
        exact_match: Whether to generate answers and compare them with the expected ones.
        metrics: Functions of these answers (train/metrics.py).
        max_new_tokens: Longest answer, in tokens.
        progress: Called with (done, total), in examples; an answered example counts twice.
        note: Called with each line of the report on the data, before the model is run.

    Raises:
        DataError: If there is nothing usable in ``data``.
        ConfigError: A metric is no function, or returns something else than numbers.
    """
    require_metrics(metrics)
    device = model.device
    dataset = load_dataset(
        data if is_sources(data) else RowsInMemory(cast(Iterable[object], data), "data"),
        tokenizer,
        max_length=max_length,
        train_on=train_on,
        columns=columns,
        max_samples=max_samples,
    )
    if note is not None:
        for line in dataset.report.lines():
            note(line)
    cases = [row for row, _ in dataset.cases if row.text is None]
    if not (exact_match or metrics):
        cases = []
    total = len(dataset.examples) + len(cases)

    def advance(before: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(before + done, total)

    engine, _ = choose_engine(model, str(device))
    loss, tokens = evaluate_loss(
        engine, dataset.examples, batch_size=batch_size or _BATCH, progress=advance(0)
    )
    samples = answered(
        model,
        tokenizer,
        cases,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=advance(len(dataset.examples)),
    )
    own = measured(metrics, samples, model, tokenizer)
    right = sum(sample["got"].strip() == sample["expected"].strip() for sample in samples)
    return EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows a float above 709
        supervised_tokens=tokens,
        exact_match=right / len(samples) if samples and exact_match else None,
        cases=len(samples),
        samples=samples,
        data=dataset_report(dataset.report),
        metrics=own,
    )
