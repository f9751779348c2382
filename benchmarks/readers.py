"""Random and adversarial rows through every reader of data: none is lost, and none stops it.

    python benchmarks/readers.py --rows 100000

The same rows are written as JSON lines, as a JSON array, compressed, as CSV, TSV, Parquet, Arrow,
and to standard input, are read back, and are converted to conversations. Four in ten rows are as
they should be. Of the others it is known when they are made why they must be rejected, or that they
must be accepted. The script fails if a row that is read is not the one that was written, or has
another line or another reason than expected; it writes how many rows of each kind each reader
accepted and rejected, and for what reasons, with seconds and the peak of resident memory. Each
reader has a process of its own.
"""

import argparse
import bz2
import csv
import gzip
import json
import lzma
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.formats import preferred_formats, to_conversation
from halfbyte.data.row_files import LONGEST_ROW
from halfbyte.data.sources import open_sources

LONG_ROWS = 3  # of more than 8 MB each; more would only take time
TEXT = "malformed JSON"
BROKEN = "malformed CSV"
UTF8 = "not UTF-8"


class Made(NamedTuple):
    """A row that was made.

    Attributes:
        kind: What is odd about it.
        value: The row, for readers of values and cells; None if it has no value.
        raw: Its line, for readers of JSON.
        problem: The beginning of the reason for which it must be rejected, or None.
        exact: Whether a reader of values must return ``value`` as it is.
    """

    kind: str
    value: dict[str, Any] | None
    raw: bytes
    problem: str | None = None
    exact: bool = True


def text(draw: random.Random, most: int = 40) -> str:
    """Random text, of which every character may be in any encoding of Unicode, or a control."""
    ranges = ((32, 127), (0x20, 0x7F), (0xA0, 0x500), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (0, 32))
    return "x" + "".join(
        chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(most))
    )


def good(draw: random.Random) -> dict[str, Any]:
    """A row in one of the formats, which is accepted."""
    match draw.randrange(3):
        case 0:
            return {
                "messages": [
                    {"role": "user", "content": text(draw)},
                    {"role": "assistant", "content": text(draw)},
                ]
            }
        case 1:
            return {"instruction": text(draw), "output": text(draw), "input": text(draw)}
        case _:
            return {"prompt": text(draw), "completion": text(draw)}


def as_json(value: object, draw: random.Random) -> bytes:
    """JSON, with or without escapes and spaces."""
    separators = draw.choice([(",", ":"), (", ", ": "), (" ,\t", " : ")])
    return json.dumps(value, ensure_ascii=draw.random() < 0.5, separators=separators).encode()


def odd(draw: random.Random) -> Made:
    """A row that is odd in one way."""
    value = good(draw)
    raw = as_json(value, draw)
    match draw.choice(ODD):
        case "cut":
            raw = json.dumps(value).encode()
            return Made("cut", None, raw[: draw.randrange(1, len(raw))], TEXT)
        case "not UTF-8":
            return Made(UTF8, None, b'{"text": "caf\xe9"}', UTF8)
        case "half a surrogate":
            return Made("half a surrogate", None, b'{"text": "\\ud83d"}', "text that is not valid")
        case "deep":
            raw = b'{"text":' + b"[" * 150 + b"1" + b"]" * 150 + b"}"
            return Made("deep", None, raw, "nested more than 100 levels")
        case "too deep for Python":
            return Made("too deep for Python", None, b'{"a":' * 2000, TEXT)
        case "no object":
            raw = draw.choice([b"1", b"null", b'"text"', b"[1]", b"NaN", b"-Infinity"])
            return Made("no object", None, raw, "not a JSON object")
        case "a huge number":
            return Made("a huge number", None, b'{"text": "a", "n": ' + b"9" * 5000 + b"}", TEXT)
        case "no known keys":
            value = {"question": text(draw), "n": str(draw.randrange(9))}
            return Made("no known keys", value, as_json(value, draw), "no ")
        case "empty answer":
            value = {"prompt": "x", "completion": " "}
            return Made("empty answer", value, as_json(value, draw), "empty content")
        case "odd roles":
            value = {"messages": [{"role": "narrator", "content": "x"}]}
            return Made("odd roles", value, as_json(value, draw), "unknown role 'narrator'")
        case "messages that are text":
            value = {"messages": "[not JSON"}
            return Made("messages that are text", value, as_json(value, draw), "")
        case "the same key twice":
            raw = b'{"prompt": "a", "prompt": "b", "completion": "c"}'
            return Made("the same key twice", {"prompt": "b", "completion": "c"}, raw)
        case "no text but numbers":
            value = {"prompt": "x", "completion": 5}
            return Made("no text but numbers", None, as_json(value, draw), "'completion' is not")
        case "controls":
            value = {"prompt": "\0\x1b[2J\u202e\u2028", "completion": "\r\n\x85\x0b\x0c"[:5] + "x"}
            return Made("controls", value, as_json(value, draw))
        case _:
            value |= {"extra": text(draw), "": "no name"}
            return Made("unused keys", value, as_json(value, draw))


