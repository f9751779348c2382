"""Image-text and audio-text models: the class of a checkpoint, and its text decoder.

Such a model is a text decoder with its embedding and head, encoders of other inputs, and projectors
between them. Only text is trained, so only the decoder is loaded: `remove_encoders` takes the rest
out of what transformers builds. The class is the one that config.json names, because adapters are
loaded onto that one: ``AutoModelForCausalLM`` would build some checkpoints as a text-only class, in
which every layer has another path.

Whether the decoder alone computes what the whole model computes for text, and only from earlier
tokens (PaliGemma attends to later ones), depends on a family's code. So the families that are
supported are listed, and the tests compare each of them with the whole model.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halfbyte.layers.conv1d import replace_conv1d

SUPPORTED = (
    "AriaForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "ChameleonForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "CohereCompassForConditionalGeneration",
    "Cosmos3OmniForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
    "Emu3ForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "FuyuForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "GraniteDoclingForConditionalGeneration",
    "GraniteSpeechForConditionalGeneration",
    "HunYuanVLForConditionalGeneration",
    "HyperCLOVAXVisionV2ForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "JanusForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Lfm3VlForConditionalGeneration",
    "LightOnOcrForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
    "MiniMaxM3SparseForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MistralLarge4ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "MossTranscribeDiarizeForConditionalGeneration",
    "Ovis2ForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
    "Phi4MultimodalForCausalLM",
    "QianfanOCRForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen4ExpForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VideoLlama3ForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
"""Classes of more than text whose text decoder can be trained."""

_ENCODERS_OF_DECODER = {
    "ChameleonForConditionalGeneration": ("model.vqmodel",),
    "Phi4MultimodalForCausalLM": (
        "model.embed_tokens_extend.image_embed",
        "model.embed_tokens_extend.audio_embed",
    ),
}
"""Paths of encoders that a class keeps inside its decoder."""

_ASKED_FOR_DEVICE = {"Qwen2AudioForConditionalGeneration"}
"""Classes that ask an encoder for its device, also when there is nothing to encode."""

_MULTIMODAL: tuple[tuple[Any, Any], ...] = (
    (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (transformers.AutoModelForMultimodalLM, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
_AUTO_CLASSES = (
    *_MULTIMODAL,
    (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
)


_IS_DRAFT = "it drafts tokens for another model, whose keys and values it reads"
_NEEDS_MORE = "it does not run on text alone"
_OF_CODES = "its tokens are codes of sound, several at each position"
_OMNI = (
    "only its thinker reads and writes text; save that with transformers, "
    "{}.from_pretrained(…).save_pretrained(…), and train the copy"
)
_REFUSED = {
    "BlipForConditionalGeneration": _NEEDS_MORE,
    "Blip2ForConditionalGeneration": _NEEDS_MORE,
    "DiffusionGemmaForBlockDiffusion": "it fills in blocks of tokens, not one after the other",
    "Gemma3nForConditionalGeneration": (
        "text passes through the projectors of its encoders, too; save its text half with "
        "transformers, Gemma3nForCausalLM.from_pretrained(…).save_pretrained(…), and train the copy"
    ),
    "Gemma4AssistantForCausalLM": _IS_DRAFT,
    "Gemma4UnifiedAssistantForCausalLM": _IS_DRAFT,
    "GitForCausalLM": "transformers' generate expects an image in its prompt",
    "IdeficsForVisionText2Text": _NEEDS_MORE,
    "InstructBlipForConditionalGeneration": _NEEDS_MORE,
    "InstructBlipVideoForConditionalGeneration": _NEEDS_MORE,
    "Kosmos2ForConditionalGeneration": _NEEDS_MORE,
    "MusicgenForCausalLM": _OF_CODES,
    "MusicgenMelodyForCausalLM": _OF_CODES,
    "PI0ForConditionalGeneration": "it generates actions, not text",
    "PaliGemmaForConditionalGeneration": "the tokens of its prompts see later ones",
    "Qwen2_5OmniForConditionalGeneration": _OMNI.format(
        "Qwen2_5OmniThinkerForConditionalGeneration"
    ),
    "Qwen3OmniMoeForConditionalGeneration": _OMNI.format(
        "Qwen3OmniMoeThinkerForConditionalGeneration"
    ),
    "VoxtralRealtimeForConditionalGeneration": _NEEDS_MORE,
}
"""Classes that are refused, and why: most by their nature."""


def _classes(config: PretrainedConfig, autos: tuple[tuple[Any, Any], ...]) -> dict[str, Any]:
    """Return the names of transformers' classes for a configuration, and what builds each."""
    kind = type(config)
    return {
        mapping[kind].__name__: auto.from_config
        for auto, mapping in reversed(autos)
        if kind in mapping
    }


def _text_classes(config: PretrainedConfig) -> dict[str, Any]:
    """Return the same of all classes, of which the last is that of the whole model.

    A few text classes are known to transformers' tables by the configuration of the whole model
    only, and save another one (Mllama's, Emu3's); config.json names them.
    """
    named, found = _named(config), _classes(config, _AUTO_CLASSES)
    if named is None or named in found:
        return found
    own: Any = getattr(transformers, named, None)
    if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and own.config_class is type(config):
        found = {named: own._from_config, **found}
    return found


