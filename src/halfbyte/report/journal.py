"""The record of a run: ``journal.jsonl``, one JSON object per line, appended as events happen.

Every line has ``event`` and ``time`` (UTC, ISO 8601). Events are ``note``, ``loaded``, ``begin``,
``held_out``, ``samples``, ``captured``, ``step``, ``warning``, ``fallback``, ``memory``,
``evaluation``, ``saved``, ``best``, ``ended`` (before the last step), and at the end ``finish`` or
``stopped``; a killed run has neither. Lines are passed to the operating system at once, so a killed
run loses nothing that was reported; only a full disk or a power failure can truncate a line, and
only the last one. Readers ignore a truncated line. A resumed run removes it, together with
everything after the checkpoint it resumes from, so that each step occurs once.

JSON has no NaN and no infinity. Such a value is written as null, and its text in ``non_finite`` of
the same line: ``{"loss": null, "non_finite": {"loss": "nan"}}``.
"""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from halfbyte.atomic import new_file
from halfbyte.errors import OutputError
from halfbyte.foreign_text import to_json
from halfbyte.input_files import read_file


class Journal:
    """An append-only JSONL file."""

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` for appending; create its directory, and remove a truncated last line.

        Raises:
            OutputError: The file cannot be written.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = read_file(self.path) if self.path.exists() else b""
            if self.path.is_symlink() or (content and self.path.stat().st_nlink > 1):
                with new_file(self.path) as copy:  # the file under the other name stays as it is
                    copy.write(content)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, content.rfind(b"\n") + 1)
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, event: str, record: dict[str, Any]) -> None:
        """Append one line.

        Args:
            event: What happened.
            record: Its data. Values that JSON cannot represent are written as text.

        Raises:
            OutputError: The line cannot be written.
        """
        strange = {
            key: str(value)
            for key, value in record.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        line: dict[str, Any] = {"event": event, "time": datetime.now(UTC).isoformat()}
        line |= record | dict.fromkeys(strange)
        if strange:
            line["non_finite"] = strange
        left = (to_json(line) + "\n").encode()
        try:
            while left:  # a nearly full disk accepts a part before it reports an error
                left = left[os.write(self._file, left) :]
        except OSError as error:
            raise self._cannot_write(error) from error

    def truncate_after(self, step: int) -> None:
        """Truncate the file before the first line about a later step; 0 empties it."""
        end = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            said = (parse_line(line) or {}).get("step")
            if step == 0 or (isinstance(said, int | float) and said > step):
                break
            end += len(line)
        os.ftruncate(self._file, end)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write the journal {self.path}: {error.strerror}")


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a journal, as objects.

    Raises:
        OSError: The file cannot be read.
    """
    lines = read_file(path).splitlines(keepends=True)
    return [record for record in map(parse_line, lines) if record is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if the line is truncated, or too deeply nested for Python."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
