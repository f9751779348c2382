"""``halfbyte export`` with nothing stood in: what it answers, writes, refuses and notices."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte import cli
from halfbyte.checkpoint import gguf_export
from halfbyte.checkpoint.base_model import load_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.identity import identity_of
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach
from halfbyte.models.build import BaseRecipe
from tests.tiny import write_tiny_model

PROMPT = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    base = load_base(model, BaseRecipe()).model
    config = LoRAConfig(r=4, target_modules=("q_proj", "up_proj"))
    attach(base, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(base).items()
    }
    out = model.parent / "adapter"
    return save_adapter(out, state, config, base={"name": str(model)}, recipe={"quant": "nf4"})


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Run ``export`` with ``--json``: the exit code, the answer if any, what was said."""

    def run(*words: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = cli.main(["export", *map(str, words), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out.startswith("{") else None, err

    return run


def test_a_merged_model(model: Path, adapter: Path, tmp_path: Path, answer: Any) -> None:
    out = tmp_path / "out"
    code, printed, err = answer(model, adapter, out, "--type", "f32", "--device", "cpu")
    assert code == 0, err
    assert sorted(file.name for file in out.iterdir()) == ["Modelfile", "model.gguf"]
    assert printed["verified"]["worst_share"] == 0
    assert printed["bytes"] == (out / "model.gguf").stat().st_size
    assert printed["distance"]["top1_agreement"] == 1
    assert printed["distance"]["largest_gap"] < 1e-4
    assert printed["distance"]["positions"] > 100
    live = load_base(model, BaseRecipe()).model
    load_adapter(adapter).put_on(live)
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf")
    with torch.no_grad():
        assert (read(PROMPT).logits - live(PROMPT).logits).abs().max() < 1e-4
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert read.generate(PROMPT, **greedy).equal(live.generate(PROMPT, **greedy))


@pytest.mark.parametrize("file_type", ["q8_0", "q4_0"])
def test_without_an_adapter_the_files_are_taken_as_they_are(
    model: Path, tmp_path: Path, file_type: str, answer: Any
) -> None:
    code, printed, err = answer(model, tmp_path / "out", "--type", file_type)
    assert code == 0, err
    assert printed["base"] == {"quant": "none"}
    assert 0.3 < printed["verified"]["worst_share"] <= 1
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    weight = AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.up_proj.weight
    kind = gguf.GGMLQuantizationType[file_type.upper()]
    stored = gguf.quants.quantize(weight.detach().numpy(), kind)
    assert tensors["blk.0.ffn_up.weight"].data.tobytes() == stored.tobytes()


def test_an_adapter_alone(model: Path, adapter: Path, tmp_path: Path, answer: Any) -> None:
    model, out = shutil.copytree(model, tmp_path / "model"), tmp_path / "out"
    defaults = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(defaults | {"eos_token_id": [2, 0]}))
    code, printed, err = answer(model, adapter, out, "--format", "gguf-lora")
    assert code == 0, err
    assert printed["verified"]["tensors"] == 8
    assert printed["verified"]["worst_share"] <= 1
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {model.resolve()}", "ADAPTER ./adapter.gguf"]
    assert any(line.startswith("TEMPLATE") for line in lines)
    stops = {"<|endoftext|>", "<|im_end|>"}  # as in the model's own Modelfile
    assert {line for line in lines if line.startswith("PARAMETER")} == {
        f'PARAMETER stop "{stop}"' for stop in stops
    }
    names = {tensor.name for tensor in gguf.GGUFReader(out / "adapter.gguf").tensors}
    assert "blk.1.ffn_up.weight.lora_b" in names


@pytest.mark.parametrize("begun", ["kaiming", "qera"])
def test_an_adapter_that_holds_what_packing_lost_is_no_adapter_for_other_bases(
    model: Path, adapter: Path, tmp_path: Path, answer: Any, begun: str
) -> None:
    other = shutil.copytree(adapter, tmp_path / "adapter")
    card = json.loads((other / "halfbyte.json").read_text())
    card["recipe"] = card.get("recipe", {}) | {"init_lora_weights": begun}
    (other / "halfbyte.json").write_text(json.dumps(card))
    code, _, err = answer(model, other, tmp_path / "out", "--format", "gguf-lora")
    assert code == 0, err
    assert ("compensates for the quantisation error" in " ".join(err.split())) == (begun == "qera")


def test_an_adapter_alone_of_another_base_is_refused(
    model: Path, tmp_path: Path, answer: Any
) -> None:
    """Unless its weights are the same, in other files."""
    base = load_base(model, BaseRecipe())
    config = LoRAConfig(r=4, target_modules=("q_proj",))
    attach(base.model, config, seed=0)
    adapter, state = tmp_path / "adapter", adapter_state(base.model)
    identity = identity_of(base)
    save_adapter(adapter, state, config, base=identity, recipe={"quant": "nf4"})
    other = write_tiny_model(tmp_path / "other", layers=3)
    words = ("--format", "gguf-lora", "--device", "cpu")
    code, _, err = answer(other, adapter, tmp_path / "out", *words)
    assert code == 2
    assert "this model differs: the weights differ" in err
    assert not (tmp_path / "out").exists()
    assert answer(other, adapter, tmp_path / "out", *words, "--allow-mismatch")[0] == 0
    copy = write_quantized(model, tmp_path / "copy", BaseRecipe())
    assert answer(copy, adapter, tmp_path / "same", *words)[0] == 0


def test_a_wrong_file_ends_with_1(
    model: Path, tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gguf_export.encode

    def wrong(value: Any, kind: Any) -> Any:
        return right(value * (1.05 if value.ndim == 2 else 1.0), kind)

    monkeypatch.setattr(gguf_export, "encode", wrong)
    code, printed, err = answer(model, tmp_path / "out", "--type", "q8_0")
    assert code == 1
    assert printed is None
    assert "the file is wrong, so it is removed" in err
    assert list(tmp_path.iterdir()) == []
    assert answer(model, tmp_path / "other", "--type", "q8_0", "--no-verify")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf-lora"], "needs an adapter"),
        (["--type", "q5_0"], "q5_0"),
    ],
)
def test_mistakes(model: Path, tmp_path: Path, words: list[str], message: str, answer: Any) -> None:
    code, _, err = answer(model, tmp_path / "out", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_block_type_does_not_fit_an_adapter(
    model: Path, adapter: Path, tmp_path: Path, answer: Any
) -> None:
    words = (model, adapter, tmp_path / "out", "--format", "gguf-lora", "--type", "q8_0")
    code, _, err = answer(*words)
    assert code == 2
    assert "must be f32, f16 or bf16" in err


def test_only_an_export_is_replaced(model: Path, tmp_path: Path, answer: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for words in ([], ["--overwrite"]):
        assert answer(model, out, *words)[0] == 2
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").rename(out / "model.gguf")
    assert answer(model, out, "--overwrite")[0] == 2
    assert (out / "model.gguf").read_text() == "mine"
    (out / "model.gguf").write_bytes(b"GGUF")  # of an export that was cut
    assert answer(model, out, "--overwrite")[0] == 0
    assert (out / "model.gguf").stat().st_size > 4
    assert answer(model, out, "--overwrite")[0] == 0


def test_a_model_that_cannot_be_exported_leaves_nothing(
    model: Path, tmp_path: Path, answer: Any
) -> None:
    other = write_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    code, _, err = answer(other, tmp_path / "out")
    assert code == 2
    assert "cannot express hidden_act = 'gelu' in llama, only silu" in err
    assert not (tmp_path / "out").exists()


def test_a_file_that_answers_otherwise_ends_with_1(
    model: Path, adapter: Path, tmp_path: Path, answer: Any
) -> None:
    """Rounded as it may be, but further from the adapter than was asked for."""
    out, words = tmp_path / "out", ("--type", "q4_0", "--device", "cpu")
    code, printed, _ = answer(model, adapter, out, *words)
    assert code == 0
    agreement = printed["distance"]["top1_agreement"]
    assert 0 < agreement < 1
    code, printed, err = answer(
        model, adapter, out, *words, "--overwrite", "--min-agreement", agreement + 1e-6
    )
    assert code == 1
    assert f"{100 * agreement:.2f} % of the positions" in err
    assert printed["distance"]["top1_agreement"] == agreement
    code, _, _ = answer(model, adapter, out, *words, "--overwrite", "--min-agreement", agreement)
    assert code == 0
