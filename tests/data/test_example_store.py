"""Encoded rows in a file: what comes back is what was kept, or nothing, whatever happens to it."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.encoding import EncoderSpec, encode_chunk
from halfbyte.data.example_store import ExampleStore
from halfbyte.data.row_files import parse_row
from tests.data.chats import tokenizer_of

ROWS = [
    b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}',
    b"{",
    b'{"messages": [{"role": "user", "content": "Hi"}], "id": 3}',
    b'{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},'
    b'{"role": "user", "content": "C"}, {"role": "assistant", "content": "D"}], "id": 4}',
    b'{"text": "plain"}',
]


@pytest.fixture(scope="module")
def chunk():
    spec = EncoderSpec(tokenizer_of("qwen3"), ("messages", "text"), 512)
    return encode_chunk(spec, [parse_row(str(at), row) for at, row in enumerate(ROWS)])


def same(one, other):
    """Whether two chunks are equal in everything."""
    pairs = zip(one._replace(notes=None), other._replace(notes=None), strict=True)
    notes = [(kept.texts, kept.tokens) for kept in (one.notes, other.notes)]
    return notes[0] == notes[1] and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs
    )


def of_row(chunk, at):
    """The tokens and masks of the examples of a row."""
    ends = np.cumsum(chunk.lengths)
    return [
        (chunk.tokens[end - n : end].tolist(), chunk.mask[end - n : end].tolist(), prompt)
        for row, end, n, prompt in zip(
            chunk.row, ends, chunk.lengths, chunk.prompt_lengths, strict=True
        )
        if row == at
    ]


def as_lists(examples):
    return [(e.tokens.tolist(), e.labels_mask.tolist(), e.prompt_length) for e in examples]


def test_chunks_and_rows_come_back_in_another_process_s_store(tmp_path, chunk):
    first, later = np.array([40, 7, 9, 8, 2]), np.array([1, 0, 3, 4, 5])
    store = ExampleStore(tmp_path, 50)
    store.append(first, chunk)
    store.append(later, chunk)
    other = ExampleStore(tmp_path, 50)
    assert (store.appends, other.appends) == (True, False)
    for one in (store, other):
        for rows in (first, later):
            assert same(one.chunk(rows, chunk.lines), chunk)
            assert same(one.mapped_chunk(rows, chunk.lines), chunk)
            for at, row in enumerate(rows.tolist()):
                assert as_lists(one.row(row).examples) == of_row(chunk, at)
                assert one.row(row).content == chunk.content[at]
        assert one.chunk(first[::-1], chunk.lines) is None
        assert one.chunk(np.array([6]), ["6"]) is None
        assert [one.row(row) for row in (6, 49, 50, -1)] == [None] * 4
    other.close()
    store.close()
    assert ExampleStore(tmp_path, 50).appends


def test_a_row_may_be_in_several_chunks(tmp_path, chunk):
    store = ExampleStore(tmp_path, 50)
    first, later = np.array([1, 1, 2, 3, 4]), np.array([5, 1, 2, 5, 6])
    store.append(first, chunk)
    store.append(later, chunk)
    for rows in (first, later):
        assert same(store.chunk(rows, chunk.lines), chunk)
    assert as_lists(store.row(5).examples) == of_row(chunk, 0)


def test_the_store_of_other_data_is_emptied(tmp_path, chunk):
    store = ExampleStore(tmp_path, 50)
    store.append(np.arange(5), chunk)
    store.close()
    store = ExampleStore(tmp_path, 51)
    assert (store.size, store.row(0)) == (0, None)


@given(data=st.data())
def test_a_damaged_file_gives_what_was_kept_or_nothing(tmp_path_factory, chunk, data):
    directory = tmp_path_factory.mktemp("store")
    rows = np.array([3, 1, 2, 0, 4])
    store = ExampleStore(directory, 5)
    store.append(rows, chunk)
    store.close()
    path = directory / data.draw(st.sampled_from(["chunks.bin", "where.bin"]))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        os.truncate(path, data.draw(st.integers(0, len(raw) - 1)))
    else:
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
    store = ExampleStore(directory, 5)
    found = [store.chunk(rows, chunk.lines), store.mapped_chunk(rows, chunk.lines)]
    assert all(one is None or same(one, chunk) for one in found)
    for at, row in enumerate(rows.tolist()):
        found = store.row(row)
        assert found is None or as_lists(found.examples) == of_row(chunk, at)
        assert found is None or found.content == chunk.content[at]
    store.append(rows, chunk)
    assert same(store.chunk(rows, chunk.lines), chunk)
    store.close()
