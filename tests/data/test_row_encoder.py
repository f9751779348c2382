"""Rows encoded in chunks: by several processes, or from the cache, they are the same examples."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from halfbyte.data import load_dataset, loading, row_encoder
from halfbyte.data.encoding import EncoderSpec
from halfbyte.data.loading import open_source
from halfbyte.data.row_encoder import RowEncoder, chunks_of
from tests.data.chats import tokenizer_of
from tests.tiny import tiny_tokenizer

WORDS = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def talk(at):
    draw = np.random.default_rng(at)
    reply = " ".join(draw.choice(WORDS, draw.integers(1, 40)))
    asked = {"role": "user", "content": f"{at} {draw.choice(WORDS)}?"}
    return {"id": at, "messages": [asked, {"role": "assistant", "content": reply}]}


def write(path, count):
    rows = [json.dumps(talk(at)) for at in range(count)]
    rows[3], rows[5], rows[8] = "{", "", json.dumps({"text": "plain"})
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kept(monkeypatch):
    """Have small data be kept, by this process."""
    monkeypatch.setattr(loading, "SEVERAL_FROM", 0)
    monkeypatch.setattr(row_encoder, "cores", lambda: 0)


def loaded(path, **options):
    return load_dataset(path, tiny_tokenizer(), max_length=60, **options)


def contents(dataset):
    examples = [
        (e.tokens.tolist(), e.labels_mask.tolist(), e.prompt_length) for e in dataset.examples
    ]
    report = dataset.report
    said = report.lines(), list(report.rejections), report.formats, report.truncated_lines
    return examples, list(dataset.rows), dataset.last_of_row.tolist(), said


def test_tokens_are_transformers_own(tmp_path):
    tokenizer = tiny_tokenizer()
    data = load_dataset(write(tmp_path / "a.jsonl", 400), tokenizer, max_length=512)
    for row, example in data.cases:
        if row.text is None:
            ids = tokenizer.apply_chat_template(row.messages)["input_ids"]
            assert example.tokens.tolist() == ids
    assert [row.line for row in data.rows][:5] == ["1", "2", "3", "5", "7"]


def test_several_processes_and_the_cache_change_nothing(tmp_path, home, monkeypatch):
    path = write(tmp_path / "a.jsonl", 900)
    alone = contents(loaded(path))
    assert not home.exists()
    monkeypatch.setattr(loading, "SEVERAL_FROM", 0)
    monkeypatch.setattr(row_encoder, "cores", lambda: 2)
    monkeypatch.setattr(row_encoder, "CHUNK_ROWS", 64)
    assert contents(loaded(path)) == alone
    # From here on, nothing may be encoded.
    monkeypatch.setattr(RowEncoder, "_submit", None)
    again = loaded(path)
    assert contents(again) == alone
    moved = path.rename(tmp_path / "b.jsonl")
    assert contents(loaded(moved))[:3] == alone[:3]


def test_other_tokens_are_encoded_again(tmp_path, kept):
    path = write(tmp_path / "a.jsonl", 40)
    table = open_source(path).table

    def key(tokenizer=None, preferred=("messages",), max_length=60, train_on="assistant"):
        spec = EncoderSpec(tokenizer or tiny_tokenizer(), preferred, max_length, train_on)
        with RowEncoder(table, spec, keep=False) as encoder:
            return encoder.key

    other = tiny_tokenizer()
    other.chat_template += " "
    used = tiny_tokenizer()
    used(["a", "b" * 90], truncation=True, padding=True, max_length=8)
    assert key(used) == key() == key()
    different = [
        key(other),
        key(tokenizer_of("qwen3")),
        key(preferred=("text",)),
        key(max_length=61),
        key(train_on="all"),
    ]
    write(path, 41)
    table = open_source(path).table
    assert len({key(), *different}) == 6
    table = open_source(f"{path}[:40]").table
    first = key()
    table = open_source(f"{path}[1:41]").table
    assert key() != first


def test_a_damaged_cache_is_made_again(tmp_path, home, kept):
    path = write(tmp_path / "a.jsonl", 300)
    whole = contents(loaded(path))
    [chunks] = home.rglob("chunks.bin")
    raw = chunks.read_bytes()
    for damaged in (raw[:-100], raw[:1000] + b"\x01" + raw[1001:], b""):
        chunks.write_bytes(damaged)
        assert contents(loaded(path)) == whole
    assert chunks.stat().st_size >= len(raw)


def test_without_a_cache_nothing_is_written(tmp_path, home, kept):
    path = write(tmp_path / "a.jsonl", 300)
    alone = contents(loaded(path, keep=False))
    assert not home.exists()
    home.write_text("in the way")
    assert contents(loaded(path)) == alone


def test_a_full_cache_takes_no_more_and_says_so(tmp_path, home, kept, monkeypatch, caplog):
    path = write(tmp_path / "a.jsonl", 600)
    alone = contents(loaded(path, keep=False))
    monkeypatch.setattr(row_encoder, "_TRIM_EVERY", 1000)
    monkeypatch.setattr(row_encoder, "CACHE_LIMIT", 10_000)
    with caplog.at_level(logging.WARNING, "halfbyte"):
        assert contents(loaded(path)) == alone
    assert sum("no more encoded data is kept" in one.message for one in caplog.records) == 1


def test_chunks_are_limited_in_rows_and_bytes(tmp_path, monkeypatch):
    table = open_source(write(tmp_path / "a.jsonl", 100)).table
    monkeypatch.setattr(row_encoder, "CHUNK_ROWS", 16)
    monkeypatch.setattr(row_encoder, "CHUNK_BYTES", 900)
    rows = np.random.default_rng(0).permutation(len(table))
    chunks = list(chunks_of(table, rows))
    assert np.array_equal(np.concatenate(chunks), rows)
    sizes = [table.job(chunk).bytes for chunk in chunks]
    assert max(map(len, chunks)) <= 16
    assert max(sizes) <= 900
    assert len(chunks) < 40
    monkeypatch.setattr(row_encoder, "CHUNK_BYTES", 1)
    assert [len(chunk) for chunk in chunks_of(table, rows)] == [1] * len(table)


ENCODES = """
import signal, sys
from transformers import PreTrainedTokenizerFast
from halfbyte.data import loading, row_encoder
from halfbyte.data.encoding import EncoderSpec
row_encoder.cores = lambda: 1
source = loading.open_source(sys.argv[1])
spec = EncoderSpec(PreTrainedTokenizerFast.from_pretrained(sys.argv[3]), ("messages",), 64)
with row_encoder.RowEncoder(source.table, spec, keep=False) as encoder:
    chunks = row_encoder.chunks_of(source.table, row_encoder.np.arange(len(source.table)))
    for chunk in encoder.encode(chunks):
        print("encoding", flush=True)
        if sys.argv[2] == "error":
            raise RuntimeError
        signal.pause()
"""


def processes(mark):
    """The processes that have ``mark`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["error", signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_no_process_is_left(tmp_path, end):
    path = write(tmp_path / "a.jsonl", 900)
    mark = str(tmp_path / "a-directory-of-the-path")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, mark])}
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", ENCODES, str(path), str(end), str(tmp_path / "tokenizer")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        assert running.stdout.readline() == b"encoding\n"
        if isinstance(end, signal.Signals):
            assert len(processes(mark)) == 1
            running.send_signal(end)
        running.stdout.read()
    deadline = time.monotonic() + 10
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes(mark) == []
    assert running.returncode == (1 if end == "error" else -end)
