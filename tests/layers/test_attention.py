"""Which GPUs attend to documents that share a row, and how the others attend."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.layers import attention
from halfbyte.layers.attention import can_pack, for_each_head
from halfbyte.runtime import device as devices
from tests.devices import DEVICES

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", DEVICES)
def test_documents_share_rows_where_there_is_flash_attention(monkeypatch, name):
    spec = DEVICES[name]
    monkeypatch.setattr(devices, "spec_of", lambda _: spec)
    monkeypatch.setattr(attention, "_over_sequences", lambda: (None, {}))
    ampere = name not in ("t4", "v100")
    for dtype in (torch.float16, torch.bfloat16):
        assert can_pack(dtype, CUDA, 128) == ampere
        assert can_pack(dtype, CUDA, 192) == ampere
        # Of GeForce cards a block has too little shared memory for so wide a head's backward.
        assert can_pack(dtype, CUDA, 256) == (name in ("a100", "h100", "h200", "b200"))
        assert not can_pack(dtype, CUDA, 288)
        assert not can_pack(dtype, CUDA, 100)
    assert not can_pack(torch.float32, CUDA, 128)


def test_nothing_is_packed_on_a_cpu_or_without_torchs_attention(monkeypatch):
    assert not can_pack(torch.float16, torch.device("cpu"), 128)
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES["h100"])
    monkeypatch.setattr(attention, "_over_sequences", lambda: None)
    assert not can_pack(torch.float16, CUDA, 128)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_copies_for_each_head_are_attended_to_as_groups_are(groups):
    torch.manual_seed(0)
    q = torch.randn(2, 7, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 7, groups, 8, requires_grad=True) for _ in range(2))

    def attended(k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return out, torch.autograd.grad(out.square().sum(), [q, *leaves])

    leaves = [k, v]
    wanted, true = attended(k, v)
    got, mine = attended(for_each_head(k, 4), for_each_head(v, 4))
    torch.testing.assert_close(got, wanted)
    for one, other in zip(mine, true, strict=True):
        torch.testing.assert_close(one, other)
