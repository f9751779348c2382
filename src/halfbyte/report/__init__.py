"""Reporting of a run: one object with a few methods, called by the code that does the work.

Reports go to two places. The *journal* is the record (``report.journal``). The *screen*
(``report.live``) is standard error: a live display on a terminal, plain lines in a file or a pipe;
in a notebook it is an output of the cell (``report.notebook``).
Standard output is used for results only (``report.show``), so that ``halfbyte … --json >
result.json`` contains one JSON object and nothing else.

When training ends, successfully or not, an HTML page is generated from the journal
(``report.page``). Numbers are also sent to *trackers* if the run has any (``report.trackers``).
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from halfbyte.errors import OutputError, RunStopped
from halfbyte.foreign_text import LONGEST_MESSAGE, shorten
from halfbyte.runtime.distributed import rank_of_process

if TYPE_CHECKING:
    from halfbyte.report.journal import Journal
    from halfbyte.report.live import Screen
    from halfbyte.report.trackers import Tracker

__all__ = ["RunReport", "open_report"]


class RunReport:
    """Reports a run. A context manager, which always closes it."""

    def __init__(self, screen: "Screen", output_dir: Path | None) -> None:
        """Report to ``screen``, and to ``journal.jsonl`` in ``output_dir`` once a run begins."""
        self._screen = screen
        self._output_dir = output_dir
        self._journal: Journal | None = None
        self._trackers: list[Tracker] = []
        self._finished = False  # an error after that is not one of training
        self._before_begin: list[tuple[str, dict[str, Any]]] | None = []
        self._log_handler = _NotesFromLogging(self)
        logging.getLogger("halfbyte").addHandler(self._log_handler)

    def note(self, text: str) -> None:
        """Log a message of one line; one that is too long to read is shortened."""
        text = shorten(text, LONGEST_MESSAGE)
        self.record("note", {"text": text})
        self._screen.note(text)

    def track(self, names: Sequence[str]) -> None:
        """Also report to these trackers from now on; called before anything is loaded.

        Raises:
            ConfigError: A tracker's library is not installed.
        """
        from halfbyte.report.trackers import open_trackers

        self._trackers = open_trackers(names, self._output_dir or Path())

    def task(
        self, description: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show progress of a task; the value is called with (done, total)."""
        return self._screen.task(description, total)

    def begin(self, *, total_steps: int, start_step: int, metadata: dict[str, Any]) -> None:
        """Training begins: the journal is opened, and truncated to ``start_step``.

        Only now, so that a run that fails before its first step leaves no file behind.

        Args:
            total_steps: The step after which training ends.
            start_step: Steps made before, by the run that this one goes on with.
            metadata: The journal's record of the run; the user has seen it in messages.

        Raises:
            OutputError: The journal cannot be written.
        """
        if self._output_dir is not None:
            from halfbyte.report.journal import Journal

            self._journal = Journal(self._output_dir / "journal.jsonl")
            self._journal.truncate_after(start_step)
            for event, record in self._before_begin or []:
                self._journal.write(event, record)
        self._before_begin = None
        self.record("begin", {"total_steps": total_steps, "start_step": start_step, **metadata})
        for tracker in self._trackers:
            name = self._output_dir.name if self._output_dir else "halfbyte"
            tracker.begin(name, start_step, metadata)
        self._screen.begin(total_steps=total_steps, start_step=start_step, metadata=metadata)

    def step(self, record: dict[str, Any]) -> None:
        """An optimizer step was made.

        Args:
            record: ``step`` and ``loss``; as far as known ``grad_norm``, ``learning_rate``,
                ``tokens``, ``supervised_tokens``, ``tokens_per_second``, ``peak_memory_bytes``
                and ``seconds``.
        """
        self._track("step", record)
        self._screen.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """The model was evaluated: ``step``, ``loss``, ``perplexity``, ``exact_match``."""
        self._track("evaluation", record)
        self._screen.evaluation(record)

    def warning(self, step: int, kind: str, text: str) -> None:
        """Something is wrong with a step or the data; ``text`` says what, and what to look at.

        Args:
            step: The step (1-based); 0 for the data.
            kind: ``nonfinite``, ``data``, or one of ``train/loss_watch.py``.
            text: For the user.
        """
        self.record("warning", {"step": step, "kind": kind, "text": text})
        self._screen.warning(text)

    def stopping(self, text: str) -> None:
        """The run has been asked to stop; called in another thread."""
        self.record("note", {"text": text})
        self._screen.stopping(text)

    def saved(self, path: str | Path) -> None:
        """A checkpoint or an adapter is on disk."""
        self.record("saved", {"path": str(path)})
        self._screen.saved(path)

    def finish(self, record: dict[str, Any]) -> None:
        """Training is over: ``steps``, ``seconds``, ``final_loss``, ``peak_memory_bytes``."""
        self.record("finish", record)
        self._finished = True
        self._write_page()
        self._screen.finish(record)

    def record(self, event: str, record: dict[str, Any]) -> None:
        """Write a record to the journal only."""
        if self._journal is not None:
            self._journal.write(event, record)
        elif self._before_begin is not None:
            self._before_begin.append((event, record))

    def close(self) -> None:
        """Leave the screen in order, and close the journal and the trackers."""
        logging.getLogger("halfbyte").removeHandler(self._log_handler)
        self._screen.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._screen.ended(error)
            if kind is not None and self._journal is not None and not self._finished:
                reason = f"{kind.__name__}: {error}"
                if issubclass(kind, KeyboardInterrupt):
                    reason = "interrupted"
                elif issubclass(kind, RunStopped):
                    reason = str(error)
                self.record("stopped", {"reason": shorten(reason, LONGEST_MESSAGE)})
                self._write_page()
        finally:
            self.close()

    def _track(self, event: str, record: dict[str, Any]) -> None:
        self.record(event, record)
        if self._trackers:
            from halfbyte.report.trackers import tracked

            values = tracked(event, record)
            for tracker in self._trackers:
                tracker.log(record["step"], values)

    def _write_page(self) -> None:
        if self._journal is None:
            return
        from halfbyte.report.page import write_page

        directory = self._journal.path.parent
        try:
            path = write_page([directory], directory / "report.html")
        except OutputError as error:  # the adapter is safe; it must not look as if it were not
            self._screen.note(str(error))
        else:
            self._screen.saved(path)


