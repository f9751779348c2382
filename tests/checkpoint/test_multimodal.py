"""Image-text checkpoints: what is trained and written loads onto the original class."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import safetensors.torch
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from halfbyte.checkpoint.base_model import LoadedBase, load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.cache import cached
from halfbyte.checkpoint.gguf_architectures import ARCHITECTURES
from halfbyte.checkpoint.gguf_export import require_expressible, write_gguf
from halfbyte.checkpoint.gguf_verify import verify_gguf
from halfbyte.checkpoint.merged import Into, Merged, write_merged
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.packing import Batch
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.layers.multimodal import removed_modules
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.lora import (
    LoRAConfig,
    adapter_parameters,
    adapter_state,
    attach,
    frozen_linears,
    load_adapter_state,
)
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.train.memory_check import shape_of_source
from tests.multimodal import write_multimodal

# PEFT uses a name that transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# Of the last two, encoders are in the decoder, and PEFT takes expressions apart.
CASES = ["gemma3", "qwen2_5_vl", "qwen3_5", "phi4_multimodal", "qwen3_omni_moe_thinker"]
IDS = torch.randint(3, 380, (2, 20), generator=torch.Generator().manual_seed(1))


class Checkpoint(NamedTuple):
    """A model on disk, and as transformers has it."""

    directory: Path
    whole: PreTrainedModel

    def reload(self, directory: Path | None = None) -> tuple[Any, dict[str, Any]]:
        """Load it, or another directory, as its original class; also return what went amiss."""
        found: tuple[Any, dict[str, Any]] = type(self.whole).from_pretrained(
            directory or self.directory, output_loading_info=True
        )
        return found


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Checkpoint:
    directory = tmp_path_factory.mktemp(request.param)
    return Checkpoint(directory, write_multimodal(directory, request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: Any) -> Checkpoint:
    directory = tmp_path_factory.mktemp("gemma3")
    return Checkpoint(directory, write_multimodal(directory, "gemma3"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def filled(base: LoadedBase, config: LoRAConfig) -> dict[str, Tensor]:
    """Attach adapters that change something; return their state."""
    attach(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(base.model).items()
    }
    load_adapter_state(base.model, state)
    return state


def saved(directory: Path, base: LoadedBase, state: dict[str, Tensor], config: LoRAConfig) -> Path:
    removed, name = removed_modules(base.model), {"name": base.name}
    return save_adapter(directory, state, config, base=name, recipe={}, removed=removed)


def require_same_codes(theirs: Any, ours: LoadedBase) -> None:
    """Compare by bytes: bitsandbytes' products on a CPU want more rows than a tiny model has."""
    packed = {name: m for name, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    linears = frozen_linears(ours.model)
    assert packed.keys() == linears.keys()
    for name, module in packed.items():
        held = linears[name].quantized
        assert held is not None
        assert module.weight.data.flatten().equal(held.codes)


def test_only_the_decoder_is_loaded(checkpoint: Checkpoint) -> None:
    source = open_base(checkpoint.directory)
    base = load_base(source, BaseRecipe(quant="none"))
    assert type(base.model) is type(checkpoint.whole)
    experts = expert_linears(base.model)  # modules that hold what is a parameter in transformers
    names = {
        name.removesuffix(".weight") if name.removesuffix(".weight") in experts else name
        for name, _ in base.model.named_parameters()
    }
    assert {parameter.name for parameter in source.parameters} == names
    whole = dict(checkpoint.whole.named_parameters())
    encoders = {parameter.name for parameter in source.encoders} & whole.keys()
    assert encoders == whole.keys() - names
    assert all(".q_proj" not in name or ".layers." in name for name in names)
    nbytes = sum(whole[name].nbytes for name in names)
    assert base.memory_report.total_bytes == nbytes
    assert sum(4 * math.prod(weight.shape) for weight in shape_of_source(source).weights) == nbytes
    torch.testing.assert_close(logits(base.model), logits(checkpoint.whole), rtol=0, atol=1e-4)


TARGETS: dict[str, Any] = {
    "names": ("q_proj", "down_proj"),
    "a name of one layer": ("layers.1.self_attn.q_proj",),
    "expression that also fits encoders": r".*\.(q_proj|up_proj)",
    "lone name": "q_proj",
}


def test_peft_puts_the_adapter_on_the_original_class(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    require_peft_loads(tmp_path, checkpoint, "all-linear")


@pytest.mark.parametrize("case", TARGETS)
def test_peft_finds_the_targets_in_the_decoder_alone(
    tmp_path: Path, gemma: Checkpoint, case: str
) -> None:
    require_peft_loads(tmp_path, gemma, TARGETS[case])


def require_peft_loads(tmp_path: Path, checkpoint: Checkpoint, targets: Any) -> None:
    config = LoRAConfig(r=4, target_modules=targets)
    base = load_base(checkpoint.directory, BaseRecipe(quant="none"))
    state = filled(base, config)
    saved(tmp_path, base, state, config)
    theirs, _ = checkpoint.reload()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(wrapped).keys()
    adapted = {n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert len(adapted) == sum(name.endswith("lora_A.weight") for name in state)
    after = logits(base.model)
    torch.testing.assert_close(logits(wrapped), after, rtol=0, atol=1e-4)
    assert not torch.allclose(after, logits(checkpoint.whole), atol=1e-2)
    again = load_base(checkpoint.directory, BaseRecipe(quant="none"))
    load_adapter(tmp_path).put_on(again.model)
    assert logits(again.model).equal(after)


def test_training_has_the_gradients_of_peft_and_answers_like_it(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    config = LoRAConfig(r=2)
    base = load_base(checkpoint.directory, BaseRecipe(quant="none"))
    saved(tmp_path, base, filled(base, config), config)
    engine, _ = choose_engine(base.model, "cpu")
    labels = IDS[:, 1:]
    loss = engine.step([Batch(IDS[:, :-1], labels)], labels.numel(), ActivationPolicy(2))

    wrapped: Any = peft.PeftModel.from_pretrained(
        checkpoint.reload()[0], tmp_path, is_trainable=True
    ).eval()
    scores = wrapped(input_ids=IDS[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    own = adapter_parameters(base.model)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default.", ".")
            torch.testing.assert_close(own.pop(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)
    assert own == {}

    prompt = {"input_ids": IDS[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    options: Any = {**prompt, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    assert base.model.generate(**options).equal(wrapped.generate(**options))


@pytest.mark.parametrize("into", ["decoded", "nf4"])
def test_a_merge_is_the_whole_model_with_its_encoders(
    tmp_path: Path, checkpoint: Checkpoint, into: Into
) -> None:
    source = open_base(checkpoint.directory)
    base = load_base(source, BaseRecipe(quant="nf4"))
    filled(base, LoRAConfig(r=4))
    out = write_merged(Merged(source, base.model, into, torch.float32), tmp_path / "out")
    merged, amiss = checkpoint.reload(out)
    assert not any(amiss[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    held, whole = dict(merged.named_parameters()), dict(checkpoint.whole.named_parameters())
    kept = [parameter.name for parameter in source.encoders if parameter.name in whole]
    assert len(kept) > 10
    assert all(held[name].equal(whole[name]) for name in kept)
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"image_size": 28}
    if into == "decoded":
        torch.testing.assert_close(logits(merged), logits(base.model), rtol=0, atol=1e-4)
        assert "bitsandbytes" not in (out / "config.json").read_text()
    else:
        require_same_codes(merged, load_base(out, BaseRecipe()))


def test_a_packed_model_keeps_its_encoders_unpacked(tmp_path: Path, checkpoint: Checkpoint) -> None:
    out = write_quantized(checkpoint.directory, tmp_path / "out", BaseRecipe())
    ours = load_base(checkpoint.directory, BaseRecipe())
    if expert_linears(ours.model):  # which transformers does not load packed, and says so
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            checkpoint.reload(out)
    else:
        require_same_codes(checkpoint.reload(out)[0], ours)
    assert (out / "preprocessor_config.json").exists()
    again = load_base(out, BaseRecipe())
    assert logits(again.model).equal(logits(ours.model))


def test_a_cached_copy_is_the_model(
    tmp_path: Path, gemma: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain = load_base(gemma.directory, BaseRecipe())
    copied = load_base(gemma.directory, BaseRecipe(), packed_copy=cached)
    assert len(list(tmp_path.rglob("halfbyte_cache.json"))) == 1
    assert logits(copied.model).equal(logits(plain.model))


def test_encoders_that_others_have_packed_are_decoded_in_a_merge(
    tmp_path: Path, gemma: Checkpoint
) -> None:
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = type(gemma.whole).from_pretrained(
        gemma.directory, quantization_config=packing, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "packed")
    open_base(gemma.directory).tokenizer().save_pretrained(tmp_path / "packed")
    source = open_base(tmp_path / "packed")
    packed = [parameter.name for parameter in source.encoders if parameter.packed]
    assert packed
    base = load_base(source, BaseRecipe())
    out = write_merged(Merged(source, base.model, "decoded", torch.float32), tmp_path / "out")
    merged, amiss = gemma.reload(out)
    assert not any(amiss[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name in packed:
        weight = theirs.get_parameter(name)
        # Not by bitsandbytes, which on a CPU is wrong where a block is longer than a row.
        nibbles = torch.stack([weight.data >> 4, weight.data & 15], -1).long().view(-1, 64)
        decoded = weight.quant_state.code[nibbles] * weight.quant_state.absmax[:, None]
        assert merged.get_parameter(name).equal(decoded.view(weight.quant_state.shape))
    with pytest.raises(CheckpointError, match="already packed in 4 bits"):
        write_quantized(source, tmp_path / "again", BaseRecipe())


def test_modules_of_encoders_are_not_trained_by_mistake(gemma: Checkpoint) -> None:
    base = load_base(gemma.directory, BaseRecipe(quant="none"))
    with pytest.raises(ConfigError, match=r"norm also matches model\.vision_tower.*write more of"):
        attach(base.model, LoRAConfig(modules_to_save=("norm",)), seed=0)
    attach(base.model, LoRAConfig(modules_to_save=("language_model.norm",)), seed=0)
    assert "model.language_model.norm.weight" in adapter_parameters(base.model)
    with pytest.raises(ConfigError, match="matches no linear layer of this model"):
        attach(base.model, LoRAConfig(target_modules=r".*vision_tower.*"), seed=0)


def test_an_adapter_of_encoders_is_refused(tmp_path: Path, gemma: Checkpoint) -> None:
    wrapped = peft.get_peft_model(
        gemma.reload()[0], peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    wrapped.save_pretrained(tmp_path)
    base = load_base(gemma.directory, BaseRecipe(quant="none"))
    with pytest.raises(CheckpointError, match=r"changes 1 layers of the model's encoders, such as"):
        load_adapter(tmp_path).put_on(base.model)


def test_a_template_of_parts_takes_text(
    tmp_path: Path, gemma: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for path in gemma.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    # As processors have been saved; a tokenizer reads chat_template.jinja alone.
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    source = open_base(tmp_path)
    tokenizer = source.tokenizer()
    assert "would drop text; it is extended" in caplog.text
    talk = [{"role": "user", "content": "Where?"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "Where?"
    caplog.clear()
    out = write_quantized(source, tmp_path / "out", BaseRecipe())
    assert open_base(out).tokenizer().chat_template == tokenizer.chat_template
    assert caplog.text.count("would drop text") == 1  # by the first of the two alone


def test_a_gguf_file_is_the_text_decoder_or_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """The first of Gemma 3, with the scale of attention that llama.cpp implies, and of Qwen 3.5."""
    for path in checkpoint.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.get("text_config", config)  # Phi 4's text is described at the top
    if "query_pre_attn_scalar" in text:
        with pytest.raises(CheckpointError, match="query_pre_attn_scalar = '256'"):
            require_expressible(open_base(tmp_path), vocabulary=True)
        text["query_pre_attn_scalar"] = text["head_dim"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    source, path = open_base(tmp_path), tmp_path / "model.gguf"
    if text["model_type"] not in {row.model_type for row in ARCHITECTURES}:
        with pytest.raises(CheckpointError, match="cannot be exported to GGUF; those of llama"):
            require_expressible(source, vocabulary=True)
        return
    write_gguf(source, path, "f32", base=source)
    assert verify_gguf(source, open_base(path), path).worst_share == 0
    models = [load_base(base, BaseRecipe(quant="none")).model for base in (tmp_path, path)]
    prompt = torch.arange(3, 23)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=prompt).logits for model in models)
    assert (ours - theirs).abs().max() < 1e-4


def test_another_class_than_that_of_config_json_is_said(
    tmp_path: Path, gemma: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for path in gemma.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Gemmy"]}))
    open_base(tmp_path)
    assert "names the class Gemmy, which this transformers does not have; it is read as" in (
        caplog.text
    )
    config["architectures"] = ["Gemma3ForSequenceClassification"]
    assert hasattr(transformers, "Gemma3ForSequenceClassification")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected is a decoder that generates text, such as"):
        open_base(tmp_path)
