"""Layouts of decoded weights: the one there is, and others, through the same interface."""

import pytest
import torch

from halfbyte.linear import group as groups
from halfbyte.linear.decoded_cache import DecodedWeightCache
from halfbyte.linear.decoded_weight import DENSE, DecodedWeight, WeightLayout
from halfbyte.linear.group import LinearGroup
from halfbyte.quant import dequantize
from tests.linear.test_frozen import Update, layer


class Rows(WeightLayout):
    """Eight bits a number and a scale for each row, exact but for the rounding of the numbers."""

    def __init__(self, kind, largest):
        self.kind, self.largest = kind, largest

    def data_dtype(self, dtype):
        return self.kind

    def decode(self, packed, dtype, outs=None, *, forward_only=False):
        made = [self.from_dense(dequantize(q, dtype)) for q in packed]
        if outs is None:
            return made
        return [
            DecodedWeight(out.copy_(w.data), w.scale, self)
            for out, w in zip(outs, made, strict=True)
        ]

    def from_dense(self, weight):
        scale = weight.abs().amax(1, keepdim=True) / self.largest
        data = weight / scale
        return DecodedWeight(
            (data if self.kind.is_floating_point else data.round()).to(self.kind), scale, self
        )

    def product(self, x, weight):
        return x @ weight.data.to(x.dtype).t() * weight.scale.t()

    def input_gradient(self, dy, weight, dx=None):
        made = (dy * weight.scale.t()) @ weight.data.to(dy.dtype)
        return made if dx is None else dx.add_(made)

    def rounding(self, weight):
        """Return by how much each number of W may be off."""
        largest = weight.abs().amax(1, keepdim=True)
        if not self.kind.is_floating_point:
            return largest / self.largest / 2
        info = torch.finfo(self.kind)
        return weight.abs() * info.eps / 2 + largest / self.largest * info.smallest_normal


LAYOUTS = {"int8": Rows(torch.int8, 127), "e4m3": Rows(torch.float8_e4m3fn, 448)}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def adapted(outs, layout, **options):
    """Linears over 10 features with adapters, decoded to a layout."""
    linears = [layer(out, **options) for out in outs]
    for seed, linear in enumerate(linears):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(2, 10, dtype=torch.float64, generator=generator, requires_grad=True)
        b = torch.randn(linear.out_features, 2, dtype=torch.float64, generator=generator)
        linear.adapter, linear.layout = Update(a, b.requires_grad_(), 0.37), layout
    return linears


def factors(linears):
    return [t for linear in linears for t in (linear.adapter.a, linear.adapter.b)]


def run(linears, x):
    ys = [linear(x) for linear in linears]
    loss = sum(i * (y * y).sum() for i, y in enumerate(ys, 1))
    return [*ys, *torch.autograd.grad(loss, [x, *factors(linears)])]


def exactly(linears, weights, x):
    """As `run`, by autograd over weights [out, in] as they are."""
    ys = [
        x @ (weight + 0.37 * linear.adapter.b @ linear.adapter.a).t() + linear.bias
        for linear, weight in zip(linears, weights, strict=True)
    ]
    loss = sum(i * (y * y).sum() for i, y in enumerate(ys, 1))
    return [*ys, *torch.autograd.grad(loss, [x, *factors(linears)])]


