"""Weights that wait in host memory or on the disk: the same steps on a GPU, in less memory."""

from functools import partial

import pytest
import torch

from halfbyte.engine.buckets import Buckets
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import lengths_of
from halfbyte.engine.weights import StreamedWeights
from halfbyte.layers.vocabulary import head_to_host
from halfbyte.linear.layer_store import DiskLayers, HostLayers
from halfbyte.linear.layer_stream import stream_of
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, model_of
from tests.engine.test_weights import MIXTURES, Fast
from tests.gpu.test_engine import examples, taken, zero

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = {"llama": FAMILIES["llama"], "qwen3": FAMILIES["qwen3"], "olmoe": MIXTURES["olmoe"]}
POLICIES = [
    ActivationPolicy(),
    ActivationPolicy(2),
    ActivationPolicy.offloading(3),
    ActivationPolicy(0, 2, 2),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["host", "fast", "disk"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("graphs", [False, True])
def test_streamed_weights_give_the_same_gradients(family, where, policy, graphs, tmp_path):
    batches = examples([[70, 33, 8], [64, 5]])
    found = []
    disk = partial(DiskLayers, directory=tmp_path)
    store = {"host": HostLayers, "fast": Fast, "disk": disk}[where]
    for place in (None, store):
        model = model_of(CONFIGS[family], dtype=torch.bfloat16, device="cuda", store=place)
        if place is not None:
            assert head_to_host(model)
        zero(model)
        engine = LayerEngine(model, fuse=True, graphs=graphs)
        engine.buckets = Buckets.of([lengths_of(batches)], 32)
        engine.capture(policy)
        captures = graphs and engine.fused > 0 and (place is None or where != "disk")
        assert (engine.num_graphs > 0) == captures
        steps = []
        for _ in range(2):
            loss = engine.step(batches, 50.0, policy)
            # What is not announced, between steps: the tracker must not trust what graphs left.
            middle = engine.linears[1][0].decode(torch.float32).sum()
            steps.append((loss.clone(), taken(model), middle))
        found.append(steps)
    for (loss, wanted, weight), (got, gradients, middle) in zip(*found, strict=True):
        assert torch.equal(middle, weight)
        assert torch.equal(got, loss)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, wanted[name]), name


def test_slots_are_all_that_is_on_the_gpu():
    before = torch.cuda.memory_allocated()
    model = model_of(FAMILIES["llama"], dtype=torch.bfloat16, device="cuda", store=HostLayers)
    stream = stream_of(model)
    here = torch.cuda.memory_allocated() - before
    others = sum(
        p.nbytes for n, p in model.named_parameters() if "layers." not in n or p.requires_grad
    )
    norms = 2 * 3 * 32 * 2
    assert stream.nbytes == 2 * stream.layers[0].nbytes
    assert here <= stream.nbytes + others + norms + 64 * 512  # torch rounds up to 512 bytes


@pytest.mark.parametrize("call", [2, 5])
def test_memory_that_runs_out_in_a_capture_is_said_and_freed(monkeypatch, call):
    """While copies of weights and inputs are under way on their streams."""
    policy = ActivationPolicy(0, 2, 2)
    batches = examples([[70, 33, 8], [64, 5]])
    model = model_of(CONFIGS["llama"], dtype=torch.bfloat16, device="cuda", store=HostLayers)
    zero(model)
    engine = LayerEngine(model, fuse=True, graphs=True)
    engine.buckets = Buckets.of([lengths_of(batches)], 1024)
    engine.capture(policy)
    engine.forget_graphs()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    acquire, calls = StreamedWeights.acquire, [0]

    def acquired(self, layer, **how):
        opened = acquire(self, layer, **how)
        if torch.cuda.is_current_stream_capturing():
            calls[0] += 1
            if calls[0] == call:
                self.release(layer)
                raise torch.OutOfMemoryError("for a test")
        return opened

    monkeypatch.setattr(StreamedWeights, "acquire", acquired)
    with pytest.raises(torch.OutOfMemoryError, match="for a test"):
        engine.capture(policy)
    assert engine.captures
    engine.passes.forget()
    engine.forget_graphs()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    engine.capture(policy)
    assert engine.num_graphs == 1
    assert engine.step(batches, 50.0, policy) > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", [HostLayers, "disk"])
def test_parts_that_go_through_the_layers_together_give_the_same_gradients(where, policy, tmp_path):
    batches = examples([[70, 33, 8], [64, 5], [40, 40, 31]])
    store = partial(DiskLayers, directory=tmp_path) if where == "disk" else where
    model = model_of(CONFIGS["llama"], dtype=torch.bfloat16, device="cuda", store=store)
    engine = LayerEngine(model, fuse=True, graphs=True)
    engine.buckets = Buckets.of([lengths_of(batches)], 32, 100)
    assert len(engine.make_parts(batches)) > 2
    found = []
    for count in (1, 2, 5):
        engine.parts_together = count
        assert engine.captures == (count == 1 and where != "disk")
        zero(model)
        stream = stream_of(model)
        before = stream.copied_bytes
        loss = engine.step(batches, 50.0, policy)
        found.append((loss.clone(), taken(model), stream.copied_bytes - before))
    (loss, wanted, copied), *others = found
    for got, gradients, bytes_now in others:
        assert torch.equal(got, loss)
        assert bytes_now < copied
        for name, gradient in gradients.items():
            assert torch.equal(gradient, wanted[name]), name
