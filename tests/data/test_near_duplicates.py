"""MinHash against exact Jaccard similarities of all pairs."""

import numpy as np
import pytest

from halfbyte.data.near_duplicates import near_duplicates


def document(generator: np.random.Generator, length: int) -> np.ndarray:
    return generator.integers(0, 30_000, length).astype(np.int32)


def triples(tokens: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(tokens[at : at + 3].tolist()) for at in range(len(tokens) - 2)}


def jaccard(a: set[tuple[int, ...]], b: set[tuple[int, ...]]) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("seed", range(2))
def test_pairs_are_those_of_exact_similarity_but_for_a_standard_error(seed: int) -> None:
    generator = np.random.default_rng(seed)
    documents = [document(generator, int(n)) for n in generator.integers(20, 300, 150)]
    for origin in range(60):  # copies with a share of their tokens replaced
        copy = documents[origin].copy()
        share = generator.uniform(0, 0.2)
        where = generator.random(len(copy)) < share
        copy[where] = document(generator, int(where.sum()))
        documents.append(copy)
    found = dict(near_duplicates(documents).tolist())
    sets = list(map(triples, documents))
    missed = wrong = 0
    for later in range(len(documents)):
        similar = max((jaccard(sets[later], sets[at]) for at in range(later)), default=0)
        missed += similar > 0.9 and later not in found
        wrong += similar < 0.7 and later in found
    assert (missed, wrong) == (0, 0)
    assert len(found) > 10
    assert all(jaccard(sets[a], sets[b]) > 0.7 for a, b in found.items())


def test_what_all_rows_share_does_not_make_them_alike() -> None:
    generator = np.random.default_rng(0)
    system = document(generator, 500)
    documents = [np.concatenate([system, document(generator, 40)]) for _ in range(50)]
    assert len(near_duplicates(documents)) == 0
    assert jaccard(triples(documents[0]), triples(documents[1])) > 0.8
    documents.append(np.append(documents[7], 1).astype(np.int32))
    assert near_duplicates(documents).tolist() == [[50, 7]]


def test_of_a_group_each_is_like_the_first() -> None:
    generator = np.random.default_rng(0)
    one = document(generator, 200)
    documents = [document(generator, 100), *[np.append(one, at).astype(np.int32) for at in "1234"]]
    documents += [document(generator, 100) for _ in range(10)]
    assert near_duplicates(documents).tolist() == [[2, 1], [3, 1], [4, 1]]


@pytest.mark.parametrize("lengths", [[], [1], [2, 0, 5], [3] * 4, [9, 9]])
def test_few_or_short_documents_have_none(lengths: list[int]) -> None:
    generator = np.random.default_rng(0)
    assert near_duplicates([document(generator, n) for n in lengths]).shape == (0, 2)


def test_any_order_of_many_pieces_gives_the_same() -> None:
    generator = np.random.default_rng(0)
    documents = [document(generator, 30) for _ in range(2600)]  # three pieces
    documents[2599] = np.append(documents[0], 5).astype(np.int32)
    assert near_duplicates(documents).tolist() == [[2599, 0]]
    assert near_duplicates(documents[::-1]).tolist() == [[2599, 0]]
