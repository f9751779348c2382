"""Which shapes become CUDA graphs, when they are played, and what is not made twice.

What a graph computes is tested on a GPU.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from halfbyte.engine import forward_backward
from halfbyte.engine.buckets import Buckets
from halfbyte.engine.cuda_graphs import CapturedPasses
from halfbyte.engine.forward_backward import LayerInput
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_profile import measured_cost
from halfbyte.engine.packing import Batch
from halfbyte.layers import attention
from halfbyte.layers.decoder_layer import FusedLayer
from halfbyte.layers.elementwise import plain_rotary, plain_swiglu_backward
from halfbyte.linear import group
from halfbyte.linear.group import OpenLayer
from halfbyte.linear.lora import adapter_parameters
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import Run
from halfbyte.plan.model_shape import shape_of_config
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.runtime import device as devices
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of


@pytest.fixture
def made(monkeypatch):
    """Graphs of shape "a", over nothing, that add to the gradient of one parameter."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    made = CapturedPasses(None, [parameter])
    made._captured["a"], made._gradients = None, [parameter.grad]
    return made, parameter


def test_a_graph_that_adds_to_gradients_nobody_sees_is_not_used(made):
    graphs, parameter = made
    assert graphs.has("a")
    assert not graphs.has("b")
    parameter.grad.add_(1.0)
    assert graphs.has("a")
    parameter.grad = torch.zeros(2)
    assert not graphs.has("a")


def test_parts_are_copied_to_where_the_largest_was(made):
    graphs, _ = made
    run = object()
    places = []
    for tokens in (64, 16, 40):
        layer_input = LayerInput(torch.rand(1, tokens, 8), (torch.rand(tokens, 2),), run)
        held = graphs.to_static(layer_input)
        assert held.run is run
        assert torch.equal(held.x, layer_input.x)
        assert torch.equal(held.layer_args[0], layer_input.layer_args[0])
        assert held.x.data_ptr() != layer_input.x.data_ptr()
        places.append((held.x.data_ptr(), held.layer_args[0].data_ptr()))
    assert len(set(places)) == 1
    graphs.forget()
    assert not len(graphs)
    assert not graphs._static


class Recorded:
    """Stands for `CapturedPasses`: runs what would be captured, and says what it was asked for.

    ``fails`` has the error that capturing a shape ends with, by its number of tokens.
    """

    def __init__(self, engine, fails=()):
        self.passes, self.policy = engine.passes, None
        self.captured, self.played, self.fails = {}, [], dict(fails)

    def __len__(self):
        return len(self.captured)

    @property
    def nbytes(self):
        return len(self.captured)

    def forget(self):
        self.captured = {}

    def to_static(self, layer_input):
        return layer_input

    def capture(self, shape, held, policy):
        if shape.numel in self.fails:
            raise self.fails[shape.numel]
        self.captured[shape], self.policy = held, policy

    def has(self, shape):
        return shape in self.captured

    def forward(self, shape, layer_input):
        self.played.append(shape)
        held = self.captured[shape]
        assert held.x.shape == layer_input.x.shape
        self.layer_input = layer_input
        (y,) = self.passes.forward([layer_input], self.policy)
        return y

    def backward(self, shape, grad):
        self.passes.backward([self.layer_input], [grad])


def zero_gradients(model):
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)


# Two parts of 128 tokens, one of 256.
RUN = [[60, 50], [70, 60, 50]]


@pytest.fixture
def packing(monkeypatch):
    """An engine that packs, with the shapes of `RUN`, and a head that is trained."""
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    model = model_of(FAMILIES["llama"], modules_to_save=("lm_head",))
    model.get_input_embeddings().weight.data[0] = 1.0  # of what fills up; it was padding's, zero
    engine = LayerEngine(model, fuse=True)
    engine.buckets = Buckets.of(RUN, width=10**9)
    assert [shape.numel for shape in engine.buckets.shapes] == [256, 128]
    engine._graphs = Recorded(engine)
    zero_gradients(model)
    return engine


