"""Near duplicates among tokenised documents, by MinHash (Broder 1997) of sequences of tokens.

A document is the set of its sequences of three tokens, without those that a tenth of all documents
share: what a chat template, a system prompt or an instruction writes into every row would make any
two rows alike. Two documents are near duplicates if the Jaccard similarity of their sets is at
least 0.8, estimated from 128 hashes: the standard error is 0.035 there. Only documents that agree
in a band of 6 hashes are compared, which misses one pair in 500 of similarity 0.8, and fewer above.

Tokens need no notion of a word, so this works for any language. Signatures are computed by rensa,
100 times as fast as by datasketch (LAB.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import rensa
from numpy.typing import NDArray

from halfbyte.data.example_checks import together

SIMILAR = 0.8
"""Estimated Jaccard similarity from which on two documents are near duplicates."""

_TOKENS = 3  # of a sequence
_FEWEST = 8  # sequences of a document that is compared: below, one word more or less decides
_COMMON = 0.1  # share of the documents that have a sequence which is not compared …
_FEWEST_COMMON = 20  # … if these are more than so many, or all of them
_SAMPLED, _BEGINNING = 500, 4096  # documents to find common sequences in, and their tokens
_HASHES, _BAND = 128, 6
_AT_ONCE = 1024
_TABLE = 20  # bits of a hash by which common sequences are looked up
_SEED = 42
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that tokens times it are a bijection of 64 bits


def near_duplicates(documents: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Find documents that are nearly like an earlier one.

    Args:
        documents: The token ids of each. Memory: 512 bytes for each document.

    Returns:
        int64 [m, 2]: the index of such a document, ascending, and that of the earlier one.
    """
    kept, signatures = _signatures(documents, _common(documents))
    if not len(kept):
        return np.zeros((0, 2), np.int64)
    pairs = [_alike(signatures, band) for band in range(0, _HASHES - _BAND + 1, _BAND)]
    found = kept[np.unique(np.concatenate(pairs), axis=0)]
    _, first = np.unique(found[:, 0], return_index=True)
    return found[first]


def _sequences(documents: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.uint64], ...]:
    """The hashes of all sequences of tokens, and for each the index of its document."""
    lengths = np.array([len(one) for one in documents], np.int64)
    tokens = np.concatenate(documents).astype(np.uint64)
    owner = np.repeat(np.arange(len(documents)), lengths)
    if len(tokens) < _TOKENS:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    mixed = np.zeros(len(tokens) - _TOKENS + 1, np.uint64)
    for at in range(_TOKENS):
        mixed *= _FACTOR
        mixed += tokens[at : at + len(mixed)]
    mixed = _mix(mixed)
    within = owner[: len(mixed)] == owner[_TOKENS - 1 :]
    return mixed[within], owner[: len(mixed)][within]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _common(documents: Sequence[NDArray[np.int32]]) -> NDArray[np.bool_]:
    """Whether the sequences whose hashes begin with each 20 bits are shared by too many documents.

    Among thousands of common sequences, a few in a thousand of the others are taken for one of
    them: in all documents alike.
    """
    table = np.zeros(1 << _TABLE, np.bool_)
    if len(documents) < 3:
        return table
    count = min(len(documents), _SAMPLED)
    chosen = np.linspace(0, len(documents) - 1, count).astype(np.int64)
    hashes, owner = _sequences([documents[index][:_BEGINNING] for index in chosen.tolist()])
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    again = (hashes[1:] == hashes[:-1]) & (owner[1:] == owner[:-1])
    values, counts = np.unique(hashes[np.append(True, ~again)], return_counts=True)
    most = min(max(_COMMON * count, _FEWEST_COMMON), count - 1)
    table[values[counts > most] >> np.uint64(64 - _TABLE)] = True
    return table


def _signatures(
    documents: Sequence[NDArray[np.int32]], common: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """The indices of the documents with enough sequences, and their signatures."""
    kept, found = [np.zeros(0, np.int64)], [np.zeros((0, _HASHES), np.uint32)]
    start = 0
    for part in together(iter(documents), lambda document: document):
        start, first = start + len(part), start
        hashes, owner = _sequences(part)
        own = ~common[hashes >> np.uint64(64 - _TABLE)]
        hashes, owner = hashes[own], owner[own]
        counts = np.bincount(owner, minlength=len(part))
        enough = counts >= _FEWEST
        hashes, counts = hashes[enough[owner]], counts[enough]
        if not len(counts):
            continue
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, _HASHES, _SEED)
        kept.append(first + np.flatnonzero(enough))
        flat = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32)
        found.append(flat.reshape(-1, _HASHES))
    return np.concatenate(kept), np.concatenate(found)


def _alike(signatures: NDArray[np.uint32], band: int) -> NDArray[np.int64]:
    """Pairs of rows that agree in a band of hashes and are similar: the later one first.

    Each row is compared with the first of those that agree with it and with the one before it.
    """
    part = np.ascontiguousarray(signatures[:, band : band + _BAND])
    keys = part.view(np.dtype((np.void, part.dtype.itemsize * _BAND))).ravel()
    order = np.argsort(keys, kind="stable")
    new = np.append(True, keys[order][1:] != keys[order][:-1])
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    later = order[~new]
    pairs = np.stack([np.tile(later, 2), np.append(first[~new], order[:-1][~new[1:]])], axis=1)
    # Compared in pieces: two rows of signatures for each pair would be many times their memory.
    pieces = np.array_split(pairs, len(pairs) // _AT_ONCE + 1)
    same = [(signatures[one[:, 0]] == signatures[one[:, 1]]).mean(axis=1) for one in pieces]
    return pairs[np.concatenate(same) >= SIMILAR]
