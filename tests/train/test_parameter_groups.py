"""Which parameters decay, and at which rate they learn: as in transformers, and as torch steps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import adapter_parameters
from halfbyte.train import trainer as trainer_module
from halfbyte.train.parameter_groups import parameter_groups
from halfbyte.train.schedule import Schedule
from tests.engine.test_layerwise import FAMILIES, SIZES, batches_of, model_of
from tests.train.test_trainer import config

WHOLE = ("embed_tokens", "lm_head", "norm", "input_layernorm")
UNTIED = Qwen2Config(**SIZES, use_sliding_window=False, tie_word_embeddings=False)


def groups_of(model, **options):
    return parameter_groups(model, adapter_parameters(model), config(**options))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_decays_is_what_decays_in_transformers_trainer():
    model = model_of(UNTIED, modules_to_save=WHOLE)
    ours = {
        name: group.weight_decay
        for group in groups_of(model, weight_decay=0.1)
        for name in group.names
    }
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_config(UNTIED),
        LoraConfig(target_modules="all-linear", modules_to_save=list(WHOLE)),
    )
    decaying = set(Trainer.get_decay_parameter_names(None, wrapped))
    theirs = {
        name.removeprefix("base_model.model.")
        .replace("modules_to_save.default.", "")
        .replace("lora_A.default", "lora_A")
        .replace("lora_B.default", "lora_B"): 0.1 * (name in decaying)
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    assert ours == theirs
    assert {ours["model.norm.weight"], ours["lm_head.weight"]} == {0.0, 0.1}


def test_without_decay_there_is_one_group_and_with_it_magnitudes_have_none():
    model = model_of(FAMILIES["llama"], use_dora=True)
    [alone] = groups_of(model)
    assert alone.names == list(adapter_parameters(model))
    matrices, vectors = groups_of(model, weight_decay=0.1)
    assert matrices.weight_decay == 0.1
    assert vectors.weight_decay == 0.0
    assert {name.rpartition(".")[2] for name in vectors.names} == {"lora_magnitude_vector"}


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw_32bit"])
def test_steps_are_those_of_torch_s_adamw_with_these_groups(optim):
    model = model_of(UNTIED, modules_to_save=WHOLE)
    options = config(
        learning_rate=1e-2,
        embedding_learning_rate=2e-3,
        loraplus_lr_ratio=4.0,
        weight_decay=0.3,
        max_grad_norm=0.0,
        optim=optim,
    )
    parameters = adapter_parameters(model)
    copies = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}

    def kind(name):
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            return 2e-3, 0.3
        if "norm" in name:
            return 1e-2, 0.0
        return (4e-2 if "lora_B" in name else 1e-2), 0.3

    theirs = torch.optim.AdamW(
        [
            {"params": [copy], "lr": kind(name)[0], "weight_decay": kind(name)[1]}
            for name, copy in copies.items()
        ]
    )
    made = trainer_module.Trainer(
        LayerEngine(model), parameters, options, Schedule(1e-2, "constant", 0, 10)
    )
    made.clear_gradients = lambda: None  # to see the gradients afterwards
    for step in range(3):
        made.step(step, batches_of([(2, 13)]))
        for name, copy in copies.items():
            copy.grad = parameters[name].grad.clone()
            parameters[name].grad.zero_()
        theirs.step()
    for name, copy in copies.items():
        torch.testing.assert_close(parameters[name], copy, rtol=1e-5, atol=1e-6)


def test_a_rate_for_an_embedding_that_is_not_trained_is_refused():
    model = model_of(FAMILIES["llama"], modules_to_save=("norm",))
    with pytest.raises(ConfigError, match="name it in `modules_to_save`, such as embed_tokens"):
        groups_of(model, embedding_learning_rate=1e-5)
