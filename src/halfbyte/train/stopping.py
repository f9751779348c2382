"""A request to stop a run, which it answers between steps.

From the command line a signal makes the request (`StopRequest.on_signal`); a program that uses
halfbyte as a library makes it from any thread, or from a handler of its own::

    stop = halfbyte.StopRequest()
    threading.Thread(target=lambda: halfbyte.fine_tune(config, report, stop)).start()
    stop.request()

The run finishes the step in progress, saves a checkpoint and raises `RunStopped`. Resumed, it is
the run that was never stopped, byte for byte (train/run.py).
"""

import _thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from halfbyte.errors import Interrupted


class StopRequest:
    """Asks a run to stop.

    Attributes:
        requested: Whether it has been asked.
        signal: Number of the signal that asked, or None.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal: int | None = None
        self._announce: Callable[[], None] | None = None

    def request(self, *, quietly: bool = False) -> None:
        """Have the run stop after the step in progress, or before its first one.

        Args:
            quietly: Whether nothing is said of it before the run has stopped: between steps there
                is nothing to wait for.
        """
        self.requested = True
        if self._announce is not None and not quietly:
            # In a thread, since a signal handler may have interrupted code that is printing; a
            # bare one, since that code may hold the locks of `threading`.
            _thread.start_new_thread(self._announce, ())

    def on_signal(self, number: int) -> None:
        """Handle a signal: a request while steps are made, otherwise the end of the command.

        Raises:
            Interrupted: If no steps are made.
        """
        if self._announce is None:
            raise Interrupted(number)
        self.signal = number
        self.request()

    @contextmanager
    def between_steps(self, announce: Callable[[], None]) -> Iterator[None]:
        """Steps are made within the block, which looks at ``requested`` between them.

        Args:
            announce: Tells the user at once that the step is finished first.
        """
        self._announce = announce
        try:
            yield
        finally:
            self._announce = None
