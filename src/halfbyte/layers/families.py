"""The model families whose decoder layers are run by our own operations, one row each.

A row names transformers' classes and the attributes of a layer that hold its norms and linears.
Training (decoder_layer.py), decoding (models/decoding.py) and the plan (plan/model_shape.py) use
this table. Other classes, including subclasses, may compute something else, so they are run by
their own forward.
"""

from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from halfbyte.linear.frozen import FrozenLinear


class LayerSpec(NamedTuple):
    """The parts of a decoder layer of a family.

    Attributes:
        model: Class of the causal language model.
        layer: Class of its decoder layers.
        norm: Class of all its norms, an RMSNorm with ``weight`` and ``variance_epsilon``.
        norms: Attributes of the layer: before attention, before the MLP.
        head_norms: Attributes of the norms of queries and keys; a layer may have none.
        linears: Attributes of the linears of attention: q, k, v, o.
        mlp: Attributes of those of the MLP: gate, up, down.
        mixture: Class of ``mlp`` in layers that have a mixture of experts there instead.
    """

    model: str
    layer: str
    norm: str
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    linears: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    )
    mlp: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    mixture: str = ""

    def norms_of(self, layer: nn.Module) -> list[Any]:
        """Return the norms of a layer: the two of the residual stream, then of queries and keys."""
        return [attrgetter(name)(layer) for name in (*self.norms, *self.head_norms)]

    def linears_of(self, layer: nn.Module) -> list[Any]:
        """Return the linears of a layer: of attention, and of the MLP unless it is a mixture."""
        names = self.linears if self.mixture_of(layer) else (*self.linears, *self.mlp)
        return [attrgetter(name)(layer) for name in names]

    def mixture_of(self, layer: nn.Module) -> nn.Module | None:
        """Return the mixture of experts of a layer, or None if it has an MLP."""
        mlp = getattr(layer, "mlp", None)
        return mlp if isinstance(mlp, nn.Module) and type(mlp).__name__ == self.mixture else None

    def why_not(self, layer: nn.Module) -> str | None:
        """Return why a layer of this class deviates from the table, or None."""
        for norm in self.norms_of(layer):
            if type(norm).__name__.removeprefix("Parametrized") != self.norm:
                return f"a norm of a layer is no {self.norm}"
        if not all(isinstance(linear, FrozenLinear) for linear in self.linears_of(layer)):
            return "a linear of a layer has been replaced"
        activation = layer.self_attn.config.hidden_act  # type: ignore[union-attr]
        return None if activation == "silu" else f"its activation is {activation}"


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
FAMILIES = (
    LayerSpec("LlamaForCausalLM", "LlamaDecoderLayer", "LlamaRMSNorm"),
    LayerSpec("MistralForCausalLM", "MistralDecoderLayer", "MistralRMSNorm"),
    LayerSpec("Qwen2ForCausalLM", "Qwen2DecoderLayer", "Qwen2RMSNorm"),
    LayerSpec("Qwen3ForCausalLM", "Qwen3DecoderLayer", "Qwen3RMSNorm", head_norms=_HEAD_NORMS),
    LayerSpec("GptOssForCausalLM", "GptOssDecoderLayer", "GptOssRMSNorm", mixture="GptOssMLP"),
    LayerSpec(
        "MixtralForCausalLM",
        "MixtralDecoderLayer",
        "MixtralRMSNorm",
        mixture="MixtralSparseMoeBlock",
    ),
    LayerSpec(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeDecoderLayer",
        "Qwen2MoeRMSNorm",
        mixture="Qwen2MoeSparseMoeBlock",
    ),
    LayerSpec(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeDecoderLayer",
        "Qwen3MoeRMSNorm",
        head_norms=_HEAD_NORMS,
        mixture="Qwen3MoeSparseMoeBlock",
    ),
)


def spec_of(layer: nn.Module) -> LayerSpec | None:
    """Return the row of a transformers decoder layer, or None."""
    kind = type(layer)
    if not kind.__module__.startswith("transformers.models."):
        return None
    return next((spec for spec in FAMILIES if spec.layer == kind.__name__), None)


def is_known_norm(norm: nn.Module) -> bool:
    """Return whether the class of a norm is in the table."""
    return type(norm).__name__ in {spec.norm for spec in FAMILIES}
