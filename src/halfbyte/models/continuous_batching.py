"""Continuous batching: slots of the KV cache are refilled as soon as their answers have ended.

A step (decoding.py) generates one token in every slot, needed or not. Prompts wait in a queue; when
enough slots are free, some are prefilled into them between two steps. On a GPU a step is captured
as a CUDA graph, and the host runs a few steps ahead of the device: the chosen tokens are copied to
the host asynchronously, and read while the next steps run. So the end of an answer is noticed a few
steps late; its slot, which the device itself has deactivated, generates nothing in the meantime.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.models.decoding import Decoder, free_bytes

# Steps between reads by the host, on a GPU. Two rounds are in flight: at 4 ms a step text is
# delayed by 30 ms.
_LOOK = 4
# Maximum tokens of prompts prefilled together, on a GPU and elsewhere: products do not become
# faster with more.
_PREFILL_TOKENS = {True: 8192, False: 2048}
# The first steps are not captured: they compile kernels, and all answers may be this short.
_FEW_STEPS = 4
# A slot's capacity is a multiple of this; it is allocated ahead for up to this many new tokens.
_UNIT, _ADVANCE = 64, 512
# Share of a GPU's free memory that the cache may take, and the most slots.
_CACHE_SHARE, MOST_SLOTS = 0.4, 128
_NOTHING = -1

Choose = Callable[[Tensor], Tensor]


@dataclass
class _Slot:
    """An active slot.

    Attributes:
        prompt: Index of the prompt.
        position: Upper bound on the position of its next token, including steps in flight.
        limit: Position of its last token.
        tokens: The part of the answer that the host has read.
    """

    prompt: int
    position: int
    limit: int
    tokens: list[int] = field(default_factory=list)


class Batcher:
    """Answers prompts, greedily or by sampling.

    Args:
        decoder: The model; its cache is allocated here.
        prompts: Token ids of each, at least one token.
        slots: Number of concurrent answers; on a GPU fewer if memory is short.
        max_new_tokens: Maximum length of an answer.
        ends: Tokens that end an answer and are part of it.
        choose: Maps logits [rows, vocabulary] to int64 [rows]; on a GPU it may be captured.
        graphs: Whether steps may be a CUDA graph there.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        slots: int,
        max_new_tokens: int,
        ends: Iterable[int],
        choose: Choose,
        graphs: bool = True,
    ) -> None:
        self._decoder, self._prompts, self._choose = decoder, prompts, choose
        self._most, self._ends = max_new_tokens, set(ends)
        device = decoder.device
        self._on_gpu = device.type == "cuda"
        self._graphs = graphs and self._on_gpu
        self._longest = max(map(len, prompts))
        self._capacity_wanted = _rounded(self._longest + max_new_tokens)
        capacity = _rounded(self._longest + min(max_new_tokens, _ADVANCE))
        slots = min(slots, len(prompts), self._slots_that_fit(self._capacity_wanted))
        decoder.open(slots, capacity, self._capacity_wanted)
        decoder.compile_ahead()
        # Longest first, so that the memory needed is known from the start; ties in order.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self._waiting = deque(order)
        self._running: dict[int, _Slot] = {}
        self._end_tokens = torch.tensor(sorted(self._ends), dtype=torch.int64, device=device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._positions = torch.zeros(slots, dtype=torch.int64, device=device)
        self._left = torch.zeros(slots, dtype=torch.int64, device=device)
        self._chosen = torch.zeros(slots, dtype=torch.int64, device=device)
        self._x = torch.empty_like(decoder.embed(self._tokens))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = 0

    def _slots_that_fit(self, capacity: int) -> int:
        if not self._on_gpu:
            return len(self._prompts)
        free = free_bytes(self._decoder.device, self._decoder.memory_limit)
        return max(1, int(free * _CACHE_SHARE) // (self._decoder.slot_bytes * capacity))

    def run(
        self,
        finished: Callable[[int, list[int]], None],
        heard: Callable[[int], None] | None = None,
    ) -> None:
        """Answer everything.

        Args:
            finished: Called with a prompt's index and its answer, including the end token.
            heard: For a single prompt: called with each token as it is read.
        """
        flying: deque[_Round] = deque()
        try:
            while self._running or self._waiting:
                self._admit(finished, heard)
                if self._running:
                    flying.append(self._launch())
                # One round stays in flight while the previous one is read.
                if flying and (len(flying) > self._on_gpu or not self._running):
                    self._read(flying.popleft(), finished, heard)
        finally:
            self._graph = None
            if self._on_gpu:
                # The capture stream's cuBLAS workspace keeps the graph's memory pool alive.
                torch.cuda.synchronize(self._decoder.device)
                torch._C._cuda_clearCublasWorkspaces()

    def _admit(
        self,
        finished: Callable[[int, list[int]], None],
        heard: Callable[[int], None] | None,
    ) -> None:
        """Prefill waiting prompts into free slots, if enough are free."""
        free = [i for i in range(len(self._tokens)) if i not in self._running]
        while self._waiting and free and (len(free) * 4 >= len(self._tokens)):
            chosen: list[int] = []
            tokens = 0
            while self._waiting and len(chosen) < len(free):
                length = len(self._prompts[self._waiting[0]])
                if chosen and tokens + length > _PREFILL_TOKENS[self._on_gpu]:
                    break
                chosen.append(self._waiting.popleft())
                tokens += length
            slots = [free.pop(0) for _ in chosen]
            self._prefill(chosen, slots)
            for slot, token in zip(slots, self._first, strict=True):
                self._take(slot, token, finished)
                if heard is not None:
                    heard(token)
                if slot not in self._running:
                    free.append(slot)

    def _prefill(self, chosen: Sequence[int], slots: Sequence[int]) -> None:
        logits = self._decoder.prefill([self._prompts[i] for i in chosen], slots)
        lengths = [len(self._prompts[i]) for i in chosen]
        device = self._decoder.device
        at = torch.tensor(slots, device=device)
        first = self._choose(logits)
        left = torch.full_like(first, self._most - 1)
        self._left[at] = left.masked_fill(torch.isin(first, self._end_tokens), 0)
        self._tokens[at] = first
        self._positions[at] = torch.tensor(lengths, device=device) * (self._left[at] > 0)
        for prompt, slot, length in zip(chosen, slots, lengths, strict=True):
            self._running[slot] = _Slot(prompt, length, length + self._most - 1)
        self._first: list[int] = first.tolist()

    def _take(self, slot: int, token: int, finished: Callable[[int, list[int]], None]) -> None:
        """Append a token to an answer; the last one frees its slot."""
        held = self._running[slot]
        held.tokens.append(token)
        if token in self._ends or len(held.tokens) == self._most:
            del self._running[slot]
            finished(held.prompt, held.tokens)

    def _launch(self) -> "_Round":
        """Run a few steps; on a GPU asynchronously."""
        steps = _LOOK if self._on_gpu else 1
        furthest = max(min(slot.position + steps, slot.limit) for slot in self._running.values())
        if furthest > self._decoder.cache.capacity:
            self._grow(furthest)
        made = _Round(steps, len(self._tokens), self._decoder.device)
        for i in range(steps):
            self._step()
            made.tokens[i].copy_(self._chosen, non_blocking=True)
        made.close()
        for slot in self._running.values():
            slot.position += steps
        return made

    def _grow(self, needed: int) -> None:
        if self._graph is not None:  # it reads the old cache, and may still be running
            torch.cuda.synchronize(self._decoder.device)
            self._graph = None
        doubled = min(2 * self._decoder.cache.capacity, self._capacity_wanted)
        self._decoder.grow(max(doubled, _rounded(needed)))

    def _step(self) -> None:
        self._x.copy_(self._decoder.embed(self._tokens))
        if self._graph is None:
            if not self._graphs or self._eager < _FEW_STEPS:
                self._eager += 1
                self._compute()
                return
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._compute()
        return graph

    def _compute(self) -> None:
        """Generate a token in every slot, from its embedding, without synchronisation."""
        chosen = self._choose(self._decoder.step(self._x, self._positions))
        active = self._left > 0
        self._chosen.copy_(chosen.masked_fill(~active, _NOTHING))
        ended = (chosen[:, None] == self._end_tokens).any(1)
        self._left.sub_(1).clamp_(min=0).masked_fill_(ended, 0)
        active = self._left > 0
        self._tokens.copy_(chosen.masked_fill(~active, 0))
        # An inactive slot attends to one key.
        self._positions.add_(1).mul_(active)

    def _read(
        self,
        made: "_Round",
        finished: Callable[[int, list[int]], None],
        heard: Callable[[int], None] | None,
    ) -> None:
        for row in made.wait():
            for slot, token in enumerate(row):
                if token == _NOTHING or slot not in self._running:
                    continue
                self._take(slot, token, finished)
                if heard is not None:
                    heard(token)


class _Round:
    """The tokens of a few steps on their way to the host: int64 [steps, slots]."""

    def __init__(self, steps: int, slots: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.tokens = torch.empty(steps, slots, dtype=torch.int64, pin_memory=self._on_gpu)
        self._event: torch.cuda.Event | None = None

    def close(self) -> None:
        """Mark all copies as queued."""
        if self._on_gpu:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[list[int]]:
        """Wait for the tokens and return them."""
        if self._event is not None:
            self._event.synchronize()
        rows: list[list[int]] = self.tokens.tolist()
        return rows


def _rounded(tokens: int) -> int:
    return -(-tokens // _UNIT) * _UNIT
