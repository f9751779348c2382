"""Checkpoints are written while a GPU makes the next steps.

What belongs to a checkpoint is copied to the host between two steps. Writing it, computing digests
and flushing it to the disk took a 7B model's run a second for each checkpoint (LAB.md), for which
no step has to wait.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from halfbyte.errors import HalfbyteError

logger = logging.getLogger("halfbyte")


class CheckpointWriter:
    """Writes one checkpoint after the other. A context: when it ends, all are written.

    Args:
        saved: Called with the path of each that is on the disk, by whoever calls a method.
        background: Whether to write in a thread; otherwise `write` returns when it is done.
    """

    def __init__(self, saved: Callable[[Path], None], *, background: bool) -> None:
        self._saved, self._background = saved, background
        self._thread = ThreadPoolExecutor(1, "write-checkpoint")
        self._writing: Future[Path] | None = None

    def write(self, checkpoint: Callable[[], Path]) -> None:
        """Have ``checkpoint`` called, which writes one and returns its path.

        Raises:
            OutputError: If the one before could not be written, or, without a thread, this one.
        """
        self.wait()
        self._writing = self._thread.submit(checkpoint)
        if not self._background:
            self.wait()

    def look(self) -> None:
        """Say what has been written since; raises as `wait`, and does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            OutputError: If it cannot be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._saved(writing.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except HalfbyteError as failed:
            if kind is None:
                raise
            logger.warning("the last checkpoint was not written: %s", failed)
        finally:
            self._thread.shutdown()
