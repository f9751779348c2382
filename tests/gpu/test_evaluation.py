"""On a GPU, too, evaluations, metrics and callbacks between steps leave training as it is."""

import json

import pytest
import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.report import open_report
from halfbyte.report.journal import read_journal
from halfbyte.train import metrics as metrics_module
from halfbyte.train.callbacks import Callbacks
from halfbyte.train.run import train
from tests.tiny import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAME = "adapter_model.safetensors"


@pytest.mark.parametrize("graphs", [True, False])
def test_training_does_not_depend_on_what_is_done_between_steps(tmp_path, monkeypatch, graphs):
    monkeypatch.setattr(metrics_module, "LONGEST_ANSWER", 8)
    model = write_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"{n}", "completion": "Paris " * (1 + n % 9)} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, callbacks=(), metrics=(), **options):
        config = TrainConfig(
            model=str(model),
            data=str(data),
            output=tmp_path / name,
            device="cuda",
            compute_dtype="bfloat16",
            deterministic=True,
            cuda_graphs=graphs,
            eval_split=0.25,
            max_steps=6,
            learning_rate=1e-2,
            lora_dropout=0.0,
            samples=0,
            **options,
        )
        with open_report(config.output, quiet=True) as report:
            return train(config, report, callbacks=callbacks, metrics=metrics)

    def careless(info):
        torch.manual_seed(info.step)
        torch.cuda.manual_seed_all(info.step)
        torch.rand(3, device="cuda")

    run("plain")
    result = run(
        "watched",
        callbacks=[Callbacks(on_step=careless, on_evaluate=careless, on_save=careless)],
        metrics=[lambda samples: {"answers": len(samples)}],
        eval_steps=1,
        save_steps=2,
        load_best=True,
        save_total_limit=10,
    )
    # The last checkpoints, since the adapters are the last one and the best one.
    plain, watched = (tmp_path / name / "checkpoint-6" / NAME for name in ("plain", "watched"))
    assert watched.read_bytes() == plain.read_bytes()
    found = [
        one
        for one in read_journal(tmp_path / "watched/journal.jsonl")
        if one["event"] == "evaluation"
    ]
    assert [one["metrics"] for one in found] == [{"answers": 10.0}] * len(found)
    assert [one["step"] for one in found][:6] == [1, 2, 3, 4, 5, 6]
    best = min(found[:6], key=lambda one: one["loss"])
    assert result.adapter_step == best["step"]
    written = tmp_path / "watched" / f"checkpoint-{best['step']}" / NAME
    assert (tmp_path / "watched" / NAME).read_bytes() == written.read_bytes()
