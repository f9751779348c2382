"""Chunks encoded anywhere are the data set that one process encodes."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from halfbyte.data import load_dataset
from halfbyte.data.encoding import (
    EncodedChunk,
    EncoderSpec,
    EncodingReport,
    encode_chunk,
    without,
)
from halfbyte.data.encoding_pool import EncodingPool, chunks_of_file
from halfbyte.data.formats import preferred_formats
from halfbyte.data.row_files import Row, RowFile
from halfbyte.data.sources import read_source
from halfbyte.errors import DataError, HalfbyteError
from tests.data.chats import CONVERSATIONS, TOOLS, call, reply, tokenizer_of, user
from tests.tiny import tiny_tokenizer

FIRST = {"role": "assistant", "content": "Hello!"}


def written(path):
    """A file with rows of all kinds, good and bad, and blank lines."""
    lines = []
    for at, (name, messages) in enumerate(CONVERSATIONS.items()):
        row = {
            "messages": messages,
            **({"tools": TOOLS} if "call" in name or "result" in name else {}),
        }
        lines += [json.dumps(row), "", json.dumps({"messages": [FIRST, *messages], "id": at})]
        lines += ["{", json.dumps({"text": "Once. " * at}), '{"messages": []}', '{"a": 1}']
        chat = [
            user("So? " * at),
            reply("No."),
            user("?"),
            reply("Yes. " * at or "-", weight=at % 2),
        ]
        lines += [json.dumps({"messages": chat}), '{"text": "\\ud800"}']
        lines += [json.dumps({"messages": [user("x"), reply("", call("Rome"))], "label": "z"})]
    path.write_text("\n".join(lines))
    return path


def spec_of(path, tokenizer, max_length=60, train_on="assistant"):
    preferred = preferred_formats(row.value for row in read_source(path).rows if not row.problem)
    return EncoderSpec(tokenizer, preferred, max_length, train_on)


def same(one, other):
    """Whether two chunks are equal."""
    plain = [field for field in EncodedChunk._fields if field not in ("notes",)]
    for field in plain:
        mine, others = getattr(one, field), getattr(other, field)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == others.dtype
            assert mine.tolist() == others.tolist()
        else:
            assert mine == others
    assert [one.notes.texts, one.notes.tokens] == [other.notes.texts, other.notes.tokens]
    return True


@pytest.mark.parametrize("size", [1, 700, 5000, 10**6])
@pytest.mark.parametrize(
    ("name", "train_on"), [("qwen3", "assistant"), ("mistral_v3", "all"), (None, "assistant")]
)
def test_chunks_are_the_data_set_and_its_report(name, train_on, size, tmp_path):
    path = written(tmp_path / "a.jsonl")
    tokenizer = tokenizer_of(name) if name else tiny_tokenizer(None, adds_bos=True)
    spec = spec_of(path, tokenizer, train_on=train_on)
    wanted = load_dataset(path, tokenizer, max_length=60, train_on=train_on)
    report = EncodingReport(str(path), spec)
    chunks = []
    with EncodingPool(spec, 0) as pool:
        for chunk in pool.imap(chunks_of_file(path, size)):
            report.add(chunk)
            chunks.append(chunk)
    assert report.report() == wanted.report
    assert report.report().lines() == wanted.report.lines()
    assert len(wanted.report.rejections) > 50
    examples = [
        (tokens.tolist(), mask.tolist(), int(prompt))
        for chunk in chunks
        for tokens, mask, prompt in zip(
            np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1]) if len(chunk.lengths) else [],
            np.split(chunk.mask, np.cumsum(chunk.lengths)[:-1]) if len(chunk.lengths) else [],
            chunk.prompt_lengths,
            strict=True,
        )
    ]
    assert examples == [
        (one.tokens.tolist(), one.labels_mask.tolist(), one.prompt_length)
        for one in wanted.examples
    ]
    rows = [
        (chunk.lines[row], int(messages))
        for chunk in chunks
        for row, messages in zip(chunk.row, chunk.messages, strict=True)
    ]
    assert rows == [(row.line, len(row.messages)) for row in wanted.rows]


def test_a_chunk_without_rows_and_one_without_usable_rows():
    spec = EncoderSpec(tokenizer_of("chatml"), ("messages",), 100)
    empty = encode_chunk(spec, [])
    assert (empty.tokens.dtype, empty.mask.dtype, empty.row.dtype) == (np.int32, np.bool_, np.int64)
    assert len(empty.tokens) == len(empty.lengths) == len(empty.lines) == 0
    bad = encode_chunk(spec, [Row("7", "x", "malformed JSON"), Row("8", {"a": 1})])
    assert bad.unread == [(0, "malformed JSON", "x"), (1, "no 'messages'", '{"a": 1}')]
    report = EncodingReport("data", spec)
    report.add(empty)
    report.add(bad)
    assert report.report().usable == 0
    assert [one.line for one in report.report().rejections] == ["7", "8"]


def test_a_spec_is_sent_without_what_is_derived_from_it():
    spec = EncoderSpec(tokenizer_of("qwen3"), ("messages",), 100)
    before = len(pickle.dumps(spec))
    rows = [Row("1", {"messages": CONVERSATIONS["plain"]})]
    chunk = encode_chunk(spec, rows)
    assert len(pickle.dumps(spec)) == before
    same(encode_chunk(pickle.loads(pickle.dumps(spec)), rows), chunk)


def test_renderings_that_exceed_limits_are_counted_over_all_chunks():
    spec = EncoderSpec(
        tiny_tokenizer("{% for i in range(99999999) %}{% endfor %}"), ("messages",), 9
    )
    report = EncodingReport("data", spec)
    chunk = encode_chunk(spec, [])._replace(exceeded=8)
    report.add(chunk)
    report.add(chunk)
    with pytest.raises(DataError, match="chat template exceeds its limits, for 20 renderings"):
        report.add(chunk)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 10**6])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n"])
def test_a_file_is_divided_at_lines(size, bom, end, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(bom + b'{"a": 1}\n\n{"b":\t"' + "é".encode() * 20 + b'"}\r\n[\n"x"' + end)
    rows = [row for chunk in chunks_of_file(path, size) for row in chunk()]
    assert rows == read_source(path).rows
    assert [row.line for row in rows] == ["1", "3", "4", "5"]


def test_few_rows_decide_the_formats_of_many():
    both = {"messages": [], "text": ""}
    rows = [{"text": ""}, both, both, both]
    assert preferred_formats(rows) == preferred_formats(rows, most=4) == ("messages", "text")
    others = ("conversations", "prompt/completion", "instruction/output")
    assert preferred_formats(rows, most=3) == ("messages", "text", *others)
    assert preferred_formats(rows, most=1) == ("text", "messages", *others)
    assert preferred_formats([{"a": 1}, None, both], most=2)[0] == "messages"
    with pytest.raises(DataError, match="no row is in a known format"):
        preferred_formats([{"a": 1}, None], most=2)


# In other processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "a.jsonl")


@pytest.fixture(scope="module")
def pool(data):
    with EncodingPool(spec_of(data, tokenizer_of("qwen3")), 2) as pool:
        yield pool


def evaluated(expression):
    """A chunk of one row, whose text is the value of an expression where it is encoded."""
    row = "__import__('halfbyte.data.sources').data.sources.Row"
    return partial(eval, f"[{row}('1', {{'text': str({expression})}})]")


def text_of(chunk):
    return tokenizer_of("qwen3").decode(chunk.tokens).removesuffix("<|im_end|>")


def test_processes_give_the_same_in_order(pool, data):
    chunks = list(chunks_of_file(data, 900))
    assert len(chunks) > 10
    with EncodingPool(pool._spec, 0) as alone:
        both = zip(pool.imap(chunks), alone.imap(chunks), strict=True)
        assert all(same(one, other) for one, other in both)


def test_processes_import_no_torch_and_use_one_thread(pool):
    imported = "[n for n in ('torch', 'transformers') if __import__('sys').modules.get(n)]"
    found = list(pool.imap([evaluated(imported)] * 8))
    assert {text_of(one) for one in found} == {"['transformers']"}
    assert set(map(text_of, pool.imap([evaluated("__import__('os').getpid()")] * 20))) <= {
        str(process) for process in pool.processes
    }


def test_what_a_library_prints_is_not_an_answer(pool):
    assert [text_of(one) for one in pool.imap([evaluated("print('noise')")] * 2)] == ["None"] * 2


def test_errors_are_those_of_one_process(pool, tmp_path):
    missing = RowFile(tmp_path / "missing.jsonl", "missing.jsonl")
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read: No such file"):
        list(pool.imap([partial(missing.read_rows, 0, 9, 1)]))
    with pytest.raises(RuntimeError, match=r"(?s)process that encodes data.*ZeroDivisionError"):
        list(pool.imap([evaluated("1 / 0")]))
    assert len(list(pool.imap([[]]))) == 1  # and the processes go on


def test_few_chunks_are_taken_before_they_are_needed(pool):
    taken = []

    def chunks():
        for at in range(100):
            taken.append(at)
            yield [Row(str(at), {"text": str(at)})]

    results = pool.imap(chunks())
    assert text_of(next(results)) == "0"
    assert len(taken) <= 6
    assert [text_of(one) for one in results] == [str(at) for at in range(1, 100)]


def test_the_end_of_a_process_is_one_error(data):
    end = "__import__('os').kill(__import__('os').getpid(), 9)"
    how = r"A process that encodes the data was ended by signal 9 \(SIGKILL\); was there too little"
    with (
        pytest.raises(HalfbyteError, match=how),
        EncodingPool(spec_of(data, tokenizer_of("chatml")), 1) as pool,
    ):
        list(pool.imap([[], evaluated(end), []]))


SCRIPT = """
import pickle, sys
from halfbyte.data.encoding_pool import EncodingPool
from halfbyte.data.row_files import Row
spec = pickle.loads(bytes.fromhex(sys.stdin.readline()))
with EncodingPool(spec, 2) as pool:
    chunks = ([Row("1", {"text": "Once. " * 1000})] for _ in iter(int, 1))
    for at, chunk in enumerate(pool.imap(chunks)):
        if not at:
            print(*pool.processes, flush=True)
