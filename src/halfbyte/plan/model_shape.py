"""A model for the plan: every weight's name, shape and role, without the weights.

A `ModelShape` comes from a transformers model on the meta device, so transformers decides what is a
linear layer and what is tied. For the models of `KNOWN` it is computed from a few numbers and needs
neither transformers nor torch, which take seconds to import; a test compares it with transformers.
Information about the files (bytes, tensors packed already) can be added.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from halfbyte.errors import ConfigError

Role = Literal["linear", "experts", "head", "embedding", "other"]

_COLUMNS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
# Of the models' published configurations, what decides their sizes.
_TABLE: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, 8192, True),
    "llama3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True),
    "llama2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, 4096, False),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, False),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, False),
    "llama3-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, 8192, False),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, False),
    "llama2-13b": ("llama", 5120, 13824, 40, 40, 40, 32000, 4096, False),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, False),
    "llama2-70b": ("llama", 8192, 28672, 80, 64, 8, 32000, 4096, False),
    "llama3-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, 8192, False),
}
# What sizes alone mean.
_SIZES = {"7b": "llama2-7b", "8b": "llama3-8b", "13b": "llama2-13b", "70b": "llama3-70b"}
KNOWN = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _TABLE.items()}

_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "qwen3-235b-a22b": {
        **_QWEN3_MOE,
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
}
"""Mixtures of experts that ``--shape`` names; transformers makes their shapes."""

# What configurations call the number of experts of a token.
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


class Weight(NamedTuple):
    """One parameter.

    Attributes:
        name: Its name in transformers.
        shape: Its shape.
        role: A linear layer's matrix, those of all experts of a layer, the output head's, the
            embedding's, or anything else.
        layer: The decoder layer it belongs to, or None.
        packs: Whether it is packed where weights of its role are.
        comes: The bytes it takes as it comes out of the files, or None if there are none.
        adapts: Whether all-linear gives it an adapter, if it is a linear layer's.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    packs: bool = True
    comes: int | None = None
    adapts: bool = True

    @property
    def numel(self) -> int:
        """Its elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


class Mixture(NamedTuple):
    """The mixtures of experts of a model.

    Attributes:
        experts: Experts of a layer.
        per_token: Experts that a token goes through.
        inner: Width inside of an expert.
        gated: Whether experts have a gate, which doubles the width before their activation.
        layers: Number of layers that have one.
    """

    experts: int
    per_token: int
    inner: int
    gated: bool
    layers: int


@dataclass(frozen=True)
class ModelShape:
    """A model's weights and the widths of its layers.

    Attributes:
        name: What the user called it.
        weights: Every parameter once, in the order in which they will be read.
        tied: Whether the output head is the embedding.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        query: Width of all queries of a token.
        key_value: Width of all keys of a token (and of all values).
        intermediate: Width of the MLP.
        heads: Query heads.
        vocabulary: Rows of the embedding.
        positions: The longest sequence it was made for, or None.
        head_norms: Whether queries and keys are normed head by head.
        fusable: Whether its layers are of a family that ``layers.decoder_layer`` runs fused.
        vocabulary_packs: Whether ``models.build`` can pack its output head.
        mixture: Its mixtures of experts, if it has any.
    """

    name: str
    weights: tuple[Weight, ...]
    tied: bool
    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    heads: int
    vocabulary: int
    positions: int | None = None
    head_norms: bool = False
    fusable: bool = False
    vocabulary_packs: bool = True
    mixture: Mixture | None = None

    @property
    def parameters(self) -> int:
        """All its parameters, tied ones counted once."""
        return sum(weight.numel for weight in self.weights)

    @property
    def expert_parameters(self) -> int:
        """Those of experts."""
        return sum(weight.numel for weight in self.weights if weight.role == "experts")

    @property
    def active_parameters(self) -> int:
        """Those that a token is multiplied with, and the embedding."""
        if self.mixture is None:
            return self.parameters
        idle = self.mixture.experts - self.mixture.per_token
        return self.parameters - self.expert_parameters * idle // self.mixture.experts

    def adapted_sides(self, names: Sequence[str]) -> list[int]:
        """Return rows and columns, times the matrices, of the ``target_parameters`` of a run."""
        return [
            math.prod(weight.shape[:-2]) * side
            for weight in self.weights
            if any(f".{weight.name}".endswith(f".{name}") for name in names)
            or ("experts" in names and weight.role == "experts")
            for side in weight.shape[-2:]
        ]

    def linears(self, layer: int | None = None) -> list[Weight]:
        """Return the matrices of its linear layers, or of those in one decoder layer."""
        found = [weight for weight in self.weights if weight.role == "linear"]
        return found if layer is None else [w for w in found if w.layer == layer]


def shape_of_known(text: str) -> ModelShape | None:
    """Return the shape that a name of ``KNOWN`` or a size such as ``70b`` means, or None."""
    name = text.strip().lower()
    config = KNOWN.get(_SIZES.get(name, name))
    if config is None:
        return None
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary, tied = config["vocab_size"], config["tie_word_embeddings"]
    family, layers = config["model_type"], config["num_hidden_layers"]
    # Qwen 3's heads are 128 wide whatever the stream is, and normed; Qwen 2's have biases.
    width = 128 if family == "qwen3" else hidden // heads
    query, key_value = heads * width, groups * width
    linears = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    weights = [Weight("model.embed_tokens.weight", (vocabulary, hidden), "embedding", None)]
    for layer in range(layers):
        own = f"model.layers.{layer}"
        for name, extents in linears.items():
            weights.append(Weight(f"{own}.{name}.weight", extents, "linear", layer))
            if family == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                weights.append(Weight(f"{own}.{name}.bias", extents[:1], "other", layer))
            if family == "qwen3" and name.endswith("o_proj"):
                for norm in ("q_norm", "k_norm"):
                    path = f"{own}.self_attn.{norm}.weight"
                    weights.append(Weight(path, (width,), "other", layer))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights.append(Weight(f"{own}.{norm}.weight", (hidden,), "other", layer))
    weights.append(Weight("model.norm.weight", (hidden,), "other", None))
    if not tied:
        weights.append(Weight("lm_head.weight", (vocabulary, hidden), "head", None))
    return ModelShape(
        name=text,
        weights=tuple(weights),
        tied=tied,
        layers=layers,
        hidden=hidden,
        query=query,
        key_value=key_value,
        intermediate=intermediate,
        heads=heads,
        vocabulary=vocabulary,
        positions=config["max_position_embeddings"],
        head_norms=family == "qwen3",
        fusable=True,
    )


def config_of(text: str) -> Any:
    """Return the transformers configuration that ``--shape`` names.

    Args:
        text: A name of ``KNOWN`` or ``MIXTURES``, or ``field=value,field=value`` as in config.json;
            fields may follow a name, and change it.

    Raises:
        ConfigError: If the name is unknown, or a field is none of the configuration's.
    """
    from transformers import AutoConfig

    name, *pairs = [part.strip() for part in text.split(",")]
    if "=" in name:
        name, pairs = "", [name, *pairs]
    known = KNOWN | MIXTURES
    if name and name.lower() not in known:
        raise ConfigError(
            f"--shape: {name!r} is not known; expected one of {', '.join(known)}, or config fields "
            "such as model_type=llama,hidden_size=2048,num_hidden_layers=16"
        )
    fields: dict[str, Any] = dict(known[name.lower()]) if name else {"model_type": "llama"}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--shape: expected FIELD=VALUE, got {pair!r}")
        fields[field.strip().replace("-", "_")] = _value(value.strip())
    model_type = str(fields.pop("model_type"))
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"--shape: transformers cannot make {model_type} of it: {error}"
        ) from None
    published = known.get(name.lower(), {})
    has = {*type(config)().to_dict(), *type(config).attribute_map, *published}
    unknown = [field for field in fields if field not in has]
    if unknown:
        raise ConfigError(f"--shape: {model_type} has no {', '.join(unknown)} in its configuration")
    return config


def _value(text: str) -> int | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdecimal() else text


def shape_of(
    model: Any, name: str, *, files: Mapping[str, tuple[int, bool]] | None = None
) -> ModelShape:
    """Return the shape of a model of transformers, which may be on the meta device.

    Args:
        model: A causal language model; not changed.
        name: What to call it.
        files: Of each parameter in the files, in their order, the bytes it takes as it comes out of
            them and whether it is packed in 4 bits.
    """
    from torch import nn

    from halfbyte.layers.experts import expert_parameters
    from halfbyte.layers.families import FAMILIES
    from halfbyte.layers.multimodal import ties_head
    from halfbyte.layers.targets import linears_to_freeze, why_no_adapter

    config, tied = model.config.get_text_config(), ties_head(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    roles: dict[str, Role] = {f"{path}.weight": "linear" for path in linears_to_freeze(model)}
    for path, module in model.named_modules():
        if module is head or module is embedding:
            roles[f"{path}.weight"] = "head" if module is head else "embedding"
    stacks = expert_parameters(model)
    roles |= dict.fromkeys(stacks, "experts")
    refused = why_no_adapter(model)
    shapes = {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    if files is not None:
        # The files may hold apart what the configuration ties.
        every = dict(model.named_parameters(remove_duplicate=False))
        shapes = {path: tuple(every[path].shape) for path in files if path in every}
    packed = any(is_packed for _, is_packed in (files or {}).values())
    weights = []
    for path, shape in shapes.items():
        comes, is_packed = (files or {}).get(path, (None, False))
        numbers = [part for part in path.split(".") if part.isdecimal()]
        role = roles.get(path, "other")
        packs = role != "linear" or is_packed or not packed
        layer, adapts = int(numbers[0]) if numbers else None, path[: -len(".weight")] not in refused
        weights.append(Weight(path, shape, role, layer, packs, comes, adapts))
    out = {path.rsplit(".", 2)[-2]: shape[0] for path, shape in shapes.items() if len(shape) == 2}
    kinds = {type(module).__name__ for module in model.modules()}
    # What does not say how wide it is has no attention, or one of its own: an estimate then.
    hidden = _number(config, "hidden_size") or int(embedding.weight.shape[1])
    heads = _number(config, "num_attention_heads") or 1
    width = _number(config, "head_dim") or hidden // heads
    groups = _number(config, "num_key_value_heads") or heads
    intermediate = _number(config, "intermediate_size") or 4 * hidden
    return ModelShape(
        name=name,
        weights=tuple(weights),
        tied=tied,
        layers=_number(config, "num_hidden_layers") or 0,
        hidden=hidden,
        query=out.get("q_proj", heads * width),
        key_value=out.get("k_proj", groups * width),
        intermediate=out.get("gate_proj", intermediate),
        heads=heads,
        vocabulary=int(config.vocab_size),
        positions=getattr(config, "max_position_embeddings", None),
        head_norms=any(".q_norm." in path for path in shapes),
        fusable=any(spec.layer in kinds for spec in FAMILIES),
        vocabulary_packs=type(head) is nn.Linear and (not tied or type(embedding) is nn.Embedding),
        mixture=_mixture_of(config, stacks),
    )


def _mixture_of(config: Any, stacks: Mapping[str, tuple[Any, bool]]) -> Mixture | None:
    """Return the mixtures of a model with these parameters of experts, each with its orientation.

    Of different ones (JetMoE has experts in attention), the largest counts.
    """
    down = {path: pair for path, pair in stacks.items() if not path.endswith("up_proj")}
    if not down:
        return None
    parameter, transposed = max(down.values(), key=lambda pair: pair[0].numel())
    experts, *matrix = parameter.shape
    per_token = next((n for name in _PER_TOKEN if (n := _number(config, name))), experts)
    gated = any(path.endswith("gate_up_proj") for path in stacks)
    inner = matrix[0] if transposed else matrix[1]
    return Mixture(experts, min(per_token, experts), inner, gated, len(down))


def _number(config: Any, name: str) -> int | None:
    """Return a field of a configuration, the largest if its layers differ, or None."""
    each = [config]
    if getattr(config, "is_heterogeneous", False):  # it refuses to name one for all its layers
        each = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    values = [getattr(layer, name, None) for layer in each]
    flat = [n for v in values for n in (v if isinstance(v, list | tuple) else [v])]
    return max((int(n) for n in flat if isinstance(n, int)), default=None)


def shape_of_config(config: Any, name: str) -> ModelShape:
    """Return the shape of the model that a configuration describes; no memory is taken.

    Raises:
        ConfigError: If it is not supported, or transformers cannot build it.
    """
    from halfbyte.layers.multimodal import build_decoder, why_unsupported

    if reason := why_unsupported(config):
        raise ConfigError(f"{name}: {reason}")
    try:
        model = build_decoder(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"{name}: transformers cannot build it: {error}") from error
    return shape_of(model, name)
