"""A whole run on a tiny model: what it leaves, how it resumes, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.peft import load_adapter
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    OutOfMemoryError,
    OutputError,
)
from halfbyte.linear.lora import adapters
from halfbyte.models.build import BaseRecipe
from halfbyte.report import open_report
from halfbyte.train import metadata
from halfbyte.train.evaluate import evaluate
from halfbyte.train.loading import open_model
from halfbyte.train.run import train
from tests.tiny import write_tiny_model
from tests.train.interrupting import break_off


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for i in range(24):
        said = "The capital of France is Paris." + " Again." * (i % 5)
        question = {"role": "user", "content": f"What is the capital of France? {i}"}
        rows.append({"messages": [question, {"role": "assistant", "content": said}]})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config(model, data, output, **options):
    settings = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": 2,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "compute_dtype": "float32",
        "device": "cpu",
        "samples": 0,
    }
    return TrainConfig(model=str(model), data=str(data), output=output, **settings | options)


# The tiny model's tied embedding has rows of norm 0.16, and its last norm makes states of norm 8:
# no logit exceeds 1.3, so its loss cannot fall from ln 400 = 6.0 much below 4.7.
LEARNED = 5.4
LONGER = {"epochs": 8, "lora_r": 16}


def run(made):
    with open_report(made.output, quiet=True) as report:
        return train(made, report)


def journal(output):
    return [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_what_it_should(model, data, tmp_path):
    output = tmp_path / "run"
    options = LONGER | {"eval_data": str(data), "eval_steps": 16, "save_steps": 20}
    result = run(config(model, data, output, **options))
    assert result.adapter_dir == output
    assert result.steps == 48
    events = journal(output)
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 49))
    assert steps[0]["loss"] > 5.9
    assert steps[-1]["loss"] < LEARNED
    keys = {"grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_second"}
    assert keys | {"peak_memory_bytes", "seconds", "time"} <= steps[0].keys()
    evaluations = [e for e in events if e["event"] == "evaluation"]
    assert [e["step"] for e in evaluations] == [16, 32, 48]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert {p.name for p in output.glob("checkpoint-*")} == {"checkpoint-40", "checkpoint-48"}
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.yaml"):
        assert (output / name).is_file()
    opened, tokenizer, _ = open_model(
        str(model), adapter=str(output), compute_dtype="float32", device="cpu"
    )
    said: list[str] = []
    measured = evaluate(opened, tokenizer, data, max_new_tokens=4, note=said.append)
    assert said == measured.data["lines"]
    assert measured.loss == pytest.approx(evaluations[-1]["loss"], rel=1e-5)
    assert measured.cases == 24


def test_the_base_alone_is_worse(model, data, tmp_path):
    run(config(model, data, tmp_path / "run", **LONGER))
    losses = []
    for adapter in (None, str(tmp_path / "run")):
        opened, tokenizer, _ = open_model(
            str(model), adapter=adapter, compute_dtype="float32", device="cpu"
        )
        losses.append(evaluate(opened, tokenizer, data, exact_match=False).loss)
    assert losses[0] > 5.9
    assert losses[1] < LEARNED


def test_an_adapter_goes_on_the_base_it_was_trained_on(model, data, tmp_path, caplog, monkeypatch):
    options = {"max_steps": 1, "use_dora": True, "rank_pattern": {"q_proj": 2}}
    run(config(model, data, tmp_path / "run", **options))
    adapter = str(tmp_path / "run")
    shape = load_adapter(adapter).state["model.layers.0.self_attn.q_proj.lora_A.weight"].shape
    assert shape[0] == 2
    copy = str(write_quantized(model, tmp_path / "copy", BaseRecipe()))
    for same in (str(model), copy):
        opened, _, _ = open_model(same, adapter=adapter, device="cpu")
        assert adapters(opened)
    small = str(write_tiny_model(tmp_path / "small", layers=1))
    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.train.loading.load_base", None)  # no weight has been read
        with pytest.raises(CheckpointError, match="of its 14 layers 7 can be found"):
            open_model(small, adapter=adapter, device="cpu")
    with pytest.raises(CheckpointError, match=r"quant was 'nf4', now it is 'fp4'.*allow-mismatch"):
        open_model(str(model), adapter=adapter, quant="fp4", device="cpu")
    other = str(write_tiny_model(tmp_path / "other"))
    weights = load_file(f"{other}/model.safetensors")
    save_file({k: t.roll(1, 0) for k, t in weights.items()}, f"{other}/model.safetensors")
    with pytest.raises(CheckpointError, match="this model differs: the weights differ"):
        open_model(other, adapter=adapter, device="cpu")
    assert caplog.messages == []
    opened, _, _ = open_model(other, adapter=adapter, device="cpu", allow_mismatch=True)
    assert adapters(opened)
    assert "the weights differ; used anyway" in caplog.text


def test_plain_lora_goes_through_the_same_code(model, data, tmp_path):
    result = run(config(model, data, tmp_path / "run", quant="none", **LONGER))
    assert result.final_loss < LEARNED


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.1},
        {"modules_to_save": ("embed_tokens", "lm_head", "norm")},
        {"init_lora_weights": "qera"},
        {"save_minutes": 1e-9},
        {"neftune_noise_alpha": 5, "lr_scheduler_type": "warmup_stable_decay"},
        {"packing": True, "max_length": 96, "max_steps": 12},
    ],
    ids=["plain", "dropout", "whole", "qera", "minutes", "neftune", "packing"],
)
def test_a_resumed_run_is_the_run_byte_for_byte(model, data, tmp_path, options):
    options = options | {"save_steps": 5}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config(model, data, whole, **options))

    made = config(model, data, broken, **options)
    break_off(made, 7)
    assert not (broken / "adapter_model.safetensors").exists()
    # What no result depends on may change when a run goes on: here, what is kept in memory.
    again = made.model_copy(update={"resume": True, "activations": "recompute"})
    run(again)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    steps = [e["step"] for e in journal(broken) if e["event"] == "step"]
    assert steps == list(range(1, 13))


def test_kill_minus_nine_loses_no_more_than_the_steps_since_the_last_save(model, data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"save_steps": 3, "epochs": 6}
    run(config(model, data, whole, **options))
    call = [sys.executable, "-m", "halfbyte", "train", "--model", str(model), "--data", str(data)]
    call += ["--output", str(broken), "--batch-size", "2", "--gradient-accumulation-steps", "2"]
    call += ["--learning-rate", "1e-2", "--lora-r", "4", "--compute-dtype", "float32"]
    call += ["--save-steps", "3", "--epochs", "6", "--device", "cpu"]
    source = str(Path(__file__).parents[2] / "src")
    path = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    process = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(broken.glob("checkpoint-*")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors
    run(config(model, data, broken, resume=True, **options))
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_a_run_without_memory_for_its_next_step_keeps_the_ones_it_made(
    model, data, tmp_path, monkeypatch
):
    """It ends with one message and a checkpoint, from which it goes on where there is more."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"max_steps": 5, "save_steps": 5}
    run(config(model, data, whole, **options))
    step = LayerEngine.step

    def short_of_memory(self, *args):
        if short_of_memory.steps == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TB")
        short_of_memory.steps += 1
        return step(self, *args)

    short_of_memory.steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(LayerEngine, "step", short_of_memory)
        with pytest.raises(OutOfMemoryError, match="step 4 does not fit into the memory"):
            run(config(model, data, broken, **options))
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-3"]
    fallbacks = [event for event in journal(broken) if event["event"] == "fallback"]
    assert fallbacks
    assert {event["step"] for event in fallbacks} == {4}
    run(config(model, data, broken, resume=True, **options))
    adapters = [path / "adapter_model.safetensors" for path in (whole, broken)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_finished_run_is_not_overwritten(model, data, tmp_path):
    made = config(model, data, tmp_path / "run", max_steps=1)
    run(made)
    with pytest.raises(OutputError, match="already contains a run"):
        run(made)
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    run(made.model_copy(update={"resume": True}))
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_a_mistyped_output_is_not_resumed_from_the_beginning(model, data, tmp_path):
    made = config(model, data, tmp_path / "invoices", max_steps=1)
    run(made)
    mistyped = made.model_copy(update={"resume": True, "output": tmp_path / "invioces"})
    with pytest.raises(
        OutputError, match=r"invioces contains no checkpoint; did you mean .*/invoices\?"
    ):
        run(mistyped)
    assert not (tmp_path / "invioces" / "adapter_model.safetensors").exists()
    # A job that may be restarted always passes --resume: nothing is near, so it is a first start.
    run(made.model_copy(update={"resume": True, "output": tmp_path / "receipts"}))


def test_going_on_with_something_else_is_refused(model, data, tmp_path):
    made = config(model, data, tmp_path / "run", max_steps=2)
    run(made)
    with pytest.raises(ConfigError, match=r"learning_rate was 0.01, is 0.5"):
        run(made.model_copy(update={"resume": True, "learning_rate": 0.5}))
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("Paris", "Rome"))
    with pytest.raises(CheckpointError, match="the data is not that of"):
        run(made.model_copy(update={"resume": True, "data": str(other)}))
    another = write_tiny_model(tmp_path / "another", hidden=32)
    with pytest.raises(CheckpointError, match="the base model is not that of"):
        run(made.model_copy(update={"resume": True, "model": str(another)}))


