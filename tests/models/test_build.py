"""Building without memory, placing tensor by tensor, and the account at the end."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Phi3Config

from halfbyte.errors import CheckpointError, WeightError
from halfbyte.models.build import (
    BaseRecipe,
    MemoryReport,
    build,
    finalize,
    frozen_linears,
    load_tensor,
    memory_report,
    place_quantized,
)
from halfbyte.quant import quantize
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def source():
    return tiny_llama(tiny_tokenizer(), hidden=64)


def filled(source, recipe, skip=()):
    model = build(source.config, recipe)
    for name, tensor in source.state_dict().items():
        if name not in skip and not (
            name == "lm_head.weight" and source.config.tie_word_embeddings
        ):
            load_tensor(model, name, tensor)
    return model


def test_build_takes_no_memory(source):
    model = build(source.config, BaseRecipe())
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert len(frozen_linears(model)) == 2 * 7
    assert "lm_head" not in frozen_linears(model)


def test_a_plain_base_computes_what_transformers_computes(source):
    model = filled(source, BaseRecipe(quant="none"))
    finalize(model)
    ids = torch.randint(0, 400, (2, 33), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_packed_base_computes_with_the_decoded_weights(source, quant, double_quant):
    recipe = BaseRecipe(quant=quant, double_quant=double_quant, block_size=128)
    model = filled(source, recipe)
    report = finalize(model)
    reference = tiny_llama(tiny_tokenizer(), hidden=64)
    for name, linear in frozen_linears(model).items():
        assert linear.quantized.quant_type == quant
        assert linear.quantized.double_quant == double_quant
        reference.get_submodule(name).weight.data = linear.dense(torch.float32)
    ids = torch.randint(0, 400, (2, 33), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
    weights = sum(m.in_features * m.out_features for m in frozen_linears(model).values())
    assert report.quantized_parameters == weights
    assert report.quantized_bytes == sum(m.quantized.nbytes for m in frozen_linears(model).values())


def test_the_audit_lists_what_is_large_and_not_packed(source):
    config = LlamaConfig(**{**source.config.to_dict(), "vocab_size": 8000, "hidden_size": 64})
    model = build(config, BaseRecipe())
    for name, parameter in model.named_parameters():
        if not name.startswith("lm_head"):
            load_tensor(model, name, torch.ones(parameter.shape))
    for name, linear in frozen_linears(model).items():
        load_tensor(model, f"{name}.weight", torch.ones(linear.out_features, linear.in_features))
    report = finalize(model)
    assert report.kept == (("model.embed_tokens.weight", "float32", 8000 * 64 * 4),)
    norms = 5 * 64 * 4
    assert report.total_bytes == report.quantized_bytes + 8000 * 64 * 4 + norms
    assert any(
        "kept in float32: model.embed_tokens.weight, 2.0 MB" in row for row in report.lines()
    )


def test_tied_embeddings_stay_tied(source):
    model = filled(source, BaseRecipe())
    finalize(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_untied_embeddings_stay_apart():
    source = tiny_llama(tiny_tokenizer(), tied=False)
    model = filled(source, BaseRecipe())
    finalize(model)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_compute_dtype_holds_for_what_is_not_packed(source):
    model = filled(source, BaseRecipe(compute_dtype=torch.bfloat16))
    finalize(model)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {q.scale_scales.dtype for m in frozen_linears(model).values() if (q := m.quantized)} == {
        torch.float32
    }


def test_rotary_frequencies_are_computed(source):
    model = filled(source, BaseRecipe())
    finalize(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)


def test_longrope_buffers_are_computed():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=rope,
        pad_token_id=0,
    )
    model = build(config, BaseRecipe(quant="none"))
    for name, parameter in list(model.named_parameters()):
        load_tensor(model, name, torch.ones(parameter.shape))
    finalize(model)
    assert torch.isfinite(model.model.rotary_emb.inv_freq).all()


def test_what_never_came_is_named(source):
    model = filled(
        source, BaseRecipe(), skip={"model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    )
    with pytest.raises(
        CheckpointError, match=r"lacks .*layers\.1\.mlp\.up_proj.*model\.norm\.weight"
    ):
        finalize(model)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", (3, 4), r"requires shape \[128, 64\].*\[3, 4\]"),
        ("model.norm.weight", (63,), r"requires shape \[64\].*\[63\]"),
        ("model.layers.9.mlp.up_proj.weight", (3, 4), "does not have"),
        ("model.layers.0.mlp.up_proj.wait", (3, 4), "does not have"),
    ],
)
def test_what_does_not_fit_is_refused(source, name, shape, message):
    model = build(source.config, BaseRecipe())
    with pytest.raises(CheckpointError, match=message):
        load_tensor(model, name, torch.zeros(shape))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_named(source, name, value):
    model = build(source.config, BaseRecipe())
    tensor = source.state_dict()[name].clone()
    tensor.view(-1)[3] = value
    with pytest.raises(WeightError, match=name.replace(".", r"\.")):
        load_tensor(model, name, tensor)


def test_packed_bytes_are_taken_as_they_are(source):
    model = build(source.config, BaseRecipe())
    name = "model.layers.0.self_attn.k_proj"
    packed = quantize(source.get_submodule(name).weight, block_size=256)
    place_quantized(model, f"{name}.weight", packed)
    held = frozen_linears(model)[name].quantized
    assert held.block_size == 256
    assert held.codes.data_ptr() == packed.codes.data_ptr()
    with pytest.raises(CheckpointError, match="no linear layer"):
        place_quantized(model, "model.norm.weight", packed)
    with pytest.raises(CheckpointError, match="shape"):
        place_quantized(model, "model.layers.0.mlp.up_proj.weight", packed)


def test_a_configuration_that_is_no_language_model():
    from transformers import ViTConfig

    with pytest.raises(CheckpointError, match="not a causal language model"):
        build(ViTConfig(), BaseRecipe())


def test_of_a_plain_model_the_largest_are_named_and_the_rest_counted():
    kept = tuple((f"layer{i}", "bfloat16", 2_000_000 - i) for i in range(20))
    report = MemoryReport(0, 0, kept, 40_000_000)
    assert report.lines() == [
        "kept in bfloat16: layer0, 2.0 MB",
        "kept in bfloat16: layer1, 2.0 MB",
        "kept in bfloat16: layer2, 2.0 MB",
        "kept in bfloat16: layer3, 2.0 MB",
        "and 16 more, 32.0 MB",
        "base model in memory: 40.0 MB",
    ]


def test_experts_of_unknown_classes_are_reported() -> None:
    """LongCat's classes have experts that do nothing, DBRX stacks matrices in two dimensions."""
    ffn = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    dbrx = AutoConfig.for_model(
        "dbrx",
        d_model=64,
        n_heads=4,
        n_layers=2,
        vocab_size=400,
        ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
    )
    report = memory_report(build(dbrx, BaseRecipe()))
    assert report.expert_bytes == 2 * 3 * 4 * 32 * 64 * 4
    megabytes = f"{report.expert_bytes / 1e6:.1f} MB"
    assert f"experts that halfbyte cannot pack in this family: {megabytes}" in report.lines()
    mixtral = AutoConfig.for_model(
        "mixtral",
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    assert memory_report(build(mixtral, BaseRecipe())).expert_bytes == 0
