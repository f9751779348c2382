"""GPT-2, whose files hold plain weights as [in, out]: read, packed, merged and loaded by PEFT."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from halfbyte.checkpoint.base_model import LoadedBase, load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.merged import Into, Merged, write_merged
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.packing import Batch
from halfbyte.errors import CheckpointError
from halfbyte.layers.conv1d import conv1d_weights
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
from tests.tiny import tiny_tokenizer

# PEFT uses a name that transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

IDS = torch.randint(3, 380, (2, 20), generator=torch.Generator().manual_seed(1))
C_FC = "transformer.h.1.mlp.c_fc.weight"
PACKING = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and its files; its weights are square, too, where a wrong layout has no shape."""
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=96, vocab_size=400, n_positions=64)
    )
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model.eval(), directory


def plain(directory: Path) -> LoadedBase:
    return load_base(directory, BaseRecipe("none"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def trained(base: LoadedBase, config: LoRAConfig) -> dict[str, Tensor]:
    """Attach adapters that change something; return their state."""
    attach(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(base.model).items()
    }
    load_adapter_state(base.model, state)
    return state


def require_same_codes(theirs: Any, ours: LoadedBase) -> None:
    packed = {name: m for name, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    linears = frozen_linears(ours.model)
    assert packed.keys() == linears.keys()
    assert len(linears) == 8
    for name, module in packed.items():
        held = linears[name].quantized
        assert held is not None
        assert module.weight.data.flatten().equal(held.codes)
        assert module.weight.quant_state.shape == held.shape


def test_a_weight_is_turned_as_it_is_read(gpt2: tuple[Any, Path]) -> None:
    model, directory = gpt2
    source = open_base(directory)
    found = dict(source.tensors())
    assert C_FC in conv1d_weights(source.skeleton)
    for parameter in source.parameters:
        value = found[parameter.name]
        assert isinstance(value, Tensor)
        assert value.is_contiguous()
        assert parameter.shape == tuple(value.shape)
        assert value.equal(source.tensor(parameter.name))  # type: ignore[arg-type]
    assert found[C_FC].equal(model.get_parameter(C_FC).T)  # type: ignore[union-attr]
    torch.testing.assert_close(logits(plain(directory).model), logits(model), rtol=0, atol=1e-5)


def test_the_packed_bytes_are_those_of_bitsandbytes(gpt2: tuple[Any, Path], tmp_path: Path) -> None:
    ours = load_base(gpt2[1], BaseRecipe())
    theirs = AutoModelForCausalLM.from_pretrained(gpt2[1], quantization_config=PACKING)
    require_same_codes(theirs, ours)
    # What they have written is read, and what is written here is read by them.
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    assert logits(load_base(tmp_path / "theirs", BaseRecipe()).model).equal(logits(ours.model))
    out = write_quantized(gpt2[1], tmp_path / "ours", BaseRecipe())
    require_same_codes(AutoModelForCausalLM.from_pretrained(out), ours)
    assert logits(load_base(out, BaseRecipe()).model).equal(logits(ours.model))


@pytest.mark.parametrize("into", ["decoded", "original", "nf4"])
def test_a_merge_has_the_layout_of_the_files(
    gpt2: tuple[Any, Path], tmp_path: Path, into: Into
) -> None:
    quant: Any = "nf4" if into != "original" else "none"
    source = open_base(gpt2[1])
    base = load_base(source, BaseRecipe(quant))
    trained(base, LoRAConfig(r=4))
    out = write_merged(Merged(source, base.model, into, torch.float32), tmp_path / "out")
    merged, amiss = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(amiss[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if into == "nf4":
        require_same_codes(merged, load_base(out, BaseRecipe()))
        return
    assert load_file(out / "model.safetensors")[C_FC].shape == (64, 96)
    torch.testing.assert_close(logits(merged), logits(base.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_loads_the_adapter_without_a_warning(
    gpt2: tuple[Any, Path], tmp_path: Path, use_dora: bool
) -> None:
    config = LoRAConfig(r=4, use_dora=use_dora)
    base = plain(gpt2[1])
    state = trained(base, config)
    conv1d = bool(conv1d_weights(base.model))
    save_adapter(tmp_path, state, config, base={"name": ""}, recipe={}, fan_in_fan_out=conv1d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        reference = GPT2LMHeadModel.from_pretrained(gpt2[1])
        theirs: Any = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=0, atol=1e-5)

    labels = IDS[:, 1:]
    engine, _ = choose_engine(base.model, "cpu")
    engine.step([Batch(IDS[:, :-1], labels)], labels.numel(), ActivationPolicy(2))
    scores = theirs(input_ids=IDS[:, :-1]).logits
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()).backward()
    own = adapter_parameters(base.model)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default.", ".")
            name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            torch.testing.assert_close(own.pop(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert own == {}


def test_an_adapter_of_peft_is_loaded(gpt2: tuple[Any, Path], tmp_path: Path) -> None:
    options = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2[1]), options).eval()
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    loaded, base = load_adapter(tmp_path), plain(gpt2[1])
    assert len(loaded.require_layers_of(open_base(gpt2[1]).skeleton)) == 9  # with the head
    loaded.put_on(base.model)
    torch.testing.assert_close(logits(base.model), logits(wrapped), rtol=0, atol=1e-5)


def test_a_weight_of_the_other_layout_is_refused(gpt2: tuple[Any, Path], tmp_path: Path) -> None:
    for path in gpt2[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {C_FC: held[C_FC].T.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"shape \[96, 64\], the configuration requires \[64, 96"
    ):
        open_base(tmp_path)
