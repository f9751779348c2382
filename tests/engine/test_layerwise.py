"""The layer engine against plain autograd over transformers' own layers, family by family."""

import gc

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import choose_engine, probe
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_profile import saved_bytes
from halfbyte.engine.packing import Batch
from halfbyte.engine.recorded_layers import EngineError
from halfbyte.engine.rotary_tables import MOST_TABLES
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach, delta, dropout_clock
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor, stream_layers
from halfbyte.plan.policy import ActivationPolicy

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "phi3": Phi3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
}


def model_of(
    config,
    *,
    quant="nf4",
    dtype=torch.float32,
    r=4,
    dropout=0.0,
    use_dora=False,
    use_rslora=False,
    modules_to_save=(),
    store=None,
    **recipe,
):
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = build(config, BaseRecipe(quant=quant, compute_dtype=dtype, **recipe))
    if store is not None:
        stream_layers(model, store)
    tied = config.tie_word_embeddings
    for name, tensor in source.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            # Larger than a fresh model's, so that every path matters to the loss.
            load_tensor(model, name, tensor * 4 if tensor.dim() == 2 else tensor)
    finalize(model)
    lora = LoRAConfig(
        r=r,
        alpha=8,
        dropout=dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
        modules_to_save=modules_to_save,
    )
    attach(model, lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def batches_of(shapes, vocabulary=120):
    generator = torch.Generator().manual_seed(2)
    made = []
    for rows, length in shapes:
        ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
        labels = torch.randint(3, vocabulary, (rows, length), generator=generator)
        ignored = torch.rand((rows, length), generator=generator) < 0.4
        made.append(Batch(ids, labels.masked_fill(ignored, -100)))
    return made


def gradients(model):
    found = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    for parameter in adapter_parameters(model).values():
        parameter.grad = None
    return found


def plain_step(model, batches, normaliser):
    total = torch.zeros(())
    for batch in batches:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=-100
        )
        (loss / normaliser).backward()
        total += loss.detach() / normaliser
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_losses_and_gradients_are_plain_autograds(family, quant):
    model = model_of(FAMILIES[family], quant=quant)
    engine, reason = choose_engine(model, "cpu")
    assert isinstance(engine, LayerEngine), reason
    batches = batches_of([(2, 17), (1, 9)])
    wanted = plain_step(model, batches, 20.0)
    true = gradients(model)
    got = engine.step(batches, 20.0, ActivationPolicy(3))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        scale = true[name].abs().max()
        assert scale > 0, name
        assert (gradient - true[name]).abs().max() <= 1e-5 * max(1.0, float(scale)), name


