"""What a run writes down about itself, and the page that comes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.report.runs import read_run
from halfbyte.train.evaluate import evaluate
from halfbyte.train.loading import open_model
from halfbyte.train.run import train
from tests.tiny import CHATML, write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    for name, count in (("train", 12), ("held", 5)):
        rows = [{"prompt": f"{name} {i}?", "completion": "Paris."} for i in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def run(base: Path, output: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(base),
        "data": str(base / "train.jsonl"),
        "eval_data": str(base / "held.jsonl"),
        "output": output,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "device": "cpu",
    }
    config = TrainConfig(**settings | options)
    with open_report(output, quiet=True) as report:
        train(config, report)
    return config


def lines(output: Path, event: str) -> list[dict[str, Any]]:
    return [one for one in read_journal(output / "journal.jsonl") if one["event"] == event]


def test_a_journal_tells_the_whole_story(base: Path, tmp_path: Path) -> None:
    config = run(base, tmp_path / "r", samples=2)
    [begin], [loaded] = lines(tmp_path / "r", "begin"), lines(tmp_path / "r", "loaded")
    assert begin["config"] == config.model_dump(mode="json")
    assert begin["versions"]["torch"] == torch.__version__
    assert {"model", "lora_r", "samples"} <= set(begin["given"])
    assert "seed" not in begin["given"]
    assert begin["data_verdict"]["usable"] == 12
    assert begin["held_out_verdict"]["usable"] == 5
    assert begin["data_check"]["looked_at"] == begin["data_check"]["rows"] == 12
    for step in lines(tmp_path / "r", "step"):
        parts = [step[f"{part}_seconds"] for part in ("forward", "loss", "backward", "update")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= step["seconds"]
        assert step["data_seconds"] > 0  # on a CPU before the step, on a GPU during the one before
    assert 0 < loaded["memory_bytes"] <= loaded["peak_memory_bytes"]
    before, after = lines(tmp_path / "r", "samples")
    assert (before["step"], after["step"]) == (0, 3)
    # Spread over the held-out rows, the same ones both times.
    prompts = [one["prompt"] for one in before["samples"]]
    assert prompts == ["held 0?", "held 2?"] == [one["prompt"] for one in after["samples"]]
    assert all(one["expected"] == "Paris." for one in before["samples"])
    read = read_run(tmp_path / "r")
    assert set(read.seconds) == {
        "loading the model",
        "preparing batches",
        "forward",
        "loss",
        "backward",
        "optimizer",
        "rest of a step",
        "held-out evaluation",
        "sample answers",
    }
    assert read.predicted
    assert (tmp_path / "r" / "report.html").stat().st_size > 10_000


def test_samples_change_no_bit_of_a_run_and_can_be_left_out(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "with", samples=3, lora_dropout=0.1)
    run(base, tmp_path / "without", samples=0, lora_dropout=0.1)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "with" / weights).read_bytes() == (
        (tmp_path / "without" / weights).read_bytes()
    )
    assert len(lines(tmp_path / "with", "samples")) == 2
    assert lines(tmp_path / "without", "samples") == []


def test_a_resumed_run_keeps_what_was_answered_before(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "r"
    run(base, output, save_steps=2, lr_scheduler_type="constant")
    before = lines(output, "samples")[0]
    (output / "checkpoint-3").rename(tmp_path / "away")
    run(base, output, save_steps=2, lr_scheduler_type="constant", resume=True)
    found = lines(output, "samples")
    assert [one["step"] for one in found] == [0, 3]
    assert found[0] == before
    assert read_run(output).samples[0]["answers"].keys() == {0, 3}


def test_without_held_out_data_samples_are_of_the_training_data(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "r", eval_data=None, samples=1)
    assert lines(tmp_path / "r", "samples")[0]["samples"][0]["prompt"] == "train 0?"


def test_a_row_that_is_several_examples_is_one_sample_and_one_case(
    base: Path, tmp_path: Path
) -> None:
    model, file = tmp_path / "model", tmp_path / "turns.jsonl"
    shutil.copytree(base, model)
    ends_thinking = "{{ '</think>' if loop.last and message['role'] == 'assistant' }}"
    template = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' +",
        "{{ '<|im_start|>' + message['role'] + '\n' }}" + ends_thinking + "{{",
    )
    (model / "chat_template.jinja").write_text(template)
    roles = ("user", "assistant")
    turns = [{"role": role, "content": f"{role} {at}"} for at in (0, 1) for role in roles]
    file.write_text("\n".join([json.dumps({"messages": turns})] * 2))
    files = {"model": str(model), "data": str(file), "eval_data": None}
    run(base, tmp_path / "r", **files, max_steps=1, samples=4)
    [begin] = lines(tmp_path / "r", "begin")
    counts = [begin["data_verdict"][name] for name in ("rows", "usable", "examples", "split")]
    assert (begin["examples"], counts) == (4, [2, 2, 4, 2])
    said = "2 rows (lines 1, 2) became 4 examples"
    assert any(line.startswith(said) for line in begin["data_verdict"]["lines"])
    assert said in (tmp_path / "r" / "report.html").read_text()
    samples = lines(tmp_path / "r", "samples")[0]["samples"]
    assert [(one["prompt"], one["expected"]) for one in samples] == [("user 1", "assistant 1")] * 2
    opened, tokenizer, _ = open_model(str(model), device="cpu")
    measured = evaluate(opened, tokenizer, str(file), max_new_tokens=2)
    assert (measured.cases, measured.data["examples"]) == (2, 4)
    assert [one["expected"] for one in measured.samples] == ["assistant 1"] * 2


def test_every_rejected_row_is_in_the_file_the_journal_and_the_page(
    base: Path, tmp_path: Path
) -> None:
    good, hostile = '{"text": "Paris."}', '{"messages": [{"role": "<script>\u202e"}]}'
    (tmp_path / "train.jsonl").write_text("\n".join([good, "{", hostile, good, '{"a": 1}']))
    (tmp_path / "held.jsonl").write_text("\n".join([good, '{"text": " "}']))
    data, held = str(tmp_path / "train.jsonl"), str(tmp_path / "held.jsonl")
    output = tmp_path / "r"
    run(base, output, data=data, eval_data=held, max_steps=1, samples=0)
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [(one["source"], one["line"], one["row"]) for one in rejected] == [
        (data, "2", "{"),
        (data, "3", hostile),
        (data, "5", '{"a": 1}'),
        (held, "2", '{"text": " "}'),
    ]
    [begin] = lines(output, "begin")
    verdict = begin["data_verdict"]["rejected"]
    assert {one["reason"]: one["lines"] for one in verdict} == {
        "malformed JSON": ["2"],
        "no 'text'": ["5"],
        rejected[1]["reason"]: ["3"],
    }
    assert "\u202e" not in (output / "rejected.jsonl").read_text()
    said = [note["text"] for note in lines(output, "note")]
    assert f"every row left out, with its line and the reason: {output}/rejected.jsonl" in said
    page = (output / "report.html").read_text()
    assert "rows that were left out" in page
    assert "&lt;script&gt;" in page
    assert "<script>'" not in page


def test_without_rejected_rows_there_is_no_file_of_them(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "r"
    output.mkdir()
    (output / "journal.jsonl").write_text('{"event": "begin"}\n')
    (output / "rejected.jsonl").write_text("of a run that was killed before its first step\n")
    run(base, output, max_steps=1, samples=0)
    assert not (output / "rejected.jsonl").exists()