def test_all_shapes_of_a_run_are_captured_ahead_the_largest_first_and_played(packing):
    engine, graphs, reports = packing, packing._graphs, []
    engine.capture(ActivationPolicy(1), lambda *args: reports.append(args))
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert list(graphs.captured) == list(engine.buckets.shapes)
    # What was run to compile everything has left no gradient, not even the head's.
    assert not any(p.grad.any() for p in adapter_parameters(engine.model).values())
    for lengths in RUN:
        batch = batches_of([(1, sum(lengths))])[0]
        ids, labels = batch.input_ids[0].split(lengths), batch.labels[0].split(lengths)
        batches = [Batch(i[None], k[None]) for i, k in zip(ids, labels, strict=True)]
        got = engine.step(batches, 20.0, ActivationPolicy(1))
        found = gradients(engine.model)
        assert graphs.played.pop().numel == (128 if len(lengths) == 2 else 256)
        assert not graphs.played
        engine._graphs, held = None, engine._graphs
        wanted = engine.step(batches, 20.0, ActivationPolicy(1))
        assert torch.equal(got, wanted)
        true = gradients(engine.model)
        assert all(torch.equal(found[name], one) for name, one in true.items())
        engine._graphs = held


def test_a_part_of_a_shape_that_was_not_captured_is_launched(packing):
    packing.capture(ActivationPolicy())
    packing.step(batches_of([(1, 300)]), 20.0, ActivationPolicy())
    assert not packing._graphs.played
    assert all(p.grad.any() for p in adapter_parameters(packing.model).values())


@pytest.mark.parametrize("shape", [256, 128])
def test_where_one_cannot_be_captured_none_is_used_and_that_is_told(packing, shape):
    graphs = packing._graphs
    graphs.fails = {shape: RuntimeError("operation not permitted\nwhen capturing")}
    packing.capture(ActivationPolicy(1))
    assert not packing.captures
    assert not graphs.captured
    assert packing.why_no_graphs == "capturing one failed: operation not permitted"
    (note,) = packing.messages
    assert note.endswith(packing.why_no_graphs)
    assert not any(p.grad.any() for p in adapter_parameters(packing.model).values())


def test_memory_that_runs_out_in_capturing_is_for_the_trainer_to_deal_with(packing):
    packing._graphs.fails = {128: torch.OutOfMemoryError("CUDA out of memory")}
    with pytest.raises(torch.OutOfMemoryError):
        packing.capture(ActivationPolicy(1))
    assert packing.captures
    assert not packing.messages
    assert not any(p.grad.any() for p in adapter_parameters(packing.model).values())


# --- x Aᵀ of layers that are recomputed -----------------------------------------------------------

SETS, LAYERS = 4, 3
PARTS, POSITIONS = batches_of([(2, 17), (1, 9)]), (2 * 17, 9)


def forward(x, weights, p, cast_adapters, outputs, turn):
    """triton_matmul.py by torch: its kernels, interpreted, take seconds a step.

    The same holds for those below. Both of the steps that are compared are made with them.
    """
    adapters = zip(p.split(cast_adapters.rank, 1), cast_adapters.b.split(outputs), strict=True)
    ys = [x @ weight.t() for weight in weights]
    return torch.cat([y + own @ b.t() for y, (own, b) in zip(ys, adapters, strict=True)], 1)


def backward(dys, weights, g, cast_adapters):
    return g @ cast_adapters.a + sum(dy @ weight for dy, weight in zip(dys, weights, strict=True))


def rotary(q, k, cos, sin, *, backward=False):
    """layers/triton_elementwise.py's by torch, as those that follow."""
    ones = [plain_rotary(x, cos, -sin if backward else sin).to(x.dtype) for x in (q, k)]
    if not backward:
        ones = [x.detach().copy_(one) for x, one in zip((q, k), ones, strict=True)]
    return tuple(ones)


