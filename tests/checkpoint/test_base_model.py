"""A base model loads from whatever holds it, whole, in little memory; what does not fit is told."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint import base_model
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.errors import CheckpointError, WeightError
from halfbyte.models.build import BaseRecipe, frozen_linears
from halfbyte.quant import QuantizedWeight, quantize
from tests.checkpoint.families import tiny_model
from tests.checkpoint.gguf_models import write_gguf
from tests.tiny import tiny_llama, tiny_tokenizer, write_tiny_model

PROMPT = torch.arange(3, 43)[None]
PLAIN = BaseRecipe(quant="none")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits  # type: ignore[no-any-return]


def theirs(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def assert_loads_as_transformers_does(directory: Path) -> None:
    ours = load_base(directory, PLAIN)
    assert logits(ours.model).sub(logits(theirs(directory))).abs().max() < 1e-5


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.fixture
def sharded_dir(tmp_path: Path) -> Path:
    directory = write_tiny_model(tmp_path / "model", tied=False, max_shard_size="150KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def weights(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = weights(directory)
    change(held)
    safetensors.torch.save_file(held, directory / "model.safetensors", {"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def apply(held: dict[str, Tensor]) -> None:
        for name in list(held):
            held[change(name)] = held.pop(name)

    return apply


def test_a_plain_directory_is_the_model(model_dir: Path) -> None:
    source = open_base(model_dir)
    held = weights(model_dir)
    streamed = dict(source.tensors())
    assert streamed.keys() == held.keys() == {p.name for p in source.parameters}
    assert all(torch.equal(streamed[name], held[name]) for name in held)  # type: ignore[arg-type]
    assert source.total_bytes == sum(tensor.nbytes for tensor in held.values())
    assert source.dtype == torch.float32
    assert_loads_as_transformers_does(model_dir)


@pytest.mark.parametrize(
    "family",
    ["mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "smollm3", "granite", "olmo2"],
)
def test_families_load_as_they_were_saved(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ours = load_base(tmp_path, PLAIN).model
    held = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert held[name].equal(value), name
    assert logits(ours).sub(logits(model)).abs().max() < 1e-5


def test_shards_are_the_model(sharded_dir: Path) -> None:
    assert_loads_as_transformers_does(sharded_dir)


def test_shards_without_an_index_are_the_model(sharded_dir: Path) -> None:
    expected = logits(load_base(sharded_dir, PLAIN).model)
    (sharded_dir / "model.safetensors.index.json").unlink()
    assert logits(load_base(sharded_dir, PLAIN).model).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_load(model_dir: Path, dtype: torch.dtype) -> None:
    rewrite(model_dir, lambda held: held.update({n: t.to(dtype) for n, t in held.items()}))
    source = open_base(model_dir)
    assert source.dtype == dtype
    name = "model.layers.0.mlp.up_proj.weight"
    dense = frozen_linears(load_base(source, PLAIN).model)[name.removesuffix(".weight")]
    assert dense.dense(torch.float32).equal(weights(model_dir)[name].float())


def test_every_linear_is_packed_as_it_is_read(model_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    recipe = BaseRecipe(quant="fp4", block_size=32, double_quant=False)
    loaded = load_base(model_dir, recipe, progress=lambda done, total: seen.append((done, total)))
    held = weights(model_dir)
    for path, linear in frozen_linears(loaded.model).items():
        expected = quantize(
            held[path + ".weight"], quant_type="fp4", block_size=32, double_quant=False
        )
        assert linear.quantized is not None
        assert linear.quantized.codes.equal(expected.codes)
    total = sum(tensor.nbytes for tensor in held.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert loaded.memory_report.quantized_parameters == sum(
        linear.in_features * linear.out_features for linear in frozen_linears(loaded.model).values()
    )
    assert loaded.name == str(model_dir)
    assert loaded.fingerprint == open_base(model_dir).fingerprint


NAMES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a model without its head": renamed(lambda name: name.removeprefix("model.")),
    "old buffers": lambda held: held.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    ),
    "a head that is the embedding": lambda held: held.update(
        {"lm_head.weight": held["model.embed_tokens.weight"].clone()}
    ),
    "a head instead of the embedding": lambda held: held.update(
        {"lm_head.weight": held.pop("model.embed_tokens.weight")}
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_other_times_are_understood(model_dir: Path, case: str) -> None:
    expected = logits(load_base(model_dir, PLAIN).model)
    rewrite(model_dir, NAMES[case])
    loaded = load_base(model_dir, PLAIN)
    assert logits(loaded.model).equal(expected)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_head_of_its_own_is_kept_and_announced(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = 0.02 * torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    rewrite(model_dir, lambda held: held.update({"lm_head.weight": head}))
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        loaded = load_base(model_dir, PLAIN)
    assert "two different tensors" in caplog.text
    assert loaded.model.lm_head.weight.equal(head)
    assert logits(loaded.model).sub(logits(theirs(model_dir))).abs().max() < 1e-5


UP = "model.layers.0.mlp.up_proj.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: rewrite(d, lambda h: h.pop(UP)), f"{UP}: missing"),
    "no embedding": (
        lambda d: rewrite(d, lambda h: h.pop("model.embed_tokens.weight")),
        "model.embed_tokens.weight: missing",
    ),
    "unknown": (
        lambda d: rewrite(d, lambda h: h.update({UP[:-6] + "bias": torch.ones(128)})),
        "up_proj.bias: unknown to LlamaForCausalLM",
    ),
    "whole numbers": (
        lambda d: rewrite(d, lambda h: h.update({UP: torch.ones(128, 64, dtype=torch.int8)})),
        "up_proj.weight is torch.int8, expected are floating numbers",
    ),
    "shape": (
        lambda d: rewrite(d, lambda h: h.update({UP: torch.ones(64, 128)})),
        r"up_proj.weight has shape \[64, 128\], the configuration requires \[128, 64\]",
    ),
    "twice": (
        lambda d: rewrite(d, lambda h: h.update({UP[6:]: torch.ones(128, 64)})),
        "the same parameter as",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "it has no config.json"),
    "config cut": (lambda d: (d / "config.json").write_text('{"model'), "cannot read config.json"),
    "strange model": (
        lambda d: (d / "config.json").write_text('{"model_type": "no such model"}'),
        "cannot read config.json",
    ),
    "no decoder": (
        lambda d: (d / "config.json").write_text('{"model_type": "vit"}'),
        "not a causal language model",
    ),
    "layers": (lambda d: edit(d / "config.json", num_hidden_layers=10**9), "1000000000 layers"),
    "other method": (
        lambda d: edit(d / "config.json", quantization_config={"quant_method": "vptq", "bits": 4}),
        "quantised by 'vptq'; supported are gptq, awq, fp8",
    ),
    "8 bits": (
        lambda d: edit(
            d / "config.json",
            quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        ),
        r"quantised by bitsandbytes \(8 bits\), and no tensor in its files is",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no safetensors files"),
    "pickles": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        r"only pickles \(pytorch_model.bin\), which can run code and are not read; convert",
    ),
    "cut": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-100]
        ),
        r"model.safetensors is not a whole safetensors file",
    ),
    "no tokenizer": (
        lambda d: [path.unlink() for path in d.glob("tokenizer*")],
        "has no tokenizer that transformers can read",
    ),
    "generation": (
        lambda d: (d / "generation_config.json").write_text("{"),
        "generation_config.json cannot be read",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_the_model_is_told(model_dir: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    change(model_dir)
    with pytest.raises(CheckpointError, match=message):
        load_base(model_dir, PLAIN)


SHARD = "model-00002-of-"
WRONG_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda d: next(d.glob(SHARD + "*")).unlink(), f"cannot read .*{SHARD}.*No such file"),
    "cut": (
        lambda d: next(d.glob(SHARD + "*")).write_bytes(b"1234"),
        f"{SHARD}.* is not a whole safetensors file",
    ),
    "swapped": (
        lambda d: shutil.copy(next(d.glob("model-00001*")), next(d.glob(SHARD + "*"))),
        "is in .*model-00001.* and in",
    ),
    "emptied": (
        lambda d: safetensors.torch.save_file({}, next(d.glob(SHARD + "*"))),
        f"{SHARD}.* lacks .*, which model.safetensors.index.json says it has",
    ),
    "index cut": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "index.json is not JSON",
    ),
    "index elsewhere": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        "has no weight_map of file names",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_SHARDS)
def test_shards_that_do_not_fit_are_told(sharded_dir: Path, wrong: str) -> None:
    change, message = WRONG_SHARDS[wrong]
    change(sharded_dir)
    with pytest.raises(CheckpointError, match=message):
        open_base(sharded_dir)


@pytest.mark.parametrize("kind", ["directory", "packed", "gguf"])
def test_one_tensor_can_be_had_out_of_order(tmp_path: Path, model_dir: Path, kind: str) -> None:
    path = model_dir
    if kind == "packed":
        path = write_quantized(model_dir, tmp_path / "packed", BaseRecipe())
    if kind == "gguf":
        path = write_gguf(tmp_path / "m.gguf")
    source = open_base(path)
    for name, value in reversed(list(source.tensors())):
        alone = source.tensor(name)
        if isinstance(value, QuantizedWeight):
            assert isinstance(alone, QuantizedWeight)
            value, alone = value.codes, alone.codes
        assert isinstance(alone, Tensor)
        assert alone.dtype == value.dtype
        assert alone.equal(value)


def test_weights_that_are_no_numbers_are_named(model_dir: Path) -> None:
    rewrite(model_dir, lambda held: held[UP].__setitem__((0, 0), torch.nan))
    with pytest.raises(WeightError, match=UP):
        load_base(model_dir, BaseRecipe())


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        open_base(tmp_path)


def test_a_file_of_weights_is_no_model(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="give its directory"):
        open_base(model_dir / "model.safetensors")


def test_a_directory_may_hold_one_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    assert open_base(tmp_path).fingerprint == open_base(path).fingerprint
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="has 2 GGUF files; give one"):
        open_base(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/dir", "./nowhere", "model.gguf", "a/b/c", "~/nowhere"])
def test_a_path_that_leads_nowhere_is_told(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist: there is no such directory"):
        open_base(name)


def test_a_model_of_the_hub_is_fetched_without_pickles(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(model_dir)

    monkeypatch.setattr(base_model, "snapshot_download", fetch)
    source = open_base("org/model", revision="v1")
    assert source.name == "org/model"
    assert (asked["name"], asked["revision"]) == ("org/model", "v1")
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"])
    files = ["model.safetensors", "original/model.safetensors", "model.bin", "tokenizer.json"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    found = list(filter_repo_objects(files, **patterns))
    assert found == ["model.safetensors", "tokenizer.json"]


def test_a_model_the_hub_does_not_give_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(base_model, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"not available on the Hugging Face hub: no conn"):
        open_base("org/model")


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_fingerprint_tells_copies_from_others(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        weights_file = base = write_gguf(tmp_path / "m.gguf")
        copy = shutil.copy(base, tmp_path / "copy.gguf")
    else:
        base = write_tiny_model(tmp_path / "model")
        weights_file = base / "model.safetensors"
        copy = shutil.copytree(base, tmp_path / "copy")
    original = open_base(base).fingerprint
    assert open_base(copy).fingerprint == original
    raw = np.frombuffer(weights_file.read_bytes(), np.uint8)

    def changed(where: slice | int) -> str:
        other = raw.copy()
        other[where] ^= 1
        weights_file.write_bytes(other.tobytes())
        return open_base(base).fingerprint

    numbers = len(raw) - 100_000
    assert changed(-1) != original
    assert changed(slice(numbers, None, 4)) != original  # as training would: everywhere a little
    assert changed(slice(0, 0)) == original


MEASURE = """
import sys
from pathlib import Path
from halfbyte.checkpoint.base_model import load_base
from halfbyte.models.build import BaseRecipe

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

