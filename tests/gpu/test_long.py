"""Long parts on a GPU: by tiles, with the kernels for long documents, and inputs on the host."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from halfbyte.engine.buckets import Buckets
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import lengths_of
from halfbyte.layers.long_attention import name_of
from halfbyte.linear import sequence_tiles
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import gradients, model_of
from tests.gpu.test_engine import examples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = dict(
    vocab_size=120,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=16384,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen3": Qwen3Config(**SIZES)}
LENGTHS = {"one": [[6144]], "documents": [[3001, 40, 7], [2500, 300]]}
POLICIES = {
    "recomputed": ActivationPolicy(),
    "offloaded": ActivationPolicy(0, 2),
    "checkpointed": ActivationPolicy(0, 2, 2),
    "every second": ActivationPolicy(0, 2, every=2),
}


def stepped(family, lengths, policy, dtype=torch.bfloat16):
    model = model_of(CONFIGS[family], dtype=dtype).to("cuda")
    engine = LayerEngine(model, fuse=True)
    batches = examples(lengths)
    engine.buckets = Buckets.of([lengths_of(batches)], 512)
    loss = engine.step(batches, 50.0, policy)
    return float(loss), gradients(model)


def error(found, exact):
    squares = sum((found[n] - exact[n]).norm() ** 2 for n in exact)
    return float((squares / sum(g.norm() ** 2 for g in exact.values())) ** 0.5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_tiles_are_as_exact_as_the_whole(family, lengths, monkeypatch):
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 1 << 30)
    _, exact = stepped(family, lengths, ActivationPolicy(), torch.float32)
    loss, whole = stepped(family, lengths, ActivationPolicy())
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 4096)
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 2048)
    limit = 1.2 * error(whole, exact) + 1e-3
    for name, policy in POLICIES.items():
        got, found = stepped(family, lengths, policy)
        assert got == pytest.approx(loss, rel=2e-3), name
        assert error(found, exact) <= limit, (name, error(found, exact), limit)


def test_hopper_has_cudnns_attention():
    assert torch.cuda.get_device_capability() != (9, 0) or (
        name_of(torch.device("cuda", 0), torch.bfloat16, 128) == "cuDNN"
    )
