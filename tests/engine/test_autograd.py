"""Steps under plain autograd: the base model in eval mode, its layers recomputed in backward."""

import pytest
import torch
from transformers import BioGptConfig, GPTJConfig, OPTConfig, XGLMConfig

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import batches_of, gradients, model_of, plain_step

IDS = dict(vocab_size=120, pad_token_id=1, bos_token_id=2, eos_token_id=3)
DROPOUT = dict(dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
MODELS = {
    "opt": OPTConfig(
        **IDS,
        **DROPOUT,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "xglm": XGLMConfig(
        **IDS, **DROPOUT, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, layerdrop=0.0
    ),
    "biogpt": BioGptConfig(
        **IDS,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
        activation_dropout=0.3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "gptj": GPTJConfig(
        **IDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        resid_pdrop=0.3,
        embd_pdrop=0.3,
        attn_pdrop=0.3,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_base_models_own_dropout_is_off(name):
    model = model_of(MODELS[name])
    batches = batches_of([(2, 17), (1, 9)])
    wanted = plain_step(model.eval(), batches, 20.0)
    true = gradients(model)
    engine = AutogradEngine(model)
    loss = engine.step(batches, 20.0, ActivationPolicy())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for path, gradient in gradients(model).items():
        assert true[path].norm() > 0
        assert (gradient - true[path]).norm() <= 1e-6 * true[path].norm(), path
    torch.testing.assert_close(engine.loss(batches) / 20.0, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_recomputed_in_steps_and_have_a_cache_in_generation(name):
    model = model_of(MODELS[name])
    engine, lengths = AutogradEngine(model), []
    # The first linear of the last layer: it sees every token that is computed there.
    linear = engine.model.get_decoder().layers[-1] if name != "gptj" else model.transformer.h[-1]
    linear = next(m for path, m in linear.named_modules() if path.endswith("q_proj"))
    linear.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    engine.step(batches_of([(2, 17)]), 20.0, ActivationPolicy())
    assert lengths == [17, 17]
    lengths.clear()
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4
        )
        assert lengths == [4, 1, 1, 1]
        logits = model(input_ids=answer[:, :-1], use_cache=False).logits
    # Greedily, each token is the likeliest after those before it; tokens that end it were barred.
    logits[..., 3] = -torch.inf
    assert answer[0, 4:].tolist() == logits[0, 3:].argmax(-1).tolist()


def test_a_second_engine_does_not_recompute_twice():
    model = model_of(MODELS["opt"])
    AutogradEngine(model)
    engine, calls = AutogradEngine(model), []
    layer = model.get_decoder().layers[-1]
    layer.fc1.register_forward_pre_hook(lambda *_: calls.append(1))
    engine.step(batches_of([(1, 5)]), 5.0, ActivationPolicy())
    assert len(calls) == 2
