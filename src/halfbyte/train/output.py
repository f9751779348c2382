"""The output directory of a run: written by this run alone, and over no file of anybody else."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.atomic import remove_directory
from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.checkpoint.run_state import STATE_NAME, RunState
from halfbyte.config.reading import WRITTEN_YAML
from halfbyte.config.schema import TrainConfig
from halfbyte.data.sources import local_paths
from halfbyte.errors import OutputError
from halfbyte.input_files import open_file
from halfbyte.report.held_out import HELD_OUT_NAME, write_held_out
from halfbyte.report.rejected import REJECTED_NAME
from halfbyte.train.run_data import RunData

if TYPE_CHECKING:
    from halfbyte.report import RunReport

_CONFIG, _JOURNAL = "config.yaml", "journal.jsonl"
_FIRST_LINE = 2**20

# The names that a run writes in its directory, its tokenizer's files included.
_WRITTEN = (
    *(_CONFIG, _JOURNAL, REJECTED_NAME, HELD_OUT_NAME, "report.html", "checkpoint-*"),
    "nonfinite-*.json",
    *("adapter_config.json", "adapter_model.safetensors", "halfbyte.json"),
    *("tokenizer*.json", "tokenizer*.model", "chat_template*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)


@contextlib.contextmanager
def claim_output(config: TrainConfig) -> Iterator[None]:
    """Hold the output directory of a run, and check that it may write there.

    Raises:
        OutputError: Another process writes it, the run reads it, or a file in it that the run would
            replace was not written by a run.
    """
    output = config.output
    with output_lock(output):
        read = {"model": [Path(config.model).expanduser()]}
        read |= {"data": local_paths(config.data), "eval_data": local_paths(config.eval_data or ())}
        for option, paths in read.items():
            for path in paths:
                if path.exists() and _would_change(path, output):
                    raise OutputError(
                        f"{path} is read (`{option}`), so nothing is written to {output}: give "
                        "another --output"
                    )
        if output.is_dir() and not _is_run(output):
            foreign = sorted(file for name in _WRITTEN for file in output.glob(name))
            if foreign:
                raise OutputError(
                    f"{foreign[0]} was not written by a run, so it is not replaced: move it, or "
                    "give another --output"
                )
        yield


def write_rows(
    output: Path, data: RunData, report: "RunReport", step: int, resumed: RunState | None
) -> None:
    """Write the rows that were left out, and those that were held out, beside the journal.

    Args:
        output: The directory of the run.
        data: Its data, of which the examples of ``step`` (0-based) and later ones are taken next.
        report: Where to log.
        step: The first step that is made.
        resumed: The checkpoint that the run goes on from.

    Raises:
        OutputError: A file cannot be written.
        CheckpointError: The checkpoint does not say how far the run had come in the data.
    """
    data.begin(output, step, resumed.progress if resumed else {})
    if data.divided and data.held_out is not None:
        rows = [row for row, _ in data.held_out.cases]
        report.record("held_out", {"lines": [row.line for row in rows]})
        report.note(f"the rows held out, for `halfbyte eval`: {write_held_out(output, rows)}")


def remove_run(directory: Path) -> None:
    """Remove what a run wrote in ``directory``, if one did; other files stay."""
    if directory.is_dir() and _is_run(directory):
        for path in [path for name in _WRITTEN for path in directory.glob(name)]:
            if path.is_dir() and not path.is_symlink():
                remove_directory(path)
            else:
                path.unlink()


def _would_change(path: Path, output: Path) -> bool:
    """Whether an input is the output directory, or a file that the run writes into it."""
    if path.is_dir():
        return output.exists() and path.samefile(output)
    inside = output.exists() and path.parent.samefile(output)
    return inside and any(path.match(name) for name in _WRITTEN)


def _is_run(directory: Path) -> bool:
    """Whether a run has written in the directory.

    The first file of a run is its ``config.yaml``; a run that was interrupted after that may have
    no more. Without that file, as older runs may be, it has a journal or the state of a run.
    """
    if any(directory.glob(f"checkpoint-*/{STATE_NAME}")):
        return True
    if _first_line(directory / _CONFIG) == WRITTEN_YAML.encode():
        return True
    try:
        line = json.loads(_first_line(directory / _JOURNAL))
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and "event" in line


def _first_line(path: Path) -> bytes:
    """Return the first line of a file, as far as it is not absurdly long; empty if unreadable."""
    try:
        with open_file(path) as file:
            return file.readline(_FIRST_LINE)
    except OSError:
        return b""