def swiglu(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(dy, gate, up, *, remake=False):
    made = swiglu(gate, up)
    gradients = plain_swiglu_backward(dy, gate, up)
    for x, gradient in zip((gate, up), gradients, strict=True):
        x.copy_(gradient)
    if remake:
        dy.copy_(made)
    return gate, up


def cast_adapters_of(sets, dtype):
    """linear/triton_lora.py's by torch."""
    from halfbyte.linear import triton_lora  # it imports triton

    made = []
    for one in sets:
        rank = triton_lora.rank_of(one.pairs)
        a = torch.zeros(len(one.pairs), rank, one.inputs, dtype=dtype)
        bs = [torch.zeros(out, rank, dtype=dtype) for out in one.outputs]
        for pair, own_a, own_b in zip(one.pairs, a, bs, strict=True):
            if pair is not None:
                own_a[: len(pair[0])] = pair[0]
                own_b[:, : len(pair[0])] = pair[1] * pair[2]
        made.append(triton_lora.CastAdapters(a.flatten(0, 1), torch.cat(bs), rank))
    return made


@pytest.fixture
def products(monkeypatch):
    """The shape of each x Aᵀ, while linears are multiplied with as on a GPU."""
    made = []
    original = torch.mm

    def mm(left, right, *, out_dtype=None, out=None):
        if out_dtype is not None:  # dA, in a dtype that products on a CPU cannot have
            return original(left.to(out_dtype), right.to(out_dtype))
        if out is None and len(left) in POSITIONS:  # the head's are of supervised ones only
            made.append((len(left), right.shape[1]))
        return original(left, right, out=out)

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here, so tests/gpu/ tests these")
    gpu = pytest.importorskip("halfbyte.layers.triton_elementwise", exc_type=ImportError)
    other = replace(devices.INTERPRETER, capability=(8, 0))
    monkeypatch.setattr(devices, "spec_of", lambda _: other)
    for kernel in (rotary, swiglu, swiglu_backward):
        monkeypatch.setattr(gpu, kernel.__name__, kernel)
    monkeypatch.setattr(torch, "mm", mm)
    triton_matmul = pytest.importorskip("halfbyte.linear.triton_matmul", exc_type=ImportError)
    monkeypatch.setattr(triton_matmul, "forward", forward)
    monkeypatch.setattr(triton_matmul, "backward", backward)
    triton_lora = pytest.importorskip("halfbyte.linear.triton_lora", exc_type=ImportError)
    monkeypatch.setattr(triton_lora, "cast_adapters_of", cast_adapters_of)
    monkeypatch.setattr(group, "_for_kernels", lambda _: True)
    return made


@pytest.fixture
def engine(products):
    return LayerEngine(model_of(FAMILIES["llama"], dtype=torch.float16), fuse=True)


class HostOffloader(dict):
    """Stands for `ActivationOffloader` where there is no GPU."""

    get = dict.pop

    def offload(self, layer, parts, *, beside):
        self[layer] = parts

    def prefetch(self, layer):
        pass

    def wait(self):
        pass


def stepped(engine, saved=0, parts=PARTS, offloaded=0, checkpoints=0):
    loss = engine.step(parts, 20.0, ActivationPolicy(saved, offloaded, checkpoints))
    return loss, gradients(engine.model)


def same(one, other):
    (loss, found), (other_loss, other_found) = one, other
    assert all(gradient.any() for gradient in found.values())
    assert torch.equal(loss, other_loss)
    return all(torch.equal(gradient, other_found[name]) for name, gradient in found.items())


@pytest.fixture
def forgetful(monkeypatch):
    """Return what a step gives that makes all that it needs."""

    def step(engine, *args):
        with monkeypatch.context() as patch:
            patch.setattr(OpenLayer, "record", lambda self: None)
            return stepped(engine, *args)

    return step


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("saved", range(LAYERS + 1))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_noted_is_not_made_again_and_no_bit_changes(family, saved, dtype, monkeypatch):
    monkeypatch.setattr(forward_backward, "ActivationOffloader", HostOffloader)
    runs, attend = [], attention.causal_attention
    counted = lambda *a, **k: (runs.append(1), attend(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(attention, "causal_attention", counted)
    engine = LayerEngine(model_of(FAMILIES[family], dtype=dtype), fuse=True)
    wanted = stepped(engine, saved)
    assert len(runs) == len(PARTS) * (2 * LAYERS - saved)
    for checkpoints in (2, 1):
        runs.clear()
        assert same(stepped(engine, saved, PARTS, 2, checkpoints), wanted)
        # Of two offloaded layers, the second has the only checkpoint, if it is not saved.
        not_again = min(LAYERS - saved, 2) if checkpoints == 2 else saved <= LAYERS - 2
        assert len(runs) == len(PARTS) * (2 * LAYERS - saved - not_again)


@pytest.mark.parametrize("offloaded", [0, 2])
@pytest.mark.parametrize("saved", range(LAYERS + 1))
def test_each_is_made_once_and_no_bit_changes(
    engine, products, forgetful, monkeypatch, saved, offloaded
):
    monkeypatch.setattr(forward_backward, "ActivationOffloader", HostOffloader)
    wanted = forgetful(engine, saved)
    assert len(products) == SETS * len(PARTS) * (2 * LAYERS - saved)
    products.clear()
    assert same(stepped(engine, saved, PARTS, offloaded), wanted)
    assert len(products) == SETS * len(PARTS) * LAYERS
    assert {rows for rows, _ in products} == set(POSITIONS)


def test_what_a_step_kept_is_not_of_the_next(engine, forgetful):
    others = batches_of([(1, 9), (2, 17)])
    stepped(engine)
    for _ in range(2):
        for parts in (others, PARTS):
            assert same(stepped(engine, 1, parts), forgetful(engine, 1, parts))
        with torch.no_grad():
            for parameter in adapter_parameters(engine.model).values():
                parameter.mul_(1.5)


def test_a_validation_in_between_notes_nothing_and_is_given_nothing(engine, products, forgetful):
    wanted = forgetful(engine)
    loss = engine.loss(PARTS)
    layer_inputs = engine.embed(engine.make_parts(PARTS))
    hidden = engine.passes.forward(layer_inputs, ActivationPolicy(0))
    products.clear()
    assert torch.equal(engine.loss(PARTS), loss)
    assert len(products) == SETS * len(PARTS) * LAYERS
    products.clear()
    engine.passes.backward(layer_inputs, [torch.ones_like(x) for x in hidden])
    assert not products
    gradients(engine.model)
    assert same(stepped(engine), wanted)


# Of twelve runs: the first layer's second, the next one's first, and in backward likewise.
@pytest.mark.parametrize("fails_at", [2, 3, 8, 9])
def test_a_step_that_was_broken_off_leaves_nothing_behind(engine, forgetful, monkeypatch, fails_at):
    wanted = forgetful(engine)
    runs, run = [], FusedLayer._heads

    def fails(self, *args):
        runs.append(self)
        heads = run(self, *args)  # one set has been called, others have not
        if len(runs) == fails_at:
            raise ZeroDivisionError
        return heads

    with monkeypatch.context() as patch:
        patch.setattr(FusedLayer, "_heads", fails)
        with pytest.raises(ZeroDivisionError):
            stepped(engine)
    sets = {linear.group for linears in engine.linears for linear in linears}
    assert all(group.open_layer is None for group in sets)
    for parameter in adapter_parameters(engine.model).values():
        parameter.grad = None
    assert same(stepped(engine), wanted)


def test_they_are_measured_and_planned_for(engine, monkeypatch):
    monkeypatch.setattr("halfbyte.engine.memory_profile._peak", lambda run: (run(), 1)[1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    layer = Run(Holding(itemsize=2), rank=4).layer(shape_of_config(FAMILIES["llama"], "tiny"))
    cost = measured_cost(engine, engine.make_parts(PARTS))
    assert cost.lora == layer.lora * sum(POSITIONS) == 2 * 7 * 16 * 43
    assert cost.input == 2 * 32 * sum(POSITIONS)
    assert cost.part_input == 2 * 32 * max(POSITIONS)


@pytest.mark.parametrize("saved", [0, 1, 3])
def test_a_rehearsal_of_a_further_shape_saves_no_layer_that_the_run_does_not(monkeypatch, saved):
    engine = LayerEngine(model_of(FAMILIES["llama"]))
    (layer_input,) = engine.embed(engine.make_parts(batches_of([(2, 5)])))
    policies = []
    run = forward_backward.Passes._run

    def seen(self, layer_input, policy):
        policies.append((self.layers, policy.saved))
        run(self, layer_input, policy)

    monkeypatch.setattr(forward_backward.Passes, "_run", seen)
    engine.passes.warm_up(layer_input, ActivationPolicy(saved), whole=False)
    assert sorted(policies) == [(2, 0)] + [(2, min(2, saved))] * (saved > 0)
