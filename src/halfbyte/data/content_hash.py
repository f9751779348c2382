"""A hash of what a conversation says, by which rows with the same text are found.

It is computed where rows are encoded, so it is part of an encoded chunk, and in `split`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from halfbyte.data.formats import Conversation


def content_hash(row: Conversation) -> int:
    """Return a hash (64 bits) of what a row says, without case and the amount of white space."""
    said = [row.text, row.messages, row.tools]
    content = json.dumps(_normalised(said), sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _normalised(value: Any) -> Any:
    """Return a JSON value with its text folded, without the marks of what is supervised."""
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Mapping):
        return {str(key): _normalised(one) for key, one in value.items() if key != "weight"}
    if isinstance(value, list | tuple):
        return [_normalised(one) for one in value]
    return value
