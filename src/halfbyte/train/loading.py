"""A base model opened for use: device and dtype chosen, loaded, adapter put on, all of it told."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.base_model import BaseSource, LoadedBase, load_base, open_base
from halfbyte.checkpoint.identity import differences
from halfbyte.checkpoint.peft import LoadedAdapter, load_adapter
from halfbyte.errors import CheckpointError
from halfbyte.lora import LoRAConfig
from halfbyte.model.build import BaseRecipe
from halfbyte.model.precision import choose_device_and_dtype
from halfbyte.train.config import TrainConfig

if TYPE_CHECKING:
    from halfbyte.report import RunReport

logger = logging.getLogger("halfbyte")


def load_told(
    source: BaseSource, recipe: BaseRecipe, report: "RunReport | None", *, cache: bool = False
) -> LoadedBase:
    """Load ``source``, showing progress and saying what was packed and what was not."""
    if report is None:
        return load_base(source, recipe, cache=cache)
    with report.task(f"loading {source.name}") as progress:
        base = load_base(source, recipe, progress=progress, cache=cache)
    for line in base.audit.lines():
        report.note(line)
    return base


def open_model(
    model: str,
    *,
    adapter: str | None = None,
    quant: Literal["nf4", "fp4", "none"] = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    quantize_head: bool = False,
    quantize_embeddings: bool = False,
    quant_search: bool = False,
    compute_dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    cache_quantized: bool = False,
    allow_mismatch: bool = False,
    report: "RunReport | None" = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LoadedBase]:
    """Open a base model, with an adapter if one is named, ready to answer or to be evaluated.

    Args:
        model: A directory of safetensors, a GGUF file, or a hub id.
        adapter: Directory of an adapter that was trained on this base.
        quant: How to hold the linears: ``nf4``, ``fp4`` or ``none``.
        double_quant: Whether to quantise the scales.
        block_size: Weights that share a scale.
        quantize_head: Whether to pack the output head too.
        quantize_embeddings: Whether to pack the embedding too.
        quant_search: Whether to search for the scales of least error.
        compute_dtype: ``auto``, ``float32``, ``bfloat16`` or, on a GPU, ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        revision: Branch, tag or commit of a hub model.
        cache_quantized: Whether to load from a packed copy in the user's cache, made at need.
        allow_mismatch: Whether to use the adapter, with a warning, on a base, a tokenizer or a
            template that is not the one it was trained with.
        report: Who is told, and shows progress.

    Raises:
        UserError: If the model or the adapter is missing, damaged, or they do not belong together.
    """
    place, dtype, why = choose_device_and_dtype(device, compute_dtype)
    source = open_base(model, revision=revision)
    loaded = None if adapter is None else load_adapter(adapter)
    if loaded is not None:
        # Now, before gigabytes are read.
        modules = source.skeleton.named_modules()
        loaded.require_layers([path for path, m in modules if isinstance(m, nn.Linear)])
    recipe = BaseRecipe(
        quant,
        double_quant,
        block_size,
        dtype,
        place,
        quantize_head,
        quantize_embeddings,
        quant_search,
    )
    if report is not None:
        report.note(f"on {place}, products in {str(dtype).removeprefix('torch.')}: {why}")
    base = load_told(source, recipe, report, cache=cache_quantized)
    if loaded is not None:
        _compare(loaded, base, allow_mismatch=allow_mismatch)
        loaded.put_on(base.model)
    return base.model, base.tokenizer, base


def _compare(adapter: LoadedAdapter, base: LoadedBase, *, allow_mismatch: bool) -> None:
    found = differences(adapter.info, base)
    if not found:
        return
    told = (
        f"the adapter was trained on {adapter.base_name!r}, and this is not it: {'; '.join(found)}"
    )
    if not allow_mismatch:
        raise CheckpointError(
            f"{told}. Give the model it was trained on, held as it was then (a packed copy: packed "
            "on the same kind of device, halfbyte quantize --device), or allow the mismatch "
            "(--allow-mismatch)"
        )
    logger.warning("%s; used all the same, as allowed", told)


def recipe_of(config: TrainConfig, dtype: torch.dtype, device: str) -> BaseRecipe:
    """Return how a run holds its base."""
    return BaseRecipe(
        quant=config.quant,
        double_quant=config.double_quant,
        block_size=config.block_size,
        compute_dtype=dtype,
        device=device,
        quantize_head=config.quantize_head,
        quantize_embeddings=config.quantize_embeddings,
        quant_search=config.quant_search,
    )


def lora_of(config: TrainConfig) -> LoRAConfig:
    """Return the adapters that a run trains."""
    return LoRAConfig(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_dora=config.use_dora,
        modules_to_save=config.modules_to_save,
    )


def recipe_facts(recipe: BaseRecipe) -> dict[str, Any]:
    """Return ``recipe`` as JSON values, for the adapter's card."""
    facts = dataclasses.asdict(recipe)
    del facts["device"]  # where, not how
    return facts | {"compute_dtype": str(recipe.compute_dtype).removeprefix("torch.")}
