"""The architectures that are exported to GGUF and read from it, one row each.

A row says how llama.cpp expresses a family of transformers: its keys, the names and forms of its
tensors (``gguf_forms``), the scaled rotary embeddings it implements (``gguf_rope``), and what its
code assumes without a key. The writer and the reader of files both use it, through ``Layout``.
Names that are not in a row are those of the ``gguf`` package. Sources: llama.cpp's ``conversion/``
and ``src/models/``; each row is compared with llama.cpp's own answers in tests.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gguf
from gguf import GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig

from halfbyte.checkpoint import gguf_delta_net
from halfbyte.checkpoint.gguf_file import BOOL, F32, U32
from halfbyte.checkpoint.gguf_forms import (
    Form,
    alternating,
    alternating_biases,
    halves,
    plain,
    plus_one,
    rotary_pairs,
    single_row,
    transposed,
)
from halfbyte.checkpoint.gguf_rope import Rope, unsaid
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote


class Key(NamedTuple):
    """A key of a file, without the architecture's name, and the option of a configuration."""

    key: str
    option: str
    kind: int = U32


# What an option must be, from the configuration; or what it is, from the options read so far.
Implied = Callable[[Mapping[str, Any]], dict[str, Any]]


class Architecture(NamedTuple):
    """How llama.cpp expresses a family.

    Attributes:
        model_type: Its name in transformers.
        name: Its name in llama.cpp.
        title: Its name in the documentation.
        keys: Its keys, in addition to ``COMMON``.
        constants: Keys that always have the same value.
        implied: The options that llama.cpp's code determines, without a key.
        tensors: The forms of parameters, by what follows ``model.layers.<number>.``, where they are
            not plain, or the package has no name.
        pairs: Whether llama.cpp wants rotary pairs side by side, and transformers has them apart.
        one_plus_norms: Whether transformers' norms multiply by 1 + weight.
        ropes: The scaled kinds of rotary embeddings that are implemented.
        sliding: Every which layer is without a window; 0 if the architecture has no windows.
        hybrid: The forms of its recurrent layers, from the configuration; None if it has none.
        found: Options that are true if a layer has a tensor.
        marker: A key that tells a file of this family from others of the same ``name``.
    """

    model_type: str
    name: str
    title: str
    keys: tuple[Key, ...] = ()
    constants: Mapping[str, int | float | bool] = {}
    implied: Implied = lambda options: {}
    tensors: Mapping[str, Form] = {}
    pairs: bool = False
    one_plus_norms: bool = False
    ropes: tuple[str, ...] = ("linear", "yarn")
    sliding: int = 0
    hybrid: Callable[[PretrainedConfig], Mapping[str, Form]] | None = None
    found: Mapping[str, str] = {}
    marker: str = ""


