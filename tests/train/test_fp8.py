"""``compute: fp8`` as a run: it learns as without, resumes to the same bits, and is refused."""

import pytest
import torch

from halfbyte.checkpoint.peft import load_adapter
from halfbyte.cli import main
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.linear.fp8 import FP8
from halfbyte.train import run as runs
from tests.train.test_run import LEARNED, LONGER, config, data, journal, model, run

__all__ = ["data", "model"]  # fixtures


def losses(output):
    return [e["loss"] for e in journal(output) if e["event"] == "step"]


def test_a_run_in_fp8_learns_as_one_without(model, data, tmp_path, monkeypatch):
    run(config(model, data, tmp_path / "plain", **LONGER))
    engines = []
    choose = runs.choose_engine

    def kept(*args, **options):
        engines.append(choose(*args, **options))
        return engines[-1]

    monkeypatch.setattr(runs, "choose_engine", kept)
    run(config(model, data, tmp_path / "fp8", compute="fp8", **LONGER))
    ((engine, _),) = engines
    assert {linear.layout for layer in engine.linears for linear in layer} == {FP8}
    plain, ours = losses(tmp_path / "plain"), losses(tmp_path / "fp8")
    assert plain != ours
    assert ours[-1] < LEARNED
    assert ours[0] == pytest.approx(plain[0], rel=0.001)
    assert sum(ours) == pytest.approx(sum(plain), rel=0.02)  # at a learning rate of 0.01
    start = next(e for e in journal(tmp_path / "fp8") if "compute" in e)
    assert start["compute"] == "fp8"
    assert start["config"]["compute"] == "fp8"
    notes = " ".join(str(e) for e in journal(tmp_path / "fp8"))
    assert "products of 14 linears in FP8" in notes
    assert "emulated on a CPU" in notes


@pytest.mark.parametrize("how", ["recompute", "save"])
def test_what_is_kept_for_backward_changes_no_bit(model, data, tmp_path, how):
    for name, options in (("one", {}), ("other", {"activations": how})):
        run(config(model, data, tmp_path / name, compute="fp8", max_steps=3, **options))
    one, other = (load_adapter(tmp_path / name).state for name in ("one", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_is_not_resumed_in_other_numbers(model, data, tmp_path):
    options = {"max_steps": 4, "save_steps": 2}
    run(config(model, data, tmp_path / "run", compute="fp8", **options))
    with pytest.raises(ConfigError, match="compute"):
        run(config(model, data, tmp_path / "run", **options, resume=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quant": "none"}, "`compute` fp8 needs `quant` nf4 or fp4"),
        ({"compute_dtype": "float16"}, "`compute` fp8 needs activations in bfloat16"),
    ],
)
def test_what_cannot_be_computed_in_fp8_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(model="m", data="d", output="o", compute="fp8", **options)


def test_an_older_gpu_is_refused_with_one_message(model, data, tmp_path, monkeypatch, capsys):
    def refused(device, dtype):
        raise ConfigError("compute fp8 is not for NVIDIA A100, compute capability 8.0")

    monkeypatch.setattr(runs, "require_fp8", refused)
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "o")]
    assert main([*words, "--compute", "fp8", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("is not for NVIDIA A100") == 1
    assert not (tmp_path / "o").exists()
