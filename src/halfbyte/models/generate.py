"""Text generation: renders prompts with the chat template, generates, and decodes to text.

Models of known families use our own loop (decoding.py, continuous_batching.py): several prompts at
once without padding, on a GPU in CUDA graphs. Others use transformers' ``generate``, padded on the
left; the reason is logged once.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from halfbyte.data.templates import end_of_turn, prompt_ids
from halfbyte.models.continuous_batching import MOST_SLOTS, Batcher, Choose
from halfbyte.models.decoding import Decoder, why_not

logger = logging.getLogger("halfbyte")

# Batch size on a CPU, and with transformers' generate.
_BATCH = 8


class _Callback(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None],
        *,
        skip_prompt: bool,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the template's end of turn, and every EOS token."""
    ids: set[int] = set()
    for value in (
        end_of_turn(tokenizer),
        tokenizer.eos_token_id,
        model.generation_config.eos_token_id if model.generation_config is not None else None,
        getattr(model.config.get_text_config(), "eos_token_id", None),
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
    batch_size: int | None = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Answer each prompt.

    Args:
        model: A model of ``models.build``, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Conversations to be continued by the assistant, each a list of messages.
        tools: For each prompt the tools passed to its template, or None; None if there are none.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: 0 selects the likeliest token; above, tokens are sampled.
        seed: Fixes the sampling, together with the prompts and the batch size.
        batch_size: Number of concurrent prompts; None for a default that suits the device.
        memory_limit: Total bytes of a GPU that torch may reserve; None for the free memory.
        progress: Called with (prompts answered, prompts).
        on_text: For a single prompt: called with each piece of text as it is generated.

    Returns:
        The answers without special tokens, in the order of the prompts.

    Raises:
        ValueError: If ``on_text`` is given with several prompts.
    """
    if on_text is not None and len(prompts) != 1:
        raise ValueError(f"on_text streams one prompt, got {len(prompts)}")
    tools_of = tools if tools is not None else [None] * len(prompts)
    encoded = [
        prompt_ids(tokenizer, list(prompt), known)
        for prompt, known in zip(prompts, tools_of, strict=True)
    ]
    if not encoded:
        return []
    ends, device = end_tokens(model, tokenizer), model.device
    why = why_not(model) if all(encoded) else "a prompt is empty"
    if why is not None:
        # On a GPU it is many times slower.
        _tell(why, logging.WARNING if device.type == "cuda" else logging.INFO)
    answer = _by_decoder if why is None else _by_transformers
    answers: list[str] = [""] * len(encoded)
    done = 0

    def finished(prompt: int, tokens: list[int]) -> None:
        nonlocal done
        answers[prompt] = tokenizer.decode(tokens, skip_special_tokens=True)
        done += 1
        if progress is not None:
            progress(done, len(encoded))

    streamer = None
    if on_text is not None:
        streamer = _Callback(tokenizer, on_text, skip_prompt=why is not None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        answer(
            model,
            encoded,
            ends,
            max_new_tokens,
            temperature,
            batch_size,
            memory_limit,
            finished,
            streamer,
        )
    return answers


@cache
def _tell(why: str, level: int) -> None:
    logger.log(level, "using transformers' generate instead of the faster loop: %s", why)


def chooser(temperature: float) -> Choose:
    """Return a function that maps logits [rows, vocabulary] to tokens int64 [rows]."""

    def likeliest(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def sampled(logits: Tensor) -> Tensor:
        # The largest of logits with Gumbel noise is a sample of their softmax (Gumbel 1954).
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log_()
        return (logits.float() / temperature - noise).argmax(-1)

    return sampled if temperature > 0 else likeliest


def _by_decoder(
    model: PreTrainedModel,
    encoded: Sequence[list[int]],
    ends: list[int],
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None,
    memory_limit: int | None,
    finished: Callable[[int, list[int]], None],
    streamer: _Callback | None,
) -> None:
    batcher = Batcher(
        Decoder(model, memory_limit=memory_limit),
        encoded,
        slots=batch_size or (MOST_SLOTS if model.device.type == "cuda" else _BATCH),
        max_new_tokens=max_new_tokens,
        ends=ends,
        choose=chooser(temperature),
    )
    if streamer is None:
        batcher.run(finished)
        return
    sink = streamer
    batcher.run(finished, lambda token: sink.put(torch.tensor([token])))
    streamer.end()


def _by_transformers(
    model: PreTrainedModel,
    encoded: Sequence[list[int]],
    ends: list[int],
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None,
    memory_limit: int | None,
    finished: Callable[[int, list[int]], None],
    streamer: _Callback | None,
) -> None:
    pad = (ends or [0])[0]
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        # Otherwise transformers uses the checkpoint's, which are for its own way of sampling.
        repetition_penalty=1.0,
        **how,
    )
    for chosen in _together(encoded, batch_size or _BATCH, pads=_ignores_padding(model)):
        ids, mask = _left_padded([encoded[i] for i in chosen], pad, model.device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, streamer=streamer
        )
        for i, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
            last = next((at for at, token in enumerate(row) if token in ends), len(row))
            finished(i, row[: last + 1])


def _ignores_padding(model: PreTrainedModel) -> bool:
    """Return whether answers are the same with padding on the left.

    The state of a recurrent model goes through it, and a model that is not given positions counts
    it (Blenderbot).
    """
    return not model._is_stateful and "position_ids" in signature(model.forward).parameters


def _together(encoded: Sequence[list[int]], size: int, *, pads: bool) -> Iterator[list[int]]:
    """Yield which prompts are answered at once, by length.

    Unless the model ignores padding on the left, only prompts of one length are.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for _, alike in groupby(order, key=lambda i: 0 if pads else len(encoded[i])):
        members = list(alike)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
