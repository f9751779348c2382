"""What is staged is what the files hold, in order, in bounded memory; no reader outlives it."""

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint import staging, steps
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.directory import DirectorySource
from halfbyte.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from halfbyte.checkpoint.staging import Request, read_to_device
from halfbyte.errors import CheckpointError, WeightError
from halfbyte.models.build import BaseRecipe, frozen_linears
from halfbyte.quant import QuantizedWeight, quantize
from tests.checkpoint.test_safetensors_file import assert_same_bits, random_tensor
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")


def readers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("halfbyte-reader")]


@pytest.fixture(autouse=True)
def _no_reader_stays() -> Iterator[None]:
    yield
    assert readers() == []


def written(path: Path, tensors: list[Tensor], gaps: list[int]) -> list[Request]:
    """Write the tensors with so many bytes before each, and say where they are."""
    requests, raw = [], bytearray()
    for tensor, gap in zip(tensors, gaps, strict=True):
        raw += b"\xaa" * gap
        shape = tuple(tensor.shape)
        requests.append(Request(path, len(raw), tensor.nbytes, tensor.dtype, shape))
        raw += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw)
    return requests


def same(came: list[Tensor], expected: list[Tensor]) -> None:
    assert len(came) == len(expected)
    assert_same_bits(dict(enumerate(came)), dict(enumerate(expected)))  # type: ignore[arg-type]


