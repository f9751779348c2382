"""AdamW against torch's, bitsandbytes' and float64; what a step may and may not change."""

import math
from itertools import pairwise

import bitsandbytes
import pytest
import torch

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.optim import AdamW, adamw
from halfbyte.quant import format as quant_format
from halfbyte.quant.blockwise import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from halfbyte.runtime import device as devices
from tests.devices import DEVICES
from tests.optim.problems import follow, gradients, parameters

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


@pytest.mark.parametrize("options", [OPTIONS, {"lr": 1e-3, "betas": (0.0, 0.999), "eps": 1e-6}])
def test_two_hundred_steps_are_torchs(options):
    start = parameters()
    grads = gradients(start, 200)
    ours, _ = follow(AdamW, start, grads, **options)
    theirs, _ = follow(torch.optim.AdamW, start, grads, **options)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def emulated(start, grads, lr, betas, weight_decay, eps=1e-8):
    """8-bit AdamW in float64, written from the paper: sorted levels, nearest by distance."""
    signed, unsigned = DYNAMIC_SIGNED.double(), DYNAMIC_UNSIGNED.double()

    def coded(x, levels):
        blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-300)
        place = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
        if levels is unsigned:
            place = torch.where(blocks > 0, place.clamp(min=1), place)
        return (levels[place] * scale).view(-1)[: x.numel()].view(x.shape)

    found = []
    for p, *steps in zip(start, *grads, strict=True):
        p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
        for t, g in enumerate(steps, 1):
            m = betas[0] * m + (1 - betas[0]) * g.double()
            v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
            fit = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            p = p * (1 - lr * weight_decay) - lr * fit
            if p.numel() >= 4096:
                m, v = coded(m, signed), coded(v, unsigned)
        found.append(p)
    return found


def test_eight_bits_are_those_of_an_emulation_in_float64():
    start = parameters([(64, 100), (17,), (4096,)])
    grads = gradients(start, 60)
    ours, _ = follow(AdamW, start, grads, state_bits=8, **OPTIONS)
    theirs = emulated(start, grads, **OPTIONS)
    for one, other in zip(ours, theirs, strict=True):
        off = (one - other).abs()
        # A moment at a bound between two levels may fall to the other side: few, and by one level.
        assert off.median() <= 1e-6
        assert off.max() <= 60 * 1e-3 * 0.01


def test_eight_bits_are_no_further_from_bitsandbytes_than_it_is_from_32_bits():
    start = parameters()
    grads = gradients(start, 200)
    ours, _ = follow(AdamW, start, grads, state_bits=8, **OPTIONS)
    theirs, _ = follow(bitsandbytes.optim.AdamW8bit, start, grads, **OPTIONS)
    exact, _ = follow(torch.optim.AdamW, start, grads, **OPTIONS)
    for one, other, true in zip(ours, theirs, exact, strict=True):
        step = (other - true).abs()  # what its quantisation does
        assert (one - true).abs().mean() <= step.mean() + 1e-7
        assert (one - other).abs().mean() <= 1.5 * step.mean() + 1e-7  # two errors, independent
        assert (one - true).abs().max() <= 2 * step.max() + 1e-6


def test_small_tensors_keep_32_bits():
    start = parameters()
    _, optimizer = follow(AdamW, start, gradients(start, 1), state_bits=8)
    kinds = {
        start[i].numel(): fields["exp_avg"].dtype
        for i, fields in optimizer.state_dict()["state"].items()
    }
    assert all((kinds[n] == torch.uint8) == (n >= 4096) for n in kinds)


def test_a_second_moment_near_zero_does_not_make_a_giant_step():
    """Its block's largest is 10⁸ times larger, and the next gradient is nothing."""
    start = [torch.zeros(4096)]
    grad = torch.full((4096,), 1e-4)
    grad[::256] = 1.0
    grads = [[grad], [torch.zeros(4096)], [torch.zeros(4096)]]
    (got,), _ = follow(AdamW, start, grads, state_bits=8, lr=1e-3)
    assert got.abs().max() <= 3e-3


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_scale_that_is_no_number_changes_nothing(bits, bad):
    start = parameters()
    ours, optimizer = follow(AdamW, start, gradients(start, 3), state_bits=bits)
    before = optimizer.state_dict()["state"]
    held = optimizer.param_groups[0]["params"]
    optimizer.step(grad_scale=torch.tensor(bad))
    assert all(torch.equal(p, q) for p, q in zip(held, ours, strict=True))
    for i, fields in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[i][name]) for name, value in fields.items())


def test_the_scale_is_a_factor_of_the_gradients():
    start = parameters()
    grads = gradients(start, 2)
    half, _ = follow(AdamW, start, [[g * 0.5 for g in step] for step in grads], **OPTIONS)
    scaled = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW(scaled, **OPTIONS)
    for step in grads:
        for p, g in zip(scaled, step, strict=True):
            p.grad = g.clone()
        optimizer.step(grad_scale=torch.tensor(0.5))
    assert all(torch.equal(p, q) for p, q in zip(scaled, half, strict=True))


def test_groups_have_rates_of_their_own_and_a_rate_may_be_a_tensor():
    start = parameters([(40,), (50,)])
    grads = gradients(start, 5)
    found = []
    for make, rate in ((torch.optim.AdamW, 1e-2), (AdamW, 1e-2), (AdamW, torch.tensor(1e-2))):
        made = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make([{"params": made[:1]}, {"params": made[1:], "weight_decay": 0.5}], lr=1e-3)
        optimizer.param_groups[0]["lr"] = rate
        for step in grads:
            for p, g in zip(made, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        found.append(made)
    for theirs, ours, with_tensor in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours, with_tensor)


