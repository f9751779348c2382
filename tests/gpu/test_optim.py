"""AdamW on a GPU: the plain rule's bits, no wait for the host, and every way of paging alike."""

import gc
import math

import bitsandbytes
import pytest
import torch
from transformers import LlamaConfig

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import adapter_parameters
from halfbyte.optim import AdamW, buckets, managed
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.runtime.precision import deterministic
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer
from tests.engine.test_layerwise import SIZES, batches_of, model_of
from tests.optim.problems import follow, gradients, in_groups, parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(64, 100), (17,), (5000,), (70, 1000), (4096,), (1, 4095), (), (300, 1000), (64, 4096)]
MODES = ["explicit", "auto", "managed"]


def on_gpu(tensors):
    return [tensor.cuda() for tensor in tensors]


def problem(steps, dtype=torch.float32, shapes=tuple(SHAPES)):
    start = parameters(shapes, dtype)
    grads = gradients(start, steps)
    return on_gpu(start), [on_gpu(step) for step in grads]


def assert_same(ours, theirs):
    (params, optimizer), (others, other) = ours, theirs
    for one, another in zip(params, others, strict=True):
        assert torch.equal(one.cpu(), another.cpu())
    state = other.state_dict()["state"]
    for i, fields in optimizer.state_dict()["state"].items():
        for name, value in fields.items():
            assert torch.equal(value, state[i][name]), (i, name)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        (torch.float32, "master"),
        (torch.float16, "master"),
        (torch.bfloat16, "master"),
        (torch.bfloat16, "stochastic"),
    ],
)
def test_the_kernel_does_what_the_plain_rule_does_on_a_cpu(bits, dtype, way):
    start, grads = problem(12, dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_bits": bits, "bfloat16": way}
    ours, optimizer = follow(AdamW, start, grads, **options)
    theirs, other = follow(
        AdamW, [p.cpu() for p in start], [[g.cpu() for g in s] for s in grads], **options
    )
    if bits == 32:
        assert_same((ours, optimizer), (theirs, other))
        return
    # Roots and reciprocals are approximate, so that parameters are, but no moment is.
    state = other.state_dict()["state"]
    for i, fields in optimizer.state_dict()["state"].items():
        for name, value in fields.items():
            if name == "master":
                torch.testing.assert_close(value, state[i][name], rtol=2e-6, atol=2e-7)
            else:
                assert torch.equal(value, state[i][name]), (i, name)
    for one, another in zip(ours, theirs, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(one.cpu(), another, rtol=2e-6, atol=2e-7)
        else:  # a last digit may fall to the other side, seldom
            digit = torch.finfo(dtype).eps
            torch.testing.assert_close(one.cpu(), another, rtol=2 * digit, atol=1e-3 * digit)
            assert (one.cpu() != another).float().mean() <= 1e-2


@pytest.mark.parametrize("paging", ["off", "explicit"])
def test_groups_with_and_without_decay_do_what_the_plain_rule_does_on_a_cpu(paging):
    start, grads = problem(6, torch.float32)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = follow(in_groups(AdamW), start, grads, paging=paging, **options)
    cpu = [p.cpu() for p in start], [[g.cpu() for g in step] for step in grads]
    assert_same(ours, follow(in_groups(AdamW), *cpu, **options))


@pytest.mark.parametrize("bits", [32, 8])
def test_memory_around_a_parameter_is_left_alone(bits):
    memory = torch.full((5000,), torch.nan, device="cuda")
    parameter = memory[1:4500].detach()  # not aligned, either
    parameter.copy_(parameters([(4499,)])[0])
    parameter.grad = gradients([parameter.cpu()], 1)[0][0].cuda()
    AdamW([parameter], state_bits=bits).step()
    assert parameter.isfinite().all()
    assert memory[0].isnan()
    assert memory[4500:].isnan().all()


def test_two_hundred_steps_are_torchs():
    start, grads = problem(200)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours, _ = follow(AdamW, start, grads, **options)
    theirs, _ = follow(torch.optim.AdamW, start, grads, **options)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_eight_bits_are_no_further_from_bitsandbytes_than_it_is_from_32_bits():
    start, grads = problem(200, shapes=(*SHAPES[:4], (64, 4096)))
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours, _ = follow(AdamW, start, grads, state_bits=8, **options)
    theirs, _ = follow(bitsandbytes.optim.AdamW8bit, start, grads, **options)
    exact, _ = follow(torch.optim.AdamW, start, grads, **options)
    for one, other, true in zip(ours, theirs, exact, strict=True):
        step = (other - true).abs()
        assert (one - true).abs().mean() <= step.mean() + 1e-6
        assert (one - other).abs().mean() <= 1.5 * step.mean() + 1e-6


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("paging", ["off", *MODES])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_scale_that_is_no_number_changes_nothing(bits, paging, bad):
    start, grads = problem(2)
    ours, optimizer = follow(AdamW, start, grads, state_bits=bits, paging=paging)
    before = optimizer.state_dict()["state"]
    optimizer.step(grad_scale=torch.tensor(bad, device="cuda"))
    assert_same((optimizer.param_groups[0]["params"], optimizer), (ours, optimizer))
    for i, fields in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[i][name]) for name, value in fields.items())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("paging", ["off", "explicit"])
