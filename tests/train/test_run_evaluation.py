"""Evaluations of a run: their cost, what they choose, and that training does not depend on them."""

import itertools
import json
import math
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.checkpoint.run_state import load_run
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError, RunStopped
from halfbyte.linear.lora import adapter_state
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.train import run_evaluation
from halfbyte.train.evaluate import evaluate, evaluate_loss
from halfbyte.train.loading import open_model
from halfbyte.train.run import train
from halfbyte.train.run_evaluation import LEAST_ROWS, TOKEN_SHARE, schedule
from halfbyte.train.stopping import StopRequest
from tests.tiny import write_tiny_model
from tests.train.interrupting import break_off

NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"{n}", "completion": "Paris " * (1 + n % 5)} for n in range(8)]
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Rows that say something else: their loss falls, and rises when the others are learned."""
    rows = [
        {"prompt": f"{n}", "completion": "Rome Paris" if n % 2 else "no, no, no, "}
        for n in range(20, 40)
    ]
    return write(tmp_path_factory.mktemp("other") / "test.jsonl", rows)


def config(model, data, output, **options):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "lora_r": 4,
        "lora_alpha": 32,
        "compute_dtype": "float32",
        "device": "cpu",
        "samples": 0,
    }
    return TrainConfig(model=str(model), data=str(data), output=output, **settings | options)


def run(made, stop=None, **replaced):
    with open_report(made.output, quiet=True) as report:
        for name, method in replaced.items():
            setattr(report, name, method(getattr(report, name)))
        return train(made, report, stop)


def records(output, event):
    return [one for one in read_journal(output / "journal.jsonl") if one["event"] == event]


def evaluations(output):
    keys = ("step", "loss", "best", "rows", "adapter_of_step")
    return [tuple(map(one.get, keys)) for one in records(output, "evaluation")]


def notes(output):
    return [one["text"] for one in records(output, "note")]


def checkpoints(output):
    return sorted(int(path.name[11:]) for path in output.glob("checkpoint-*"))


# --- when, and how much ---------------------------------------------------------------------------


def planned(steps=100, trained=100_000.0, rows=500, tokens=50_000, **options):
    given = {"model": "m", "data": "d", "output": "o", "eval_data": "e"}
    made = TrainConfig.model_validate(given | options)
    return schedule(made, steps=steps, trained_tokens=trained, rows=rows, tokens=tokens)


@pytest.mark.parametrize(
    ("given", "every", "rows"),
    [
        ({"trained": 1e6}, 10, 100),  # ten times a hundred rows: a tenth of the tokens
        ({"trained": 1e7}, 10, 500),  # a long run: all of them
        ({"trained": 1e5}, 34, 33),  # a short one: three times, not ten times ten rows
        ({"trained": 1e4}, None, 500),  # a tiny one: only at the end, on all
        ({"trained": 1e4, "eval_max_samples": 10}, None, 500),
        ({"trained": 1e5, "eval_steps": 100}, 100, 500),  # the last step alone
        ({"trained": 1e6, "eval_max_samples": 200}, 20, 200),
        ({"trained": 1e6, "eval_max_samples": 10}, 10, 10),
        ({"trained": 1e6, "eval_steps": 50}, 50, 500),
        ({"trained": 1e6, "eval_steps": 20}, 20, 200),
        ({"trained": 1e4, "eval_steps": 20}, 20, 32),
        ({"trained": 1e4, "load_best": True}, 10, 32),  # it is asked for
        ({"steps": 3, "trained": 1e4, "load_best": True}, 1, 32),
    ],
)
def test_how_often_and_how_much(given, every, rows):
    found = planned(**given)
    assert (found.every, found.rows) == (every, rows)


@given(
    st.integers(1, 10**5),
    st.floats(100, 1e10),
    st.integers(1, 10**6),
    st.floats(1, 3000),
)
def test_evaluations_cost_no_more_than_their_share(steps, trained, rows, length):
    tokens = max(rows, int(rows * length))
    every, evaluated, share = planned(steps, trained, rows, tokens)
    assert 1 <= evaluated <= rows
    if every is not None:
        times = math.ceil(steps / every)
        assert 1 <= times <= 10
        assert evaluated >= min(rows, LEAST_ROWS)
        assert times * evaluated * tokens / rows == pytest.approx(share * trained)
        assert share <= TOKEN_SHARE * (1 + 1e-9)


def test_a_part_is_evaluated_during_training_and_all_at_the_end(model, data, other, tmp_path):
    options = {"eval_data": str(other), "eval_steps": 4, "eval_max_samples": 5}
    run(config(model, data, tmp_path / "run", **options))
    found = evaluations(tmp_path / "run")
    assert [(step, rows) for step, _, _, rows, _ in found] == [(4, 5), (8, 5), (12, 5), (12, 20)]
    assert found[-1][-1] == 12
    assert [one["of_rows"] for one in records(tmp_path / "run", "evaluation")] == [20] * 4
    start = "evaluation every 4 steps on 5 of 20 held-out rows, always the same: "
    (said,) = [note for note in notes(tmp_path / "run") if note.startswith(start)]
    assert said.endswith("% of the tokens that are trained on; at the end on all")
    # The same rows each time, and in another run.
    run(config(model, data, tmp_path / "again", **options))
    assert evaluations(tmp_path / "again") == found


# --- held out of the data -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Thirty rows with twenty texts."""
    rows = [{"prompt": f"{n % 20}", "completion": "Paris " * (1 + n % 4)} for n in range(30)]
    return write(tmp_path_factory.mktemp("many") / "many.jsonl", rows)


