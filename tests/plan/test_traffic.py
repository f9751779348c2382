"""Predicted traffic is that of the engine, and of the formulas."""

from dataclasses import replace

import pytest

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.linear.layer_store import HostLayers
from halfbyte.linear.layer_stream import stream_of
from halfbyte.plan.ledger import Run
from halfbyte.plan.model_shape import shape_of_known
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.traffic import Traffic, traffic
from tests.engine.test_layerwise import FAMILIES, batches_of, model_of

SEVEN = shape_of_known("llama2-7b")
STEP = Run(batch=4, length=2048, optimizer="adamw_8bit", embedding_on_host=True)
GRADIENTS = 4 * 39_976_960
PACKED = 202_375_168 * 4.127 / 8  # of a layer
HEAD = 2 * 32000 * 4096


def test_one_gpu_with_its_weights_moves_nothing():
    assert traffic(SEVEN, STEP) == Traffic(0, 0, 0)


def test_gradients_go_around_a_ring():
    assert traffic(SEVEN, STEP, 2) == Traffic(GRADIENTS, 0, 0)
    assert traffic(SEVEN, STEP, 8) == Traffic(2 * GRADIENTS * 7 // 8, 0, 0)


@pytest.mark.parametrize("gpus", [2, 4])
def test_divided_layers_come_from_the_other_gpus(gpus):
    run = replace(STEP, waits="gpus", shards=gpus, policy=ActivationPolicy(streamed=32))
    found = traffic(SEVEN, run, gpus)
    others = (gpus - 1) / gpus
    expected = others * (63 * PACKED + 4 * GRADIENTS)  # gradients, then parameters
    assert found.between_gpus == pytest.approx(expected, rel=0.01)
    assert found.to_host == pytest.approx(82e6 / gpus, rel=0.02)  # optimizer state
    assert found.to_gpu == found.to_host + HEAD
    on_host = traffic(SEVEN, replace(run, waits="host"), gpus)
    assert on_host.to_gpu == pytest.approx(found.to_gpu + 62 * PACKED, rel=0.01)
    assert on_host.between_gpus == pytest.approx(others * 4 * GRADIENTS, rel=1e-6)


def test_every_part_fetches_layers_and_inputs():
    policy = ActivationPolicy(offloaded=31, streamed=32)
    one = traffic(SEVEN, replace(STEP, waits="host", policy=policy))
    assert one.to_host == 31 * 8192 * 4096 * 2
    assert one.to_gpu == pytest.approx(one.to_host + 62 * PACKED + HEAD, rel=0.001)
    several = replace(STEP, micro_batches=3, waits="host", policy=policy)
    assert traffic(SEVEN, several) == Traffic(0, 3 * one.to_gpu, 3 * one.to_host)


def test_the_engine_copies_as_many_layers():
    model = model_of(FAMILIES["llama"], store=HostLayers)
    stream = stream_of(model)
    stream.stream_all_but(())
    engine = LayerEngine(model, fuse=True)
    stream.forget()  # of a look at what the layers hold
    before = stream.copied_bytes
    engine.step(batches_of([(2, 9)]), 20.0, ActivationPolicy())
    layers = len(stream.layers)
    assert stream.copied_bytes - before == (2 * layers - stream.slots) * stream.layers[0].nbytes
