"""The engine asks its provider for one layer after the other, and says which will be next."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig, OlmoeConfig

from halfbyte.checkpoint.identity import weights_digest
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import plan_memory
from halfbyte.engine.weights import ResidentWeights, StreamedWeights, acquired
from halfbyte.layers.vocabulary import HostHead
from halfbyte.linear.layer_store import DiskLayers, HostLayers
from halfbyte.linear.layer_stream import spread, stream_of
from halfbyte.linear.sharded_layers import ShardedLayers
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.runtime.distributed import ProcessGroup
from halfbyte.train.weight_location import connect
from tests.engine.test_layerwise import FAMILIES, SIZES, batches_of, gradients, model_of

LAYERS = 3


class Recorded(ResidentWeights):
    """Notes what is asked of it."""

    def __init__(self, linears, dtype):
        super().__init__(linears, dtype)
        self.calls = []

    def prefetch(self, layer):
        self.calls.append(("prefetch", layer))

    def acquire(self, layer, *, again=False, forward_only=False):
        word = "again" if again else "forward" if forward_only else "acquire"
        self.calls.append((word, layer))
        return super().acquire(layer, again=again, forward_only=forward_only)

    def release(self, layer):
        self.calls.append(("release", layer))
        super().release(layer)


def made(provider=ResidentWeights):
    engine = LayerEngine(model_of(FAMILIES["llama"]), fuse=True)
    engine.weights = provider(engine.linears, engine.dtype)
    return engine


def stepped(engine, saved):
    loss = engine.step(batches_of([(2, 9), (1, 5)]), 20.0, ActivationPolicy(saved))
    return loss, gradients(engine.model)


@pytest.mark.parametrize("saved", range(LAYERS + 1))
def test_one_layer_is_acquired_at_a_time_and_the_next_is_announced(saved):
    engine = made(Recorded)
    stepped(engine, saved)
    forward = [("forward", 0), ("prefetch", 1), ("release", 0), ("forward", 1), ("prefetch", 2)]
    forward += [("release", 1), ("acquire", 2), ("release", 2)]  # backward uses the last again
    backward = [("again", 2), ("prefetch", 1), ("release", 2), ("acquire", 1), ("prefetch", 0)]
    backward += [("release", 1), ("acquire", 0), ("release", 0)]
    assert engine.weights.calls == forward + backward


MIXTURES = {
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}
STREAMED = {
    "llama": dict(config=FAMILIES["llama"]),
    "llama in 16 bits": dict(config=FAMILIES["llama"], quant="none"),
    "llama with DoRA": dict(config=FAMILIES["llama"], use_dora=True),
    "gemma3": dict(config=FAMILIES["gemma3"]),
    "olmoe": dict(config=MIXTURES["olmoe"]),
    "olmoe in 16 bits": dict(config=MIXTURES["olmoe"], quant="none"),
    "gpt-oss": dict(config=MIXTURES["gpt-oss"]),
}


class Fast(HostLayers):
    """So fast that one layer is enough on the device."""

    slots = 1


Divided = partial(ShardedLayers, rank=0, size=1, place="host")


def on_disk(layers, device):
    return DiskLayers(layers, device, Path(tempfile.gettempdir()))


@pytest.mark.parametrize("case", STREAMED)
@pytest.mark.parametrize(
    ("store", "resident"), [(HostLayers, 0), (Fast, 1), (on_disk, 0), (on_disk, 2)]
)
def test_weights_that_wait_elsewhere_train_the_same(case, store, resident):
    engines = []
    for where in (None, store):
        engine = LayerEngine(model_of(**STREAMED[case], store=where), fuse=True)
        engines.append(engine)
    here, away = engines
    stream = stream_of(away.model)
    assert stream_of(here.model) is None
    assert isinstance(away.weights, StreamedWeights)
    stream.stream_all_but(spread(LAYERS, resident))
    assert len(stream.streamed) == LAYERS - resident
    for saved in range(LAYERS + 1):
        for provider in (here.weights, away.weights):
            provider.forget()
        loss, wanted = stepped(here, saved)
        before = stream.copied_bytes
        got, found = stepped(away, saved)
        assert torch.equal(got, loss)
        assert all(gradient.any() for gradient in wanted.values())
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())
        # Backward begins with the layers that are still there.
        copies = 2 * (LAYERS - resident) - min(stream.slots, LAYERS - resident)
        each = stream.layers[0].nbytes
        assert stream.copied_bytes - before == copies * each


def test_what_does_not_announce_its_layers_reads_the_right_ones():
    config = FAMILIES["llama"]
    here, away = model_of(config), model_of(config, store=HostLayers)
    ids = batches_of([(2, 9)])[0].input_ids
    with torch.no_grad():
        assert torch.equal(here(input_ids=ids).logits, away(input_ids=ids).logits)
    assert weights_digest(here) == weights_digest(away)
    batches = batches_of([(2, 9), (1, 5)])
    for policy in (ActivationPolicy(), ActivationPolicy(LAYERS)):
        wanted = AutogradEngine(here).step(batches, 20.0, policy)
        assert torch.equal(AutogradEngine(away).step(batches, 20.0, policy), wanted)
        found = gradients(away)
        assert all(torch.equal(found[name], g) for name, g in gradients(here).items())


def test_slots_take_the_memory_of_two_layers_and_resident_ones_their_own():
    model = model_of(FAMILIES["llama"], store=HostLayers)
    stream = stream_of(model)
    each = stream.layers[0].nbytes
    assert stream.nbytes == 2 * each
    stream.stream_all_but([1])
    assert stream.nbytes == 3 * each
    stream.stream_all_but([0, 1])
    assert stream.nbytes == 3 * each
    stream.stream_all_but([0, 1, 2])
    assert stream.nbytes == 3 * each
    stream.stream_all_but([])
    assert stream.nbytes == 2 * each


def test_one_slot_is_enough_if_a_layer_is_decoded_as_a_whole():
    whole = stream_of(model_of(FAMILIES["llama"], store=Fast))
    assert whole.slots == 1
    assert whole.nbytes == whole.layers[0].nbytes
    assert stream_of(model_of(FAMILIES["llama"], quant="none", store=Fast)).slots == 2
    assert stream_of(model_of(MIXTURES["olmoe"], store=Fast)).slots == 2


@pytest.mark.parametrize("policy", [ActivationPolicy(), ActivationPolicy(2)])
def test_parts_that_go_through_the_layers_together_copy_them_once(policy, monkeypatch):
    """As on a GPU, where parts go through the layers one after the other otherwise."""
    monkeypatch.setattr(LayerEngine, "_runs_apart", lambda self, parts: True)
    model = model_of(FAMILIES["llama"], store=HostLayers)
    engine, stream = LayerEngine(model, fuse=True), stream_of(model)
    batches = batches_of([(2, 9), (1, 5), (3, 4), (1, 7), (2, 6)])
    found = []
    for count in (1, 2, 5):
        engine.parts_together = count
        before = stream.copied_bytes
        loss = engine.step(batches, 20.0, policy)
        found.append((loss, gradients(model), stream.copied_bytes - before))
    (loss, wanted, copied), *others = found
    for (got, given, bytes_now), times in zip(others, (5 / 3, 5), strict=True):
        assert torch.equal(got, loss)
        assert bytes_now < 1.2 * copied / times  # slots keep what they had from the pass before
        for name, gradient in wanted.items():
            assert torch.equal(given[name], gradient), name


def test_a_head_in_host_memory_gives_the_same():
    model = model_of(FAMILIES["llama"])
    loss, wanted = stepped(LayerEngine(model, fuse=True), 1)
    ids = batches_of([(2, 9)])[0].input_ids
    logits = model(input_ids=ids).logits
    model.set_output_embeddings(HostHead(model.get_output_embeddings().weight))
    got, found = stepped(LayerEngine(model, fuse=True), 1)
    assert torch.equal(got, loss)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())
    assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize(("store", "streamed"), [(HostLayers, 0), (Divided, LAYERS)])
@pytest.mark.parametrize("budget", [None, 10**10])
def test_layers_stay_where_there_is_room_unless_they_were_to_be_divided(store, streamed, budget):
    model = model_of(FAMILIES["llama"], store=store)
    connect(model, ProcessGroup())
    engine = LayerEngine(model, fuse=True)
    plan = plan_memory(engine, [[(2, 9)]], "auto", budget, "cpu")
    assert plan.policy.streamed == streamed
    assert ("wait elsewhere until they are needed" in plan.summary()) == (streamed > 0)
    assert ("there is room for the weights of all" in plan.summary()) == (streamed == 0)


def test_resident_layers_are_spread():
    assert spread(8, 0) == []
    assert spread(8, 1) == [4]
    assert spread(8, 2) == [2, 6]
    assert spread(4, 4) == [0, 1, 2, 3]
    assert all(len(set(spread(80, n))) == n for n in range(81))


def test_a_layer_is_released_whatever_happens():
    engine = made(Recorded)
    with pytest.raises(RuntimeError, match="in between"), acquired(engine.weights, 1):
        raise RuntimeError("in between")
    assert engine.weights.calls == [("acquire", 1), ("release", 1)]
    assert all(linear.opened(engine.dtype) is None for linear in engine.linears[1])
    with acquired(engine.weights, 1):
        assert all(linear.opened(engine.dtype) is not None for linear in engine.linears[1])


def test_layers_that_are_kept_are_decoded_once():
    engine = made(ResidentWeights)
    before = engine.weights.nbytes
    engine.weights.keep(2)
    assert engine.weights.nbytes > before
    decodes = engine.weights.decodes
    for layer in (1, 2, 1):
        with acquired(engine.weights, layer):
            pass
    assert engine.weights.decodes == decodes
    with acquired(engine.weights, 0):
        pass
    assert engine.weights.decodes == decodes + len(engine.linears[0])
