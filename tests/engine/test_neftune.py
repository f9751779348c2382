"""Noise on the embeddings: transformers' formula, the same in every engine and for every split."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.neftune import EmbeddingNoise, training_step
from halfbyte.engine.packing import Batch, Span, parts_of
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, gradients, model_of

ALPHA = 5.0
LENGTHS = (17, 11, 11, 5)


def embedding_of(width=64):
    """A model that is only an embedding of zeros, so that what comes out is the noise."""
    embedding = nn.Embedding(50, width)
    nn.init.zeros_(embedding.weight).requires_grad_(False)
    return SimpleNamespace(get_input_embeddings=lambda: embedding), embedding


def micro_batches(lengths, size):
    """Rows of these lengths, ``size`` to a micro-batch, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 50, (n,), generator=generator) for n in lengths]
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-100).roll(-1, 1)
        labels[:, -1] = -100
        found.append(Batch(ids, labels, [len(row) for row in part]))
    return found


def noises(noise, embedding, parts):
    """The noise of each document of a step, in its order, and that of padding."""
    found, padding = {}, []
    with training_step(None, noise, 7):
        for part in parts:
            noise.spans = part.spans
            rows = embedding(part.ids).flatten(0, 1)
            for document, start, tokens in part.spans:
                found[document] = rows[start : start + tokens].clone()
                rows[start : start + tokens] = 0.0
            padding.append(rows)
    return [found[document] for document in sorted(found)], torch.cat(padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula_of_transformers(dtype):
    """Its hook, drawing from a generator in the same state; a row that is not padded."""
    model, embedding = embedding_of()
    embedding.to(dtype)
    noise, ids = EmbeddingNoise(model, ALPHA, seed=4), torch.arange(23)[None]
    noise.spans = [Span(2, 0, 23)]
    states = []

    class Watched(torch.Generator):
        def manual_seed(self, seed):
            states.append(seed)
            return super().manual_seed(seed)

    with pytest.MonkeyPatch.context() as patch, training_step(None, noise, 1):
        patch.setattr(torch, "Generator", Watched)
        ours = embedding(ids)
    theirs = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
    with torch.random.fork_rng():
        torch.manual_seed(states[0])
        wanted = neftune_post_forward_hook(theirs, None, torch.zeros(1, 23, 64, dtype=dtype))
    assert torch.equal(ours, wanted)
    assert ours.any()


def test_it_is_uniform_up_to_its_size_in_each_document():
    model, embedding = embedding_of(width=512)
    lengths = (400, 25)
    found, padding = noises(
        EmbeddingNoise(model, ALPHA, seed=0),
        embedding,
        parts_of(micro_batches(lengths, 2), "cpu", pack=False),
    )
    assert padding.numel()
    assert not padding.any()
    for drawn, length in zip(found, lengths, strict=True):
        size, n = ALPHA / (length * 512) ** 0.5, drawn.numel()
        assert drawn.abs().max() <= size
        assert abs(float(drawn.mean())) < 4 * size / (3 * n) ** 0.5
        # Kolmogorov-Smirnov: the distance from the uniform distribution, at a level of 1e-4.
        ordered = (drawn.flatten().sort().values / size + 1) / 2
        distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max()
        assert float(distance) < 2.23 / n**0.5


def test_packing_and_other_micro_batches_change_nothing():
    model, embedding = embedding_of()
    noise = EmbeddingNoise(model, ALPHA, seed=0)
    (wanted, _) = noises(noise, embedding, parts_of(micro_batches(LENGTHS, 1), "cpu", pack=False))
    assert [len(one) for one in wanted] == list(LENGTHS)
    assert not torch.equal(wanted[1], wanted[2])  # of the same length
    for size, pack in ((2, False), (4, False), (2, True), (4, True)):
        parts = parts_of(micro_batches(LENGTHS, size), "cpu", pack=pack)
        found, padding = noises(noise, embedding, parts)
        assert not padding.any()
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


def test_it_is_a_function_of_seed_and_step():
    def drawn(seed, step):
        model, embedding = embedding_of()
        noise = EmbeddingNoise(model, ALPHA, seed)
        noise.spans = [Span(0, 0, 9)]
        with training_step(None, noise, step):
            return embedding(torch.arange(9)[None])

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))


def stepped(engine, model, batches, policy=None, *, noisy=True):
    if noisy and engine.noise is None:
        engine.noise = EmbeddingNoise(model, ALPHA, seed=0)
    for parameter in model.parameters():
        parameter.grad = None
    with training_step(engine.clock, engine.noise, 3):
        loss = engine.step(batches, 20.0, policy or ActivationPolicy())
    return loss, gradients(model)


@pytest.mark.parametrize("whole", [(), ("embed_tokens",)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_engines_agree_with_the_same_noise(family, whole):
    batches = micro_batches(LENGTHS, 2)
    model = model_of(FAMILIES[family], modules_to_save=whole)
    layerwise = LayerEngine(model)
    plain, _ = stepped(layerwise, model, batches, noisy=False)
    loss, own = stepped(layerwise, model, batches)
    assert abs(loss - plain) > 1e-4
    for policy in (ActivationPolicy(3), ActivationPolicy(1)):  # saved or recomputed: the same bits
        again, other = stepped(layerwise, model, batches, policy)
        assert torch.equal(loss, again)
        assert all(torch.equal(own[name], other[name]) for name in own)
    split, other = stepped(layerwise, model, micro_batches(LENGTHS, 4))
    torch.testing.assert_close(split, loss, rtol=1e-5, atol=0)
    # Outside of steps, as in an evaluation, there is none.
    torch.testing.assert_close(layerwise.loss(batches) / 20.0, plain, rtol=1e-6, atol=0)

    model = model_of(FAMILIES[family], modules_to_save=whole)
    other_loss, theirs = stepped(AutogradEngine(model), model, batches)
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    for name, grad in own.items():
        torch.testing.assert_close(grad, theirs[name], rtol=2e-3, atol=2e-6)
