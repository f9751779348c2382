"""Models of more than text: the class of a checkpoint, and a decoder that computes what it did."""

import copy
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from halfbyte.layers.multimodal import (
    SUPPORTED,
    build_decoder,
    class_name,
    remove_encoders,
    removed_modules,
    ties_head,
    unknown_class,
    why_unsupported,
)
from tests.multimodal import FAMILIES, tiny_config, tiny_multimodal
from tests.tiny import tiny_llama, tiny_tokenizer


def test_every_supported_class_is_tested() -> None:
    assert sorted(str(class_name(tiny_config(family))) for family in FAMILIES) == sorted(SUPPORTED)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_decoder_alone_computes_what_the_model_does_from_earlier_tokens(family: str) -> None:
    whole = tiny_multimodal(family)
    decoder = copy.deepcopy(whole)
    remove_encoders(decoder)
    kept = {name for name, _ in decoder.named_parameters()}
    gone = {name for name, _ in whole.named_parameters()} - kept
    paths = removed_modules(decoder)
    assert len(gone) > 0
    assert all(name.rpartition(".")[0] in paths for name in gone)
    assert not any(name.startswith(tuple(paths)) for name in kept)

    ids = torch.randint(3, 380, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = whole(input_ids=ids).logits
    assert torch.equal(decoder(input_ids=ids).logits, expected)
    changed = ids.clone()
    changed[:, -1] = 381 - changed[:, -1]
    later = decoder(input_ids=changed).logits
    assert torch.allclose(later[:, :-1], expected[:, :-1], atol=1e-5)
    assert not torch.allclose(later[:, -1], expected[:, -1], atol=1e-2)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "mistral3"])
def test_a_head_is_tied_where_the_whole_model_ties_it(family: str) -> None:
    config = tiny_config(family)
    for tied in (True, False):
        config.tie_word_embeddings = tied  # the text configuration may say otherwise, or nothing
        assert ties_head(build_decoder(config)) == tied


def test_a_model_of_text_alone_is_left_as_it_is() -> None:
    model = tiny_llama(tiny_tokenizer())
    before = [name for name, _ in model.named_modules()]
    remove_encoders(model)
    assert removed_modules(model) == ()
    assert [name for name, _ in model.named_modules()] == before
    assert ties_head(model)


def named(model_type: str, *classes: str) -> Any:
    config = AutoConfig.for_model(model_type)
    config.architectures = list(classes) or None
    return config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (named("qwen3_5"), "Qwen3_5ForConditionalGeneration"),
        (named("qwen3_5", "Qwen3_5ForConditionalGeneration"), "Qwen3_5ForConditionalGeneration"),
        (named("qwen3_5", "Qwen3_5ForCausalLM"), "Qwen3_5ForCausalLM"),
        (named("qwen3_5_text", "Qwen3_5ForCausalLM"), "Qwen3_5ForCausalLM"),
        (named("gemma3_text"), "Gemma3ForCausalLM"),
        (named("llama", "LLaMAForCausalLM"), "LlamaForCausalLM"),
        (named("mistral4"), "Mistral4ForCausalLM"),
        (named("mllama"), "MllamaForConditionalGeneration"),
        (named("mllama_text_model", "MllamaForCausalLM"), "MllamaForCausalLM"),
        (named("emu3_text_model", "Emu3ForCausalLM"), "Emu3ForCausalLM"),
        (named("vit"), None),
    ],
)
def test_the_class_is_the_one_config_json_names(config: Any, expected: str | None) -> None:
    assert class_name(config) == expected


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (named("paligemma"), "cannot be trained: the tokens of its prompts see later"),
        (
            named("granite4_vision"),
            "a model of more than text, and not one of those whose text decoder can",
        ),
        (named("qwen2_5_omni"), "save that with transformers, Qwen2_5OmniThinkerForConditionalGen"),
        (named("qwen2_5_omni", "Qwen2_5OmniModel"), "only its thinker reads and writes text"),
        (named("florence2"), "an encoder and a decoder that reads it; expected is a decoder alone"),
        (named("git"), "GitForCausalLM cannot be trained: transformers' generate expects"),
        (named("musicgen"), "MusicgenForCausalLM cannot be trained: its tokens are codes"),
        (named("mllama_text_model"), "its type mllama_text_model is not a causal language model"),
        (named("vit"), "its type vit is not a causal language model in transformers"),
        (
            named("llama", "LlamaForSequenceClassification"),
            "names the class LlamaForSequenceClassification; expected is a decoder that generates "
            "text, such as LlamaForCausalLM",
        ),
        (named("bert", "BertForMaskedLM"), "names the class BertForMaskedLM; expected is"),
    ],
)
def test_what_is_not_supported_has_a_reason(config: Any, reason: str) -> None:
    found = why_unsupported(config)
    assert found is not None
    assert reason in found
    with pytest.raises(ValueError, match=re.escape(reason)):
        build_decoder(config)
    assert len(found) < 500


def test_classes_that_transformers_lacks_are_named_and_no_obstacle() -> None:
    config = named("llama", "LLaMAForCausalLM")
    assert why_unsupported(config) is None
    assert unknown_class(config) == "LLaMAForCausalLM"
    assert unknown_class(named("llama", "LlamaForCausalLM")) is None
    for nothing in (None, [], [7], "LlamaForCausalLM"):
        config = LlamaConfig()
        config.architectures = nothing  # as a damaged file may have it
        assert (class_name(config), unknown_class(config)) == ("LlamaForCausalLM", None)
        assert why_unsupported(config) is None