def drawn():
    x = torch.randn(2, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return x.requires_grad_()


@pytest.mark.parametrize("quant", ["nf4", None])
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_linear_trains_with_the_numbers_of_its_layout(layout, quant, opened, together):
    linears, x = adapted([7, 3, 5], layout, quant=quant), drawn()
    linears[1].layout = DENSE  # and two layouts go together
    if together:
        LinearGroup(linears)
    true = [linear.decode(torch.float64) for linear in linears]
    with DecodedWeightCache().opened(linears if opened else [], torch.float64):
        weights = [linear.group.weights(torch.float64) for linear in linears]
        weights = weights[0] if together else [one for (one,) in weights]
        assert [weight.layout for weight in weights] == [layout, DENSE, layout]
        rounded = [w.data.double() * (1 if w.scale is None else w.scale) for w in weights]
        got = run(linears, x)
    for wanted, found in zip(exactly(linears, rounded, x), got, strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(rounded[1], true[1])
    for i in (0, 2):
        error, bound = (rounded[i] - true[i]).abs(), layout.rounding(true[i])
        assert (error <= bound * (1 + 1e-6)).all()
        assert error.max() > 0


def test_gradients_in_float64(layout):
    (linear,) = adapted([7], layout)
    x = drawn()
    assert torch.autograd.gradcheck(lambda x, *_: linear(x), (x, *factors([linear])))


def test_a_cache_has_room_for_any_layout(layout):
    """Numbers of one byte and of eight lie in one buffer, each where their dtype may lie."""
    cache, dtype = DecodedWeightCache(), torch.float64
    linears, x = adapted([7, 3, 5], layout), drawn()
    linears[1].layout = DENSE
    LinearGroup(linears)
    wanted = run(linears, x)
    for again, decodes in ((False, 3), (True, 3), (False, 6)):
        with cache.opened(linears, dtype, again=again):
            assert all(torch.equal(a, b) for a, b in zip(run(linears, x), wanted, strict=True))
            held = [linear.opened(dtype) for linear in linears]
        assert cache.decodes == decodes
        assert len({weight.data.untyped_storage().data_ptr() for weight in held}) == 1
    cache.keep([linears], dtype)
    assert cache.decodes == 9
    linears[1].layout = layout  # what is kept in another layout is of no use
    for _ in range(2):
        with cache.opened(linears, dtype):
            assert [linear.opened(dtype).layout for linear in linears] == [layout] * 3
            assert linears[1].opened(dtype).data.dtype == layout.kind
        assert cache.decodes == 12


def test_weights_decoded_for_forward_only_are_not_used_in_backward():
    cache, linear, asked = DecodedWeightCache(), layer(), []

    class Asked(Rows):
        def decode(self, packed, dtype, outs=None, *, forward_only=False):
            asked.append(forward_only)
            return super().decode(packed, dtype, outs)

    linear.layout = Asked(torch.int8, 127)
    for forward_only, decodes in ((True, 1), (True, 1), (False, 2), (True, 2), (False, 2)):
        with cache.opened([linear], torch.float32, again=True, forward_only=forward_only):
            pass
        assert cache.decodes == decodes
    cache.keep([[linear]], torch.float32)  # what is kept is for both passes
    with cache.opened([linear], torch.float32, forward_only=True):
        pass
    assert asked == [True, False, False]


def test_the_same_bytes_are_not_taken_for_products_in_another_dtype():
    cache, linear = DecodedWeightCache(), layer()
    linear.layout = LAYOUTS["int8"]
    for dtype, decodes in ((torch.float32, 1), (torch.float64, 2), (torch.float64, 2)):
        with cache.opened([linear], dtype, again=True):
            assert linear.opened(dtype).scale.dtype == dtype
        assert cache.decodes == decodes


def test_what_wants_the_weight_itself_gets_it(layout):
    linear = layer()
    linear.layout = layout
    true = dequantize(linear.quantized, torch.float64)
    with DecodedWeightCache().opened([linear], torch.float64):
        assert torch.equal(linear.dense(torch.float64), true)
        linear.layout = DENSE  # from the next opening on
        assert torch.equal(linear.dense(torch.float64), true)


def test_kernels_that_take_dense_weights_are_given_no_others(layout, monkeypatch):
    monkeypatch.setattr(groups, "_for_kernels", lambda _: True)
    linears, x = adapted([6, 6], DENSE, bias=False), drawn()
    LinearGroup(linears)
    updates = [linear.adapter.update(x) for linear in linears]
    fused = linears[0].group.fused(x, updates)
    wanted = [linear.decode(torch.float64) for linear in linears]
    assert all(torch.equal(a, b) for a, b in zip(fused.weights(), wanted, strict=True))
    linears[1].layout = layout
    assert linears[0].group.fused(x, updates) is None
