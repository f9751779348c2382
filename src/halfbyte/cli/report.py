"""``halfbyte report RUN [RUN …]``: writes an HTML page about one or more runs."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from halfbyte.config.command_line import Command, results
from halfbyte.config.options import Options

_PAGE = "report.html"


class ReportOptions(Options):
    """The runs, and the page to write."""

    runs: tuple[Path, ...] = Field(min_length=1, description="directories of runs, or journals")
    output: Path | None = Field(
        None, description="file to write (default: report.html in the run's directory, or here)"
    )

    sections: ClassVar[dict[str, str]] = {"runs": "the page"}


COMMAND = Command(
    "report",
    ReportOptions,
    about="Write a self-contained HTML page from the journal of a run: losses, speed, memory, "
    "time, answers before and after, data and options. Several runs are drawn in the same charts. "
    "The run may still be in progress, or have been killed.",
    example="halfbyte report out",
    positional=("runs",),
    many="runs",
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, _, as_json = COMMAND.read(argv)
    runs = options.runs
    beside = runs[0] if runs[0].is_dir() else runs[0].parent
    output = options.output or (beside / _PAGE if len(runs) == 1 else Path(_PAGE))

    from halfbyte.report import show
    from halfbyte.report.page import write_page

    with results(as_json=as_json) as result:
        result["page"] = str(write_page(runs, output))
        show.paragraph(str(output))
