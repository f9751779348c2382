"""Variants, their runs, what is not done again, and what happens when a run fails.

The processes here are a stand-in that writes a journal; one test, in the end, trains.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.cli.compare import CompareOptions, _evaluation
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError, Interrupted
from halfbyte.report.journal import read_journal
from halfbyte.report.runs import read_run
from halfbyte.runtime.signals import SIGNALS, first_signal, interrupt
from halfbyte.tools import compare
from halfbyte.tools.compare import Job, jobs, parse_variants, run
from tests.tiny import write_tiny_model

STAND_IN = """
import json, os, pathlib, signal, sys
lines = dict(line.split(": ", 1) for line in open(sys.argv[1]).read().splitlines() if ": " in line)
output = pathlib.Path(lines["output"])
with open(output.with_name("calls"), "a") as calls:
    calls.write(output.name + "\\n")
how = lines["data"]
if how == "wrong":
    print("a note", file=sys.stderr)
    sys.exit(print("halfbyte train: no such data\\n  at all", file=sys.stderr) or 2)
if how == "bug":
    print("Traceback\\ntorch.OutOfMemoryError: CUDA\\nlast words", file=sys.stderr)
    sys.exit(1)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
output.mkdir(parents=True, exist_ok=True)
if how == "slow":
    import time
    def save(number, _):
        (output / "saved").write_text(str(number))
        if lines["lora_r"] != "1":
            sys.exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, save)
    (output / "ready").touch()
    time.sleep(300)
steps = [{"event": "step", "step": i, "loss": 1.0, "tokens": 9, "seconds": 1} for i in (1, 2)]
events = [{"event": "begin", "total_steps": 2}, *steps, {"event": "finish", "steps": 2}]
(output / "journal.jsonl").write_text("".join(json.dumps(e) + "\\n" for e in events))
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, known in before.items():
        signal.signal(number, known)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    return ("stand_in",)


def laid_out(
    output: Path,
    module: tuple[str, ...] = (),
    names: tuple[str, ...] = ("lora", "qlora"),
    seeds: tuple[int, ...] = (0, 1),
    **given: Any,
) -> list[Job]:
    given = {"model": "m", "data": "d"} | given
    return jobs(
        parse_variants(names), seeds, given, output, evaluation=lambda config: (), module=module
    )


