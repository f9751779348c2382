"""The attention that transformers' modules call: within packed rows, and what it refuses there."""

import pytest
import torch

from halfbyte.layers import attention_interface
from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.layers.packed_row import NotPackable, packed_row
from tests.layers.test_attention_cpu import LENGTHS, inputs


def test_a_packed_row_is_what_transformers_asks_for_or_an_error():
    q, k, v = (x.detach() for x in inputs(1, 2, 2, sum(LENGTHS), 8, torch.float32))
    module = torch.nn.Module()
    wanted = causal_attention(q, k, v, scale=0.3, lengths=LENGTHS).transpose(1, 2)
    with packed_row(LENGTHS) as row:
        assert attention_interface._mask(local_size=500) is None
        assert attention_interface._mask(local_size=200, use_vmap=False) is None
        out, _ = attention_interface._interface(module, q, k, v, None, scaling=0.3)
        assert torch.equal(out, wanted)
        assert (row.attention_calls, row.window) == (1, 200)
        for options in ({"softcap": 30.0}, {"s_aux": q}, {"dropout": 0.1}, {"is_causal": False}):
            with pytest.raises(NotPackable, match="not plain causal"):
                attention_interface._interface(module, q, k, v, None, scaling=0.3, **options)
        with pytest.raises(NotPackable, match="sees other tokens"):
            attention_interface._interface(module, q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None)
        with pytest.raises(NotPackable, match="longer than its attention window of 100 tokens"):
            attention_interface._mask(local_size=100)
        with pytest.raises(NotPackable, match="a mask of its own"):
            attention_interface._mask(use_vmap=True)
    out, _ = attention_interface._interface(module, q, k, v, None, scaling=0.3)
    assert not torch.equal(out, wanted)


def test_values_of_another_width_are_attended_to_by_document():
    q, k, v = (x.detach() for x in inputs(1, 4, 2, sum(LENGTHS), 8, torch.float32))
    v = v[..., :6]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    with packed_row(LENGTHS):
        found, _ = attention_interface._interface(module, q, k, v, None, scaling=0.3)
    first = 0
    for length in LENGTHS:
        one = [x[:, :, first : first + length] for x in (q, k, v)]
        wanted, _ = attention_interface._interface(module, *one, None, scaling=0.3)
        torch.testing.assert_close(found[:, first : first + length], wanted)
        first += length