class _NotesFromLogging(logging.Handler):
    """Turns our own modules' warnings, such as a missing compiler, into notes of the run."""

    def __init__(self, report: RunReport) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.note(record.getMessage())


def open_report(output_dir: str | Path | None = None, *, quiet: bool = False) -> RunReport:
    """Open a report on standard error, or in a notebook as an output of the cell.

    It is also written to ``journal.jsonl`` in ``output_dir``, if that is given. With several
    processes this is the report of the first one; others write a log (report/rank_log.py).

    Args:
        output_dir: The run's directory; None keeps no journal.
        quiet: Show nothing; the journal is written anyway.
    """
    screen: Screen
    rank, size = rank_of_process()
    if size > 1 and rank > 0:
        from halfbyte.report.live import Screen as Silent
        from halfbyte.report.rank_log import RankLog, log_of_rank

        log = Silent() if output_dir is None else RankLog(log_of_rank(Path(output_dir), rank))
        return RunReport(log, None)
    if not quiet and _in_notebook():
        from halfbyte.report.notebook import NotebookScreen

        screen = NotebookScreen()
    else:
        from halfbyte.report.live import open_screen

        screen = open_screen(quiet=quiet)
    return RunReport(screen, Path(output_dir) if output_dir else None)


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook: of Jupyter, Visual Studio Code, Colab."""
    ipython = sys.modules.get("IPython")  # which a kernel has imported
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
