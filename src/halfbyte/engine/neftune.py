"""NEFTune: uniform noise on the embeddings in training (Jain et al. 2023, arXiv 2310.05914).

    x ← x + α / √(L·d) · ε        ε uniform in [-1, 1), L tokens of the document, d the width of x

L is the length of each document, without padding, as in the authors' code; transformers' hook takes
the length that a batch is padded to, so its noise is smaller in shorter rows. Padding gets none.

The noise is a function of (seed, step, document of the step), not of a generator's state, like the
masks of dropout: a step that is repeated, micro-batches of another size, packing and a resumed run
all see the same. It is drawn in the dtype of the embeddings, on their device, and differs between
kinds of devices.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.engine.packing import Span
from halfbyte.linear.lora import DropoutClock


class EmbeddingNoise:
    """Adds the noise to what the embedding of a model returns, while ``step`` is set.

    Args:
        model: Its input embedding gets a hook.
        alpha: α, 5 to 15 in the paper.
        seed: Seed of the run.

    Attributes:
        step: The step being made (0-based); None outside of steps, when there is no noise.
        spans: Where the documents are in the tokens that are embedded next; set by the engine.
    """

    def __init__(self, model: PreTrainedModel, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self.step: int | None = None
        self.spans: Sequence[Span] = ()
        embedding: nn.Module = model.get_input_embeddings()
        embedding.register_forward_hook(self._hook)

    def _hook(self, _module: nn.Module, _args: Any, x: Tensor) -> None:
        if self.step is None:
            return
        rows = x.view(-1, x.shape[-1])
        generator = torch.Generator(x.device)
        for document, start, tokens in self.spans:
            place = f"{self.seed}/neftune/{self.step}/{document}".encode()
            drawn = int.from_bytes(blake2b(place, digest_size=8).digest(), "little") >> 1
            generator.manual_seed(drawn)
            size = self.alpha / math.sqrt(tokens * rows.shape[1])
            noise = torch.empty(tokens, rows.shape[1], dtype=x.dtype, device=x.device)
            rows[start : start + tokens] += noise.uniform_(-size, size, generator=generator)


@contextmanager
def training_step(
    clock: DropoutClock | None, noise: EmbeddingNoise | None, step: int
) -> Iterator[None]:
    """Within the block an engine's dropout and noise are active, those of ``step`` (0-based)."""
    if clock is not None:
        clock.step, clock.running = step, True
    if noise is not None:
        noise.step = step
    try:
        yield
    finally:
        if clock is not None:
            clock.running = False
        if noise is not None:
            noise.step = None
