"""What is lost when a run is interrupted, the disk becomes full, or a file is truncated.

    python benchmarks/faults.py

`train`, as typed, on a tiny model. Its result without any fault is the reference, with which every
resumed run must agree: the same bytes of the adapter, and each step's loss once in the journal.

    signals     SIGKILL, SIGTERM, SIGINT and SIGHUP at random moments, sometimes twice
    full disk   every operation that needs space is the first to fail, one run for each of them
    truncated   each file that a command reads, cut at several places: one message, or, for the
                newest checkpoint, the one before it is used

A fault must end in one message without a traceback, and leave nothing half-written.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import Row, write

from halfbyte.report.journal import read_journal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny import write_tiny_model

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHIM = Path(__file__).with_name("full_disk.c")
LONGEST_MESSAGE = 2000  # characters


class Outcome(NamedTuple):
    """How a command ended: its exit code (minus the signal, if one ended it) and what it said."""

    code: int
    said: str


class Wrong(Exception):
    """Something was lost, or not said."""


def rows() -> Iterator[dict[str, Any]]:
    """A data set of short conversations."""
    for number in range(96):
        reply = "The capital of France is Paris." + " Again, please." * (number * 7 % 11)
        question = {"role": "user", "content": f"What is the capital of France? {number}"}
        yield {"messages": [question, {"role": "assistant", "content": reply}]}


class Setting:
    """A tiny model, data, and the result of a run without faults.

    Args:
        work: A directory for all of it.
        steps: Steps of a run.
        save_steps: Steps between two checkpoints.
    """

    def __init__(self, work: Path, steps: int, save_steps: int) -> None:
        self.work, self.model, self.data = work, work / "model", work / "train.jsonl"
        self.steps, self.save_steps = steps, save_steps
        work.mkdir()
        write_tiny_model(self.model, layers=1, max_shard_size="100KB")
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        self.reference = work / "reference"
        began = time.monotonic()
        outcome = command(self.train(self.reference))
        self.seconds = time.monotonic() - began
        if outcome.code:
            raise SystemExit(f"the run without faults failed: {outcome}")
        self.expected = result(self.reference)

    def train(self, output: Path, *options: str) -> list[str]:
        """The arguments of the run."""
        words = ["train", f"--model={self.model}", f"--data={self.data}", f"--output={output}"]
        words += [f"--max-steps={self.steps}", f"--save-steps={self.save_steps}", "--batch-size=4"]
        words += ["--gradient-accumulation-steps=2", "--learning-rate=1e-2", "--samples=2"]
        words += ["--target-modules=q_proj,v_proj", "--lora-dropout=0.1", "--device=cpu"]
        return [*words, *options]

    def resume(self, output: Path) -> None:
        """Resume the run in ``output``, which must then be the reference.

        Raises:
            Wrong: It cannot be resumed, or differs.
        """
        outcome = command(self.train(output, "--resume"))
        if outcome.code:
            raise Wrong(f"not resumed: {outcome}")
        self.compare(output)

    def compare(self, output: Path) -> None:
        """Compare a run that has ended with the reference.

        Raises:
            Wrong: They differ, or files of a process that has ended are left behind.
        """
        if result(output) != self.expected:
            raise Wrong("the resumed run differs from the uninterrupted one")
        if partial := [path.name for path in output.rglob("*.partial-*")]:
            raise Wrong(f"left behind: {partial}")


def result(output: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """A run's adapter, and its steps with their losses."""
    steps = [r for r in read_journal(output / "journal.jsonl") if r["event"] == "step"]
    return (
        (output / "adapter_model.safetensors").read_bytes(),
        [(record["step"], record["loss"]) for record in steps],
    )


def one_message(outcome: Outcome, *codes: int) -> None:
    """Check that a command ended with one of these exit codes, and without a traceback.

    Raises:
        Wrong: It did not.
    """
    if outcome.code not in codes or "Traceback" in outcome.said:
        raise Wrong(f"expected exit code {' or '.join(map(str, codes))}: {outcome}")
    last = outcome.said[outcome.said.rfind("halfbyte ") :]
    if outcome.code == 2 and not 0 < len(last) < LONGEST_MESSAGE:
        raise Wrong(f"a message of {len(last)} characters: {last[:300]}")


# --- commands in forked processes, which have imported everything ------------------------------


def import_all() -> None:
    """Import what `train` imports, so that forked processes start at once."""
    from transformers.models.llama import modeling_llama

    from halfbyte.cli.startup import import_transformers

    import_transformers(gpu=False)
    from halfbyte.train import run

    assert modeling_llama
    assert run


