"""The first signal is handled, the second has its default action, ignored ones stay ignored."""

import os
import pty
import signal
import threading

import pytest

from halfbyte.errors import Interrupted
from halfbyte.runtime.signals import SIGNALS, first_signal, interrupt, leave_closed_terminal

pytestmark = pytest.mark.usefixtures("signal_handlers")


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_handled_and_the_next_has_its_default_action(number):
    seen = []
    with first_signal(seen.append):
        os.kill(os.getpid(), number)
        assert seen == [number]
        assert handlers() == [signal.SIG_DFL] * 3
    assert handlers() == [signal.SIG_DFL] * 3


def test_without_a_signal_nothing_is_changed():
    before = handlers()
    with first_signal(interrupt):
        assert not set(handlers()) & set(before)
    assert handlers() == before


def test_an_inner_block_answers_and_the_outer_one_again_after_it():
    seen = []
    with first_signal(interrupt):
        with first_signal(seen.append):
            pass
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
    assert (caught.value.signal, seen) == (signal.SIGHUP, [])


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with first_signal(interrupt):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_another_thread_has_no_handlers():
    before, found = handlers(), []

    def inside():
        with first_signal(interrupt):
            found.append(handlers())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]


def test_output_to_a_closed_terminal_is_dropped(tmp_path):
    terminal, ours = pty.openpty()
    with open(tmp_path / "log", "wb") as file:
        leave_closed_terminal((ours, file.fileno()))
        assert os.write(ours, b"seen") == 4
        assert os.read(terminal, 4) == b"seen"
        os.close(terminal)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(ours, b"lost")
        leave_closed_terminal((ours, file.fileno()))
        assert os.write(ours, b"dropped") == 7
        os.write(file.fileno(), b"kept")
    os.close(ours)
    assert (tmp_path / "log").read_bytes() == b"kept"
