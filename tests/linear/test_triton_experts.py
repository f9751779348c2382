"""The products of experts in Triton's interpreter, against float64."""

import os
from dataclasses import replace

import pytest
import torch

from halfbyte.linear.glu import Glu
from halfbyte.runtime import device as devices
from tests.devices import DEVICES

kernels = pytest.importorskip(
    "halfbyte.linear.triton_experts", reason="needs Triton", exc_type=ImportError
)
routings = pytest.importorskip(
    "halfbyte.linear.triton_routing", reason="needs Triton", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)

SWIGLU, GPT_OSS = Glu(), Glu(True, 7.0, 1.702, 1.0)


@pytest.fixture(autouse=True, name="use")
def _use(monkeypatch):
    """Sets the GPU: on an H100 weights are loaded by TMA, on an A100 they are not."""

    def use(name):
        spec = replace(DEVICES[name], num_sms=3)
        monkeypatch.setattr(devices, "spec_of", lambda _: spec)

    use("h100")
    return use


def drawn(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).half()


def close(got, exact, factor=1.0):
    """Within the rounding of a float16 result."""
    return (got.double() - exact).norm() <= factor * 2**-11 * exact.norm()


class Case:
    """Tokens with their experts, and the expert, token and slot of each sorted row."""

    def __init__(self, tokens, top_k, experts, tile_rows, skew="even"):
        generator = torch.Generator().manual_seed(tokens)
        index = torch.randint(0, experts, (tokens, top_k), generator=generator)
        if skew == "one":
            index[:] = experts - 2
        elif skew == "gaps":
            index = index // 2 * 2
        self.index, self.experts = index, experts
        self.routing = routings.routing_of(index, experts, tile_rows)
        self.slot = self.routing.order.long()
        self.token, self.expert = self.slot // top_k, index.reshape(-1)[self.slot]
        self.rows = len(self.slot)


CASES = [
    # tokens, top_k, experts, rows of a tile, in, out
    (37, 3, 5, 64, 72, 40),
    (35, 2, 3, 64, 64, 136),
    (130, 1, 2, 128, 40, 264),
]


@pytest.mark.parametrize(
    ("gpu", "case", "skew", "transposed", "gather", "scatter"),
    [
        ("h100", CASES[0], "gaps", True, True, False),
        ("h100", CASES[0], "even", False, False, True),
        ("h100", CASES[1], "one", True, False, True),
        ("h100", CASES[1], "even", False, True, True),
        ("h100", CASES[2], "gaps", False, True, False),
        ("a100", CASES[0], "even", False, True, True),
        ("a100", CASES[1], "gaps", True, False, True),
    ],
)
def test_products_are_those_of_float64(use, gpu, case, skew, transposed, gather, scatter):
    use(gpu)
    *sizes, inputs, outputs = case
    case = Case(*sizes, skew)
    matrix = (outputs, inputs) if transposed else (inputs, outputs)
    weights = drawn(case.experts, *matrix, seed=1, scale=0.1)
    x = drawn(len(case.index) if gather else case.rows, inputs, seed=4)
    rows = (x[case.token] if gather else x).double()
    exact_weights = weights.double().mT if transposed else weights.double()
    exact = torch.einsum("ri,rio->ro", rows, exact_weights[case.expert])
    extra = {}
    if scatter:
        extra["bias"] = drawn(case.experts, outputs, seed=2)
        exact += extra["bias"][case.expert].double()
        extra["row_scale"] = torch.rand(case.rows, generator=torch.Generator().manual_seed(3))
        exact *= extra["row_scale"][case.slot, None].double()
    out = torch.full((case.rows, outputs), torch.nan).half()
    flags = {"transposed": transposed, "gather": gather, "scatter": scatter}
    for first in range(0, case.experts, 2):  # as they are decoded
        chunk = weights[first : first + 2]
        kernels.grouped_product(x, chunk, case.routing, first, out, **flags, **extra)
    assert close(out[case.slot] if scatter else out, exact)


