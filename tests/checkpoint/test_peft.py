"""Adapters: PEFT loads ours and we load PEFT's, with the same logits; what does not fit is told."""

import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint.base_model import LoadedBase, load_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.linear.lora import (
    LoRAConfig,
    adapter_state,
    adapters,
    attach,
    detach,
    frozen_linears,
    load_adapter_state,
)
from halfbyte.models.build import BaseRecipe
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer, write_tiny_model

# PEFT 0.21 asks transformers 5.23 by a name it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PROMPT = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def base_of(model_dir: Path) -> LoadedBase:
    return load_base(model_dir, BaseRecipe(quant="none"))


def filled(model: Any, config: LoRAConfig) -> dict[str, Tensor]:
    """Attach an adapter to ``model`` that changes something, and return its state."""
    attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    return state


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits  # type: ignore[no-any-return]


def decoded(base: LoadedBase, model_dir: Path) -> Any:
    """Return transformers' model with the weights that ``base`` computes with."""
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for path, linear in frozen_linears(base.model).items():
            plain.get_submodule(path).weight.copy_(linear.dense(torch.float32))
    return plain


CONFIGS = {
    "all linear": LoRAConfig(r=4, alpha=8),
    "some": LoRAConfig(r=2, alpha=3.5, target_modules=("q_proj", "mlp.down_proj")),
    "one path": LoRAConfig(r=2, target_modules=("model.layers.1.self_attn.v_proj",)),
    "expression": LoRAConfig(r=3, target_modules=r"model\.layers\.1\..*(q|k)_proj"),
    "lone name": LoRAConfig(r=3, target_modules="up_proj"),
    "patterns": LoRAConfig(
        r=4,
        alpha=8,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "(gate|up)_proj": 6, "v_proj": 1},
        alpha_pattern={r"model\.layers\.1\..*": 3, "q_proj": 0.5},
    ),
    "dora": LoRAConfig(r=4, alpha=8, use_dora=True, rank_pattern={"q_proj": 2}),
    "rank-stabilised": LoRAConfig(r=4, alpha=2, use_rslora=True, dropout=0.25),
}


def test_a_tokenizer_that_is_linked_to_stays_as_it_is(tmp_path: Path, model_dir: Path) -> None:
    base = base_of(model_dir)
    config = CONFIGS["dora"]
    state = filled(base.model, config)
    for name, link in (("tokenizer.json", os.link), ("tokenizer_config.json", os.symlink)):
        (tmp_path / name).write_text("the base model's")
        (tmp_path / "out").mkdir(exist_ok=True)
        link(tmp_path / name, tmp_path / "out" / name)
    (tmp_path / "out" / ".tokenizer.partial-x").mkdir()  # of a killed process
    card = {"base": {"name": "m", "fingerprint": "f"}, "recipe": {"quant": "none"}}
    save_adapter(tmp_path / "out", state, config, **card, tokenizer=base.tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == "the base model's"
        assert json.loads((tmp_path / "out" / name).read_text())
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("case", CONFIGS)
def test_peft_loads_ours_with_the_same_logits(tmp_path: Path, model_dir: Path, case: str) -> None:
    config = CONFIGS[case]
    base = base_of(model_dir)
    before = logits(base.model)
    state = filled(base.model, config)
    save_adapter(
        tmp_path,
        state,
        config,
        base={"name": str(model_dir), "fingerprint": base.fingerprint},
        recipe={"quant": "none"},
        tokenizer=base.tokenizer,
    )
    theirs = AutoModelForCausalLM.from_pretrained(model_dir)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path)
    adapted = [n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == len([name for name in state if "lora_A" in name])
    assert logits(wrapped).sub(logits(base.model)).abs().max() < 1e-5
    assert logits(base.model).sub(before).abs().max() > 1e-2
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(wrapped).keys()
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("case", CONFIGS)
def test_what_was_saved_comes_back(tmp_path: Path, model_dir: Path, case: str) -> None:
    config = CONFIGS[case]
    base = base_of(model_dir)
    state = filled(base.model, config)
    after = logits(base.model)
    recipe = {"quant": "nf4", "double_quant": True, "block_size": 64}
    save_adapter(
        tmp_path, state, config, base={"name": "m", "fingerprint": base.fingerprint}, recipe=recipe
    )
    loaded = load_adapter(tmp_path)
    assert loaded.base_name == "m"
    assert loaded.saved == {}
    assert loaded.info["recipe"] == recipe
    assert loaded.config.scaling == config.scaling
    assert loaded.config.rank_pattern == config.rank_pattern
    assert (loaded.config.r, loaded.config.dropout) == (config.r, config.dropout)
    fresh = base_of(model_dir)
    loaded.put_on(fresh.model)
    assert logits(fresh.model).equal(after)


THEIRS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "some": {"target_modules": ["q_proj", "o_proj"]},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"0.self_attn.q_proj": 2, ".*mlp.*": 6, "nowhere": 3},
        "alpha_pattern": {"layers.1.self_attn.(q|k)_proj": 3, "^model.*down_proj": 7},
    },
}


