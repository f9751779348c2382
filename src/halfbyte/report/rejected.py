"""``rejected.jsonl``: every row of a run's data that was left out, with its line and the reason.

One JSON object per row: ``source``, ``line``, ``reason``, and the beginning of the ``row``. The
journal has the same reasons, with a limited number of lines for each.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.atomic import new_file, output_errors
from halfbyte.foreign_text import to_json

if TYPE_CHECKING:
    from halfbyte.data import DatasetReport, Rejection

REJECTED_NAME = "rejected.jsonl"


def write_rejected(output: Path, reports: Iterable["DatasetReport"]) -> Path | None:
    """Write the rejected rows of data sets; without any, remove the file of an earlier start.

    Returns:
        The path of the file, or None.

    Raises:
        OutputError: The file cannot be written.
    """
    path = output / REJECTED_NAME
    records = [
        {"source": report.source} | rejection._asdict()
        for report in reports
        for rejection in report.rejections
    ]
    if not records:
        with output_errors(path):
            path.unlink(missing_ok=True)
        return None
    with new_file(path) as file:
        for record in records:
            file.write(to_json(record).encode() + b"\n")
    return path


class RejectedFile:
    """The same file, which grows with the rows that a run finds while it trains.

    Attributes:
        size: Its bytes.
    """

    def __init__(self, output: Path, size: int = 0) -> None:
        """Go on with the file of a run that had written so many bytes of it.

        Raises:
            OutputError: The file cannot be written.
        """
        self._path, self.size = output / REJECTED_NAME, size
        with output_errors(self._path):
            if self._path.exists():
                self.size = min(size, self._path.stat().st_size)
                os.truncate(self._path, self.size)

    def add(self, source: str, rejections: "Iterable[Rejection]") -> None:
        """Add rejected rows of a source.

        Raises:
            OutputError: The file cannot be written.
        """
        records = [{"source": source} | rejection._asdict() for rejection in rejections]
        with output_errors(self._path), open(self._path, "ab") as file:
            file.write(b"".join(to_json(record).encode() + b"\n" for record in records))
            self.size = file.tell()
