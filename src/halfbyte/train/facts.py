"""What a run writes down about itself, so that its journal tells the whole story by itself.

Versions, machine, options, the verdict on the data, where the bytes are expected to go, and what
the model answers before and after. None of it is used for training.
"""

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte import __version__
from halfbyte.data import Dataset
from halfbyte.model.generate import generate
from halfbyte.train.config import TrainConfig
from halfbyte.train.memory import ActivationPlan, peak_memory, used_memory

_PACKAGES = ("torch", "transformers", "triton")

# Prompts for samples have no more tokens, answers neither.
_LONGEST_PROMPT = 512
_LONGEST_ANSWER = 48


def versions() -> dict[str, str]:
    """Return what would have to be installed to do the run again."""
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
        return str(torch.cuda.get_device_name())
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def options(config: TrainConfig) -> dict[str, Any]:
    """Return every option, and the names of those that were given."""
    return {"config": config.model_dump(mode="json"), "given": sorted(config.model_fields_set)}


def verdict(dataset: Dataset) -> dict[str, Any]:
    """Return the verdict on a data set, in plain values."""
    report = dataset.report
    return {
        "source": report.source,
        "format": report.format,
        "rows": report.rows,
        "usable": report.usable,
        "truncated": report.truncated,
        "max_length": report.max_length,
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "longest": report.longest,
        "lines": report.lines(),
    }


def memory_now(device: str) -> dict[str, int]:
    """Return bytes in use and their peak: of the process, or of torch on the GPU."""
    found = {"memory_bytes": used_memory(device), "peak_memory_bytes": peak_memory(device)}
    if device == "cuda":
        found["reserved_bytes"] = int(torch.cuda.max_memory_reserved())
    return found


def memory_plan(
    base_bytes: int, parameters: Mapping[str, nn.Parameter], plan: ActivationPlan, device: str
) -> dict[str, Any]:
    """Return where the bytes of the predicted peak go, before the first step."""
    trained = sum(parameter.nbytes for parameter in parameters.values())
    parts = {
        "base weights": base_bytes,
        "adapters": trained,
        "gradients": trained,
        "optimizer state": 2 * trained,
    }
    # Of a process: Python, its libraries, and what the allocator holds.
    parts["program"] = max(0, used_memory(device) - base_bytes - 2 * trained)
    parts["activations and workspace"] = max(0, plan.predicted_bytes - sum(parts.values()))
    return {
        "parts": parts,
        "predicted_bytes": plan.predicted_bytes,
        "budget_bytes": plan.budget,
        "saved_layers": plan.saved_layers,
        "layers": plan.layers,
    }


class Samples:
    """A few prompts of a data set, to be answered greedily again and again."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        """Choose ``count`` prompts, spread over the data; long ones and plain text are not."""
        pairs = zip(dataset.rows, dataset.examples, strict=True)
        rows = [
            row for row, ex in pairs if row.text is None and ex.prompt_length <= _LONGEST_PROMPT
        ]
        chosen = min(count, len(rows))
        self._rows = [rows[len(rows) * i // chosen] for i in range(chosen)]
        self._source = dataset.report.source

    def answer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int
    ) -> dict[str, Any]:
        """Return what the journal is told of the model's answers after ``step``."""
        began = time.perf_counter()
        answers = generate(
            model,
            tokenizer,
            [row.prompt for row in self._rows],
            tools=[row.tools for row in self._rows],
            max_new_tokens=_LONGEST_ANSWER,
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
