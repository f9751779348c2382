"""A program's own metrics: what they get, what they may return, and what follows from them."""

import pytest
import torch

from halfbyte.errors import ConfigError, RunStopped
from halfbyte.linear.lora import adapter_parameters
from halfbyte.report.journal import read_journal
from halfbyte.train import metrics
from halfbyte.train.evaluate import evaluate
from halfbyte.train.loading import open_model
from halfbyte.train.metrics import measured, require_metrics
from halfbyte.train.stopping import StopRequest
from tests.tiny import write_tiny_model
from tests.train.test_callbacks import NAME, TEST, TRAIN, config, run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32)


@pytest.fixture(scope="module")
def opened(path):
    return open_model(str(path), quant="none", compute_dtype="float32", device="cpu")[:2]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(metrics, "LONGEST_ANSWER", 4)


SAMPLES = [
    {"prompt": "a", "expected": "b", "got": "b"},
    {"prompt": "c", "expected": "d", "got": ""},
]


def test_they_get_samples_and_the_model_if_they_ask(opened):
    seen = {}

    def exact(samples):
        return {"exact": sum(one["got"] == one["expected"] for one in samples) / len(samples)}

    def of_model(samples, tokenizer, model):
        seen.update(model=model, tokenizer=tokenizer, grad=torch.is_grad_enabled())
        samples[0]["got"] = "changed"
        return {"a": torch.tensor(2.0), "b": 3, "nan": float("nan")}

    found = measured([of_model, exact], SAMPLES, *opened)
    assert found["exact"] == 0.5
    assert (found["a"], found["b"]) == (2.0, 3.0)
    assert found["nan"] != found["nan"]
    assert (seen["model"], seen["tokenizer"]) == opened


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, r"the metric own returned 0.5: expected a dict of numbers by name"),
        (None, "returned None: expected a dict"),
        ({"f1": "high"}, "returned 'f1': 'high'; expected a name and a number"),
        ({3: 1.0}, "returned 3: 1.0; expected a name"),
        ({"loss": 1.0}, "returned 'loss', which is taken"),
    ],
)
def test_anything_but_numbers_by_name_is_refused(opened, returned, message):
    def own(samples):
        return returned

    with pytest.raises(ConfigError, match=message):
        measured([own], SAMPLES, *opened)


def test_two_of_one_name_and_what_is_no_function_are_refused(opened):
    with pytest.raises(ConfigError, match="the metric <lambda> returned 'a', which is taken"):
        measured([lambda samples: {"a": 1}] * 2, SAMPLES, *opened)
    for wrong in ([3], print):
        with pytest.raises(ConfigError, match="metrics: expected a list of functions"):
            require_metrics(wrong)


@pytest.mark.parametrize("fails", [False, True])
def test_one_that_changes_a_weight_ends_the_run_without_saving_it(path, tmp_path, fails):
    def own(samples, model):
        (weight, *_) = adapter_parameters(model).values()
        weight.mul_(2.0)
        return {}["a"] if fails else {"a": 1.0}

    made = config(path, tmp_path / "run", save_steps=2)
    message = "the metric own has changed weights of the model. The newest checkpoint is the last"
    with pytest.raises(ConfigError, match=message):
        run(made, metrics=[own])
    assert {one.name for one in made.output.glob("checkpoint-*")} == {"checkpoint-2"}


def test_evaluate_measures_them_on_rows_of_a_program(opened):
    model, tokenizer = opened

    def own(samples):
        return {
            "rows": len(samples),
            "right": sum(one["expected"] == "Rome Paris" for one in samples),
        }

    result = evaluate(model, tokenizer, TEST, metrics=[own], max_new_tokens=3, exact_match=False)
    assert result.metrics == {"rows": 8.0, "right": 8.0}
    assert (result.exact_match, result.cases) == (None, 8)
    assert result.data["source"] == "data"


def test_the_best_evaluation_can_be_best_in_one(path, tmp_path):
    values = iter([3.0, 7.0, 5.0, 6.0, 7.0, 7.5])

    def own(samples):
        assert [one["expected"] for one in samples] == [row["completion"] for row in TEST]
        return {"f1": next(values)}

    options = {"max_steps": 4, "eval_steps": 1, "load_best": True, "metric_for_best": "f1"}
    made = config(path, tmp_path / "run", **options)
    result = run(made, metrics=[own])
    assert result.adapter_step == 2
    records = read_journal(made.output / "journal.jsonl")
    found = [one["metrics"]["f1"] for one in records if one["event"] == "evaluation"]
    assert found == [3.0, 7.0, 5.0, 6.0, 7.0]
    assert (made.output / NAME).read_bytes() == (made.output / "checkpoint-2" / NAME).read_bytes()
    other = config(path, tmp_path / "other", **options | {"metric_for_best": "f2"})
    with pytest.raises(ConfigError, match=r"no metric is named 'f2'; there are .*, 'f1'$"):
        run(other, metrics=[lambda samples: {"f1": 1.0}])
    assert (tmp_path / "other/checkpoint-1").is_dir()


def test_a_request_to_stop_does_not_wait_for_all_answers(path, tmp_path, monkeypatch):
    made, stop, answers = config(path, tmp_path / "run"), StopRequest(), []

    def answered(model, tokenizer, rows, *, progress, **options):
        for number in range(len(rows)):
            if (number, len(answers)) == (3, 11):  # in the second evaluation
                stop.request()
            answers.append(number)
            progress(number + 1, len(rows))
        return [{"prompt": "", "expected": "", "got": ""}] * len(rows)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "answered", answered)
        with pytest.raises(RunStopped, match="after step 6 of 6"):
            run(made, stop=stop, metrics=[lambda samples: {"a": 1.0}])
    assert len(answers) == 8 + 4
    assert run(made.model_copy(update={"resume": True})).steps == 6


def test_they_need_held_out_data(path, tmp_path):
    made = config(path, tmp_path / "run", eval_steps=None)
    with pytest.raises(ConfigError, match="metrics: expected held-out data to measure them on"):
        run(made, metrics=[len], eval_data=None)
    split = made.model_copy(update={"eval_split": 0.5})
    with pytest.raises(ConfigError, match="`eval_split` cannot be combined with eval_data"):
        run(split)
    assert run(split, eval_data=None, train_data=TRAIN).steps == 6