def test_a_parameter_without_a_gradient_waits_as_torchs_does():
    start = parameters([(40,), (50,)])
    grads = gradients(start, 6)
    found = []
    for make in (torch.optim.AdamW, AdamW):
        made = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(made, lr=1e-2)
        for number, step in enumerate(grads):
            made[0].grad, made[1].grad = step[0].clone(), step[1].clone()
            if number in (0, 3):
                made[1].grad = None
            optimizer.step()
        found.append(made)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_state_that_was_saved_goes_on_bit_for_bit(bits):
    start = parameters()
    grads = gradients(start, 8)
    straight, _ = follow(AdamW, start, grads, state_bits=bits, **OPTIONS)
    middle, first = follow(AdamW, start, grads[:4], state_bits=bits, **OPTIONS)
    saved = first.state_dict()

    def resumed(made, **options):
        optimizer = AdamW(made, **options)
        optimizer.load_state_dict(saved)
        return optimizer

    end, _ = follow(resumed, middle, grads[4:], state_bits=bits, **OPTIONS)
    assert all(torch.equal(p, q) for p, q in zip(end, straight, strict=True))


def test_a_state_of_another_width_is_refused():
    start = parameters([(5000,)])
    _, saved = follow(AdamW, start, gradients(start, 1), state_bits=8)
    other = AdamW([torch.nn.Parameter(start[0].clone())])
    with pytest.raises(CheckpointError, match=r"parameter 0 has no exp_avg of 5000 float32: it is"):
        other.load_state_dict(saved.state_dict())


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    return x, torch.randn(64, 64, generator=generator)


def regression(make, dtype, **options):
    """The loss at the end of 900 steps whose last are below half a digit of bfloat16."""
    x, true = problem()
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = make([weight], weight_decay=0.0, **options)
    for step in range(900):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 900)
        weight.grad = None
        loss = (x @ (weight.float() - true)).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("way", "noise"), [("master", 2), ("stochastic", 3)])
def test_bfloat16_trains_as_well_as_float32(way, noise, bits):
    """What is lost is of the size of what rounding the solution loses."""
    exact = regression(AdamW, torch.float32, state_bits=bits)
    ours = regression(AdamW, torch.bfloat16, state_bits=bits, bfloat16=way)
    x, true = problem()
    rounded = float((x @ (true.bfloat16().float() - true)).square().mean())
    assert ours <= exact + noise * rounded
    assert regression(torch.optim.AdamW, torch.bfloat16) > 100 * ours


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="state_bits must be one of"):
        AdamW([torch.zeros(3, requires_grad=True)], state_bits=4)
    with pytest.raises(ConfigError, match="takes contiguous float32, bfloat16 and float16"):
        AdamW([torch.zeros(3, 4, requires_grad=True).t().detach().requires_grad_()])
    with pytest.raises(ConfigError, match="takes contiguous float32"):
        AdamW([torch.zeros(3, dtype=torch.float64, requires_grad=True)])
    with pytest.raises(ConfigError, match="one device"):
        AdamW([torch.zeros(3, requires_grad=True), torch.zeros(3, device="meta")])
    with pytest.raises(ConfigError, match="float16 needs a master copy"):
        AdamW([torch.zeros(3, dtype=torch.float16)], bfloat16="stochastic")
    start = parameters([(9,)])
    _, optimizer = follow(AdamW, start, gradients(start, 1))
    with pytest.raises(ConfigError, match="after its first step"):
        optimizer.add_param_group({"params": [torch.zeros(3)]})


@pytest.mark.parametrize(
    "step", [None, torch.tensor(-1.0), torch.tensor(torch.nan), torch.tensor([1.0, 2.0])]
)
def test_a_state_needs_its_number_of_steps(step):
    start = parameters([(9,)])
    _, optimizer = follow(AdamW, start, gradients(start, 1))
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    if step is None:
        del state["state"][0]["step"]
    with pytest.raises(CheckpointError, match="parameter 0 has no number of steps"):
        optimizer.load_state_dict(state)


def test_state_is_one_run_of_bytes_without_overlaps():
    start = [*parameters(), torch.zeros(9_000_000)]
    for bits in (32, 8):
        optimizer = AdamW([torch.nn.Parameter(p) for p in start], state_bits=bits)
        pieces = optimizer.pieces
        for one, other in pairwise(pieces):
            assert one.offset + one.nbytes == other.offset
        views = [
            (view.data_ptr(), view.nbytes)
            for memory in (torch.zeros(pieces[-1].offset + pieces[-1].nbytes, dtype=torch.uint8),)
            for piece in pieces
            for view in piece.views(memory).values()
        ]
        for (place, size), (after, _) in pairwise(sorted(views)):
            assert place + size <= after
        assert sum(p.count for p in pieces) == sum(p.numel() for p in start)


@pytest.mark.parametrize("name", ["v100", "t4", "h100"])
def test_a_gpu_that_triton_left_behind_gets_the_plain_rule(monkeypatch, name):
    kernels = pytest.importorskip(
        "halfbyte.optim.triton_adamw", reason="needs Triton", exc_type=ImportError
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES[name])
    quant_format.gpu_kernels.cache_clear()
    try:
        if name == "v100":
            assert adamw._gpu_kernels() is None
            with pytest.raises(
                ConfigError, match='impl "gpu" needs Triton, which is not available'
            ):
                AdamW(parameters(), impl="gpu")
        else:
            assert adamw._gpu_kernels() is kernels
    finally:
        quant_format.gpu_kernels.cache_clear()