def test_a_run_goes_on_though_there_are_options_now_that_it_did_not_know(model, data, tmp_path):
    made = config(model, data, tmp_path / "run", max_steps=4, save_steps=2)
    run(made)
    path = max((tmp_path / "run").glob("checkpoint-*")) / "run_state.json"
    state = json.loads(path.read_text())
    del state["progress"]["options"]["weight_decay"]
    path.write_text(json.dumps(state))
    run(made.model_copy(update={"resume": True}))
    with pytest.raises(ConfigError, match=r"weight_decay was 0.0, is 0.1"):
        run(made.model_copy(update={"resume": True, "weight_decay": 0.1}))


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": 3}\n'])
def test_data_without_anything_usable_leaves_nothing_behind(model, tmp_path, content):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        run(config(model, bad, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_long_rows_are_cut_and_counted(model, data, tmp_path):
    run(config(model, data, tmp_path / "run", max_length=40, max_steps=1))
    notes = [e["text"] for e in journal(tmp_path / "run") if e["event"] == "note"]
    assert any("truncated to max_length 40" in note for note in notes)


def test_a_budget_that_cannot_do_says_what_would(model, data, tmp_path):
    with pytest.raises(ConfigError, match=r"needs about \d+\.\d+ GB"):
        run(config(model, data, tmp_path / "run", memory_budget=10_000_000))


def test_seeds_make_the_run(model, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(config(model, data, tmp_path / name, seed=seed, max_steps=3))
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_target_modules_and_rslora_reach_the_adapter(model, data, tmp_path):
    options = {"target_modules": ("q_proj", "v_proj"), "use_rslora": True, "max_steps": 1}
    run(config(model, data, tmp_path / "run", **options))
    card = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert sorted(card["target_modules"]) == ["q_proj", "v_proj"]
    assert card["use_rslora"] is True


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_modules_trained_whole_learn_and_come_back(model, data, tmp_path, quant):
    output = tmp_path / "run"
    options = {"quant": quant, "modules_to_save": ("embed_tokens", "lm_head"), "epochs": 4}
    result = run(config(model, data, output, **options))
    assert result.final_loss < LEARNED - 2  # a tied embedding of this model cannot
    stored = load_file(output / "adapter_model.safetensors")
    head, embedding = (
        stored[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens")
    )
    assert head.dtype == torch.float32
    assert not head.equal(embedding)
    newest = max(output.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert load_adapter(newest).saved.keys() == {"lm_head.weight", "model.embed_tokens.weight"}
    opened, tokenizer, _ = open_model(
        str(model), adapter=str(output), device="cpu", quant=quant, compute_dtype="float32"
    )
    assert opened.lm_head.weight.equal(head)
    loss = evaluate(opened, tokenizer, str(data)).loss
    assert abs(loss - result.final_loss) < 0.3


def test_a_packed_head_is_not_trained_whole(model, data, tmp_path):
    made = config(
        model, data, tmp_path / "run", modules_to_save=("lm_head",), quantize_embeddings=True
    )
    with pytest.raises(ConfigError, match=r"lm_head cannot be trained in full.*leave out quantize"):
        run(made)
    assert not (tmp_path / "run").exists()


def test_bfloat16_products_train_float32_adapters(model, data, tmp_path):
    run(config(model, data, tmp_path / "run", compute_dtype="bfloat16", max_steps=2))
    state = load_adapter(tmp_path / "run").state
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_a_packed_vocabulary_and_a_packed_copy_resume_too(tmp_path, model, data, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed = {"quantize_head": True, "quant_search": True, "cache_quantized": True}
    whole = run(config(model, data, tmp_path / "whole", max_steps=4, **packed))
    assert len(list((tmp_path / "cache/halfbyte/models").iterdir())) == 1
    output = tmp_path / "parts"
    run(config(model, data, output, max_steps=4, save_steps=2, **packed))
    # From the copy in the cache or from the files: it is the same base.
    shutil.rmtree(output / "checkpoint-4")
    changes = packed | {"cache_quantized": False}
    run(config(model, data, output, max_steps=4, save_steps=2, resume=True, **changes))
    one, other = (load_file(d / "adapter_model.safetensors") for d in (whole.adapter_dir, output))
    assert all(one[name].equal(other[name]) for name in one | other)
    recorded = load_adapter(output).info["recipe"]
    assert recorded["quantize_head"]
    assert recorded["quant_search"]
    assert recorded["quantize_embeddings"]  # tied to it
    with pytest.raises(CheckpointError, match="quantize_head was True"):
        open_model(str(model), adapter=str(output), device="cpu")
    with pytest.raises(CheckpointError, match="quant_search was True"):
        open_model(str(model), adapter=str(output), device="cpu", quantize_head=True)
    opened, _, _ = open_model(str(model), adapter=str(output), device="cpu", **packed)
    assert opened.halfbyte_recipe.quantize_embeddings
    with pytest.raises(ConfigError, match="quantize_head was True"):
        run(config(model, data, output, max_steps=4, save_steps=2, resume=True))


def test_offloading_on_a_cpu_is_said_to_be_nothing(model, data, tmp_path):
    run(config(model, data, tmp_path / "run", activations="offload", max_steps=1))
    notes = [e["text"] for e in journal(tmp_path / "run") if e["event"] == "note"]
    assert any("offloading needs a GPU" in note for note in notes)


def test_a_run_without_memory_for_answers_trains_and_says_so(model, data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(metadata, "generate", fail)
    made = config(model, data, tmp_path / "run", samples=2, max_steps=2)
    assert run(made).steps == 2
    events = journal(tmp_path / "run")
    assert not [event for event in events if event["event"] == "samples"]
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert len([note for note in notes if note.startswith("no answers: ")]) == 2
