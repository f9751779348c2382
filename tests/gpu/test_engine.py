"""The engine on a GPU: what makes it fast or small changes rounding at most, or not even that."""

import pytest
import torch

from halfbyte.engine.buckets import Buckets
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.forward_backward import Passes
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.neftune import EmbeddingNoise, training_step
from halfbyte.engine.packing import Batch, lengths_of
from halfbyte.layers.cross_entropy import head_logps, head_loss
from halfbyte.layers.vocabulary import HostEmbedding, embedding_to_host
from halfbyte.linear.group import LinearGroup
from halfbyte.linear.lora import adapter_parameters
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.runtime.precision import deterministic
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of
from tests.engine.test_objective import Unlikelihood

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KNOWN = ("llama", "mistral", "qwen2", "qwen3")


def on_gpu(family, dtype=torch.bfloat16, **options):
    return model_of(FAMILIES[family], dtype=dtype, **options).to("cuda")


def examples(lengths, seed=2):
    batches = []
    for rows in lengths:
        (batch,) = batches_of([(len(rows), max(rows))])
        ids = (batch.input_ids + seed) % 117 + 3
        labels = batch.labels.clone()
        for row, length in enumerate(rows):
            labels[row, length:] = -100
        batches.append(Batch(ids, labels, rows))
    return batches


def zero(model):
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)


def taken(model):
    found = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    for parameter in adapter_parameters(model).values():
        parameter.grad.zero_()
    return found


def engines(model, batches, policy):
    """One that launches every kernel, and one whose passes are graphs; with the same parts."""
    plain = LayerEngine(model, fuse=True)
    fast = LayerEngine(model, fuse=True, graphs=True)
    assert ", CUDA graphs" in fast.summary()
    plain.buckets = fast.buckets = Buckets.of([lengths_of(batches)], 32)
    fast.keep_decoded(policy.decoded)
    fast.capture(policy)
    assert fast.num_graphs == len(fast.buckets.shapes)
    return plain, fast


MIXED = [[70, 33, 8], [64, 5]]
EQUAL = [[64, 64], [64, 64]]


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("lengths", [[[8, 5, 3], [7]], EQUAL])
def test_fused_and_packed_is_transformers_layers_but_for_rounding(family, lengths):
    if family == "mistral" and lengths == EQUAL:
        pytest.skip("longer than its window of 8, so not fused")
    batches = examples(lengths)
    exact_model = model_of(FAMILIES[family], dtype=torch.float32).to("cuda")
    exact_loss = LayerEngine(exact_model).step(batches, 50.0, ActivationPolicy(1))
    exact = gradients(exact_model)
    errors = []
    for fuse in (False, True):
        model = on_gpu(family)
        loss = LayerEngine(model, fuse=fuse).step(batches, 50.0, ActivationPolicy(1))
        assert float(loss) == pytest.approx(float(exact_loss), rel=2e-2)
        got = gradients(model)
        errors.append(
            sum((got[n] - exact[n]).norm() ** 2 for n in exact) ** 0.5
            / sum(g.norm() ** 2 for g in exact.values()) ** 0.5
        )
    assert errors[1] <= 1.2 * errors[0] + 1e-3, errors