@pytest.mark.parametrize(
    ("gpu", "case", "glu", "transposed"),
    [
        ("h100", CASES[0], SWIGLU, True),
        ("h100", CASES[1], GPT_OSS, True),
        ("h100", CASES[0], GPT_OSS, False),
        ("a100", CASES[0], SWIGLU, True),
    ],
)
def test_the_activation_is_that_of_the_rounded_products(use, gpu, case, glu, transposed):
    use(gpu)
    *sizes, inputs, outputs = case
    case = Case(*sizes)
    matrix = (outputs, inputs) if transposed else (inputs, outputs)
    weights, x = (
        drawn(case.experts, *matrix, seed=1, scale=0.7),
        drawn(len(case.index), inputs, seed=4),
    )
    bias = drawn(case.experts, outputs, seed=2)
    flags = {"transposed": transposed, "gather": True, "bias": bias}
    h = torch.full((case.rows, outputs), torch.nan).half()
    inner = torch.full((case.rows, outputs // 2), torch.nan).half()
    for first in range(0, case.experts, 2):
        chunk = weights[first : first + 2]
        kernels.grouped_product(x, chunk, case.routing, first, h, **flags)
        kernels.grouped_product(x, chunk, case.routing, first, inner, glu=glu, **flags)
    if glu.limit is not None:
        assert (h > glu.limit).any()
    assert close(inner, glu(h.double()))


@pytest.mark.parametrize("glu", [SWIGLU, GPT_OSS])
@pytest.mark.parametrize("inner", [40, 300])
def test_gradients_of_the_activation_are_those_of_autograd(glu, inner):
    case = Case(21, 2, 4, 64)
    h, d_inner = drawn(case.rows, 2 * inner, seed=5, scale=4.0), drawn(case.rows, inner, seed=6)
    weight = torch.rand(case.rows, generator=torch.Generator().manual_seed(7))
    d_weight = torch.full((case.rows,), torch.nan)
    exact_h = h.double().requires_grad_()
    exact_weight = weight[case.slot].double().requires_grad_()
    out = glu(exact_h) * exact_weight[:, None]
    expected = torch.autograd.grad(out, (exact_h, exact_weight), d_inner.double())
    before = d_inner.clone()
    for first in range(0, case.experts, 2):
        kernels.gated_backward(h, d_inner, d_weight, weight, case.routing, first, 2, glu)
    assert torch.equal(d_inner, before)
    assert close(h, expected[0])
    assert (d_weight[case.slot].double() - expected[1]).norm() <= 1e-6 * expected[1].norm()


def test_only_rows_of_the_given_experts_are_written():
    case = Case(37, 3, 5, 64)
    x, weights = drawn(37, 72, seed=4), drawn(5, 40, 72, seed=1)
    out = torch.full((case.rows, 40), torch.nan).half()
    kernels.grouped_product(x, weights[2:4], case.routing, 2, out, transposed=True, gather=True)
    assert torch.equal(out.isnan().any(1), (case.expert < 2) | (case.expert >= 4))


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_rows_counted_from_an_expert_give_the_same_bits(use, gpu):
    use(gpu)
    case = Case(37, 2, 5, 64)
    x, up, down = drawn(37, 72, seed=4), drawn(5, 80, 72, seed=1), drawn(5, 40, 72, seed=2)
    weight = torch.rand(case.rows, generator=torch.Generator().manual_seed(7))
    start, end = case.routing.offsets[[2, 4]].tolist()
    assert 0 < start < end < case.rows

    def results(base, rows):
        inner, d_inner, h = (torch.full((rows, n), torch.nan).half() for n in (40, 40, 80))
        y, dx = (torch.full((case.rows, 72), torch.nan).half() for _ in range(2))
        d_weight = torch.full((case.rows,), torch.nan)
        gather = {"gather": True, "transposed": True, "base": base}
        scatter = {"scatter": True, "transposed": False, "base": base}
        routing = case.routing
        kernels.grouped_product(x, up[2:4], routing, 2, inner, glu=SWIGLU, **gather)
        kernels.grouped_product(inner, down[2:4], routing, 2, y, row_scale=weight, **scatter)
        kernels.grouped_product(x, down[2:4], routing, 2, d_inner, **gather)
        kernels.grouped_product(x, up[2:4], routing, 2, h, **gather)
        kernels.gated_backward(h, d_inner, d_weight, weight, routing, 2, 2, SWIGLU, base=base)
        kernels.grouped_product(h, up[2:4], routing, 2, dx, **scatter)
        return (inner, d_inner, h), (y, dx, d_weight)

    (sorted_rows, of_slots), (all_rows, expected) = results(2, end - start), results(0, case.rows)
    for one, other in zip(sorted_rows, all_rows, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other[start:end])
    for one, other in zip(of_slots, expected, strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


def test_rows_may_come_sorted_and_strided_and_end_before_the_last():
    offsets = torch.tensor([0, 5, 5, 80], dtype=torch.int32)
    routing = routings.routing_of_sorted(offsets, 90, 64)
    x, weights = drawn(90, 100, seed=1)[:, 8:80], drawn(3, 72, 24, seed=2)
    out = torch.full((90, 24), torch.nan).half()
    kernels.grouped_product(x, weights, routing, 0, out, transposed=False)
    expected = torch.cat(
        [x[:5].double() @ weights[0].double(), x[5:80].double() @ weights[2].double()]
    )
    assert close(out[:80], expected)
    assert out[80:].isnan().all()


def test_what_cannot_be_computed_together_is_refused():
    case = Case(5, 1, 2, 64)
    x, out = drawn(5, 16, seed=1), drawn(5, 8, seed=2)
    scale = torch.ones(5)
    with pytest.raises(ValueError, match="no row_scale"):
        kernels.grouped_product(
            x, drawn(2, 16, 16, seed=3), case.routing, 0, out, transposed=False, glu=SWIGLU
        )
    with pytest.raises(ValueError, match="no row_scale"):
        kernels.grouped_product(
            x,
            drawn(2, 16, 16, seed=3),
            case.routing,
            0,
            out,
            transposed=True,
            glu=SWIGLU,
            row_scale=scale,
        )
