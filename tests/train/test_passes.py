"""Which shapes become CUDA graphs, and what is not made twice.

What a graph computes is tested on a GPU.
"""

import os

import pytest
import torch

from halfbyte.lora import adapter_parameters
from halfbyte.model import documents
from halfbyte.model.elementwise import plain_rotary
from halfbyte.model.layer import FusedLayer
from halfbyte.nf4 import shared
from halfbyte.nf4.shared import ThinProducts
from halfbyte.plan.ledger import Holding, Run
from halfbyte.plan.shape import shape_of_config
from halfbyte.train import passes
from halfbyte.train.engine import LayerEngine
from halfbyte.train.footprint import footprint
from halfbyte.train.passes import CapturedPasses
from tests.train.test_engine import FAMILIES, batches_of, gradients, model_of


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(passes, "MOST_GRAPHS", 2)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    made = CapturedPasses(None, [parameter])

    def capture(key):
        held = passes._Captured([], (), [], [parameter.grad], None, None)
        made._captured[key] = held

    return made, parameter, capture


def test_a_shape_is_captured_when_it_comes_again(captured):
    made, _, capture = captured
    assert not made.wanted("a")
    assert made.wanted("a")
    capture("a")
    assert made.wanted("a")
    assert not made.wanted("b")
    assert made.wanted("b")


def test_there_are_so_many_graphs_and_no_more(captured):
    made, _, capture = captured
    for key in "ab":
        made.wanted(key)
        capture(key)
    assert not made.wanted("c")
    assert not made.full
    assert not made.wanted("c")
    assert made.full
    assert made.wanted("a")


def test_a_graph_that_adds_to_gradients_nobody_sees_is_dropped(captured):
    made, parameter, capture = captured
    made.wanted("a")
    capture("a")
    parameter.grad = torch.zeros(2)
    assert made.wanted("a")
    assert "a" not in made._captured


def test_that_others_are_launched_is_told_once(captured, monkeypatch):
    made, _, capture = captured
    engine = LayerEngine(model_of(FAMILIES["llama"]), fuse=True)
    engine._graphs = made
    for key in "ab":
        capture(key)
    _, passages = engine.enter(batches_of([(2, 9)]))
    for _ in range(4):
        assert not engine._captures("c", passages)
    (note,) = engine.notes
    assert "others are launched" in note


# --- x Aᵀ of layers that are run again -----------------------------------------------------------

SETS, LAYERS = 4, 3
PARTS, POSITIONS = batches_of([(2, 17), (1, 9)]), (2 * 17, 9)


def forward(x, weights, p, shadow, outputs, turn):
    """gpu_products.py by torch: its kernels, interpreted, take seconds a step."""
    adapters = zip(p.split(shadow.rank, 1), shadow.b.split(outputs), strict=True)
    ys = [x @ weight.t() for weight in weights]
    return torch.cat([y + own @ b.t() for y, (own, b) in zip(ys, adapters, strict=True)], 1)


def backward(dys, weights, g, shadow):
    return g @ shadow.a + sum(dy @ weight for dy, weight in zip(dys, weights, strict=True))


def rotary(q, k, cos, sin, *, backward=False):
    """model/gpu.py's by torch, for the same reason."""
    ones = [plain_rotary(x, cos, -sin if backward else sin).to(x.dtype) for x in (q, k)]
    if not backward:
        ones = [x.detach().copy_(one) for x, one in zip((q, k), ones, strict=True)]
    return tuple(ones)


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
    gpu_adapters = pytest.importorskip("halfbyte.nf4.gpu_adapters", exc_type=ImportError)
    gpu_gated = pytest.importorskip("halfbyte.nf4.gpu_gated", exc_type=ImportError)
    gpu = pytest.importorskip("halfbyte.model.gpu", exc_type=ImportError)
    for module in (gpu_adapters, gpu_gated):
        monkeypatch.setattr(module, "is_hopper", lambda _: False)
    monkeypatch.setattr(gpu, "rotary", rotary)
    monkeypatch.setattr(torch, "mm", mm)
    gpu_products = pytest.importorskip("halfbyte.nf4.gpu_products", exc_type=ImportError)
    monkeypatch.setattr(gpu_products, "forward", forward)
    monkeypatch.setattr(gpu_products, "backward", backward)
    monkeypatch.setattr(shared, "_for_kernels", lambda _: True)
    return made


@pytest.fixture
def engine(products):
    return LayerEngine(model_of(FAMILIES["llama"], dtype=torch.float16), fuse=True)


class Drawer(dict):
    """A shelf without a card."""

    put = dict.__setitem__
    take = dict.pop

    def fetch(self, layer):
        pass

    def settle(self):
        pass


def stepped(engine, saved=0, parts=PARTS, offloaded=0, notes=False):
    loss = engine.step(parts, 20.0, saved_layers=saved, offloaded_layers=offloaded, notes=notes)
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
            patch.setattr(ThinProducts, "note", lambda self: None)
            return stepped(engine, *args)

    return step


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("saved", range(LAYERS + 1))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_noted_is_not_made_again_and_no_bit_changes(family, saved, dtype, monkeypatch):
    monkeypatch.setattr(passes, "Shelf", Drawer)
    runs, attention = [], documents.causal_attention
    counted = lambda *a, **k: (runs.append(1), attention(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(documents, "causal_attention", counted)
    engine = LayerEngine(model_of(FAMILIES[family], dtype=dtype), fuse=True)
    wanted = stepped(engine, saved)
    assert len(runs) == len(PARTS) * (2 * LAYERS - saved)
    runs.clear()
    assert same(stepped(engine, saved, PARTS, 2, True), wanted)
    assert len(runs) == len(PARTS) * (LAYERS + max(0, LAYERS - saved - 2))


@pytest.mark.parametrize("offloaded", [0, 2])
@pytest.mark.parametrize("saved", range(LAYERS + 1))
def test_each_is_made_once_and_no_bit_changes(
    engine, products, forgetful, monkeypatch, saved, offloaded
):
    monkeypatch.setattr(passes, "Shelf", Drawer)
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
    passages = engine.enter(PARTS)[1]
    hidden = engine.passes.down(passages, passes.Keeping(0))
    products.clear()
    assert torch.equal(engine.loss(PARTS), loss)
    assert len(products) == SETS * len(PARTS) * LAYERS
    products.clear()
    engine.passes.up(passages, [torch.ones_like(x) for x in hidden])
    assert not products
    gradients(engine.model)
    assert same(stepped(engine), wanted)


# Of twelve runs: the first layer's second, the next one's first, and in the pass up likewise.
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
    sets = {linear.shared for linears in engine.linears for linear in linears}
    assert not any(shared.remembered is not None or shared._noted for shared in sets)
    for parameter in adapter_parameters(engine.model).values():
        parameter.grad = None
    assert same(stepped(engine), wanted)


def test_they_are_measured_and_planned_for(engine, monkeypatch):
    monkeypatch.setattr("halfbyte.train.footprint._peak", lambda run: (run(), 1)[1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    layer = Run(Holding(itemsize=2), rank=4).layer(shape_of_config(FAMILIES["llama"], "tiny"))
    assert footprint(engine, PARTS).thin == layer.thin * sum(POSITIONS) == 2 * 7 * 16 * 43
