"""Whether a run may go on from a checkpoint: the same base, the same data, the same options."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.checkpoint.base_model import BaseSource
from halfbyte.checkpoint.peft import CONFIG_NAME
from halfbyte.checkpoint.run_state import RunState, latest_run, load_run
from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset
from halfbyte.errors import CheckpointError, ConfigError, OutputError

if TYPE_CHECKING:
    from halfbyte.report import RunReport

# What may differ between a run and its continuation, because no result depends on it.
_FREE_TO_CHANGE = {
    "output",
    "resume",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_data",
    "eval_steps",
    "activations",
    "memory_budget",
    "samples",
    "report_to",
    "model",  # the base's fingerprint is compared instead
    "data",  # the tokens' digest is compared instead
    "revision",
    "cache_quantized",
    "paging",
    "cuda_graphs",
    "deterministic",
}


def resume_from(config: TrainConfig, output: Path, report: "RunReport") -> RunState | None:
    """Return the newest checkpoint of a run that is to go on, or None where it begins.

    Raises:
        OutputError: If there is a run in ``output``, and it is not to be resumed.
    """
    newest = latest_run(output)
    if config.resume:
        if newest is None:
            report.note(f"no checkpoint in {output}: starting from the beginning")
            return None
        report.note(f"going on from {newest}")
        return load_run(newest)
    if newest is not None or (output / CONFIG_NAME).exists():
        raise OutputError(
            f"{output} holds a run already. Give --resume to go on with it, another --output, "
            "or remove it"
        )
    return None


def identity_of_run(config: TrainConfig, source: BaseSource, dataset: Dataset) -> dict[str, Any]:
    """Return what makes two runs the same run: options, base and tokens."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        digest.update(np.asarray(example.tokens).tobytes())
        digest.update(np.asarray(example.labels_mask).tobytes())
        digest.update(b"|")
    return {"base": source.fingerprint, "data": digest.hexdigest(), "options": _options(config)}


def _options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that a run's result depends on."""
    options = config.model_dump(mode="json", exclude=_FREE_TO_CHANGE)
    # Where the moments live changes nothing; how wide they are does.
    options["optim"] = config.optim.removeprefix("paged_").removesuffix("_32bit")
    return options


def check_same_run(resumed: RunState, identity: dict[str, Any]) -> None:
    """Refuse to go on with another base, other data or other options.

    Raises:
        CheckpointError: The base or the data has changed.
        ConfigError: An option has changed on which the result depends; all are named.
    """
    for what in ("base", "data"):
        if resumed.progress.get(what) != identity[what]:
            raise CheckpointError(
                f"the {what} is not what the interrupted run was training "
                f"{'on' if what == 'base' else 'with'}; give the same, or start anew in another "
                "--output"
            )
    # An option that is younger than the run was as it is by default.
    defaults = _options(TrainConfig.model_validate({"model": "-", "data": "-", "output": "-"}))
    before, now = defaults | resumed.progress.get("options", {}), identity["options"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise ConfigError(
            "a resumed run must keep the options it began with, or it is another run:\n  "
            + "\n  ".join(changed)
        )
