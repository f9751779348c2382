"""Convolutions and recurrent states over packed documents.

Hybrid decoders have layers that mix tokens otherwise than by attention: short convolutions, Mamba,
Gated DeltaNet. transformers computes them by functions of its modelling modules, which are the same
in all families and choose between a package's kernels and PyTorch:

    causal_conv1d_fn                 a depthwise convolution over the last few tokens
    torch_chunk_gated_delta_rule     Gated DeltaNet
    chunk_kimi_delta_attention       the same with a decay per channel
    mamba2_chunk_scan                Mamba 2
    mamba_selective_scan             Mamba 1

`register` wraps them where a model's modules look them up. Outside of a packed row (packed_row.py)
the wrappers call them, as they are. Within one,

    a convolution       gets a row with zeros between documents, as many as it looks back
    the gated delta rule and Mamba 2
                        are computed by chunked_scans.py, which takes documents, unless the package
                        with their kernels is installed and the tensors are on a GPU
    everything else     gets documents as the rows of a batch, padded on the right: all of these are
                        causal, so no token sees padding

Projections, norms and gates before and after them are computed on packed tokens. Kernels of
packages need no documents then (`cu_seqlens`, `seq_idx`), so whichever is installed is exact.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.layers.chunked_scans import gated_delta_rule, mamba2_scan
from halfbyte.layers.packed_row import NotPackable, PackedRow, current_row


class _Mixer(NamedTuple):
    """A function that mixes tokens.

    Attributes:
        sequences: Its arguments with an axis of tokens.
        axis: That axis, of its output as well; axis 0 is that of the batch.
        package: The package whose kernels it calls, if installed.
    """

    sequences: tuple[str, ...]
    axis: int
    package: str


_DELTA = ("query", "key", "value", "g", "beta")
_MIXERS = {
    "causal_conv1d_fn": _Mixer(("hidden_states",), 2, "causal_conv1d"),
    "torch_chunk_gated_delta_rule": _Mixer(_DELTA, 1, "fla"),
    "chunk_kimi_delta_attention": _Mixer(_DELTA, 1, "fla"),
    "mamba2_chunk_scan": _Mixer(("hidden_states", "dt", "B", "C"), 1, "mamba_ssm"),
    "mamba_selective_scan": _Mixer(("hidden_states", "dt", "B", "C", "z"), 2, "mamba_ssm"),
}
# Arguments that start from a state, or ask for the last one: there is one per document.
_STATES = (
    *("initial_state", "initial_states"),
    *("output_final_state", "return_final_states", "return_last_state"),
)


def register(model: nn.Module) -> None:
    """Have the modules of ``model`` call functions that know the documents of a packed row."""
    names = {type(module).__module__ for module in model.modules()}
    for module in [sys.modules[name] for name in names if name.startswith("transformers.models.")]:
        for name, mixer in _MIXERS.items():
            function = getattr(module, name, None)
            if function is not None and not hasattr(function, "by_document"):
                setattr(module, name, _by_document(name, mixer, function))


def _by_document(name: str, mixer: _Mixer, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, restricted to documents within a packed row."""
    parameters = signature(function)

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        row = current_row()
        if row is None:
            return function(*args, **kwargs)
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        sequences = {key: given[key] for key in mixer.sequences if given[key] is not None}
        for x in sequences.values():
            if x.shape[0] != 1 or x.shape[mixer.axis] != sum(row.lengths):
                raise NotPackable(f"{name} sees other tokens than its layers")
        if any(given.get(key) not in (None, False) for key in _STATES):
            raise NotPackable(f"{name} is asked for the state of the last document")
        row.scans += 1
        first = next(iter(sequences.values()))
        if name in _OURS and not (first.is_cuda and find_spec(mixer.package)):
            return _OURS[name](given, row.lengths)
        layout = _layout(name, given, row, first.device)
        given |= {key: _arranged(x, mixer.axis, layout) for key, x in sequences.items()}
        result = function(*bound.args, **bound.kwargs)
        out, *rest = result if isinstance(result, tuple) else (result,)
        out = _packed(out, mixer.axis, layout)
        return (out, *rest) if isinstance(result, tuple) else out

    wrapped.by_document = True  # type: ignore[attr-defined]
    return wrapped


def _delta(given: dict[str, Any], lengths: tuple[int, ...]) -> tuple[Tensor, None]:
    q, k, v, g, beta = (given[name][0] for name in _DELTA)
    kind = q.dtype
    q, k = q.to(wide := torch.promote_types(kind, torch.float32)), k.to(wide)
    if given["use_qk_l2norm_in_kernel"]:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    return gated_delta_rule(q, k, v, g, beta, lengths)[None].to(kind), None


def _mamba2(given: dict[str, Any], lengths: tuple[int, ...]) -> Tensor:
    x, dt, b, c = (given[name][0] for name in ("hidden_states", "dt", "B", "C"))
    if given["dt_bias"] is not None:
        dt = dt + given["dt_bias"].to(dt.dtype)
    if given["dt_softplus"]:
        dt = F.softplus(dt)
    dt = dt.clamp(*given["dt_limit"])
    out = mamba2_scan(x, dt, given["A"], b, c, lengths)
    if given["D"] is not None:
        out = out + given["D"][:, None] * x.to(out.dtype)
    return out[None]


_OURS = {"torch_chunk_gated_delta_rule": _delta, "mamba2_chunk_scan": _mamba2}


class _Layout(NamedTuple):
    """Where the tokens of a packed row are in another batch.

    Attributes:
        rows: Rows of the batch.
        places: int64 [T], indices into its flattened rows.
        tokens: Tokens of a row.
    """

    rows: int
    places: Tensor
    tokens: int


def _layout(name: str, given: dict[str, Any], row: PackedRow, device: torch.device) -> _Layout:
    gap = given["weight"].shape[-1] - 1 if name == "causal_conv1d_fn" else None
    return _places(row.lengths, gap, device)


@lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], gap: int | None, device: torch.device) -> _Layout:
    """Return the layout of one row with gaps of this many tokens, or of a row per document."""
    count, longest = len(lengths), max(lengths)
    stride = [n + gap for n in lengths] if gap is not None else [longest] * count
    starts = torch.tensor([0, *accumulate(stride)])
    own = torch.cat([torch.arange(n) for n in lengths])
    places = (own + starts[:-1].repeat_interleave(torch.tensor(lengths))).to(device)
    if gap is None:
        return _Layout(count, places, longest)
    return _Layout(1, places, int(starts[-1]))


def _arranged(x: Tensor, axis: int, layout: _Layout) -> Tensor:
    """Return x [1, ..., T, ...] as a batch of this layout, padded with zeros."""
    packed = x.movedim(axis, 1)[0]
    out = packed.new_zeros(layout.rows * layout.tokens, *packed.shape[1:])
    out = out.index_copy(0, layout.places, packed)
    return out.view(layout.rows, layout.tokens, *packed.shape[1:]).movedim(1, axis)


def _packed(x: Tensor, axis: int, layout: _Layout) -> Tensor:
    """Return the tokens of a batch of this layout as one row."""
    flat = x.movedim(axis, 1).flatten(0, 1)
    return flat.index_select(0, layout.places)[None].movedim(1, axis)
