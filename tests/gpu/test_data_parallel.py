"""All GPUs make the run of one, and end together when a process dies or stands still.

Everything is done as a person does it: ``halfbyte train --gpus 2``, in processes that get signals.
What each test has measured is printed, so that ``pytest -s`` gives the numbers for LAB.md::

    python -m pytest -s -p no:cacheprovider tests/gpu/test_data_parallel.py -k run_of_one
    python -m pytest -s -p no:cacheprovider tests/gpu/test_data_parallel.py -k "not run_of_one"

HALFBYTE_TEST_DEVICE=cpu makes the same runs with gloo, to try the tests themselves.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.report.journal import read_journal
from tests.cli.test_main import with_source
from tests.tiny import write_tiny_model

DEVICE = os.environ.get("HALFBYTE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]
ADAPTER = "adapter_model.safetensors"
TIMEOUT = 15  # seconds that a run waits for a process
ALL = max(2, torch.cuda.device_count())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=4, hidden=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    drawn = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for i in range(203):  # so that the last step of an epoch is smaller
        said = "Please send three boxes of nails. " * drawn.randint(1, 40)
        asked = {"role": "user", "content": f"What is the capital of France? {i}"}
        rows.append({"messages": [asked, {"role": "assistant", "content": said}]})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def start(model, data, output, *options):
    words = {
        "--model": model,
        "--data": data,
        "--output": output,
        "--device": DEVICE,
        "--batch-size": 4,
        "--gradient-accumulation-steps": 4,
        "--lora-r": 8,
        "--learning-rate": 1e-3,
        "--samples": 0,
        "--ddp-timeout": TIMEOUT,
    }
    given = [str(word) for pair in words.items() for word in pair]
    return subprocess.Popen(
        [sys.executable, "-m", "halfbyte", "train", *given, *map(str, options)],
        env=with_source(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process, code, seconds=120):
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    return said


def steps(output):
    path = output / "journal.jsonl"
    return [e for e in read_journal(path) if e["event"] == "step"] if path.exists() else []


def ranks(launcher):
    """The processes of a run, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        rank = [one for one in environment if one.startswith(b"RANK=")]
        if parent == launcher.pid and rank:
            found[int(rank[0][5:])] = int(path.name)
    return found


def after_steps(output, count, launcher):
    """Wait until a run has made so many steps."""
    until = time.monotonic() + 90
    while len(steps(output)) < count:
        assert time.monotonic() < until, "no steps"
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.1)


# dtype, options, the largest difference of a loss, and of an element of the adapter
RUNS = [
    ("float32", [], 2e-5, 1e-3),
    ("float32", ["--packing", "--max-length", "512", "--batch-size", "2"], 2e-5, 1e-3),
    ("bfloat16", [], 2e-2, 5e-3),
    ("bfloat16", ["--lora-dropout", "0.1", "--optim", "paged_adamw_8bit"], 2e-2, 5e-3),
]


@pytest.mark.parametrize(("dtype", "options", "loss", "element"), RUNS)
def test_all_gpus_make_the_run_of_one(model, data, tmp_path, dtype, options, loss, element):
    usual = ["--compute-dtype", dtype, "--epochs", "1", *options]
    begun = {n: start(model, data, tmp_path / f"{n}", *usual, "--gpus", n) for n in (1, ALL)}
    for process in begun.values():
        end(process, 0)
    one, several = (steps(tmp_path / f"{n}") for n in (1, ALL))
    assert [e["step"] for e in one] == [e["step"] for e in several]
    assert [e["supervised_tokens"] for e in one] == [e["supervised_tokens"] for e in several]
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, several, strict=True))
    first, second = (load_file(tmp_path / f"{n}" / ADAPTER) for n in (1, ALL))
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    print(f"{dtype} {options}: {len(one)} steps, loss {off:.2e}, adapter {largest:.2e}")
    assert off <= loss
    assert largest <= element
    assert all(len(e["rank_seconds"]) == ALL for e in several[1:])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, ALL - 1])
def test_a_process_that_dies_or_stands_still_ends_the_run(model, data, tmp_path, number, rank):
    output = tmp_path / "run"
    usual = ["--epochs", "10000", "--save-steps", "1000000"]
    process = start(model, data, output, *usual, "--gpus", ALL)
    after_steps(output, 3, process)
    began = time.monotonic()
    os.kill(ranks(process)[rank], number)
    said = end(process, 1, seconds=100)
    seconds = time.monotonic() - began
    print(f"rank {rank}, {signal.Signals(number).name}: ended after {seconds:.1f} s")
    assert seconds < (40 if number == signal.SIGKILL else TIMEOUT + 45)
    reason = f"rank {rank} {'died' if number == signal.SIGKILL else 'hangs'}"
    if rank:
        assert reason in said
        stopped = [e for e in read_journal(output / "journal.jsonl") if e["event"] == "stopped"]
        assert reason in stopped[0]["reason"]
    else:
        assert reason in (output / "logs" / "rank-1.log").read_text()
    (saved,) = output.glob("checkpoint-*")
    again = int(saved.name.rpartition("-")[2]) + 2
    process = start(model, data, output, *usual, "--resume", "--gpus", ALL // 2)
    after_steps(output, again - 1, process)  # fewer GPUs go on
    process.send_signal(signal.SIGINT)
    end(process, 130)


def test_ctrl_c_saves_once_and_all_gpus_go_on(model, data, tmp_path):
    output = tmp_path / "run"
    usual = ["--epochs", "10000", "--save-steps", "1000000", "--gpus", ALL]
    for _ in range(2):
        made = len(steps(output))
        process = start(model, data, output, *usual, *(["--resume"] if made else []))
        after_steps(output, made + 3, process)
        process.send_signal(signal.SIGINT)
        said = end(process, 130)
        assert said.count("which is saved. To go on") == 1
        assert "Traceback" not in said


@pytest.mark.parametrize("weights", ["gpu", "host"])
def test_divided_weights_make_the_same_run(model, data, tmp_path, weights):
    usual = ["--max-steps", 6, "--compute-dtype", "float32", "--gpus", ALL]
    shard = ["--shard", "--weights", weights]
    runs = {"whole": usual, "divided": [*usual, *shard]}
    begun = {name: start(model, data, tmp_path / name, *words) for name, words in runs.items()}
    for process in begun.values():
        end(process, 0)
    whole, divided = (steps(tmp_path / name) for name in runs)
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, divided, strict=True))
    first, second = (load_file(tmp_path / name / ADAPTER) for name in runs)
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    print(f"divided, {weights}: loss {off:.2e}, adapter {largest:.2e}")
    assert off <= 2e-5
    assert largest <= 2e-4
