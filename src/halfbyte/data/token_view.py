"""An example token by token: the text of each token, and whether it is supervised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from halfbyte.data.templates import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_CHARACTER = 8  # tokens of one character: an emoji of four bytes may be four tokens
_SHORTEST_RUN = 24  # pieces of a run that are always shown


@dataclass(frozen=True)
class Piece:
    """A token; or the tokens of one character; or, without ids, tokens that are not shown.

    Attributes:
        text: Its text.
        ids: Its token ids.
        supervised: Whether it is learned.
        special: Whether it is a special token.
        left_out: Number of tokens that are not shown.
    """

    text: str
    ids: tuple[int, ...]
    supervised: bool
    special: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class ShownExample:
    """An example to show.

    Attributes:
        line: The line of its row.
        length: Its tokens, before it was truncated.
        pieces: Its tokens, after that.
    """

    line: str
    length: int
    pieces: Sequence[Piece]

    @property
    def title(self) -> str:
        """The line and the number of tokens in words."""
        tokens = sum(len(piece.ids) for piece in self.pieces)
        supervised = sum(len(piece.ids) for piece in self.pieces if piece.supervised)
        of = f"{tokens:,} of {self.length:,}" if tokens < self.length else f"{tokens:,}"
        return f"Line {self.line}: {of} tokens, {supervised:,} supervised"


def show_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, line: str, max_length: int
) -> ShownExample:
    """Return an example as a run would get it, truncated to ``max_length``."""
    seen = Example(example.tokens[:max_length], example.labels_mask[:max_length], 0)
    return ShownExample(line, len(example.tokens), pieces_of(tokenizer, seen))


def pieces_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Piece]:
    """Return the tokens of an example with their texts.

    A token's text is what it adds to the text of the tokens before it, since some tokenizers write
    a space between two tokens only.
    """
    special = {*tokenizer.all_special_ids}
    special |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[Piece] = []
    before: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    def text(tokens: tuple[int, ...]) -> str:
        return str(
            tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    tokens, mask = example.tokens.tolist(), example.labels_mask.tolist()
    for at, (token, supervised) in enumerate(zip(tokens, mask, strict=True)):
        ids = (*ids, token)
        whole, known = text(before + ids), text(before)
        added = whole[len(known) :] if whole.startswith(known) else text(ids)
        goes_on = at + 1 < len(tokens) and mask[at + 1] == supervised
        if added.endswith("\ufffd") and goes_on and len(ids) < _LONGEST_CHARACTER:
            continue  # a part of a character
        found.append(Piece(added, ids, supervised, token in special))
        before, ids = ids, ()
    return found


def shortened(pieces: Sequence[Piece], most: int) -> list[Piece]:
    """Leave out the middle of long runs of (un)supervised tokens, so that about ``most`` remain."""
    if len(pieces) <= most:
        return list(pieces)
    found: list[Piece] = []
    for supervised, group in groupby(pieces, key=lambda piece: piece.supervised):
        run = list(group)
        kept = max(_SHORTEST_RUN, len(run) * most // len(pieces))
        if len(run) <= kept + 1:
            found += run
            continue
        head, tail = run[: kept // 2], run[-(kept - kept // 2) :]
        count = sum(len(piece.ids) for piece in run[len(head) : len(run) - len(tail)])
        found += [*head, Piece("", (), supervised, left_out=count), *tail]
    return found


def runs(pieces: Sequence[Piece]) -> Iterator[tuple[bool, list[Piece]]]:
    """Yield stretches of pieces that are all supervised, or all not."""
    for supervised, group in groupby(pieces, key=lambda piece: piece.supervised):
        yield supervised, list(group)
