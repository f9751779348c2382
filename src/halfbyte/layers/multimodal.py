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

from halfbyte.layers.conv1d import replace_conv1d

SUPPORTED = (
    "AyaVisionForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
"""Classes of more than text whose text decoder can be trained."""

_MULTIMODAL: tuple[tuple[Any, Any], ...] = (
    (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (transformers.AutoModelForMultimodalLM, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
_AUTO_CLASSES = (
    *_MULTIMODAL,
    (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
)


def _classes(config: PretrainedConfig, autos: tuple[tuple[Any, Any], ...]) -> dict[str, Any]:
    """Return the names of transformers' classes for a configuration, and what builds each."""
    kind = type(config)
    return {mapping[kind].__name__: auto for auto, mapping in reversed(autos) if kind in mapping}


def _named(config: PretrainedConfig) -> str | None:
    """Return the class that config.json names."""
    names = config.architectures
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def class_name(config: PretrainedConfig) -> str | None:
    """Return the class of a checkpoint: the one it names, or else the one of the whole model.

    None if transformers has no class for it that generates text.
    """
    classes, named = _classes(config, _AUTO_CLASSES), _named(config)
    return named if named in classes else next(reversed(classes), None)


def why_unsupported(config: PretrainedConfig) -> str | None:
    """Return why the model of a configuration cannot be used, as a clause, or None."""
    name, named = class_name(config), _named(config)
    if name is None:
        return f"its type {config.model_type} is not a causal language model in transformers"
    if named not in (None, name) and hasattr(transformers, named):
        return (
            f"its config.json names the class {named}; expected is a decoder that generates text, "
            f"such as {name}"
        )
    if _is_multimodal(config, name) and name not in SUPPORTED:
        families = ", ".join(each.removesuffix("ForConditionalGeneration") for each in SUPPORTED)
        return (
            f"{name} is a model of more than text; of those, only the text decoders of these "
            f"families are supported: {families}"
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
        model: PreTrainedModel = _classes(config, _AUTO_CLASSES)[name].from_config(
            config, **({} if dtype is None else {"dtype": dtype})
        )
    replace_conv1d(model)
    return model


def build_decoder(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model of a configuration without encoders; see `build_whole`."""
    model = build_whole(config, dtype)
    remove_encoders(model)
    return model


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
    removed: list[str] = []

    def prune(owner: nn.Module, path: str) -> None:
        for name, child in list(owner.named_children()):
            child_path = f"{path}{name}"
            if child in kept:
                continue
            if not kept.isdisjoint(child.modules()):
                prune(child, f"{child_path}.")
            elif any(True for _ in child.parameters()):
                removed.extend(path for path, _ in child.named_modules(prefix=child_path))
                owner._modules[name] = None

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
