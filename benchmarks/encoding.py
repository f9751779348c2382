"""Encoding of data: from JSONL to token ids and masks, against the tokenizer alone.

    python benchmarks/encoding.py --model SmolLM2-135M-Instruct-Q4_1.gguf

The tokenizer alone is the `tokenizers` library with nothing around it: `encode_batch` and
`encode_batch_fast` of texts that are already rendered, on all cores, without taking the ids out.
Ours is `EncodingPool` with a process for each core: from the bytes of a file to arrays in this
process, with the rows read and checked, the template rendered and the masks found.

Both run in every round, one after the other, so that a slow moment hits both, and both in new
processes, with empty caches, as a run begins. What it takes to start these is not in it, but
reported. ``cpu`` is the processor time of all cores, which other programs disturb less. That the
tokens are the same is checked before.

Rows have lognormal lengths from 200 bytes to 8 kB. Their texts are

- prose: a random walk over the words of a novel (`chats.py`), with few different words;
- library: docstrings and code of Python's own library, with very many.
"""

import argparse
import ast
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from chats import Walk
from tokenizers import Tokenizer

from halfbyte.checkpoint.base_model import open_base
from halfbyte.data.encoding import EncodedChunk, EncoderSpec
from halfbyte.data.encoding_pool import EncodingPool, Rows, chunks_of_file, cores
from halfbyte.data.formats import to_conversation
from halfbyte.data.row_files import Row, RowFile

TEMPLATES = Path(__file__).parents[1] / "tests/data/chat_templates"
SHORTEST, LONGEST = 200, 8000  # bytes of a row's text
MEDIAN, SIGMA = 1200.0, 0.8
TURNS = (1, 1, 2, 2, 3, 4, 6)  # one of them is drawn
CASES = (  # the kind of rows, their texts, and the template
    ("chat", "prose", "chatml"),
    ("chat", "library", "chatml"),
    ("chat", "prose", "qwen3"),
    ("chat", "library", "qwen3"),
    ("instruction", "prose", "chatml"),
    ("instruction", "library", "chatml"),
    ("text", "library", "chatml"),
)


@cache
def python_library() -> str:
    """Docstrings and code of Python's library, one after the other, in a random order."""
    texts: list[str] = []
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            code = path.read_text(encoding="utf-8", errors="ignore")
            try:
                tree = ast.parse(code)
            except SyntaxError:  # files that are there to be wrong
                continue
            nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
            found = (node for node in ast.walk(tree) if isinstance(node, nodes))
            docs = [doc for node in found if (doc := ast.get_docstring(node))]
            texts += [*docs, *docs, code]  # docstrings twice: there is less of them
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)


class Library:
    """Reads it from the beginning, and again."""

    def __init__(self) -> None:
        self._text, self._at = python_library(), 0

    def text(self, size: int) -> str:
        """The next characters, about so many, that end with a word."""
        end = self._text.find(" ", self._at + size)
        if end < 0:
            self._at, end = 0, self._text.find(" ", size)
        found, self._at = self._text[self._at : end], end
        return found.strip() or "None"


def rows(kind: str, texts: str, size: int) -> Iterator[dict[str, Any]]:
    """Rows that have so many bytes together."""
    draw = random.Random(f"{kind} {texts}")
    source = Library() if texts == "library" else Walk()

    def text(characters: float) -> str:
        if isinstance(source, Library):
            return source.text(round(characters))
        return source.text(draw, max(2, round(characters / 5.6)), ".")

    written = 0
    while written < size:
        drawn = min(LONGEST, max(SHORTEST, draw.lognormvariate(math.log(MEDIAN), SIGMA)))
        written += round(drawn)
        if kind == "text":
            yield {"text": text(drawn)}
        elif kind == "instruction":
            yield {"instruction": text(drawn * 0.2), "input": "", "output": text(drawn * 0.8)}
        else:
            turns = draw.choice(TURNS) if drawn > 2 * SHORTEST else 1
            messages = [{"role": "system", "content": "You are a helpful assistant."}]
            for _ in range(turns):
                asked = drawn / turns * draw.uniform(0.1, 0.5)
                messages += [
                    {"role": "user", "content": text(asked)},
                    {"role": "assistant", "content": text(drawn / turns - asked)},
                ]
            yield {"messages": messages[draw.random() < 0.7 :]}


def cpu(processes: list[int]) -> float:
    """Seconds of processor time of this process and others."""
    taken = time.process_time()
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        taken += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return taken


def timed(run: Callable[[], object], processes: list[int] | None = None) -> dict[str, float]:
    """Seconds, of wall and of processor time."""
    wall, used = time.perf_counter(), cpu(processes or [])
    run()
    return {"wall": time.perf_counter() - wall, "cpu": cpu(processes or []) - used}


def encode(pool: EncodingPool, path: Path) -> list[EncodedChunk]:
    return list(pool.imap(chunks_of_file(path)))


