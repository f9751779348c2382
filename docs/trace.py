"""Draws docs/batch.svg and docs/weight.svg: which files a run goes through, traced as it runs.

    python docs/trace.py

A tiny model is trained for two steps on a CPU by the command line, with a profiler on. A row is a
function of ours that is called for the first time, the first of its file; a column is a package. So
the figures are what the code does, not what somebody remembers. `batch.svg` begins at the command
and ends with the adapter; `weight.svg` is the part of it from a file on disk to a decoded weight.
"""

import contextlib
import inspect
import io
import json
import sys
import tempfile
import threading
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "halfbyte"
sys.path[:0] = [str(HERE.parent), str(PACKAGE.parent)]

ROOMS = ("cli", "config", "tools", "train", "report", "data", "checkpoint", "models", "plan")
ROOMS += ("engine", "layers", "linear", "optim", "quant", "runtime")
OF_A_WEIGHT = ("checkpoint", "models", "engine", "linear", "quant")
ROW, COLUMN, LEFT, TOP = 17, 74, 320, 46


class Call(NamedTuple):
    """The first call into a file: the package, the file, the function."""

    room: str
    file: str
    function: str


class Tracer:
    """Notes the first call into each of our files, in all threads."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Take note of a call; see ``sys.setprofile``."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        if not code.co_flags & inspect.CO_OPTIMIZED:  # the body of a module or a class
            return
        name = code.co_qualname.replace(".__init__", "").replace(".<locals>", "")
        own = name.rpartition(".")[2]
        if "<" in name or (own.startswith("_") and not own.startswith("__")):  # private
            return
        file = str(Path(code.co_filename).relative_to(PACKAGE))
        room = file.partition("/")[0]
        if room in ROOMS:
            self.calls.setdefault(file, Call(room, file, name))


def traced() -> list[Call]:
    """Train a tiny model, and return the first calls in their order."""
    from tests.tiny import write_tiny_model

    from halfbyte.cli import main

    tracer = Tracer()
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
        model, data = write_tiny_model(Path(work) / "model"), Path(work) / "train.jsonl"
        ask = {"role": "user", "content": "What is the capital of France?"}
        rows = [[ask, {"role": "assistant", "content": "Paris." + " Yes." * i}] for i in range(8)]
        data.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        words = ["train", "--model", str(model), "--data", str(data), "--output", f"{work}/out"]
        words += ["--max-steps", "2", "--device", "cpu", "--samples", "0"]
        threading.setprofile(tracer)
        sys.setprofile(tracer)
        try:
            code = main(words)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    if code:
        raise SystemExit(f"the traced run ended with exit code {code}")
    return list(tracer.calls.values())


def drawn(calls: list[Call], title: str) -> str:
    """Draw calls as rows, packages as columns."""
    rooms = [room for room in ROOMS if any(call.room == room for call in calls)]
    width, height = LEFT + COLUMN * len(rooms) + 20, TOP + ROW * len(calls) + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="DejaVu Sans, sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff" stroke="#d0d7de"/>',
    ]
    for i, room in enumerate(rooms):
        x = LEFT + COLUMN * i + COLUMN // 2
        lines.append(
            f'<text x="{x}" y="{TOP - 18}" text-anchor="middle" font-weight="bold" '
            f'fill="#1f2328">{room}</text><path d="M{x} {TOP - 10}V{height - 10}" '
            'stroke="#d0d7de"/>'
        )
    before: tuple[int, int] | None = None
    for i, call in enumerate(calls):
        x, y = LEFT + COLUMN * rooms.index(call.room) + COLUMN // 2, TOP + ROW * i + 4
        if before is not None:
            path = f"M{before[0]} {before[1]}L{x} {y}"
            lines.append(f'<path d="{path}" stroke="#0969da" stroke-opacity=".35"/>')
        lines.append(
            f'<text x="12" y="{y + 4}" fill="#1f2328">{escape(call.file)}'
            f'<tspan dx="8" fill="#59636e">{escape(call.function)}</tspan></text>'
            f'<circle cx="{x}" cy="{y}" r="4" fill="#0969da"/>'
        )
        before = x, y
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Write both figures."""
    calls = traced()
    (HERE / "batch.svg").write_text(drawn(calls, "A run, file by file"))
    first = next(i for i, call in enumerate(calls) if call.file == "checkpoint/base_model.py")
    of_a_weight = [call for call in calls[first:] if call.room in OF_A_WEIGHT]
    last = next(i for i, call in enumerate(of_a_weight) if call.file == "linear/decoded_cache.py")
    (HERE / "weight.svg").write_text(drawn(of_a_weight[: last + 1], "A weight, file by file"))
    print(f"{len(calls)} files in batch.svg, {last + 1} in weight.svg")


if __name__ == "__main__":
    main()
