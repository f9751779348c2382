"""Standard output and error of a process of ours: whatever is printed arrives, and obeys nobody.

Our own messages are escaped where they are printed. Libraries print, too: their warnings and log
messages quote names and values of files. Both pass through one function each, which is replaced.
"""

import logging
import sys
import warnings
from typing import Any

from halfbyte.foreign_text import as_message


class _PrintableRecord(logging.LogRecord):
    """A log message, of any library, escaped."""

    def getMessage(self) -> str:
        return as_message(super().getMessage())


def prepare_streams() -> None:
    """Escape what libraries print, and what standard output's encoding lacks.

    Standard error escapes the latter anyway. Only for processes of our own.
    """
    logging.setLogRecordFactory(_PrintableRecord)
    plain = warnings.formatwarning

    def format_warning(*words: Any, **more: Any) -> str:
        return as_message(plain(*words, **more))

    warnings.formatwarning = format_warning
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a stand-in may lack it
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="backslashreplace")
