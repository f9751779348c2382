"""The engine asks its provider for one layer after the other, and says which will be next."""

import pytest
import torch

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.weights import ResidentWeights, acquired
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of

LAYERS = 3


class Recorded(ResidentWeights):
    """Notes what is asked of it."""

    def __init__(self, linears, dtype):
        super().__init__(linears, dtype)
        self.calls = []

    def prefetch(self, layer):
        self.calls.append(("prefetch", layer))

    def acquire(self, layer, *, again=False):
        self.calls.append(("again" if again else "acquire", layer))
        return super().acquire(layer, again=again)

    def release(self, layer):
        self.calls.append(("release", layer))
        super().release(layer)


class OnHost(Recorded):
    """Stands for weights that are elsewhere: a layer's bytes are there while it is acquired."""

    def __init__(self, linears, dtype):
        super().__init__(linears, dtype)
        self.away = {m: m.quantized.codes.clone() for ms in linears for m in ms}
        for linear, codes in self.away.items():
            linear.quantized.codes.zero_()
            assert codes.any()

    def acquire(self, layer, *, again=False):
        for linear in self._linears[layer]:
            linear.quantized.codes.copy_(self.away[linear])
        return super().acquire(layer, again=again)

    def release(self, layer):
        super().release(layer)
        for linear in self._linears[layer]:
            linear.quantized.codes.zero_()


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
    forward = [("acquire", 0), ("prefetch", 1), ("release", 0), ("acquire", 1), ("prefetch", 2)]
    forward += [("release", 1), ("acquire", 2), ("release", 2)]
    backward = [("again", 2), ("prefetch", 1), ("release", 2), ("acquire", 1), ("prefetch", 0)]
    backward += [("release", 1), ("acquire", 0), ("release", 0)]
    assert engine.weights.calls == forward + backward


@pytest.mark.parametrize("saved", range(LAYERS + 1))
def test_weights_that_are_there_only_while_acquired_train_the_same(saved):
    loss, wanted = stepped(made(ResidentWeights), saved)
    got, found = stepped(made(OnHost), saved)
    assert torch.equal(got, loss)
    assert all(gradient.any() for gradient in wanted.values())
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


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
