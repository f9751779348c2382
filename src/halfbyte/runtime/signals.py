"""What SIGINT, SIGTERM and SIGHUP do to a command.

The first of them is handled: by default it interrupts the command, which removes its temporary
files and ends; a training run finishes its step and saves first (train/stopping.py). From then on
each has its default action again, so a second one ends the process at once. What was ignored when
the program started, as SIGHUP is under nohup, stays ignored.

Handlers belong to the process, so only the command line installs them; a library must not.
"""

import contextlib
import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from halfbyte.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ignored on purpose, or installed by something other than Python.
_NOT_OURS = (signal.SIG_IGN, None)


def interrupt(number: int) -> NoReturn:
    """Handle a signal by raising `Interrupted`."""
    raise Interrupted(number)


@contextlib.contextmanager
def first_signal(handle: Callable[[int], object]) -> Iterator[None]:
    """Within the block, call ``handle`` with the number of the first signal, in the main thread.

    After a signal the default actions stay, also beyond the block. Has no effect in other threads,
    which cannot have handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: known for number, known in found.items() if known not in _NOT_OURS}

    def handler(number: int, frame: FrameType | None) -> None:
        for known in before:
            signal.signal(known, signal.SIG_DFL)
        if number == signal.SIGHUP:
            leave_closed_terminal()
        handle(number)

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, known)


def repeat_ctrl_c() -> None:
    """Have every Ctrl-C raise KeyboardInterrupt from now on, for a command that catches it."""
    if signal.getsignal(signal.SIGINT) not in _NOT_OURS:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_closed_terminal(descriptors: Sequence[int] = (1, 2)) -> None:
    """Redirect output to a terminal that has been closed to /dev/null.

    Writing there is an error, which would end a run before its state is saved.
    """
    for descriptor in descriptors:
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] != errno.EIO:  # a file or a pipe
                continue
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