def command(
    words: list[str],
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    stop: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Run a command in a fork of this process.

    Args:
        words: Its arguments.
        before: Called in the fork before the command.
        after: Called there after it.
        stop: Called with the process id, beside the command.
    """
    from halfbyte.cli import main

    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            for number in SIGNALS[1:]:  # a background process of a shell would ignore some of them
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            code = main(words)
            after()
            os._exit(code)
        stop(child)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return Outcome(os.waitstatus_to_exitcode(status), said.read())


# --- signals ------------------------------------------------------------------------------------


def steps_in(output: Path) -> int:
    """The last step in the journal."""
    path = output / "journal.jsonl"
    events = read_journal(path) if path.exists() else []
    return max((event["step"] for event in events if event["event"] == "step"), default=0)


def saved_in(output: Path) -> int:
    """The step of the newest checkpoint."""
    found = [int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*")]
    return max(found, default=0)


def interrupt(setting: Setting, output: Path, chance: random.Random) -> Row:
    """Start or resume a run, and signal it at a moment drawn evenly from the time a run takes."""
    kind = chance.choice(SIGNALS)
    twice = kind != signal.SIGKILL and chance.random() < 0.25
    delay, pause = chance.random() * setting.seconds, chance.random() * 0.1

    def stop(process: int) -> None:
        time.sleep(delay)
        for wait in (0, pause)[: 1 + twice]:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, kind)

    outcome = command(setting.train(output, "--resume"), stop=stop)
    steps, saved = steps_in(output), saved_in(output)
    row: Row = {"signal": kind.name, "twice": twice, "after": round(delay, 3)}
    row |= {"code": outcome.code, "steps": steps, "saved": saved}
    try:
        if kind == signal.SIGKILL:
            one_message(outcome, -kind, 0)
        else:  # a second signal ends the process at once
            one_message(outcome, 128 + kind, 0, *[-kind] * twice)
            if not twice and saved != steps:
                raise Wrong(f"{steps} steps were made, the newest checkpoint has {saved}")
        if steps - saved > setting.save_steps:
            raise Wrong(f"{steps - saved} steps are lost")
    except Wrong as wrong:
        row["wrong"] = str(wrong)
    print(row, flush=True)
    return row


def signals(setting: Setting, count: int, seed: int) -> list[Row]:
    """Interrupt runs until ``count`` signals came before their ends; resume each to its end."""
    chance, found, runs = random.Random(seed), list[Row](), 0
    while sum(row["code"] != 0 for row in found) < count:
        output = setting.work / str(runs := runs + 1) / "run"  # a name alike would be no fresh run
        while not found or found[-1]["code"] or not output.exists():
            found.append(interrupt(setting, output, chance))
        try:
            setting.compare(output)
        except Wrong as wrong:
            found[-1]["wrong"] = str(wrong)
        found[-1]["run ended"] = runs
    return found


# --- full disk and truncated files --------------------------------------------------------------


def full_disk(setting: Setting) -> list[Row]:
    """Let each operation that needs space be the first to fail; the next run has space again."""
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.full_disk.argtypes = [ctypes.c_char_p, ctypes.c_long]
    shim.full_disk_count.restype = ctypes.c_long
    tally = setting.work / "tally"

    def attempt(output: Path, allowed: int) -> Outcome:
        output.mkdir()

        def count() -> None:
            tally.write_text(str(shim.full_disk_count()))

        return command(
            setting.train(output), lambda: shim.full_disk(bytes(output), allowed), after=count
        )

    attempt(setting.work / "counted", 10**9)
    total, found = int(tally.read_text()), []
    print(f"{total} operations need space", flush=True)
    for allowed in range(total):
        output = setting.work / f"full-{allowed}"
        outcome = attempt(output, allowed)
        row: Row = {
            "allowed": allowed,
            "of": total,
            "code": outcome.code,
            "saved": saved_in(output),
        }
        try:
            # Without its page a run is whole, and says so.
            one_message(outcome, 0 if "report.html: no space" in outcome.said else 2)
            setting.resume(output)
        except Wrong as wrong:
            row["wrong"] = str(wrong)
        else:
            shutil.rmtree(output)
        print(row, flush=True)
        found.append(row)
    return found


class Cut(NamedTuple):
    """A file to truncate, the command that reads it, and its exit code."""

    path: str
    command: tuple[str, ...]
    code: int = 2


def cuts(setting: Setting) -> list[Cut]:
    """Every kind of file that commands read."""
    shard = sorted(path.name for path in setting.model.glob("*.safetensors"))[0]
    data, out = str(setting.data), "{copy}/out"
    train = ("train", "--model={copy}/model", "--data={copy}/train.jsonl", f"--output={out}")
    train += ("--device=cpu", "--max-steps=2", "--samples=0")
    evaluate = ("eval", "--model={copy}/model", "--adapter={copy}/reference", f"--data={data}")
    resume = tuple(setting.train(Path("{copy}/reference"), "--resume"))
    newest = f"reference/checkpoint-{setting.steps}"
    return [
        *(Cut(f"model/{name}", train) for name in (shard, "config.json", "tokenizer.json")),
        Cut("model/model.safetensors.index.json", train),
        Cut("model/tokenizer_config.json", train),
        Cut("model.gguf", ("eval", "--model={copy}/model.gguf", f"--data={data}")),
        Cut("reference/adapter_model.safetensors", evaluate),
        Cut("reference/adapter_config.json", evaluate),
        Cut("reference/config.yaml", ("train", "{copy}/reference/config.yaml", f"--output={out}")),
        Cut(f"{newest}/adapter_model.safetensors", resume, 0),
        Cut(f"{newest}/optimizer.safetensors", resume, 0),
        Cut(f"{newest}/run_state.json", resume, 0),
        Cut("reference/journal.jsonl", ("report", "{copy}/reference", f"--output={out}.html"), 0),
        Cut("train.jsonl", train, 0),
    ]


def truncated(setting: Setting) -> list[Row]:
    """Cut each file to nothing, to its half, and by one byte."""
    gguf = setting.work / "gguf"
    exported = command(["export", str(setting.model), str(setting.reference), str(gguf)])
    if exported.code:
        raise SystemExit(f"export failed: {exported}")
    shutil.copy(next(gguf.rglob("*.gguf")), setting.work / "model.gguf")
    found = []
    for cut in cuts(setting):
        size = (setting.work / cut.path).stat().st_size
        for left in (0, size // 2, size - 1):
            copy = setting.work / "copy"
            for name in ("model", "reference"):
                shutil.copytree(setting.work / name, copy / name)
            for name in ("train.jsonl", "model.gguf"):
                shutil.copy(setting.work / name, copy / name)
            os.truncate(copy / cut.path, left)
            found.append(_read_cut(setting, cut, left, copy))
            shutil.rmtree(copy)
    return found


def _codes(cut: Cut, left: int) -> set[int]:
    """The exit codes that are right for a file of which ``left`` bytes are left."""
    if cut.path == "train.jsonl":
        return {0 if left else 2}
    # JSON and YAML without their last byte, a line break, are whole.
    return {cut.code, 0} if left and cut.path.endswith(("json", "yaml")) else {cut.code}


def _read_cut(setting: Setting, cut: Cut, left: int, copy: Path) -> Row:
    outcome = command([word.replace("{copy}", str(copy)) for word in cut.command])
    row: Row = {"file": cut.path, "bytes": left, "code": outcome.code}
    resumes = cut.code == 0 and "checkpoint-" in cut.path
    try:
        one_message(outcome, *_codes(cut, left))
        if resumes and result(copy / "reference") != setting.expected:
            raise Wrong("the resumed run differs from the uninterrupted one")
        if outcome.code and (copy / "out").exists() and any((copy / "out").iterdir()):
            raise Wrong(f"left behind: {sorted(path.name for path in (copy / 'out').iterdir())}")
    except Wrong as wrong:
        row["wrong"] = str(wrong)
    row["said"] = outcome.said.replace(str(copy), "").strip().splitlines()[-1:]
    print(row, flush=True)
    return row


def main() -> None:
    """Parse the command line, run the parts, write the rows; exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    parser.add_argument("--part", choices=["signals", "full disk", "truncated"], action="append")
    parser.add_argument("--count", type=int, default=50, help="runs that get a signal")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = args.part or ["signals", "full disk", "truncated"]
    with tempfile.TemporaryDirectory() as scratch:
        if "LD_PRELOAD" not in os.environ:
            shim = Path(scratch, "full_disk.so")
            subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", shim, SHIM, "-ldl"], check=True)
            raise SystemExit(
                subprocess.run(
                    [sys.executable, *sys.argv], env=os.environ | {"LD_PRELOAD": str(shim)}
                ).returncode
            )
        import_all()
        found: dict[str, list[Row]] = {}
        if "signals" in parts:
            found["signals"] = signals(
                Setting(Path(scratch, "long"), 200, 10), args.count, args.seed
            )
        setting = Setting(Path(scratch, "short"), 8, 4)
        import_all()
        if "full disk" in parts:
            found["full disk"] = full_disk(setting)
        if "truncated" in parts:
            found["truncated"] = truncated(setting)
    wrong = {part: [row for row in some if "wrong" in row] for part, some in found.items()}
    for part, some in found.items():
        codes = Counter(row["code"] for row in some)
        print(f"{part}: {len(some)} faults, exit codes {dict(codes)}, {len(wrong[part])} wrong")
    write("faults", args.output, **found)
    raise SystemExit(any(wrong.values()))


if __name__ == "__main__":
    main()
