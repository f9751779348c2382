"""One pass over conversations: roles, empty turns, damaged text, control tokens, what occurs twice.

Of a row nothing is kept but two hashes of 64 bits: of its normalised text (NFKC, case folded, white
space collapsed) and of that of its prompt. Two of 5 million different rows have the same hash with
a probability of one in a million.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.example_checks import Found
from halfbyte.data.formats import Conversation, Message
from halfbyte.data.tokenizer_checks import SpecialTokens
from halfbyte.foreign_text import quote

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"  # joiners, zero-width spaces, soft hyphen
# A character of several bytes in UTF-8 that was decoded in Windows-1252 or Latin-1: its first byte
# became one of these letters. Others (É») occur in undamaged text.
_MOJIBAKE = re.compile(r"[ÂÃâðÐÑØÙ][^\x00-\x7f]{1,3}")
_AROUND = 12  # characters of a quotation on either side


class RowScan:
    """What the pass finds.

    Attributes:
        found: By code.
        hashes: uint64 [n], of the normalised rows.
        prompts: uint64 [n], of the normalised prompts; 0 for a row without one.
    """

    def __init__(
        self,
        rows: Sequence[Conversation],
        indices: NDArray[np.int64],
        special: SpecialTokens,
    ) -> None:
        """Make the pass over the rows with these indices.

        Args:
            rows: The conversations.
            indices: Those to look at, ascending.
            special: The special tokens of the tokenizer.
        """
        self.found: defaultdict[str, Found] = defaultdict(Found)
        self.hashes = np.zeros(len(indices), np.uint64)
        self.prompts = np.zeros(len(indices), np.uint64)
        self._special = special
        for at, (index, row) in enumerate(_in_order(rows, indices.tolist())):
            self._look(index, row)
            self.hashes[at], self.prompts[at] = _hashes(row)

    def _look(self, index: int, row: Conversation) -> None:
        if row.text is not None:
            self._look_at_text(index, row.text)
            return
        roles = [message["role"] for message in row.messages]
        turns = [role for role in roles if role != "system"]
        if twice := next((a for a, b in pairwise(turns) if a == b != "tool"), None):
            self.found["HB401"].see(index, f"two messages of the {twice}")
        if turns[:1] == ["assistant"]:
            self.found["HB402"].see(index)
        if "system" in roles[1:]:
            self.found["HB403"].see(index, f"message {roles.index('system', 1) + 1}")
        if roles[-1] != "assistant":
            self.found["HB404"].see(index, f"the last is of the {roles[-1]}")
        self._look_at_messages(index, row)

    def _look_at_messages(self, index: int, row: Conversation) -> None:
        seen: set[str] = set()  # a row counts once for each code
        for number, message in enumerate(row.messages):
            content = str(message.get("content") or "")
            for code, instance in self._faults(message, content, learned=row.learns(number)):
                if code not in seen:
                    seen.add(code)
                    self.found[code].see(index, instance)

    def _faults(self, message: Message, content: str, *, learned: bool) -> list[tuple[str, str]]:
        found = []
        if not content.isascii():
            if not content.strip().strip(_INVISIBLE) and not message.get("tool_calls"):
                found.append(("HB405", f"{quote(content)} of the {message['role']}"))
            if damaged := damage(content):
                found.append(("HB603", damaged))
        if learned and content != (bare := content.strip()) and bare:
            found.append(("HB406", quote(_ends(content, bare))))
        if token := self._special.find(content):
            found.append(("HB604", f"{quote(token)} in a message of the {message['role']}"))
        return found

    def _look_at_text(self, index: int, text: str) -> None:
        if not text.isascii() and (damaged := damage(text)):
            self.found["HB603"].see(index, damaged)


def _in_order(
    rows: Sequence[Conversation], indices: list[int]
) -> Iterator[tuple[int, Conversation]]:
    """Yield rows with their indices; most of them by going through all, which files do faster."""
    if 2 * len(indices) < len(rows):
        yield from ((index, rows[index]) for index in indices)
        return
    wanted = iter(indices)
    index = next(wanted, -1)
    for at, row in enumerate(rows):
        if at == index:
            yield at, row
            index = next(wanted, -1)


def damage(text: str) -> str:
    """Return the first damaged characters of a text as a quotation; empty if there are none."""
    if (at := text.find("\ufffd")) >= 0:
        return quote(text[max(0, at - _AROUND) : at + _AROUND])
    for match in _MOJIBAKE.finditer(text):
        for stop in range(match.end(), match.start() + 1, -1):
            if meant := _recoded(text[match.start() : stop]):
                around = text[max(0, match.start() - _AROUND) : stop + _AROUND]
                return f"{quote(around)}, perhaps {quote(meant)}"
    return ""


def _recoded(text: str) -> str:
    """The one character whose UTF-8 bytes these characters are; empty if there is none."""
    for encoding in ("cp1252", "latin-1"):
        try:
            meant = text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        if len(meant) == 1 and meant.isprintable():
            return meant
    return ""


def _ends(content: str, bare: str) -> str:
    """The beginning of a text if white space is there, else its end."""
    return content[:_AROUND] if content[0] != bare[0] else content[-_AROUND:]


def normalised(text: str) -> str:
    """Return a text without differences of case, white space and compatible characters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def _hashes(row: Conversation) -> tuple[int, int]:
    if row.text is not None:
        return _hash([normalised(row.text)]), 0
    parts = [_identity(message) for message in row.messages]
    tools = json.dumps(row.tools, sort_keys=True, default=str) if row.tools else ""
    roles = [message["role"] for message in row.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else len(roles)
    prompt = _hash([tools, *parts[:last]]) if last else 0
    return _hash([tools, *parts]), prompt


def _identity(message: Message) -> str:
    text = f"{message['role']}\x1f{normalised(str(message.get('content') or ''))}"
    calls: Any = message.get("tool_calls")
    return f"{text}\x1f{json.dumps(calls, sort_keys=True, default=str)}" if calls else text


def _hash(parts: Sequence[str]) -> int:
    text = "\x1e".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def repeated(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Find hashes that occurred before.

    Returns:
        int64 [m, 2]: the index of such a hash, ascending, and that of its first occurrence.
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    origin = first[inverse]
    again = np.flatnonzero(origin != np.arange(len(hashes)))
    return np.stack([again, origin[again]], axis=1)


def first_match(hashes: NDArray[np.uint64], among: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each hash the index of one that is equal to it ``among`` others, or -1."""
    if not len(among):
        return np.full(len(hashes), -1)
    order = np.argsort(among, kind="stable")
    at = np.minimum(np.searchsorted(among, hashes, sorter=order), len(among) - 1)
    return np.where(among[order[at]] == hashes, order[at], -1)
