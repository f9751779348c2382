"""The products of a gated MLP in Triton's interpreter, against float64 and the products apart.

On a card both are the same bits (tests/gpu); here sums depend on the shape of the tiles.
"""

import pytest
import torch

from tests.nf4.test_gpu_products import close, drawn, layer, products, pytestmark  # noqa: F401

gated = pytest.importorskip("halfbyte.nf4.gpu_gated", reason="needs Triton", exc_type=ImportError)
gpu = pytest.importorskip("halfbyte.model.gpu", reason="needs Triton", exc_type=ImportError)

# out (of gate and of up), in, ranks of both, rows
CASES = [
    (256, 64, [16, 16], 128),
    (264, 72, [8, 16], 131),
    (64, 192, [None, 16], 40),
    (72, 40, [100, 3], 7),
]


@pytest.mark.parametrize(("out", "inputs", "ranks", "rows"), CASES)
@pytest.mark.parametrize("where", ["adjacent", "apart", "swapped"])
def test_forward_gives_what_products_and_gate_apart_give(out, inputs, ranks, rows, where):
    weights, _, shadow = layer([out, out], inputs, ranks, where == "adjacent")
    if where != "adjacent":
        room = torch.full((3, out, inputs), torch.nan, dtype=torch.float16)
        first, second = (0, 2) if where == "apart" else (2, 0)
        room[first], room[second] = weights
        weights = [room[first], room[second]]
    x = drawn(rows, inputs, seed=20)
    p = torch.mm(x, shadow.a.t())
    apart = products.forward(x, weights, p, shadow, [out, out])
    for keep in (False, True):
        inner, both = gated.gated_forward(x, weights, p, shadow, keep=keep)
        assert close(inner, gpu.swiglu(*apart.split(out, 1)).double())
        assert both is None if not keep else close(both, apart.double())
    b = shadow.b.split(out)
    g, u = (
        x.double() @ w.double().t() + part.double() @ own.double().t()
        for w, part, own in zip(weights, p.split(shadow.rank, 1), b, strict=True)
    )
    assert close(inner, g * torch.sigmoid(g) * u, 3.0)
