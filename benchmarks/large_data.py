"""How soon a run on large data makes its first step, and what memory it takes meanwhile.

    python benchmarks/large_data.py --size 20GB --directory /somewhere/with/space

Writes synthetic chats (`chats.py`) as JSON lines, and starts `halfbyte train` on them twice, with a
tiny model on the CPU for three steps: with no data in our cache, and nothing in the page cache if
that may be dropped (as root), not even the libraries; and then again. The memory is the sum of the
proportional set sizes (PSS, /proc/<pid>/smaps_rollup) of the process and its children, sampled five
times a second, so shared pages count once. The time counts from the start of the command to the
line of step 1.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.chats import Walk, chat  # noqa: E402
from tests.tiny import write_tiny_model  # noqa: E402

from halfbyte.config.options import parse_bytes  # noqa: E402

DISTINCT = 20_000  # chats; a row is one of them, with an id of its own
TOGETHER = 20_000  # rows written together
EVERY = 0.2  # seconds between two samples of the memory
STEPS = 3


def write_rows(path: Path, size: int, *, short: bool) -> int:
    """Write rows until the file has ``size`` bytes; return their number."""
    walk = Walk()
    bodies = [chat(walk, 0, index) for index in range(DISTINCT)]
    if short:  # the first question, cut, and a word as its answer
        for body in bodies:
            asked = body["messages"][0]["content"]
            body["messages"] = [
                {"role": "user", "content": asked[:60]},
                {"role": "assistant", "content": asked.split()[0]},
            ]
    lines = [json.dumps(body)[1:].encode() for body in bodies]
    draw, rows, written = np.random.default_rng(0), 0, 0
    with open(path, "wb") as file:
        while written < size:
            chosen = draw.integers(0, DISTINCT, TOGETHER).tolist()
            part = b"".join(
                b'{"id": %d, %s\n' % (rows + at, lines[one]) for at, one in enumerate(chosen)
            )
            written += file.write(part)
            rows += TOGETHER
        file.flush()
        os.fsync(file.fileno())
    return rows


def drop_page_cache() -> bool:
    """Drop the system's page cache; False if we may not."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, new = [], [root]
    while new:
        found += new
        new = [child for parent in new for child in children.get(parent, [])]
    return found


def proportional_bytes(pid: int) -> int:
    """The proportional set size of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def start(model: Path, data: Path, output: Path, cache: Path) -> dict[str, Any]:
    """Start a run; return seconds to its first step, its memory, and when each line came."""
    command = [sys.executable, "-m", "halfbyte", "train", "--model", str(model)]
    command += ["--data", str(data), "--output", str(output), "--max-steps", str(STEPS)]
    command += ["--device", "cpu", "--samples", "0", "--save-steps", str(STEPS)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT / "src")}
    began, lines, peak, done = time.perf_counter(), [], [0, 0, 0], threading.Event()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:

        def sample() -> None:
            while not done.wait(EVERY):
                sizes = [proportional_bytes(pid) for pid in tree(running.pid)]
                if sum(sizes) > peak[0]:
                    peak[:] = [sum(sizes), sizes[0], len(sizes) - 1]

        sampler = threading.Thread(target=sample)
        sampler.start()
        for line in running.stderr or ():
            lines.append((round(time.perf_counter() - began, 2), line.strip()))
            print(f"{lines[-1][0]:7.2f}  {line.strip()[:150]}", flush=True)
        done.set()
        sampler.join()
    if running.returncode:
        raise SystemExit(f"halfbyte train ended with {running.returncode}")
    first = next(seconds for seconds, line in lines if line.startswith("step 1/"))
    return {
        "seconds_to_first_step": first,
        "peak_pss_bytes": peak[0],
        "of_it_main_process": peak[1],
        "other_processes": peak[2],
        "seconds": round(time.perf_counter() - began, 2),
        "lines": [(seconds, line.replace(str(data.parent), "")) for seconds, line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_bytes, default=20 * 10**9)
    parser.add_argument("--short", action="store_true", help="rows of some 200 bytes")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--model", type=Path, help="default: a tiny random Llama")
    parser.add_argument("--output", type=Path, help="where to write the result, as JSON")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="large-data-", dir=args.directory))
    try:
        data, cache = directory / "rows.jsonl", directory / "cache"
        model = args.model or write_tiny_model(directory / "model")
        rows = write_rows(data, args.size, short=args.short)
        size, load = data.stat().st_size, os.getloadavg()[0]
        print(f"{rows:,} rows, {size / 1e9:.2f} GB; load {load:.1f}", flush=True)
        few = directory / "few.jsonl"
        with open(data, "rb") as every:
            few.write_bytes(b"".join(every.readline() for _ in range(100)))
        start(model, few, directory / "first", cache)  # builds what is built on first use
        dropped = drop_page_cache()
        print(f"the page cache is {'' if dropped else 'not '}dropped", flush=True)
        cold = start(model, data, directory / "cold", cache)
        warm = start(model, data, directory / "warm", cache)
        weights = "adapter_model.safetensors"
        equal = [(directory / name / weights).read_bytes() for name in ("cold", "warm")]
        files = (cache / "halfbyte").rglob("*")
        kept = sum(file.stat().st_blocks * 512 for file in files if file.is_file())
    finally:
        shutil.rmtree(directory)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "rows": rows,
        "bytes": size,
        "page_cache_dropped": dropped,
        "same_adapter": equal[0] == equal[1],
        "kept_bytes": kept,
        "cold": cold,
        "warm": warm,
    }
    for name, found in (("cold", cold), ("warm", warm)):
        print(
            f"{name}: first step after {found['seconds_to_first_step']:.1f} s, peak "
            f"{found['peak_pss_bytes'] / 1e6:,.0f} MB (PSS) in {found['other_processes'] + 1} "
            f"processes, {found['of_it_main_process'] / 1e6:,.0f} MB in the main one"
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
