"""``halfbyte watch RUN [RUN …]``: serves the page about runs while they are made."""

import sys
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from halfbyte.config.command_line import Command
from halfbyte.config.options import Options


class WatchOptions(Options):
    """The runs, and where to serve their page."""

    runs: tuple[Path, ...] = Field(
        min_length=1,
        description="directories of runs, or of directories of runs; a run may not have begun yet",
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port to listen on; 0: any that is free (default: 8765, or the next free one)",
    )
    open: bool = Field(False, description="open the page in a browser")

    sections: ClassVar[dict[str, str]] = {"runs": "the page"}


COMMAND = Command(
    "watch",
    WatchOptions,
    about="Serve the page about runs while they are made: losses, speed, memory against the plan, "
    "answers, data, warnings. It is read from their journals as they grow, so runs are not slowed "
    "down, and one that has died is recognised. Only this machine can open it; from another, "
    "forward the port (ssh -L 8765:localhost:8765 HOST). Ctrl-C ends it.",
    example="halfbyte watch out",
    positional=("runs",),
    many="runs",
    has_json=False,
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, _, _ = COMMAND.read(argv)

    from halfbyte.report import open_report
    from halfbyte.report.following import require_journal
    from halfbyte.report.watch import Watch, WatchServer

    for path in options.runs:
        require_journal(path)
    watch = Watch(options.runs)
    with open_report() as report, WatchServer(watch, options.host, options.port) as server:
        with report.task("reading the journal"):
            watch.view()
        if not server.is_local:
            report.note(
                "everybody who can reach this machine can read the page, samples of the data "
                "included"
            )
        print(server.url, flush=True)
        report.note("serving the page until Ctrl-C")
        if options.open:
            import webbrowser

            if not webbrowser.open(server.url):
                report.note("no browser was found to open the page")
        sys.stdout.flush()
        server.serve_forever()
