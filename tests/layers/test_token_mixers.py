"""Hybrid models of transformers: documents in one row are as if alone, in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from benchmarks.family_configs import tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from halfbyte.layers import attention_interface, token_mixers
from halfbyte.layers.packed_row import NotPackable, packed_row

LENGTHS = (70, 3, 1, 7)
FAMILIES = [
    "qwen3_next",  # Gated DeltaNet
    "bailing_hybrid",  # the same with a decay per channel
    "granitemoehybrid",  # Mamba 2
    "falcon_h1",  # with attention in the same layer
    "zamba2",  # with shared layers
    "jamba",  # Mamba 1
    "mamba",  # no attention
    "lfm2_moe",  # short convolutions
]


class WideTorch:
    """torch, to a modelling module that says float32 where it means wide enough."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def causal(q, k, v, *, scale, lengths=(), window=None, sinks=None):
    """Ours rounds to float32."""
    assert window is None
    assert sinks is None
    documents = zip(*(x.split(list(lengths) or [x.shape[2]], 2) for x in (q, k, v)), strict=True)
    options = {"is_causal": True, "scale": scale, "enable_gqa": True}
    return torch.cat([F.scaled_dot_product_attention(*one, **options) for one in documents], 2)


def model_in_float64(family, monkeypatch):
    torch.manual_seed(0)
    config = tiny_config(family)
    config.num_hidden_layers = min(config.num_hidden_layers, 4)
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger than a fresh model's, so that every path matters
                parameter.mul_(4)
    if config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention_interface.NAME)
    token_mixers.register(model)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(attention_interface, "causal_attention", causal)
    for name in {type(module).__module__ for module in model.modules()}:
        if name.startswith("transformers.models."):
            monkeypatch.setattr(sys.modules[name], "torch", WideTorch())
    return model


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_row_are_as_if_alone(family, monkeypatch):
    model = model_in_float64(family, monkeypatch)
    documents = [torch.randint(3, 390, (1, n)) for n in LENGTHS]
    probes = [torch.randn(1, n, model.config.vocab_size, dtype=torch.float64) for n in LENGTHS]
    alone = []
    for ids, probe in zip(documents, probes, strict=True):
        alone.append(model(input_ids=ids, use_cache=False).logits)
        (alone[-1] * probe).sum().backward()
    wanted = gradients(model)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with packed_row(LENGTHS) as row:
        packed = torch.cat(documents, 1)
        logits = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        (logits * torch.cat(probes, 1)).sum().backward()
    assert row.scans
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, true in wanted.items():
        assert (found[name] - true).norm() <= 1e-9 * true.norm() + 1e-12, name


def test_outside_of_packed_rows_the_functions_are_as_they_were(monkeypatch):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_next"))
    token_mixers.register(model)
    function = qwen.causal_conv1d_fn
    token_mixers.register(model)
    assert qwen.causal_conv1d_fn is function  # once
    x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
    assert torch.equal(function(x, weight), function.__wrapped__(x, weight))


def test_what_a_function_cannot_keep_apart_is_an_error():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_next"))
    token_mixers.register(model)
    x, weight = torch.randn(1, 6, 9), torch.randn(6, 4)
    for lengths, given in (((4, 4), x), ((5, 4), torch.cat([x, x]))):
        with packed_row(lengths), pytest.raises(NotPackable, match="sees other tokens"):
            qwen.causal_conv1d_fn(given, weight)
    q, g = torch.randn(1, 9, 2, 4), torch.zeros(1, 9, 2)
    with packed_row((5, 4)), pytest.raises(NotPackable, match="state of the last document"):
        qwen.torch_chunk_gated_delta_rule(q, q, q, g, g, output_final_state=True)