# What is loaded once for all (kernels, transformers' tables) comes with the first, a small one.
for directory in sys.argv[1:]:
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
    loaded = load_base(directory, BaseRecipe())
    print(memory("VmHWM") - before, loaded.memory_report.total_bytes)
    del loaded
"""


def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    directories = [write_tiny_model(tmp_path / "small")]
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, layers=1, hidden=1024, tied=False)
    model.resize_token_embeddings(20_000)
    largest = []
    for dtype in (torch.bfloat16, torch.float32):
        directories.append(tmp_path / str(dtype))
        model.to(dtype).save_pretrained(directories[-1])
        tokenizer.save_pretrained(directories[-1])
        largest.append(model.lm_head.weight.nbytes)
        assert (directories[-1] / "model.safetensors").stat().st_size > 95_000_000
    del model
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, directories)],
        capture_output=True,
        text=True,
        check=True,
    )
    _, *measured = [[int(n) for n in line.split()] for line in out.stdout.splitlines()]
    for (grown, final), tensor in zip(measured, largest, strict=True):
        # Measured: 0.9 of the tensor in flight over the model. The slack is what the allocator
        # keeps of small tensors, at most 1 MB in six runs.
        # From below: a little of the model may lie in what the first one left free.
        assert final - 5_000_000 < grown <= final + 1.5 * tensor + 2_000_000, (grown, final, tensor)
