"""What a run records about itself, so that its journal is self-contained.

Versions, machine, options, the report on the data, the time of each part of a step, and the model's
answers before and after. None of it is used for training.
"""

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.base_model import LoadedBase
from halfbyte.config.data_sources import name_of
from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, DatasetReport, MicroBatch
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import peak_memory, used_memory
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.lora import LoRAConfig, frozen_linears
from halfbyte.linear.lora_targets import ALL_LINEAR
from halfbyte.models.generate import generate
from halfbyte.runtime import device as devices
from halfbyte.runtime.device import is_out_of_memory
from halfbyte.train.trainer import StepResult
from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte.report import RunReport

_LINES_LISTED = 100  # of the rows rejected for one reason, in the journal

_PACKAGES = ("torch", "transformers", "triton")

# Limits of sample prompts and answers, in tokens.
_LONGEST_PROMPT = 512
_LONGEST_ANSWER = 48


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter to a run."""
    found = {"halfbyte": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> str:
    """Return the name of the GPU, or of the processor and its threads."""
    if device == "cuda":
        return devices.spec_of(torch.device(device)).name
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def step(
    result: StepResult, batches: Sequence[MicroBatch], times: Mapping[str, float], device: str
) -> dict[str, Any]:
    """Return what the journal says of a step.

    Args:
        result: The step.
        batches: Its micro-batches.
        times: Seconds of its parts, by name.
        device: Where it ran.
    """
    tokens = sum(batch.tokens for batch in batches)
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": tokens,
        "supervised_tokens": sum(batch.supervised_tokens for batch in batches),
        "tokens_per_second": tokens / result.seconds,
        "peak_memory_bytes": peak_memory(device),
        "seconds": result.seconds,
        "data_seconds": result.data_seconds,
        **{f"{part}_seconds": spent for part, spent in times.items()},
        **(result.paging._asdict() if result.paging else {}),
        **({"skipped": True} if result.skipped else {}),
    }


def trained_in_words(
    parameters: Mapping[str, Tensor],
    adapted: Sequence[str],
    model: PreTrainedModel,
    lora: LoRAConfig,
) -> str:
    """Return how much is trained: ``parameters`` by name, with adapters on what ``attach`` named.

    It also says which layers have no adapter because of the adapters' options.
    """
    linears = frozen_linears(model)
    experts = sum(path in expert_linears(model) for path in adapted)
    layers = sum(path.removesuffix(".weight") in linears for path in adapted)
    counted = {
        "linear layers": layers,
        "weights of experts": experts,
        "routers": len(adapted) - layers - experts,
    }
    places = " and ".join(f"{n} {what}" for what, n in counted.items() if n) or "0 linear layers"
    count = sum(parameter.numel() for parameter in parameters.values())
    whole = dict.fromkeys(name.split(".")[-2] for name in parameters if ".lora_" not in name)
    text = f"{count / 1e6:.2f} M parameters trained, on {places}"
    text += f"; trained in full: {', '.join(whole)}" if whole else ""
    if lora.target_modules != ALL_LINEAR or lora.why_no_parameters is None:
        return text
    left_out = sum(linear.is_parameter_in_peft for linear in frozen_linears(model).values())
    if left_out:
        text += f"; {left_out} of shared experts, or beside experts, have no adapter, since PEFT "
        text += "adapts them as parameters, which excludes lora_dropout and use_dora"
    return text


def run(
    config: TrainConfig,
    base: LoadedBase,
    dataset: Dataset,
    held_out: Dataset | None,
    *,
    device: str,
    trained: int,
    engine: str,
) -> dict[str, Any]:
    """Return what the journal says of a run at its beginning.

    Args:
        config: Its options.
        base: Its base model.
        dataset: What it is trained on.
        held_out: What it is evaluated on.
        device: Where it runs.
        trained: Number of trained parameters.
        engine: What computes its steps.
    """
    recipe = base.model.halfbyte_recipe
    return {
        "model": config.model,
        "data": name_of(config.data),
        "quant": recipe.experts or recipe.quant,
        "device": device,
        "compute_dtype": str(recipe.compute_dtype).removeprefix("torch."),
        "compute": config.compute,
        "base_bytes": base.memory_report.total_bytes,
        "trained_parameters": trained,
        "examples": len(dataset.examples),
        "supervised_tokens": dataset.report.supervised_tokens,
        "engine": engine,
        "versions": versions(),
        "machine": machine(device),
        "data_verdict": dataset_report(dataset.report),
        "held_out_verdict": None if held_out is None else dataset_report(held_out.report),
    } | options(config)


def options(config: TrainConfig) -> dict[str, Any]:
    """Return all options, and the names of those that were set."""
    return {"config": config.model_dump(mode="json"), "given": sorted(config.model_fields_set)}


def dataset_report(report: DatasetReport) -> dict[str, Any]:
    """Return the report on a data set as JSON values."""
    return {
        "source": report.source,
        "format": report.format,
        "rows": report.rows,
        "usable": report.usable,
        "examples": report.examples,
        "split": len(report.split_lines),
        "truncated": report.truncated,
        "max_length": report.max_length,
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "longest": report.longest,
        "held_out": report.held_out,
        "formats": dict(report.formats),
        "rejected": [
            {"reason": reason, "rows": len(lines), "lines": lines[:_LINES_LISTED]}
            for reason, lines in report.rejected.items()
        ],
        "lines": report.lines(),
    }


def memory_now(device: str) -> dict[str, int]:
    """Return the bytes in use and their peak: of the process, or of torch on a GPU."""
    found = {"memory_bytes": used_memory(device), "peak_memory_bytes": peak_memory(device)}
    taken = reserved(device)
    return found if taken is None else found | {"reserved_bytes": taken}


def reserved(device: str) -> int | None:
    """Return the peak of the memory torch has reserved on a GPU; None on a CPU."""
    return int(torch.cuda.max_memory_reserved()) if device == "cuda" else None


class StepClock:
    """Times the parts of steps, without making the host wait for a GPU.

    Args:
        optimizer: Its ``step`` is the part ``update``.
        engine: Marks the other parts, if it is a `LayerEngine`.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, engine: LayerEngine | AutogradEngine, device: str
    ) -> None:
        self._on_gpu = device == "cuda"
        self._marks: list[tuple[str, Any]] = []
        optimizer.register_step_pre_hook(lambda *_: self._mark("update"))
        optimizer.register_step_post_hook(lambda *_: self._mark(""))
        if isinstance(engine, LayerEngine):
            engine.on_phase = self._mark

    def _mark(self, part: str) -> None:
        if self._on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Return the time of each part since the last call; on a GPU, after the update is done."""
        found: dict[str, float] = {}
        for (part, start), (_, end) in pairwise(self._marks):
            taken = float(start.elapsed_time(end)) / 1e3 if self._on_gpu else end - start
            found[part] = found.get(part, 0.0) + taken
        self._marks = []
        return found


class Samples:
    """A few prompts of a data set, answered greedily before and after training."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        """Choose ``count`` prompts, spread over the data, without long ones and plain text."""
        cases = dataset.prompts(_LONGEST_PROMPT)
        chosen = min(count, len(cases))
        every = [cases[len(cases) * i // chosen] for i in range(chosen)]
        self._rows = [dataset.cases[at].row for at in every]
        self._source = dataset.report.source

    def tell(
        self,
        report: "RunReport",
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        step: int,
        *,
        memory_limit: int,
    ) -> None:
        """Record the answers after ``step`` in the journal, or note that memory is short.

        Args:
            report: Where to.
            model: As in `answer`, like the others.
            tokenizer: Likewise.
            step: Likewise.
            memory_limit: Likewise.
        """
        try:
            with report.task(f"answering a few prompts, step {step}"):
                answers = self.answer(model, tokenizer, step, memory_limit=memory_limit)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            report.note("no answers: there is not enough GPU memory left for them")
        else:
            report.record("samples", answers)

    def answer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        step: int,
        *,
        memory_limit: int | None = None,
    ) -> dict[str, Any]:
        """Return the journal's record of the model's answers after ``step``.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            step: The step of the run.
            memory_limit: Largest number of bytes that torch may reserve on a GPU, in total.
        """
        began = time.perf_counter()
        answers = generate(
            model,
            tokenizer,
            [row.prompt for row in self._rows],
            tools=[row.tools for row in self._rows],
            max_new_tokens=_LONGEST_ANSWER,
            memory_limit=memory_limit,
        )
        return {
            "step": step,
            "source": self._source,
            "samples": [
                {"prompt": str(row.prompt[-1]["content"]), "expected": row.expected, "got": got}
                for row, got in zip(self._rows, answers, strict=True)
            ],
            "seconds": time.perf_counter() - began,
        }

    def __bool__(self) -> bool:
        return bool(self._rows)