WHOLE = [("embed_tokens",), ("lm_head",), ("norm",), ("embed_tokens", "lm_head", "norm")]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("names", WHOLE)
@pytest.mark.parametrize("tied", [True, False])
def test_modules_trained_whole_get_the_gradients_of_plain_autograd(family, names, tied):
    """Over transformers' own model: its parameters trained, the adapters' update in its weights."""
    settings = FAMILIES[family].to_dict() | {"tie_word_embeddings": tied}
    config = type(FAMILIES[family]).from_dict(settings)
    model = model_of(config, modules_to_save=names)
    engine, reason = choose_engine(model, "cpu")
    assert isinstance(engine, LayerEngine), reason
    batches = batches_of([(2, 17), (1, 9)])
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            held = getattr(module, leaf)
            parameter.copy_(held if held is not None else module.dense(torch.float32))
            if getattr(module, "adapter", None) is not None:
                parameter.add_(delta(module))
    wanted = plain_step(theirs, batches, 20.0)
    true = {name: p.grad for name, p in theirs.named_parameters()}
    got = engine.step(batches, 20.0, ActivationPolicy(1))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    whole = {name: g for name, g in gradients(model).items() if ".lora_" not in name}
    assert whole.keys() == {n for n in true if n.removesuffix(".weight").endswith(names)}
    for name, gradient in whole.items():
        scale = float(true[name].abs().max())
        assert scale > 0, name
        assert (gradient - true[name]).abs().max() <= 1e-5 * max(1.0, scale), name
    plain = AutogradEngine(model).step(batches, 20.0, ActivationPolicy(0))
    torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        if name in whole:
            scale = max(1.0, float(true[name].abs().max()))
            assert (gradient - true[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_is_kept_changes_no_bit(dtype, dropout):
    names = WHOLE[-1] if dropout else ()
    model = model_of(FAMILIES["llama"], dtype=dtype, dropout=dropout, modules_to_save=names)
    engine = LayerEngine(model)
    dropout_clock(model).running = True
    batches = batches_of([(2, 17), (1, 9), (3, 70)])
    results = []
    for saved in range(4):
        loss = engine.step(batches, 20.0, ActivationPolicy(saved))
        results.append((loss, gradients(model)))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(found[name], one) for name, one in results[0][1].items())


def test_a_weight_is_decoded_once_a_direction_and_step():
    model = model_of(FAMILIES["llama"])
    engine = LayerEngine(model)
    weights = sum(len(layer) for layer in engine.linears)
    assert weights == 3 * 7
    for count in (1, 5):
        before = engine.weights.decodes
        engine.step(batches_of([(1, 9)] * count), 20.0, ActivationPolicy(1))
        # The last layer's are still there when backward begins with it.
        assert engine.weights.decodes - before == 2 * weights - 7
    before = engine.weights.decodes
    engine.loss(batches_of([(1, 9)] * 5))
    assert engine.weights.decodes - before == weights


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_decoded_weights_that_stay_change_no_bit_and_are_decoded_once(kept):
    model = model_of(FAMILIES["llama"])
    engine, batches = LayerEngine(model), batches_of([(2, 17), (1, 9)])
    wanted, true = engine.step(batches, 20.0, ActivationPolicy(1)), gradients(model)
    engine.keep_decoded(kept)
    assert engine.decoded_bytes == 4 * sum(m.quantized.numel for m in engine.linears[-1])
    for _ in range(2):
        before = engine.weights.decodes
        assert torch.equal(engine.step(batches, 20.0, ActivationPolicy(1)), wanted)
        found = gradients(model)
        assert all(torch.equal(found[name], one) for name, one in true.items())
        # The last layer is one of them.
        assert engine.weights.decodes - before == 2 * 7 * (3 - kept)
    engine.keep_decoded(0)
    before = engine.weights.decodes
    assert torch.equal(engine.step(batches, 20.0, ActivationPolicy(1)), wanted)
    assert engine.weights.decodes - before == 2 * 3 * 7 - 7


def test_a_plain_base_has_nothing_to_decode():
    assert LayerEngine(model_of(FAMILIES["llama"], quant="none")).decoded_bytes == 0


def test_right_padding_changes_nothing():
    model = model_of(FAMILIES["gemma3"])
    engine = LayerEngine(model)
    (short,) = batches_of([(1, 11)])
    pad = torch.zeros(1, 20, dtype=torch.int64)
    padded = Batch(torch.cat([short.input_ids, pad], 1), torch.cat([short.labels, pad - 100], 1))
    one = engine.step([short], 5.0, ActivationPolicy(3))
    first = gradients(model)
    other = engine.step([padded], 5.0, ActivationPolicy(3))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, first[name], rtol=1e-4, atol=1e-6)


def test_loss_is_the_loss_of_a_step():
    model = model_of(FAMILIES["llama"])
    engine = LayerEngine(model)
    batches = batches_of([(2, 17), (1, 9)])
    stepped = engine.step(batches, 1.0, ActivationPolicy(3))
    torch.testing.assert_close(engine.loss(batches), stepped, rtol=1e-5, atol=1e-5)


