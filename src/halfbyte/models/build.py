"""Builds a transformers decoder with frozen, packed linears, without ever holding it in 16 bits.

    build    the architecture on the meta device (no memory), every ``nn.Linear`` but the output
             head replaced by a ``FrozenLinear``, the weights of experts by ``ExpertLinear``s; head
             and embedding too, if the recipe says so
    load_tensor  one tensor of the checkpoint, quantised or cast immediately
    finalize     ties, computed buffers, and a report of the bytes, and of what is not in 4 bits

``load_tensor`` never needs another tensor, so a checkpoint can be read one tensor at a time.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from halfbyte.errors import CheckpointError, ConfigError, WeightError
from halfbyte.layers import attention_interface, token_mixers
from halfbyte.layers.experts import freeze_experts
from halfbyte.layers.multimodal import (
    build_decoder,
    decoder_layers,
    removed_modules,
    ties_head,
)
from halfbyte.layers.targets import linears_to_freeze, parameters_in_peft, why_no_adapter
from halfbyte.layers.vocabulary import FrozenEmbedding, FrozenHead
from halfbyte.linear.arena import Arena
from halfbyte.linear.experts import ExpertLinear, expert_linears
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup
from halfbyte.linear.layer_store import HostLayers
from halfbyte.linear.layer_stream import LayerStream, LayerWeights
from halfbyte.linear.lora import frozen_linears
from halfbyte.models.buffers import compute_buffers
from halfbyte.quant.format import PackedWeight, dequantize, quantize
from halfbyte.quant.mxfp4 import MXFP4Weight, empty_like_mxfp4
from halfbyte.quant.scale_search import search
from halfbyte.quant.weight import QuantizedWeight, empty_like_quantized

__all__ = [
    "BaseRecipe",
    "MemoryReport",
    "build",
    "finalize",
    "frozen_linears",
    "load_expert",
    "load_tensor",
    "pack",
    "place_quantized",
    "share_inputs",
    "stream_layers",
]

# Linears that transformers' decoders call with the same input.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))

_NAMED = 8  # number of tensors listed by name

AUDIT_THRESHOLD = 1_000_000  # bytes; smaller tensors (norms, biases) are only summed


@dataclass(frozen=True)
class BaseRecipe:
    """How a base model is stored.

    Attributes:
        quant: ``nf4``, ``fp4``, or ``none`` for a plain 16/32-bit base model.
        double_quant: Whether the scales are quantised as well.
        block_size: Weights that share a scale.
        compute_dtype: dtype of activations, products and unpacked weights.
        device: The device.
        quantize_head: Whether the output head is packed too (if linears are).
        quantize_embeddings: Whether the embedding is. If the two are tied, one option packs both.
        quant_search: Whether scales are searched for the least error (`quant.scale_search`)
            instead of being those of bitsandbytes.
        experts: The format that the files have experts in and that they keep, whatever the others
            have; None: they are packed as linears are.
    """

    quant: Literal["nf4", "fp4", "none"] = "nf4"
    double_quant: bool = True
    block_size: int = 64
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    quantize_head: bool = False
    quantize_embeddings: bool = False
    quant_search: bool = False
    experts: Literal["mxfp4"] | None = None


@dataclass(frozen=True)
class MemoryReport:
    """The memory of the base model, in bytes.

    Attributes:
        quantized_parameters: Number of packed weights.
        quantized_bytes: Their bytes, including scales.
        kept: (name, dtype, bytes) of every tensor over 1 MB in 16 or 32 bits.
        total_bytes: Everything, tied tensors counted once.
        expert_bytes: Experts of a class that `layers.experts` does not know, which are not packed.
        mxfp4_parameters: Number of the packed weights that are in MXFP4.
        mxfp4_bytes: Their bytes.
    """

    quantized_parameters: int
    quantized_bytes: int
    kept: tuple[tuple[str, str, int], ...]
    total_bytes: int
    expert_bytes: int = 0
    mxfp4_parameters: int = 0
    mxfp4_bytes: int = 0

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = []
        others = self.quantized_parameters - self.mxfp4_parameters
        for kind, count, size in (
            ("4 bits", others, self.quantized_bytes - self.mxfp4_bytes),
            ("MXFP4, the bytes of the files", self.mxfp4_parameters, self.mxfp4_bytes),
        ):
            if count:
                lines.append(
                    f"{count / 1e6:.1f} M weights in {kind}: {size / 1e6:.1f} MB "
                    f"({8 * size / count:.3f} bits per weight with scales)"
                )
        if self.quantized_parameters and self.expert_bytes:
            lines.append(
                "experts that halfbyte cannot pack in this family: "
                f"{self.expert_bytes / 1e6:.1f} MB"
            )
        # In a plain model every tensor is kept: the largest are named, the rest is counted.
        named = self.kept if len(self.kept) <= _NAMED else self.kept[: _NAMED // 2]
        rest = self.kept[len(named) :]
        lines += [f"kept in {dtype}: {name}, {size / 1e6:.1f} MB" for name, dtype, size in named]
        if rest:
            lines.append(f"and {len(rest)} more, {sum(size for *_, size in rest) / 1e6:.1f} MB")
        lines.append(f"base model in memory: {self.total_bytes / 1e6:.1f} MB")
        return lines


def build(
    config: PretrainedConfig, recipe: BaseRecipe, *, plain: Collection[str] = ()
) -> PreTrainedModel:
    """Return the architecture of ``config`` on the meta device, its linears replaced.

    Args:
        config: Configuration of a causal language model, or of a model of more than text, of which
            only the text decoder is built (`layers.multimodal`).
        recipe: How its weights will be stored.
        plain: Paths of linears, and of the parameters of experts, that are not packed, overriding
            the recipe.

    Raises:
        CheckpointError: If transformers has no causal language model for this configuration.
        ConfigError: If its head or embedding is to be packed, but is of an unsupported kind.
    """
    try:
        model = build_decoder(config, recipe.compute_dtype)
    except ValueError as error:
        raise CheckpointError(f"not a causal language model transformers knows: {error}") from error
    attention_interface.use(model.get_decoder() if removed_modules(model) else model)
    token_mixers.register(model)
    if recipe.quant == "none":
        recipe = replace(recipe, quantize_head=False, quantize_embeddings=False)
    elif ties_head(model):
        both = recipe.quantize_head or recipe.quantize_embeddings
        recipe = replace(recipe, quantize_head=both, quantize_embeddings=both)
    head = model.get_output_embeddings()
    if head is not None and not recipe.quantize_head:
        head.register_forward_pre_hook(_contiguous)
    refused, parameters = why_no_adapter(model), parameters_in_peft(model)
    for name, linear in linears_to_freeze(model).items():
        is_head = linear is head
        if is_head and not recipe.quantize_head:
            continue
        parent, _, leaf = name.rpartition(".")
        frozen = (FrozenHead if is_head else FrozenLinear).like(
            linear,
            quant=None if recipe.quant == "none" or name in plain else recipe.quant,
            block_size=recipe.block_size,
            double_quant=recipe.double_quant,
            dtype=recipe.compute_dtype,
        )
        frozen.why_no_adapter, frozen.is_parameter_in_peft = refused.get(name), name in parameters
        setattr(model.get_submodule(parent), leaf, frozen)
    freeze_experts(model, partial(_expert_like, recipe, plain), recipe.compute_dtype)
    if recipe.quantize_head and not isinstance(model.get_output_embeddings(), FrozenHead):
        raise ConfigError(f"quantize_head: {type(model).__name__} has no plain linear head to pack")
    if recipe.quantize_embeddings:
        model.set_input_embeddings(_packed_embedding(model, recipe))
    share_inputs(model)
    model.requires_grad_(False).eval()
    model.halfbyte_recipe = recipe
    return model


def _packed_embedding(model: PreTrainedModel, recipe: BaseRecipe) -> FrozenEmbedding:
    embedding = model.get_input_embeddings()
    # Subclasses do more than look up rows (Gemma 3's scales them), which must be preserved.
    if type(embedding) is not nn.Embedding or embedding.embedding_dim % 2:
        raise ConfigError(
            f"quantize_embeddings: the embedding of {type(model).__name__}, {embedding}, cannot be "
            "packed; leave quantize_embeddings out"
            + (" and quantize_head, which is tied to it" if recipe.quantize_head else "")
        )
    quantized = _empty(embedding.weight.shape, recipe)
    assert quantized is not None
    return FrozenEmbedding(quantized, recipe.compute_dtype)


def _expert_like(
    recipe: BaseRecipe, plain: Collection[str], path: str, shape: tuple[int, int], transposed: bool
) -> PackedWeight | None:
    """Return a description of an expert's packed weight, or None if it is plain."""
    if path in plain:
        return None
    if recipe.experts == "mxfp4":
        return empty_like_mxfp4(shape[::-1] if transposed else shape, recipe.compute_dtype)
    return _empty(shape, recipe)


