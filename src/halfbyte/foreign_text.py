"""Text that comes from elsewhere, made safe and short where it is shown.

Names of files and tensors, options, templates, data and generated answers may hold characters that
a terminal obeys: escape sequences move the cursor, change colours, set the clipboard or the title;
bidirectional controls display text in another order than it has. So every place that prints passes
its text through `printable`, which shows these characters as escapes, and every quotation in a
message through `quote` or `shorten`, which bound its length.
"""

import json
import re
import reprlib
from pathlib import PurePath

LONGEST_QUOTE = 100
"""Characters of a quotation in a message."""
LONGEST_MESSAGE = 2000
"""Characters of a message on a terminal."""

# C0 and C1 controls, DEL, marks and embeddings of the bidirectional algorithm, separators of lines
# and paragraphs, and halves of surrogate pairs (bytes of file names that are not UTF-8), which no
# encoding can write. Joiners are left out: emoji and several scripts need them.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LAYOUT = "\n\t"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def printable(text: str, *, lines: bool = True) -> str:
    r"""Return ``text`` with its control characters shown as ``\x1b`` or ``\u202e``.

    Args:
        text: Any text.
        lines: Whether line feeds and tabs stay; otherwise they are shown as escapes, too.
    """
    keep = _LAYOUT if lines else ""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def shorten(text: str, most: int = LONGEST_QUOTE) -> str:
    """Return ``text``, without its middle if it is longer than ``most`` (at least 60)."""
    if len(text) <= most:
        return text
    mark = f" … ({len(text):,} characters) … "
    end = (most - len(mark)) // 4
    return text[: most - len(mark) - end] + mark + text[-end:]


def as_message(text: str) -> str:
    """Return ``text`` as a message on a terminal: printable, and not longer than a screen."""
    return printable(shorten(text, LONGEST_MESSAGE))


class _Quotation(reprlib.Repr):
    """``repr`` that looks at a few elements of a value only, however large or nested it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = LONGEST_QUOTE

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4300 digits.
        return repr(x) if x.bit_length() < 128 else f"a number of {x.bit_length():,} bits"


_quotation = _Quotation()


def quote(value: object) -> str:
    """Return ``value`` as Python writes it, shortened, for a message."""
    return shorten(_quotation.repr(str(value) if isinstance(value, PurePath) else value))


def to_json(value: object, *, ascii_only: bool = False) -> str:
    """Return ``value`` as one line of JSON that can be printed and encoded, whatever it holds.

    Args:
        value: JSON values; others are written as text.
        ascii_only: Whether to escape every character beyond ASCII, for a stream that has no other.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, default=str)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
