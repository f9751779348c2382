"""Nothing foreign reaches a terminal as it is, and everything can be printed in any encoding."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from rich.console import Console

from halfbyte import cli
from halfbyte.cli.generate import write
from halfbyte.cli.streams import prepare_streams
from halfbyte.config.command_line import results
from halfbyte.errors import CheckpointError
from halfbyte.report import open_report, show
from halfbyte.report.live import LiveScreen, PlainScreen, Screen
from tests.test_foreign_text import CONTROLS

EVERY = "".join(CONTROLS)
FOREIGN = f"[bold]a[/bold]{EVERY}[link=x]b[/link]"


def assert_shown(printed: str, allowed: str = "\n\t") -> None:
    assert not set(printed) & (set(CONTROLS) - set(allowed))
    folded = "".join(line.strip() for line in printed.splitlines())
    for word in (
        "[bold]",
        "[/bold]",
        r"\x1b",
        r"\x9b",
        r"\u202e",
        r"\u2066",
        r"\udcff",
        "[link=x]",
    ):
        assert word in folded


@pytest.mark.parametrize("error", [CheckpointError, KeyError, lambda text: ValueError(text, text)])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_error_of_any_command_controls_the_terminal(
    command: str,
    error: Callable[[str], Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = ModuleType(cli.module_of(command))

    def fail(argv: list[str]) -> None:
        raise error(FOREIGN)

    module.main = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main([command]) in (1, 2)
    assert_shown(capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        [FOREIGN],
        ["train", "--" + FOREIGN],
        ["train", "--lora-r", FOREIGN],
        ["train", "--seed=1", FOREIGN],
        ["train", "a", FOREIGN],
        ["report", FOREIGN],
    ],
    ids=["command", "option", "value", "file", "argument", "journal"],
)
def test_a_command_line_is_quoted_safely(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("\0", "").replace("\ud800", "") for word in words]  # not in arguments
    assert cli.main(words) == 2
    assert not set(capsys.readouterr().err) & (set(CONTROLS) - set("\n\t"))


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=4000)


@pytest.mark.parametrize("live", [False, True])
def test_neither_screen_obeys_what_it_shows(live: bool, console: Console) -> None:
    stream = console.file
    screen: Screen = LiveScreen(console) if live else PlainScreen(stream)
    screen.note(FOREIGN)
    screen.saved(FOREIGN)
    assert isinstance(stream, io.StringIO)
    assert_shown(stream.getvalue())
    stream.seek(0)
    stream.truncate()
    with screen.task(f"reading {FOREIGN}", 1) as progress:
        progress(1, 1)
    # The display itself moves the cursor.
    assert_shown(stream.getvalue(), "\n\t\r\x1b" if live else "\n\t")
    assert "\x1b]" not in stream.getvalue()


def test_a_warning_of_ours_is_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest would capture it, and could not pass surrogates on between its processes.
    monkeypatch.setattr(logging.getLogger("halfbyte"), "propagate", False)
    with open_report():
        logging.getLogger("halfbyte").warning("skipping %s", FOREIGN)
    assert_shown(capsys.readouterr().err)


def test_results_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for print_it in (
        lambda: show.heading(FOREIGN),
        lambda: show.paragraph(FOREIGN),
        lambda: show.command(FOREIGN),
        lambda: show.answer(FOREIGN, {FOREIGN: FOREIGN}),
        lambda: show.outcome(True, FOREIGN),
        lambda: show.table({FOREIGN: FOREIGN}),
        lambda: show.columns([FOREIGN, "b"], [[FOREIGN, FOREIGN]]),
    ):
        print_it()
        out = capsys.readouterr().out
        assert not set(out) & (set(CONTROLS) - set("\n\t"))
        assert "[bold]" in out


def test_json_controls_no_terminal_either(capsys: pytest.CaptureFixture[str]) -> None:
    with results(as_json=True) as result:
        result["answer"] = FOREIGN
    out = capsys.readouterr().out
    assert not set(out) & (set(CONTROLS) - {"\n"})
    assert json.loads(out) == {"answer": FOREIGN}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_is_escaped_on_a_terminal_and_left_alone_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        write("one\n\ttwo \x1b[31m\u202e")
        expected = "\\x1b[31m\\u202e" if stream.isatty() else "\x1b[31m\u202e"
        assert stream.getvalue() == f"one\n\ttwo {expected}"


# --- the streams of a process -------------------------------------------------------------------


@contextmanager
def our_process(encoding: str) -> Iterator[io.BytesIO]:
    """Standard output in an encoding (LANG=C has ASCII), prepared as in our processes."""
    raw = io.BytesIO()
    factory = logging.getLogRecordFactory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, write_through=True))
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        prepare_streams()
        yield raw
        logging.setLogRecordFactory(factory)


def test_an_encoding_without_unicode_is_no_error() -> None:
    with our_process("ascii") as raw:
        show.heading("é")
        show.answer("漢字", {"✓": "ü"})
        show.outcome(True, "–")
        write("é")
        assert b"\\xe9" in raw.getvalue()
        assert b"\\u2713" in raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json_in_every_encoding(encoding: str) -> None:
    with our_process(encoding) as raw:
        with results(as_json=True) as result:
            result["answer"] = "é 漢\x9b"
        assert json.loads(raw.getvalue()) == {"answer": "é 漢\x9b"}


def test_what_libraries_print_is_escaped() -> None:
    log, stream = logging.getLogger("another"), io.StringIO()
    log.propagate = False
    log.addHandler(handler := logging.StreamHandler(stream))
    with our_process("utf-8"):
        log.warning("unexpected key %s", FOREIGN)
        shown = warnings.formatwarning(FOREIGN, UserWarning, "file.py", 1, "")
    log.removeHandler(handler)
    assert_shown(stream.getvalue())
    assert_shown(shown)


def test_a_terminal_without_unicode_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.report import live

    for encoding, kind in (("utf-8", LiveScreen), ("ascii", PlainScreen)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        fake = Console(file=stream, force_terminal=True, color_system=None)
        monkeypatch.setattr(live, "Console", lambda fake=fake, **_: fake)
        monkeypatch.setenv("TERM", "xterm")
        assert type(live.open_screen()) is kind