@pytest.fixture(scope="module")
def divided(model, many, tmp_path_factory):
    output = tmp_path_factory.mktemp("divided") / "run"
    run(config(model, many, output, eval_split=0.2, eval_steps=6))
    return output


def test_rows_held_out_are_not_trained_on_and_can_be_evaluated(model, many, divided, tmp_path):
    (record,) = records(divided, "held_out")
    lines = list(map(int, record["lines"]))
    assert len(lines) == 6
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    held_out = [json.loads(line) for line in (divided / "held_out.jsonl").read_text().splitlines()]
    said = [rows[line - 1] for line in lines]
    assert [one["completion"][0]["content"] for one in held_out] == [
        row["completion"] for row in said
    ]
    rest = [row for number, row in enumerate(rows, 1) if number not in lines]
    assert not [row for row in rest if row in said]
    assert any(note.startswith("held out: 6 of 30 rows, with ") for note in notes(divided))
    # The run is the run on a file without them.
    alone = write(tmp_path / "rest.jsonl", rest)
    run(config(model, alone, tmp_path / "run"))
    assert (tmp_path / "run" / NAME).read_bytes() == (divided / NAME).read_bytes()
    opened, tokenizer, _ = open_model(
        str(model), adapter=str(divided), compute_dtype="float32", device="cpu"
    )
    measured = evaluate(opened, tokenizer, divided / "held_out.jsonl", exact_match=False)
    assert measured.loss == pytest.approx(evaluations(divided)[-1][1], rel=1e-6)


def test_the_order_of_the_rows_does_not_matter(model, many, divided, tmp_path):
    rows = many.read_text().splitlines()
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(rows[::-1]))
    run(config(model, turned, tmp_path / "run", eval_split=0.2, max_steps=1))
    first, second = (
        sorted((output / "held_out.jsonl").read_text().splitlines())
        for output in (divided, tmp_path / "run")
    )
    assert first == second


def test_training_does_not_depend_on_evaluations(model, many, divided, tmp_path):
    for name, options in (
        ("often", {"eval_steps": 1, "eval_max_samples": 2}),
        ("never", {}),
    ):
        run(config(model, many, tmp_path / name, eval_split=0.2, **options))
        assert (tmp_path / name / NAME).read_bytes() == (divided / NAME).read_bytes()


