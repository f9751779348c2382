"""Shared by the GPU benchmarks: waiting for the device, taking turns, and the record of a run.

A GPU runs asynchronously, so times are taken with events on the device. Each launch is timed twice:
in a CUDA graph, without Python, and called one by one, as a program does. Buffers are rotated, so
that no launch finds in the L2 cache (50 MB on an H100) what an earlier one left there.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from halfbyte.quant import QuantizedWeight

TOUCHED = 256_000_000  # bytes between two uses of one buffer
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "bitsandbytes",
    "peft",
    "trl",
    "liger_kernel",
    "unsloth",
)

Row = dict[str, Any]


def require_cuda() -> None:
    """Leave with exit code 2 where there is no CUDA device."""
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        raise SystemExit(2)


def reason(error: BaseException) -> str:
    """One line that says why something did not work."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def settle_unsloth() -> None:
    """Before Unsloth is imported: no statistics sent, and nothing written where we are."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth"))


def copies_of(nbytes: float) -> int:
    """How many buffers of `nbytes` have to be rotated."""
    return max(1, ceil(TOUCHED / nbytes))


def device_us(run: Callable[[], object]) -> float:
    """Microseconds on the device between the events before and after `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph, after two calls on another stream, as capture wants."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    return graph


def take_turns(
    contestants: Mapping[str, Callable[[int], object]], copies: int, rounds: int = 21
) -> dict[str, Row]:
    """Medians of microseconds a launch, in a graph (`us`) and called one by one (`eager_us`).

    Args:
        contestants: Each is called with the number of a launch and picks its buffers by that.
        copies: How many launches it takes until a buffer is met again.
        rounds: Every contestant is timed once a round, so that a slow moment hits all of them.
    """
    launches = copies * ceil(32 / copies)
    rows: dict[str, Row] = {}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, launch in contestants.items():

        def one_by_one(launch: Callable[[int], object] = launch) -> None:
            for i in range(launches):
                launch(i)

        rows[name] = {}
        try:
            one_by_one()
            torch.cuda.synchronize()
            runs[name, "eager_us"] = one_by_one
            runs[name, "us"] = captured(one_by_one).replay
        except Exception as error:  # a peer that cannot: its row says why
            rows[name]["failed"] = reason(error)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(device_us(run) / launches)
    for (name, figure), taken in times.items():
        rows[name][figure] = round(statistics.median(taken), 2)
        rows[name][figure.replace("us", "least_us")] = round(min(taken), 2)
    return rows


def steady(run: Callable[[], object], *, warm: float, measure: float) -> list[float]:
    """Milliseconds a call, one figure for each 50 ms, after `warm` seconds of the same work."""
    begin = time.perf_counter()
    calls, one, turns = 1, 0.0, 0
    while turns < 3 or time.perf_counter() - begin < warm:  # the first may compile
        turns += 1
        before = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        one = (time.perf_counter() - before) / calls
        calls = max(1, round(0.05 / one))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(1 + ceil(measure / calls / one))]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(calls):
            run()
        mark.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) / calls for start, end in pairwise(marks)]


class PowerMeter:
    """What nvidia-smi says of power and clock, read four times a second in the background."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []
        uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
        self._query = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm"]
        self._query += ["--format=csv,noheader,nounits"]
        self._card = [f"--id=GPU-{uuid}"] if uuid else []
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            call = [*self._query, *self._card]
            try:
                output = subprocess.run(call, capture_output=True, text=True, timeout=5).stdout
                watts, clock = output.splitlines()[0].split(",")
                self.samples.append((time.perf_counter(), float(watts), float(clock)))
            except (OSError, ValueError, IndexError, subprocess.SubprocessError):
                if not self._card:
                    return  # no nvidia-smi, or one that does not say: rows have null
                self._card = []  # it does not know the card by that name

    def between(self, start: float, end: float) -> Row:
        """Medians of the samples between two readings of `time.perf_counter`."""
        found = [sample[1:] for sample in self.samples if start <= sample[0] <= end]
        medians = map(statistics.median, zip(*found, strict=True)) if found else (None, None)
        return dict(zip(("power_w", "sm_mhz"), medians, strict=True))

    def close(self) -> None:
        """Sample no more."""
        self._done.set()


def from_bitsandbytes(codes: Tensor, state: bnb.QuantState) -> QuantizedWeight:
    """The same bytes as bitsandbytes holds (double-quantised), seen as ours."""
    return QuantizedWeight(
        codes.view(-1),
        None,
        state.absmax,
        state.state2.absmax,
        state.offset.reshape(()),
        tuple(state.shape),
        state.dtype,
        "nf4",
        state.blocksize,
    )


def relative_error(got: Tensor, reference: Tensor) -> float:
    """‖got - reference‖ / ‖reference‖, in float64."""
    reference = reference.double()
    return float((got.double() - reference).norm() / reference.norm())


def _command() -> str:
    """How this run was called, less where its record goes."""
    words = ["python", *sys.argv]
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return " ".join(words)


def write(script: str, output: Path | None, **content: Any) -> None:
    """Keep what a run found, with where and by what it was found."""
    versions = {"cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        **content,
    }
    path = output or Path("benchmarks/results") / f"{record['date'][:10]}_{script}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")
