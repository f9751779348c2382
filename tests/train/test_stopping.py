"""A run that is asked to stop finishes its step and saves; resumed, it is the run it would be."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from halfbyte import cli
from halfbyte.config.data_sources import name_of
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import Interrupted, RunStopped
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.runtime.signals import first_signal
from halfbyte.train.run import train
from halfbyte.train.stopping import StopRequest
from tests.cli.test_main import with_source
from tests.tiny import write_tiny_model

NAME = "adapter_model.safetensors"


pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}", "completion": "Paris " * (1 + n % 5)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model, data, output, **options):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 4,
        "eval_data": str(data),
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "lora_r": 2,
        "lora_dropout": 0.1,
        "compute_dtype": "float32",
        "device": "cpu",
        "samples": 0,
    }
    return TrainConfig(model=str(model), data=str(data), output=output, **settings | options)


def run(made, stop=None, **replaced):
    """Train, with some methods of the report replaced; a signal is a request."""
    stop = stop or StopRequest()
    with first_signal(stop.on_signal), open_report(made.output, quiet=True) as report:
        for name, method in replaced.items():
            setattr(report, name, method(getattr(report, name)))
        return train(made, report, stop)


def of_run(output, event):
    """The numbers of all records of an event, without times and memory."""
    return [
        (one["step"], one["loss"], one.get("grad_norm"), one.get("learning_rate"))
        for one in read_journal(output / "journal.jsonl")
        if one["event"] == event
    ]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    run(config(model, data, output))
    return output


def same_run(one, other):
    assert (one / NAME).read_bytes() == (other / NAME).read_bytes()
    assert of_run(one, "step") == of_run(other, "step")
    assert of_run(one, "evaluation") == of_run(other, "evaluation")


def send(number):
    os.kill(os.getpid(), number)


# --- in a step, between steps, in an evaluation ---------------------------------------------------


def in_step(number, monkeypatch, kind):
    """Send a signal in the middle of a step (1-based)."""
    step = LayerEngine.step

    def stepped(self, *args):
        stepped.count += 1
        if stepped.count == number:
            send(kind)
        return step(self, *args)

    stepped.count = 0
    monkeypatch.setattr(LayerEngine, "step", stepped)


@pytest.mark.parametrize(("step", "kind"), [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_signal_in_a_step(model, data, whole, tmp_path, monkeypatch, step, kind):
    made = config(model, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        in_step(step, patch, kind)
        with pytest.raises(RunStopped, match=f"after step {step} of 6, which is saved") as caught:
            run(made)
    assert caught.value.signal == kind
    assert f"checkpoint-{step}" in os.listdir(made.output)
    *_, record = read_journal(made.output / "journal.jsonl")
    assert record["event"] == "stopped"
    assert record["reason"] == str(caught.value)
    run(made.model_copy(update={"resume": True}))
    same_run(made.output, whole)


def test_it_is_said_at_once_what_happens(model, data, tmp_path, monkeypatch):
    said, told = threading.Event(), []
    in_step(2, monkeypatch, signal.SIGINT)
    step = LayerEngine.step

    def waits(self, *args):
        loss = step(self, *args)
        assert stop.requested == said.wait(20 if stop.requested else 0)  # before the step ends
        return loss

    def tell(text):
        told.append(text)
        said.set()

    monkeypatch.setattr(LayerEngine, "step", waits)
    stop = StopRequest()
    with pytest.raises(RunStopped):
        run(config(model, data, tmp_path / "run"), stop, stopping=lambda _: tell)
    assert told == ["stopping: step 2 is finished and saved first; a second signal ends at once"]


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_signal_between_steps(model, data, whole, tmp_path, step):
    """Also after one that is evaluated or saved anyway, and after the last one."""
    made = config(model, data, tmp_path / "run")

    def signals_after(tell):
        def told(record):
            tell(record)
            if record["step"] == step:
                send(signal.SIGTERM)

        return told

    with pytest.raises(RunStopped, match=f"after step {step}"):
        run(made, step=signals_after)
    assert not (made.output / NAME).exists()
    run(made.model_copy(update={"resume": True}))
    same_run(made.output, whole)


def test_an_evaluation_is_broken_off_and_made_when_the_run_goes_on(
    model, data, whole, tmp_path, monkeypatch
):
    made = config(model, data, tmp_path / "run")
    loss = LayerEngine.loss

    def signals(self, *args):
        if (made.output / "journal.jsonl").exists() and of_run(made.output, "step"):
            send(signal.SIGTERM)
        return loss(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LayerEngine, "loss", signals)
        with pytest.raises(RunStopped, match="after step 3 of 6"):
            run(made)
    assert of_run(made.output, "evaluation") == []
    run(made.model_copy(update={"resume": True}))
    same_run(made.output, whole)


def test_after_the_last_step_it_ends_at_once_and_can_be_finished(model, data, whole, tmp_path):
    made = config(model, data, tmp_path / "run")

    def signals(tell):
        def saved(path):
            tell(path)
            if path == made.output:
                send(signal.SIGTERM)

        return saved

    with pytest.raises(Interrupted):
        run(made, saved=signals)
    *_, note, record = read_journal(made.output / "journal.jsonl")
    assert note["text"].startswith("all steps are saved; to finish the run: ")
    assert record["reason"] == "interrupted"
    # As if it had been killed while it wrote the adapter.
    (made.output / NAME).unlink()
    run(made.model_copy(update={"resume": True}))
    assert (made.output / NAME).read_bytes() == (whole / NAME).read_bytes()


def test_before_the_first_step_it_ends_at_once_and_leaves_nothing(model, data, tmp_path):
    def signals(task):
        send(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(config(model, data, tmp_path / "run"), task=lambda _: signals)
    assert not (tmp_path / "run").exists()


# --- without signals ------------------------------------------------------------------------------


def test_a_program_stops_a_run_from_another_thread(model, data, whole, tmp_path):
    made, stop, ended = config(model, data, tmp_path / "run"), StopRequest(), []

    def stops_after_two(tell):
        def told(record):
            tell(record)
            if record["step"] == 2:
                asking = threading.Thread(target=stop.request)
                asking.start()
                asking.join()

        return told

    def work():
        with pytest.raises(RunStopped, match="after step 2") as caught:
            run(made, stop, step=stops_after_two)
        ended.append(caught.value.signal)

    before = signal.getsignal(signal.SIGTERM)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert ended == [None]
    assert signal.getsignal(signal.SIGTERM) == before
    run(made.model_copy(update={"resume": True}))
    same_run(made.output, whole)


def test_a_run_asked_before_its_first_step_makes_none(model, data, tmp_path):
    stop = StopRequest()
    stop.request()
    with pytest.raises(RunStopped, match="stopped before its first step"):
        run(config(model, data, tmp_path / "run"), stop)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# --- the command line -----------------------------------------------------------------------------


def words(made):
    options = {"model", "data", "output", "eval_data", "eval_steps", "max_steps", "save_steps"}
    options |= {"batch_size", "gradient_accumulation_steps", "learning_rate", "lora_r", "device"}
    options |= {"lora_dropout", "compute_dtype", "samples"}
    sources = {name: name_of(getattr(made, name)) for name in ("data", "eval_data")}
    values = {name: sources.get(name, getattr(made, name)) for name in sorted(options)}
    return ["train", *(w for name, value in values.items() for w in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    ("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_exit_codes(model, data, tmp_path, monkeypatch, capsys, kind, code):
    in_step(1, monkeypatch, kind)
    assert cli.main(words(config(model, data, tmp_path / "run"))) == code
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_that_is_printed_goes_on(model, data, whole, tmp_path, monkeypatch, capsys):
    made = config(model, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        in_step(5, patch, signal.SIGINT)
        assert cli.main(words(made)) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("halfbyte train: stopped after step 5 of 6, which is saved. To go on: ")
    program, _, arguments = last.partition("To go on: ")[2].partition(" train ")
    assert program
    assert cli.main(["train", *shlex.split(arguments)]) == 0
    same_run(made.output, whole)


def test_a_real_process_ends_with_143_and_goes_on_where_it_was(model, data, tmp_path):
    """It is signalled at whatever moment the journal shows a step."""
    made = config(model, data, tmp_path / "run", max_steps=400, eval_steps=200, save_steps=400)
    process = subprocess.Popen(
        [sys.executable, "-m", "halfbyte", *words(made)],
        env=with_source(),
        stderr=subprocess.PIPE,
        text=True,
    )
    journal, deadline = made.output / "journal.jsonl", time.monotonic() + 120
    while not (journal.exists() and b'"event": "step"' in journal.read_bytes()):
        assert time.monotonic() < deadline, "no step after two minutes"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 143, errors
    step = int(re.search(r"stopped after step (\d+) of 400", errors)[1])
    assert os.listdir(made.output).count(f"checkpoint-{step}") == 1
    assert [one[0] for one in of_run(made.output, "step")] == list(range(1, step + 1))
    assert "Traceback" not in errors
    assert not [name for name in os.listdir(made.output) if "partial" in name]
