"""Layers divided among processes: each is put together from parts that others hold."""

import threading
from functools import partial

import pytest
import torch

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import ConfigError
from halfbyte.linear.layer_stream import spread, stream_of
from halfbyte.linear.sharded_layers import ShardedLayers
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of
from tests.engine.test_weights import MIXTURES


class Threads:
    """A group whose processes are threads."""

    def __init__(self, size):
        self.size, self.barrier, self.values = size, threading.Barrier(size), {}

    def of(self, rank):
        class Group:
            def gather_object(_, value):
                self.values[rank] = value
                self.barrier.wait()
                found = [self.values[i] for i in range(self.size)]
                self.barrier.wait()
                return found

        return Group()


def sharded(config, size, connect=True, **options):
    models = []
    for rank in range(size):
        store = partial(ShardedLayers, rank=rank, size=size, place="host")
        models.append(model_of(config, store=store, **options))
    return models, connected(models) if connect else None


def connected(models):
    group, errors = Threads(len(models)), {}

    def connect(rank):
        try:
            stream_of(models[rank]).source.connect(group.of(rank))
        except ConfigError as error:
            errors[rank] = error

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("config", [FAMILIES["qwen3"], MIXTURES["gpt-oss"]], ids=["qwen3", "moe"])
def test_every_process_computes_with_whole_layers(config, size):
    batches = batches_of([(2, 9), (1, 5)])
    alone = model_of(config)
    wanted = LayerEngine(alone, fuse=True).step(batches, 20.0, ActivationPolicy(1))
    true = gradients(alone)
    models, errors = sharded(config, size)
    assert not errors
    for rank, model in enumerate(models):
        stream = stream_of(model)
        stream.stream_all_but(spread(3, rank % 2))
        loss = LayerEngine(model, fuse=True).step(batches, 20.0, ActivationPolicy(1))
        assert torch.equal(loss, wanted)
        found = gradients(model)
        assert all(torch.equal(found[name], value) for name, value in true.items())


def test_a_process_holds_its_part_of_every_layer():
    models, _ = sharded(FAMILIES["llama"], 4)
    stream = stream_of(models[0])
    whole = sum(layer.nbytes for layer in stream.layers)
    for model in models:
        source = stream_of(model).source
        assert whole / 4 <= source.nbytes <= whole / 4 + 256 * len(stream.layers)


def test_parts_that_are_not_what_was_loaded_are_refused():
    models, _ = sharded(FAMILIES["llama"], 2, connect=False)
    source = stream_of(models[1]).source
    source._own.copy_(torch.randint(0, 255, source._own.shape, dtype=torch.uint8))
    group = Threads(2)
    real, changed = source._own.clone(), source._own

    class Later:
        """Damages the memory between telling its sum and having it read."""

        def __init__(self, inner):
            self.inner = inner

        def gather_object(self, value):
            if isinstance(value, dict):
                changed[7] = real[7] ^ 1
            return self.inner.gather_object(value)

    errors = {}

    def connect(rank, given):
        with pytest.raises(ConfigError, match=r"rank 1 is not what it holds.*--weights host") as e:
            stream_of(models[rank]).source.connect(given)
        errors[rank] = str(e.value)

    threads = [
        threading.Thread(target=connect, args=(0, group.of(0))),
        threading.Thread(target=connect, args=(1, Later(group.of(1)))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(errors) == {0, 1}
