"""Writes a model, or only an adapter, as a GGUF file for llama.cpp and programs based on it.

It is the inverse of ``gguf.py``, by the same table (``gguf_architectures``): transformers' names
become llama.cpp's, parameters are rearranged as it wants them, each value is rounded once from
float32 to the type of its tensor (``gguf_types``); experts in MXFP4 keep their codes and scales.
One parameter is in memory at a time. A configuration that cannot be expressed completely in keys is
an error: a file that loads but computes something else is worse than none. A file that could not be
finished is removed.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from torch import Tensor

from halfbyte.checkpoint.gguf import GGUFSource
from halfbyte.checkpoint.gguf_architectures import Layout
from halfbyte.checkpoint.gguf_blocks import encode
from halfbyte.checkpoint.gguf_forms import Form
from halfbyte.checkpoint.gguf_mxfp4 import to_blocks
from halfbyte.checkpoint.gguf_rope import unsaid
from halfbyte.checkpoint.gguf_types import FILE_TYPES, FileType, TensorTypes
from halfbyte.checkpoint.gguf_vocabulary import add_vocabulary, copy_vocabulary
from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.peft import LoadedAdapter
from halfbyte.checkpoint.peft_config import parameters_at
from halfbyte.checkpoint.serving import experts_and_routers
from halfbyte.checkpoint.source import BaseSource
from halfbyte.errors import WeightError
from halfbyte.linear.lora_targets import ALL_LINEAR
from halfbyte.quant import MXFP4Weight

__all__ = ["FILE_TYPES", "FileType", "require_expressible", "write_gguf", "write_gguf_lora"]

_EMBEDDING = "token_embd.weight"


def require_expressible(base: BaseSource, *, vocabulary: bool) -> None:
    """Check, before any work is done, that a model can be exported.

    Args:
        base: Its files.
        vocabulary: Whether its tokenizer is to be exported too.

    Raises:
        CheckpointError: If its configuration or tokenizer cannot.
    """
    layout = Layout(base.config)
    for parameter in base.parameters:
        layout.form(parameter.name)
    if vocabulary:
        _add_vocabulary(GGUFWriter(None, layout.architecture.name), base, layout)


def _add_vocabulary(writer: GGUFWriter, base: BaseSource, layout: Layout) -> int:
    """Add the tokenizer of ``base``; return the rows of the embedding."""
    rows = next(p.shape[0] for p in base.parameters if _EMBEDDING in layout.form(p.name).names)
    if isinstance(base, GGUFSource):
        copy_vocabulary(writer, base.file, base.chat_template)
    else:
        add_vocabulary(writer, base.tokenizer(), rows)
    return rows


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


def value_of(source: BaseSource, name: str) -> Tensor:
    """Return a parameter of ``source`` in float32, on its device; packed ones are decoded."""
    return dense(source.tensor(name), torch.float32).detach().float()


def _parts_of(source: BaseSource, name: str, form: Form, *, as_blocks: bool) -> tuple[Tensor, ...]:
    """Return the tensors of a parameter, float32; or blocks of MXFP4, uint8, if it has them."""
    value = source.tensor(name)
    if as_blocks and isinstance(value, MXFP4Weight):
        # A row of blocks takes the place of a row of numbers, which transformers has as a column.
        return form.split(to_blocks(value).mT)
    return form.split(dense(value, torch.float32).detach().float())


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
    forms = {parameter: layout.form(parameter.name) for parameter in source.parameters}
    names = [name for form in forms.values() for name in form.names]
    types = TensorTypes(file_type, layout.config.num_hidden_layers, names)

    @functools.lru_cache(1)  # a parameter may be several tensors, written one after the other
    def parts_of(parameter: str) -> tuple[Tensor, ...]:
        form = layout.form(parameter)
        return _parts_of(source, parameter, form, as_blocks=file_type == "mxfp4")

    plan = []
    for parameter, form in forms.items():
        shapes = form.shapes(parameter.shape)
        for place, (name, shape) in enumerate(zip(form.names, shapes, strict=True)):

            def make(parameter: str = parameter.name, place: int = place) -> Tensor:
                return parts_of(parameter)[place]

            plan.append(_Planned(name, types.of(name, shape), shape, make))
    for name, value in layout.extra_tensors().items():
        plan.append(_Planned(name, GGMLQuantizationType.F32, tuple(value.shape), value.detach))
    with _new_file(path, layout) as writer:
        writer.add_type("model")
        writer.add_name(Path(source.name).name.removesuffix(".gguf"))
        writer.add_file_type(types.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        layout.add_keys(writer, _add_vocabulary(writer, base, layout))
        _write(writer, plan, progress)


def write_gguf_lora(
    source: BaseSource, adapter: LoadedAdapter, path: Path, file_type: FileType = "f16"
) -> None:
    """Write only the adapter, as llama.cpp loads it with ``--lora``.

    A file has a single alpha, and llama.cpp scales by alpha / r: if modules differ, the rest of the
    scale goes into B. Of a matrix that is several tensors in the file, B is split as it is.

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
        raise unsaid(f"an adapter with modules trained in full ({', '.join(kinds)})")
    if adapter.config.use_dora:
        raise unsaid("a DoRA adapter")
    if others := experts_and_routers(adapter.config.target_parameters):
        raise unsaid(f"an adapter of experts or routers ({', '.join(others)})")
    layout = Layout(source.config)
    own = {parameter.name for parameter in source.parameters}
    kind = GGMLQuantizationType[file_type.upper()]
    alpha, plan = None, []
    for module, scale, a, b in matrices(adapter):
        weight = f"{module}.weight"
        if weight not in own:
            raise unsaid(f"an adapter on {module}, whose weight is tied to another")
        form = layout.form(weight)
        if not form.moves_rows:
            raise unsaid(f"an adapter on {module}, which llama.cpp stores in another form")
        alpha = alpha or scale * len(a)
        b = b * (scale * len(a) / (alpha or 1.0))
        for name, part in zip(form.names, form.split(b), strict=True):
            for leaf, value in (("lora_a", a), ("lora_b", part)):
                plan.append(_Planned(f"{name}.{leaf}", kind, tuple(value.shape), value.detach))
    with _new_file(path, layout) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha or 1.0)
        writer.add_name(Path(source.name).name.removesuffix(".gguf"))
        writer.add_file_type(TensorTypes(file_type, 0, ()).file_type)
        _write(writer, plan, None)


