"""``halfbyte train --gpus N`` starts processes that fail, and end, as a single one does."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfbyte import cli
from halfbyte.cli import several_gpus
from halfbyte.errors import ProcessFailed
from tests.cli.test_main import with_source
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32)


def command(model, data, output, *more):
    given = ["--model", model, "--data", data, "--output", output, "--device", "cpu"]
    small = ["--max-steps", "1", "--samples", "0", "--lora-r", "2", "--compute-dtype", "float32"]
    return ["train", *map(str, [*given, *small, *more])]


def started(*words):
    return subprocess.run(
        [sys.executable, *words],
        env=with_source() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_bad_data_is_one_message(model, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    argv = command(model, tmp_path / "bad.jsonl", tmp_path / "run", "--gpus", "2")
    done = started("-m", "halfbyte", *argv)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("no row is in a known format") == 1
    said = [line for line in done.stderr.splitlines() if "Traceback" in line or "FAILED" in line]
    assert said == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_processes_too(model, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": "Paris " * n}) + "\n" for n in range(1, 6)))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "halfbyte"]
    done = started(*launcher, *command(model, data, tmp_path / "run", "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1  # of the first process alone
    assert "dealt out to 2 processes by tokens" in done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "dealt out to 2 processes" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_more_gpus_than_there_are(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    argv = ["train", "--model", str(model), "--data", "x", "--output", str(tmp_path), "--gpus", "4"]
    assert cli.main(argv) == 2
    assert "`gpus` 4: torch finds 1 on this machine" in capsys.readouterr().err


def test_processes_do_not_start_processes(monkeypatch):
    made = SimpleNamespace(gpus=2)
    assert several_gpus.starts_processes(made)
    assert not several_gpus.starts_processes(SimpleNamespace(gpus=None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not several_gpus.starts_processes(made)


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({0: 2, 1: -15}, 2, ""),
        ({1: 1, 0: 143}, 143, ""),
        ({1: -9}, 1, ""),
        (
            {0: -9, 1: 1},
            1,
            "rank 0 was killed by SIGKILL; what the others saw of it is in out/logs",
        ),
    ],
)
def test_the_exit_code_is_that_of_a_single_process(codes, code, said, capsys):
    failures = {rank: SimpleNamespace(exitcode=one) for rank, one in codes.items()}
    assert several_gpus._code(failures, Path("out")) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, 2])
def test_a_failure_of_another_process_has_its_exit_code(code, monkeypatch, capsys):
    def fail(argv):
        raise ProcessFailed("rank 1 failed: DataError: bad", 1, code)

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == "halfbyte train: rank 1 failed: DataError: bad\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == ""  # the first process says it
