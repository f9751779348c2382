"""Writes a base model as a bitsandbytes 4-bit checkpoint, which transformers, PEFT and vLLM load.

The weights are read, packed and written one at a time. The bytes are those ``load_base`` has in
memory with the same recipe. transformers loads a packed output head like any other linear, unless
it is tied to the embedding; a packed embedding and packed experts are our extensions, which only
halfbyte loads.
"""

import dataclasses
import logging
from collections.abc import Callable, Container, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.atomic import new_directory, require_writable
from halfbyte.checkpoint.base_model import BaseSource, importances, open_base
from halfbyte.checkpoint.bitsandbytes_experts import encode_common, encode_expert, plan_experts
from halfbyte.checkpoint.bitsandbytes_keys import encode_keys, plan_keys
from halfbyte.checkpoint.directory import write_description
from halfbyte.checkpoint.safetensors_file import SHARD_BYTES, Planned, Row, write_model
from halfbyte.checkpoint.source import ExpertSlice, warn_of_packing_again
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.linear.experts import expert_linears
from halfbyte.models.build import BaseRecipe, build, frozen_linears, pack
from halfbyte.quant import QuantizedWeight, empty_like_quantized

logger = logging.getLogger("halfbyte")


def write_quantized(
    source: str | Path | BaseSource,
    out_dir: str | Path,
    recipe: BaseRecipe,
    *,
    dtype: torch.dtype | None = None,
    exact: bool = False,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``source`` packed according to ``recipe``, in the layout of bitsandbytes.

    Args:
        source: An argument or the result of ``open_base``.
        out_dir: The output directory.
        recipe: How to pack, and on which device; its compute dtype is ignored.
        dtype: dtype of unpacked tensors, and of decoded ones; by default that of the source's
            matrices (bfloat16 for a GGUF file of blocks).
        exact: Whether unpacked tensors keep their own dtypes instead, and packed ones record
            theirs. Loading such a mixture with transformers is not tested.
        replace: Whether ``out_dir`` may exist; it is removed once the new one is complete.
        progress: Called with (bytes read, total bytes) after each tensor.
        shard_bytes: Maximum tensor bytes per file.

    Returns:
        ``out_dir``.

    Raises:
        CheckpointError: See ``open_base``; also if the source is packed already.
        OutputError: If ``out_dir`` exists and must not be replaced, cannot be written, or there is
            no space.
        WeightError: If a weight contains NaN or infinity.
    """
    if recipe.quant == "none":
        raise ConfigError("quantize needs quant nf4 or fp4, got none")
    if not isinstance(source, BaseSource):
        source = open_base(source)
    written = (*source.parameters, *source.encoders)
    if any(parameter.packed for parameter in written):
        raise CheckpointError(f"{source.name} is already packed in 4 bits; copy it instead")
    if not exact:  # exact copies are made while a model is loaded, which warns
        warn_of_packing_again(source, recipe)
    out_dir, dtype = Path(out_dir), dtype or source.dtype
    tokenizer = source.tokenizer()
    model = build(source.config, recipe)
    linears = {f"{path}.weight" for path in frozen_linears(model)}
    if model.halfbyte_recipe.quantize_embeddings and not exact:
        logger.warning(
            "the embedding is packed too: halfbyte loads what is written, transformers does not"
        )
    experts = expert_linears(model)
    if experts and not exact:
        logger.warning(
            "the experts are packed too, each on its own, for which bitsandbytes has no format: "
            "halfbyte loads what is written, transformers does not"
        )
    held = {p.name: _held(p.dtype, None if exact else dtype) for p in written}

    def empty(name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        assert recipe.quant != "none"
        return empty_like_quantized(
            shape,
            held[name],
            quant_type=recipe.quant,
            block_size=recipe.block_size,
            double_quant=recipe.double_quant,
        )

    plan: list[Planned] = []
    for parameter in written:
        if parameter.name in linears:
            plan += plan_keys(parameter.name, empty(parameter.name, parameter.shape))
        elif parameter.name in experts:
            count, *matrix = parameter.shape
            plan += plan_experts(parameter.name, empty(parameter.name, tuple(matrix)), count)
        else:
            plan.append(Planned(parameter.name, held[parameter.name], parameter.shape_in_files))
    require_writable(out_dir.absolute().parent, sum(planned.nbytes for planned in plan))
    with new_directory(out_dir, replace=replace) as directory:
        packed = _packed(source, recipe, linears, experts, held, progress)
        write_model(directory, plan, packed, shard_bytes=shard_bytes)
        write_description(
            directory,
            source.config,
            model_class=type(source.skeleton).__name__,
            dtype=dtype,
            tokenizer=tokenizer,
            generation_config=source.generation_config(),
            processor=source.processor_files(),
            packing=quantization_config(source, recipe, linears, dtype),
        )
    return out_dir


def _held(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and own.is_floating_point else own


def _packed(
    source: BaseSource,
    recipe: BaseRecipe,
    linears: set[str],
    experts: Container[str],
    held: dict[str, torch.dtype],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Tensor | Row]]:
    importance = importances(source, recipe)
    every = {p.name: p for p in (*source.parameters, *source.encoders)}
    done = 0
    encoders = ((parameter.name, source.tensor(parameter.name)) for parameter in source.encoders)
    for name, value in chain(source.tensors(recipe.device), encoders):
        done += source.bytes_read(name, value)
        if isinstance(value, ExpertSlice):
            assert name in experts
            index, matrix = value
            assert isinstance(matrix, Tensor)
            q = pack(matrix, recipe, f"{name}, expert {index}")
            del value, matrix
            q = dataclasses.replace(q.to("cpu"), dtype=held[name])
            if index == 0:
                yield from encode_common(name, q, source.experts[name]).items()
            yield from encode_expert(name, index, q)
            del q
        elif name in linears:
            assert isinstance(value, Tensor)
            q = pack(value, recipe, name, importance.get(name))
            del value
            q = dataclasses.replace(q.to("cpu"), dtype=held[name])
            yield from encode_keys(name, q).items()
            del q
        else:
            assert isinstance(value, Tensor)
            # Norms too: transformers multiplies by them as stored, and cannot mix dtypes.
            yield name, every[name].turned(value.to("cpu", held[name]))
            del value
        if progress is not None:
            progress(done, source.file_bytes)


def quantization_config(
    source: BaseSource, recipe: BaseRecipe, linears: set[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model whose ``linears`` (names) are packed."""
    skipped = [
        name
        for name, module in source.skeleton.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in linears
    ]
    skipped += [
        parameter.name.removesuffix(".weight")
        for parameter in source.encoders
        if parameter.name.endswith(".weight") and len(parameter.shape) == 2
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": recipe.quant,
        "bnb_4bit_use_double_quant": recipe.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
