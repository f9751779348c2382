"""Damages valid inputs: bytes, JSON values, lines and words; a function of a random generator."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

Random = random.Random
Mutation = Callable[[Random, bytes], bytes]

# What a JSON value is replaced by. The last ones have no form in JSON, but Python reads them.
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64),
    *(-(2**31), -(2**63), 0.5, -0.0, 1e-320, 1e308, 10**400, "", " ", "\0", "0", "1e999", "none"),
    *("\ud800", "\x1b]0;title\x07\x1b[31m", "\u202e", "a" * 5000, "../../../etc/passwd"),
    *("/dev/zero", "{{ 1 / 0 }}", "[bold]", [], {}, [[]], [None], {"": None}, [1, "a", {}]),
    *({"a": {"b": []}}, math.nan, math.inf, -math.inf),
]
_PIECES = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xe2\x80\xa8"),
    *(b"\x1b[2J", b"\r\n", b"\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\u0000", b"\\ud800"),
    *(b"NaN", b"1e999", b"9" * 400, b"-1", b"null", b"true"),
    *(b"&a *a", b"<<: *a", b"? ", b"!!python/name:os.system", b"!!binary a", b"!!timestamp a"),
]
_BOUNDARIES = [
    0,
    1,
    *(2**bits - less for bits in (7, 8, 15, 16, 31, 32, 63, 64) for less in (0, 1)),
]


LONGEST = 2**19
"""Bytes of an input: what reads a megabyte of text takes a second, and is no hang."""


def damaged(draw: Random, seeds: Sequence[bytes], mutations: Sequence[Mutation]) -> bytes:
    """Return one of the ``seeds`` after one to four mutations, at most `LONGEST` bytes."""
    data = draw.choice(seeds)
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        data = draw.choice(mutations)(draw, data)
    if draw.random() < 0.05:
        data = _spliced(draw, data, draw.choice(seeds))
    return data[:LONGEST]


def _spliced(draw: Random, one: bytes, other: bytes) -> bytes:
    return one[: draw.randint(0, len(one))] + other[draw.randint(0, len(other)) :]


def change_bytes(draw: Random, data: bytes) -> bytes:
    """Change, insert, remove or repeat some bytes, or cut the rest off."""
    at = draw.randint(0, len(data))
    length = draw.choice((1, 1, 2, 4, 8, 64, 1024))
    match draw.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + draw.choice(_PIECES) + data[at:]
        case 3:
            return data[:at] + draw.choice(_PIECES) * draw.choice((2, 100, 5000)) + data[at:]
        case 4:
            return data[:at] + draw.randbytes(length) + data[at + length :]
        case 5:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        case _:
            return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def change_numbers(draw: Random, data: bytes) -> bytes:
    """Replace 1, 2, 4 or 8 bytes by a number at a boundary of its type, little-endian."""
    size = draw.choice((1, 2, 4, 8))
    at = draw.randint(0, max(0, min(len(data), draw.choice((64, 1024, len(data)))) - size))
    number = (draw.choice(_BOUNDARIES) + draw.choice((-1, 0, 1))) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def change_json(draw: Random, data: bytes) -> bytes:
    """Change a value, a key or the nesting of a JSON document; bytes, if it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(draw, data)
    places = list(_places(document))
    if not places:
        return json.dumps(_value(draw)).encode()
    holder, key = draw.choice(places)
    match draw.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(("", "a" * 500, "\x1b", str(key).upper(), f"{key} "))] = holder[key]
        case 2:
            return _repeated_key(holder, key, document, draw)
        case 3:
            depth = draw.choice((5, 120, 850, 20_000))
            marker = "\0deep\0"
            holder[key] = marker
            inner = "[" * depth + "]" * draw.choice((0, depth))
            return json.dumps(document).replace(json.dumps(marker), inner).encode()
        case 4:
            holder[key] = [holder[key]]
        case 5:
            other, its = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[its])) if its in _keys(other) else None
        case _:
            holder[key] = _value(draw)
    return json.dumps(document, ensure_ascii=draw.random() < 0.8).encode(errors="surrogatepass")


def change_lines(change: Mutation) -> Mutation:
    """Return a mutation of one line; or it moves, repeats or removes lines."""

    def changed(draw: Random, data: bytes) -> bytes:
        lines = data.splitlines(keepends=True) or [b""]
        at = draw.randrange(len(lines))
        match draw.randrange(8):
            case 0:
                del lines[at]
            case 1:
                lines.insert(draw.randint(0, len(lines)), lines[at])
            case 2:
                lines[at] *= 50
            case _:
                lines[at] = change(draw, lines[at].removesuffix(b"\n")) + b"\n"
        return b"".join(lines)

    return changed


def change_words(words: Sequence[bytes]) -> Mutation:
    """Return a mutation that inserts one of ``words``, or puts it in place of another word."""

    def changed(draw: Random, data: bytes) -> bytes:
        at = draw.randint(0, len(data))
        end = at
        while draw.random() < 0.8 and end < len(data) and data[end : end + 1].isalnum():
            end += 1
        return data[:at] + draw.choice(words) + data[end:]

    return changed


def change_header(draw: Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file, mostly with the right length before it."""
    length = int.from_bytes(data[:8], "little")
    if not 8 <= 8 + length <= len(data):
        return change_bytes(draw, data)
    header = change_json(draw, data[8 : 8 + length])
    said = len(header) if draw.random() < 0.9 else draw.choice(_BOUNDARIES) % 2**64
    return said.to_bytes(8, "little") + header + data[8 + length :]


def _value(draw: Random) -> Any:
    return json.loads(json.dumps(draw.choice(_VALUES)))


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(document: Any) -> Any:
    """Yield every list or object with each of its keys; not of very long ones all."""
    level = [document]
    for _ in range(40):
        holders = [one for one in level if isinstance(one, dict | list)]
        for holder in holders:
            keys = list(_keys(holder))
            yield from ((holder, key) for key in keys[:: max(1, len(keys) // 64)])
        level = [one[key] for one in holders for key in list(_keys(one))[:64]]


def _repeated_key(holder: Any, key: Any, document: Any, draw: Random) -> bytes:
    """Return the document with a key twice, which only its text can have."""
    if not isinstance(holder, dict):
        holder.insert(key, holder[key])
        return json.dumps(document).encode()
    marker = "\0again\0"
    holder[marker] = _value(draw)
    return json.dumps(document).replace(json.dumps(marker), json.dumps(key), 1).encode()
