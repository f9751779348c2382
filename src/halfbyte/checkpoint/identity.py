"""Records what an adapter was trained on, so that it is not used with anything else by mistake.

An adapter belongs to one base model: its weights as decoded, its tokenizer, its chat template.
``halfbyte.json`` next to it has a digest of each, and the quantisation options. The base model may
come in other files, for example as a packed copy: then the files' fingerprint differs, and the
packed weights decide.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.base_model import LoadedBase
from halfbyte.checkpoint.peft import LoadedAdapter
from halfbyte.config.reading import check
from halfbyte.config.schema import BaseOptions
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.foreign_text import quote
from halfbyte.linear.experts import ExpertLinear, expert_linears
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.models.build import frozen_linears

logger = logging.getLogger("halfbyte")

PACKING = (
    "quant",
    "double_quant",
    "block_size",
    "quantize_head",
    "quantize_embeddings",
    "quant_search",
)
"""The fields of ``BaseRecipe`` that determine the packing of weights."""

_SAMPLES = 4096


def identity_of(base: LoadedBase) -> dict[str, Any]:
    """Return a base model's record for ``halfbyte.json``, as JSON values."""
    return {
        "name": base.name,
        "fingerprint": base.fingerprint,
        "weights": weights_digest(base.model),
        "tokenizer": tokenizer_digest(base.tokenizer),
        "chat_template": _digest(base.tokenizer.chat_template),
    }


def recorded_packing(card: Mapping[str, Any], adapter: str | Path) -> dict[str, Any]:
    """Return how an adapter's base model was quantised in training: the fields of `PACKING` known.

    Args:
        card: The content of ``halfbyte.json``.
        adapter: The adapter's directory, for messages.

    Raises:
        CheckpointError: If a field is invalid.
    """
    recorded = card.get("recipe") or {}
    known = {name: recorded[name] for name in PACKING if name in recorded}
    try:
        trained = check(BaseOptions, {"model": str(adapter)} | known)
    except ConfigError as error:
        raise CheckpointError(f"{adapter}: the recipe in halfbyte.json: {error}") from error
    return {name: getattr(trained, name) for name in known}


def weights_digest(model: PreTrainedModel) -> str:
    """Return the SHA-256 of samples of each frozen linear: as packed, or in bfloat16 if plain.

    The linears of a layer's experts count as one.

    Of each tensor about 4096 evenly spaced elements and its size: takes a fraction of a second for
    billions of weights, and differs for any other training run. A few weights changed by hand may
    go unnoticed.
    """
    digest = hashlib.sha256()
    held: dict[str, FrozenLinear | ExpertLinear] = {
        **frozen_linears(model),
        **expert_linears(model),
    }
    for path, module in held.items():
        for name, tensor in module.tensors().items():
            digest.update(f"{path}.{name} {tuple(tensor.shape)};".encode())
            step = max(1, tensor.numel() // _SAMPLES)
            # Packed experts are not contiguous, and to flatten them would copy them.
            flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()
            sample = flat[..., ::step]
            if name == "weight":
                sample = sample.to(torch.bfloat16)
            digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the vocabulary, including added tokens, and of the merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    return _digest([sorted(tokenizer.get_vocab().items()), merges])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(card: Mapping[str, Any], base: LoadedBase) -> list[str]:
    """Return how ``base`` differs from ``card``; fields missing in the card are not compared.

    Args:
        card: The content of ``halfbyte.json``; empty for an adapter of PEFT.
        base: A base model as loaded for use with the adapter.
    """
    recipe, now = card.get("recipe") or {}, base.model.halfbyte_recipe
    if recipe:  # cards from before there was a search do not say so
        recipe = {"quant_search": False, **recipe}
    recorded = card.get("base") or {}
    same_weights = recorded.get("weights") == weights_digest(base.model)
    found = [
        f"{name} was {quote(recipe[name])}, now it is {quote(getattr(now, name))}"
        for name in PACKING
        if hasattr(now, name) and recipe.get(name, getattr(now, name)) != getattr(now, name)
        # A plain base model has no further options.
        if name == "quant" or now.quant != "none"
        # A packed copy does not record how its scales were chosen.
        if not (name == "quant_search" and same_weights)
    ]
    same_files = recorded.get("fingerprint", base.fingerprint) == base.fingerprint
    # The same files, packed by the same recipe, may differ in the last bit of a scale between
    # devices; that is still the same base model.
    if not same_files and (found or not same_weights):
        found.append("the weights differ")
    if recorded.get("tokenizer", tokens := tokenizer_digest(base.tokenizer)) != tokens:
        found.append("the tokenizer differs")
    if recorded.get("chat_template", template := _digest(base.tokenizer.chat_template)) != template:
        found.append("the chat template differs")
    return found


def require_same_base(adapter: LoadedAdapter, base: LoadedBase, *, allow_mismatch: bool) -> None:
    """Refuse a base model that an adapter was not trained on, or warn of it.

    Raises:
        CheckpointError: If they differ, and that is not allowed.
    """
    found = differences(adapter.info, base)
    if not found:
        return
    message = (
        f"the adapter was trained on {quote(adapter.base_name)}, this model differs: "
        f"{'; '.join(found)}"
    )
    if not allow_mismatch:
        raise CheckpointError(
            f"{message}. Use the model it was trained on, with the same quantisation (a quantised "
            "copy must come from the same kind of device, halfbyte quantize --device), or allow "
            "the mismatch (--allow-mismatch)"
        )
    logger.warning("%s; used anyway, as --allow-mismatch is set", message)
