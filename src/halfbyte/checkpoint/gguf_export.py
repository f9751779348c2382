"""Writes a model, or only an adapter, as a GGUF file for llama.cpp and programs based on it.

It is the inverse of ``gguf.py``: transformers' names become llama.cpp's, the rows of queries and
keys are put in its order, each value is rounded once from float32 to the type of the file. One
tensor is in memory at a time. A configuration that cannot be expressed completely in keys is an
error: a file that loads but computes something else is worse than none.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.checkpoint.gguf import GGUFSource
from halfbyte.checkpoint.gguf_blocks import encode
from halfbyte.checkpoint.gguf_file import GGUFFile, held_as
from halfbyte.checkpoint.gguf_vocabulary import add_vocabulary, copy_vocabulary
from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.peft import LoadedAdapter
from halfbyte.checkpoint.source import BaseSource
from halfbyte.errors import CheckpointError, HalfbyteError, WeightError
from halfbyte.foreign_text import quote

FileType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_VOCABULARY = ("token_embd.weight", "output.weight")


class Layout:
    """llama.cpp's names of a model's parameters, and its order of their rows.

    Raises:
        CheckpointError: If the configuration cannot be expressed in a GGUF file.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        if config.model_type not in _ARCHITECTURES:
            raise CheckpointError(
                f"models of type {config.model_type} cannot be exported to GGUF; those of "
                f"{', '.join(_ARCHITECTURES)} can. `halfbyte merge` writes safetensors of any, "
                "which llama.cpp's convert_hf_to_gguf.py may know"
            )
        self.architecture = _ARCHITECTURES[config.model_type]
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.architecture)
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        heads: int = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.rope: dict[str, Any] = dict(config.rope_parameters)
        scaling = self.rope.get("rope_type", "default")
        if scaling not in ("default", "llama3"):
            raise _unsaid(f"rotary frequencies scaled by {quote(scaling)}")
        if scaling == "llama3" and self.architecture != "llama":
            raise _unsaid(f"rotary frequencies scaled by {quote(scaling)} in {config.model_type}")
        if self.rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _unsaid("rotary embeddings of a part of each head")
        if config.hidden_act != "silu":
            raise _unsaid(f"the activation {quote(config.hidden_act)}")
        # llama.cpp supports them, but transformers reads none, so nothing could be verified.
        if any(getattr(config, name, False) for name in ("attention_bias", "mlp_bias")):
            raise _unsaid(f"biases of the linear layers in {config.model_type}")

    def name(self, parameter: str) -> str:
        """Return llama.cpp's name of a parameter.

        Raises:
            CheckpointError: If it has none.
        """
        found: str | None = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _unsaid(f"the parameter {parameter}")
        return found

    def ordered(self, parameter: str, value: Tensor) -> Tensor:
        """Return a value with its rows in llama.cpp's order: rotary pairs adjacent."""
        module = parameter.split(".")[-2]
        if self.architecture != "llama" or module not in ("q_proj", "k_proj"):
            return value
        config = self.config
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        halves = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)

    def frequencies(self) -> Tensor | None:
        """Return the divisor of each rotary frequency, float32 [head_dim / 2], if scaled."""
        if self.rope.get("rope_type", "default") == "default":
            return None
        scaled: Tensor
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        plain: Tensor = float(self.rope["rope_theta"]) ** -exponents
        return plain / scaled.float()

    def add_keys(self, writer: GGUFWriter, rows: int) -> None:
        """Add the architecture's keys; ``rows`` is the number of rows of the embedding."""
        config = self.config
        context: int = config.max_position_embeddings
        # The layers of these architectures have no attention window in llama.cpp; contexts up to
        # its length need none.
        if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
            context = min(context, config.sliding_window)
        writer.add_context_length(context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        writer.add_vocab_size(rows)


def require_expressible(base: BaseSource, *, vocabulary: bool) -> None:
    """Check, before any work is done, that a model can be exported.

    Args:
        base: Its files.
        vocabulary: Whether its tokenizer is to be exported too.

    Raises:
        CheckpointError: If its configuration or tokenizer cannot.
    """
    layout = Layout(base.config)
    if isinstance(base, GGUFSource) and base.scales_frequencies:
        raise CheckpointError(
            f"{base.name} scales its rotary frequencies by a table that transformers does not read "
            "from GGUF files; export from the model's safetensors files"
        )
    if vocabulary:
        _add_vocabulary(GGUFWriter(None, layout.architecture), base, layout)


def _add_vocabulary(writer: GGUFWriter, base: BaseSource, layout: Layout) -> int:
    """Add the tokenizer of ``base``; return the rows of the embedding."""
    rows = next(p.shape[0] for p in base.parameters if layout.name(p.name) == _VOCABULARY[0])
    if isinstance(base, GGUFSource):
        copy_vocabulary(writer, base.file, base.chat_template)
    else:
        add_vocabulary(writer, base.tokenizer(), rows)
    return rows


def _unsaid(what: str) -> CheckpointError:
    return CheckpointError(
        f"a GGUF file, as halfbyte writes it, cannot express {what}; `halfbyte merge` writes "
        "safetensors, which can"
    )


class _Planned(NamedTuple):
    """One tensor to write: its name in the file, its type there, its shape, how to make it."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * block_bytes)


def _kind_of(name: str, shape: tuple[int, ...], file_type: FileType) -> GGMLQuantizationType:
    """Return how a tensor is stored: vectors in float32, matrices that fit no block in float16.

    The embedding and the head of a q4_0 file are q8_0, because their loss is largest.
    """
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[file_type.upper()]
    if kind == GGMLQuantizationType.Q4_0 and name in _VOCABULARY:
        kind = GGMLQuantizationType.Q8_0
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def value_of(source: BaseSource, name: str) -> Tensor:
    """Return a parameter of ``source`` in float32, on its device; packed ones are decoded."""
    return dense(source.tensor(name), torch.float32).detach().float()


def write_gguf(
    source: BaseSource,
    path: Path,
    file_type: FileType = "f16",
    *,
    base: BaseSource,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model with its tokenizer and chat template.

    Args:
        source: The model: files, or a ``Merged``.
        path: The file; its name is taken at once, so let it be in a ``new_directory``.
        file_type: What matrices are rounded to.
        base: The files it comes from, with its tokenizer; a GGUF file's is copied key by key.
        progress: Called with (bytes written, bytes in all) after each tensor.

    Raises:
        CheckpointError: If the model or its tokenizer cannot be expressed in the file, or a file of
            the source ends early.
        WeightError: If a weight is NaN or infinite, or is in the file's type.
    """
    layout = Layout(source.config)
    shapes = {parameter.name: parameter.shape for parameter in source.parameters}
    plan = []
    for parameter, shape in shapes.items():
        name = layout.name(parameter)

        def make(parameter: str = parameter) -> Tensor:
            return layout.ordered(parameter, value_of(source, parameter))

        plan.append(_Planned(name, _kind_of(name, shape, file_type), shape, make))
    factors = layout.frequencies()
    if factors is not None:
        shape = tuple(factors.shape)
        plan.append(_Planned("rope_freqs.weight", GGMLQuantizationType.F32, shape, factors.detach))
    writer = GGUFWriter(path, layout.architecture)
    writer.add_type("model")
    writer.add_name(Path(source.name).name.removesuffix(".gguf"))
    writer.add_file_type(_FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layout.add_keys(writer, _add_vocabulary(writer, base, layout))
    _write(writer, plan, progress)


def write_gguf_lora(
    source: BaseSource, adapter: LoadedAdapter, path: Path, file_type: FileType = "f16"
) -> None:
    """Write only the adapter, as llama.cpp loads it with ``--lora``.

    A file has a single alpha, and llama.cpp scales by alpha / r: if modules differ, the rest of the
    scale goes into B.

    Args:
        source: Its base model, of which only names and shapes are needed.
        adapter: The adapter.
        path: The file; its name is taken at once, so let it be in a ``new_directory``.
        file_type: What A and B are rounded to; block types do not fit them.

    Raises:
        CheckpointError: If the adapter is more than A and B, or sits where the base, in llama.cpp,
            has no matrix of its own.
        WeightError: If a value is NaN or infinite, or is in the file's type.
    """
    if kinds := dict.fromkeys(name.split(".")[-2] for name in adapter.saved):
        raise _unsaid(f"an adapter with modules trained in full ({', '.join(kinds)})")
    if adapter.config.use_dora:
        raise _unsaid("a DoRA adapter")
    layout = Layout(source.config)
    own = {parameter.name for parameter in source.parameters}
    alpha, plan = None, []
    for module, scale, a, b in matrices(adapter):
        weight = f"{module}.weight"
        if weight not in own:
            raise _unsaid(f"an adapter on {module}, whose weight is tied to another")
        alpha = alpha or scale * len(a)
        b = b * (scale * len(a) / (alpha or 1.0))
        for leaf, value in (("lora_a", a), ("lora_b", layout.ordered(weight, b))):
            kind = GGMLQuantizationType[file_type.upper()]
            plan.append(
                _Planned(
                    f"{layout.name(weight)}.{leaf}",
                    kind,
                    tuple(value.shape),
                    value.detach,
                )
            )
    writer = GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha or 1.0)
    writer.add_name(Path(source.name).name.removesuffix(".gguf"))
    writer.add_file_type(_FILE_TYPES[file_type])
    _write(writer, plan, None)


def matrices(adapter: LoadedAdapter) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """Yield (module, scale s, A [r, in], B [out, r]) of each module, float32."""
    ending = ".lora_A.weight"
    for name in [name for name in adapter.state if name.endswith(ending)]:
        module = name.removesuffix(ending)
        a, b = adapter.state[name], adapter.state[f"{module}.lora_B.weight"]
        yield module, adapter.config.at(module).scaling, a.float(), b.float()


def _write(
    writer: GGUFWriter, plan: list[_Planned], progress: Callable[[int, int], None] | None
) -> None:
    total = sum(math.prod(planned.stored_shape) for planned in plan)
    try:
        for planned in plan:
            writer.add_tensor_info(
                planned.name,
                planned.stored_shape,
                np.dtype(np.uint8),
                math.prod(planned.stored_shape),
                raw_dtype=planned.kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for planned in plan:
            writer.write_tensor_data(_encoded(planned))
            done += math.prod(planned.stored_shape)
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _encoded(planned: _Planned) -> np.ndarray[Any, Any]:
    value = planned.make()
    least, most = torch.aminmax(value.reshape(-1)) if value.numel() else (0.0, 0.0)
    largest = max(-float(least), float(most))
    if not math.isfinite(largest):
        raise WeightError(f"{planned.name} contains NaN or infinity; it cannot be exported")
    if planned.kind == GGMLQuantizationType.F16 and largest >= 65520:
        raise WeightError(f"{planned.name} has numbers float16 cannot hold; use --type bf16")
    return encode(value, planned.kind).cpu().numpy()


class Verified(NamedTuple):
    """The result of reading a file back.

    Attributes:
        tensors: Number of tensors compared, which is all of them.
        largest_error: The largest difference of two numbers.
        worst_share: The largest difference as a share of the rounding error of its type; above 1
            the file is wrong.
    """

    tensors: int
    largest_error: float
    worst_share: float


def rounding(value: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Return the largest rounding error of each value when stored as ``kind``."""
    if kind == GGMLQuantizationType.F32:
        return torch.full_like(value, torch.finfo(torch.float32).tiny)
    if kind == GGMLQuantizationType.F16:
        return value.abs() * 2.0**-11 + 2.0**-25
    if kind == GGMLQuantizationType.BF16:
        return value.abs() * 2.0**-8 + torch.finfo(torch.float32).tiny
    largest = value.reshape(-1, 32).abs().amax(1, keepdim=True)
    # Half a step in q8_0; a whole one in q4_0, which has 8 steps on one side and 7 on the other.
    # The step itself is a float16.
    steps, part = (127, 0.5) if kind == GGMLQuantizationType.Q8_0 else (8, 1.0)
    bound = largest * (part / steps + 2.0**-10) + steps * 2.0**-24
    return bound.expand(-1, 32).reshape(value.shape)


def verify_gguf(source: BaseSource, written: BaseSource, path: Path) -> Verified:
    """Compare a written file with its source, one tensor at a time.

    Args:
        source: The source of the file.
        written: The file as a base model.
        path: The file.

    Raises:
        HalfbyteError: If a parameter is missing, or the file's configuration or tokenizer computes
            something else.
    """
    ours, theirs = Layout(source.config), Layout(written.config)
    for name in _COMPUTING:
        a, b = (getattr(layout.config, name) for layout in (ours, theirs))
        if not math.isclose(a, b, rel_tol=1e-6):
            raise HalfbyteError(f"{path} was written, but is wrong: {name} is {b}, not {a}")
    if (ours.head_dim, ours.rope["rope_theta"]) != (theirs.head_dim, theirs.rope["rope_theta"]):
        raise HalfbyteError(f"{path} was written, but is wrong: its rotary embedding is another")
    if _rules_of(source.tokenizer()) != _rules_of(written.tokenizer()):
        raise HalfbyteError(f"{path} was written, but is wrong: its tokenizer is another")
    stored = GGUFFile(path).tensors
    there = {parameter.name for parameter in written.parameters}
    error, share = 0.0, 0.0
    for parameter in source.parameters:
        if parameter.name not in there:
            raise HalfbyteError(f"{path} was written, but is wrong: it has no {parameter.name}")
        value = value_of(source, parameter.name)
        gap = (value_of(written, parameter.name).to(value.device) - value).abs_()
        error = max(error, float(gap.max()))
        gap /= rounding(value, stored[ours.name(parameter.name)].kind)
        share = max(share, float(gap.max()))
    return Verified(len(source.parameters), error, share)


def _rules_of(tokenizer: Any) -> Any:
    """Return a tokenizer's rules, except for splitting, which transformers does not read."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template


_COMPUTING = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "vocab_size",
)


def verify_gguf_lora(source: BaseSource, adapter: LoadedAdapter, path: Path) -> Verified:
    """Compare a written adapter's updates alpha/r·B·A with s·B·A of the adapter it was made of.

    Rows are compared in llama.cpp's order; the share is that of the rounding of A and B together.

    Raises:
        HalfbyteError: If a matrix is missing.
    """
    layout, file = Layout(source.config), GGUFFile(path)
    alpha = file.keys[gguf.Keys.Adapter.LORA_ALPHA].value
    error, share, count = 0.0, 0.0, 0
    for module, scale, a, b in matrices(adapter):
        base = layout.name(f"{module}.weight")
        parts = [file.tensors.get(f"{base}.{leaf}") for leaf in ("lora_a", "lora_b")]
        if None in parts:
            raise HalfbyteError(f"{path} was written, but is wrong: it lacks {base}")
        theirs = []
        for part in parts:
            assert part is not None
            value = torch.from_numpy(file.read(part))
            theirs.append(
                (value.view(torch.bfloat16) if held_as(part) == np.uint16 else value).float()
            )
            count += 1
        got = alpha / len(theirs[0]) * (theirs[1] @ theirs[0])
        wanted = layout.ordered(f"{module}.weight", scale * (b @ a))
        gap = (got - wanted).abs()
        assert parts[0] is not None
        unit = {GGMLQuantizationType.BF16: 2.0**-8, GGMLQuantizationType.F16: 2.0**-11}
        allowed = unit.get(parts[0].kind, 2.0**-20) * 2.1
        bound = layout.ordered(f"{module}.weight", abs(scale) * (b.abs() @ a.abs())) * allowed
        small = abs(scale) * len(a) * 2.0**-24 * float(a.abs().max() + b.abs().max())
        error = max(error, float(gap.max()))
        share = max(share, float((gap / (bound + small + 1e-30)).max()))
    return Verified(count, error, share)
