"""The documents of a packed row, for the operations that mix its tokens.

Several documents share the only row of a batch. Most operations of a decoder treat every token
alike; those that mix tokens must keep documents apart. They are called by transformers' modules,
few of which pass arguments on, so they ask here for the documents of the row:

    attention                              layers/attention_interface.py
    convolutions, recurrent states         layers/token_mixers.py
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class NotPackable(Exception):
    """A model's operations cannot be restricted to documents; the message says why."""


@dataclass
class PackedRow:
    """The documents of a packed row, and what its decoder asked of the operations that mix tokens.

    Attributes:
        lengths: The tokens of each document, in order; none is empty.
        attention_calls: How often attention was computed.
        scans: How often a convolution or a recurrent state was computed.
        window: The smallest window of a mask (sliding or chunked attention), if any.
    """

    lengths: tuple[int, ...]
    attention_calls: int = 0
    scans: int = 0
    window: int | None = None


_row: PackedRow | None = None


def current_row() -> PackedRow | None:
    """Return the packed row that is passed through a decoder or a layer, if any."""
    return _row


@contextmanager
def packed_row(lengths: Sequence[int]) -> Iterator[PackedRow]:
    """Restrict operations that mix tokens to documents while the context lasts.

    If another is entered within it, what is asked for there counts here as well.

    Args:
        lengths: The tokens of each document in the only row of the batch.

    Raises:
        NotPackable: Inside, if an operation cannot be restricted to documents, or a document is
            longer than the attention window.
    """
    global _row
    before, row = _row, PackedRow(tuple(n for n in lengths if n))
    _row = row
    try:
        yield row
    finally:
        _row = before
        if before is not None:
            before.attention_calls += row.attention_calls
            before.scans += row.scans
            windows = [n for n in (before.window, row.window) if n is not None]
            before.window = min(windows, default=None)
