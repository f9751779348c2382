"""The bytes of a stored base model: on the GPU, on the host or the disk, and while it loads."""

from functools import lru_cache
from typing import Literal, NamedTuple

from halfbyte.plan.holding import Holding, Packed, held, nbytes_of
from halfbyte.plan.model_shape import ModelShape, Weight


class Line(NamedTuple):
    """One entry: where it belongs, what it is, its bytes."""

    group: str
    name: str
    nbytes: int


class Storage(NamedTuple):
    """How and where the base model is stored: fields of `ledger.Run`."""

    holding: Holding
    device: str
    waits: Literal["host", "disk", "gpus"] | None
    shards: int
    embedding_on_host: bool


class Stored(NamedTuple):
    """The bytes of a base model: its lines, the peak of loading, the largest layer's weights."""

    lines: tuple[Line, ...]
    load_peak: int
    layer_weights: int


# A plan tries hundreds of policies, for which the base model is the same.
@lru_cache(maxsize=64)
def stored(shape: ModelShape, storage: Storage) -> Stored:
    """Return the bytes of a base model."""
    return Stored(
        tuple(_base(shape, storage)), _load_peak(shape, storage), _layer_weights(shape, storage)
    )


def _base(shape: ModelShape, run: Storage) -> list[Line]:
    holding = run.holding
    packed, plain = dict[str, Packed](), dict[Line, int]()
    dtype = {2: "bf16", 4: "float32"}[holding.itemsize]
    for weight in shape.weights:
        size = held(weight, shape, holding)
        waits = run.waits if _streams(weight) else None
        if waits == "host" and run.device == "cpu":  # the memory of the process, shared or not
            waits = None
        group = waits if waits in ("host", "disk") else "base"
        if waits == "gpus":
            share = Line(group, f"layers, divided among {run.shards} GPUs", 0)
            nbytes = sum(size) if isinstance(size, Packed) else size
            plain[share] = plain.get(share, 0) + -(-nbytes // run.shards)
            continue
        if group == "host" and run.shards > 1:  # one copy for all processes of a machine
            share = Line(group, f"layers, a part of {run.shards}", 0)
            nbytes = sum(size) if isinstance(size, Packed) else size
            plain[share] = plain.get(share, 0) + -(-nbytes // run.shards)
            continue
        if isinstance(size, Packed):
            packed[group] = packed.get(group, Packed()).plus(size)
            continue
        roles = ("embedding", "head") if run.waits else ("embedding",)
        away = run.embedding_on_host and weight.role in roles and not shape.tied
        group = "host" if away and run.device == "cuda" else group
        if len(weight.shape) < 2:
            name = "norms and biases"
        elif weight.role == "linear" and holding.quant == "none":
            name = "linear layers"
        elif weight.role == "experts":
            name = "experts"
        else:  # the same of every layer in one line
            name = weight.name.replace(f".{weight.layer}.", ".*.", 1)
        line = Line(group, f"{name}, {dtype}", 0)
        plain[line] = plain.get(line, 0) + size
    return [
        *(
            Line(group, n.replace("_", " "), size)
            for group, sizes in packed.items()
            for n, size in sizes._asdict().items()
            if size
        ),
        *(line._replace(nbytes=size) for line, size in plain.items()),
    ]


def _streams(weight: Weight) -> bool:
    """Return whether a weight waits elsewhere, if those of layers do."""
    return weight.layer is not None and weight.role in ("linear", "experts")


def _layer_weights(shape: ModelShape, run: Storage) -> int:
    """Return the bytes of the frozen weights of the largest layer, as they are stored."""
    sizes: dict[int, int] = {}
    for weight in filter(_streams, shape.weights):
        assert weight.layer is not None
        size = nbytes_of(weight, shape, run.holding)
        sizes[weight.layer] = sizes.get(weight.layer, 0) + size
    return max(sizes.values(), default=0)


def _load_peak(shape: ModelShape, run: Storage) -> int:
    # On a GPU there is a place for all packed linears from the first one on (linear/arena.py), and
    # for all experts of a layer.
    sizes = {weight: nbytes_of(weight, shape, run.holding) for weight in shape.weights}
    ahead = {w for w in sizes if run.device == "cuda" and run.holding.packs(w, tied=shape.tied)}
    away = {w for w in sizes if run.waits and _streams(w)}
    ahead -= away
    placed, peak = sum(sizes[weight] for weight in ahead), 0
    for weight, becomes in sizes.items():
        came = weight.numel * 2 if weight.comes is None else weight.comes
        if weight.role == "experts" and weight in ahead:
            came //= weight.shape[0]  # one expert is read at a time
        # A tensor that is kept in the dtype it comes in, or packed already, is the one that came.
        flight = becomes if came == becomes else came + becomes
        peak = max(peak, placed + flight)
        placed += becomes * (weight not in ahead and weight not in away)
    return peak
