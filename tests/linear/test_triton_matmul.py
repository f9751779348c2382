"""The products of base and adapter in Triton's interpreter, against float64."""

import os
from contextlib import nullcontext

import pytest
import torch

from halfbyte.linear.fused_lora import LowRank
from halfbyte.runtime import device as devices
from tests.devices import DEVICES

products = pytest.importorskip(
    "halfbyte.linear.triton_matmul", reason="needs Triton", exc_type=ImportError
)
adapters = pytest.importorskip(
    "halfbyte.linear.triton_lora", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)


def drawn(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).half()


def layer(outputs, inputs, ranks, adjacent=True):
    whole = drawn(sum(outputs), inputs, seed=1, scale=0.1)
    weights = list(whole.split(outputs))
    if not adjacent:
        weights = [weight.clone() for weight in weights]
    updates = [
        None
        if rank is None
        else LowRank(
            drawn(rank, inputs, seed=2 + i, scale=0.1).float(),
            drawn(out, rank, seed=9 + i, scale=0.1).float(),
            2.0,
        )
        for i, (rank, out) in enumerate(zip(ranks, outputs, strict=True))
    ]
    (cast_adapters,) = adapters.cast_adapters_of([factors(updates, outputs, inputs)], torch.float16)
    return weights, updates, cast_adapters


def factors(updates, outputs, inputs):
    return adapters.Factors([update and update[:3] for update in updates], outputs, inputs)


def close(got, exact, factor=1.0):
    """Within the rounding of a float16 result, and of its float16 intermediates."""
    return (got.double() - exact).norm() <= factor * 2**-10 * exact.norm()


CASES = [
    # outputs, inputs, ranks, rows
    ([256], 64, [16], 128),
    ([264], 72, [8], 131),
    ([256, 256, 256], 64, [16, 16, 16], 65),
    ([256, 64, 64], 128, [4, 16, None], 130),
    ([72, 24], 40, [3, 20], 7),
    ([512], 192, [100], 200),
]


@pytest.mark.parametrize(("outputs", "inputs", "ranks", "rows"), CASES)
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("by", ["one contraction", "torch"])
def test_forward_and_backward_are_those_of_float64(outputs, inputs, ranks, rows, adjacent, by):
    plain = by == "torch"
    forward = products.plain_forward if plain else products.forward
    backward = products.plain_backward if plain else products.backward
    weights, updates, cast_adapters = layer(outputs, inputs, ranks, adjacent)
    x = drawn(rows, inputs, seed=20)
    p = torch.mm(x, cast_adapters.a.t())
    y = forward(x, weights, p, cast_adapters, outputs)
    dys = [drawn(rows, out, seed=30 + i) for i, out in enumerate(outputs)]
    g = x.new_full((rows, cast_adapters.a.shape[0]), torch.nan)
    d_b = adapters.adapter_pass(dys, p, cast_adapters.b, [2.0] * len(dys), g)
    d_bs = d_b.split(outputs)
    dx = backward(dys, weights, g, cast_adapters)
    exact_dx = torch.zeros(rows, inputs, dtype=torch.float64)
    for i, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        exact = x.double() @ weight.double().t()
        dy = dys[i].double()
        exact_dx += dy @ weight.double()
        if update is not None:
            a, b = update.a.double(), update.b.double()
            exact += 2.0 * x.double() @ a.t() @ b.t()
            exact_dx += 2.0 * dy @ b @ a
            d_b = 2.0 * dy.t() @ (x.double() @ a.t())
            assert close(d_bs[i][:, : b.shape[1]], d_b, 2.0)
            first = i * cast_adapters.rank
            assert close(g[:, first : first + b.shape[1]], 2.0 * dy @ b, 2.0)
        assert close(y.split(outputs, 1)[i], exact, 2.0 if plain else 1.0)
    assert close(dx, exact_dx, 2.0 if plain else 1.0)