def _empty(shape: tuple[int, ...], recipe: BaseRecipe) -> QuantizedWeight | None:
    """Return a description of a packed weight on the meta device, or None if they are plain."""
    if recipe.quant == "none":
        return None
    return empty_like_quantized(
        shape,
        recipe.compute_dtype,
        quant_type=recipe.quant,
        block_size=recipe.block_size,
        double_quant=recipe.double_quant,
    )


def share_inputs(model: nn.Module) -> None:
    """Group the linears that are known to be called with the same input into one product.

    Not if the model clips their outputs in place: autograd does not allow that for parts of one
    product.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config.get_text_config(), "clip_qkv", None) is not None:
        return
    for module in model.modules():
        for names in _SHARED_INPUTS:
            linears = [getattr(module, name, None) for name in names]
            frozen = [linear for linear in linears if isinstance(linear, FrozenLinear)]
            if len({linear.in_features for linear in frozen}) == 1:
                LinearGroup(frozen)


def _contiguous(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the few rows that generation selects from many.

    Given such a strided [B, 1, H], torch's linear expands the head to B copies: 1.7 GB for
    SmolLM2's and 32 prompts.
    """
    return (inputs[0].contiguous(), *inputs[1:])


def _owner(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise _unknown(model, name) from None


def _unknown(model: PreTrainedModel, name: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint holds {name}, which {type(model).__name__} does not have; "
        "is its config.json of another model?"
    )


def _check_shape(name: str, expected: tuple[int, ...], came: tuple[int, ...]) -> None:
    if expected != came:
        raise CheckpointError(
            f"{name}: the configuration requires shape {list(expected)}, "
            f"the checkpoint has {list(came)}"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel():
        # Two numbers instead of a mask: no temporary of the size of the tensor.
        low, high = torch.aminmax(tensor.reshape(-1))
        if not bool(torch.isfinite(low) and torch.isfinite(high)):
            raise WeightError(f"{name} contains NaN or infinity; the checkpoint is damaged")


def pack(
    weight: Tensor, recipe: BaseRecipe, name: str, importance: Tensor | None = None
) -> QuantizedWeight:
    """Return a weight packed according to ``recipe``, on its device.

    Args:
        weight: The weight, in any floating dtype.
        recipe: The recipe; its ``quant`` is not ``none``.
        name: Name of the weight in error messages.
        importance: For a search, the weight of errors in each column (`nf4.search`).

    Raises:
        WeightError: If a value is NaN or infinite.
    """
    assert recipe.quant != "none"
    how = partial(search, importance=importance) if recipe.quant_search else quantize
    return how(
        weight.to(recipe.device),
        quant_type=recipe.quant,
        block_size=recipe.block_size,
        double_quant=recipe.double_quant,
        name=name,
    )


def load_tensor(
    model: PreTrainedModel, name: str, tensor: Tensor, importance: Tensor | None = None
) -> None:
    """Load one tensor of the checkpoint into the model: packed if a linear's weight, else cast.

    Args:
        model: The result of ``build``.
        name: The parameter's name in transformers.
        tensor: Its value, in any floating dtype, on any device; it may be kept as it is.
        importance: As for ``pack``.

    Raises:
        CheckpointError: If the model has no such parameter, or it has another shape.
        WeightError: If a value is NaN or infinite.
    """
    recipe: BaseRecipe = model.halfbyte_recipe
    owner, leaf = _owner(model, name)
    if isinstance(experts := owner._modules.get(leaf), ExpertLinear):
        _check_shape(name, (experts.num_experts, *experts.matrix), tuple(tensor.shape))
        for expert, matrix in enumerate(tensor):
            load_expert(model, name, expert, matrix)
        return
    if isinstance(owner, FrozenLinear) and leaf == "weight":
        _check_shape(name, (owner.out_features, owner.in_features), tuple(tensor.shape))
        if owner.quantized is not None:
            _place(model, owner, pack(tensor, recipe, name, importance))
            return
        if (store := _store_of(model, owner)) is not None:
            _check_finite(name, tensor)
            store.hold(owner, {"weight": tensor})
            return
    parameter, buffer = owner._parameters.get(leaf), owner._buffers.get(leaf)
    slot = parameter if parameter is not None else buffer
    if slot is None:
        raise _unknown(model, name)
    _check_shape(name, tuple(slot.shape), tuple(tensor.shape))
    _check_finite(name, tensor)
    held = tensor.to(device=recipe.device, dtype=slot.dtype)
    if parameter is not None:
        owner._parameters[leaf] = nn.Parameter(held, requires_grad=False)
    else:
        owner._buffers[leaf] = held


def load_expert(
    model: PreTrainedModel, name: str, expert: int, matrix: Tensor | PackedWeight
) -> None:
    """Load the weight of one expert, packed or cast; see `load_tensor`.

    Args:
        model: The result of ``build``.
        name: The name of the parameter of all experts in transformers.
        expert: The index of the expert.
        matrix: Its part of the parameter, [rows, columns]. If it is packed its bytes are kept, if
            the model's experts are packed too.

    Raises:
        CheckpointError: If the model has no such experts, or they have another shape.
        WeightError: If a value is NaN or infinite.
    """
    owner, leaf = _owner(model, name)
    experts = owner._modules.get(leaf)
    if not isinstance(experts, ExpertLinear):
        raise _unknown(model, name)
    recipe: BaseRecipe = model.halfbyte_recipe
    one = f"{name}, expert {expert}"
    _check_shape(one, tuple(experts.matrix), tuple(matrix.shape))
    store = _store_of(model, experts)
    if store is not None and experts.device.type == "meta":
        experts.set_frozen_tensors(store.places(experts))
    if not experts.packed:
        dense = matrix if isinstance(matrix, Tensor) else dequantize(matrix)
        _check_finite(one, dense)
        experts.set_plain(expert, dense if store is not None else dense.to(recipe.device))
    else:
        packed = pack(matrix, recipe, one) if isinstance(matrix, Tensor) else matrix
        experts.set_packed(expert, packed if store is not None else packed.to(recipe.device))
    if store is not None:
        store.loaded(experts)


def place_quantized(model: PreTrainedModel, name: str, quantized: PackedWeight) -> None:
    """Load a weight that is already packed, with unchanged bytes.

    Args:
        model: The result of ``build``.
        name: The parameter's name in transformers.
        quantized: A linear's weight; in MXFP4, those of all experts, [experts, out, in].

    Raises:
        CheckpointError: If ``name`` is not such a weight of the model, or has another shape.
    """
    owner, leaf = _owner(model, name)
    if isinstance(quantized, MXFP4Weight):
        experts = owner._modules.get(leaf)
        if not isinstance(experts, ExpertLinear):
            raise CheckpointError(f"{name} is in MXFP4, but is no weight of experts")
        _check_shape(name, (experts.num_experts, *experts.matrix), tuple(quantized.shape))
        for expert, matrix in enumerate(quantized.unbind()):
            load_expert(model, name, expert, matrix)
        return
    if not isinstance(owner, FrozenLinear) or leaf != "weight":
        raise CheckpointError(f"{name} is packed in 4 bits, but is no linear layer's weight")
    _check_shape(name, (owner.out_features, owner.in_features), tuple(quantized.shape))
    _place(model, owner, quantized)


def stream_layers(
    model: PreTrainedModel, store: Callable[[list[LayerWeights], str], HostLayers]
) -> None:
    """Have the frozen weights of a model's layers loaded elsewhere instead of on the device.

    `finalize` then gives them their places on the device, to which they are copied when needed
    (linear/layer_stream.py). For the result of ``build``, before anything is loaded.

    Args:
        model: The model.
        store: Called with the layout of each layer and the device, returns where weights wait
            (linear/layer_store.py).

    Raises:
        ConfigError: The layers of the model cannot be told apart.
        OutputError: A disk has too little room.
    """
    try:
        layers = [LayerWeights(layer) for layer in decoder_layers(model)]
    except ValueError as error:
        raise ConfigError(f"the weights of this model can only be on the device: {error}") from None
    model.halfbyte_store = store(layers, model.halfbyte_recipe.device)


def _store_of(model: PreTrainedModel, module: nn.Module) -> HostLayers | None:
    """Return where the weight of a module is to wait, or None if it is to be on the device."""
    store: HostLayers | None = getattr(model, "halfbyte_store", None)
    return store if store is not None and module in store else None


def _place(model: PreTrainedModel, owner: FrozenLinear, quantized: QuantizedWeight) -> None:
    """Give a linear its packed weight, on the device or in host memory."""
    if (store := _store_of(model, owner)) is not None:
        store.hold(owner, quantized.tensors())
    else:
        on_device = quantized.to(model.halfbyte_recipe.device)
        owner.set_quantized(_beside_others(model, on_device))


def _beside_others(model: PreTrainedModel, quantized: QuantizedWeight) -> QuantizedWeight:
    """Return a packed weight in the model's arena, one allocation on a GPU."""
    if not quantized.codes.is_cuda:
        return quantized
    arena: Arena | None = getattr(model, "halfbyte_arena", None)
    if arena is None:
        linears = {m for m in frozen_linears(model).values() if _store_of(model, m) is None}
        if ties_head(model):
            linears.discard(model.get_output_embeddings())  # the embedding's will be its own
        to_come = (q for linear in linears if (q := linear.quantized) is not None)
        arena = model.halfbyte_arena = Arena(to_come, quantized.codes.device)
    return arena.hold(quantized)


def finalize(model: PreTrainedModel) -> MemoryReport:
    """Tie weights, compute buffers, and report the memory.

    Raises:
        CheckpointError: If parameters are missing (all are named), or a buffer cannot be computed.
    """
    _tie(model)
    compute_buffers(model, model.halfbyte_recipe.device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if missing:
        shown = ", ".join(missing[:6]) + (" …" if len(missing) > 6 else "")
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the model's tensors: {shown}"
        )
    model.requires_grad_(False).eval()
    model.halfbyte_arena = None  # it is full; its tensors keep it alive
    report = memory_report(model)
    store: HostLayers | None = getattr(model, "halfbyte_store", None)
    if store is not None:
        store.finish()
        del model.halfbyte_store
        model.halfbyte_stream = LayerStream(store.layers, store, model.halfbyte_recipe.device)
    return report


def _tie(model: PreTrainedModel) -> None:
    """Give what is tied, and not in the checkpoint, the value it is tied to."""
    modules = dict(model.named_modules())
    for name, source in model.all_tied_weights_keys.items():
        if name.rpartition(".")[0] not in modules:
            continue  # of an encoder
        (owner, leaf), (origin, held) = _owner(model, name), _owner(model, source)
        if isinstance(owner, FrozenLinear) and owner.quantized is not None and leaf == "weight":
            if owner.device.type == "meta":
                owner.set_quantized(origin.quantized)  # type: ignore[arg-type]
        elif (empty := owner._parameters.get(leaf)) is not None and empty.is_meta:
            owner._parameters[leaf] = origin._parameters[held]


def _is_unpacked_expert(name: str, parameter: Tensor) -> bool:
    """Whether it is a weight of experts; DBRX has them in two dimensions."""
    return "experts." in name and parameter.dim() > 1 and not name.endswith("bias")


def memory_report(model: nn.Module) -> MemoryReport:
    """Return the memory of ``model`` without adapters."""
    held: list[PackedWeight] = [
        q for m in frozen_linears(model).values() if (q := m.quantized) is not None
    ]
    held += [q for experts in expert_linears(model).values() for q in experts.packed]
    packed = {id(q.codes): q for q in held}.values()  # a tied head holds the embedding's tensors
    quantized_bytes = sum(q.nbytes for q in packed)
    mxfp4 = [q for q in packed if isinstance(q, MXFP4Weight)]
    kept = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    plain_bytes = sum(p.nbytes for _, p in kept)
    large = [
        (name, str(p.dtype).removeprefix("torch."), p.nbytes)
        for name, p in kept
        if p.nbytes > AUDIT_THRESHOLD
    ]
    large.sort(key=lambda row: -row[2])
    return MemoryReport(
        quantized_parameters=sum(q.numel for q in packed),
        quantized_bytes=quantized_bytes,
        kept=tuple(large),
        total_bytes=quantized_bytes + plain_bytes,
        mxfp4_parameters=sum(q.numel for q in mxfp4),
        mxfp4_bytes=sum(q.nbytes for q in mxfp4),
        expert_bytes=sum(p.nbytes for name, p in kept if _is_unpacked_expert(name, p)),
    )