def ours(spec: EncoderSpec, path: Path, first: list[Row]) -> dict[str, Any]:
    """Seconds to start and to encode, with new processes."""
    with EncodingPool(spec) as pool:
        few: list[Rows] = [first] * (2 * cores())
        start = timed(lambda: list(pool.imap(few)))["wall"]  # until they can encode
        return timed(lambda: encode(pool, path), pool.processes) | {"start": start}


ALONE = """
import json, sys, time
from tokenizers import Tokenizer
state, texts, method = sys.argv[1:]
tokenizer = Tokenizer.from_file(state)
with open(texts, encoding="utf-8") as file:
    texts = json.load(file)
call = getattr(tokenizer, method)
call(texts[:100], add_special_tokens=False)
wall, cpu = time.perf_counter(), time.process_time()
kept = call(texts, add_special_tokens=False)
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
"""


def alone(state: Path, texts: Path, method: str) -> dict[str, float]:
    """Seconds of the library, in a new process."""
    command = [sys.executable, "-c", ALONE, str(state), str(texts), method]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def measure(
    tokenizer: Any, kind: str, texts: str, template: str, size: int, rounds: int, directory: Path
) -> dict[str, Any]:
    """One case: medians, and medians of the ratios of each round."""
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    path = directory / f"{kind}_{texts}.jsonl"
    if not path.exists():
        with path.open("w", encoding="utf-8") as file:
            for row in rows(kind, texts, size):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    names = {"chat": "messages", "instruction": "instruction/output", "text": "text"}
    spec = EncoderSpec(tokenizer, (names[kind],), max_length=1_000_000)
    read = list(RowFile(path, path.name).rows())
    conversations = [to_conversation(row.value, row.line, spec.preferred) for row in read]
    rendered = [one.text for row in conversations for one in spec.encoder.texts(row)]
    state, rendered_path = directory / "tokenizer.json", directory / "texts.json"
    state.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    rendered_path.write_text(json.dumps(rendered, ensure_ascii=False), encoding="utf-8")

    with EncodingPool(spec) as pool:
        chunks = encode(pool, path)
    tokens = sum(len(chunk.tokens) for chunk in chunks)
    encodings = Tokenizer.from_file(str(state)).encode_batch(rendered, add_special_tokens=False)
    after = [tokenizer.eos_token_id] * (kind == "text")
    ids = (token for encoding in encodings for token in (*encoding.ids, *after))
    found_ids = (token for chunk in chunks for token in chunk.tokens.tolist())
    if any(one != other for one, other in zip_longest(found_ids, ids)):
        raise SystemExit(f"{kind}, {texts}, {template}: tokens are not those of the library")

    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *METHODS)}
    for _ in range(rounds):
        taken["ours"].append(ours(spec, path, read[:20]))
        for method in METHODS:
            taken[method].append(alone(state, rendered_path, method))

    def ratio(method: str, figure: str) -> float:
        pairs = zip(taken[method], taken["ours"], strict=True)
        return round(statistics.median(one[figure] / other[figure] for one, other in pairs), 3)

    seconds = {
        name: {key: round(statistics.median(one[key] for one in each), 3) for key in each[0]}
        for name, each in taken.items()
    }
    found = {
        "rows": kind,
        "texts": texts,
        "template": template,
        "count": len(read),
        "examples": len(rendered),
        "file_bytes": path.stat().st_size,
        "text_bytes": sum(len(text.encode()) for text in rendered),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds["ours"]["wall"]),
        "ratios": {m: {key: ratio(m, key) for key in ("wall", "cpu")} for m in METHODS},
        "ratios_of_rounds": {
            method: [
                round(a["wall"] / b["wall"], 3)
                for a, b in zip(taken[method], taken["ours"], strict=True)
            ]
            for method in METHODS
        },
    }
    shares = "  ".join(
        f"{m} {r['wall']:.2f} (cpu {r['cpu']:.2f})" for m, r in found["ratios"].items()
    )
    rate = found["tokens_per_second"] / 1e6
    print(f"{kind:12}{texts:8} {template:9} {rate:5.2f} M tokens/s   against {shares}", flush=True)
    return found


METHODS = ("encode_batch", "encode_batch_fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a model with the tokenizer")
    parser.add_argument("--megabytes", type=float, default=12, help="of a file of rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="cases whose name contains this, such as 'chat prose'")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = open_base(options.model).tokenizer()
    size = round(options.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as directory:
        found = [
            measure(tokenizer, *case, size, options.rounds, Path(directory))
            for case in CASES
            if options.only is None or options.only in " ".join(case)
        ]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {
        "date": now,
        "command": f"python benchmarks/encoding.py --megabytes {options.megabytes:g} "
        f"--rounds {options.rounds} --model {Path(options.model).name}",
        "processor": platform.machine(),
        "cores": cores(),
        "load_average": os.getloadavg()[2],  # of 15 minutes
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("tokenizers", "transformers", "jinja2", "numpy")
        },
        "cases": found,
    }
    path = options.output or Path("benchmarks/results") / f"{now[:10]}_encoding.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
