"""Several processes make the same run as one, and end together when one of them fails.

What users complain of in other trainers with several GPUs, and where it is looked at:

    it crashes in the usual set-up              test_several_processes_make_the_run_of_one
    loss=0 or grad_norm=nan, without a word     the same; test_a_step_that_is_not_finite…
    saving hangs                                test_a_process_that_fails…, test_a_signal…
    it cannot be resumed                        test_three_processes_go_on_where_two_have_stopped
"""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import BETWEEN_STEPS, ConfigError
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.runtime import peers
from halfbyte.runtime.signals import first_signal
from halfbyte.train import data_parallel, processes
from halfbyte.train.run import train
from halfbyte.train.stopping import StopRequest
from tests.processes import forks, in_processes, values
from tests.tiny import write_tiny_model

NAME = "adapter_model.safetensors"
pytestmark = forks


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    """Signs of life come more often, so that tests need not wait for them."""
    monkeypatch.setattr(peers, "_BEAT", 0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), hidden=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """22 rows, so that the last of the steps of an epoch is smaller; of many lengths."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for i in range(22):
        said = "Paris." + " Again." * (7 * i % 11)
        question = {"role": "user", "content": f"What is the capital of France? {i}" * (1 + i % 3)}
        rows.append({"messages": [question, {"role": "assistant", "content": said}]})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config(model, data, output, **options):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "lora_r": 2,
        "compute_dtype": "float32",
        "device": "cpu",
        "samples": 0,
        "ddp_timeout": 20.0,
    }
    return TrainConfig(model=str(model), data=str(data), output=output, **settings | options)


def run(made, **of_program):
    stop = StopRequest()
    with first_signal(stop.on_signal), open_report(made.output, quiet=True) as report:
        return train(made, report, stop, **of_program).final_loss


def journal(output, event):
    return [one for one in read_journal(output / "journal.jsonl") if one["event"] == event]


def log(output, rank):
    return (output / "logs" / f"rank-{rank}.log").read_text()


def same_run(one, other):
    """Losses, norms and adapters are equal up to rounding."""
    for event in ("step", "evaluation"):
        first, second = journal(one, event), journal(other, event)
        assert [e["step"] for e in first] == [e["step"] for e in second]
        for name in ("loss", "grad_norm", "tokens", "supervised_tokens"):
            told = [e[name] for e in first if name in e]
            assert told == pytest.approx([e[name] for e in second if name in e], rel=2e-6)
    adapter, again = load_file(one / NAME), load_file(other / NAME)
    assert adapter.keys() == again.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=2e-5)


VARIANTS = {
    "evaluated": {"counts": (2, 4), "eval_data": True, "eval_steps": 2, "load_best": True},
    "packing": {"counts": (2,), "packing": True, "max_length": 128, "batch_size": 1},
    "dropout, noise, micro-batches of one": {
        "counts": (3,),
        "lora_dropout": 0.2,
        "neftune_noise_alpha": 5.0,
        "max_length": 64,
        "target_modules": "q_proj,v_proj",
    },
    "divided weights": {"counts": (2, 3), "shard": True, "eval_data": True, "eval_steps": 2},
    "fewer examples than processes": {
        "counts": (3,),
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "use_dora": True,
        "optim": "paged_adamw_8bit",
        "paging": "explicit",
        "max_grad_norm": 0.0,
        "modules_to_save": ("norm",),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_several_processes_make_the_run_of_one(model, data, tmp_path, name, monkeypatch):
    options = VARIANTS[name] | ({"eval_data": str(data)} if "eval_data" in VARIANTS[name] else {})
    counts = options.pop("counts")
    if "lora_dropout" in options:  # several parts in a step, which are dealt out whole
        monkeypatch.setattr("halfbyte.engine.packing_check.CPU_PART_TOKENS", 128)
    made = {n: config(model, data, tmp_path / f"run-{n}", **options) for n in (1, *counts)}
    run(made[1].model_copy(update={"shard": False}))
    for count in counts:
        losses = values(in_processes(count, lambda rank: run(made[count])))  # noqa: B023
        assert len(set(losses)) == 1  # the same bits in each
        same_run(made[1].output, made[count].output)
        assert not list(made[count].output.glob(".*"))
        (began,) = journal(made[count].output, "begin")
        assert began["processes"] == count
        assert f"dealt out to {count} processes by tokens" in log(made[count].output, 1)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit"])
def test_dividing_weights_and_state_does_not_change_a_bit(model, data, tmp_path, optim):
    made = {
        shard: config(
            model,
            data,
            tmp_path / f"shard-{shard}",
            shard=shard,
            optim=optim,
            lora_r=128,  # so that factors have the 4096 elements of 8-bit state
        )
        for shard in (False, True)
    }
    losses = [values(in_processes(2, lambda rank, one=one: run(one))) for one in made.values()]
    assert losses[0] == losses[1]
    one, other = (load_file(each.output / NAME) for each in made.values())
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert "once in host memory for 2 processes" in log(made[True].output, 1)


def test_two_machines_divide_the_weights_among_their_own_processes(model, data, tmp_path):
    whole = config(model, data, tmp_path / "whole")
    run(whole)
    made = config(model, data, tmp_path / "run", shard=True)

    def function(rank):
        names = {"GROUP_RANK": rank // 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank % 2}
        os.environ.update({name: str(value) for name, value in names.items()})
        return run(made)

    assert len(set(values(in_processes(4, function)))) == 1
    same_run(whole.output, made.output)


@pytest.mark.parametrize("shard", [False, True])
def test_three_processes_go_on_where_two_have_stopped(
    model, data, tmp_path, signal_handlers, shard
):
    options = {"max_steps": 5, "save_steps": 2, "eval_data": str(data), "eval_steps": 3}
    whole = config(model, data, tmp_path / "whole", **options)
    run(whole)
    made = config(model, data, tmp_path / "run", shard=shard, **options)

    def stopped(rank):
        """The second process gets a signal in its third step, and both stop after it."""
        step, count = LayerEngine.step, [0]

        def stepped(self, *args):
            count[0] += 1
            if rank == 1 and count[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args)

        LayerEngine.step = stepped
        return run(made)

    for ended in in_processes(2, stopped):
        assert ended.kind == "RunStopped", ended
        assert "stopped after step 3 of 5, which is saved" in ended.text
    assert values(in_processes(3, lambda rank: run(made.model_copy(update={"resume": True}))))
    same_run(whole.output, made.output)


class Finishing:
    """Ends a run after an evaluation, of which only the first process tells it."""

    def on_evaluate(self, info):
        return "finish"


def answer_lengths(samples):
    return {"length": float(len(samples))}


def test_callbacks_and_metrics_are_those_of_the_first_process(model, data, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    options = {"max_steps": 6, "eval_data": str(held_out), "eval_steps": 1, "eval_max_samples": 1}
    made = config(model, data, tmp_path / "run", **options)
    program = {"callbacks": [Finishing()], "metrics": [answer_lengths]}
    losses = values(in_processes(2, lambda rank: run(made, **program)))
    assert losses[0] == losses[1]
    assert [one["step"] for one in journal(made.output, "step")] == [1]
    evaluations = journal(made.output, "evaluation")
    assert [one["step"] for one in evaluations] == [1, 1]  # at the end on all rows
    assert [one["metrics"] for one in evaluations] == [{"length": 1.0}, {"length": 3.0}]
    assert "callback" in log(made.output, 1)  # it knows why training ends


# --- faults ---------------------------------------------------------------------------------------


def failing(made, rank, step, fail):
    """A function that makes a run in which a process does something in a step (1-based)."""

    def function(own):
        made_step, count = LayerEngine.step, [0]

        def stepped(self, *args):
            count[0] += 1
            if own == rank and count[0] == step:
                fail()
            return made_step(self, *args)

        LayerEngine.step = stepped
        return run(made)

    return function


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)  # as a process whose machine stands still


def raise_an_error():
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("rank", "fail", "reason"),
    [
        (0, die, "rank 0 died (process "),
        (1, die, "rank 1 died (process "),
        (1, hang, "rank 1 hangs: the others have waited for it for 3 s (--ddp-timeout) in step 3"),
        (0, stop, "rank 0 hangs: the others have waited for it for 3 s (--ddp-timeout) in step 3"),
        (1, raise_an_error, "rank 1 failed: ZeroDivisionError: a bug"),
    ],
)
def test_a_process_that_fails_ends_the_run_with_a_checkpoint(
    model, data, tmp_path, rank, fail, reason
):
    options = {"max_steps": 4, "save_steps": 5, "ddp_timeout": 3.0}
    # Then a part of the optimizer's state was updated by the process that dies.
    made = config(model, data, tmp_path / "run", shard=fail is die and rank == 1, **options)
    began = time.monotonic()
    ended = in_processes(2, failing(made, rank, 3, fail), seconds=20.0)
    assert time.monotonic() - began < 15.0  # also the one that hangs
    for other in {0, 1} - {rank}:
        assert ended[other].kind == "ProcessFailed", ended
        assert reason in ended[other].text
        assert "The run ends: step 2 is saved. To go on: " in ended[other].text
        assert ended[other].text.endswith("--resume")
        if other:
            assert reason in log(made.output, other)
    if rank:
        assert reason in journal(made.output, "stopped")[0]["reason"]
    if fail is raise_an_error:
        assert "ZeroDivisionError: a bug" in log(made.output, rank)
        assert "Traceback" in log(made.output, rank)
    if fail is hang:
        assert reason in log(made.output, rank)
    assert [path.name for path in made.output.glob("checkpoint-*")] == ["checkpoint-2"]
    if fail is die:
        whole = config(model, data, tmp_path / "whole", max_steps=4)
        run(whole)
        # It has the state of a whole step.
        run(made.model_copy(update={"resume": True, "shard": False}))
        same_run(whole.output, made.output)


def test_half_an_update_is_not_saved(model, data, tmp_path):
    made = config(model, data, tmp_path / "run", max_steps=4, save_steps=1, shard=True)

    def function(rank):
        exchange, count = data_parallel.DataParallel.exchange, [0]

        def exchanged(self, parts):
            count[0] += 1
            if rank == 1 and count[0] == 3:
                die()
            exchange(self, parts)

        data_parallel.DataParallel.exchange = exchanged
        return run(made)

    ended, _ = in_processes(2, function, seconds=20.0)
    assert ended.kind == "ProcessFailed", ended
    assert "The run ends: step 2 is saved. To go on: " in ended.text
    assert sorted(path.name for path in made.output.glob("checkpoint-*"))[-1] == "checkpoint-2"


def test_a_signal_of_the_launcher_does_not_prevent_the_checkpoint(
    model, data, tmp_path, signal_handlers
):
    """torchrun sends SIGTERM to all others as soon as one process has ended."""
    made = config(model, data, tmp_path / "run", max_steps=6, save_steps=5)

    def function(rank):
        if rank == 1:
            return failing(made, 1, 3, die)(1)
        made_step, count = LayerEngine.step, [0]

        def stepped(self, *args):
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return made_step(self, *args)

        LayerEngine.step = stepped
        return run(made)

    first, second = in_processes(2, function, seconds=20.0)
    assert second.signal == signal.SIGKILL
    assert first.kind == "ProcessFailed"
    assert "rank 1 died" in first.text
    assert [path.name for path in made.output.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("what", ["data", "code", "base model", "option learning_rate"])
def test_processes_with_another_run_refuse_to_start(model, data, tmp_path, what):
    def function(rank):
        used, trained_on, options = model, data, {}
        if rank == 1 and what == "data":
            trained_on = tmp_path / data.name
            trained_on.write_text(data.read_text().replace("Paris", "Lyon"))
        if rank == 1 and what == "base model":
            used = write_tiny_model(tmp_path / "other", hidden=64)
        if rank == 1 and what == "code":
            processes.code_digest = lambda: "another"
        if what == "option learning_rate":
            options = {"learning_rate": 0.1 * (1 + rank)}
        made = config(used, trained_on, tmp_path / "run", **options)
        # A name is an option, too: here only what is behind it differs.
        plain = {"model": str(model), "data": [str(data)]}
        dumped = TrainConfig.model_dump
        TrainConfig.model_dump = lambda self, **how: dumped(self, **how) | plain
        return run(made)

    ended = in_processes(2, function, seconds=20.0)
    for one in ended:
        assert one.kind == "UserError", ended
        assert "rank 1 does not make the same run as rank 0, so nothing is trained" in one.text
        assert f"It has {what} " in one.text
    assert not (tmp_path / "run").exists()


def test_bad_input_is_said_by_the_first_process_and_ends_all(model, data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"nothing": 1}\n')
    first, second = in_processes(2, lambda rank: run(config(model, bad, tmp_path / "run")))
    assert first.kind == "DataError"
    assert second.kind == "ProcessFailed"
    assert "rank 0 failed: DataError: " in second.text
    assert not (tmp_path / "run").exists()


def test_a_slow_process_is_in_the_journal(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STEPS_TO_TELL", 3)
    made = config(model, data, tmp_path / "run", max_steps=6, logging_steps=2)

    def function(rank):
        step = LayerEngine.step

        def slow(self, *args):
            time.sleep(0.3 * rank)
            return step(self, *args)

        LayerEngine.step = slow
        return run(made)

    values(in_processes(2, function))
    steps = journal(made.output, "step")
    assert [one["step"] for one in steps] == [2, 4, 6]
    assert all(len(one["rank_seconds"]) == 2 for one in steps)
    assert all(one["rank_seconds"][1] > max(0.3, one["rank_seconds"][0]) for one in steps)
    (warning,) = [one for one in journal(made.output, "warning") if one["kind"] == "slow_rank"]
    assert warning["step"] == 4  # the seconds of three steps are known
    assert "rank 1 is slow: " in warning["text"]


def test_a_step_that_is_not_finite_is_left_out_by_all(model, data, tmp_path):
    options = {"max_steps": 4, "on_nonfinite": "rewind", "save_steps": 1}
    made = config(model, data, tmp_path / "run", **options)

    def function(rank):
        step, count = LayerEngine.step, [0]

        def spoilt(self, *args):
            count[0] += 1
            loss = step(self, *args)
            return loss * float("nan") if rank == 1 and count[0] == 3 else loss

        LayerEngine.step = spoilt
        return run(made)

    losses = values(in_processes(2, function))
    assert losses[0] == losses[1]
    assert [one.get("skipped", False) for one in journal(made.output, "step")] == [
        *(False, False),
        *(True, False),
    ]
    assert "Back to the state after step 2" in journal(made.output, "warning")[-1]["text"]


def test_what_needs_a_single_process_is_refused(model, data, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="`gpus` 2 needs as many processes: use `halfbyte train"):
        run(config(model, data, tmp_path / "run", gpus=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="standard input, which only one process can read"):
        processes.processes_of(config(model, "-", tmp_path / "run"))
    routed = config(model, data, tmp_path / "run", router_aux_loss_coef=0.1)
    several = data_parallel.ProcessGroup(0, 2)
    with pytest.raises(ConfigError, match="`router_aux_loss_coef` needs a single process"):
        data_parallel.DataParallel(several, None, [], routed)


def test_another_process_that_fails_counts_as_an_end_between_steps():
    assert "ProcessFailed" in {kind.__name__ for kind in BETWEEN_STEPS}