def matrices(adapter: LoadedAdapter) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """Yield (module, scale s, A [r, in], B [out, r]) of each module, float32."""
    ending = ".lora_A.weight"
    for name in [name for name in adapter.state if name.endswith(ending)]:
        module = name.removesuffix(ending)
        a, b = adapter.state[name], adapter.state[f"{module}.lora_B.weight"]
        # Patterns of rank and alpha are looked up under a parameter's own path.
        targets, parameters = adapter.config.target_modules, adapter.config.target_parameters
        named = () if targets == ALL_LINEAR else targets
        path = next(iter(parameters_at(module, named, parameters)), module)
        yield module, adapter.config.at(path).scaling, a.float(), b.float()


@contextlib.contextmanager
def _new_file(path: Path, layout: Layout) -> Iterator[GGUFWriter]:
    """Open a writer, which is closed when the block ends; if it fails, the file is removed."""
    writer = GGUFWriter(path, layout.architecture.name)
    try:
        yield writer
    except BaseException:
        writer.close()
        path.unlink(missing_ok=True)
        raise
    writer.close()


def _write(
    writer: GGUFWriter, plan: list[_Planned], progress: Callable[[int, int], None] | None
) -> None:
    total = sum(math.prod(planned.stored_shape) for planned in plan)
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


def _encoded(planned: _Planned) -> np.ndarray[Any, Any]:
    value = planned.make()
    if value.dtype == torch.uint8:
        return value.reshape(-1).cpu().numpy()
    least, most = torch.aminmax(value.reshape(-1)) if value.numel() else (0.0, 0.0)
    largest = max(-float(least), float(most))
    if not math.isfinite(largest):
        raise WeightError(f"{planned.name} contains NaN or infinity; it cannot be exported")
    if planned.kind == GGMLQuantizationType.F16 and largest >= 65520:
        raise WeightError(f"{planned.name} has numbers float16 cannot hold; use --type bf16")
    return encode(value, planned.kind).cpu().numpy()
