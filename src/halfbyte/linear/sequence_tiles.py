"""Tiles of a long sequence: the tokens that a layer's wide operations are computed for at a time.

Norms, products and activations treat every token alike, so a layer can compute them for a few
thousand tokens after the other, and what exists inside an MLP no longer grows with the sequence.
Parts of fewer than `LONG_TOKENS` tokens are not divided.
"""

from typing import NamedTuple

# Tokens times squared width from which launches go unnoticed; see `launches_unnoticed`.
LAUNCHED = 1.5e11
# Rows of a tile, at most: an MLP of the width 14336 has 0.8 GB inside. A layer takes 2.15 µs a
# token with 4096 rows and 2.09 with 6144 (2026-11-29_gpu_part_sizes.json).
TILE_TOKENS = 8192
# Parts of packed documents have about 8192 tokens (engine/buckets.py): only what is longer, because
# a document is, is divided.
LONG_TOKENS = 12288


class Tile(NamedTuple):
    """Tokens ``start`` to ``stop`` of a row of the batch."""

    row: int
    start: int
    stop: int


def is_long(rows: int, tokens: int) -> bool:
    """Return whether a batch of so many rows of so many tokens is divided into tiles."""
    return rows * tokens >= LONG_TOKENS


def launches_unnoticed(rows: int, tokens: int, width: int) -> bool:
    """Return whether a GPU takes longer for a batch than Python for launching its kernels.

    Then CUDA graphs gain nothing, and capturing them costs several steps. Launching a layer's
    passes takes 6.7 ms (``plan.roofline.LAUNCH_SECONDS``). Their products have 72 operations a
    token and squared width in a Llama, and an H100 makes 620e12 a second: 23 ms for 12,288 tokens
    of width 4096.
    """
    return is_long(rows, tokens) and rows * tokens * width**2 >= LAUNCHED


def tile_tokens(tokens: int) -> int:
    """Return the tokens of all tiles of a row but the last, which may have fewer."""
    count = -(-tokens // TILE_TOKENS)
    size, unit = -(-tokens // count), min(128, TILE_TOKENS)
    return min(tokens, -(-size // unit) * unit)


def tiles_of(rows: int, tokens: int) -> list[Tile]:
    """Return the tiles of a batch, of nearly equal size, in the order of its tokens.

    All but the last of a row start at multiples of 128, as products of full tiles are fastest.
    """
    size = tile_tokens(tokens)
    return [
        Tile(row, start, min(start + size, tokens))
        for row in range(rows)
        for start in range(0, tokens, size)
    ]
