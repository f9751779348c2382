"""Options that are legal, but hardly meant with this model and these data; each gets one note.

What can be judged without model and data is noted when the options are read (`config.reading`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from halfbyte.config.schema import TrainConfig


def implausible(
    config: TrainConfig,
    lengths: NDArray[np.integer[Any]],
    total_steps: int,
    model_config: PretrainedConfig,
    count: int | None = None,
) -> list[str]:
    """Return a note on every option that is hardly meant.

    Args:
        config: The options.
        lengths: [examples], the tokens of each, truncated to ``max_length``.
        total_steps: Optimizer steps of the run.
        model_config: The base model's configuration.
        count: The number of examples of an epoch, if ``lengths`` are those of a sample.
    """
    notes = []
    warmup, per_step = config.warmup_steps, config.batch_size * config.gradient_accumulation_steps
    if warmup is not None and warmup >= total_steps:
        notes.append(
            f"the warm-up of {warmup:,} steps is not shorter than the run of {total_steps:,}: "
            f"the learning rate does not reach {config.learning_rate:g}"
        )
    count = len(lengths) if count is None else count
    if per_step > count:
        notes.append(
            f"a step has {per_step:,} examples (batch_size x gradient_accumulation_steps), the "
            f"data {count:,}: every epoch is a single step"
        )
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longer = int(np.count_nonzero(lengths > context)) if isinstance(context, int) else 0
    if longer:
        notes.append(
            f"{longer:,} examples are longer than the {context:,} positions that the model "
            f"was made for; --max-length {context} truncates them"
        )
    return notes
