"""Paging without a GPU: the bookkeeping of groups, moves and early updates.

On a CPU the host's memory and the device's are the same, and there are no streams: test_streams.py
has stand-ins for them, tests/gpu/test_optim.py the real ones. Where AdamW would turn paging off, it
is turned on again here.
"""

from itertools import pairwise

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.optim import AdamW, buckets, managed
from tests.optim.problems import follow, gradients, in_groups, parameters

SHAPES = [(64, 100), (17,), (5000,), (70, 200), (4096,), (3000,), ()]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Two parameters in a group or so, and a parameter in more than one piece."""
    monkeypatch.setattr(buckets, "PIECE_ELEMENTS", 8192)
    monkeypatch.setattr(buckets, "GROUP_BYTES", 40_000)


def paged(mode):
    def make(made, **options):
        optimizer = AdamW(made, **options)
        optimizer.paging = mode
        return optimizer

    return make


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def same_state(one, other):
    left, right = one.state_dict()["state"], other.state_dict()["state"]
    return left.keys() == right.keys() and all(
        same(left[i].values(), right[i].values()) and left[i].keys() == right[i].keys()
        for i in left
    )


@pytest.mark.parametrize("bits", [32, 8])
def test_every_mode_has_the_same_bits(bits):
    start = parameters(SHAPES)
    grads = gradients(start, 5)
    resident, held = follow(AdamW, start, grads, state_bits=bits)
    streamed, other = follow(paged("explicit"), start, grads, state_bits=bits)
    assert same(streamed, resident)
    assert same_state(held, other)
    decayed, _ = follow(in_groups(AdamW), start, grads, state_bits=bits, weight_decay=0.1)
    streamed, _ = follow(
        in_groups(paged("explicit")), start, grads, state_bits=bits, weight_decay=0.1
    )
    assert same(streamed, decayed)
    assert not same(decayed, resident)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    moving = paged("auto")(made, state_bits=bits)
    for number, step in enumerate(grads):
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        if number in (0, 2, 3):  # before there is any state, and later
            moving.page_out()
            assert moving.report().optimizer_host_bytes == moving.state_bytes
        moving.step()
        report = moving.report()
        assert (report.optimizer_device_bytes, report.optimizer_host_bytes) == (
            moving.state_bytes,
            0,
        )
        assert report.paged_bytes == (moving.state_bytes if number in (0, 2, 3) else 0)
    assert same(made, resident)
    assert same_state(held, moving)


@pytest.mark.parametrize("before", ["off", "explicit", "auto"])
@pytest.mark.parametrize("after", ["off", "explicit", "auto"])
def test_a_run_goes_on_in_any_other_mode(before, after):
    start = parameters(SHAPES)
    grads = gradients(start, 6)
    straight, _ = follow(AdamW, start, grads, state_bits=8)
    middle, first = follow(paged(before), start, grads[:3], state_bits=8)

    def resumed(made, **options):
        optimizer = paged(after)(made, **options)
        optimizer.load_state_dict(first.state_dict())
        return optimizer

    end, _ = follow(resumed, middle, grads[3:], state_bits=8)
    assert same(end, straight)


def test_a_state_loaded_while_groups_are_fetched_is_what_counts():
    start = parameters(SHAPES)
    grads = gradients(start, 4)
    straight, _ = follow(AdamW, start, grads, state_bits=8)
    middle, first = follow(AdamW, start, grads[:2], state_bits=8)
    made = [torch.nn.Parameter(p.clone()) for p in middle]
    optimizer = paged("explicit")(made, state_bits=8)
    optimizer.prefetch()
    optimizer.load_state_dict(first.state_dict())
    for step in grads[2:]:
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        optimizer.prefetch()
        optimizer.step()
    assert same(made, straight)


@pytest.mark.parametrize("order", ["backward", "forward", "shuffled"])
@pytest.mark.parametrize("mode", ["off", "explicit"])
def test_layers_may_be_updated_one_by_one(order, mode):
    start = parameters(SHAPES)
    grads = gradients(start, 4)
    straight, _ = follow(AdamW, start, grads, state_bits=8)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = paged(mode)(made, state_bits=8)
    numbers = list(range(len(made)))
    generator = torch.Generator().manual_seed(0)
    for step in grads:
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        before = [p.detach().clone() for p in made]
        if order == "shuffled":
            numbers = torch.randperm(len(made), generator=generator).tolist()
        optimizer.prefetch()
        for i in numbers[::-1] if order == "backward" else numbers:
            optimizer.step_parameters([made[i]])
        assert not same(made, before)
        optimizer.step()
    assert same(made, straight)


def test_only_what_is_ready_is_updated():
    start = parameters(SHAPES)
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = paged("explicit")(made)
    for p, g in zip(made, gradients(start, 1)[0], strict=True):
        p.grad = g.clone()
    optimizer.step_parameters(made[4:])
    assert same(made[:4], start[:4])
    assert not torch.equal(made[-1], start[-1])
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(made, start, strict=True))


def test_groups_are_filled_and_whole():
    pieces = buckets.pieces_of(parameters(SHAPES), bits=32, master=False)
    assert max(piece.count for piece in pieces) <= 8192
    groups = buckets.groups_of(pieces)
    assert len(groups) > 3
    assert [piece for group in groups for piece in group.pieces] == pieces
    limit = min(40_000, sum(piece.nbytes for piece in pieces) // 8)
    for one, other in pairwise(groups):
        assert one.nbytes + other.pieces[0].nbytes > limit
    assert all(group.nbytes <= max(limit, max(p.nbytes for p in pieces)) for group in groups)


def test_how_much_is_on_the_device_is_known_before():
    start = parameters(SHAPES)
    for mode, usual, tight in (("off", 1, 1), ("auto", 1, 0), ("explicit", 0.5, 0.5)):
        made = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = paged(mode)(made)
        said = optimizer.device_bytes() / optimizer.state_bytes
        said_tight = optimizer.device_bytes(tight=True) / optimizer.state_bytes
        for p, g in zip(made, gradients(start, 1)[0], strict=True):
            p.grad = g.clone()
        optimizer.step()
        if mode != "off":
            assert optimizer.report().optimizer_device_bytes <= 1.2 * said * optimizer.state_bytes
        assert said <= usual
        assert said_tight <= tight
        assert said_tight == tight or mode == "explicit"


def test_on_a_cpu_there_is_nothing_to_page_from():
    for mode in ("explicit", "auto", "managed"):
        optimizer = AdamW([torch.nn.Parameter(torch.zeros(9))], paging=mode)
        assert optimizer.paging == "off"
        assert optimizer.describe().endswith("there is nothing to page from on cpu")
        assert optimizer.report() is None
    assert AdamW([torch.nn.Parameter(torch.zeros(9))]).describe().endswith("in the host's memory")
    with pytest.raises(ConfigError, match="paging must be one of"):
        AdamW([torch.nn.Parameter(torch.zeros(9))], paging="sometimes")


class FakeRuntime:
    """Answers as the CUDA runtime would, and notes what it was asked."""

    def __init__(self, **attributes):
        self.attributes = attributes

    def attribute(self, which, device):
        return self.attributes["managed" if which == 83 else "concurrent"]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"managed": 0, "concurrent": 0}, "no managed memory"),
        ({"managed": 1, "concurrent": 0}, "concurrentManagedAccess is 0, as under Windows, WSL"),
        ({"managed": 1, "concurrent": 1}, None),
    ],
)
def test_managed_paging_says_why_not(monkeypatch, attributes, reason):
    monkeypatch.setattr(managed, "runtime", lambda: FakeRuntime(**attributes))
    message = managed.why_not(torch.device("cuda", 0))
    assert message is None if reason is None else reason in message


@pytest.mark.parametrize("version", [12080, 13000])
def test_the_runtime_is_called_as_its_version_wants(version):
    calls = []

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments)) or 0

    runtime = managed.Runtime.__new__(managed.Runtime)
    runtime._library, runtime.version = Library(), version
    runtime.prefetch(4096, 512, managed.HOST, 7)
    runtime.advise(4096, 512, 3, 0)
    (prefetch, to_host), (advise, advice) = calls
    assert (prefetch, advise) == ("cudaMemPrefetchAsync", "cudaMemAdvise")
    assert (to_host[0].value, to_host[1].value, to_host[-1].value) == (4096, 512, 7)
    if version >= 13000:
        assert (to_host[2].type, to_host[3].value) == (2, 0)
        assert (advice[3].type, advice[3].id) == (1, 0)
    else:
        assert to_host[2].value == -1
        assert advice[3].value == 0


def test_what_the_runtime_reports_is_raised_in_its_words_and_forgotten():
    calls = []

    class Library:
        @staticmethod
        def cudaMallocManaged(*arguments):
            return 2

        @staticmethod
        def cudaGetErrorString(error):
            return b"out of memory"

        @staticmethod
        def cudaGetLastError():
            calls.append("cudaGetLastError")
            return 2

    runtime = managed.Runtime.__new__(managed.Runtime)
    runtime._library = Library()
    with pytest.raises(RuntimeError, match="cudaMallocManaged: out of memory"):
        runtime.allocate(512)
    assert calls == ["cudaGetLastError"]
