"""Checks whether a run may resume from a checkpoint: same base model, data and options."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint.base_model import BaseSource
from halfbyte.checkpoint.peft import CONFIG_NAME
from halfbyte.checkpoint.run_state import RunState, latest_run, load_run
from halfbyte.config.schema import OF_THE_ADAPTER, TrainConfig
from halfbyte.errors import CheckpointError, ConfigError, OutputError
from halfbyte.foreign_text import quote

if TYPE_CHECKING:
    from halfbyte.report import RunReport
    from halfbyte.train.run_data import RunData

# The same, unless the result depends on evaluations.
_ABOUT_EVALUATIONS = {"eval_steps", "eval_max_samples"}
# Options that may change when a run is resumed, since the result does not depend on them.
_FREE_TO_CHANGE = {
    "output",
    "resume",
    "init_adapter",  # the checkpoint has its weights
    "allow_mismatch",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "logging_steps",
    "on_nonfinite",
    "eval_data",
    *_ABOUT_EVALUATIONS,
    "activations",
    "memory_budget",
    "weights",
    "shard",
    "samples",
    "report_to",
    "push_to_hub",
    "hub_private",
    "model",  # the base model's fingerprint is compared instead
    "data",  # the tokens' digest, and the weights, are compared instead
    "column",
    "max_samples",
    "revision",
    "cache_quantized",
    "cache_data",
    "paging",
    "cuda_graphs",
    "deterministic",
    "gpus",  # a step is the same for any number of them
    "ddp_timeout",
}


def _runs_named_like(output: Path) -> list[str]:
    """Return the directories beside ``output`` that have a checkpoint and a similar name."""
    output = output.absolute()
    beside = [path for path in output.parent.glob("*") if path.is_dir() and path != output]
    names = difflib.get_close_matches(output.name, [path.name for path in beside], cutoff=0.8)
    return [str(output.parent / name) for name in names if latest_run(output.parent / name)]


def resume_from(config: TrainConfig, output: Path, report: "RunReport") -> RunState | None:
    """Return the newest checkpoint if the run is to be resumed and has one, or None.

    Raises:
        OutputError: If ``output`` contains a run and ``resume`` is not set, or contains none and
            its name is nearly that of one that does.
    """
    newest = latest_run(output)
    if config.resume:
        if newest is None:
            if near := _runs_named_like(output):
                raise OutputError(
                    f"--resume: {output} contains no checkpoint; did you mean {' or '.join(near)}? "
                    "Leave --resume out to start a new run"
                )
            report.note(f"no checkpoint in {output}: starting from the beginning")
            return None
        report.note(f"resuming from {newest}")
        return load_run(newest)
    if newest is not None or (output / CONFIG_NAME).exists():
        raise OutputError(
            f"{output} already contains a run. Use --resume to continue it, give another --output, "
            "or remove it"
        )
    return None


def identity_of_run(config: TrainConfig, source: BaseSource, data: "RunData") -> dict[str, Any]:
    """Return what must be equal to resume a run: options, base model and tokens.

    The tokens of held-out data are part of it if the result depends on evaluations.
    """
    options, mixture = _options(config), data.mixture
    # With the numbers of examples of the sources, they determine the order.
    options["weights"] = mixture and [list(mixture.weights), list(mixture.counts)]
    found = {"base": source.fingerprint, "data": data.identity, "options": options}
    if data.held_out is not None and config.depends_on_evaluations:
        found["held_out"] = data.held_out.digest()
    return found


def _options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that a run's result depends on."""
    free = _FREE_TO_CHANGE - (_ABOUT_EVALUATIONS if config.depends_on_evaluations else set())
    options = config.model_dump(mode="json", exclude=free)
    # Paging does not change the result; the precision of the moments does.
    options["optim"] = config.optim.removeprefix("paged_").removesuffix("_32bit")
    return options


def check_same_run(resumed: RunState, identity: dict[str, Any], total_steps: int) -> None:
    """Refuse to resume with another base model, other data or other options.

    Raises:
        CheckpointError: The base model or the data has changed, or the state is not of a run.
        ConfigError: Options on which the result depends have changed; all are named.
    """
    # An option added since the run began had its default value.
    defaults = _options(TrainConfig.model_validate({"model": "-", "data": "-", "output": "-"}))
    options = resumed.progress.get("options", {})
    if not isinstance(options, dict):
        raise CheckpointError(f"the checkpoint's options: expected a mapping, got {quote(options)}")
    before, now = defaults | options, identity["options"]
    changed = {
        name: f"{name} was {quote(before.get(name))}, is {quote(value)}"
        for name, value in now.items()
        if before.get(name) != value
    }
    if changed:
        message = "\n  ".join(["a resumed run must keep its original options:", *changed.values()])
        initial = resumed.progress.get("init_adapter")
        if isinstance(initial, dict) and changed.keys() & {*OF_THE_ADAPTER}:
            message += f"\nIt started from {quote(initial.get('name'))}: give --init-adapter again"
        raise ConfigError(message)
    # After the options, since some of them choose the tokens.
    names = {"base": "base model", "data": "data", "held_out": "held-out data"}
    for what in [name for name in names if name in identity]:
        if resumed.progress.get(what) != identity[what]:
            raise CheckpointError(
                f"the {names[what]} is not that of the interrupted run; use the same, or start a "
                "new run with another --output"
            )
    if resumed.step > total_steps:
        raise CheckpointError(
            f"the checkpoint is of step {resumed.step}, and the run has only {total_steps} steps"
        )
