"""Every document of a step is dealt out once, and the processes get about equally many tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.engine.dealing import deal, divided, own_batches, portions
from halfbyte.engine.packing import Batch, lengths_of, parts_of

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 6), st.integers(0, 10))
def test_each_document_is_dealt_out_once_and_evenly(lengths, processes, step):
    hands = deal(lengths, processes, step)
    assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
    tokens = [sum(lengths[index] for index in hand) for hand in hands]
    # Graham's bound, against a lower bound on the best possible.
    best = max(*lengths, -(-sum(lengths) // processes))
    assert max(tokens) <= (4 / 3) * best + max(lengths) / 3
    assert hands == deal(lengths, processes, step)


def test_the_longest_document_goes_to_another_process_in_each_step():
    lengths = [5, 100, 7]
    places = [[1 in hand for hand in deal(lengths, 3, step)].index(True) for step in range(4)]
    assert places == [0, 1, 2, 0]


def test_there_may_be_more_processes_than_documents():
    assert sorted(deal([3, 4], 4)) == [[], [], [0], [1]]


def test_micro_batches_have_the_longest_documents_first():
    assert divided([3, 9, 1, 4], lambda longest: 2) == [[1, 3], [0, 2]]
    assert divided([3, 9, 1, 4], lambda longest: 12 // longest) == [[1], [3, 0, 2]]


def step_of(lengths, rows=2):
    """The micro-batches of a step whose documents have their numbers as tokens."""
    batches = []
    for first in range(0, len(lengths), rows):
        own = lengths[first : first + rows]
        ids = torch.zeros(len(own), max(own), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, n in enumerate(own):
            ids[row, :n] = first + row + 1
            labels[row, : n - 1] = first + row + 1
        batches.append(Batch(ids, labels, own))
    return batches


def test_documents_keep_their_tokens_labels_and_numbers():
    batches = step_of([9, 8, 6, 5, 3])
    seen = {}
    for rank in range(2):
        own = own_batches(batches, rank, 2, 0, rows=lambda longest: 2)
        assert all(len(batch.input_ids) <= 2 for batch in own)
        for part in parts_of(own, "cpu", pack=True) + parts_of(own, "cpu", pack=False):
            for document, start, tokens in part.spans:
                ids = part.ids.flatten()[start : start + tokens]
                assert set(ids.tolist()) == {document + 1}
                seen[document] = tokens
        for batch in own:
            for row, n in enumerate(batch.lengths):
                assert (batch.labels[row, n - 1 :] == -100).all()
                assert (batch.labels[row, : n - 1] == batch.input_ids[row, : n - 1]).all()
    assert seen == {0: 9, 1: 8, 2: 6, 3: 5, 4: 3}


def test_whole_micro_batches_keep_their_numbers():
    batches = step_of([9, 8, 6, 5, 3])
    units = [[0, 1], [2, 3], [4]]
    found = {}
    for rank in range(2):
        own = own_batches(batches, rank, 2, 0, rows=lambda longest: 2, units=units)
        for packed in (True, False):
            for part in parts_of(own, "cpu", pack=packed) if own else ():
                found[part.number] = [span.document for span in part.spans]
    assert found == {0: [0, 1], 1: [2, 3], 2: [4]}


def test_plans_are_of_the_shares_of_all_processes():
    steps = [([9, 8, 6, 5], None), ([4], None)]
    shapes, lengths = portions(steps, 2, lambda longest: 2)
    assert sorted(lengths) == [[4], [8, 6], [9, 5]]
    assert sorted(shapes) == [[(1, 4)], [(2, 8)], [(2, 9)]]
    for step, (each, _) in enumerate(steps):
        own = [own_batches(step_of(each), r, 2, step, rows=lambda longest: 2) for r in range(2)]
        assert all(lengths_of(one) in lengths for one in own if one)