@pytest.mark.filterwarnings("ignore:.*nowhere:RuntimeWarning")
@pytest.mark.parametrize("case", THEIRS)
def test_we_load_peft_s_with_the_same_logits(tmp_path: Path, model_dir: Path, case: str) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=16, init_lora_weights=False, task_type="CAUSAL_LM", **THEIRS[case]
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).eval()
    wrapped.save_pretrained(tmp_path)
    base = base_of(model_dir)
    loaded = load_adapter(tmp_path)
    assert loaded.base_name == str(model_dir)
    assert loaded.info == {}
    loaded.put_on(base.model)
    assert logits(base.model).sub(logits(wrapped)).abs().max() < 1e-5


STATE = {
    "model.layers.0.q_proj.lora_A.weight": torch.ones(2, 8),
    "model.layers.0.q_proj.lora_B.weight": torch.ones(6, 2),
}


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    return save_adapter(
        tmp_path / "adapter",
        STATE,
        LoRAConfig(r=2),
        base={"name": "base", "fingerprint": "0123456789abcdef"},
        recipe={},
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


NAME = "base_model.model.model.layers.0.q_proj.lora_A.weight"
LENGTHS = "base_model.model.model.layers.0.q_proj.lora_magnitude_vector"
CONFIG = "adapter_config.json"

damages: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), f"{CONFIG} does not exist"),
    "config cut": (lambda d: os.truncate(d / CONFIG, 20), "is not JSON"),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), "should hold a JSON object"),
    "other kind": (lambda d: edit(d / CONFIG, peft_type="IA3"), "type 'IA3'; only LORA"),
    "dora": (lambda d: edit(d / CONFIG, use_dora=True), "lora_magnitude_vector is missing"),
    "no dora": (lambda d: rewrite(d, lambda s: s.update({LENGTHS: torch.ones(6)})), "use_dora"),
    "lora bias": (lambda d: edit(d / CONFIG, lora_bias=True), "more than LoRA: lora_bias=T"),
    "pissa": (lambda d: edit(d / CONFIG, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "saved": (lambda d: edit(d / CONFIG, modules_to_save=["lm_head"]), "holds no lm_head"),
    "saved one": (lambda d: edit(d / CONFIG, modules_to_save="lm_head"), "should be a list"),
    "ranks": (lambda d: edit(d / CONFIG, rank_pattern={"q_proj": 4}), r"expected \[rank 4, any\]"),
    "pattern": (lambda d: edit(d / CONFIG, rank_pattern={"(q": 4}), r"\(q"),
    "rank of a pattern": (lambda d: edit(d / CONFIG, rank_pattern={"q": 0}), "rank_pattern="),
    "bias": (lambda d: edit(d / CONFIG, bias="all"), "bias='all'"),
    "rank": (lambda d: edit(d / CONFIG, r=3), r"expected \[rank 3, any\]"),
    "rank text": (lambda d: edit(d / CONFIG, r="2"), "are not the numbers of an adapter"),
    "dropout": (lambda d: edit(d / CONFIG, lora_dropout=1), "are not the numbers of an adapter"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "pickle format"),
    "weights cut": (lambda d: os.truncate(d / "adapter_model.safetensors", 90), "not a whole"),
    "half": (lambda d: rewrite(d, lambda s: s.pop(NAME)), "lora_A.weight is missing"),
    "flat": (lambda d: rewrite(d, lambda s: s.update({NAME: torch.ones(2)})), "has the shape"),
    "whole numbers": (
        lambda d: rewrite(d, lambda s: s.update({NAME: s[NAME].char()})),
        "is torch.i",
    ),
    "no number": (
        lambda d: rewrite(d, lambda s: s[NAME][0, 0].fill_(torch.nan)),
        "NaN or infinity",
    ),
    "foreign": (lambda d: rewrite(d, lambda s: s.update(x=torch.ones(2))), "it holds x"),
    "empty": (lambda d: rewrite(d, dict.clear), "it holds nothing"),
    "card of lists": (lambda d: edit(d / "halfbyte.json", base=[]), "should be objects"),
    "card": (lambda d: os.truncate(d / "halfbyte.json", 5), "halfbyte.json is not JSON"),
}


@pytest.mark.parametrize("damage", damages)
def test_what_is_no_plain_whole_adapter_is_told(adapter_dir: Path, damage: str) -> None:
    change, message = damages[damage]
    assert load_adapter(adapter_dir).state.keys() == STATE.keys()
    change(adapter_dir)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapter_dir)