tensors = st.builds(
    random_tensor,
    st.sampled_from(sorted(DTYPES.values(), key=str)),
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(0, 99),
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    st.lists(st.tuples(tensors, st.integers(0, 9), st.booleans()), max_size=8),
    st.integers(1, 300),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_what_comes_is_what_the_files_hold(
    tmp_path: Path,
    held: list[tuple[Tensor, int, bool]],
    piece_bytes: int,
    ring: int,
    random: Any,
) -> None:
    requests: dict[int, Request] = {}
    for which in (False, True):
        chosen = [i for i, (_, _, second) in enumerate(held) if second is which]
        path = tmp_path / f"{which}.bin"
        wrote = written(path, [held[i][0] for i in chosen], [held[i][1] for i in chosen])
        requests.update(zip(chosen, wrote, strict=True))
    order = list(requests)
    random.shuffle(order)
    asked = [requests[i] for i in order]
    came = list(read_to_device(asked, CPU, piece_bytes=piece_bytes, ring=ring))
    same(came, [held[i][0] for i in order])
    assert readers() == []


def test_the_sizes_it_has_by_default(tmp_path: Path) -> None:
    held = [random_tensor(torch.float32, [2000, 2500], 0), random_tensor(torch.bfloat16, [7], 1)]
    same(list(read_to_device(written(tmp_path / "x", held, [3, 0]), CPU)), held)


def test_nothing_but_tensors_of_no_bytes(tmp_path: Path) -> None:
    held = [torch.empty(0), torch.empty(3, 0, dtype=torch.float64)]
    same(list(read_to_device(written(tmp_path / "x", held, [0, 0]), CPU)), held)
    assert list(read_to_device([], CPU)) == []


def many(path: Path, count: int = 40) -> tuple[list[Request], list[Tensor]]:
    held = [random_tensor(torch.int16, [10, i % 4 + 1], i) for i in range(count)]
    return written(path, held, [1] * count), held


def test_pieces_that_come_late_keep_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, held = many(tmp_path / "x")
    turn = itertools.count()

    def read_into(path: Path, start: int, target: memoryview) -> None:
        time.sleep(0.002 if next(turn) % 3 == 0 else 0)
        original(path, start, target)

    original = staging.read_into
    monkeypatch.setattr(staging, "read_into", read_into)
    same(list(read_to_device(requests, CPU, piece_bytes=16, ring=5)), held)


def test_memory_is_the_ring_and_the_tensor_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, _ = many(tmp_path / "x")
    buffers: list[int] = []
    read: list[int] = []

    def new_buffer(size: int, locked: bool) -> Tensor:
        buffers.append(size)
        return original(size, locked)

    def read_into(path: Path, start: int, target: memoryview) -> None:
        read.append(len(target))
        original_read(path, start, target)

    original, original_read = staging._new_buffer, staging.read_into
    monkeypatch.setattr(staging, "_new_buffer", new_buffer)
    monkeypatch.setattr(staging, "read_into", read_into)
    stream = read_to_device(requests, CPU, piece_bytes=16, ring=3)
    assert readers() == []  # it has not been asked for anything
    taken = 0
    for request in requests:
        tensor = next(stream)
        taken += -(-request.nbytes // 16)
        if request is requests[2]:
            time.sleep(0.05)  # the readers come as far ahead as they may
            assert len(read) == taken + 3
        assert len(read) <= taken + 3
        alive = weakref.ref(tensor)
        del tensor
        assert alive() is None
    assert next(stream, None) is None
    assert buffers == [16] * 3
    assert sum(read) == sum(request.nbytes for request in requests)


def test_buffers_are_no_larger_than_the_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, held = many(tmp_path / "x", 5)
    sizes: list[int] = []
    original = staging._new_buffer
    monkeypatch.setattr(
        staging, "_new_buffer", lambda size, locked: sizes.append(size) or original(size, locked)
    )
    same(list(read_to_device(requests, CPU)), held)
    assert sizes == [80] * 5


@pytest.mark.parametrize("ring", [1, 3, 100])
def test_a_file_that_ends_early_is_told_after_what_is_whole(tmp_path: Path, ring: int) -> None:
    first, before = many(tmp_path / "first")
    requests, held = many(tmp_path / "second")
    with open(tmp_path / "second", "r+b") as file:
        file.truncate(requests[20].start + 3)
    stream = read_to_device([*first, *requests], CPU, piece_bytes=16, ring=ring)
    same([next(stream) for _ in range(60)], [*before, *held[:20]])
    with pytest.raises(CheckpointError, match=r"second ends at byte \d+, \d+ bytes early"):
        next(stream)
    assert readers() == []


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    requests, _ = many(tmp_path / "x")
    (tmp_path / "x").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*x: No such file"):
        next(read_to_device(requests, CPU))


def test_a_bug_in_a_reader_is_no_standstill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, _ = many(tmp_path / "x")

    def read_into(path: Path, start: int, target: memoryview) -> None:
        if start >= requests[7].start:
            raise ZeroDivisionError("a bug")
        original(path, start, target)

    original = staging.read_into
    monkeypatch.setattr(staging, "read_into", read_into)
    stream = read_to_device(requests, CPU, ring=4)
    for _ in range(7):
        next(stream)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        next(stream)
    assert readers() == []


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closed_early_it_reads_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    requests, _ = many(tmp_path / "x")
    read: list[int] = []
    original = staging.read_into

    def read_into(path: Path, start: int, target: memoryview) -> None:
        time.sleep(0.01)
        read.append(start)
        original(path, start, target)

    monkeypatch.setattr(staging, "read_into", read_into)
    stream = read_to_device(requests, CPU, ring=20)
    for _ in range(taken):
        next(stream)
    assert bool(readers()) == (taken > 0)
    stream.close()
    assert readers() == []
    assert len(read) < 20  # what waited in the ring was never begun


def test_a_buffer_is_filled_again_after_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, held = many(tmp_path / "x")
    events: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: object) -> None:
            events.append("recorded")

        def synchronize(self) -> None:
            events.append("waited")

    def read_into(path: Path, start: int, target: memoryview) -> None:
        events.append("read")
        original(path, start, target)

    original = staging.read_into
    monkeypatch.setattr(staging, "read_into", read_into)
    monkeypatch.setattr(staging, "_new_buffer", lambda size, _: torch.zeros(size).byte())
    monkeypatch.setattr(staging, "_MAX_READERS", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    stage = staging._Stage(requests, CPU, 80)
    stage._locked = True  # as for a GPU
    stage.start(ring=3)
    same([stage.tensor(request) for request in requests], held)
    stage.close()
    assert events.count("recorded") == 40
    by_reader = [what for what in events if what != "recorded"]
    assert by_reader == ["read"] * 3 + ["waited", "read"] * 37


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Let a directory stage its tensors as for a GPU, on the CPU; returns what was staged."""
    requests: list[Request] = []

    def on_cpu(asked: list[Request], device: torch.device) -> Iterator[Tensor]:
        assert device.type == "cuda"
        with contextlib.closing(read_to_device(asked, CPU, piece_bytes=1000, ring=3)) as stream:
            for request in asked:
                requests.append(request)
                yield next(stream)

    original = DirectorySource.tensors
    monkeypatch.setattr(steps, "read_to_device", on_cpu)
    monkeypatch.setattr(
        DirectorySource, "tensors", lambda self, device="cpu": original(self, "cuda")
    )
    return requests


def test_a_directory_staged_is_the_directory(tmp_path: Path, staged: list[Request]) -> None:
    base = write_tiny_model(tmp_path / "model", tied=False, max_shard_size="150KB")
    came = dict(open_base(base).tensors("cuda"))
    files = [SafetensorsFile(path) for path in base.glob("*.safetensors")]
    expected = {name: file.read(name) for file in files for name in file.entries}
    assert_same_bits(came, expected)  # type: ignore[arg-type]
    assert len(staged) == len(expected)


def test_on_a_cpu_nothing_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[staging._Stage] = []
    monkeypatch.setattr(staging, "_Stage", started.append)
    source = open_base(write_tiny_model(tmp_path / "model"))
    plain = dict(source.tensors())
    assert plain.keys() == {parameter.name for parameter in source.parameters}
    assert_same_bits(plain, dict(source.tensors("cpu")))  # type: ignore[arg-type]
    assert started == []


def test_a_model_staged_is_the_model(tmp_path: Path, staged: list[Request]) -> None:
    base = write_tiny_model(tmp_path / "model")
    loaded = load_base(base, BaseRecipe())
    assert len(staged) == len(open_base(base).parameters)
    file = SafetensorsFile(base / "model.safetensors")
    for path, linear in frozen_linears(loaded.model).items():
        assert linear.quantized is not None
        expected = quantize(file.read(path + ".weight"))
        assert_same_bits(linear.quantized.tensors(), expected.tensors())
    embedding = loaded.model.get_input_embeddings().weight
    assert embedding.equal(file.read("model.embed_tokens.weight"))


def test_packed_weights_come_whole_among_staged_ones(tmp_path: Path, staged: list[Request]) -> None:
    base = write_tiny_model(tmp_path / "model")
    packed = write_quantized(base, tmp_path / "packed", BaseRecipe())
    staged.clear()
    source = open_base(packed)
    kinds = [isinstance(value, QuantizedWeight) for _, value in source.tensors("cuda")]
    assert kinds == [parameter.packed for parameter in source.parameters]
    assert len(staged) == kinds.count(False) > 0


def test_a_load_that_fails_leaves_no_reader(tmp_path: Path, staged: list[Request]) -> None:
    base = write_tiny_model(tmp_path / "model")
    path = base / "model.safetensors"
    raw = bytearray(path.read_bytes())
    entry = SafetensorsFile(path).entries["model.layers.0.mlp.up_proj.weight"]
    raw[entry.start : entry.start + 4] = b"\xff" * 4
    path.write_bytes(raw)
    with pytest.raises(WeightError, match=entry.name):
        load_base(base, BaseRecipe())
    assert readers() == []


def test_a_load_asks_for_the_device_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = DirectorySource.tensors

    def tensors(self: DirectorySource, device: str) -> Any:
        asked.append(device)
        return original(self, device)

    monkeypatch.setattr(DirectorySource, "tensors", tensors)
    load_base(write_tiny_model(tmp_path / "model"), BaseRecipe(device="cpu:0"))
    assert asked == ["cpu:0"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("piece_bytes", [4096, 2**20])
def test_a_gpu_gets_the_same_behind_a_busy_stream(tmp_path: Path, piece_bytes: int) -> None:
    held = [random_tensor(torch.uint8, [1_000_003 * (i % 3) + i], i) for i in range(12)]
    requests = written(tmp_path / "x", held, [1] * 12)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    copies = []
    stream = read_to_device(requests, torch.device("cuda"), piece_bytes=piece_bytes, ring=3)
    for tensor in stream:
        assert tensor.is_cuda
        torch.cuda._sleep(3_000_000)  # copies wait here; their buffers must not be refilled
        copies.append(tensor.clone())  # on the device: the host does not wait
        del tensor
    kept = sum(copy.nbytes for copy in copies)
    assert torch.cuda.max_memory_allocated() - before < kept + 2.5 * 2_000_017
    for copy, expected in zip(copies, held, strict=True):
        assert copy.cpu().equal(expected)
