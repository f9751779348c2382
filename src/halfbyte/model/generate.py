"""Text from a model: transformers' ``generate``, fed with prompts rendered by the chat template.

Decoding, caches and sampling are transformers' own; what is ours is the frozen linear underneath.
Prompts are batched by length and padded on the left, and a batch decodes each packed weight once
per token for all its rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from halfbyte.data.templates import end_of_turn, prompt_ids


class _Callback(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: what the template closes a turn with, and every EOS."""
    ids: set[int] = set()
    for value in (
        end_of_turn(tokenizer),
        tokenizer.eos_token_id,
        model.generation_config.eos_token_id if model.generation_config is not None else None,
        model.config.get_text_config().eos_token_id,
    ):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(one) for one in value)
    return sorted(ids)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict[str, Any]]],
    *,
    tools: Sequence[list[Any] | None] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Answer each prompt.

    Args:
        model: A model of ``model.build``, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Conversations that wait for the assistant, each a list of messages.
        tools: For each prompt the tools its template is told of, or None; None if there are none.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        seed: Fixes the sampling.
        batch_size: Prompts that are answered together.
        progress: Called with (prompts answered, prompts).
        on_text: Called with each piece of text as it comes; for a single prompt.

    Returns:
        The answers without special tokens, in the order of the prompts.

    Raises:
        ValueError: If ``on_text`` is given with several prompts.
    """
    if on_text is not None and len(prompts) != 1:
        raise ValueError(f"on_text streams one prompt, got {len(prompts)}")
    device = model.device
    told = tools if tools is not None else [None] * len(prompts)
    encoded = [
        prompt_ids(tokenizer, list(prompt), known)
        for prompt, known in zip(prompts, told, strict=True)
    ]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **how
    )
    answers = [""] * len(prompts)
    done = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = _left_padded([encoded[i] for i in chosen], pad, device)
            streamer = None if on_text is None else _Callback(tokenizer, on_text)
            output = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, streamer=streamer
            )
            for i, row in zip(chosen, output[:, ids.shape[1] :], strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True)
            done += len(chosen)
            if progress is not None:
                progress(done, len(order))
    return answers


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