ODD = (
    *("cut", "not UTF-8", "half a surrogate", "deep", "too deep for Python", "no object"),
    *("a huge number", "no known keys", "empty answer", "odd roles", "messages that are text"),
    *("the same key twice", "no text but numbers", "controls", "unused keys"),
)


def rows(count: int, seed: int) -> Iterator[Made]:
    """The rows: four in ten as they should be, the others odd, and a few too long."""
    draw = random.Random(seed)
    long = set(draw.sample(range(count), min(LONG_ROWS, count)))
    for number in range(count):
        if number in long:
            raw = b'{"text": "' + b"y" * LONGEST_ROW + b'"}'
            yield Made("too long", None, raw, "longer than 8 MB")
        elif draw.random() < 0.4:
            value = good(draw)
            yield Made("good", value, as_json(value, draw))
        else:
            yield odd(draw)


# --- writers: each returns, for each row that is written, its line, kind, value and problem -------

Expected = list[tuple[int, str, Any, str | None]]
"""For each row its line or number, its kind, its value (None: not compared), and its problem."""


def write_lines(path: Path, made: Iterator[Made], compress: Callable[..., Any] = open) -> Expected:
    """Write JSON lines, with blank lines between some."""
    draw, line, expected = random.Random(1), 0, []
    with compress(path, "wb") as file:
        for row in made:
            for _ in range(draw.choice((0, 0, 0, 1, 2))):
                file.write(draw.choice((b"\n", b"  \r\n", b"\t\n")))
                line += 1
            file.write(row.raw + draw.choice((b"\n", b"\r\n", b" \n")))
            line += 1
            expected.append((line, row.kind, row.value, row.problem))
    return expected


def write_array(path: Path, made: Iterator[Made]) -> Expected:
    """Write an array, without the rows that would end it."""
    draw, line, expected = random.Random(1), 1, []
    ends = ("cut", "too deep for Python", "a huge number")
    with open(path, "wb") as file:
        file.write(b"[")
        for row in made:
            if row.kind in ends:
                continue
            before = b",\n" * bool(expected) + b"\n" * draw.choice((0, 0, 1, 3))
            raw = row.raw
            if row.value is not None and draw.random() < 0.2:
                raw = json.dumps(row.value, indent=1).encode()
                if row.kind == "the same key twice":
                    raw = row.raw
            file.write(before + raw)
            line += before.count(b"\n")
            expected.append((line, row.kind, row.value, row.problem))
            line += raw.count(b"\n")
        file.write(b"\n]\n")
    return expected


COLUMNS = ("messages", "instruction", "output", "input", "prompt", "completion", "question", "n")


def write_csv(path: Path, made: Iterator[Made], delimiter: str = ",") -> Expected:
    """Write cells; rows without a value become malformed lines of several kinds."""
    draw, line, expected = random.Random(1), 1, []
    broken = (
        (b'1,"a"b' + b"\n", BROKEN),
        (b'"open,1\n', BROKEN),  # up to the next quote, in the next row
        (b"1\n", "1 cells, and 8 columns"),
        (b"caf\xe9" + delimiter.encode() * 7 + b"\n", UTF8),
        (b"a\rb\n", BROKEN),
    )
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(COLUMNS)
        for row in made:
            if row.value is None and row.kind != "too long":
                raw, problem = draw.choice(broken)
                file.flush()
                file.buffer.write(raw.replace(b",", delimiter.encode()))
                file.flush()
                expected.append((line + 1, row.kind, None, problem))
                line += 1
                continue
            value = {name: row.value.get(name) for name in COLUMNS} if row.value else {}
            if row.kind == "too long":
                value = {"prompt": "y" * LONGEST_ROW, "completion": "x"}
            cells = [
                json.dumps(cell) if isinstance(cell, list) else cell or ""
                for cell in value.values()
            ] or [""] * len(COLUMNS)
            cells = cells if len(cells) == len(COLUMNS) else [*cells, *[""] * 6]
            writer.writerow(cells)
            kept = {name: cell for name, cell in value.items() if cell}
            problem = row.problem
            if row.kind == "messages that are text":
                problem = "column 'messages': malformed JSON"
            if row.kind == "too long":
                problem = BROKEN  # a cell that is too long
            expected.append((line + 1, row.kind, None if problem else kept, problem))
            line += 1 + sum(cell.count("\n") for cell in cells)
    return expected


SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        **{name: pa.string() for name in COLUMNS[1:]},
        "raw": pa.binary(),
        "at": pa.timestamp("us"),
    }
)


