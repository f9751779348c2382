"""Writes checkpoints in the background, during the next steps of a GPU.

The tensors of a checkpoint are copied to the host between two steps. Writing them, computing
digests and flushing to disk takes a second for a 7B model's run (LAB.md); no step waits for it.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from halfbyte.errors import HalfbyteError

logger = logging.getLogger("halfbyte")


class CheckpointWriter:
    """Writes checkpoints one after the other. A context manager, which waits for all on exit.

    Args:
        saved: Called with the path of each written checkpoint, in the thread that calls a method.
        background: Whether to write in a thread; otherwise `write` returns when it is done.
    """

    def __init__(self, saved: Callable[[Path], None], *, background: bool) -> None:
        self._saved, self._background = saved, background
        self._thread = ThreadPoolExecutor(1, "write-checkpoint")
        self._writing: Future[Path] | None = None

    def write(self, checkpoint: Callable[[], Path]) -> None:
        """Call ``checkpoint``, which writes one and returns its path; in the thread, if any.

        Raises:
            OutputError: If the previous one, or without a thread this one, could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(checkpoint)
        if not self._background:
            self.wait()

    def look(self) -> None:
        """Report a checkpoint that has been written since; raises like `wait`, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            OutputError: If it could not be written.
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
