"""Encodes chunks of rows in several processes.

Rendering and reading are Python, so threads would take turns; the tokenizer alone would not. Each
process is a Python that imports neither torch nor a model, runs the tokenizer on one core, and
encodes whole chunks (`encoding.encode_chunk`) that it reads itself, so that only file positions are
sent to it and only arrays come back.

Processes are started as commands and talk through their standard input and output. That needs
nothing of the main module of the program, which `multiprocessing` would import again in each: a
script without ``if __name__ == "__main__"`` may call us. They are not in our process group, so
Ctrl-C does not reach them, and they end when their input does, thus with us, however we end.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Self

from halfbyte.data.encoding import EncodedChunk, EncoderSpec, encode_chunk
from halfbyte.data.row_files import Row, RowFile
from halfbyte.errors import DataError, EncodingError, HalfbyteError
from halfbyte.input_files import open_file

Rows = Sequence[Row] | Callable[[], Iterable[Row]]
"""The rows of a chunk, or what reads them in the process that encodes them; it is pickled."""

# transformers imports torch where it finds it (5.17); for tokenizers it needs none.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.modules['torch'] = None; "
    "from halfbyte.data.encoding_pool import serve; serve()"
)
CHUNK = 1 << 20
"""Bytes of a chunk: large enough that its arrays are, and small to the memory of a process."""

_BOM = b"\xef\xbb\xbf"
_AHEAD = 2  # chunks waiting for each process, and results waiting to be taken


def chunks_of_file(path: str | Path, size: int = CHUNK) -> Iterator[Rows]:
    """Divide a JSONL file into chunks of about ``size`` bytes, which are whole lines.

    Raises:
        OSError: The file cannot be read.
    """
    rows = RowFile(Path(path), Path(path).name)
    with open_file(path) as file:
        bom = file.read(len(_BOM))
        start, first = (len(_BOM) if bom == _BOM else 0), 1
        file.seek(start)
        while block := file.read(size):
            lines = block.count(b"\n")
            if not block.endswith(b"\n"):  # the rest of its last line, however long that is
                while (rest := file.readline(size)) and not rest.endswith(b"\n"):
                    pass
                lines += 1
            stop = file.tell()
            yield partial(rows.read_rows, start, stop, first)
            start, first = stop, first + lines


class EncodingPool:
    """Processes that encode chunks of rows.

    A context manager: at its end, however that comes, there are no processes any more.
    """

    def __init__(self, spec: EncoderSpec, processes: int | None = None) -> None:
        """Start the processes; they take about a second to import what they need.

        Args:
            spec: How rows are encoded.
            processes: Their number; by default one for each core. With 0, chunks are encoded in
                this process.
        """
        self._spec = spec
        count = cores() if processes is None else processes
        self._processes: list[_Process] = []
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._threads = ThreadPoolExecutor(max(count, 1), "halfbyte-encoding")
        try:
            sent = pickle.dumps(spec, pickle.HIGHEST_PROTOCOL) if count else b""
            for _ in range(count):
                process = _Process(sent)
                self._processes.append(process)
                self._idle.put(process)
        except BaseException:
            self.close()
            raise

    def imap(self, chunks: Iterable[Rows]) -> Iterator[EncodedChunk]:
        """Yield the chunks encoded, in their order. Few are in memory at a time.

        Raises:
            DataError: A chunk cannot be read, the chat template is not valid, or the tokenizer
                cannot be used for it.
            EncodingError: A process ended before its work was done.
        """
        if not self._processes:
            yield from (encode_chunk(self._spec, _rows_of(chunk)) for chunk in chunks)
            return
        pending: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            pending.append(self.submit(chunk))
            if len(pending) > _AHEAD * len(self._processes):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def submit(self, chunk: Rows) -> Future[EncodedChunk]:
        """Have a chunk encoded by the next process that is free; its errors are those of `imap`.

        The caller limits how many are waiting. There must be processes.
        """
        return self._threads.submit(self._encode, chunk)

    @property
    def processes(self) -> list[int]:
        """Their ids."""
        return [process.id for process in self._processes]

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, chunk: Rows) -> EncodedChunk:
        process = self._idle.get()
        try:
            return process.encode(chunk)
        finally:
            self._idle.put(process)


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Process:
    """A process that encodes one chunk at a time."""

    def __init__(self, spec: bytes) -> None:
        # With parallelism off, `encode_batch_fast` takes a fourth more time than with one thread.
        one = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
        quiet = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}  # that there is no torch
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | one | quiet,
            process_group=0,
        )
        self._spec: bytes | None = spec

    def encode(self, chunk: Rows) -> EncodedChunk:
        try:
            if self._spec is not None:  # not when it starts: that would wait until it reads
                self._stdin.write(self._spec)
                self._spec = None
            pickle.dump(chunk, self._stdin, pickle.HIGHEST_PROTOCOL)
            self._stdin.flush()
            answer = pickle.load(self._stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            raise EncodingError(self._ended()) from error
        if isinstance(answer, EncodedChunk):
            return answer
        if isinstance(answer, HalfbyteError):
            raise answer
        raise RuntimeError(f"in a process that encodes data:\n{answer}")

    @property
    def id(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):  # what was not sent is of no use now
                pipe.close()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _ended(self) -> str:
        code = self._process.wait()
        how = f"with exit code {code}"
        if code < 0:
            how = f"by signal {-code} ({signal.Signals(-code).name})"
        hint = "; was there too little memory?" if code == -signal.SIGKILL else ""
        return f"A process that encodes the data was ended {how}{hint}"


def serve() -> None:
    """Encode the chunks that come from standard input; the main function of a process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    questions = sys.stdin.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):  # the process that started us has ended
        spec = pickle.load(questions)
        while True:
            pickle.dump(_answer(spec, pickle.load(questions)), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answer(spec: EncoderSpec, chunk: Rows) -> EncodedChunk | HalfbyteError | str:
    try:
        return encode_chunk(spec, _rows_of(chunk))
    except HalfbyteError as error:
        return error
    except Exception:
        return traceback.format_exc()


def _rows_of(chunk: Rows) -> Iterable[Row]:
    try:
        yield from chunk() if callable(chunk) else chunk
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror or error}.") from error