def test_a_resumed_run_holds_out_the_same_rows(model, many, divided, tmp_path):
    made = config(model, many, tmp_path / "run", eval_split=0.2, eval_steps=6, save_steps=4)
    break_off(made, 7)
    with pytest.raises(ConfigError, match=r"eval_split was 0\.2, is 0\.3"):
        run(made.model_copy(update={"resume": True, "eval_split": 0.3}))
    # How often it is evaluated may change, since nothing depends on it.
    run(made.model_copy(update={"resume": True, "eval_steps": 5}))
    for name in (NAME, "held_out.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (divided / name).read_bytes()


def test_data_too_small_to_divide_leaves_nothing_behind(model, tmp_path):
    few = write(tmp_path / "few.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(DataError, match="all 4 rows say the same"):
        run(config(model, few, tmp_path / "run", eval_split=0.5))
    assert not (tmp_path / "run").exists()


def test_options_about_evaluations_without_data_for_them_are_refused(model, data, tmp_path):
    with pytest.raises(ConfigError, match="`load_best` needs data to evaluate on"):
        run(config(model, data, tmp_path / "run", load_best=True))
    assert not (tmp_path / "run").exists()


# --- the best -------------------------------------------------------------------------------------

BEST = {"eval_steps": 2, "load_best": True, "save_total_limit": 1, "save_steps": 5}


@pytest.fixture(scope="module")
def best(model, data, other, tmp_path_factory):
    output = tmp_path_factory.mktemp("best") / "run"
    return output, run(config(model, data, output, eval_data=str(other), **BEST))


def test_the_adapter_is_that_of_the_best_evaluation(model, data, other, best, tmp_path):
    output, result = best
    found = evaluations(output)
    losses = {step: loss for step, loss, *_ in found[:6]}
    chosen = min(losses, key=losses.__getitem__)
    assert 2 < chosen < 12  # not trivially the first or the last
    assert (result.adapter_step, result.steps, result.ended) == (chosen, 12, None)
    # The last line is what was written, evaluated.
    assert found[-1] == (12, losses[chosen], None, 20, chosen)
    assert [step for step, _, improved, *_ in found if improved] == [2, chosen]
    assert checkpoints(output) == [chosen, 12]
    written = load_run(output / f"checkpoint-{chosen}").adapter
    opened, tokenizer, _ = open_model(
        str(model), adapter=str(output), compute_dtype="float32", device="cpu"
    )
    state = adapter_state(opened)
    assert all(state[name].equal(tensor) for name, tensor in written.items())
    measured = evaluate(opened, tokenizer, other, exact_match=False)
    assert measured.loss == pytest.approx(losses[chosen], rel=1e-6)
    assert f"the adapter is the best of the run: loss {losses[chosen]:.4f} after step {chosen}" in (
        notes(output)
    )
    (record,) = records(output, "best")
    assert (record["step"], record["value"]) == (chosen, losses[chosen])
    # Without the option it is the run's last adapter, from the same steps.
    run(config(model, data, tmp_path / "last", eval_data=str(other), eval_steps=2))
    assert evaluations(tmp_path / "last")[:6] == found[:6]
    last = load_run(output / "checkpoint-12").adapter
    assert all(
        tensor.equal(last[name])
        for name, tensor in load_run(tmp_path / "last/checkpoint-12").adapter.items()
    )
    assert (tmp_path / "last" / NAME).read_bytes() != (output / NAME).read_bytes()


class Killed(BaseException):
    """As by SIGKILL: nothing is saved after it."""


def at(moment, count):
    """Have a method of the report raise at its n-th call."""

    def replaced(method):
        def called(*args):
            method(*args)
            called.count += 1
            if called.count == count:
                raise Killed

        called.count = 0
        return called

    return {moment: replaced}


@pytest.mark.parametrize(
    ("moment", "count"),
    [("evaluation", 2), ("saved", 2), ("step", 7), ("evaluation", 6)],
)
def test_a_resumed_run_has_the_same_best(model, data, other, best, tmp_path, moment, count):
    output, _ = best
    made = config(model, data, tmp_path / "run", eval_data=str(other), **BEST)
    with pytest.raises(Killed):
        run(made, **at(moment, count))
    result = run(made.model_copy(update={"resume": True}))
    assert (made.output / NAME).read_bytes() == (output / NAME).read_bytes()
    assert result.adapter_step == best[1].adapter_step
    assert checkpoints(made.output) == checkpoints(output)
    known = dict.fromkeys(evaluations(made.output))  # one after the last step may be there twice
    assert list(known) == evaluations(output)


def test_a_finished_run_is_resumed_to_the_same_adapter(model, data, other, best, tmp_path):
    shutil.copytree(best[0], tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    made = config(model, data, tmp_path / "run", eval_data=str(other), resume=True, **BEST)
    assert run(made).adapter_step == best[1].adapter_step
    assert (tmp_path / "run" / NAME).read_bytes() == (best[0] / NAME).read_bytes()
    # Without its checkpoint there is nothing to write, and that is said.
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{best[1].adapter_step}")
    with pytest.raises(CheckpointError, match=r"`load_best`: the best evaluation was after step"):
        run(made)


def test_what_the_best_depends_on_may_not_change(model, data, other, best, tmp_path):
    shutil.copytree(best[0], tmp_path / "run")
    made = config(model, data, tmp_path / "run", eval_data=str(other), resume=True, **BEST)
    with pytest.raises(ConfigError, match=r"eval_steps was 2, is 3"):
        run(made.model_copy(update={"eval_steps": 3}))
    with pytest.raises(ConfigError, match=r"load_best was True, is False"):
        run(made.model_copy(update={"load_best": False}))
    changed = tmp_path / "changed.jsonl"
    changed.write_text(other.read_text().replace("Rome", "Oslo"))
    with pytest.raises(CheckpointError, match="the held-out data is not that of"):
        run(made.model_copy(update={"eval_data": str(changed)}))


def test_an_unknown_metric_is_refused_with_those_there_are(model, data, other, tmp_path):
    made = config(model, data, tmp_path / "run", eval_data=str(other), **BEST)
    with pytest.raises(ConfigError, match="no metric is named 'f1'; there are 'loss', 'perpl"):
        run(made.model_copy(update={"metric_for_best": "f1"}))
    assert not (tmp_path / "run").exists()


# --- early stopping -------------------------------------------------------------------------------

EARLY = BEST | {"early_stopping_patience": 2}


@pytest.mark.parametrize("load_best", [False, True])
def test_training_ends_when_it_no_longer_gets_better(model, data, other, best, tmp_path, load_best):
    output = tmp_path / "run"
    made = config(model, data, output, eval_data=str(other), **EARLY | {"load_best": load_best})
    result = run(made)
    step = best[1].adapter_step
    assert (result.steps, result.adapter_step) == (step + 4, step if load_best else step + 4)
    assert result.ended.startswith("no better evaluation since loss 5.")
    assert result.ended.endswith(f"after step {step}")
    assert evaluations(output)[: step // 2 + 2] == evaluations(best[0])[: step // 2 + 2]
    assert f"training ends after step {step + 4} of 12: {result.ended}" in notes(output)
    (record,) = records(output, "finish")
    assert (record["steps"], record["ended"]) == (step + 4, result.ended)
    if load_best:
        assert (output / NAME).read_bytes() == (best[0] / NAME).read_bytes()
    # It has ended: resuming it makes no further step.
    before = (output / NAME).read_bytes()
    again = run(made.model_copy(update={"resume": True}))
    assert (again.steps, again.ended) == (result.steps, result.ended)
    assert (output / NAME).read_bytes() == before
    assert len(records(output, "step")) == result.steps


@pytest.mark.parametrize(("moment", "count"), [("step", 5), ("evaluation", 4)])
def test_a_resumed_run_ends_where_it_would(model, data, other, best, tmp_path, moment, count):
    made = config(model, data, tmp_path / "run", eval_data=str(other), **EARLY)
    with pytest.raises(Killed):
        run(made, **at(moment, count))
    result = run(made.model_copy(update={"resume": True}))
    assert result.steps == best[1].adapter_step + 4
    assert (made.output / NAME).read_bytes() == (best[0] / NAME).read_bytes()


# --- what else can happen in an evaluation --------------------------------------------------------


def at_evaluation(patch, what):
    """Have ``what`` called in place of each evaluation: with its number from 1, and with it."""
    numbers = itertools.count(1)

    def evaluated(*args, **options):
        return what(next(numbers), lambda: evaluate_loss(*args, **options))

    patch.setattr(run_evaluation, "evaluate_loss", evaluated)


@pytest.mark.parametrize("count", [2, 6])
def test_a_request_to_stop_breaks_an_evaluation_off(
    model, data, other, best, tmp_path, monkeypatch, count
):
    made, stop = config(model, data, tmp_path / "run", eval_data=str(other), **BEST), StopRequest()

    def asked(number, evaluated):
        if number == count:
            stop.request()
        return evaluated()

    with monkeypatch.context() as patch:
        at_evaluation(patch, asked)
        with pytest.raises(RunStopped):
            run(made, stop)
    assert len(evaluations(made.output)) == count - 1
    run(made.model_copy(update={"resume": True}))
    assert (made.output / NAME).read_bytes() == (best[0] / NAME).read_bytes()
    assert evaluations(made.output) == evaluations(best[0])
    assert checkpoints(made.output) == checkpoints(best[0])


def test_an_evaluation_without_memory_is_left_out_unless_the_result_needs_it(
    model, data, other, best, tmp_path, monkeypatch
):
    def short_of_memory(number, evaluated):
        if number >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TB")
        return evaluated()

    options = {"eval_data": str(other), "eval_steps": 2}
    made = config(model, data, tmp_path / "asked", **options, load_best=True, save_steps=5)
    with monkeypatch.context() as patch:
        at_evaluation(patch, short_of_memory)
        with pytest.raises(OutOfMemoryError, match="the evaluation after step 6 does not fit"):
            run(made)
        assert max(checkpoints(made.output)) == 6  # the steps that were made are saved
        at_evaluation(patch, short_of_memory)
        run(config(model, data, tmp_path / "run", **options))
    assert [step for step, *_ in evaluations(tmp_path / "run")] == [2, 4]
    said = [note for note in notes(tmp_path / "run") if note.startswith("no evaluation after step")]
    assert len(said) == 4
    run(made.model_copy(update={"resume": True}))
    assert (made.output / NAME).read_bytes() == (best[0] / NAME).read_bytes()


def test_a_loss_that_is_not_finite_is_not_the_best(model, data, other, tmp_path, monkeypatch):
    at_evaluation(monkeypatch, lambda number, evaluated: (math.nan, evaluated()[1]))
    output = tmp_path / "run"
    options = {"eval_data": str(other), "eval_steps": 3, "load_best": True}
    result = run(config(model, data, output, **options))
    assert result.adapter_step == 12
    assert "the adapter is that of the last step: no evaluation was finite" in notes(output)


def test_the_page_and_a_comparison_have_the_loss_of_what_was_written(best):
    from halfbyte.report.runs import read_run

    read = read_run(best[0])
    assert read.finished
    assert read.last("held_out") == evaluations(best[0])[-1][1]
    assert os.path.getsize(best[0] / "report.html") > 1000