def test_an_adapter_none_of_whose_tensors_match_is_never_loaded(
    model_dir: Path, adapter_dir: Path
) -> None:
    model = base_of(model_dir).model
    with pytest.raises(CheckpointError, match=r"of its 1 layers none can be found.*0.q_proj and"):
        load_adapter(adapter_dir).put_on(model)
    assert adapters(model) == {}


Q, V = (f"model.layers.0.self_attn.{name}.lora_" for name in ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.9.self_attn.q_proj.lora_", "of its 2 layers 1 can be found.*layers.9"),
        (V, r"v_proj.lora_B.weight: expected shape \[\d+, 2\], got \[3, 2\]"),
    ],
)
def test_an_adapter_some_of_whose_tensors_do_not_match_is_not_loaded(
    tmp_path: Path, model_dir: Path, name: str, message: str
) -> None:
    model = base_of(model_dir).model
    filled(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    state = {k: t for k, t in adapter_state(model).items() if k.startswith(Q)}
    state |= {f"{name}A.weight": state[f"{Q}A.weight"], f"{name}B.weight": torch.ones(3, 2)}
    detach(model)
    save_adapter(tmp_path, state, LoRAConfig(r=2), base={"name": ""}, recipe={})
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path).put_on(model)
    assert adapters(model) == {}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens", "norm"], ["embed_tokens", "lm_head"]]
)
def test_modules_that_peft_trained_whole_take_the_place_of_ours(
    tmp_path: Path, model_dir: Path, saved: list[str], quant: Any
) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False
    )
    base = load_base(model_dir, BaseRecipe(quant=quant))
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(decoded(base, model_dir), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert {name.split(".")[-2] for name in loaded.saved} >= set(saved)
    loaded.put_on(base.model)
    assert logits(base.model).sub(logits(wrapped)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("saved", [("lm_head",), ("embed_tokens", "norm"), ("tokens", "lm_head")])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_modules_that_we_trained_whole(
    tmp_path: Path, saved: tuple[str, ...], tied: bool
) -> None:
    model_dir = write_tiny_model(tmp_path / "model", tied=tied)
    base = base_of(model_dir)
    config = LoRAConfig(r=4, target_modules=("q_proj",), modules_to_save=saved)
    state = filled(base.model, config)
    ours = logits(base.model)
    save_adapter(tmp_path / "adapter", state, config, base={"name": str(model_dir)}, recipe={})
    theirs = AutoModelForCausalLM.from_pretrained(model_dir)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert logits(wrapped).sub(ours).abs().max() < 1e-5
    stored = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(wrapped).keys()
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.saved.keys() == {name for name in state if ".lora_" not in name}
    detach(base.model)
    loaded.put_on(base.model)
    assert logits(base.model).equal(ours)


def test_a_module_trained_whole_that_does_not_fit(model_dir: Path, adapter_dir: Path) -> None:
    base = base_of(model_dir)
    config = LoRAConfig(r=2, target_modules=("q_proj",))
    save_adapter(adapter_dir, filled(base.model, config), config, base={"name": ""}, recipe={})
    for name, message in (
        ("lm_head", "another vocabulary"),
        ("head", "does not have"),
        ("model.layers.0.mlp.up_proj", "supported only for embeddings, norms"),
    ):
        key = f"base_model.model.{name}.weight"
        edit(adapter_dir / CONFIG, modules_to_save=[name])
        rewrite(adapter_dir, lambda s, key=key: s.update({key: torch.ones(3, 3)}))
        detach(base.model)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(adapter_dir).put_on(base.model)
        assert adapters(base.model) == {}
        rewrite(adapter_dir, lambda s, key=key: s.pop(key))


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole blocks, which bitsandbytes 0.50.2 multiplies rightly with on a CPU."""
    source = write_tiny_model(tmp_path_factory.mktemp("wide"), layers=1, hidden=256, tied=False)
    out = tmp_path_factory.mktemp("packed") / "out"
    return write_quantized(source, out, BaseRecipe(), dtype=torch.float32)


def in_float32(wrapped: Any) -> Tensor:
    """Return PEFT's logits on layers of bitsandbytes, which round where no gradient is wanted."""
    wrapped.get_input_embeddings().weight.requires_grad_(True)
    return wrapped(PROMPT).logits.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_puts_ours_on_bitsandbytes_layers(
    tmp_path: Path, packed_dir: Path, use_dora: bool
) -> None:
    base = load_base(packed_dir, BaseRecipe())
    config = LoRAConfig(r=4, alpha=8, use_dora=use_dora)
    state = filled(base.model, config)
    save_adapter(tmp_path, state, config, base={"name": str(packed_dir)}, recipe={})
    theirs = AutoModelForCausalLM.from_pretrained(packed_dir)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert isinstance(wrapped.base_model.model.model.layers[0].mlp.up_proj.base_layer, Linear4bit)
    assert in_float32(wrapped).sub(logits(base.model)).abs().max() < 1e-5


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_peft_trains_on_bitsandbytes_layers_is_ours(
    tmp_path: Path, packed_dir: Path, use_dora: bool
) -> None:
    base = load_base(packed_dir, BaseRecipe())
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", use_dora=use_dora, init_lora_weights=False
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(packed_dir), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    wrapped.save_pretrained(tmp_path)
    load_adapter(tmp_path).put_on(base.model)
    assert in_float32(wrapped).sub(logits(base.model)).abs().max() < 1e-5


def test_an_unwritable_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="is a file, not a directory"):
        save_adapter(
            tmp_path / "file" / "x",
            STATE,
            LoRAConfig(r=2),
            base={"name": "", "fingerprint": ""},
            recipe={},
        )


def test_a_field_that_is_null_is_as_if_it_were_not_there(adapter_dir: Path) -> None:
    names = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    edit(adapter_dir / CONFIG, **dict.fromkeys(names))
    assert load_adapter(adapter_dir).config == LoRAConfig(
        r=2, target_modules=("model.layers.0.q_proj",)
    )


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
FIELDS = [
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "peft_type"),
    *("alpha_pattern", "modules_to_save", "bias", "base_model_name_or_path", "target_modules"),
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FIELDS) | st.sampled_from(["base", "recipe"]), ANYTHING)
def test_any_field_may_hold_anything(adapter_dir: Path, field: str, value: Any) -> None:
    path = adapter_dir / (CONFIG if field in FIELDS else "halfbyte.json")
    before = path.read_text()
    edit(path, **{field: value})
    with suppress(CheckpointError):
        assert load_adapter(adapter_dir).state.keys() == STATE.keys()
    path.write_text(before)


