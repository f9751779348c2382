"""Packed head and embedding: the decoded matrix's numbers, whatever part of it is asked for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import probe
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.errors import ConfigError
from halfbyte.layers import cross_entropy
from halfbyte.layers.cross_entropy import head_loss
from halfbyte.layers.vocabulary import FrozenEmbedding, FrozenHead, decode_rows, pieces
from halfbyte.linear.lora import LoRAConfig, attach
from halfbyte.models.build import BaseRecipe, build, finalize, frozen_linears, load_tensor
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import BLOCK_SIZES, dequantize, quantize
from tests.checkpoint.families import SIZES
from tests.tiny import tiny_llama, tiny_tokenizer


def packed(rows, width, **recipe):
    generator = torch.Generator().manual_seed(rows + width)
    return quantize(torch.randn(rows, width, generator=generator), **recipe)


matrices = st.builds(
    packed,
    st.integers(1, 300),
    st.integers(1, 60).map(lambda half: 2 * half),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices, dtypes, st.data())
def test_rows_are_those_of_the_decoded_matrix(q, dtype, data):
    ids = torch.tensor(data.draw(st.lists(st.integers(0, q.shape[0] - 1), max_size=20)))
    ids = ids.to(torch.int64)[None]
    assert decode_rows(q, ids, dtype).equal(F.embedding(ids, dequantize(q, dtype)))


def test_many_rows_are_decoded_in_parts(monkeypatch):
    q = packed(300, 48, block_size=32)
    monkeypatch.setattr("halfbyte.layers.vocabulary._CHUNK", 100)
    assert decode_rows(q, torch.arange(300), torch.float32).equal(dequantize(q))


@pytest.mark.parametrize("wrong", [-1, 300])
def test_an_id_without_a_row_is_an_error(wrong):
    with pytest.raises(IndexError):
        decode_rows(packed(300, 64), torch.tensor([0, wrong]), torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices, dtypes, st.integers(1, 4000))
def test_pieces_put_together_are_the_decoded_matrix(q, dtype, nbytes):
    found = [(start, piece.clone()) for start, piece in pieces(q, dtype, nbytes)]
    assert torch.cat([piece for _, piece in found]).equal(dequantize(q, dtype))
    assert [start for start, _ in found] == [
        sum(len(piece) for _, piece in found[:i]) for i in range(len(found))
    ]


def test_pieces_are_no_larger_than_asked_for_where_blocks_allow_it():
    q = packed(4096, 64, double_quant=False)
    assert {piece.nbytes for _, piece in pieces(q, torch.float32, 2**16)} == {2**16}
    q = packed(4096, 64)  # a block of scales is 256 rows
    assert {piece.nbytes for _, piece in pieces(q, torch.float32, 100_000)} == {2**16}


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_over_a_packed_head_is_that_over_the_decoded_one(monkeypatch, softcap, dtype):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda *_: 16)
    monkeypatch.setattr(cross_entropy, "_chunk_bytes", lambda *_: 70_000)  # of 130 kB in bfloat16
    q = packed(1000, 64)
    torch.manual_seed(0)
    h = torch.randn(37, 64).to(dtype).requires_grad_()
    targets = torch.randint(0, 1000, (37,))
    got = head_loss(h, q, targets, softcap=softcap)
    wanted = head_loss(h, dequantize(q, dtype), targets, softcap=softcap)
    tight = dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5 if tight else 1e-3, atol=0)
    (one,) = torch.autograd.grad(got, h)
    (other,) = torch.autograd.grad(wanted, h)
    near = {"rtol": 1e-5, "atol": 1e-5} if tight else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(one, other, **near)


def filled(source, **recipe):
    model = build(source.config, BaseRecipe(**recipe))
    for name, tensor in source.state_dict().items():
        if name != "lm_head.weight" or not source.config.tie_word_embeddings:
            load_tensor(model, name, tensor)
    return model, finalize(model)


def ids(rows=2, length=21):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", ["quantize_head", "quantize_embeddings"])
def test_a_model_with_them_computes_with_the_decoded_matrices(tied, which):
    source = tiny_llama(tiny_tokenizer(), tied=tied)
    model, _ = filled(source, **{which: True})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, FrozenHead) == (tied or which == "quantize_head")
    assert isinstance(embedding, FrozenEmbedding) == (tied or which == "quantize_embeddings")
    reference = tiny_llama(tiny_tokenizer(), tied=tied)
    for name, linear in frozen_linears(model).items():
        reference.get_submodule(name).weight.data = linear.dense(torch.float32)
    torch.testing.assert_close(model(ids()).logits, reference(ids()).logits, rtol=1e-4, atol=1e-5)


def test_tied_matrices_are_one_and_are_counted_once():
    source = tiny_llama(tiny_tokenizer())
    model, report = filled(source, quantize_head=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.quantized.codes is embedding.quantized.codes
    assert model.halfbyte_recipe.quantize_embeddings
    linears = sum(q.numel for q in (m.quantized for m in frozen_linears(model).values()))
    assert report.quantized_parameters == linears - 400 * 64
    assert not any("embed" in name or "head" in name for name, *_ in report.kept)


def test_they_take_no_adapter():
    model, _ = filled(tiny_llama(tiny_tokenizer(), tied=False), quantize_head=True)
    names = attach(model, LoRAConfig(r=2, alpha=2.0), seed=0)
    assert len(names) == 14
    assert "lm_head" not in names
    with pytest.raises(ConfigError, match="lm_head"):
        attach(model, LoRAConfig(r=2, alpha=2.0, target_modules=("lm_head",)), seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_both_engines_train_over_them(tied):
    source = tiny_llama(tiny_tokenizer(), tied=tied)
    model, _ = filled(source, quantize_head=True, quantize_embeddings=True)
    attach(model, LoRAConfig(r=2, alpha=4.0), seed=0)
    engine = LayerEngine(model)
    probe(engine, 400, "cpu")
    batch = Batch(ids()[:, :-1], ids()[:, 1:])
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(step):
        for p in trained:
            p.grad = torch.zeros_like(p)
        return step([batch], 40.0, ActivationPolicy(1)), [p.grad for p in trained]

    one, mine = gradients(engine.step)
    other, theirs = gradients(AutogradEngine(model).step)
    torch.testing.assert_close(one, other)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert any(a.abs().max() > 0 for a in mine)


def test_an_embedding_that_does_more_is_refused():
    config = AutoConfig.for_model("gemma3_text", **SIZES | {"head_dim": 16})
    with pytest.raises(ConfigError, match=r"quantize_embeddings.*ScaledWordEmbedding.*leave"):
        build(config, BaseRecipe(quantize_embeddings=True))
    assert not isinstance(build(config, BaseRecipe()).get_input_embeddings(), FrozenEmbedding)


def test_a_plain_base_has_plain_ones():
    source = tiny_llama(tiny_tokenizer())
    model, _ = filled(source, quant="none", quantize_head=True)
    assert not model.halfbyte_recipe.quantize_head
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
