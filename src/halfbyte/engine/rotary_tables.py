"""The rotary tables of parts: cosines and sines of the positions of their tokens."""

from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.packing import PackedBatch
from halfbyte.layers.rotary_limit import rotary_limit

# Number of row lengths whose tables are cached: a table of 2048 tokens takes 1 MB, and data that
# cannot be packed may have as many lengths.
MOST_TABLES = 16


class RotaryTables:
    """Computes the tables of a decoder's rotary embedding.

    Args:
        decoder: transformers' decoder.

    Attributes:
        limit: The longest document whose tables do not depend on others in its row, or None.
        cached: Tables by the tokens of a row.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder, self.limit = decoder, rotary_limit(decoder)
        self.cached: dict[int, tuple[Tensor, ...]] = {}

    def exceeds_limit(self, tokens: int) -> bool:
        """Return whether a document is longer than `limit`."""
        return self.limit is not None and tokens > self.limit

    @torch.no_grad()
    def of(self, x: Tensor, part: PackedBatch, head_dim: int) -> tuple[Tensor, ...]:
        """Return cosines and sines [1, T, head_dim] of a part's positions, in the dtype of x."""
        tables = self.cached.get(part.max_seqlen) if part.documents is None else None
        if tables is not None:
            return tables
        rotary = self._decoder.rotary_emb
        if self.exceeds_limit(part.max_seqlen):
            # Of `dynamic` scaling, so that they do not depend on lengths seen before.
            rotary.max_seq_len_cached = 0
        tables = rotary(x, part.positions)
        if tables[0].shape[-1] < head_dim:  # gpt-oss's are of half a head
            tables = tuple(torch.cat([table, table], -1) for table in tables)
        if part.documents is None:  # all rows of a length have the same positions
            if len(self.cached) == MOST_TABLES:
                del self.cached[next(iter(self.cached))]  # the oldest
            self.cached[part.max_seqlen] = tables
        return tables
