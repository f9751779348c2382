"""Paging's streams without a GPU: whatever order they allow, the bytes are the same.

Streams and events are stood in for by queues. The host fills them, and now and then a random one
whose head is not a wait goes on; a copy or an update reads and writes when its turn comes, not when
it was asked for. So a wait that is missing shows as other bits, for some seed.
"""

import random
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

from halfbyte.optim import AdamW, buckets, paging
from tests.optim.problems import gradients, parameters

SHAPES = [(64, 100), (17,), (5000,), (70, 200), (4096,), (3000,), (), (90, 100)]


class Mark:
    """A place in a stream; ``reached`` once all before it is done."""

    reached = False

    def __call__(self):
        self.reached = True


class Wait(NamedTuple):
    """For a place in another stream."""

    mark: Mark


class Event:
    """What waits for it waits for its last record at that time, or for nothing."""

    mark = None

    def record(self, stream):
        self.mark = Mark()
        stream.queue.append(self.mark)

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 0.0


class Stream:
    """Tasks in their order, and waits among them."""

    def __init__(self, machine):
        self.queue, self.machine = deque(), machine
        self.haste = machine.random.random() ** 8  # some hardly go on while others can
        machine.streams.append(self)

    def wait_event(self, event):
        if event.mark is not None:
            self.queue.append(Wait(event.mark))

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)

    def ready(self):
        while self.queue and isinstance(self.queue[0], Wait) and self.queue[0].mark.reached:
            self.queue.popleft()
        return bool(self.queue) and not isinstance(self.queue[0], Wait)

    def synchronize(self):
        while self.queue:
            self.machine.advance()


class Machine(TorchFunctionMode):
    """All streams; while it is entered, copies that do not block are queued."""

    def __init__(self, seed):
        super().__init__()
        self.random, self.streams = random.Random(seed), []
        self.current = Stream(self)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and kwargs == {"non_blocking": True}:
            self.queue(lambda: func(*args))
            return args[0]
        return func(*args, **(kwargs or {}))

    def queue(self, task):
        self.current.queue.append(task)
        for _ in range(self.random.choice((0, 0, 1, 3))):  # the host is ahead
            self.advance()

    @torch.no_grad()
    def advance(self):
        if ready := [stream for stream in self.streams if stream.ready()]:
            (one,) = self.random.choices(ready, [stream.haste for stream in ready])
            one.queue.popleft()()


@pytest.fixture(params=range(8))
def machine(request, monkeypatch):
    """Stands for a GPU, with many small groups."""
    made = Machine(request.param)
    update = AdamW._update

    class Slot(paging._Slot):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.came, self.updated, self.left = Event(), Event(), Event()

    class Streamed(paging.Streamed):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self._inward, self._outward = Stream(made), Stream(made)

        def page_in(self):
            if made.random.random() < 0.5:  # else there is no room
                super().page_in()

    monkeypatch.setattr(buckets, "PIECE_ELEMENTS", 4096)
    monkeypatch.setattr(buckets, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(paging, "_event", lambda **_: Event())
    monkeypatch.setattr(paging, "current_stream", lambda device: made.current)
    monkeypatch.setattr(paging, "_Slot", Slot)
    monkeypatch.setattr("halfbyte.optim.adamw.Streamed", Streamed)
    monkeypatch.setattr(AdamW, "_update", lambda *a: made.queue(lambda: update(*a)))
    return made


def run(machine, mode, early):
    """Returns what every forward saw of the parameters, and the state at the end."""
    made = [torch.nn.Parameter(p) for p in parameters(SHAPES)]
    for p in made:
        p.grad = torch.zeros_like(p)
    optimizer, seen = AdamW(made, state_bits=8), []
    optimizer.paging = mode
    with machine:
        for number, step in enumerate(gradients(made, 8)):
            if number in (1, 2, 4, 5, 6):
                optimizer.page_out()
            else:
                optimizer.prefetch()
            for p, g in zip(made[::-1], step[::-1], strict=True):
                p.grad.copy_(g, non_blocking=True)
                if early:
                    optimizer.step_parameters([p])
            optimizer.step()
            if number == 7:
                machine.current.synchronize()
                state = optimizer.state_dict()["state"]
            for p in made:
                seen.append(torch.full_like(p, torch.nan).detach())
                seen[-1].copy_(p.detach(), non_blocking=True)
        machine.current.synchronize()
    return seen, state


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("mode", ["explicit", "auto"])
def test_any_order_that_streams_allow_has_the_resident_bits(machine, mode, early):
    seen, state = run(machine, "off", False)
    paged, paged_state = run(machine, mode, early)
    assert all(torch.equal(one, other) for one, other in zip(paged, seen, strict=True))
    for i, fields in state.items():
        assert all(torch.equal(value, paged_state[i][name]) for name, value in fields.items())