@pytest.mark.parametrize("lengths", [MIXED, EQUAL])
@pytest.mark.parametrize(("offloaded", "attention"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("saved", [0, 1])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_graphs_and_the_host_change_no_bit(family, lengths, offloaded, attention, saved):
    model = on_gpu(family)
    zero(model)
    policy = ActivationPolicy(saved, offloaded, attention)
    plain, fast = engines(model, examples(lengths), policy)
    for seed in range(4):
        batches = examples(lengths, seed)
        wanted = plain.step(batches, 50.0, ActivationPolicy(saved))
        true = taken(model)
        got = fast.step(batches, 50.0, policy)
        assert torch.equal(got, wanted), seed
        for name, gradient in taken(model).items():
            assert torch.equal(gradient, true[name]), (seed, name)
    assert not fast.messages


@pytest.mark.parametrize("lengths", [MIXED, EQUAL])
def test_noise_on_the_embeddings_is_the_same_in_graphs_and_packed(lengths):
    model = on_gpu("llama")
    zero(model)
    plain, fast = engines(model, examples(lengths), ActivationPolicy(3))
    quiet = plain.step(examples(lengths), 50.0, ActivationPolicy(3))
    taken(model)
    plain.noise = fast.noise = EmbeddingNoise(model, 5.0, seed=0)
    for step in range(3):
        batches = examples(lengths)
        with training_step(None, plain.noise, step):
            wanted = plain.step(batches, 50.0, ActivationPolicy(3))
            true = taken(model)
            assert torch.equal(fast.step(batches, 50.0, ActivationPolicy(3)), wanted)
        assert not torch.equal(wanted, quiet)
        for name, gradient in taken(model).items():
            assert torch.equal(gradient, true[name]), (step, name)
    assert torch.equal(plain.step(examples(lengths), 50.0, ActivationPolicy(3)), quiet)
    # Layer by layer, and row by row, it is the same noise.
    unpacked = LayerEngine(model)
    unpacked.noise = plain.noise
    with training_step(None, plain.noise, 2):
        assert float(unpacked.step(batches, 50.0, ActivationPolicy(3))) == pytest.approx(
            float(wanted), rel=2e-2
        )


@pytest.mark.parametrize("kept", [1, 3])
def test_decoded_weights_that_stay_change_no_bit_with_graphs(kept):
    model = on_gpu("llama")
    zero(model)
    plain, fast = engines(model, examples(EQUAL), ActivationPolicy(3))
    for seed in range(6):
        if seed == 3:  # after graphs were captured without
            fast.keep_decoded(kept)
            assert fast.num_graphs == 0
            fast.capture(ActivationPolicy(3, decoded=kept))
        batches = examples(EQUAL, seed)
        wanted = plain.step(batches, 50.0, ActivationPolicy(3))
        true = taken(model)
        assert torch.equal(fast.step(batches, 50.0, ActivationPolicy(3)), wanted), seed
        for name, gradient in taken(model).items():
            assert torch.equal(gradient, true[name]), (seed, name)
    assert not fast.messages
    assert fast.num_graphs == 1


def test_parts_of_several_sizes_share_their_graphs_memory():
    """The largest decides; smaller ones are captured into what it left."""
    model = on_gpu("llama")
    zero(model)
    steps = [[[90] * n] for n in (8, 6, 3, 1)]
    plain = LayerEngine(model, fuse=True)
    fast = LayerEngine(model, fuse=True, graphs=True)
    plain.buckets = fast.buckets = Buckets.of([step[0] for step in steps], 1 << 20)
    assert len(fast.buckets.shapes) == 4
    torch.cuda.empty_cache()
    fast.capture(ActivationPolicy(3))
    assert fast.num_graphs == 4
    for seed, lengths in enumerate([*steps, *steps[::-1]]):
        batches = examples(lengths, seed)
        wanted = plain.step(batches, 50.0, ActivationPolicy(3))
        true = taken(model)
        assert torch.equal(fast.step(batches, 50.0, ActivationPolicy(3)), wanted), seed
        for name, gradient in taken(model).items():
            assert torch.equal(gradient, true[name]), (seed, name)
    assert not fast.messages


def test_lora_activations_are_computed_once_and_no_bit_changes(monkeypatch):
    monkeypatch.setattr("halfbyte.engine.buckets.PART_TOKENS", 150)
    made, original = [], LinearGroup.into_a

    def counted(self, rows, cast_adapters):
        made.append(not self.has_lora_activation)
        return original(self, rows, cast_adapters)

    monkeypatch.setattr(LinearGroup, "into_a", counted)
    model, batches = on_gpu("qwen3"), examples(EQUAL)
    zero(model)
    plain, fast = engines(model, batches, ActivationPolicy(0))
    parts = len(plain.make_parts(batches))
    assert parts > 1
    made.clear()
    wanted = plain.step(batches, 50.0, ActivationPolicy(3))
    true = taken(model)
    assert made == [True] * (3 * 4 * parts)
    made.clear()
    assert torch.equal(plain.step(batches, 50.0, ActivationPolicy(0)), wanted)
    assert sorted(made) == sorted([True, False] * (3 * 4 * parts))
    taken(model)
    made.clear()
    for again in range(2):
        assert torch.equal(fast.step(batches, 50.0, ActivationPolicy(0)), wanted)
        for name, gradient in taken(model).items():
            assert torch.equal(gradient, true[name]), (again, name)
    assert not made
    assert not fast.messages


def test_gradients_add_up_in_a_graph_as_they_do_without():
    model = on_gpu("llama")
    zero(model)
    batches = examples(EQUAL)
    once, fast = engines(model, batches, ActivationPolicy(0))
    for _ in range(3):
        fast.step(batches, 50.0, ActivationPolicy(0))
    assert not fast.messages
    three = taken(model)
    once.step(batches, 50.0, ActivationPolicy(0))
    for name, gradient in taken(model).items():
        torch.testing.assert_close(three[name], 3 * gradient, rtol=1e-2, atol=1e-6)


def test_gradients_that_were_replaced_are_seen():
    model = on_gpu("llama")
    zero(model)
    batches = examples(EQUAL)
    _, fast = engines(model, batches, ActivationPolicy(0))
    results = []
    for _ in range(4):
        fast.step(batches, 50.0, ActivationPolicy(0))
        results.append(gradients(model))  # leaves None behind
    assert not fast.messages
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0
        assert all(torch.equal(gradient, other[name]) for other in results[1:])


def test_what_the_host_decides_is_not_captured():
    for options, reason in (
        ({"dropout": 0.1}, "dropout"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ("embed_tokens",)}, "embedding"),
    ):
        engine, message = choose_engine(on_gpu("llama", **options), "cuda")
        assert isinstance(engine, LayerEngine)
        assert f"no CUDA graphs: {reason}" in message.replace("the embedding", "embedding"), message


def test_nothing_is_remembered_of_the_dry_run():
    """DoRA's norms, for one, which are kept as long as the adapter is as it was."""
    results = []
    for chosen in (False, True):
        model = on_gpu("llama", use_dora=True)
        engine = LayerEngine(model, fuse=True)
        if chosen:
            engine, _ = choose_engine(model, "cuda", graphs=False, lengths=[[9, 4, 3]])
        loss = engine.step(examples([[9, 4], [3]]), 20.0, ActivationPolicy(1))
        results.append((loss, gradients(model)))
    (loss, true), (got_loss, got) = results
    assert torch.equal(got_loss, loss)
    assert all(torch.equal(gradient, true[name]) for name, gradient in got.items())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.2}])