def test_a_step_does_not_wait_for_the_device(paging):
    start, grads = problem(3)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW(made, state_bits=8, paging=paging)
    scale = torch.tensor(0.5, device="cuda")
    for number, step in enumerate(grads):
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()  # at another address each time
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.param_groups[0]["lr"] = 1e-3 * number
            optimizer.prefetch()
            optimizer.step(grad_scale=scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_in_a_graph_is_the_step_outside(bits):
    start, grads = problem(6)
    rates = [1e-3, 5e-4, 1e-2, 1e-4, 1e-3, 1e-3]

    def run(captured):
        made = [torch.nn.Parameter(p.clone()) for p in start]
        rate = torch.tensor(0.0, device="cuda")
        optimizer = AdamW(made, lr=rate, state_bits=bits)
        for p in made:
            p.grad = torch.zeros_like(p)
        graph = None
        for number, step in enumerate(grads):
            rate.fill_(rates[number])
            for p, g in zip(made, step, strict=True):
                p.grad.copy_(g)
            if captured and number == 2:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            if graph is not None:
                graph.replay()
            else:
                optimizer.step()
        return made, optimizer

    assert_same(run(True), run(False))


@pytest.fixture
def small_groups(monkeypatch):
    """Many groups, so that buffers are used again and again."""
    monkeypatch.setattr(buckets, "PIECE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(buckets, "GROUP_BYTES", 1 << 18)


def busy():
    """Work that keeps the current stream behind the host."""
    x = torch.randn(2048, 2048, device="cuda")
    for _ in range(6):
        x = x @ x * 1e-2
    return x


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("paging", MODES)
def test_every_way_of_paging_has_the_same_bits(bits, paging, small_groups):
    start, grads = problem(12)
    resident = follow(AdamW, start, grads, state_bits=bits)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW(made, state_bits=bits, paging=paging)
    for number, step in enumerate(grads):
        if number in (0, 3, 4, 7):
            optimizer.page_out()
        busy()
        if paging == "explicit":
            optimizer.prefetch()
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        result = optimizer.report()
        moved = {"explicit": 2, "auto": 2 * (number in (3, 4, 7)) + (number == 0)}
        moved["managed"] = 2 * (number in (0, 3, 4, 7))
        assert result.paged_bytes == pytest.approx(moved[paging] * optimizer.state_bytes)
        assert 0 <= result.paging_ms < 1000
    assert_same((made, optimizer), resident)


@pytest.mark.parametrize("order", ["backward", "forward", "shuffled"])
def test_layers_updated_beside_backward_have_the_same_bits(order, small_groups):
    start, grads = problem(12)
    resident = follow(AdamW, start, grads, state_bits=8)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW(made, state_bits=8, paging="explicit")
    numbers = list(range(len(made)))[:: -1 if order == "backward" else 1]
    generator = torch.Generator().manual_seed(0)
    for step in grads:
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        if order == "shuffled":
            numbers = torch.randperm(len(made), generator=generator).tolist()
        optimizer.prefetch()
        for i in numbers:
            busy()
            optimizer.step_parameters([made[i]])
        optimizer.step()
    assert_same((made, optimizer), resident)


@pytest.mark.parametrize("bits", [32, 8])
def test_layers_updated_as_the_engine_finishes_them_have_the_same_bits(bits, small_groups):
    """Explicit paging without clipping, beside a run whose state stays and that has CUDA graphs."""
    shape = LlamaConfig(**SIZES | {"hidden_size": 128, "intermediate_size": 256})
    batches = batches_of([(2, 64), (2, 64)])
    names = {32: ("adamw", "paged_adamw_32bit"), 8: ("adamw_8bit", "paged_adamw_8bit")}[bits]
    found = []
    for optim, paging in zip(names, ("auto", "explicit"), strict=True):
        model = model_of(shape, dtype=torch.bfloat16, r=64).cuda()
        config = TrainConfig(
            model="-", data="-", output="-", optim=optim, paging=paging, max_grad_norm=0.0
        )
        engine = LayerEngine(model, fuse=True, graphs=True)
        made = adapter_parameters(model)
        trainer = Trainer(engine, made, config, Schedule(1e-2, "constant", 0, 6))
        early = paging == "explicit"
        assert (engine.on_layer_backward is not None) == early
        trainer.fit([[(2, 64), (2, 64)]], [[64] * 4])
        trainer.memory.use(ActivationPolicy(1, 1))
        losses = []
        with deterministic():
            trainer.capture()
            for number in range(6):
                busy()  # the host is ahead, as in a run
                report = trainer.step(number, batches)
                losses.append(report.loss)
        assert [note[:14] for note in engine.messages] == ["no CUDA graphs"] * early
        if early:
            state = trainer.optimizer.state_bytes
            assert report.paging.optimizer_host_bytes == state
            assert report.paging.optimizer_device_bytes < state / 2
            assert report.paging.paged_bytes == 2 * state
        found.append((losses, list(made.values()), trainer.optimizer))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1:], found[1][1:])


