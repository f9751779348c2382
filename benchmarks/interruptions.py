"""Interrupts a run at random moments, resumes it, and compares it with the uninterrupted one.

    python benchmarks/interruptions.py --model MODEL --data train.jsonl [--count 50]

Each interruption is a signal (SIGINT, SIGTERM, SIGHUP), two of them, or SIGKILL, at a moment drawn
evenly from the time a run takes, so also while it loads, saves or writes its report. A run is
resumed until it ends by itself. Reported: exit codes, and whether the adapter has the same bytes,
and the journal the same losses, as those of the run that was left alone.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

from halfbyte import cli
from halfbyte.report.journal import read_journal
from halfbyte.train import run as _run  # noqa: F401 (imported before processes are forked)

KINDS = {
    "SIGINT": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "SIGHUP": [signal.SIGHUP],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGKILL": [signal.SIGKILL],
}
BETWEEN_TWO = 0.02  # seconds


def train(words: list[str], log: Path, delay: float | None, signals: list[int]) -> int:
    """Train in a process of its own; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os._exit(cli.main(words))
    if delay is not None:
        time.sleep(delay)
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            time.sleep(BETWEEN_TWO)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(output: Path) -> tuple[bytes, list[object]]:
    """The adapter's bytes, and the steps of the journal as far as they do not vary."""
    steps = [one for one in read_journal(output / "journal.jsonl") if one["event"] == "step"]
    fixed = [[one["step"], one["loss"], one["grad_norm"], one["learning_rate"]] for one in steps]
    return (output / "adapter_model.safetensors").read_bytes(), fixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=50, help="interruptions")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where the result goes, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, codes = random.Random(options.seed), Counter[str]()
    runs = same = tracebacks = 0
    with tempfile.TemporaryDirectory() as directory:
        words = ["train", "--model", options.model, "--data", options.data, "--resume"]
        words += ["--max-steps", str(options.steps), "--save-steps", "7", "--device", "cpu"]
        words += ["--batch-size", "2", "--gradient-accumulation-steps", "2", "--lora-r", "4"]
        words += ["--lora-dropout", "0.1", "--samples", "0", "--eval-data", options.data]
        words += ["--eval-steps", "15", "--learning-rate", "0.01"]
        whole, log = Path(directory, "whole", "run"), Path(directory, "log")
        began = time.monotonic()
        if code := train([*words, "--output", str(whole)], log, None, []):
            raise SystemExit(f"the run itself ends with {code}:\n{log.read_text()}")
        seconds, wanted = time.monotonic() - began, outcome(whole)
        while sum(codes.values()) < options.count:
            output, runs = Path(directory, f"{runs}", "run"), runs + 1
            done = None
            while done != 0:
                kind = draw.choice(list(KINDS))
                done = train(
                    [*words, "--output", str(output)], log, draw.uniform(0, seconds), KINDS[kind]
                )
                codes[f"{kind}: {done}"] += 1
            same += outcome(output) == wanted
        tracebacks = log.read_text(errors="replace").count("Traceback")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "model": Path(options.model).name,
        "steps": options.steps,
        "seconds_of_a_run": round(seconds, 2),
        "interruptions": sum(codes.values()),
        "exit_codes": dict(sorted(codes.items())),
        "runs": runs,
        "runs_identical_to_the_uninterrupted_one": same,
        "tracebacks": tracebacks,
    }
    print(json.dumps(result, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    if same < runs or tracebacks:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