"""


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_a_script_that_has_no_main_function(number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    spec = EncoderSpec(tokenizer_of("chatml"), ("text",), 10_000)
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        process.stdin.write(pickle.dumps(spec).hex() + "\n")
        process.stdin.flush()
        workers = list(map(int, process.stdout.readline().split()))
        assert len(workers) == 2
        assert all(map(is_running, workers))
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)  # as Ctrl-C does
        errors = process.stderr.read()
    assert process.returncode == -number
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the KeyboardInterrupt
    assert errors.strip().endswith("KeyboardInterrupt" if number == signal.SIGINT else "")
    until = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_rows_that_say_what_others_say_leave_nothing_behind(tmp_path):
    """Of the rest, the chunk and the report are those of the rows without them."""
    read = read_source(written(tmp_path / "a.jsonl")).rows
    spec = spec_of(tmp_path / "a.jsonl", tokenizer_of("qwen3"))
    whole = encode_chunk(spec, read)
    usable = np.unique(whole.row)
    content = np.unique(whole.content[usable[::2]])
    found = without(whole, content)
    left = [at for at in usable.tolist() if whole.content[at] not in content]
    assert left
    assert found.held_out == len(usable) - len(left) > 0
    alone = encode_chunk(spec, [read[at] for at in left])
    for name in ("tokens", "mask", "lengths", "prompt_lengths", "messages"):
        assert np.array_equal(getattr(found, name), getattr(alone, name)), name
    assert found.row.tolist() == [left[at] for at in alone.row]
    assert found.truncated == [left[at] for at in alone.truncated]
    assert found.split == [left[at] for at in alone.split]
    moved = [{n: [str(left[int(r)]) for r in rows] for n, rows in kept.items()}
             for kept in (alone.notes.texts, alone.notes.tokens)]  # fmt: skip
    kept = [{n: list(rows) for n, rows in kept.items()}
            for kept in (found.notes.texts, found.notes.tokens)]  # fmt: skip
    assert kept == moved
    assert (found.rejected, found.unread) == (whole.rejected, whole.unread)
    assert same(without(whole, content[:0]), whole)
    assert same(without(whole, np.array([0, 1], np.uint64)), whole)  # 0: rows not read
