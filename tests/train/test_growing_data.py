"""Data that is encoded while a run trains on it: the run is a function of seed and data alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.checkpoint.run_state import latest_run
from halfbyte.data.row_encoder import RowEncoder
from halfbyte.errors import CheckpointError, ConfigError, DataError
from halfbyte.report import open_report
from halfbyte.train.run_data import RunData
from tests.data.test_row_encoder import talk
from tests.tiny import tiny_llama, tiny_tokenizer, write_tiny_model
from tests.train.interrupting import break_off
from tests.train.test_run import config, journal, run

ROWS, STEPS = 60, 25  # with four examples a step, more than an epoch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def data(tmp_path):
    """Every sixth row is rejected; those at the end are the longest."""
    rows = [json.dumps(talk(at)) for at in range(ROWS)]
    rows[::6] = [json.dumps({"messages": [{"role": "user", "content": "?"}]})] * 10
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(autouse=True)
def large(tmp_path, monkeypatch):
    """All data counts as large, and is encoded by this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("halfbyte.data.loading.COMPLETE_BYTES", 0)
    monkeypatch.setattr("halfbyte.data.loading.SEVERAL_FROM", 0)
    monkeypatch.setattr("halfbyte.data.row_encoder.cores", lambda: 0)
    monkeypatch.setattr("halfbyte.data.row_encoder.CHUNK_ROWS", 8)
    monkeypatch.setattr("halfbyte.data.example_stream.CHUNK_ROWS", 8)
    monkeypatch.setattr("halfbyte.train.growing_data.SAMPLE_ROWS", 16)
    monkeypatch.setattr("halfbyte.train.growing_data.BUFFER_ROWS", 12)


def planned(model, data, output, **options):
    options = {"max_steps": STEPS, "save_steps": 4, "max_length": 128} | options
    return config(model, data, output, **options)


