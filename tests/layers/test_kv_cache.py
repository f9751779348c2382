"""The cache: what a new token attends to, against float64, plain and by the interpreted kernels."""

import os

import pytest
import torch

from halfbyte.layers import kv_cache
from halfbyte.layers.kv_cache import KVCache

triton_kv_cache = pytest.importorskip("halfbyte.layers.triton_kv_cache", exc_type=ImportError)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests these",
)
MODULES = {
    "plain": (kv_cache.plain_turn_and_store, kv_cache.plain_attend_cached),
    "kernels": (triton_kv_cache.turn_and_store, triton_kv_cache.attend_cached),
}
WAYS = ["plain", pytest.param("kernels", marks=interpreted)]
# Query heads, heads of keys, width: all alike, groups, one group, odd widths.
HEADS = [(4, 4, 16), (6, 2, 64), (9, 3, 24), (20, 1, 8), (2, 2, 128)]
CAPACITY = 192
POSITIONS = [0, 1, 63, 64, 130, 191]


def drawn(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(q, keys, values, positions, scale, window):
    """One slot and head at a time, in float64."""
    slots, q_heads, width = q.shape
    out = torch.empty(slots, q_heads, width, dtype=torch.float64)
    for slot in range(slots):
        stop = int(positions[slot]) + 1
        start = 0 if window is None else max(0, stop - window)
        for head in range(q_heads):
            group = head // (q_heads // keys.shape[1])
            k = keys[slot, group, start:stop].double()
            weights = torch.softmax(k @ q[slot, head].double() * scale, 0)
            out[slot, head] = weights @ values[slot, group, start:stop].double()
    return out.flatten(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_over_the_cache_is_the_definition(way, heads, window, dtype):
    q_heads, groups, width = heads
    slots, scale = len(POSITIONS), 0.7 * width**-0.5
    # Columns of a wider product, as a step has them.
    q = drawn(slots, q_heads * width + 32, dtype=dtype, seed=0)[:, : q_heads * width]
    q = q.unflatten(1, (q_heads, width))
    keys = drawn(slots, groups, CAPACITY, width, dtype=dtype, seed=1)
    values = drawn(slots, groups, CAPACITY, width, dtype=dtype, seed=2)
    positions = torch.tensor(POSITIONS)
    for slot, position in enumerate(POSITIONS):  # of an earlier sequence, and huge
        keys[slot, :, position + 1 :] = 1e4
        values[slot, :, position + 1 :] = 1e4
    wanted = exact(q, keys, values, positions, scale, window)
    got = MODULES[way][1](q, keys, values, positions, scale, window)
    assert got.dtype == dtype
    # A weight rounded to the dtype, and a result: two roundings of what is added up.
    largest = exact(q, keys, values.abs(), positions, scale, window)
    bound = 4 * torch.finfo(dtype).eps * largest
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", HEADS)
def test_new_tokens_are_turned_and_stored_where_they_belong(way, heads):
    q_heads, groups, width = heads
    slots, dtype = len(POSITIONS), torch.float32
    whole = drawn(slots, (q_heads + 2 * groups) * width, dtype=dtype, seed=3)
    q, k, v = (
        part.view(slots, -1, width)
        for part in torch.split(whole, [q_heads * width, groups * width, groups * width], 1)
    )
    angles = torch.rand(CAPACITY, width // 2, generator=torch.Generator().manual_seed(4)) * 6
    turn = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    keys = torch.full((slots, groups, CAPACITY, width), torch.nan)
    values, positions = keys.clone(), torch.tensor(POSITIONS)

    def turned(x):
        wide = torch.complex(*x.double().chunk(2, -1))
        wide = wide * torch.polar(torch.ones(()).double(), angles.double()[positions])[:, None]
        return torch.cat([wide.real, wide.imag], -1)

    wanted_q, wanted_k, stored_v = turned(q), turned(k), v.clone()
    got = MODULES[way][0](q, k, v, turn, positions, keys, values)
    torch.testing.assert_close(got.double(), wanted_q, rtol=1e-5, atol=1e-5)
    for slot, position in enumerate(POSITIONS):
        torch.testing.assert_close(
            keys[slot, :, position].double(), wanted_k[slot], rtol=1e-5, atol=1e-5
        )
        assert torch.equal(values[slot, :, position], stored_v[slot])
    written = slots * groups * width
    assert int((~keys.isnan()).sum()) == int((~values.isnan()).sum()) == written


def test_prompts_are_stored_and_stay_when_the_cache_grows():
    cache = KVCache(2, 3, 2, 8, 4, torch.float32, torch.device("cpu"))
    k, v = (drawn(5, 2, 4, dtype=torch.float32, seed=seed) for seed in (5, 6))
    cache.store(1, k, v, torch.tensor([2, 2, 0, 0, 0]), torch.tensor([0, 1, 0, 1, 2]))
    cache.grow(16)
    assert cache.capacity == 16
    assert torch.equal(cache.keys[1, 2, :, :2], k[:2].transpose(0, 1))
    assert torch.equal(cache.values[1, 0, :, :3], v[2:].transpose(0, 1))
    assert int(cache.keys.count_nonzero()) == k.numel()
    assert not cache.keys[0].any()