@pytest.mark.parametrize("ranks", [[8, 16], [64, 40]])
@pytest.mark.parametrize("name", ["t4", "a100", "4090", "h100"])
def test_every_gpu_gives_adapters_the_same(monkeypatch, name, ranks):
    """By whatever it is given: kernels, or cuBLAS where Triton has no tensor cores, no Hopper."""
    outputs, inputs, rows = [72, 24], 40, 70
    weights, updates, cast_adapters = layer(outputs, inputs, ranks)
    x, dys = drawn(rows, inputs, seed=20), [drawn(rows, n, seed=30 + n) for n in outputs]
    p = torch.mm(x, cast_adapters.a.t())
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES[name])
    launched = []
    monkeypatch.setattr(adapters, "on_device", lambda x: launched.append(x) or nullcontext())
    y = products.plain_forward(x, weights, p, cast_adapters, outputs)
    assert len(launched) == (name != "t4" or max(ranks) <= 32)
    g = torch.full_like(p, torch.nan)
    d_b = adapters.adapter_pass(dys, p, cast_adapters.b, [2.0, 2.0], g)
    dx = products.plain_backward(dys, weights, g, cast_adapters)
    assert d_b.dtype == torch.float32
    exact_dx = torch.zeros(rows, inputs, dtype=torch.float64)
    for i, (dy, update, weight) in enumerate(zip(dys, updates, weights, strict=True)):
        a, b, dy = update.a.double(), update.b.double(), dy.double()
        exact = x.double() @ (weight.double() + 2.0 * b @ a).t()
        assert close(y.split(outputs, 1)[i], exact, 2.0)
        exact_dx += dy @ (weight.double() + 2.0 * b @ a)
        own = d_b.split(outputs)[i][:, : b.shape[1]]
        assert close(own, 2.0 * dy.t() @ (x.double() @ a.t()), 2.0)
    assert close(dx, exact_dx, 2.0)


def test_sums_over_rows_may_be_more_than_float16_holds(monkeypatch):
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES["t4"])
    dy, p = torch.full((600, 8), 100.0).half(), torch.full((600, 16), 100.0).half()
    b, g = drawn(8, 16, seed=7), torch.empty(600, 16).half()
    assert torch.equal(adapters.adapter_pass([dy], p, b, [0.5], g), torch.full((8, 16), 3e6))


def test_gradients_may_be_columns_of_something_wider():
    weights, _, cast_adapters = layer([64], 64, [16])
    wide = drawn(40, 96, seed=3)
    dy = wide[:, 16:80]
    p = drawn(40, 16, seed=4)
    results = []
    for given in (dy, dy.contiguous()):
        g = p.new_empty(40, 16)
        d_b = adapters.adapter_pass([given], p, cast_adapters.b, [1.0], g)
        results.append((d_b, g, products.backward([given], weights, g, cast_adapters)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_gradients_that_lie_side_by_side_are_one_product():
    weights, _, cast_adapters = layer([64, 32], 64, [16, 16])
    whole, g = drawn(40, 96, seed=3), drawn(40, 32, seed=4)
    beside = products.plain_backward(whole.split([64, 32], 1), weights, g, cast_adapters)
    apart = [part.clone() for part in whole.split([64, 32], 1)]
    exact = torch.cat(apart, 1).double() @ torch.cat(weights).double()
    exact += g.double() @ cast_adapters.a.double()
    assert close(beside, exact, 2.0)
    assert close(products.plain_backward(apart, weights, g, cast_adapters), exact, 3.0)


def test_sums_over_many_spans_and_tiles_are_complete():
    dy, p = drawn(2050, 520, seed=5), drawn(2050, 16, seed=6)
    b, g = drawn(520, 16, seed=7), p.new_full((2050, 16), torch.nan)
    d_b = adapters.adapter_pass([dy], p, b, [0.5], g)
    assert close(d_b, 0.5 * dy.double().t() @ p.double())
    assert close(g, dy.double() @ b.double())


def test_a_shadow_holds_each_adapter_scaled_and_padded():
    dtype = torch.float16
    _, updates, _ = layer([24, 8], 40, [3, 20])
    _, (other,), alone = layer([300], 72, [8])
    those = factors([updates[0], None, updates[1]], [24, 16, 8], 40)
    cast_adapters, second = adapters.cast_adapters_of([those, factors([other], [300], 72)], dtype)
    assert cast_adapters.rank == 32
    assert torch.equal(cast_adapters.a[:3], updates[0].a.to(dtype))
    assert torch.equal(cast_adapters.a[64:84], updates[1].a.to(dtype))
    assert torch.equal(cast_adapters.b[:24, :3], (2.0 * updates[0].b).to(dtype))
    assert torch.equal(cast_adapters.b[40:, :20], (2.0 * updates[1].b).to(dtype))
    assert int((cast_adapters.a != 0).sum()) == 23 * 40
    assert int((cast_adapters.b != 0).sum()) <= 24 * 3 + 8 * 20
    assert torch.equal(second.a, alone.a)
    assert torch.equal(second.b, alone.b)


def test_what_does_not_fit_is_done_plainly():
    assert not products.fits(torch.zeros(4096, 64, dtype=torch.float16), [64])
