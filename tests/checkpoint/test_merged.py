"""A merged model computes, in transformers, what was merged: exactly, or packed again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from halfbyte.checkpoint.base_model import BaseSource, load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.merged import Into, Merged, ways, write_merged
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach, delta, load_adapter_state
from halfbyte.models.build import BaseRecipe, frozen_linears
from halfbyte.quant import QuantizedWeight
from tests.checkpoint.families import tiny_model
from tests.checkpoint.gguf_models import write_gguf
from tests.tiny import tiny_tokenizer, write_tiny_model

PROMPT = torch.arange(3, 43)[None]
PATH = "model.layers.1.mlp.down_proj"


class Adapted(NamedTuple):
    source: BaseSource
    model: PreTrainedModel


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits.float()  # type: ignore[no-any-return]


def adapted(
    path: Path, *, quant: Any = "nf4", targets: tuple[str, ...] = ("q_proj", "down_proj")
) -> Adapted:
    source = open_base(path)
    model = load_base(source, BaseRecipe(quant=quant)).model
    attach(model, LoRAConfig(r=4, target_modules=targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    return Adapted(source, model)


@pytest.mark.parametrize("quant", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_computes_what_was_trained(tmp_path: Path, quant: str, tied: bool) -> None:
    directory = write_tiny_model(tmp_path / "base", tied=tied)
    source, model = adapted(directory, quant=quant)
    expected = logits(model)
    seen: list[tuple[int, int]] = []
    out = write_merged(
        Merged(source, model, dtype=torch.float32),
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
        shard_bytes=100_000,
    )
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 120_000 for file in files)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert logits(merged).sub(expected).abs().max() < 1e-5
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in merged.parameters())
    # The model in memory is what it was, and its adapter did make a difference.
    assert logits(model).equal(expected)
    untrained = load_base(directory, BaseRecipe(quant=quant)).model  # type: ignore[arg-type]
    assert logits(untrained).sub(expected).abs().max() > 1e-2


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    source, model = adapted(write_tiny_model(tmp_path / "base"))
    out = write_merged(Merged(source, model), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16
    linear = frozen_linears(model)[PATH]
    adapter: Any = linear.adapter
    exact = linear.decode(torch.float32).double() + adapter.config.scaling * (
        adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    )
    weight = merged.get_submodule(PATH).weight.detach()
    # Half a unit in the last place, and float32's own rounding of the sum.
    assert (weight.double() - exact).abs().le(exact.abs() * (2**-8 + 2**-20) + 1e-9).all()


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_the_original_weights_are_those_of_the_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    path = write_gguf(path) if kind == "gguf" else write_tiny_model(tmp_path / "base")
    source, model = adapted(path)
    assert ways(source, model) == ["decoded", "original", "nf4"]
    out = write_merged(Merged(source, model, "original", torch.float32), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    for name, linear in frozen_linears(model).items():
        expected = source.tensor(f"{name}.weight")
        assert isinstance(expected, Tensor)
        if linear.adapter is not None:
            expected = expected + delta(linear)
        assert merged.get_submodule(name).weight.equal(expected)
    assert not merged.get_submodule(PATH).weight.equal(
        frozen_linears(model)[PATH].decode(torch.float32) + delta(frozen_linears(model)[PATH])
    )


@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_again_it_is_a_checkpoint_of_bitsandbytes(
    tmp_path: Path, double_quant: bool
) -> None:
    directory = write_tiny_model(tmp_path / "base")
    source = open_base(directory)
    model = load_base(source, BaseRecipe(double_quant=double_quant, block_size=32)).model
    attach(model, LoRAConfig(r=4), seed=0)
    merged = Merged(source, model, "nf4", torch.float32)
    out = write_merged(merged, tmp_path / "out", shard_bytes=30_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert written == pytest.approx(
        merged.written_bytes, rel=0.2
    )  # headers weigh, in so small a model
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.is_loaded_in_4bit
    again = open_base(out)
    for name, linear in frozen_linears(model).items():
        q = again.tensor(f"{name}.weight")
        assert isinstance(q, QuantizedWeight)
        assert (q.quant_type, q.block_size, q.double_quant) == ("nf4", 32, double_quant)
        module = theirs.get_submodule(name)
        codes, state = bnb.quantize_4bit(
            linear.decode(torch.float32) + delta(linear),
            blocksize=32,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        assert module.weight.data.equal(codes)
        expected = bnb.dequantize_4bit(codes, state)
        assert bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).equal(expected)


@pytest.mark.parametrize("into", ["decoded", "original", "nf4"])
def test_what_is_measured_is_what_is_written(tmp_path: Path, into: Into) -> None:
    source, model = adapted(write_tiny_model(tmp_path / "base", tied=False))
    merged = Merged(source, model, into)
    written = open_base(write_merged(merged, tmp_path / "out"))
    assert {p.name for p in written.parameters} == {p.name for p in merged.parameters}
    for name, value in merged.tensors():
        again = written.tensor(name)
        if isinstance(value, QuantizedWeight):
            assert isinstance(again, QuantizedWeight)
            assert again.dtype == value.dtype == torch.bfloat16
            for part, tensor in value.tensors().items():
                assert again.tensors()[part].equal(tensor), part
        else:
            assert isinstance(again, Tensor)
            assert again.dtype == value.dtype
            assert again.equal(value)


def test_a_packed_base_has_no_original_weights(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "base")
    source, model = adapted(write_quantized(directory, tmp_path / "packed", BaseRecipe()))
    assert ways(source, model) == ["decoded", "nf4"]
    with pytest.raises(CheckpointError, match=r"packed in 4 bits.*Merge into decoded"):
        Merged(source, model, "original")


@pytest.mark.parametrize("into", ["decoded", "nf4"])
def test_a_packed_base_is_merged_as_the_one_it_was_packed_from(tmp_path: Path, into: Into) -> None:
    directory = write_tiny_model(tmp_path / "base")
    packed = write_quantized(directory, tmp_path / "packed", BaseRecipe())
    written = []
    for base in (directory, packed):
        out = write_merged(Merged(*adapted(base), into), tmp_path / f"{base.name}-merged")
        config = json.loads((out / "config.json").read_text())
        assert ("quantization_config" in config) == (into == "nf4")
        assert config["dtype"] == "bfloat16"
        written.append(open_base(out))
    of_plain, of_packed = written
    assert set(of_packed.parameters) == set(of_plain.parameters)
    for parameter in of_plain.parameters:
        one, other = (base.tensor(parameter.name) for base in written)
        assert type(one) is type(other)
        if isinstance(one, QuantizedWeight):
            assert isinstance(other, QuantizedWeight)
            assert all(t.equal(other.tensors()[part]) for part, t in one.tensors().items())
        else:
            assert one.equal(other), parameter.name


def test_a_plain_base_is_its_own_original(tmp_path: Path) -> None:
    source, model = adapted(write_tiny_model(tmp_path / "base"), quant="none")
    assert ways(source, model) == ["decoded", "nf4"]
    decoded, original = Merged(source, model), Merged(source, model, "original")
    for (name, one), (_, other) in zip(decoded.tensors(), original.tensors(), strict=True):
        assert one.equal(other), name  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("into", ["decoded", "nf4"])
def test_it_is_a_directory_like_any_other(tmp_path: Path, into: Into) -> None:
    source, model = adapted(write_tiny_model(tmp_path / "base"))
    out = write_merged(Merged(source, model, into), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert ("quantization_config" in config) == (into == "nf4")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == source.tokenizer().chat_template
    assert (out / "generation_config.json").exists()
    assert load_base(out, BaseRecipe()).model.config.tie_word_embeddings


@pytest.mark.parametrize("trained", ["lm_head", "model.embed_tokens"])
def test_a_tie_that_an_adapter_has_broken_stays_broken(tmp_path: Path, trained: str) -> None:
    source, model = adapted(write_tiny_model(tmp_path / "base", tied=True))
    module = model.get_submodule(trained)
    module.weight = torch.nn.Parameter(module.weight + 0.1, requires_grad=False)
    expected = logits(model)
    out = write_merged(Merged(source, model, dtype=torch.float32), tmp_path / "out")
    assert logits(AutoModelForCausalLM.from_pretrained(out)).sub(expected).abs().max() < 1e-5
    assert source.config.tie_word_embeddings


def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    merged = Merged(*adapted(write_tiny_model(tmp_path / "base")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match="it exists already"):
        write_merged(merged, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    write_merged(merged, tmp_path / "out", replace=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


MEASURE = """
import sys
from pathlib import Path
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.merged import Merged, write_merged
from halfbyte.linear.lora import LoRAConfig, attach
from halfbyte.models.build import BaseRecipe

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

