"""What a tokenizer and its chat template do to text: by probes, and on a sample of the rows."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.example_checks import ControlIds, Found
from halfbyte.data.formats import Conversation
from halfbyte.data.rendering import Renderer
from halfbyte.data.templates import end_of_turn
from halfbyte.data.turns import shared
from halfbyte.foreign_text import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLED = 100  # rows whose texts are encoded and decoded
_LONGEST = 2000  # characters of a text that are
_AROUND = 16  # characters of a quotation on either side of a difference


class SpecialTokens:
    """Finds the special tokens of a tokenizer in texts.

    Added tokens that are not special, such as ``<think>``, are text that a model may write. Some
    tokenizers have thousands, which as alternatives of a regular expression take 100 µs for each
    character that one may begin with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special}
        texts |= {*tokenizer.all_special_tokens}
        self._texts = frozenset(text for text in texts if text.strip())
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)
        firsts = "".join(map(re.escape, sorted({text[0] for text in self._texts})))
        self._begins = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def find(self, text: str) -> str:
        """Return the first special token of a text, the longest of several; empty without one."""
        for match in self._begins.finditer(text):
            at = match.start()
            for length in self._lengths:
                if (part := text[at : at + length]) in self._texts:
                    return part
        return ""


def control_ids(tokenizer: PreTrainedTokenizerBase) -> ControlIds:
    """Return the token ids to look for in encoded examples.

    Raises:
        DataError: The chat template is not valid.
    """
    ends = {*end_of_turn(tokenizer), tokenizer.eos_token_id} - {None}
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    # GPT-2's tokenizer has one special token for every purpose, and bytes for every text.
    others = {bos, tokenizer.eos_token_id, tokenizer.pad_token_id, *ends}
    return ControlIds(
        tuple(sorted(ends)),
        -1 if bos is None else int(bos),
        -1 if unknown is None or unknown in others else int(unknown),
    )


def template_findings(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield codes, and instances in words, of what probes of the chat template find.

    Raises:
        DataError: The chat template is not valid.
    """
    ends = end_of_turn(tokenizer)
    if tokenizer.pad_token_id in ends:
        yield "HB710", quote(tokenizer.pad_token)
    if tokenizer.chat_template is None:
        return
    names = [quote(name) for name in map(tokenizer.convert_ids_to_tokens, ends)]
    if names and tokenizer.eos_token_id not in ends:
        yield "HB713", f"{' or '.join(names)}; EOS is {quote(tokenizer.eos_token)}"
    reply = {"role": "assistant", "content": "zqreply"}
    try:
        chat = Renderer(tokenizer).chat([{"role": "user", "content": "zquser"}, reply])
        bare, prompt, whole = chat.text(1), chat.text(1, prompt=True), chat.text(2)
    except RowRejected:
        return  # a template that wants other messages: what it does with the rows is found there
    if not whole.startswith(prompt):
        at = shared(prompt, whole)
        yield "HB703", f"it goes on with {quote(prompt[at:])}, training with {quote(whole[at:])}"
    elif prompt == bare and (header := whole[len(bare) :].partition("zqreply")[0]).strip():
        yield "HB704", f"replies begin with {quote(header)}"
    bos = tokenizer.bos_token
    if bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and whole.startswith(bos):
        yield "HB712", quote(bos)


def text_findings(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    indices: NDArray[np.int64],
    special: SpecialTokens,
    unknown: int,
) -> tuple[int, dict[str, Found]]:
    """Encode and decode texts of at most 100 of these rows, evenly chosen.

    Known normalisation is no difference: Unicode's compatible forms, white space at the ends.

    Args:
        tokenizer: The tokenizer.
        rows: The conversations.
        indices: Those to choose from.
        special: Its special tokens; a text with one is left out.
        unknown: The token for unknown text, or -1.

    Returns:
        The number of rows that were tried, and what was found, by code.
    """
    chosen = indices[np.linspace(0, len(indices) - 1, min(len(indices), _SAMPLED)).astype(int)]
    texts = [(index, text) for index in chosen.tolist() for text in _texts(rows[index])]
    texts = [(index, text) for index, text in texts if text and not special.find(text)]
    found: defaultdict[str, Found] = defaultdict(Found)
    if not texts:
        return len(chosen), found
    encoded = tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False)
    decoded = tokenizer.batch_decode(
        encoded.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    last: dict[str, int] = {}
    for (index, text), ids, back in zip(texts, encoded.input_ids, decoded, strict=True):
        if _comparable(text) == _comparable(back):
            continue
        code = "HB601" if unknown in ids else "HB602"
        if last.get(code) != index:  # a row counts once
            found[code].see(index, _difference(text, back))
            last[code] = index
    return len(chosen), found


def _texts(row: Conversation) -> list[str]:
    texts = [row.text] if row.text is not None else [one.get("content") for one in row.messages]
    return [text[:_LONGEST] for text in texts if isinstance(text, str)]


def _comparable(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).strip()


def _difference(text: str, back: str) -> str:
    at = shared(text, back)
    start, stop = max(0, at - _AROUND), at + _AROUND
    return f"{quote(text[start:stop])} is decoded as {quote(back[start:stop])}"
