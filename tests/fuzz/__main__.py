"""``python -m tests.fuzz``: fuzz some or all targets, or repeat an input that failed."""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FAILURES = Path("fuzz-failures")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if an input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="time for all targets together")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="inputs for each target")
    parser.add_argument("--target", action="append", help="one target; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="inputs are a function of it")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--file", type=Path, help="an input: what one target does with it")
    args = parser.parse_args(argv)

    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    from tests.fuzz.targets import TARGETS

    unknown = sorted({*(args.target or ())} - TARGETS.keys())
    if unknown:
        parser.error(f"unknown target {unknown[0]}; expected one of {', '.join(TARGETS)}")
    chosen = {name: TARGETS[name] for name in args.target or TARGETS}
    if args.file is not None:
        return _repeat(chosen, args.file, parser)
    return _campaign(chosen, args)


def _repeat(chosen: dict, file: Path, parser: argparse.ArgumentParser) -> int:
    from tests.fuzz.examine import examine, prepare

    if len(chosen) != 1:
        parser.error("--file needs one --target")
    [target] = chosen.values()
    data = file.read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        prepare(target, Path(directory))
        failure = examine(target, Path(directory), data)
    print("nothing is wrong" if failure is None else f"{failure.kind}\n{failure.details}")
    return failure is not None


def _campaign(chosen: dict, args: argparse.Namespace) -> int:
    from tests.fuzz.campaign import run

    shares, failed, total, began = sum(t.share for t in chosen.values()), 0, 0, time.monotonic()
    for name, target in chosen.items():
        start = time.monotonic()
        outcome = run(
            name,
            target,
            seed=args.seed,
            seconds=args.seconds * target.share / shares,
            inputs=max(1, int(args.inputs * target.share)),
            processes=args.processes,
        )
        total += outcome.inputs
        failed += len(outcome.found)
        spent = time.monotonic() - start
        print(f"{name:<18} {outcome.inputs:>7,} inputs  {spent:6.1f} s", flush=True)
        for found in outcome.found.values():
            FAILURES.mkdir(exist_ok=True)
            digest = hashlib.sha256(found.data).hexdigest()[:12]
            path = FAILURES / f"{name}-{digest}"
            path.write_bytes(found.data)
            print(f"  {found.count} x {found.failure.kind}, first in input {found.index}")
            print(f"    python -m tests.fuzz --target {name} --file {path}", flush=True)
    print(f"{total:,} inputs, {failed} failures, {time.monotonic() - began:.0f} s")
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
