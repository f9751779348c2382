"""Other losses than cross entropy: their gradients through the engines are plain PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.objective import CrossEntropy, Objective
from halfbyte.engine.packing import Batch
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, gradients, model_of

LENGTHS = [[17, 9, 3], [30], [12, 12], [1, 2]]
DOCUMENTS = sum(map(len, LENGTHS))


class Unlikelihood(Objective):
    """−Σ log(1 − p): every token by itself."""

    def loss(self, logps, segments):
        return -torch.log1p(-logps.exp()).sum()


class Preference(Objective):
    """−Σ log sigmoid(β sᵢ (log p(document i) − reference)): each token's depends on its others."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.references = -20 * torch.rand(DOCUMENTS, generator=generator)
        self.signs = torch.tensor([1.0, -1.0] * DOCUMENTS)[:DOCUMENTS]

    def count_terms(self, batches):
        return sum(len(batch.input_ids) for batch in batches)

    def loss(self, logps, segments):
        sums = torch.zeros(DOCUMENTS).index_add(0, segments, logps)
        there = torch.zeros(DOCUMENTS).index_fill(0, segments, 1.0)
        return -(there * F.logsigmoid(0.1 * self.signs * (sums - self.references))).sum()


class Adjacent(Preference):
    """Pairs of documents, the even one preferred to the odd one; only where both are."""

    separable = False

    def loss(self, logps, segments):
        assert len(self.references) % 2 == 0
        sums = (-self.references).index_add(0, segments, logps).view(-1, 2)
        there = torch.zeros(DOCUMENTS).index_fill(0, segments, 1.0).view(-1, 2).prod(1)
        return -(there * F.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1]))).sum()


class General(CrossEntropy):
    """Cross entropy by the way of all other objectives."""

    needs_segments = True
    loss_of_hidden, loss_of_logits = Objective.loss_of_hidden, Objective.loss_of_logits


def step_of(lengths=LENGTHS):
    """Return micro-batches of documents of these lengths, right padded, some tokens supervised."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for rows in lengths:
        ids = torch.randint(3, 120, (len(rows), max(rows)), generator=generator)
        labels = torch.randint(3, 120, ids.shape, generator=generator)
        ignored = torch.rand(ids.shape, generator=generator) < 0.4
        ignored[:, 0] = False  # each has one that counts
        ignored |= torch.arange(max(rows)) >= torch.tensor(rows)[:, None]
        batches.append(Batch(ids, labels.masked_fill(ignored, -100), rows))
    return batches


def true_step(model, batches, objective, normaliser):
    """The objective over transformers' own forward, document by document, all at once."""
    logps, segments = [], []
    for batch in batches:
        for ids, labels, length in zip(*batch[:3], strict=True):
            logits = model(input_ids=ids[None, :length], use_cache=False).logits[0].float()
            number = len(segments)
            labels = labels[:length]
            own = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
            logps.append(own[labels != -100])
            segments.append(torch.full((len(logps[-1]),), number))
    loss = objective.loss(torch.cat(logps), torch.cat(segments)) / normaliser
    loss.backward()
    return loss.detach()


def engines(model, monkeypatch):
    """Return an engine of each kind, by name; the packed one divides a step into several parts."""
    monkeypatch.setattr("halfbyte.engine.layerwise.can_pack", lambda *_: True)
    monkeypatch.setattr("halfbyte.engine.buckets.PART_TOKENS", 40)
    return {
        "packed": LayerEngine(model, fuse=True),
        "unpacked": LayerEngine(model),
        "autograd": AutogradEngine(model),
    }


@pytest.mark.parametrize("kind", ["packed", "unpacked", "autograd"])
@pytest.mark.parametrize("objective", [Unlikelihood, Preference, General])
@pytest.mark.parametrize("whole", [(), ("lm_head",)])
def test_gradients_are_those_of_plain_pytorch(monkeypatch, kind, objective, whole):
    model = model_of(FAMILIES["qwen3"], modules_to_save=whole)
    engine = engines(model, monkeypatch)[kind]
    engine.objective, batches = objective(), step_of()
    wanted = true_step(model, batches, engine.objective, 5.0)
    true = gradients(model)
    if kind == "packed":
        parts = engine.make_parts(batches, engine.objective)
        assert len(parts) == 3
        # A part has documents of several micro-batches, not in the order of the step.
        assert sorted(set(parts[0].segments.tolist())) != list(range(len(set(parts[0].segments))))
    for saved in (0, 3):
        got = engine.step(batches, 5.0, ActivationPolicy(saved))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model).items():
            assert true[name].norm() > 0
            assert (gradient - true[name]).norm() <= 2e-5 * true[name].norm(), name
    got = engine.loss(batches, engine.objective)
    torch.testing.assert_close(got, 5 * wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["packed", "unpacked", "autograd"])
def test_pairs_stay_in_one_part(monkeypatch, kind):
    model = model_of(FAMILIES["qwen3"])
    engine, batches = engines(model, monkeypatch)[kind], step_of([[17, 9, 3, 2], [30, 12]])
    monkeypatch.setattr("tests.engine.test_objective.DOCUMENTS", 6)
    objective = Adjacent()
    assert getattr(engine, "packs", False) == (kind == "packed")
    torch.testing.assert_close(
        engine.loss(batches, objective), true_step(model, batches, objective, 1.0)
    )
    true = gradients(model)
    engine.objective = objective
    engine.step(batches, 1.0, ActivationPolicy(1))
    assert not getattr(engine, "packs", False)
    for name, gradient in gradients(model).items():
        assert (gradient - true[name]).norm() <= 2e-5 * true[name].norm(), name
    # Evaluated is what is asked for, whatever is trained.
    plain = LayerEngine(model).loss(batches)
    torch.testing.assert_close(engine.loss(batches), plain, rtol=1e-6, atol=0)


def test_cross_entropy_is_minimised_unless_another_is_set(monkeypatch):
    """And its segments are not made."""
    model, batches = model_of(FAMILIES["qwen3"]), step_of()
    wanted = true_step(model, batches, CrossEntropy(), 20.0)
    true = gradients(model)
    for engine in engines(model, monkeypatch).values():
        assert type(engine.objective) is CrossEntropy
        if isinstance(engine, LayerEngine):
            assert all(part.segments is None for part in engine.make_parts(batches))
        got = engine.step(batches, 20.0, ActivationPolicy(1))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model).items():
            assert (gradient - true[name]).norm() <= 2e-5 * true[name].norm(), name


def test_terms_are_supervised_tokens_unless_an_objective_counts_others():
    batches = step_of()
    assert CrossEntropy().count_terms(batches) == sum(int((b.labels >= 0).sum()) for b in batches)
    assert Preference().count_terms(batches) == DOCUMENTS


def test_cross_entropy_of_log_probabilities_is_minus_their_sum():
    logps = torch.tensor([-1.0, -2.5])
    assert CrossEntropy().loss(logps, torch.tensor([0, 1])) == 3.5
