"""What a run tells: one object with a few verbs, called by whoever does the work.

Whatever is reported goes to two places. The *journal* is the record (``report.journal``). The
*screen* (``report.live``) is standard error: a live display where that is a terminal, plain
lines where it is a file or a pipe. Standard output is left to results (``report.show``), so
that ``halfbyte … --json > result.json`` holds one JSON object and nothing else.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from halfbyte.report.journal import Journal
    from halfbyte.report.live import Screen

__all__ = ["RunReport", "open_report"]


class RunReport:
    """The verbs of a run. As a context manager it closes itself, whatever happens."""

    def __init__(self, screen: "Screen", output_dir: Path | None) -> None:
        """Report to ``screen``, and to ``journal.jsonl`` in ``output_dir`` once a run begins."""
        self._screen = screen
        self._output_dir = output_dir
        self._journal: Journal | None = None
        self._before_begin: list[tuple[str, dict[str, Any]]] = []
        self._log_handler = _NotesFromLogging(self)
        logging.getLogger("halfbyte").addHandler(self._log_handler)

    def note(self, text: str) -> None:
        """Announce something in one line."""
        self._record("note", {"text": text})
        self._screen.note(text)

    def task(
        self, description: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show that something takes a while; the value is called with (done, total)."""
        return self._screen.task(description, total)

    def begin(self, *, total_steps: int, start_step: int, facts: dict[str, Any]) -> None:
        """Training begins: the journal is opened, and cut back to ``start_step``.

        Only now, so that a run that fails before its first step leaves no file behind.

        Args:
            total_steps: The step after which training ends.
            start_step: Steps made before, by the run that this one goes on with.
            facts: What the journal should know of the run; people have been told by ``note``.

        Raises:
            OutputError: The journal cannot be written.
        """
        if self._output_dir is not None:
            from halfbyte.report.journal import Journal

            self._journal = Journal(self._output_dir / "journal.jsonl")
            self._journal.truncate_after(start_step)
            for event, record in self._before_begin:
                self._journal.write(event, record)
        self._before_begin.clear()
        self._record("begin", {"total_steps": total_steps, "start_step": start_step, **facts})
        self._screen.begin(total_steps=total_steps, start_step=start_step, facts=facts)

    def step(self, record: dict[str, Any]) -> None:
        """An optimizer step was made.

        Args:
            record: ``step`` and ``loss``; as far as known ``grad_norm``, ``learning_rate``,
                ``tokens``, ``supervised_tokens``, ``tokens_per_second``, ``peak_memory_bytes``
                and ``seconds``.
        """
        self._record("step", record)
        self._screen.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """The model was evaluated: ``step``, ``loss``, ``perplexity``, ``exact_match``."""
        self._record("evaluation", record)
        self._screen.evaluation(record)

    def saved(self, path: str | Path) -> None:
        """A checkpoint or an adapter is on disk."""
        self._record("saved", {"path": str(path)})
        self._screen.saved(path)

    def finish(self, record: dict[str, Any]) -> None:
        """Training is over: ``steps``, ``seconds``, ``final_loss``, ``peak_memory_bytes``."""
        self._record("finish", record)
        self._screen.finish(record)

    def close(self) -> None:
        """Leave the screen in order, and close the journal."""
        logging.getLogger("halfbyte").removeHandler(self._log_handler)
        self._screen.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _record(self, event: str, record: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.write(event, record)
        else:
            self._before_begin.append((event, record))


class _NotesFromLogging(logging.Handler):
    """Turns warnings of our own modules, such as a missing compiler, into notes of the run."""

    def __init__(self, report: RunReport) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.note(record.getMessage())


def open_report(output_dir: str | Path | None = None, *, quiet: bool = False) -> RunReport:
    """Open a report on standard error, and on ``journal.jsonl`` in ``output_dir`` if given.

    Args:
        output_dir: The run's directory; None keeps no journal.
        quiet: Show nothing; the journal is kept all the same.
    """
    from halfbyte.report.live import open_screen

    return RunReport(open_screen(quiet=quiet), Path(output_dir) if output_dir else None)