def adapter(output):
    return load_file(output / "adapter_model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def losses(output):
    return [event["loss"] for event in journal(output) if event["event"] == "step"]


def rejected(output):
    lines = (output / "rejected.jsonl").read_text().splitlines()
    return [(one["line"], one["reason"]) for one in map(json.loads, lines)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_is_the_run_with_the_cache_and_without(model, data, tmp_path, streaming):
    options = {"streaming": streaming}
    if streaming:  # it has an end, after which there are no steps
        data.write_text(data.read_text() + "\n" + data.read_text())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(planned(model, data, whole, **options))
    break_off(planned(model, data, parts, cache_data=False, **options), 6)
    break_off(planned(model, data, parts, resume=True, cache_data=False, **options), 19)
    assert json.loads((latest_run(parts) / "run_state.json").read_text())["step"] == 16
    run(planned(model, data, parts, resume=True, **options))
    assert same(adapter(whole), adapter(parts))
    assert losses(whole) == losses(parts)
    assert rejected(whole) == rejected(parts)
    reports = [[e for e in journal(o) if e["event"] == "data"][-1] for o in (whole, parts)]
    for report in reports:
        del report["time"]
    assert reports[0] == reports[1]


def test_a_second_start_takes_all_from_the_cache(model, data, tmp_path, monkeypatch):
    run(planned(model, data, tmp_path / "one"))
    monkeypatch.setattr(RowEncoder, "_submit", None)
    run(planned(model, data, tmp_path / "two"))
    assert same(adapter(tmp_path / "one"), adapter(tmp_path / "two"))


def test_an_epoch_has_steps_for_all_rows_and_its_report_is_complete(model, data, tmp_path):
    output = tmp_path / "run"
    run(planned(model, data, output, max_steps=None, epochs=1.2))
    events = journal(output)
    [begin] = [e for e in events if e["event"] == "begin"]
    assert begin["total_steps"] == 18  # 1.2 times 60 rows, four a step
    assert begin["data_verdict"]["rows"] == 16
    [*_, report] = [e for e in events if e["event"] == "data"]
    assert (report["rows"], report["usable"], report["step"]) == (ROWS, 50, 18)
    [reason] = report["rejected"]
    assert (reason["reason"], reason["rows"]) == ("no assistant turn to learn", 10)
    assert sorted(rejected(output)) == sorted(
        (str(at + 1), "no assistant turn to learn") for at in range(0, ROWS, 6)
    )
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert any("60 rows" in note and str(tmp_path / "cache") in note for note in notes)
    assert f"{data}: 50 of 60 rows usable, read as messages" in notes


def test_other_data_or_another_seed_is_another_run(model, data, tmp_path):
    output = tmp_path / "run"
    break_off(planned(model, data, output), 6)
    text = data.read_text()
    data.write_text(text.replace("quick", "slow", 1))
    with pytest.raises(CheckpointError, match="the data is not that"):
        run(planned(model, data, output, resume=True))
    data.write_text(text)
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        run(planned(model, data, output, resume=True, seed=1))
    run(planned(model, data, output, resume=True))


def test_a_checkpoint_that_does_not_say_where_the_data_was(model, data, tmp_path):
    output = tmp_path / "run"
    break_off(planned(model, data, output), 6)
    state = latest_run(output) / "run_state.json"
    saved = json.loads(state.read_text())
    for wrong in ({"data_position": [-1, 0]}, {"data_position": "7"}, {"data_report": [1]}):
        state.write_text(json.dumps(saved | {"progress": saved["progress"] | wrong}))
        with pytest.raises(CheckpointError, match="the checkpoint's"):
            run(planned(model, data, output, resume=True))


def test_data_whose_first_rows_are_useless_is_refused(model, data, tmp_path):
    data.write_text('{"messages": []}\n' * 40)
    with pytest.raises(DataError, match=r"none of the 16 rows .*is usable"):
        run(planned(model, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_stream_that_ends_early_keeps_what_was_made(model, data, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(DataError, match="the data ended after 60 rows, before step 14 of 25"):
        run(planned(model, data, output, streaming=True))
    assert latest_run(output).name == "checkpoint-13"
    with pytest.raises(ValueError, match="`streaming` needs `max_steps`"):
        planned(model, data, output, streaming=True, max_steps=None)


def test_what_is_planned_for_includes_the_longest_example_that_may_come(model, data, tmp_path):
    tokenizer = tiny_tokenizer()
    with open_report(tmp_path / "run", quiet=True) as report:
        made = planned(model, data, tmp_path / "run", batch_size=3)
        found = RunData(made, tokenizer, tiny_llama(tokenizer).config, report)
        found.close()
    assert max(map(max, found.lengths)) == 128
    assert max(shape for step in found.shapes for shape in step) == (3, 128)


def test_sources_with_weights_are_mixed_by_them(model, data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(talk(at)) for at in range(100, 120)))
    made = planned(model, data, tmp_path / "run", max_steps=None).model_copy(
        update={"data": (f"{data}:1", f"{other}:3")}
    )
    tokenizer = tiny_tokenizer()
    with open_report(tmp_path / "run", quiet=True) as report:
        found = RunData(made, tokenizer, tiny_llama(tokenizer).config, report)
        (tmp_path / "run").mkdir()
        found.begin(tmp_path / "run", 0, {})
        lines = []
        for step in range(found.plan.per_epoch):
            found.plan[step]
            lines += [line for batch in found.lines(step) for line in batch]
        found.close()
    assert found.plan.per_epoch == 20
    assert list(found.mixture.counts) == [60, 20]
    # Five of six rows of the first are usable; rejected ones are replaced.
    share = sum(line.startswith("other.jsonl:") for line in lines) / len(lines)
    assert 0.75 < share < 0.81
    assert {line.rpartition(":")[0] for line in lines} == {"train.jsonl", "other.jsonl"}


def test_packs_have_as_many_documents_as_fit(model, data, tmp_path):
    made = planned(model, data, tmp_path / "run", packing=True, max_steps=None, epochs=3)
    tokenizer = tiny_tokenizer()

    def begun(report, progress, step):
        data = RunData(made, tokenizer, tiny_llama(tokenizer).config, report)
        data.begin(tmp_path, step, progress)
        data.close()  # it is encoded by this process
        return data

    with open_report(tmp_path / "run", quiet=True) as report:
        found = begun(report, {}, 0)
        taken, sizes, state = [], [], {}
        for step in range(found.plan.total):
            batches = found.plan[step]
            sizes.append(sum(batch.tokens for batch in batches))
            assert all(batch.input_ids.size <= 2 * 128 for batch in batches)
            taken += [line for batch in found.lines(step) for line in batch]
            if step == 1:
                state = found.state(2)
        resumed = begun(report, state, 2)
        assert sum(batch.tokens for batch in resumed.plan[2]) == sizes[2]
    assert max(sizes) <= 4 * 128  # four packs
    assert min(sizes) > 0.75 * 4 * 128
    usable = {str(at + 1) for at in range(ROWS) if at % 6}
    assert set(taken[:65]) == usable  # sorted within a step, which may begin the next epoch
    assert 0.8 < len(taken) / (3 * 50) < 1.3


def test_closing_ends_what_was_opened(model, data, tmp_path, monkeypatch):
    closed = []
    close = RowEncoder.close
    monkeypatch.setattr(RowEncoder, "close", lambda self: closed.append(self) or close(self))
    break_off(planned(model, data, tmp_path / "run"), 2)
    assert len(closed) == 1
    unusable = tmp_path / "unusable.jsonl"
    unusable.write_text("{}\n")
    with pytest.raises(DataError, match="unusable"):
        run(planned(model, data, tmp_path / "other", eval_data=str(unusable)))
    assert len(closed) == 2