def test_layers_below_the_lowest_adapter_are_still_right():
    """Adapters on the last layer only: the layers before it want no gradient of their own."""
    model = model_of(FAMILIES["llama"])
    for name, module in model.named_modules():
        if getattr(module, "adapter", None) is not None and "layers.2" not in name:
            module.adapter = None
    engine = LayerEngine(model)
    batches = batches_of([(2, 17)])
    plain_step(model, batches, 5.0)
    true = gradients(model)
    engine.step(batches, 5.0, ActivationPolicy(2))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-4, atol=1e-6)


def test_another_architecture_trains_one_way_or_the_other():
    """GPT-NeoX: parallel residuals, biases, layer norm; whichever engine takes it is right."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = {key: SIZES[key] for key in keys} | {"num_attention_heads": 4}
    model = model_of(GPTNeoXConfig(**config))
    engine, reason = choose_engine(model, "cpu")
    assert ("layer engine" in reason) == isinstance(engine, LayerEngine)
    batches = batches_of([(2, 17), (1, 9)])
    wanted = plain_step(model, batches, 20.0)
    true = gradients(model)
    got = engine.step(batches, 20.0, ActivationPolicy(0))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-3, atol=1e-5)


def test_a_decoder_that_cannot_be_taken_apart_is_announced_and_trains_all_the_same(monkeypatch):
    model = model_of(FAMILIES["llama"])
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x * 1.5)
    changed = model.model.norm
    engine = LayerEngine(model)
    engine.norm = torch.nn.Identity()
    with pytest.raises(EngineError, match="the loss of a probe is"):
        probe(engine, 120, "cpu")
    model.model.norm = None
    model.model.odd_name = changed
    chosen, reason = choose_engine(model, "cpu")
    assert isinstance(chosen, AutogradEngine)
    assert "not possible: no single final norm" in reason


@pytest.mark.parametrize(
    ("names", "count"), [(("norm",), 0), (("1.input_layernorm",), 0), (WHOLE[0], 3)]
)
def test_layers_whose_norms_are_trained_are_not_fused(names, count):
    assert LayerEngine(model_of(FAMILIES["llama"], modules_to_save=names), fuse=True).fused == count


@pytest.mark.parametrize("lengths", [[[64, 64], [64]], [[17, 9, 3], [30], [1, 2]]])
def test_documents_in_shared_parts_give_the_same_step(lengths, monkeypatch):
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    monkeypatch.setattr("halfbyte.engine.buckets.PART_TOKENS", 150)
    model = model_of(FAMILIES["qwen3"])
    batches = [
        Batch(*batch[:2], lengths=rows)
        for rows, batch in zip(
            lengths, batches_of([(len(r), max(r)) for r in lengths]), strict=True
        )
    ]
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            batch.labels[row, length:] = -100
    plain = LayerEngine(model)
    wanted = plain.step(batches, 20.0, ActivationPolicy(1))
    true = gradients(model)
    engine = LayerEngine(model, fuse=True)
    parts = engine.make_parts(batches)
    assert len(parts) == (2 if lengths[0][0] == 64 else 1)
    got = engine.step(batches, 20.0, ActivationPolicy(1))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(engine.loss(batches), 20 * wanted, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients(model).items():
        assert (gradient - true[name]).norm() <= 1e-5 * true[name].norm(), name


def test_a_step_longer_than_the_window_is_run_by_transformers_layers(monkeypatch):
    model = model_of(FAMILIES["mistral"])  # its window is 8
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    engine = LayerEngine(model, fuse=True)
    assert engine.fused == 3
    for length, given in ((8, 3), (9, 0)):
        batch = Batch(*batches_of([(2, length)])[0][:2])
        (layer_input,) = engine.embed(engine.make_parts([batch]))
        assert len(layer_input.layer_args) == given  # two rotary tables and where documents begin
    engine.make_parts([batch])
    (note,) = engine.messages  # told, and told once
    assert "longer than the attention window" in note


def test_an_embedding_that_layers_see_by_other_ways_too_trains_under_plain_autograd(monkeypatch):
    model = model_of(FAMILIES["llama"], modules_to_save=("embed_tokens",))
    assert isinstance(choose_engine(model, "cpu")[0], LayerEngine)
    turn = model.model.rotary_emb.forward

    def turned(x, **kwargs):
        return tuple(part + 0 * x.mean() for part in turn(x, **kwargs))

    monkeypatch.setattr(model.model.rotary_emb, "forward", turned)
    engine, reason = choose_engine(model, "cpu")
    assert isinstance(engine, AutogradEngine)
    assert "goes into them by other ways" in reason


def test_plain_engine_gives_the_same_step():
    model = model_of(FAMILIES["llama"])
    layered, plain = LayerEngine(model), AutogradEngine(model)
    batches = batches_of([(2, 17), (1, 9)])
    one = layered.step(batches, 20.0, ActivationPolicy(3))
    first = gradients(model)
    other = plain.step(batches, 20.0, ActivationPolicy(0))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, first[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(plain.loss(batches), layered.loss(batches))


def inputs(engine, batch):
    return engine.embed(engine.make_parts([batch]))


def test_measuring_leaves_nothing_behind():
    engine = LayerEngine(model_of(FAMILIES["llama"]), fuse=True)
    (batch,) = batches_of([(2, 16)])
    counts = []
    gc.disable()
    try:
        for _ in range(3):
            saved_bytes(engine, *inputs(engine, batch))
            counts.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[1] == counts[2]


def test_saved_bytes_are_what_autograd_keeps():
    model = model_of(FAMILIES["llama"])
    engine = LayerEngine(model)
    (small, large) = batches_of([(1, 16), (2, 16)])
    saved, kept = saved_bytes(engine, *inputs(engine, large))
    assert kept == 2 * 16 * 32 * 4
    # At least what the seven products need: x three times, gate, up and down's input, twice r.
    assert saved > 2 * 16 * 4 * (3 * 32 + 3 * 48)
    assert saved_bytes(engine, *inputs(engine, small))[0] < saved


def test_rotary_tables_of_a_few_lengths_are_kept_and_change_nothing():
    model = model_of(FAMILIES["llama"])
    engine = LayerEngine(model, fuse=True)
    lengths = range(3, 3 + 2 * MOST_TABLES)
    first = [engine.loss(batches_of([(1, length)])) for length in lengths]
    assert len(engine._tables.cached) == MOST_TABLES
    assert list(engine._tables.cached) == list(lengths)[MOST_TABLES:]
    again = [LayerEngine(model, fuse=True).loss(batches_of([(1, length)])) for length in lengths]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("saved", [0, 1])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_inputs_of_every_nth_layer_change_no_bit(family, fuse, saved, every):
    """Of three layers; dropout's masks are those of the layer and the step, too."""
    results = []
    for policy in (ActivationPolicy(saved), ActivationPolicy(saved, every=every)):
        model = model_of(FAMILIES[family], dropout=0.3)
        engine = LayerEngine(model, fuse=fuse)
        engine.clock.running = True
        loss = engine.step(batches_of([(2, 17), (1, 9)]), 20.0, policy)
        results.append((loss, gradients(model)))
    (loss, true), (got, found) = results
    assert torch.equal(loss, got)
    for name, gradient in found.items():
        assert torch.equal(gradient, true[name]), name


def test_every_nth_layer_counts_from_the_first_that_is_trained():
    results = []
    for policy in (ActivationPolicy(), ActivationPolicy(every=2)):
        model = model_of(FAMILIES["llama"])
        for name, parameter in adapter_parameters(model).items():
            parameter.requires_grad_(".layers.0." not in name)
        engine = LayerEngine(model)
        assert engine.first_trained == 1
        loss = engine.step(batches_of([(1, 9)]), 20.0, policy)
        grads = {n: p.grad for n, p in adapter_parameters(model).items() if p.grad is not None}
        results.append((loss, grads))
    (loss, true), (got, found) = results
    assert torch.equal(loss, got)
    assert found.keys() == true.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, true[name]), name
