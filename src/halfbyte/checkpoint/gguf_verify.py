"""Compares a written GGUF file with what it was made of, one tensor at a time.

Tensors are compared as llama.cpp reads them, with a bound that is the rounding error of their type:
a difference beyond it is a bug, not an inexactness.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from halfbyte.checkpoint.gguf_architectures import COMMON, Layout
from halfbyte.checkpoint.gguf_blocks import decode, encode
from halfbyte.checkpoint.gguf_export import matrices, value_of
from halfbyte.checkpoint.gguf_file import GGUFFile
from halfbyte.checkpoint.peft import LoadedAdapter
from halfbyte.checkpoint.source import BaseSource
from halfbyte.errors import HalfbyteError

_TINY = torch.finfo(torch.float32).tiny


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
    """Return the largest rounding error of each value when stored as ``kind``.

    The scales of K-quants and MXFP4 are found by a search, which bounds no single value: there it
    is the error of encoding the value once more.
    """
    if kind == GGMLQuantizationType.F32:
        return torch.full_like(value, _TINY)
    if kind == GGMLQuantizationType.F16:
        return value.abs() * 2.0**-11 + 2.0**-25
    if kind == GGMLQuantizationType.BF16:
        return value.abs() * 2.0**-8 + _TINY
    if kind not in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        again = decode(encode(value, kind), kind).view(value.shape)
        return (again - value).abs() * (1 + 2.0**-20) + _TINY
    largest = value.reshape(-1, 32).abs().amax(1, keepdim=True)
    # Half a step in q8_0; a whole one in q4_0, which has 8 steps on one side and 7 on the other.
    # The step itself is a float16.
    steps, part = (127, 0.5) if kind == GGMLQuantizationType.Q8_0 else (8, 1.0)
    bound = largest * (part / steps + 2.0**-10) + steps * 2.0**-24
    return bound.expand(-1, 32).reshape(value.shape)


def verify_gguf(source: BaseSource, written: BaseSource, path: Path) -> Verified:
    """Compare a written file with its source, one parameter at a time.

    Args:
        source: The source of the file.
        written: The file as a base model.
        path: The file.

    Raises:
        HalfbyteError: If a tensor is missing, or the file's configuration or tokenizer computes
            something else.
    """
    ours, theirs = Layout(source.config), Layout(written.config)
    for name, a, b in _computing(ours, theirs):
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
        if not same:
            raise _wrong(path, f"{name} is {b}, not {a}")
    _compare_rope(ours, theirs, path)
    if _rules_of(source.tokenizer()) != _rules_of(written.tokenizer()):
        raise _wrong(path, "its tokenizer is another")
    file = GGUFFile(path)
    error, share, count = 0.0, 0.0, 0
    for parameter in source.parameters:
        form = ours.form(parameter.name)
        parts = form.split(value_of(source, parameter.name))
        for name, value in zip(form.names, parts, strict=True):
            stored = file.tensors.get(name)
            if stored is None or stored.shape != tuple(value.shape):
                raise _wrong(path, f"it has no {name} of shape {list(value.shape)}")
            gap = (file.tensor(stored).float().to(value.device) - value).abs_()
            error = max(error, float(gap.max()))
            gap /= rounding(value, stored.kind)
            share, count = max(share, float(gap.max())), count + 1
    return Verified(count, error, share)


def _wrong(path: Path, how: str) -> HalfbyteError:
    return HalfbyteError(
        f"{path.name} is wrong, so it is removed: {how}. This is a bug in halfbyte"
    )


def _computing(ours: Layout, theirs: Layout) -> list[tuple[str, Any, Any]]:
    """Return (name, ours, theirs) of what the answers depend on."""
    row = ours.architecture
    names = [key.option for key in (*COMMON, *row.keys)] + [*row.found, "vocab_size"]
    names += ["sliding_window", "layer_types"] if row.sliding else []
    names += ["layer_types", "linear_value_head_dim"] if row.hybrid is not None else []
    found: list[tuple[str, Any, Any]] = [("head_dim", ours.head_dim, theirs.head_dim)]
    for name in names:
        value = getattr(ours.config, name, None)
        if value is not None:
            found.append((name, value, getattr(theirs.config, name, None)))
    return found


def _compare_rope(ours: Layout, theirs: Layout, path: Path) -> None:
    a, b = ours.rope, theirs.rope
    same = (a.kind, a.dimensions) == (b.kind, b.dimensions)
    if not (same and math.isclose(a.theta, b.theta, rel_tol=1e-6)):
        raise _wrong(path, "its rotary embedding is another")
    tables = a.tensors(), b.tensors()
    for name, table in tables[0].items():
        if not torch.allclose(table, tables[1][name], rtol=1e-3):
            raise _wrong(path, f"{name} is another")


def _rules_of(tokenizer: Any) -> Any:
    """Return a tokenizer's rules, except for splitting, which transformers does not read."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template


def verify_gguf_lora(source: BaseSource, adapter: LoadedAdapter, path: Path) -> Verified:
    """Compare a written adapter's updates alpha/r·B·A with s·B·A of the adapter it was made of.

    Rows are compared in llama.cpp's order; the share is that of the rounding of A and B together.

    Raises:
        HalfbyteError: If a matrix is missing.
    """
    layout, file = Layout(source.config), GGUFFile(path)
    alpha = file.keys[gguf.Keys.Adapter.LORA_ALPHA].value
    units = {GGMLQuantizationType.BF16: 2.0**-8, GGMLQuantizationType.F16: 2.0**-11}
    error, share, count = 0.0, 0.0, 0
    for module, scale, a, b in matrices(adapter):
        form = layout.form(f"{module}.weight")
        for name, part in zip(form.names, form.split(b), strict=True):
            stored = [file.tensors.get(f"{name}.{leaf}") for leaf in ("lora_a", "lora_b")]
            pair = [file.tensor(tensor).float() for tensor in stored if tensor is not None]
            if len(pair) < 2 or stored[0] is None:
                raise _wrong(path, f"it lacks {name}")
            count += 2
            gap = (alpha / len(pair[0]) * (pair[1] @ pair[0]) - scale * (part @ a)).abs()
            allowed = units.get(stored[0].kind, 2.0**-20) * 2.1
            bound = abs(scale) * (part.abs() @ a.abs()) * allowed
            small = abs(scale) * len(a) * 2.0**-24 * float(a.abs().max() + b.abs().max())
            error = max(error, float(gap.max()))
            share = max(share, float((gap / (bound + small + 1e-30)).max()))
    return Verified(count, error, share)
