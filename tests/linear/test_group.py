"""Linears that share their input: one product when they do, and no harm when they do not."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.group import LinearGroup, OpenLayer
from tests.linear.test_frozen import Update, layer

SIZES = (7, 3, 3)


def adapted(keep=None, *, missing=()):
    """Three linears over 10 features, each with an adapter of its own but those `missing`."""
    torch.manual_seed(3)
    linears = [layer(out) for out in SIZES]
    for i, (linear, out) in enumerate(zip(linears, SIZES, strict=True)):
        a = torch.randn(2 + i, 10, dtype=torch.float64, requires_grad=True)
        b = torch.randn(out, 2 + i, dtype=torch.float64, requires_grad=True)
        if i not in missing:
            linear.adapter = Update(a, b, 0.5, keep)
    return linears


def run(linears, x, weights=(1.0, 2.0, 3.0)):
    ys = [linear(x) for linear in linears]
    loss = sum(w * (y * y).sum() for w, y in zip(weights, ys, strict=True) if w)
    wanted = [x] + [t for m in linears if m.adapter for t in (m.adapter.a, m.adapter.b)]
    return ys, torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.fixture
def products(monkeypatch):
    """How many products were made, each of however many linears."""
    made = []
    original = LinearGroup._products

    def counted(self, x, **read):
        made.append(len(self.members))
        return original(self, x, **read)

    monkeypatch.setattr(LinearGroup, "_products", counted)
    return made


@pytest.mark.parametrize("missing", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("dropped", [True, False])
def test_together_they_give_what_they_give_alone(missing, dropped, products):
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    keep = (torch.rand(2, 5, 10) > 0.3).double() / 0.7 if dropped else None
    alone, alone_gradients = run(adapted(keep, missing=missing), x)
    assert products == [1, 1, 1]
    together = adapted(keep, missing=missing)
    LinearGroup(together)
    products.clear()
    ys, gradients = run(together, x)
    assert products == [3]
    for got, wanted in zip(ys, alone, strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(gradients, alone_gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_gradients_in_float64():
    linears = adapted()
    LinearGroup(linears)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    factors = [t for m in linears for t in (m.adapter.a, m.adapter.b)]
    assert torch.autograd.gradcheck(lambda x, *_: tuple(m(x) for m in linears), (x, *factors))


def test_an_output_that_is_not_used_has_no_part_in_the_gradients():
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    _, wanted = run(adapted(), x, weights=(1.0, 0.0, 3.0))
    linears = adapted()
    LinearGroup(linears)
    _, got = run(linears, x, weights=(1.0, 0.0, 3.0))
    for one, other in zip(got, wanted, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other)


def test_another_input_is_another_product(products):
    linears = adapted()
    LinearGroup(linears)
    x = torch.randn(5, 10, dtype=torch.float64)
    first = [linear(x) for linear in linears]
    again = [linear(x.clone()) for linear in linears]  # equal, but not the same
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert products == [3, 3, 3, 3]


def test_an_input_that_was_changed_in_place_is_not_the_same(products):
    linears = adapted()
    LinearGroup(linears)
    x = torch.randn(5, 10, dtype=torch.float64)
    [linear(x) for linear in linears]
    linears[0](x)
    x.add_(1.0)
    expected = adapted()[1](x)
    assert torch.equal(linears[1](x), expected)


def test_outputs_without_gradients_are_not_given_where_gradients_are_wanted():
    linears = adapted()
    LinearGroup(linears)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    [linear(x) for linear in linears]
    with torch.no_grad():
        linears[0](x)
    assert linears[1](x).requires_grad


def test_a_set_whose_first_inputs_differ_is_dissolved(products):
    linears = adapted()
    LinearGroup(linears)
    inputs = [torch.randn(5, 10, dtype=torch.float64) for _ in linears]
    ys = [linear(x) for linear, x in zip(linears, inputs, strict=True)]
    expected = [linear(x) for linear, x in zip(adapted(), inputs, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))
    products.clear()
    [linear(x) for linear, x in zip(linears, inputs, strict=True)]
    assert products == [1, 1, 1]


def test_a_run_that_was_broken_off_dissolves_no_set(products):
    linears = adapted()
    group = LinearGroup(linears)
    linears[0](torch.randn(4, 10, dtype=torch.float64))  # and the others are never called
    group.forget()
    products.clear()
    run(linears, torch.randn(4, 10, dtype=torch.float64, requires_grad=True))
    assert products == [3]


def test_nothing_is_held_once_all_have_their_output():
    linears = adapted()
    LinearGroup(linears)
    x = torch.randn(5, 10, dtype=torch.float64)
    ys = [linear(x) for linear in linears]
    gone = [weakref.ref(x), weakref.ref(ys[1])]
    del x, ys
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_linear_belongs_to_one_set():
    one, other = layer(7), layer(3)
    group = LinearGroup([one, other])
    assert isinstance(one, FrozenLinear)
    assert one.group is other.group is group
    assert LinearGroup([one]) is one.group
    assert other.group is group


# --- what a layer has while it is open -----------------------------------------------------------


@pytest.fixture
def narrow_products():
    """Two groups in an open layer, and what x Aᵀ is made of."""
    groups = [LinearGroup([layer(out)]) for out in SIZES[:2]]
    opened = OpenLayer({g.members[0]: None for g in groups}, torch.float32)
    opened.open()
    yield opened, groups, torch.randn(5, 10), SimpleNamespace(a=torch.randn(16, 10))
    opened.close()


def test_what_is_given_back_is_used_once_and_by_its_own_group(narrow_products):
    opened, (one, other), x, cast_adapters = narrow_products
    opened.record()
    p = one.into_a(x, cast_adapters)
    taken = opened.pop()
    assert taken == {one: p}
    opened.restore(taken)
    assert one.has_lora_activation
    assert not other.has_lora_activation
    assert one.into_a(torch.zeros(5, 10), cast_adapters) is p
    assert not one.into_a(torch.zeros(5, 10), cast_adapters).any()


def test_each_part_has_its_own(narrow_products):
    opened, (one, _), x, cast_adapters = narrow_products
    taken = []
    for part in (x, x + 1):
        opened.record()
        one.into_a(part, cast_adapters)
        taken.append(opened.pop())
    opened.restore(taken[0])
    opened.restore(taken[1])  # the first was not asked for
    assert one.into_a(x, cast_adapters) is taken[1][one]
    opened.restore(taken[0])
    opened.restore({})
    assert not one.has_lora_activation


def test_nothing_is_recorded_unasked_and_nothing_of_a_group_with_two_inputs(narrow_products):
    opened, (one, _), x, cast_adapters = narrow_products
    one.into_a(x, cast_adapters)
    assert opened.pop() == {}
    opened.record()
    one.into_a(x, cast_adapters)
    one.into_a(x + 1, cast_adapters)
    assert opened.pop() == {}
    one.into_a(x, cast_adapters)
    assert opened.pop() == {}


def test_a_group_that_is_dissolved_while_it_is_open_leaves_the_weights_to_others():
    linears = adapted()
    together, x = LinearGroup(linears), torch.randn(5, 10)
    cast_adapters = SimpleNamespace(a=torch.randn(16, 10))
    cache = DecodedWeightCache()
    with cache.opened(linears, torch.float64) as opened:
        opened.record()
        together.into_a(x, cast_adapters)
        for linear in linears:  # each with an input of its own
            linear(x.double())
            x = x + 1
        alone = [linear.group for linear in linears]
        assert together not in alone
        assert all(linear.opened(torch.float64) is not None for linear in linears)
        opened.restore(opened.pop())
        assert not any(group.has_lora_activation for group in alone)
    assert cache.decodes == 3
    assert all(group.open_layer is None for group in [together, *alone])


def test_nothing_is_left_of_a_layer_that_is_closed(narrow_products):
    _, (one, other), x, cast_adapters = narrow_products
    linears = [*one.members, *other.members]
    with DecodedWeightCache().opened(linears, torch.float64) as opened:
        assert one.open_layer is other.open_layer is opened
        held = [weakref.ref(linear.opened(torch.float64).data) for linear in linears]
        opened.restore({one: x})
        opened.record()
        other.into_a(x, cast_adapters)
    assert one.open_layer is other.open_layer is None
    assert not one.has_lora_activation
    assert opened.pop() == {}
    assert [ref() for ref in held] == [None, None]


def test_adapters_are_cast_once_while_a_layer_is_open(monkeypatch):
    lora = pytest.importorskip("halfbyte.linear.triton_lora", exc_type=ImportError)
    casts = []
    monkeypatch.setattr(lora, "cast_adapters_of", lambda sets, _: casts.append(len(sets)) or sets)
    linears = [*adapted(missing=(2,)), layer(5)]
    groups = [LinearGroup(linears[:2]), linears[2].group, linears[3].group]
    linears[3].adapter = Update(torch.randn(2, 10), torch.randn(5, 2), 0.5)
    dtype = torch.bfloat16
    assert groups[0].cast_adapters(dtype) is not groups[0].cast_adapters(dtype)
    assert casts == [1, 1]
    for _ in range(2):  # anew each time it is opened: adapters change
        casts.clear()
        with DecodedWeightCache().opened(linears, torch.float32):
            first = groups[0].cast_adapters(dtype)
            assert groups[0].cast_adapters(dtype) is first
            assert groups[2].cast_adapters(dtype) is not first
        assert casts == [2]  # of both groups that have any


@pytest.mark.parametrize("together", [True, False])
def test_outputs_may_be_changed_in_place(together):
    """OLMo and Llama 4 clip queries, keys and values in place."""
    linears = adapted()
    if together:
        LinearGroup(linears)
    x = torch.randn(2, 4, 10, dtype=torch.float64, requires_grad=True)

    def gradients(clamp):
        ys = [clamp(linear(x)) for linear in linears]
        wanted = [x] + [t for m in linears for t in (m.adapter.a, m.adapter.b)]
        return torch.autograd.grad(sum((y * y).sum() for y in ys), wanted)

    in_place = gradients(lambda y: y.clamp_(-0.5, 0.5))
    apart = gradients(lambda y: y.clamp(-0.5, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(in_place, apart, strict=True))
