"""Examples in an order without end: each row once an epoch, and from every position the same."""

import json

import numpy as np
import pytest

from halfbyte.data import row_encoder
from halfbyte.data.encoding import EncoderSpec, EncodingReport
from halfbyte.data.encoding_pool import EncodingPool
from halfbyte.data.example_stream import (
    ExampleStream,
    Position,
    rows_from,
    shuffled,
    stream_from,
)
from halfbyte.data.loading import open_source
from halfbyte.data.row_encoder import RowEncoder
from halfbyte.errors import DataError
from tests.data.chats import tokenizer_of
from tests.data.test_row_encoder import home, talk  # noqa: F401

COUNT = 70
BEGINNING = Position()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in ("row_encoder", "example_stream"):
        monkeypatch.setattr(f"halfbyte.data.{module}.CHUNK_ROWS", 8)
    monkeypatch.setattr(row_encoder, "cores", lambda: 0)


@pytest.fixture
def source(tmp_path):
    """Some rows are rejected, and every seventh becomes two examples."""
    rows = [talk(at) for at in range(COUNT)]
    for row in rows[::7]:
        row["messages"] = row["messages"] * 2
    for row in rows[3::9]:
        del row["messages"][1:]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(path)


SPEC = EncoderSpec(tokenizer_of("qwen3"), ("messages",), 512)


def stream(source, encoder, position=BEGINNING, report=None):
    report = report or EncodingReport("a", SPEC)
    order = shuffled(len(source.table), 3)
    rows = rows_from(source.table, encoder, order, position.rows, report, np.empty(0, np.uint64))
    return ExampleStream(rows, position, len(source.table))


def flat(taken):
    return [(one.line, one.example.tokens.tolist(), one.example.prompt_length) for one in taken]


@pytest.mark.parametrize("keep", [True, False])
def test_every_epoch_has_every_usable_row_once(source, keep):
    with RowEncoder(source.table, SPEC, keep=keep) as encoder:
        examples, taken = stream(source, encoder), []
        while examples.position.rows < 2 * COUNT:
            taken += flat(examples.take(1))
        usable = [line for line, *_ in taken]
        expected = [str(at + 1) for at in range(COUNT) if at % 9 != 3]
        twice = [str(at + 1) for at in range(0, COUNT, 7) if at % 9 != 3]
        half = len(expected) + len(twice)
        for part in (usable[:half], usable[half:]):
            assert sorted(part) == sorted(expected + twice)
        assert usable[:half] != usable[half:]


@pytest.mark.parametrize("keep", [True, False])
def test_from_every_position_the_examples_are_the_same(source, keep):
    with RowEncoder(source.table, SPEC, keep=False) as encoder:
        examples, positions, whole = stream(source, encoder), [], []
        for count in (1, 2, 5) * 22:
            positions.append((examples.position, len(whole)))
            whole += flat(examples.take(count))
    assert any(position.examples for position, _ in positions)
    assert positions[-1][0].rows > 2 * COUNT
    with RowEncoder(source.table, SPEC, keep=keep) as encoder:
        for position, before in positions[:-2]:
            taken = flat(stream(source, encoder, position).take(5))
            assert taken == whole[before : before + 5]


def test_a_second_start_encodes_nothing(source, monkeypatch):
    with RowEncoder(source.table, SPEC, keep=True) as encoder:
        first = flat(stream(source, encoder).take(200))
    monkeypatch.setattr(RowEncoder, "_submit", None)
    with RowEncoder(source.table, SPEC, keep=True) as encoder:
        assert flat(stream(source, encoder).take(200)) == first


def test_the_report_grows_to_that_of_all_rows_and_survives_a_resume(source):
    rejected = []
    with RowEncoder(source.table, SPEC, keep=False) as encoder:
        report = EncodingReport("a", SPEC, rejected=rejected.extend)
        examples = stream(source, encoder, report=report)
        examples.take(30)
        assert 0 < report.rows < COUNT
        state, seen = json.loads(json.dumps(report.state())), len(rejected)
        resumed = EncodingReport("a", SPEC, rejected=rejected.extend)
        resumed.load(state)
        stream(source, encoder, examples.position, resumed).take(200)
        whole = EncodingReport("a", SPEC)
        for chunk in encoder.encode([shuffled(COUNT, 3)(0)]):
            whole.add(chunk)
    found, expected = resumed.report(), whole.report()
    assert found.lines() == expected.lines()
    assert found.rejected == expected.rejected
    assert 0 < seen < len(rejected)
    assert rejected == list(expected.rejections)


def test_data_of_which_nothing_is_usable_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 30)
    source = open_source(path)
    with (
        RowEncoder(source.table, SPEC, keep=False) as encoder,
        pytest.raises(DataError, match="none of 31 rows"),
    ):
        stream(source, encoder).take(1)


def test_a_stream_is_shuffled_within_its_buffer_and_goes_on_where_it_was(source):
    rows = list(source.table.read(np.arange(COUNT)))

    def taken(position, counts, seed=1):
        with EncodingPool(SPEC, 0) as pool:
            report = EncodingReport("a", SPEC)
            encoded = stream_from(iter(rows), pool, seed, position.rows, report, buffer=20)
            examples = ExampleStream(encoded, position, COUNT)
            return [(flat(examples.take(count)), examples.position) for count in counts]

    steps = taken(BEGINNING, [4] * 25)
    lines = [int(line) for step, _ in steps for line, *_ in step]
    assert sorted(set(lines)) == [at + 1 for at in range(COUNT) if at % 9 != 3]
    assert lines != sorted(lines)
    for at, (_, position) in enumerate(steps):
        assert taken(position, [4] * 2) == (steps + [([], steps[-1][1])] * 2)[at + 1 : at + 3]
    assert taken(BEGINNING, [4] * 25) == steps != taken(BEGINNING, [4] * 25, seed=2)
    assert steps[-1][0] == []
