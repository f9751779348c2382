"""Whether documents can be packed without any effect on each other.

Packed documents must be as independent as in rows of their own. Attention is restricted to them by
our attention (layers/attention_interface.py), if the model uses it, convolutions and recurrent
states by ours (layers/token_mixers.py); position ids tell them apart for everything else. What this
leaves out is found by a probe: other operations that mix tokens, biases of attention, positions
that do not come from ids. Fused layers (layers/decoder_layer.py) take documents and need no probe.
The model packs if the log-probabilities of documents in one row

    are those of the documents alone, up to rounding
    do not change with the tokens of another document: not by a bit, unless it has experts, whose
    products have other shapes then

Attention that is plain for short documents only limits their length: in chunks, or with rotary
tables that depend on the longest position of the row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import UnpaddedParts
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.objective import Objective
from halfbyte.engine.packing import Batch
from halfbyte.engine.recorded_layers import EngineError
from halfbyte.layers.attention_interface import NAME
from halfbyte.layers.multimodal import text_decoder
from halfbyte.layers.packed_row import NotPackable, packed_row
from halfbyte.layers.rotary_limit import rotary_limit
from halfbyte.plan.ledger import CPU_PART_TOKENS

# Tokens of the probe's documents: few, as small models have small windows.
_LENGTHS = (5, 7, 3)
_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, EngineError)


class _Recorded(Objective):
    """Keeps the log-probability of every token, by its document."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def loss(self, logps: Tensor, segments: Tensor) -> Tensor:
        for segment in set(segments.tolist()):
            self.found[segment] = logps[segments == segment].double()
        return -logps.sum()


def pack_documents(engine: LayerEngine | AutogradEngine, vocabulary: int) -> str | None:
    """Have an engine pack documents if that is exact; return why not, or None.

    Args:
        engine: An engine without fused layers.
        vocabulary: Size of the vocabulary.
    """
    decoder = text_decoder(engine.model)
    if decoder.config._attn_implementation != NAME and _attends(decoder):
        return "its attention is transformers' own"
    # The autograd engine packs micro-batches.
    size = CPU_PART_TOKENS if isinstance(engine, LayerEngine) else 1 << 62
    try:
        with torch.no_grad():
            window = _probed(engine, vocabulary)
    except NotPackable as error:
        engine.unpadded = None
        return str(error)
    except _ERRORS as error:
        engine.unpadded = None
        return f"its decoder cannot be called with packed documents: {error}"
    limits = [n for n in (window, rotary_limit(decoder)) if n is not None]
    longest = min(limits, default=None)
    if isinstance(engine, LayerEngine) and engine.model.device.type != "cpu":
        # Memory is planned for the shapes of buckets, as with fused layers.
        engine.unpadded, engine.packable, engine.window = None, True, longest
    else:
        engine.unpadded = UnpaddedParts(size, longest)
    return None


def _probed(engine: LayerEngine | AutogradEngine, vocabulary: int) -> int | None:
    """Return the attention window, if any.

    Raises:
        NotPackable: If packed documents are not independent, or not what they are alone.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocabulary, (n + 1,), generator=generator) for n in _LENGTHS]
    others = [torch.randint(0, vocabulary, (_LENGTHS[0] + 1,), generator=generator), *documents[1:]]
    alone = _logps(engine, documents)
    engine.unpadded = UnpaddedParts()
    with packed_row(()) as row:  # of the rows within
        together = _logps(engine, documents)
    layers, calls = engine.model.config.get_text_config().num_hidden_layers, row.attention_calls
    if calls != layers and not row.scans:  # a hybrid has attention in some layers only
        raise NotPackable(f"attention is computed {calls} times in {layers} layers")
    changed = _logps(engine, others)
    wide = engine.model.halfbyte_recipe.compute_dtype == torch.float32
    tolerance = 1e-4 if wide else 2e-2  # that of the probe of the layer engine
    mixes_shapes = any("expert" in name for name, _ in engine.model.named_modules())
    for one, whole, other in zip(alone[1:], together[1:], changed[1:], strict=True):
        if not torch.allclose(whole, one, rtol=tolerance, atol=tolerance):
            raise NotPackable("packed documents have other probabilities than documents alone")
        same = torch.allclose(whole, other, rtol=tolerance, atol=tolerance)
        if not (same if mixes_shapes else torch.equal(whole, other)):
            raise NotPackable("packed documents depend on each other")
    return row.window


def _logps(engine: LayerEngine | AutogradEngine, documents: Sequence[Tensor]) -> list[Tensor]:
    """Return the log-probabilities of each document's tokens, float64."""
    recorded = _Recorded()
    if engine.unpadded is None:
        batches = [Batch(one[None, :-1], one[None, 1:]) for one in documents]
    else:  # in one micro-batch, as one is what the autograd engine packs
        ids, labels = (
            pad_sequence(rows, batch_first=True)
            for rows in ([one[:-1] for one in documents], [one[1:] for one in documents])
        )
        batches = [Batch(ids, labels, [len(one) - 1 for one in documents])]
    engine.loss(batches, recorded)
    return [recorded.found[number] for number in range(len(documents))]


def _attends(decoder: nn.Module) -> bool:
    """Return whether a decoder has attention; Mamba's has none."""
    return any("Attention" in type(module).__name__ for module in decoder.modules())