def test_variants_are_words_and_options() -> None:
    found = parse_variants(["lora", "qlora+r=64", "fp4+no-double-quant", "learning-rate=1e-3"])
    assert [variant.options for variant in found] == [
        {"quant": "none"},
        {"quant": "nf4", "lora_r": "64"},
        {"quant": "fp4", "double_quant": False},
        {"learning_rate": "1e-3"},
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lira"], "'lira' is not known; expected lora, qlora, fp4, no-double-quant"),
        (["lora_rr=3"], "unknown option `lora_rr`; did you mean `lora_r`?"),
        (["lora", "lora"], "'lora' is given twice"),
        ([], "names nothing"),
    ],
)
def test_wrong_variants(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_variants(names)


def test_runs_differ_in_variant_and_seed_alone_and_seeds_are_outside(tmp_path: Path) -> None:
    found = laid_out(tmp_path, lora_r=4)
    assert [(job.variant, job.config.seed) for job in found] == [
        ("lora", 0),
        ("qlora", 0),
        ("lora", 1),
        ("qlora", 1),
    ]
    assert [job.config.quant for job in found[:2]] == ["none", "nf4"]
    assert {job.config.lora_r for job in found} == {4}
    assert found[1].config.output == tmp_path / "qlora" / "seed-0"
    with pytest.raises(ConfigError, match="`lora_r`: expected more than 0, got '0'"):
        laid_out(tmp_path, names=("r=0",))


def test_rows_that_a_run_left_out_are_counted(tmp_path: Path) -> None:
    [job] = laid_out(tmp_path, names=("lora",), seeds=(0,))
    job.config.output.mkdir(parents=True)
    begin = {"event": "begin", "held_out_verdict": None}
    said = f"3 rows left out: {job.config.output}/rejected.jsonl"
    for usable, expected in ((9, said), (12, None)):
        line = json.dumps(begin | {"data_verdict": {"rows": 12, "usable": usable}})
        (job.config.output / "journal.jsonl").write_text(line + "\n")
        assert compare.rows_left_out(job) == expected


def test_a_run_and_its_evaluation_are_one_process(tmp_path: Path) -> None:
    words = ("--model", "m", "--adapter", "a")
    [job] = laid_out(tmp_path, ("halfbyte", "train"), names=("lora",), seeds=(0,))
    assert compare._words(job, trained=False) == ["halfbyte", "train", str(job.file)]
    job = replace(job, evaluation=words)
    module, commands = compare._words(job, trained=False)
    assert module == "halfbyte.cli.series"
    evaluation = ["eval", *words, "--json"]
    assert json.loads(commands) == [["train", str(job.file)], evaluation]
    # One that was trained before is only evaluated.
    assert compare._words(job, trained=True) == ["halfbyte", *evaluation]


def test_a_run_is_evaluated_on_the_rows_it_held_out(tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": "m", "data": "d", "output": tmp_path}
    job = TrainConfig(model="m", data="d", output=tmp_path / "lora/seed-0", eval_split=0.1)
    words = _evaluation(CompareOptions(**common, eval_split=0.1), job)
    assert f"--data={job.output / 'held_out.jsonl'}" in words
    words = _evaluation(CompareOptions(**common, eval_data="e.jsonl"), job)
    assert "--data=e.jsonl" in words
    assert _evaluation(CompareOptions(**common), job) == ()


def test_what_is_finished_is_not_run_again(tmp_path: Path, stand_in: tuple[str]) -> None:
    seen: list[tuple[int, int]] = []
    for job in laid_out(tmp_path / "cmp", stand_in):
        result = run(job, lambda done, total: seen.append((done, total)))
        assert result.tokens_per_second == 9.0
    assert seen[-1] == (2, 2)
    calls = tmp_path / "cmp" / "lora" / "calls"
    assert calls.read_text() == "seed-0\nseed-1\n"
    # A third seed, later: only that.
    for job in laid_out(tmp_path / "cmp", stand_in, seeds=(0, 1, 2)):
        run(job)
    assert calls.read_text() == "seed-0\nseed-1\nseed-2\n"


def test_other_options_in_the_same_place_are_refused(tmp_path: Path, stand_in: tuple[str]) -> None:
    for job in laid_out(tmp_path, stand_in, seeds=(0,)):
        run(job)
    with pytest.raises(ConfigError, match=r"other options.*\n  lora_r was 16, is 8"):
        laid_out(tmp_path, stand_in, seeds=(0,), lora_r=8)


def test_wrong_input_stops_everything_with_the_runs_own_words(
    tmp_path: Path, stand_in: tuple[str]
) -> None:
    [job] = laid_out(tmp_path, stand_in, names=("lora",), seeds=(0,), data="wrong")
    with pytest.raises(ConfigError) as error:
        run(job)
    assert str(error.value) == "lora: no such data\n  at all"
    [mended] = laid_out(tmp_path, stand_in, names=("lora",), seeds=(0,), data="d")
    assert run(mended).failure is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bug", "torch.OutOfMemoryError: CUDA; see "),
        ("killed", "it was killed by SIGKILL, as happens when memory runs out; see "),
    ],
)
def test_a_run_that_dies_is_a_result_that_says_so(
    tmp_path: Path, stand_in: tuple[str], how: str, message: str
) -> None:
    [job] = laid_out(tmp_path, stand_in, names=("lora",), seeds=(0,), data=how)
    result = run(job)
    assert result.failure is not None
    assert result.failure.startswith(message)
    assert job.finished() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_the_run_save_before_the_comparison_ends(
    tmp_path: Path,
    stand_in: tuple[str],
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    [job] = laid_out(tmp_path, stand_in, names=("lora",), seeds=(0,), data="slow")

    def send(*_: int) -> None:
        if (job.config.output / "ready").exists():
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught, first_signal(interrupt):
        run(job, send)
    assert caught.value.signal == number
    assert (job.config.output / "saved").read_text() == str(int(number))
    assert "The same command goes on from there" in caplog.text


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, stand_in: tuple[str]) -> None:
    [job] = laid_out(tmp_path, stand_in, names=("lora",), seeds=(0,), data="slow", lora_r=1)

    def send_twice() -> None:
        saved, deadline = job.config.output / "saved", time.monotonic() + 100
        while not saved.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def send(*_: int) -> None:
        if (job.config.output / "ready").exists():
            threading.Thread(target=send_twice).start()
            os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    with pytest.raises(Interrupted), first_signal(interrupt):
        run(job, send)
    assert time.monotonic() - began < 200  # it would sleep for five minutes


# --- the command ---------------------------------------------------------------------------------


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--output {tmp_path / 'out'}"
    for line, message in (
        (f"compare {out}", "`model` and `data` missing"),
        (
            f"compare --model m --data d --seed 3 --quant nf4 {out}",
            "`quant`, `seed`: use `variants`",
        ),
        (f"compare --shape llama2-7b --model m {out}", "`shape` cannot be combined with"),
        (f"compare --model m --data d --seeds 0,x {out}", "`seeds`: expected a whole number"),
        (f"compare --model m --data d --variants q {out}", "'q' is not known"),
        (f"compare --model m --adapter a {out}", "`adapter` needs `eval_data`"),
        (f"compare --shape llama2-7b --adapter a --eval-data d {out}", "`shape` cannot be"),
        (f"compare --model m --adapter no --eval-data {__file__} {out}", "no: "),
        (f"compare --model nowhere.gguf --data d {out}", "lora: nowhere.gguf does not exist"),
    ):
        assert cli.main(line.split()) == 2
        assert message in capsys.readouterr().err