source = open_base(sys.argv[1])
model = load_base(source, BaseRecipe()).model
attach(model, LoRAConfig(r=8), seed=0)
write_merged(Merged(source, model), sys.argv[2] + "/first")
for into in ("decoded", "original", "nf4"):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
    merged = Merged(source, model, into)
    write_merged(merged, f"{sys.argv[2]}/{into}")
    print(memory("VmHWM") - before, merged.written_bytes)
"""


def test_writing_holds_one_weight_beside_the_model(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", layers=8, hidden=1024)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )
    largest = 4 * 2048 * 1024
    measured = [[int(n) for n in line.split()] for line in out.stdout.splitlines()]
    for grown, written in measured:
        # Measured: 2 to 2.5 times the largest weight in float32 (it, its update, the one that is
        # being written); the model in memory and the smallest of the files take almost five.
        assert grown < 2.75 * largest < 0.6 * written, measured


@pytest.mark.parametrize("search", [False, True])
def test_who_packs_a_decoded_merge_again_is_warned_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, search: bool
) -> None:
    source, model = adapted(write_tiny_model(tmp_path / "base"))
    out = write_merged(Merged(source, model), tmp_path / "out")
    recipe = BaseRecipe(quant_search=search)
    load_base(out, BaseRecipe(quant="none"))
    assert not caplog.text
    load_base(out, recipe)
    assert caplog.text.count("Packing it in nf4 again") == 1
    caplog.clear()
    write_quantized(out, tmp_path / "packed", recipe)
    assert caplog.text.count("Packing it in nf4 again") == 1
    caplog.clear()
    load_base(tmp_path / "packed", BaseRecipe())  # packed by now
    load_base(write_merged(Merged(source, model, "original"), tmp_path / "whole"), recipe)
    load_base(write_merged(Merged(source, model, "nf4"), tmp_path / "nf4"), recipe)
    assert "again" not in caplog.text
    config = AutoConfig.from_pretrained(out)  # others read it as before
    assert config.halfbyte_decoded_from == "nf4"
    assert not hasattr(source.config, "halfbyte_decoded_from")


def test_experts_that_were_fused_load_in_transformers(tmp_path: Path) -> None:
    tiny_model("mixtral", num_local_experts=4).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    source, model = adapted(tmp_path / "base", quant="none", targets=("q_proj", "o_proj"))
    merged = write_merged(Merged(source, model, dtype=torch.float32), tmp_path / "out")
    loaded, told = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert logits(loaded).sub(logits(model)).abs().max() < 1e-5
    assert logits(load_base(merged, BaseRecipe("none")).model).sub(logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("into", ["decoded", "original", "nf4"])
def test_experts_are_written_as_they_are_published(tmp_path: Path, into: Into) -> None:
    directory = tmp_path / "base"
    tiny_model("mixtral", num_local_experts=4).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    source, model = adapted(directory, targets=("q_proj", "o_proj"))
    merged = Merged(source, model, into, torch.float32)
    progress: list[tuple[int, int]] = []
    out = write_merged(
        merged,
        tmp_path / "out",
        shard_bytes=200_000,
        progress=lambda *done: progress.append(done),
    )
    if into != "nf4":  # whose tables of packed linears may be shorter than planned
        assert progress[-1] == (merged.written_bytes, merged.written_bytes)
        keys = open_base(out)._homes.keys()  # type: ignore[attr-defined]
        assert keys == open_base(directory)._homes.keys()  # type: ignore[attr-defined]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    linear = expert_linears(model)[name]
    kept = linear.decode(0, 4, torch.float32)
    expected = kept if into != "original" else source.tensor(name)
    assert torch.equal(merged.tensor(name), expected)  # type: ignore[arg-type]
    assert torch.equal(open_base(out).tensor(name), expected)  # type: ignore[arg-type]
    loaded, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.get_parameter(name).equal(expected)
    if into == "decoded":
        assert logits(loaded).sub(logits(model)).abs().max() < 1e-5


def test_packed_experts_of_the_files_are_decoded(tmp_path: Path) -> None:
    directory = tmp_path / "base"
    tiny_model("mixtral", num_local_experts=4).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    packed = write_quantized(directory, tmp_path / "packed", BaseRecipe(), dtype=torch.float32)
    source, model = adapted(packed, targets=("q_proj",))
    assert ways(source, model) == ["decoded", "nf4"]
    out = write_merged(Merged(source, model, dtype=torch.float32), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert logits(loaded).sub(logits(model)).abs().max() < 1e-5


def test_layers_that_share_a_weight_are_not_merged(tmp_path: Path) -> None:
    """Each of Zamba 2's has an adapter of its own, and one weight cannot be all their sums."""
    kinds = {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3}
    sizes = {"mamba_d_state": 8, "n_mamba_heads": 4, "num_mem_blocks": 1, "num_key_value_heads": 4}
    tiny_model("zamba2", **kinds, **sizes).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source, model = adapted(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.shared_.* weight of several layers"):
        Merged(source, model)