def test_these_are_right_all_the_same(options):
    results = []
    for fuse in (False, True):
        model = on_gpu("llama", torch.float32, **options)
        engine = LayerEngine(model, fuse=fuse, graphs=fuse)
        engine.clock.running = True
        loss = engine.step(examples([[9, 4], [3]]), 20.0, ActivationPolicy(1))
        results.append((float(loss), gradients(model)))
    (loss, true), (got_loss, got) = results
    assert got_loss == pytest.approx(loss, rel=1e-4)
    for name, gradient in got.items():
        assert (gradient - true[name]).norm() <= 1e-3 * true[name].norm() + 1e-6, name


def test_an_embedding_on_the_host_gives_the_same_rows():
    table = torch.randn(1000, 300, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(0, 1000, (3, 70), device="cuda")
    host = HostEmbedding(table)
    assert not host.weight.is_cuda
    assert torch.equal(host(ids), table[ids])
    assert torch.equal(host(ids.cpu()), table[ids].cpu())
    model = on_gpu("llama")
    zero(model)
    batches = examples(MIXED)
    plain = LayerEngine(model, fuse=True)
    plain.buckets = Buckets.of([lengths_of(batches)], 32)
    wanted = plain.step(batches, 50.0, ActivationPolicy(0))
    assert embedding_to_host(model) == 120 * 32 * 2
    assert model.device.type == "cuda"
    _, fast = engines(model, batches, ActivationPolicy(0))
    for _ in range(3):
        assert torch.equal(fast.step(batches, 50.0, ActivationPolicy(0)), wanted)
    assert not fast.messages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("size", [40, 32000, 128256])
def test_the_loss_is_no_further_from_the_truth_than_the_plain_one(
    dtype, softcap, size, monkeypatch
):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(600, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
    head = torch.randn(size, 64, generator=generator, device="cuda").to(dtype) / 4
    targets = torch.randint(0, size, (600,), generator=generator, device="cuda")
    results = []
    for given, weight in (
        (hidden, head),
        (hidden.detach().double().requires_grad_(), head.double()),
    ):
        loss = head_loss(given, weight, targets, softcap=softcap)
        results.append((loss.double(), torch.autograd.grad(loss, given)[0].double()))
    monkeypatch.setattr("halfbyte.layers.cross_entropy._kernels", lambda *_: None)
    loss = head_loss(hidden, head, targets, softcap=softcap)
    plain = torch.autograd.grad(loss, hidden)[0].double()
    (got, slope), (true, exact) = results
    assert abs(got - true) <= 1.1 * abs(loss - true) + 1e-4 * true
    assert (slope - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_of_log_probabilities_has_the_gradient_of_the_loss(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(600, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
    head = torch.randn(32000, 64, generator=generator, device="cuda").to(dtype) / 4
    targets = torch.randint(0, 32000, (600,), generator=generator, device="cuda")
    logps, loss = head_logps(hidden, head, targets), head_loss(hidden, head, targets)
    torch.testing.assert_close(-logps.sum(), loss, rtol=1e-6, atol=0)
    (one,), (other,) = torch.autograd.grad(-logps.sum(), hidden), torch.autograd.grad(loss, hidden)
    assert torch.equal(one, other)


def test_another_objective_is_the_same_with_graphs():
    model, batches = on_gpu("llama"), examples(MIXED)
    zero(model)
    plain, fast = engines(model, batches, ActivationPolicy(1))
    cross_entropy = plain.step(batches, 50.0, ActivationPolicy(1))
    taken(model)
    plain.objective = fast.objective = Unlikelihood()
    wanted = plain.step(batches, 50.0, ActivationPolicy(1))
    true = taken(model)
    assert wanted != cross_entropy
    assert all(gradient.any() for gradient in true.values())
    assert torch.equal(fast.step(batches, 50.0, ActivationPolicy(1)), wanted)
    assert all(torch.equal(gradient, true[name]) for name, gradient in taken(model).items())
    assert fast.num_graphs == len(fast.buckets.shapes)


def test_a_pass_that_cannot_be_captured_is_told_and_run_all_the_same(monkeypatch):
    model = on_gpu("llama")
    zero(model)
    engine = LayerEngine(model, fuse=True, graphs=True)
    batches = examples(EQUAL)
    wanted = engine.step(batches, 50.0, ActivationPolicy(1))
    true = taken(model)
    backward = Passes.backward

    def waits(self, layer_inputs, grads, on_layer_backward=None):
        torch.cuda.synchronize()
        backward(self, layer_inputs, grads, on_layer_backward)

    monkeypatch.setattr(Passes, "backward", waits)
    engine.buckets = Buckets.of([lengths_of(batches)], 32)
    engine.capture(ActivationPolicy(1))
    assert engine.num_graphs == 0
    assert "no CUDA graphs from here on" in engine.messages[0]
    assert torch.equal(engine.step(batches, 50.0, ActivationPolicy(1)), wanted)
    assert all(torch.equal(g, true[name]) for name, g in taken(model).items())
    assert torch.rand(3, device="cuda").shape == (3,)


@pytest.mark.parametrize("lengths", [[[900, 300], [700]], [[1024, 1024], [1024, 1024]]])
def test_in_a_fixed_order_everything_repeats(lengths):
    """Long enough for attention's backward to add in several programs."""
    larger = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 2048}
    shape = type(FAMILIES["llama"]).from_dict(FAMILIES["llama"].to_dict() | larger)
    losses = []
    for _ in range(2):
        model = model_of(shape, dtype=torch.bfloat16).to("cuda")
        engine, _ = choose_engine(model, "cuda")
        engine.buckets = Buckets.of([lengths_of(examples(lengths))], 512)
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
        zero(model)
        with deterministic():
            engine.capture(ActivationPolicy(0))
            for seed in range(6):
                batches = examples(lengths, seed)
                losses.append(float(engine.step(batches, 50.0, ActivationPolicy(0))))
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        assert not engine.messages
    assert losses[:6] == losses[6:]
    assert losses[0] != losses[1]
