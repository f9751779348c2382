"""What a command imports when it does its work: torch where tensors are, training to train."""

import json
from pathlib import Path

import pytest

from tests.cli.test_main import HEAVY, modules_after
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow  # fresh interpreters that import transformers

# Nothing of ours needs them to run; each takes a tenth of a second or more.
FOREIGN = {"bitsandbytes", "datasets", "pandas", "peft", "scipy", "sklearn", "tensorboard", "wandb"}
# What importing a model of transformers imports, if nobody prevents it. torch._dynamo itself may be
# there, postponed.
FOREIGN |= {
    "accelerate",
    "torch._dynamo.utils",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
}
FOREIGN |= {"torchao", "torchaudio", "torchvision"}
TRAINING = {
    "halfbyte.optim",
    "halfbyte.report.page",
    "halfbyte.engine.layerwise",
    "halfbyte.train.run",
    "halfbyte.train.trainer",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    line = '{"event": "begin", "time": "2026-01-01T00:00:00+00:00", "total_steps": 1}\n'
    (tmp_path / "journal.jsonl").write_text(line)
    assert not modules_after(["report", str(tmp_path)]) & {*HEAVY} - {"rich"}
    assert (tmp_path / "report.html").exists()


def test_an_answer_is_given_without_what_trains(model: Path) -> None:
    words = ["generate", "--model", str(model), "--prompt", "hi", "--max-new-tokens", "2"]
    loaded = modules_after([*words, "--device", "cpu"])
    assert "halfbyte.models.generate" in loaded
    assert not loaded & (TRAINING | FOREIGN)


def test_a_model_is_packed_without_what_trains_or_answers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loaded = modules_after(["quantize", str(model), str(out)])
    assert (out / "config.json").exists()
    others = {"halfbyte.data", "halfbyte.models.generate", "halfbyte.train.loading"}
    assert not loaded & (TRAINING | FOREIGN | others)


def test_a_model_is_trained_without_what_merges(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n")
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    loaded = modules_after([*words, "--max-steps", "1", "--samples", "0", "--device", "cpu"])
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert not loaded & (FOREIGN | {"halfbyte.cli.demo", "halfbyte.tools.merge_evaluation"})


def test_a_model_is_exported_without_what_trains(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loaded = modules_after(["export", str(model), str(out)])
    assert (out / "model.gguf").exists()
    assert not loaded & (TRAINING | FOREIGN)
