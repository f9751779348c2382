"""Parts hold every token of a step once, with its neighbours, its position and its label."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine import buckets
from halfbyte.engine.packing import Batch, parts_of


def batches_of(lengths):
    """Micro-batches whose tokens are all different."""
    made, token = [], 1
    for rows in lengths:
        ids = torch.zeros(len(rows), max(rows), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, length in enumerate(rows):
            ids[row, :length] = torch.arange(token, token + length)
            labels[row, : length - 1] = ids[row, 1:length]
            labels[row, 0 : length // 3] = -100
            token += length
        made.append(Batch(ids, labels, rows))
    return made


def documents_of(part):
    """The (tokens, positions, labels) of each document."""
    labels = torch.full((part.ids.numel(),), -100)
    labels[part.rows] = part.targets
    if part.documents is None:
        width = part.ids.shape[1]
        rows = zip(part.ids, labels.view_as(part.ids), strict=True)
        return [(i.tolist(), list(range(width)), k.tolist()) for i, k in rows]
    cu_seqlens = part.documents.cu_seqlens.tolist()
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == part.ids.shape[1]
    return [
        (part.ids[0, a:b].tolist(), part.positions[0, a:b].tolist(), labels[a:b].tolist())
        for a, b in pairwise(cu_seqlens)
    ]


@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_every_document_is_in_one_part_as_it_was(lengths):
    batches = batches_of(lengths)
    wanted = [
        (ids[:n].tolist(), list(range(n)), labels[:n].tolist())
        for batch in batches
        for ids, labels, n in zip(*batch[:3], strict=True)
    ]
    made = parts_of(batches, "cpu", pack=True)
    found = [document for part in made for document in documents_of(part)]
    filler = [d for d in found if d[0] and not any(d[0])]
    assert [d for d in found if any(d[0])] == wanted
    assert all(set(d[2]) == {-100} and d[1] == list(range(len(d[1]))) for d in filler)
    for part in made:
        assert part.ids.shape[1] % 64 == 0
        assert all(len(document[0]) <= part.max_seqlen for document in documents_of(part))


@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([60, 100, 8192]),
)
@settings(max_examples=60, deadline=None)
def test_segments_are_the_documents_numbers_in_the_step(lengths, pack, part_tokens):
    batches, owner = batches_of(lengths), {}
    rows = [(ids, n) for batch in batches for ids, n in zip(batch[0], batch[2], strict=True)]
    for number, (ids, n) in enumerate(rows):
        owner |= dict.fromkeys(ids[:n].tolist(), number)
    shapes = buckets.Buckets.of([[n for _, n in rows]], 32, part_tokens)
    for chosen in (None, shapes):
        for part in parts_of(batches, "cpu", pack=pack, buckets=chosen, segments=True):
            tokens = part.ids.flatten()[part.rows].tolist()
            assert part.segments.tolist() == [owner[token] for token in tokens]
            assert part.segments.data_ptr() % 16 == 0
    assert all(part.segments is None for part in parts_of(batches, "cpu", pack=pack))


def test_parts_are_no_longer_than_they_help(monkeypatch):
    """Three at least for 395 tokens; each has what is one document more than another's at most."""
    monkeypatch.setattr(buckets, "PART_TOKENS", 150)
    made = parts_of(batches_of([[64, 64, 64], [200], [3]]), "cpu", pack=True)
    assert [tuple(part.ids.shape) for part in made] == [(1, 256), (2, 64), (1, 128)]
    assert [part.documents is None for part in made] == [False, True, False]
    found = [[len(d[0]) for d in documents_of(part) if any(d[0])] for part in made]
    assert found == [[200], [64, 64], [64, 3]]


def test_equal_steps_have_equal_shapes():
    one, other, longer = (
        parts_of(batches_of(lengths), "cpu", pack=True)[0].shape
        for lengths in ([[100, 50], [20]], [[90, 40], [30]], [[100, 90], [80]])
    )
    assert one == other
    assert one != longer


def test_steps_of_any_lengths_have_few_shapes():
    generator = torch.Generator().manual_seed(0)
    shapes, tokens, filled = set(), 0, 0
    for _ in range(300):
        lengths = torch.randint(100, 500, (8,), generator=generator).tolist()
        (part,) = parts_of(batches_of([lengths]), "cpu", pack=True)
        shapes.add(part.shape)
        tokens += sum(lengths)
        filled += part.ids.numel()
    assert len(shapes) <= 12
    assert filled < 1.08 * tokens


def test_without_packing_a_micro_batch_stays_what_it_is():
    (batch,) = batches_of([[5, 3]])
    (part,) = parts_of([batch], "cpu", pack=False)
    assert part.documents is None
    assert torch.equal(part.ids, batch.input_ids)
    assert torch.equal(part.targets, batch.labels[batch.labels != -100])
    assert torch.equal(part.positions, torch.arange(5)[None])
