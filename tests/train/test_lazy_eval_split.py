"""``eval_split`` of data that is encoded while training: no text is in both parts."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from halfbyte.checkpoint.run_state import latest_run
from halfbyte.data.row_encoder import RowEncoder
from halfbyte.errors import ConfigError, DataError
from halfbyte.report import open_report
from halfbyte.train.run_data import RunData
from tests.data.test_row_encoder import talk
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.train.interrupting import break_off
from tests.train.test_growing_data import (  # noqa: F401
    adapter,
    large,
    losses,
    model,
    planned,
    rejected,
    same,
)
from tests.train.test_run import journal, run

ROWS = 60
KINDS = 20  # different texts


def said(line):
    """What a row says, without case and white space: an oracle that shares no code with ours."""
    row = json.loads(line)
    return "|".join("".join(one["content"].split()).lower() for one in row["messages"])


def shouted(row):
    for message in row["messages"]:
        message["content"] = "  " + message["content"].upper().replace(" ", "\n  ")
    return row


@pytest.fixture
def lines():
    """Each text three times, once in capitals and with other white space; some are rejected."""
    rows = [shouted(talk(at % KINDS)) if at >= 40 else talk(at % KINDS) for at in range(ROWS)]
    for at in (7, 19, 33):
        rows[at] = {"messages": [{"role": "user", "content": "?"}]}
    return [json.dumps(row) for row in rows]


@pytest.fixture
def data(tmp_path, lines):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


def opened(made, output, step=0, progress=None):
    """The data of a run, begun."""
    tokenizer = tiny_tokenizer()
    output.mkdir(exist_ok=True)
    with open_report(output, quiet=True) as report:
        found = RunData(made, tokenizer, tiny_llama(tokenizer).config, report)
        found.begin(output, step, progress or {})
    return found


def trained_on(found):
    """The lines of all rows that the steps of a run have."""
    numbers = []
    for step in range(found.plan.total):
        found.plan[step]
        numbers += [int(line) for batch in found.lines(step) for line in batch]
    return numbers


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_text_is_in_both_parts(model, data, lines, tmp_path, packing, seed):  # noqa: F811
    made = planned(
        model, data, tmp_path / "a", max_steps=None, epochs=3, eval_split=6, seed=seed,
        packing=packing,
    )  # fmt: skip
    found = opened(made, tmp_path / "a")
    held_out = {said(lines[int(row.line) - 1]) for row, _ in found.held_out.cases}
    numbers = trained_on(found)
    trained = {said(lines[number - 1]) for number in numbers}
    assert 4 <= len(held_out) <= 6
    assert not held_out & trained
    # All others are trained on, also those with the texts of nothing that is held out.
    usable = {said(line) for line in lines if len(json.loads(line)["messages"]) > 1}
    assert trained == usable - held_out
    sample = {said(lines[int(row.line) - 1]) for row, _ in found.dataset.cases}
    assert sample
    assert sample <= trained
    equal = [line for line in lines if said(line) in held_out]
    report = found.state(found.plan.total)["data_report"]["counts"]
    assert report["_held_out"] == len(equal)
    assert report["_usable"] == ROWS - 3 - len(equal)
    found.close()


def test_an_epoch_has_steps_for_the_rows_that_are_left_and_all_is_told(
    model,  # noqa: F811
    data,
    lines,
    tmp_path,
):
    output = tmp_path / "run"
    options = {"max_steps": None, "epochs": 1.5, "eval_split": 0.1}
    run(planned(model, data, output, load_best=True, early_stopping_patience=9, **options))
    events = journal(output)
    [begin] = [e for e in events if e["event"] == "begin"]
    [held_out] = [e for e in events if e["event"] == "held_out"]
    written = [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]
    originals = [json.loads(lines[int(line) - 1]) for line in held_out["lines"]]
    assert [row["messages"] for row in written] == [row["messages"] for row in originals]
    assert len(written) == 6  # of 60; none of those is rejected
    assert begin["total_steps"] == 21  # 1.5 times 54 rows, four a step
    assert begin["held_out_verdict"]["usable"] == 6
    texts = {said(json.dumps(row)) for row in written}
    equal = sum(said(line) in texts for line in lines)
    [*_, last] = [e for e in events if e["event"] == "data"]
    assert (last["held_out"], last["rows"], last["usable"]) == (equal, ROWS - equal, 57 - equal)
    notes = [e["text"] for e in events if e["event"] == "note"]
    different = f"with {len(texts)} different texts; rows with the text of one of these"
    assert sum("held out: 6 of 60 rows, " + different in note for note in notes) == 1
    told = f"left out for `eval_split`: {equal} rows, held out or with the text of a row that is"
    assert told in notes
    assert any(e["event"] == "evaluation" for e in events)
    assert sorted(rejected(output)) == [
        (str(at + 1), "no assistant turn to learn") for at in (19, 33, 7)
    ]


def test_a_resumed_run_is_the_run_with_the_cache_and_without(
    model,  # noqa: F811
    data,
    tmp_path,
):
    options = {"eval_split": 0.1, "load_best": True, "max_steps": 21}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(planned(model, data, whole, **options))
    break_off(planned(model, data, parts, cache_data=False, **options), 6)
    break_off(planned(model, data, parts, resume=True, **options), 15)
    assert latest_run(parts).name == "checkpoint-12"
    for changed in ({"eval_split": 0.2}, {"seed": 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(changed))} was"):
            run(planned(model, data, parts, resume=True, **(options | changed)))
    run(planned(model, data, parts, resume=True, cache_data=False, **options))
    assert same(adapter(whole), adapter(parts))
    assert losses(whole) == losses(parts)
    assert (whole / "held_out.jsonl").read_bytes() == (parts / "held_out.jsonl").read_bytes()
    last = [[e for e in journal(one) if e["event"] == "data"][-1] for one in (whole, parts)]
    for event in last:
        del event["time"]
    assert last[0] == last[1]


def test_a_second_start_takes_all_from_the_cache(model, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("halfbyte.train.growing_data.SEVERAL_FROM", 0)
    options = {"eval_split": 0.1, "max_steps": 21}
    run(planned(model, data, tmp_path / "one", **options))
    monkeypatch.setattr(RowEncoder, "_submit", None)
    run(planned(model, data, tmp_path / "two", **options))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert same(one, two)


def test_no_more_are_held_out_than_are_worth_encoding(
    model,  # noqa: F811
    data,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("halfbyte.train.growing_data.MOST_HELD_OUT", 4)
    run(planned(model, data, tmp_path / "run", max_steps=2, eval_split=0.5))
    notes = [e["text"] for e in journal(tmp_path / "run") if e["event"] == "note"]
    [note] = [note for note in notes if note.startswith("`eval_split` asks")]
    assert "asks for 30 rows, of which 4 are held out" in note
    assert len((tmp_path / "run" / "held_out.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (60, "eval_split 60 would hold out 60 of 60 rows: none would be left"),
        (59, "is left to train on: 16 are held out by eval_split, or have the text"),
    ],
)
def test_something_must_be_left_to_train_on(
    model,  # noqa: F811
    tmp_path,
    wanted,
    message,
):
    data = tmp_path / "same.jsonl"
    data.write_text("\n".join([json.dumps(talk(1))] * ROWS))
    with pytest.raises(DataError, match=message):
        run(planned(model, data, tmp_path / "run", eval_split=wanted))
    assert not (tmp_path / "run").exists()


def test_held_out_rows_none_of_which_is_usable_are_an_error(
    model,  # noqa: F811
    tmp_path,
):
    rows = [json.dumps({"messages": []})] * (ROWS - 1) + [json.dumps(talk(1))]
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"rows held out by `eval_split` of .*none of the 3 rows"):
        run(planned(model, data, tmp_path / "run", eval_split=3))


def test_rows_of_weighted_sources_are_held_out_of_all(model, data, lines, tmp_path):  # noqa: F811
    other = tmp_path / "other.jsonl"
    own = [json.dumps(talk(at)) for at in range(100, 120)]
    other.write_text("\n".join([*own, lines[0]]))
    made = planned(model, data, tmp_path / "run", max_steps=None, epochs=2, eval_split=20)
    made = made.model_copy(update={"data": (f"{data}:1", f"{other}:3")})
    found = opened(made, tmp_path / "run")
    by_name = {"train.jsonl": lines, "other.jsonl": [*own, lines[0]]}

    def of(line):
        name, _, number = line.rpartition(":")
        return said(by_name[name][int(number) - 1])

    held_out = [row.line for row, _ in found.held_out.cases]
    assert {line.rpartition(":")[0] for line in held_out} == set(by_name)
    trained = []
    for step in range(found.plan.total):
        found.plan[step]
        trained += [line for batch in found.lines(step) for line in batch]
    assert not {of(line) for line in held_out} & {of(line) for line in trained}
    assert {line.rpartition(":")[0] for line in trained} == set(by_name)
    assert np.mean([line.startswith("other") for line in trained]) > 0.5
    found.close()
