"""Packed copies of base models in the user's cache, so that later starts need not pack.

A copy is a directory as written by ``write_quantized``, except that unpacked tensors keep their
dtype: the model loaded from it is identical to the one loaded from the files, bit for bit. Its name
is a digest of the files' fingerprint and everything that determines the bytes, including the kind
of device, since GPU and CPU give different codes. A file next to the weights has their fingerprint:
a copy that does not match it (truncated, changed) is created again.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.atomic import new_directory
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.directory import DirectorySource
from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.checkpoint.reading import read_json
from halfbyte.checkpoint.source import BaseSource
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.models.build import BaseRecipe
from halfbyte.user_cache import cache_home

_FORMAT = 1  # incremented when the bytes of a copy change
_CARD = "halfbyte_cache.json"

logger = logging.getLogger("halfbyte")


def cached(
    source: BaseSource, recipe: BaseRecipe, progress: Callable[[int, int], None] | None = None
) -> BaseSource:
    """Return the packed copy of ``source``, creating it if there is none.

    Args:
        source: Any base model.
        recipe: How it will be stored.
        progress: Called with (bytes read, total bytes) while a copy is created.

    Returns:
        A source of packed weights; ``source`` itself if there is nothing to pack in it, or the
        copy cannot be written, which is logged.

    Raises:
        WeightError: If a weight contains NaN or infinity.
    """
    if recipe.quant == "none" or any(parameter.packed for parameter in source.parameters):
        return source
    made_from = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "quant": recipe.quant,
        "double_quant": recipe.double_quant,
        "block_size": recipe.block_size,
        "quantize_head": recipe.quantize_head,
        "quantize_embeddings": recipe.quantize_embeddings,
        "quant_search": recipe.quant_search,
        "device": torch.device(recipe.device).type,
    }
    if source.experts:
        made_from["experts"] = "packed"  # copies of format 1 had them in 16 bits at first
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    directory = cache_directory() / digest[:32]
    if directory.exists():
        try:
            return _open(directory, made_from, source.name)
        except CheckpointError as error:
            logger.warning("the packed copy of %s is damaged, repacking: %s", source.name, error)
    try:
        with output_lock(directory), new_directory(directory, replace=True) as fresh:
            write_quantized(source, fresh, recipe, exact=True, progress=progress)
            card = made_from | {"copy": DirectorySource(fresh, source.name).fingerprint}
            (fresh / _CARD).write_text(json.dumps(card, indent=2))
        copy = DirectorySource(directory, source.name)
    except (OutputError, CheckpointError) as error:
        # No space, perhaps, or another process is writing the same copy.
        logger.warning("no packed copy of %s is kept: %s", source.name, error)
        return source
    size = copy.file_bytes / 1e9
    logger.warning("the packed copy of %s (%.2f GB) is kept in %s", source.name, size, directory)
    return copy


def cache_directory() -> Path:
    """Return the directory of packed copies, in the user's cache."""
    return cache_home() / "models"


def _open(directory: Path, made_from: dict[str, Any], name: str) -> BaseSource:
    card = read_json(directory / _CARD, "it says what the copy was made from")
    copy = DirectorySource(directory, name)
    if card != made_from | {"copy": copy.fingerprint}:
        raise CheckpointError(f"{directory} does not hold what was written there")
    return copy