def _named(config: PretrainedConfig) -> str | None:
    """Return the class that config.json names."""
    names = config.architectures
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def class_name(config: PretrainedConfig) -> str | None:
    """Return the class of a checkpoint: the one it names, or else the one of the whole model.

    None if transformers has no class for it that generates text.
    """
    classes, named = _text_classes(config), _named(config)
    return named if named in classes else next(reversed(classes), None)


def why_unsupported(config: PretrainedConfig) -> str | None:
    """Return why the model of a configuration cannot be used, as a clause, or None."""
    name, named = class_name(config), _named(config)
    if name is None:
        return f"its type {config.model_type} is not a causal language model in transformers"
    if name in _REFUSED:
        return f"{name} cannot be trained: {_REFUSED[name]}"
    if named not in (None, name) and hasattr(transformers, named):
        return (
            f"its config.json names the class {named}; expected is a decoder that generates text, "
            f"such as {name}"
        )
    if _is_multimodal(config, name) and name not in SUPPORTED:
        if config.is_encoder_decoder:
            return f"{name} is an encoder and a decoder that reads it; expected is a decoder alone"
        return (
            f"{name} is a model of more than text, and not one of those whose text decoder can be "
            "trained; docs/models.md lists them"
        )
    return None


def _is_multimodal(config: PretrainedConfig, name: str) -> bool:
    # Text-only models that transformers builds with an image-text class as well have one part.
    parts = bool(config.sub_configs) or config.is_encoder_decoder
    return parts and name in _classes(config, _MULTIMODAL)


def unknown_class(config: PretrainedConfig) -> str | None:
    """Return the class that config.json names, if transformers does not have it."""
    named = _named(config)
    return None if named is None or hasattr(transformers, named) else named


def build_whole(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the whole model of a configuration, on the meta device.

    Args:
        config: The configuration.
        dtype: dtype of its parameters; by default that of the configuration.

    Raises:
        ValueError: If it is not supported, or transformers cannot build it; or others, as its code
            does not check all of a configuration.
    """
    if reason := why_unsupported(config):
        raise ValueError(reason)
    name = class_name(config)
    assert name is not None
    with torch.device("meta"):
        build = _text_classes(config)[name]
        model: PreTrainedModel = build(config, **({} if dtype is None else {"dtype": dtype}))
    replace_conv1d(model)
    return model


def build_decoder(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model of a configuration without encoders; see `build_whole`."""
    model = build_whole(config, dtype)
    remove_encoders(model)
    return model


def text_decoder(model: PreTrainedModel) -> Any:
    """Return a model's decoder without its head.

    ModernBERT's ``get_decoder()`` is the linear of its head, Llama 4's a causal model with a head.
    """
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        decoder = model.base_model
    inner = getattr(decoder, "model", None)
    return inner if isinstance(inner, PreTrainedModel) else decoder


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model's decoder.

    Raises:
        ValueError: They are not in one list; the message says what was found.
    """
    decoder, count = text_decoder(model), model.config.get_text_config().num_hidden_layers
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ValueError(
            f"{type(decoder).__name__} does not have one list of its {count} layers, "
            f"but {len(lists)}"
        )
    return list(lists[0])


def remove_encoders(model: PreTrainedModel) -> None:
    """Remove the modules with parameters that text does not pass through.

    Their paths are stored in ``model.halfbyte_removed``. Other paths do not change, and a model of
    text only is unchanged. A parameter of a module around the decoder stays (LLaVA-NeXT has one
    vector there), since transformers' initialisation needs it.
    """
    model.halfbyte_removed = ()
    if type(model).__name__ not in SUPPORTED:
        return
    kept = {*model.get_decoder().modules(), model.get_output_embeddings()}
    for path in _ENCODERS_OF_DECODER.get(type(model).__name__, ()):
        kept.difference_update(model.get_submodule(path).modules())
    place: Any = None
    if type(model).__name__ in _ASKED_FOR_DEVICE:
        place = nn.Module()
        place.device = None
    removed: list[str] = []

    def prune(owner: nn.Module, path: str) -> None:
        for name, child in list(owner.named_children()):
            child_path, inside = f"{path}{name}", set(child.modules())
            if inside <= kept:
                continue
            if inside & kept:
                prune(child, f"{child_path}.")
            elif any(True for _ in child.parameters()):
                removed.extend(path for path, _ in child.named_modules(prefix=child_path))
                owner._modules[name] = place

    prune(model, "")
    model.halfbyte_removed = tuple(removed)


def removed_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that `remove_encoders` has removed."""
    removed: tuple[str, ...] = getattr(model, "halfbyte_removed", ())
    return removed


def ties_head(model: PreTrainedModel) -> bool:
    """Return whether the output head's weight is the embedding's.

    Configurations of more than text have the option twice, and the two may differ.
    """
    head = model.get_output_embeddings()
    tied: dict[str, str] = model.all_tied_weights_keys
    paths = [path for path, module in model.named_modules() if module is head]
    return any(f"{path}.weight" in tied for path in paths)
