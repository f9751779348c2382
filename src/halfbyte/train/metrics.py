"""A program's own metrics: functions from a model's answers to numbers.

    def exact(samples):
        return {"exact": fmean(one["got"].strip() == one["expected"].strip() for one in samples)}

A sample is the last message of a ``prompt``, the ``expected`` reply and what the model ``got``. A
function that has parameters named ``model`` and ``tokenizer`` gets these, too. In a run the model
is then in eval mode, and one that changes a weight ends the run (train/program.py).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data import Conversation, Dataset
from halfbyte.errors import ConfigError
from halfbyte.foreign_text import quote
from halfbyte.models.generate import generate
from halfbyte.train.early_stopping import MEASURED

Sample = dict[str, str]
Metric = Callable[..., Mapping[str, float]]

LONGEST_ANSWER = 256  # tokens, unless told otherwise


def call_plainly(_: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Call a function; where nothing has to be saved if it fails."""
    return function(*given, **named)


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    **options: Any,
) -> list[Sample]:
    """Have the model answer conversations; ``options`` are those of `generate`."""
    answers = generate(
        model,
        tokenizer,
        [row.prompt for row in rows],
        tools=[row.tools for row in rows],
        **options,
    )
    return [
        {"prompt": str(row.prompt[-1]["content"]), "expected": row.expected, "got": answer}
        for row, answer in zip(rows, answers, strict=True)
    ]


def measured_on(
    data: Dataset,
    metrics: Sequence[Metric],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    call: Callable[..., Any],
    memory_limit: int,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Return the metrics of a run's model on held-out rows, as `measured`.

    Plain text has no answers; ``memory_limit`` and ``progress`` are those of `generate`.
    """
    rows = [row for row, _ in data.cases if row.text is None]
    samples = answered(
        model,
        tokenizer,
        rows,
        max_new_tokens=LONGEST_ANSWER,
        memory_limit=memory_limit,
        progress=progress,
    )
    return measured(metrics, samples, model, tokenizer, call=call)


def require_metrics(metrics: Sequence[Metric]) -> None:
    """Check that metrics are functions.

    Raises:
        ConfigError: One is not.
    """
    if not isinstance(metrics, Sequence) or not all(map(callable, metrics)):
        raise ConfigError(f"metrics: expected a list of functions, got {quote(metrics)}")


def measured(
    metrics: Sequence[Metric],
    samples: Sequence[Sample],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    call: Callable[..., Any] = call_plainly,
) -> dict[str, float]:
    """Return the values of all metrics by name.

    Args:
        metrics: The functions.
        samples: The answers; each function gets a copy.
        model: For functions that ask for it.
        tokenizer: Its tokenizer.
        call: Calls them: with a name for the user, the function and its arguments.

    Raises:
        ConfigError: One returned something else than numbers by name, or a name that is taken.
    """
    found: dict[str, float] = {}
    for metric in metrics:
        name = getattr(metric, "__name__", type(metric).__name__)
        given = {"model": model, "tokenizer": tokenizer}
        asked = _parameters(metric) & given.keys()
        values = call(
            f"the metric {name}",
            metric,
            [dict(sample) for sample in samples],
            **{one: given[one] for one in asked},
        )
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"the metric {name} returned {quote(values)}: expected a dict of numbers by name, "
                f"such as {{{name!r}: 0.5}}"
            )
        for key, value in values.items():
            if not isinstance(key, str) or not _is_number(value):
                raise ConfigError(
                    f"the metric {name} returned {quote(key)}: {quote(value)}; expected a name and "
                    "a number"
                )
            if key in found or key in MEASURED:
                raise ConfigError(f"the metric {name} returned {quote(key)}, which is taken")
            found[key] = float(value)
    return found


def _parameters(metric: Metric) -> set[str]:
    """Return the names of a function's parameters; of a built-in one that hides them, none."""
    try:
        return {*inspect.signature(metric).parameters}
    except ValueError:
        return set()


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)
