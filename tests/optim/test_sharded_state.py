"""One optimizer state for several processes: who updates what, and when it is that of one step."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.optim import AdamW
from halfbyte.optim.buckets import groups_of, pieces_of
from halfbyte.optim.sharded_state import SharedState


def shared(count):
    """Views of one memory, as processes have."""
    memory = {}

    def allocate(nbytes):
        return memory.setdefault(nbytes, torch.zeros(nbytes, dtype=torch.uint8))

    return [SharedState(rank, count, allocate) for rank in range(count)]


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=30), st.integers(1, 9))
def test_each_bucket_has_one_process(sizes, count):
    parameters = [torch.empty(size, device="meta") for size in sizes]
    buckets = groups_of(pieces_of(parameters, bits=8, master=False), count)
    ranges = [one.own(buckets) for one in shared(count)]
    assert sorted(number for own in ranges for number in own) == list(range(len(buckets)))
    total, largest = sum(one.nbytes for one in buckets), max(one.nbytes for one in buckets)
    for own in ranges:
        assert sum(buckets[number].nbytes for number in own) <= total / count + largest


def test_several_make_the_updates_of_one():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in (5000, 40, 9000, 7)]

    def parameters():
        return [torch.nn.Parameter(one.clone()) for one in start]

    alone, both = parameters(), [parameters(), parameters()]
    one = AdamW(alone, state_bits=8)
    several = [
        AdamW(own, state_bits=8, shared=state) for own, state in zip(both, shared(2), strict=True)
    ]
    for optimizer in several:
        optimizer.allocate()
    for _ in range(3):
        gradients = [torch.randn(len(p), generator=generator) for p in alone]
        for own in (alone, *both):
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient.clone()
        one.step()
        assert several[0].is_whole
        several[0].step()
        assert not several[0].is_whole  # the other has not come so far
        several[1].step()
        assert several[0].is_whole
        assert several[1].is_whole
        updated = [optimizer.updated_parts() for optimizer in several]
        assert all(updated)
        with torch.no_grad():  # what the caller does: see train/data_parallel.py
            for giver, taker in ((0, 1), (1, 0)):
                numbers = {id(p): number for number, p in enumerate(both[giver])}
                for parameter, part in updated[giver]:
                    both[taker][numbers[id(parameter)]][part] = parameter[part]
    for own, optimizer in zip(both, several, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, alone, strict=True))
        states = one.state_dict()["state"], optimizer.state_dict()["state"]
        for number in range(len(alone)):
            for name, value in states[0][number].items():
                assert torch.equal(states[1][number][name], value), name