def write_table(path: Path, made: Iterator[Made], kind: str) -> Expected:
    """Write a table; rows without a value have bytes or a time that is not in any calendar."""
    draw, expected, part = random.Random(1), [], []
    writers = {
        "parquet": lambda: parquet.ParquetWriter(path, SCHEMA),
        "arrow": lambda: pa.ipc.new_stream(path, SCHEMA),
        "feather": lambda: pa.ipc.new_file(path, SCHEMA),
    }
    with writers[kind]() as writer:

        def flush() -> None:
            if part:
                writer.write_table(pa.Table.from_pylist(part, SCHEMA))
                part.clear()

        for number, row in enumerate(made, 1):
            problem, value = row.problem, row.value
            if value is None or row.kind in ("messages that are text", "too long"):
                value, problem = draw.choice(
                    (
                        ({"raw": b"\xff\xfe"}, "column 'raw': bytes that are not text"),
                        ({"at": pa.scalar(2**62, pa.timestamp("us"))}, "column 'at': date value"),
                        ({"raw": b"text"}, "no "),
                    )
                )
                if row.kind == "too long":
                    value, problem = {"prompt": "y" * LONGEST_ROW, "completion": "x"}, "longer than"
            stored = {name: value.get(name) for name in SCHEMA.names}
            part.append(stored)
            expected.append((number, row.kind, None if problem else stored, problem))
            if len(part) == 1000:
                flush()
        flush()
    return expected


def zstd(path: Path, mode: str) -> Any:
    """A stream that is compressed with Zstandard."""
    return pa.CompressedOutputStream(pa.OSFile(str(path), mode), "zstd")


READERS: dict[str, tuple[str, Callable[[Path, Iterator[Made]], Expected]]] = {
    "JSON lines": ("a.jsonl", write_lines),
    "JSON lines, gzip": ("a.jsonl.gz", lambda p, m: write_lines(p, m, gzip.open)),
    "JSON lines, Zstandard": ("a.jsonl.zst", lambda p, m: write_lines(p, m, zstd)),
    "JSON lines, bzip2": ("a.jsonl.bz2", lambda p, m: write_lines(p, m, bz2.open)),
    "JSON lines, xz": ("a.jsonl.xz", lambda p, m: write_lines(p, m, lzma.open)),
    "JSON array": ("a.json", write_array),
    "CSV": ("a.csv", write_csv),
    "TSV": ("a.tsv", lambda p, m: write_csv(p, m, "\t")),
    "Parquet": ("a.parquet", lambda p, m: write_table(p, m, "parquet")),
    "Arrow stream": ("a.arrow", lambda p, m: write_table(p, m, "arrow")),
    "Arrow file": ("a.feather", lambda p, m: write_table(p, m, "feather")),
    "standard input": ("-", write_lines),
    "standard input, streamed": ("- streamed", write_lines),
    "Parquet, streamed": ("a.parquet streamed", lambda p, m: write_table(p, m, "parquet")),
}


def try_reader(name: str, count: int, seed: int, directory: Path) -> dict[str, Any]:
    """Write the rows for one reader, read them, and compare."""
    word, writer = READERS[name]
    word, streamed = word.removesuffix(" streamed"), word.endswith(" streamed")
    path = directory / ("stdin" if word == "-" else word)
    expected = writer(path, rows(count, seed))
    if word == "-":
        sys.stdin = open(path, encoding="utf-8")  # noqa: SIM115
    source = "-" if word == "-" else str(path)
    before, began = _peak(), time.perf_counter()
    opened = open_sources(source, streaming=streamed)
    found = opened.stream() if streamed else opened.rows()
    accepted, rejected, kinds = Counter[str](), Counter[str](), Counter[str]()
    sample = preferred_formats(value for _, _, value, _ in expected if value is not None)
    for at, (line, kind, value, problem) in enumerate(expected):
        row = next(found)
        said = row.problem
        if said is None:
            try:
                to_conversation(row.value, row.line, sample)
            except RowRejected as rejection:
                said = str(rejection)
        wrong = row.line != str(line) or (said is None) != (problem is None)
        wrong |= problem is not None and not str(said).startswith(problem)
        wrong |= value is not None and row.problem is None and row.value != value
        if wrong:
            raise ValueError(
                f"{name}, row {at + 1}: expected line {line}, {kind}, {problem!r}, {value!r:.300}; "
                f"found {row!r:.600}, {said!r}"
            )
        kinds[kind] += 1
        if said is None:
            accepted[kind] += 1
        else:
            rejected[said] += 1
    if (more := next(found, None)) is not None:
        raise ValueError(f"{name}: a row that was not written: {more!r:.300}")
    return {
        "reader": name,
        "rows": len(expected),
        "bytes": path.stat().st_size,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_memory_bytes": _peak(),
        "peak_memory_bytes_before": before,
        "accepted": dict(accepted.most_common()),
        "rejected": dict(rejected.most_common()),
        "kinds": dict(kinds.most_common()),
    }


def _peak() -> int:
    """The peak of resident memory of this process alone; getrusage counts its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _in_process(name: str, count: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return try_reader(name, count, seed, Path(directory))


def main() -> None:
    from measuring import write  # which imports more than the processes of readers need

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=READERS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = []
    for name in args.reader or READERS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            one = pool.apply(_in_process, (name, args.rows, args.seed))
        found.append(one)
        print(
            f"{name:26} {one['rows']:,} rows in {one['seconds']:.1f} s: "
            f"{sum(one['accepted'].values()):,} accepted, "
            f"{sum(one['rejected'].values()):,} rejected for {len(one['rejected'])} reasons; "
            f"peak {one['peak_memory_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )
    write("readers", args.output, seed=args.seed, long_rows=LONG_ROWS, readers=found)


if __name__ == "__main__":
    main()