@pytest.mark.parametrize("before", ["off", *MODES])
@pytest.mark.parametrize("after", ["off", *MODES])
def test_a_run_goes_on_in_any_other_mode(before, after):
    start, grads = problem(6)
    straight, _ = follow(AdamW, start, grads, state_bits=8)
    middle, first = follow(AdamW, start, grads[:3], state_bits=8, paging=before)

    def resumed(made, **options):
        optimizer = AdamW(made, **options)
        optimizer.load_state_dict(first.state_dict())
        return optimizer

    end, _ = follow(resumed, middle, grads[3:], state_bits=8, paging=after)
    assert all(torch.equal(p, q) for p, q in zip(end, straight, strict=True))


def test_managed_pages_are_where_they_were_sent():
    start, grads = problem(2)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW(made, paging="managed")
    for p, g in zip(made, grads[0], strict=True):
        p.grad = g.clone()
    optimizer.step()
    device = torch.cuda.current_device()
    assert optimizer._store.last_prefetch() == device
    optimizer.page_out()
    assert optimizer._store.last_prefetch() == managed.HOST
    assert optimizer.report().optimizer_host_bytes == optimizer.state_bytes
    optimizer.step()
    assert optimizer._store.last_prefetch() == device


def test_no_more_managed_memory_is_asked_for_than_is_free(monkeypatch):
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(5000, device="cuda"))], paging="managed")
    optimizer.param_groups[0]["params"][0].grad = torch.ones(5000, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (30_000, 80_000_000_000))
    with pytest.raises(ConfigError, match=r"takes 0\.00 GB of managed memory, and the device has"):
        optimizer.step()


def test_where_there_is_no_room_managed_state_is_updated_over_the_bus(monkeypatch):
    start, grads = problem(2)
    resident = follow(AdamW, start, grads, state_bits=8)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW(made, state_bits=8, paging="managed")
    for number, step in enumerate(grads):
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        if number:
            optimizer.page_out()
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 80_000_000_000))
        optimizer.step()
    assert optimizer._store.last_prefetch() == managed.HOST
    assert_same((made, optimizer), resident)


def test_managed_memory_is_freed_with_the_optimizer(monkeypatch):
    library, freed = managed.runtime()._library, []
    real = library.cudaFree

    def noting(address):
        freed.append((address.value, real(address)))

    monkeypatch.setattr(library, "cudaFree", noting)
    parameter = torch.nn.Parameter(torch.zeros(30_000_000, device="cuda"))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = AdamW([parameter], paging="managed")
    optimizer.step()
    address = optimizer._store.address
    assert not freed
    del optimizer
    gc.collect()
    assert freed == [(address, 0)]