def test_a_failure_is_written_and_ends_with_1(
    tmp_path: Path,
    stand_in: tuple[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "jobs", lambda *a, **k: laid_out(tmp_path / "o", stand_in))
    line = f"compare --model m --data d --output {tmp_path / 'o'}"
    assert cli.main(line.split()) == 0
    (tmp_path / "o" / "lora" / "seed-0" / "journal.jsonl").unlink()
    monkeypatch.setattr(compare, "finished_run", lambda *a, **k: None)
    monkeypatch.setattr(
        compare, "jobs", lambda *a, **k: laid_out(tmp_path / "p", stand_in, data="killed")
    )
    capsys.readouterr()
    assert cli.main([*line.split(), "--json"]) == 1
    out, err = capsys.readouterr()
    assert "SIGKILL" in json.loads(out)["runs"][0]["failure"]
    assert "some runs have no result:\n  lora, seed 0: it was killed by SIGKILL" in err
    assert "SIGKILL" in (tmp_path / "o" / "compare.html").read_text()


def test_random_weights_of_a_shape(tmp_path: Path) -> None:
    from halfbyte.tools.synthetic_model import main

    file = tmp_path / "run.yaml"
    shape = "smollm2-135m,hidden_size=64,intermediate_size=128,num_hidden_layers=2,vocab_size=200"
    shape += ",num_attention_heads=4,num_key_value_heads=2"
    settings = {"model": f"shape:{shape}", "data": "random", "output": str(tmp_path / "r")}
    settings |= {"batch_size": 2, "max_length": 16, "max_steps": 3, "lora_r": 4, "device": "cpu"}
    settings |= {"gradient_accumulation_steps": 2}
    file.write_text(json.dumps(settings))
    assert main(str(file)) == 0
    found = read_run(tmp_path / "r")
    assert found.finished
    assert found.steps == 3
    steps = [line for line in read_journal(tmp_path / "r" / "journal.jsonl") if "tokens" in line]
    assert [step["tokens"] for step in steps] == [64, 64, 64]
    # Tied: the embedding once in 16 or 32 bits, the linears in half a byte and their scales.
    assert 200 * 64 * 2 < found.begin["base_bytes"] < 200 * 64 * 4 + 2 * 64 * 64 * 10
    file.write_text(json.dumps(settings | {"model": "shape:llama9", "output": str(tmp_path / "s")}))
    assert main(str(file)) == 2
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["compare.html", "compare.json"])
def test_results_of_somebody_else_are_not_replaced(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    words = ["compare", "--model", "m", "--data", "d", "--output", str(tmp_path)]
    assert cli.main(words) == 2
    assert "so it is not replaced" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.slow
def test_the_whole_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Number {i}?", "completion": f"{i}."} for i in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    line = f"compare --model {model} --data {data} --eval-data {data} --output {tmp_path / 'cmp'} "
    line += "--max-steps 3 --batch-size 2 --gradient-accumulation-steps 1 --lora-r 4 --device cpu "
    line += "--max-new-tokens 4 --json"
    capsys.readouterr()
    assert cli.main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["variant"] for one in found["runs"]] == ["lora", "qlora"]
    lora, qlora = found["runs"]
    assert lora["base_bytes"] > 1.5 * qlora["base_bytes"]
    assert lora["adapter_bytes"] == qlora["adapter_bytes"] > 10_000
    assert 0 < lora["load_peak"] <= lora["train_peak"]
    assert abs(lora["held_out_loss"] / qlora["held_out_loss"] - 1) < 0.1
    assert lora["exact_match"] == 0.0
    assert found["sentence"].startswith("Against lora, qlora takes")
    assert json.loads((tmp_path / "cmp" / "compare.json").read_text()) == found
    assert "Against lora, qlora takes" in (tmp_path / "cmp" / "compare.html").read_text()

    # An adapter that exists is evaluated alone: here one of these runs.
    adapter = tmp_path / "cmp" / "qlora" / "seed-0"
    line = (
        f"compare --model {model} --adapter {adapter} --eval-data {data} --output {tmp_path / 'x'} "
    )
    assert cli.main((line + "--device cpu --max-new-tokens 4 --json").split()) == 0
    [again] = json.loads(capsys.readouterr().out)["runs"]
    assert again["variant"] == "qlora/seed-0"
    assert abs(again["held_out_loss"] - qlora["held_out_loss"]) < 1e-6
    same = ("exact_match", "adapter_bytes", "base_bytes", "train_peak", "tokens_per_second")
    assert [again[name] for name in same] == [qlora[name] for name in same]


def test_variants_are_not_uploaded(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--model", "m", "--data", "d", "--output", "o", "--push-to-hub", "a/b"]
    assert cli.main(words) == 2
    assert "upload the adapter you choose with `halfbyte push`" in capsys.readouterr().err