PATTERNS = st.dictionaries(st.sampled_from(["a", "b.c", ".*c", "(a|b)"]), st.integers(1, 4))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4),
    st.floats(0.25, 64, width=32),
    PATTERNS,
    PATTERNS,
    st.booleans(),
    st.sets(st.sampled_from(["a", "x.b.c", "y.b.c", "x.a"]), min_size=1),
)
def test_what_is_written_is_what_is_read(
    tmp_path: Path,
    r: int,
    alpha: float,
    ranks: dict[str, int],
    alphas: dict[str, int],
    use_dora: bool,
    paths: set[str],
) -> None:
    config = LoRAConfig(
        r=r, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, use_dora=use_dora
    )
    state = {}
    for path in paths:
        state[f"{path}.lora_A.weight"] = torch.randn(config.at(path).r, 3)
        state[f"{path}.lora_B.weight"] = torch.randn(5, config.at(path).r)
        if use_dora:
            state[f"{path}.lora_magnitude_vector"] = torch.randn(5)
    save_adapter(tmp_path, state, config, base={"name": "m"}, recipe={"quant": "nf4"})
    loaded = load_adapter(tmp_path)
    assert loaded.state.keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in loaded.state.items())
    assert all(
        loaded.config.at(path)
        == replace(config.at(path), target_modules=loaded.config.target_modules)
        for path in paths
    )


@pytest.mark.parametrize("targets", [r"model\.layers\.1\..*(q|k)_proj", ("q_proj", "o_proj")])
def test_an_expression_means_the_same_in_a_family_whose_experts_peft_converts(
    tmp_path: Path, targets: str | tuple[str, ...]
) -> None:
    """PEFT would reduce it to q_proj and k_proj, in every layer."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tiny_model("qwen3_moe", **experts)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    base, config = base_of(tmp_path / "model"), LoRAConfig(r=2, target_modules=targets)
    adapter = tmp_path / "adapter"
    save_adapter(adapter, filled(base.model, config), config, base={"name": ""}, recipe={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs = peft.PeftModel.from_pretrained(model, adapter).eval()
    torch.testing.assert_close(logits(theirs), logits(base.model), rtol=0, atol=1e-4)
