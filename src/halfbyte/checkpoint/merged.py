"""A trained adapter merged into its base model, as a model for any program.

W is a weight of the model's files, D its dequantised 4-bit form, Δ = s·B·A the update trained on D.
There are three ways to merge, and each has a different loss:

    decoded     D + Δ, in 16 bits      the trained weight, rounded once
    original    W + Δ, in 16 bits      adds W − D, which training never saw
    nf4         D + Δ, packed again    small updates are rounded away; a quarter of the size

Experts in MXFP4 that have no adapter are written as they are, whatever the others become: the
merged model is served as its base is.

``Merged`` is any of them as a source of tensors, computed on demand from the model in memory, in
the form in which they will be read: so a merge can be measured before it is written
(``tools.merge_evaluation``). Sums are computed in float32, one linear layer or expert at a time.

Weights in 16 bits are written in the form of transformers' ``save_pretrained`` (saved_form.py), so
experts are one by one where checkpoints of the family have them so. A packed model has the names of
transformers' parameters, and its experts stay in 16 bits, as other programs expect.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.atomic import new_directory, require_writable
from halfbyte.checkpoint.bitsandbytes import quantization_config
from halfbyte.checkpoint.bitsandbytes_keys import encode_keys, plan_keys
from halfbyte.checkpoint.conversion import empty_like
from halfbyte.checkpoint.directory import write_description
from halfbyte.checkpoint.mxfp4_keys import PUBLISHED, dense, encode_mxfp4, plan_mxfp4
from halfbyte.checkpoint.safetensors_file import SHARD_BYTES, Planned, Row, write_model
from halfbyte.checkpoint.saved_form import SavedForm
from halfbyte.checkpoint.source import DECODED_FROM, BaseSource, ExpertSlice, Parameter
from halfbyte.data import end_of_turn
from halfbyte.errors import CheckpointError
from halfbyte.layers.multimodal import build_whole
from halfbyte.linear.expert_lora import ExpertLoRA
from halfbyte.linear.experts import expert_linears
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.lora import delta
from halfbyte.models.build import BaseRecipe, frozen_linears
from halfbyte.quant import (
    MXFP4Weight,
    PackedWeight,
    QuantizedWeight,
    empty_like_quantized,
    quantize,
)

Into = Literal["decoded", "original", "nf4"]


def ways(base: BaseSource, model: PreTrainedModel) -> list[Into]:
    """Return the ways of merging that differ for this model."""
    if any(parameter.mxfp4 for parameter in base.parameters):
        return ["decoded"]
    packed = any(parameter.packed for parameter in base.parameters)
    if packed or model.halfbyte_recipe.quant == "none":
        return ["decoded", "nf4"]
    return ["decoded", "original", "nf4"]


class Merged(BaseSource):
    """A base model with its adapters merged in, written by ``write_merged``.

    Args:
        base: The files the model was loaded from.
        model: A model of ``load_base``, with or without adapters; nothing is copied from it.
        into: What the adapters are added to.
        dtype: dtype of unpacked tensors, and of decoded ones.

    Raises:
        CheckpointError: If the original weights are requested, and the files have packed ones, or
            others are to be packed beside experts in MXFP4, which no program loads; or if layers
            that share a weight have adapters (Zamba 2's), each of which would change it.
    """

    def __init__(
        self,
        base: BaseSource,
        model: PreTrainedModel,
        into: Into = "decoded",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.into, self.dtype, self._base, self._model = into, dtype, base, model
        self.name, self.config, self.skeleton = base.name, base.config, base.skeleton
        self._linears = {f"{path}.weight": m for path, m in frozen_linears(model).items()}
        self._experts = expert_linears(model)
        tied: dict[str, str] = base.skeleton.all_tied_weights_keys
        adapted = {name for name, linear in self._linears.items() if linear.adapter is not None}
        if shared := sorted(adapted & {*tied, *tied.values()}):
            raise CheckpointError(
                f"the adapter cannot be merged: {shared[0]} is the weight of several layers of "
                f"{base.name}, each with an adapter of its own. Use the adapter as it is"
            )
        held: BaseRecipe = model.halfbyte_recipe
        self._recipe = dataclasses.replace(held, quant="nf4")
        # Other programs do not support a packed embedding, and not all support a packed head.
        packed = {n for n, m in self._linears.items() if type(m) is FrozenLinear}
        self._unloaded = {parameter.name for parameter in base.encoders}
        self._packed = packed if into == "nf4" else set()
        self._experts = expert_linears(model)
        self._mxfp4 = {parameter.name for parameter in base.parameters if parameter.mxfp4}
        if self._mxfp4 and into != "decoded":
            raise CheckpointError(
                f"the experts of {base.name} are in MXFP4, and what is merged beside them is not "
                f"packed: into {into} is not possible. Merge into decoded"
            )
        if any(linear.adapter is not None for linear in self._experts.values()):
            self._mxfp4 = set()  # transformers and vLLM take all experts in MXFP4, or none
        if into == "original" and any(parameter.packed for parameter in base.parameters):
            raise CheckpointError(
                f"{base.name} is packed in 4 bits: its original weights are not available. Merge "
                "into decoded, or give the model it was made from"
            )
        self.parameters = tuple(
            parameter._replace(
                # A packed weight is stored as integers, and decodes to floating values.
                dtype=dtype
                if parameter.packed or parameter.dtype.is_floating_point
                else parameter.dtype,
                packed=parameter.name in self._packed,
                mxfp4=False,
            )
            if parameter.name not in self._mxfp4
            else parameter
            for parameter in (*base.parameters, *self._untied())
        )
        self.encoders = tuple(
            parameter._replace(dtype=dtype, packed=False)
            if parameter.packed or parameter.dtype.is_floating_point
            else parameter
            for parameter in base.encoders
        )
        untied = len(self.parameters) > len(base.parameters)
        # The linears of a model with experts in MXFP4 are in 16 bits.
        was: str | None = (
            held.quant if held.experts is None else None if self._mxfp4 else held.experts
        )
        if into == "original" or was == "none":
            was = base.decoded_from
        decoded = into != "nf4" and was is not None
        if untied or decoded:
            self.config = copy.deepcopy(base.config)
        if decoded:
            setattr(self.config, DECODED_FROM, was)
        if untied:
            for config in (self.config, self.config.get_text_config()):
                config.tie_word_embeddings = False

    def _untied(self) -> Iterator[Parameter]:
        """Yield parameters tied in the files, but not if an adapter has replaced one of them."""
        names = {parameter.name for parameter in self._base.parameters}
        tied: dict[str, str] = self.skeleton.all_tied_weights_keys
        for name, of in tied.items():
            held = self._held(name)
            if name not in names and held is not None and held is not self._held(of):
                yield Parameter(name, tuple(held.shape), held.dtype, held.nbytes, packed=False)

    def _held(self, name: str) -> Tensor | None:
        """Return a tensor of the model; None for the weight of a packed linear."""
        path, _, leaf = name.rpartition(".")
        held: Tensor | None = getattr(self._model.get_submodule(path), leaf)
        return held

    @cached_property
    def form(self) -> SavedForm | None:
        """The form in which it is written; None if names and shapes are those of the parameters.

        So they are if it is packed. GPT-2's linears are only transposed.
        """
        if self.into == "nf4" or any(parameter.transposed for parameter in self.parameters):
            return None
        written = (p for p in (*self.parameters, *self.encoders) if not p.mxfp4)
        empty = {p.name: empty_like(p.shape, p.dtype) for p in written}
        return SavedForm(build_whole(self.config), empty, self.experts)

    def plan(self) -> list[Planned]:
        """Return the tensors to write, in order."""
        plan: list[Planned] = []
        if self.form is not None:
            keys = self.form.keys.items()
            plan += (Planned(key, like.dtype, tuple(like.shape)) for key, like in keys)
        for parameter in (*self.parameters, *self.encoders):
            if parameter.mxfp4:
                plan += plan_mxfp4(parameter.name, parameter.shape)
            elif parameter.packed:
                empty = empty_like_quantized(
                    parameter.shape,
                    self.dtype,
                    quant_type="nf4",
                    block_size=self._recipe.block_size,
                    double_quant=self._recipe.double_quant,
                )
                plan += plan_keys(parameter.name, empty)
            elif self.form is None:
                plan.append(Planned(parameter.name, parameter.dtype, parameter.shape_in_files))
        return plan

    @property
    def written_bytes(self) -> int:
        """The maximum bytes of the tensors."""
        return sum(planned.nbytes for planned in self.plan())

    def packing(self) -> dict[str, object] | None:
        """Return the ``quantization_config`` of the written model, if it is packed."""
        if self._mxfp4:
            return self._base.mxfp4_config or PUBLISHED
        if self.into != "nf4":
            return None
        return quantization_config(self, self._recipe, self._packed, self.dtype)

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor | PackedWeight:
        """Compute and return one value: floating in ``dtype``, or packed; on the model's device.

        Experts in MXFP4 are read from the files, on the CPU.

        Raises:
            CheckpointError: If a file of the base ends early.
            WeightError: If a merged weight contains NaN or infinity, and should be packed.
        """
        if name in self._mxfp4:
            return self._base.tensor(name)
        if name in self._experts:
            return torch.stack(list(self.matrices(name)))
        linear = self._linears.get(name)
        if linear is None:
            value = self._base.tensor(name) if name in self._unloaded else self._held(name)
            assert value is not None
            value = dense(value)
            return value.to(self.dtype) if value.is_floating_point() else value
        if self.into == "original":
            original = self._base.tensor(name)
            assert isinstance(original, Tensor)
            weight = original.to(linear.device, torch.float32)
        else:
            weight = linear.decode(torch.float32)
        if linear.adapter is not None:
            weight = delta(linear).add_(weight)  # the weight may be the model's own
        if name not in self._packed:
            return weight.to(self.dtype)
        packed = quantize(
            weight,
            quant_type="nf4",
            block_size=self._recipe.block_size,
            double_quant=self._recipe.double_quant,
            name=name,
        )
        return dataclasses.replace(packed, dtype=self.dtype)

    @torch.no_grad()
    def matrices(self, name: str) -> Iterator[Tensor]:
        """Compute and yield each expert's matrix of transformers' parameter, in ``dtype``.

        Raises:
            CheckpointError: If a file of the base ends early.
        """
        linear = self._experts[name]
        adapter = linear.adapter
        original = self._base.matrices(name) if self.into == "original" else None
        for expert in range(linear.num_experts):
            if original is not None:
                weight = next(original)
                assert isinstance(weight, Tensor)
                weight = weight.to(linear.device)
                if isinstance(adapter, ExpertLoRA):
                    weight = adapter.delta(expert).add_(weight)
            else:
                weight = linear.decode(expert, expert + 1, torch.float32)[0]
                if isinstance(adapter, ExpertLoRA):
                    weight = adapter.delta(expert).add_(weight)
                if linear.packed and isinstance(linear.packed[expert], MXFP4Weight):
                    weight = weight.t()  # see mxfp4_keys.py
            yield weight.to(linear.device, self.dtype).contiguous()

    def tensors(  # noqa: D102
        self, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | PackedWeight | ExpertSlice]]:
        for parameter in self.parameters:
            name = parameter.name
            if name in self._experts and name not in self._mxfp4:
                matrices = self.matrices(name)
                for expert in range(self.experts[name]):
                    yield name, ExpertSlice(expert, next(matrices))
            else:
                yield name, self.tensor(name)

    def _files(self) -> Iterable[tuple[Path, int, int]]:
        return self._base._files()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._base.tokenizer()

    def processor_files(self) -> list[Path]:  # noqa: D102
        return self._base.processor_files()

    def generation_config(self) -> GenerationConfig | None:  # noqa: D102
        defaults: GenerationConfig | None = self._model.generation_config
        if defaults is not None and self._base.chat_template is not None:
            # Other programs stop at these tokens only, and the template ends turns with others.
            known, ends = defaults.eos_token_id, end_of_turn(self.tokenizer())
            defaults = copy.deepcopy(defaults)
            known = known if isinstance(known, list) else [] if known is None else [known]
            defaults.eos_token_id = list(dict.fromkeys([*known, *ends])) or None
        return defaults


def write_merged(
    merged: Merged,
    out_dir: str | Path,
    *,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a merged model; the one in memory does not change.

    In addition to the model, memory holds the weight of a linear layer or of an expert in float32,
    twice.

    Args:
        merged: The model to write.
        out_dir: The output directory.
        replace: Whether ``out_dir`` may exist; it is removed once the new one is complete.
        progress: Called with (bytes written, total bytes) after each tensor.
        shard_bytes: Maximum tensor bytes per file.

    Returns:
        ``out_dir``.

    Raises:
        CheckpointError: If a file of the base ends early.
        OutputError: If ``out_dir`` exists and must not be replaced, cannot be written, or there is
            no space.
    """
    out_dir, plan = Path(out_dir), merged.plan()
    require_writable(out_dir.absolute().parent, merged.written_bytes)
    with new_directory(out_dir, replace=replace) as directory:
        write_model(directory, plan, _keys(merged, plan, progress), shard_bytes=shard_bytes)
        write_description(
            directory,
            merged.config,
            model_class=type(merged.skeleton).__name__,
            dtype=merged.dtype,
            tokenizer=merged.tokenizer(),
            generation_config=merged.generation_config(),
            processor=merged.processor_files(),
            packing=merged.packing(),
        )
    return out_dir


def _keys(
    merged: Merged, plan: list[Planned], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor | Row]]:
    sizes = {planned.name: planned.nbytes for planned in plan}
    done, total = 0, sum(sizes.values())
    for key, value in _tensors(merged):
        done += value.tensor.nbytes if isinstance(value, Row) else sizes[key]
        yield key, value
        del value
        if progress is not None:
            progress(done, total)


def _tensors(merged: Merged) -> Iterator[tuple[str, Tensor | Row]]:
    """Yield the tensors of the files, or their rows, by key."""
    every = {parameter.name: parameter for parameter in (*merged.parameters, *merged.encoders)}
    encoders = ((parameter.name, merged.tensor(parameter.name)) for parameter in merged.encoders)
    values: Iterator[tuple[str, Any]] = chain(merged.tensors(), encoders)
    if merged.form is not None:
        values = merged.form.convert(values)
    for name, value in values:
        if isinstance(value, ExpertSlice):
            yield name, Row(value.expert, value.value)  # type: ignore[arg-type]
        elif isinstance(value, MXFP4Weight):
            yield from encode_mxfp4(name, value).items()
        elif isinstance(value, QuantizedWeight):
            yield from encode_keys(name, value).items()
        else:
            yield name, every[name].turned(value) if name in every else value
        del value
