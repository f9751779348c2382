"""The types of GGUF files: which block type each tensor is rounded to.

A file type is a mixture. Vectors, and the small matrices that llama.cpp wants so (routers), are
float32. The mixtures of K-quants are those of llama.cpp's ``llama-quantize`` (``llama-quant.cpp``):
the output matrix, and of some layers the values of attention and the second matrix of the MLP,
whose errors cost most, get more bits. Its exceptions for Falcon and for eight experts are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

from halfbyte.errors import CheckpointError

FileType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "mxfp4"
]
# The type of a layer's tensor, from the number of the layer and of all layers.
_ByLayer = Callable[[int, int], Kind]


def _more_bits(usual: Kind, better: Kind) -> _ByLayer:
    """Return the better type for the first and last eighth of layers, and each third between."""

    def chosen(layer: int, layers: int) -> Kind:
        first = layers // 8
        more = layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
        return better if more else usual

    return chosen


def _first(usual: Kind, better: Kind, until: Callable[[int], int]) -> _ByLayer:
    return lambda layer, layers: better if layer < until(layers) else usual


class _Mixture(NamedTuple):
    """A file type.

    Attributes:
        file_type: Its number in the file.
        usual: The type of matrices.
        output: The type of the output matrix, also if it is the embedding.
        embedding: The type of an embedding of its own.
        roles: The types of other tensors, by llama.cpp's name within a layer.
    """

    file_type: LlamaFileType
    usual: Kind
    output: Kind
    embedding: Kind
    roles: Mapping[str, _ByLayer] = {}


def _uniform(file_type: LlamaFileType, kind: Kind) -> _Mixture:
    return _Mixture(file_type, kind, kind, kind)


def _k_quants(
    file_type: LlamaFileType, usual: Kind, *, value: _ByLayer, down: _ByLayer, qkv: Kind, out: Kind
) -> _Mixture:
    roles = {
        **dict.fromkeys(("attn_v", "ffn_down", "ffn_down_exps", "ffn_down_shexp"), down),
        "attn_v": value,
        "attn_qkv": lambda layer, layers: qkv,
        "attn_output": lambda layer, layers: out,
    }
    return _Mixture(file_type, usual, Kind.Q6_K, usual, roles)


_MIXTURES: dict[FileType, _Mixture] = {
    "f32": _uniform(LlamaFileType.ALL_F32, Kind.F32),
    "f16": _uniform(LlamaFileType.MOSTLY_F16, Kind.F16),
    "bf16": _uniform(LlamaFileType.MOSTLY_BF16, Kind.BF16),
    "q8_0": _uniform(LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0),
    "q6_k": _uniform(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K),
    "q5_k_m": _k_quants(
        LlamaFileType.MOSTLY_Q5_K_M,
        Kind.Q5_K,
        value=_more_bits(Kind.Q5_K, Kind.Q6_K),
        down=_more_bits(Kind.Q5_K, Kind.Q6_K),
        qkv=Kind.Q6_K,
        out=Kind.Q5_K,
    ),
    "q4_k_m": _k_quants(
        LlamaFileType.MOSTLY_Q4_K_M,
        Kind.Q4_K,
        value=_more_bits(Kind.Q4_K, Kind.Q6_K),
        down=_more_bits(Kind.Q4_K, Kind.Q6_K),
        qkv=Kind.Q5_K,
        out=Kind.Q4_K,
    ),
    "q3_k_m": _k_quants(
        LlamaFileType.MOSTLY_Q3_K_M,
        Kind.Q3_K,
        value=_first(Kind.Q4_K, Kind.Q5_K, lambda layers: 2),
        down=_first(Kind.Q4_K, Kind.Q5_K, lambda layers: layers // 16),
        qkv=Kind.Q4_K,
        out=Kind.Q4_K,
    ),
    # The loss of q4_0 is largest in embedding and head.
    "q4_0": _Mixture(LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0, Kind.Q8_0, Kind.Q8_0),
    "mxfp4": _Mixture(
        LlamaFileType.MOSTLY_MXFP4_MOE,
        Kind.Q8_0,
        Kind.Q8_0,
        Kind.Q8_0,
        dict.fromkeys(
            ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), lambda layer, layers: Kind.MXFP4
        ),
    ),
}
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)
# Small and sensitive: llama.cpp's converter and quantiser leave them in float32.
_FLOAT32 = {"ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d"}


class TensorTypes:
    """The types of a file's tensors.

    Args:
        file_type: The file's type.
        layers: The number of layers.
        names: The names of all tensors.

    Raises:
        CheckpointError: If the type is one of experts, and there are none.
    """

    def __init__(self, file_type: FileType, layers: int, names: Sequence[str]) -> None:
        self._mixture, self._layers = _MIXTURES[file_type], layers
        self._tied = "output.weight" not in names
        if file_type == "mxfp4" and not any("_exps." in name for name in names):
            raise CheckpointError(
                "the type mxfp4 is one of experts, and this model has none; use q8_0 or q4_k_m"
            )

    @property
    def file_type(self) -> LlamaFileType:
        """The number that a file has for it."""
        return self._mixture.file_type

    def of(self, name: str, shape: Sequence[int]) -> Kind:
        """Return how a tensor is stored.

        Rows that no block of 256 fits are q8_0, and those that no block of 32 fits float16.

        Args:
            name: Its name in the file.
            shape: Its shape.
        """
        if len(shape) < 2 or not name.endswith(".weight"):
            return Kind.F32
        module = name.removesuffix(".weight")
        _, number, role = module.split(".") if module.startswith("blk.") else ("", "0", module)
        if role in _FLOAT32:
            return Kind.F32
        mixture = self._mixture
        if role == "output" or (role == "token_embd" and self._tied):
            kind = mixture.output
        elif role == "token_embd":
            kind = mixture.embedding
        elif role in mixture.roles:
            kind = mixture.roles[role](int(number), self._layers)
        else:
            kind = mixture.usual
        fitting = (kind, Kind.Q8_0, Kind.F16)
        return next(one for one in fitting if shape[-1] % GGML_QUANT_SIZES[one][0] == 0)