COMMON = (
    Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.head_count_kv", "num_key_value_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", F32),
)
_EXPERTS = {
    "mlp.experts.gate_up_proj": halves("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": plain("ffn_down_exps.weight"),
}
_USED = Key("expert_used_count", "num_experts_per_tok")
_EXPERT_KEYS = (Key("expert_count", "num_experts"), _USED)
_EXPERT_SIZE = Key("expert_feed_forward_length", "moe_intermediate_size")
_SHARED_SIZE = Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size")
_SHARED_GATE = {"mlp.shared_expert_gate.weight": single_row("ffn_gate_inp_shexp.weight")}
_DELTA_NET_KEYS = (
    Key("ssm.conv_kernel", "linear_conv_kernel_dim"),
    Key("ssm.state_size", "linear_key_head_dim"),
    Key("ssm.group_count", "linear_num_key_heads"),
    Key("ssm.time_step_rank", "linear_num_value_heads"),
)
_SILU = {"hidden_act": "silu"}
_BIASES = {"attention_bias": "attn_output.bias", "mlp_bias": "ffn_gate.bias"}
_UNBIASED = {"attention_bias": False, "mlp_bias": False}
_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _always(**options: Any) -> Implied:
    return lambda known: options


def _square(**options: Any) -> Implied:
    """Return also that heads are as wide as the model, which llama.cpp's shapes assume."""
    return lambda known: {
        "head_dim": known["hidden_size"] // known["num_attention_heads"],
        **options,
    }


def _gemma(layers_of_27b: int, **options: Any) -> Implied:
    """Return the scale of attention, by which only the models of 27B differ."""

    def implied(known: Mapping[str, Any]) -> dict[str, Any]:
        wide = known["hidden_size"] // known["num_attention_heads"]
        large = known["num_hidden_layers"] == layers_of_27b
        return {
            "query_pre_attn_scalar": wide if large else known["head_dim"],
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "attention_bias": False,
            **options,
        }

    return implied


def _delta_net(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is implied for hybrids: heads of values as wide as those of keys."""
    wide = {"linear_value_head_dim": known["linear_key_head_dim"]}
    return {**_SILU, **wide, "attention_bias": False}


def _without_rope(known: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(1, known["num_hidden_layers"] + 1)
    return {**_SILU, **_UNBIASED, "no_rope_layers": [int(layer % 4 != 0) for layer in layers]}


_GRANITE_KEYS = (
    Key("attention.scale", "attention_multiplier", F32),
    Key("embedding_scale", "embedding_multiplier", F32),
    Key("residual_scale", "residual_multiplier", F32),
    Key("logit_scale", "logits_scaling", F32),
)
_GRANITE_EXPERTS = {
    "block_sparse_moe.router.weight": plain("ffn_gate_inp.weight"),
    "block_sparse_moe.experts.gate_up_proj": _EXPERTS["mlp.experts.gate_up_proj"],
    "block_sparse_moe.experts.down_proj": _EXPERTS["mlp.experts.down_proj"],
    "shared_mlp.input_linear.weight": halves("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "shared_mlp.output_linear.weight": plain("ffn_down_shexp.weight"),
}
_SOFTCAPS = (
    Key("attn_logit_softcapping", "attn_logit_softcapping", F32),
    Key("final_logit_softcapping", "final_logit_softcapping", F32),
)

ARCHITECTURES = (
    Architecture(
        "llama",
        "llama",
        "Llama 2, 3.x",
        implied=_always(**_SILU),
        pairs=True,
        ropes=("linear", "yarn", "llama3"),
        found=_BIASES,
    ),
    Architecture("mistral", "llama", "Mistral", implied=_always(**_SILU), pairs=True),
    Architecture(
        "mixtral",
        "llama",
        "Mixtral",
        keys=(Key("expert_count", "num_local_experts"), _USED),
        implied=_always(**_SILU),
        tensors=_EXPERTS,
        pairs=True,
        marker="expert_count",
    ),
    Architecture("qwen2", "qwen2", "Qwen 2, 2.5", implied=_always(**_SILU)),
    Architecture(
        "qwen2_moe",
        "qwen2moe",
        "Qwen 2 MoE",
        keys=(*_EXPERT_KEYS, _EXPERT_SIZE, _SHARED_SIZE),
        implied=_square(**_SILU, **_SPARSE, norm_topk_prob=False, tie_word_embeddings=False),
        tensors={**_EXPERTS, **_SHARED_GATE},
        found={"qkv_bias": "attn_q.bias"},
    ),
    Architecture("qwen3", "qwen3", "Qwen 3", implied=_always(**_SILU, attention_bias=False)),
    Architecture(
        "qwen3_moe",
        "qwen3moe",
        "Qwen 3 MoE",
        keys=(*_EXPERT_KEYS, _EXPERT_SIZE),
        implied=_always(**_SILU, **_SPARSE, norm_topk_prob=True, attention_bias=False),
        tensors=_EXPERTS,
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma 2",
        keys=_SOFTCAPS,
        implied=_gemma(46),
        one_plus_norms=True,
        ropes=(),
        sliding=2,
    ),
    Architecture(
        "gemma3_text",
        "gemma3",
        "Gemma 3 (text)",
        implied=_gemma(62, attn_logit_softcapping=None, final_logit_softcapping=None),
        one_plus_norms=True,
        ropes=("linear",),
        sliding=6,
    ),
    Architecture(
        "phi3",
        "phi3",
        "Phi 3, 4",
        constants={"attention.sliding_window": 0},  # a context that needs none, see Layout
        implied=_square(**_SILU),
        ropes=("longrope",),
    ),
    Architecture(
        "smollm3",
        "smollm3",
        "SmolLM 3",
        implied=_without_rope,
        pairs=True,
    ),
    Architecture(
        "granite",
        "granite",
        "Granite 3",
        keys=_GRANITE_KEYS,
        implied=_square(**_SILU),
        pairs=True,
        ropes=("linear", "yarn", "llama3"),
        found=_BIASES,
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        "Granite 3 MoE",
        keys=(*_GRANITE_KEYS, Key("expert_count", "num_local_experts"), _USED),
        implied=_square(**_SILU, attention_bias=False),
        tensors=_GRANITE_EXPERTS,
        pairs=True,
    ),
    Architecture(
        "granitemoeshared",
        "granitemoe",
        "Granite MoE with a shared expert",
        keys=(
            *_GRANITE_KEYS,
            *(Key("expert_count", "num_local_experts"), _USED),
            Key("expert_shared_feed_forward_length", "shared_intermediate_size"),
        ),
        implied=_square(**_SILU, attention_bias=False),
        tensors=_GRANITE_EXPERTS,
        pairs=True,
        marker="expert_shared_feed_forward_length",
    ),
    Architecture(
        "glm4",
        "glm4",
        "GLM 4",
        implied=_always(**_SILU),
        ropes=(),
        found={"attention_bias": "attn_q.bias"},
    ),
    Architecture(
        "glm4_moe",
        "glm4moe",
        "GLM 4.5 MoE",
        keys=(
            *(Key("expert_count", "n_routed_experts"), _USED, _EXPERT_SIZE),
            Key("expert_shared_count", "n_shared_experts"),
            Key("leading_dense_block_count", "first_k_dense_replace"),
            Key("expert_weights_scale", "routed_scaling_factor", F32),
            Key("expert_weights_norm", "norm_topk_prob", BOOL),
        ),
        constants={"expert_gating_func": 2},  # sigmoid
        implied=_always(**_SILU, n_group=1, topk_group=1),
        tensors={
            **_EXPERTS,
            "mlp.gate.e_score_correction_bias": plain("exp_probs_b.bias"),
        },
        ropes=(),
        found={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
    ),
    Architecture(
        "gpt_oss",
        "gpt-oss",
        "gpt-oss",
        keys=(
            *(Key("expert_count", "num_local_experts"), _USED),
            Key("expert_feed_forward_length", "intermediate_size"),
        ),
        implied=_always(
            **_SILU,
            attention_bias=True,
            tie_word_embeddings=False,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
        ),
        tensors={
            "self_attn.sinks": plain("attn_sinks.weight"),
            "mlp.experts.gate_up_proj": alternating("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "mlp.experts.gate_up_proj_bias": alternating_biases(
                "ffn_gate_exps.bias", "ffn_up_exps.bias"
            ),
            "mlp.experts.down_proj": transposed("ffn_down_exps.weight"),
            "mlp.experts.down_proj_bias": plain("ffn_down_exps.bias"),
        },
        ropes=("yarn",),
        sliding=2,
    ),
    Architecture(
        "qwen3_5_text",
        "qwen35",
        "Qwen 3.5 (text)",
        keys=_DELTA_NET_KEYS,
        implied=_delta_net,
        one_plus_norms=True,
        ropes=(),
        hybrid=gguf_delta_net.qwen35,
    ),
    Architecture(
        "qwen3_5_moe_text",
        "qwen35moe",
        "Qwen 3.5 MoE (text)",
        keys=(*_EXPERT_KEYS, _EXPERT_SIZE, _SHARED_SIZE, *_DELTA_NET_KEYS),
        implied=_delta_net,
        tensors={**_EXPERTS, **_SHARED_GATE},
        one_plus_norms=True,
        ropes=(),
        hybrid=gguf_delta_net.qwen35,
    ),
    Architecture(
        "qwen3_next",
        "qwen3next",
        "Qwen3-Next",
        keys=(*_EXPERT_KEYS, _EXPERT_SIZE, _SHARED_SIZE, *_DELTA_NET_KEYS),
        implied=lambda known: {**_delta_net(known), **_SPARSE, "norm_topk_prob": True},
        tensors={**_EXPERTS, **_SHARED_GATE},
        one_plus_norms=True,
        ropes=(),
        hybrid=gguf_delta_net.qwen3_next,
    ),
    Architecture(
        "olmo2",
        "olmo2",
        "OLMo 2",
        implied=_square(**_SILU, attention_bias=False, tie_word_embeddings=False),
    ),
)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the row of a model's configuration.

    Raises:
        CheckpointError: If there is none.
    """
    found = next((row for row in ARCHITECTURES if row.model_type == config.model_type), None)
    if found is None:
        raise CheckpointError(
            f"models of type {config.model_type} cannot be exported to GGUF; those of "
            f"{', '.join(row.model_type for row in ARCHITECTURES)} can. `halfbyte merge` writes "
            "safetensors of any, which llama.cpp's convert_hf_to_gguf.py may know"
        )
    return found


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


class Layout:
    """A model's parameters as the tensors of a GGUF file, and its configuration as keys.

    Attributes:
        config: The configuration of the text model.
        architecture: Its row.
        head_dim: Numbers of a head.
        rope: Its rotary embedding.

    Raises:
        CheckpointError: If the configuration cannot be expressed in a GGUF file.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config = config.get_text_config()
        self.architecture = row = architecture_of(config)
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        heads: int = config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.rope = Rope(config, self.head_dim, row.ropes)
        self._require_implied()
        self.window: int | None = getattr(config, "sliding_window", None) or None
        if not getattr(config, "use_sliding_window", True):
            self.window = None
        self._require_windows()

    def _require_implied(self) -> None:
        config = self.config
        options = {**vars(config), "head_dim": self.head_dim}
        for option, value in self.architecture.implied(options).items():
            given = options.get(option, value)
            if given != value:
                raise unsaid(f"{option} = {quote(str(given))} in {config.model_type}, only {value}")
        for option in _UNBIASED:
            if getattr(config, option, False) and option not in (
                *self.architecture.found,
                *self.architecture.implied(options),
            ):
                raise unsaid(f"biases of the linear layers in {config.model_type} ({option})")

    def _require_windows(self) -> None:
        kinds = getattr(self.config, "layer_types", None) or []
        if self.architecture.hybrid is not None:
            every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
            if not every or kinds != layer_types(len(kinds), every, "linear_attention"):
                raise unsaid("full attention on other layers than each n-th")
        every = self.architecture.sliding
        if every and self.window and kinds != layer_types(len(kinds), every):
            raise unsaid(f"windows of attention on other layers than {every - 1} of {every}")

    @functools.cached_property
    def context_length(self) -> int:
        """The longest context; llama.cpp needs no windows up to their length."""
        context: int = self.config.max_position_embeddings
        unexpressed = self.window is not None and not self.architecture.sliding
        return min(context, self.window) if unexpressed and self.window else context

    @functools.cached_property
    def _forms(self) -> Mapping[str, Form]:
        row = self.architecture
        return {**row.tensors, **(row.hybrid(self.config) if row.hybrid is not None else {})}

    def form(self, parameter: str) -> Form:
        """Return how a parameter is stored.

        Raises:
            CheckpointError: If llama.cpp has no tensor for it.
        """
        row = self.architecture
        parameter = parameter.replace("model.language_model.", "model.")
        if match := _LAYER.fullmatch(parameter):
            number, rest = match.groups()
            if rest in self._forms:
                return self._forms[rest].under(f"blk.{number}.")
        name: str | None = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise unsaid(f"the parameter {parameter}")
        if row.one_plus_norms and name.endswith("norm.weight"):
            return plus_one(name)
        for kind, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
            if row.pairs and f".{kind}." in name:
                return rotary_pairs(name, getattr(self.config, heads))
        return plain(name)

    def add_keys(self, writer: GGUFWriter, rows: int) -> None:
        """Add the architecture's keys; ``rows`` is the number of rows of the embedding."""
        row, config = self.architecture, self.config
        add = {U32: writer.add_uint32, F32: writer.add_float32, BOOL: writer.add_bool}
        writer.add_context_length(self.context_length)
        for key, option, kind in (*COMMON, *row.keys):
            value = getattr(config, option)
            if value is not None:
                add[kind](f"{row.name}.{key}", value)
        for key, value in row.constants.items():
            add[BOOL if isinstance(value, bool) else U32](f"{row.name}.{key}", value)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        if self.window is not None and row.sliding:
            writer.add_sliding_window(self.window)
            writer.add_uint32(f"{row.name}.attention.sliding_window_pattern", row.sliding)
        if row.hybrid is not None:
            gguf_delta_net.add_keys(writer, config)
        self.rope.add_keys(writer)
        writer.add_vocab_size(rows)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are computed from the configuration, by name."""
        return self.rope.tensors()


def layer_types(layers: int, every: int, other: str = "sliding_attention") -> list[str]:
    """Return transformers' kinds of layers of which each ``every``-th has full attention."""
    return [other if (layer + 1) % every else "full_attention" for layer in range(layers)]
