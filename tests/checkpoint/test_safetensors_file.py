"""Safetensors: what the safetensors package writes we read, and the other way; lies are found."""

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint.safetensors_file import (
    DTYPES,
    INDEX_NAME,
    Planned,
    SafetensorsFile,
    write_model,
    write_safetensors,
)
from halfbyte.errors import CheckpointError

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any bits at all, NaN included."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape)


tensors = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        random_tensor,
        st.sampled_from(sorted(DTYPES.values(), key=str)),
        st.lists(st.integers(0, 5), max_size=3),
        st.integers(0, 99),
    ),
    max_size=6,
)


def written(held: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, held, {"kind": "test"})
    return file.getvalue()


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert (
            tensor.reshape(-1).view(torch.uint8).equal(other[name].reshape(-1).view(torch.uint8))
        ), name


def read_all(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.entries}


@quick
@given(tensors)
def test_written_by_us_read_by_both(tmp_path: Path, held: dict[str, Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(written(held))
    assert_same_bits(held, read_all(path))
    assert_same_bits(held, safetensors.torch.load_file(path))
    assert SafetensorsFile(path).metadata == {"kind": "test"}


@quick
@given(tensors)
def test_written_by_the_package_read_by_us(tmp_path: Path, held: dict[str, Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save(held, {"kind": "test"}))
    assert_same_bits(held, read_all(path))
    assert SafetensorsFile(path).metadata == {"kind": "test"}


def test_numbers_lie_at_multiples_of_their_width() -> None:
    held = {"odd": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(5).bfloat16()}
    held |= {"wide": torch.zeros(1, dtype=torch.float64), "f": torch.zeros(3)}
    raw = written(held)
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    for name, tensor in held.items():
        assert (8 + length + fields[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_parts_of_larger_tensors_are_written_alone(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "x.safetensors"
    path.write_bytes(written({"column": whole[:, 1], "turned": whole.t()}))
    assert_same_bits(
        {"column": whole[:, 1].clone(), "turned": whole.t().contiguous()}, read_all(path)
    )


@quick
@given(tensors, st.data())
def test_damage_is_an_error_or_changes_only_values(
    tmp_path: Path, held: dict[str, Tensor], data: st.DataObject
) -> None:
    raw = bytearray(written(held))
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["flip", "cut", "grow"])):
            case "flip":
                # Mostly in the header: damage among the numbers is not there to be found.
                at = data.draw(st.integers(0, min(len(raw) - 1, 200)))
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[data.draw(st.integers(8, len(raw))) :]
            case _:
                raw += bytes(data.draw(st.integers(1, 9)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        read = read_all(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert sum(tensor.nbytes for tensor in read.values()) <= len(raw)


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]},
    }
    change(fields)
    header = json.dumps(fields).encode()
    return len(header).to_bytes(8, "little") + header + bytes(20)


lies: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "too long": (lambda f: f["b"].update(shape=[5], data_offsets=[16, 21]), "in a file of"),
    "wrong shape": (lambda f: f["a"].update(shape=[2, 3]), "24 bytes, and its offsets"),
    "overlap": (lambda f: f["b"].update(data_offsets=[12, 16]), "b should start at byte"),
    "hole": (lambda f: f["b"].update(data_offsets=[17, 20], shape=[3]), "b should start at"),
    "missing": (lambda f: f.pop("b"), "its tensors end at byte"),
    "huge": (lambda f: f["a"].update(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "no weight"),
    "negative": (lambda f: f["a"].update(shape=[-2, -2]), "has an invalid size"),
    "fraction": (lambda f: f["a"].update(shape=[2.0, 2]), "has an invalid size"),
    "truth": (lambda f: f["b"].update(shape=[True, 4]), "has an invalid size"),
    "dtype": (lambda f: f["b"].update(dtype="F8_E5M2"), "supported are F64, F32"),
    "no shape": (lambda f: f["b"].pop("shape"), "lacks dtype, shape or offsets"),
    "no object": (lambda f: f.update(b=7), "lacks dtype, shape or offsets"),
    "metadata": (lambda f: f.update(__metadata__=7), "__metadata__"),
}


@pytest.mark.parametrize("lie", lies)
def test_lies_of_the_header_are_found(tmp_path: Path, lie: str) -> None:
    change, message = lies[lie]
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged(lambda fields: None))
    assert len(read_all(path)) == 2
    path.write_bytes(damaged(change))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\x02\0\0", "it has 3 bytes"),
        ((2**62).to_bytes(8, "little"), "its header should take 4611686018427387904 bytes"),
        (b"\x02" + bytes(7) + b"[]", "not a JSON object"),
        (b"\x02" + bytes(7) + b"\xff\xff", "not JSON"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "not JSON"),
        ((18).to_bytes(8, "little") + b'{"a": {}, "a": {}}', "occurs twice"),
    ],
)
def test_what_is_no_header_is_told(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


def test_nothing_is_allocated_on_a_header_s_word(tmp_path: Path) -> None:
    claim = {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged(lambda fields: fields.update(a=claim)))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_file_cut_after_it_was_opened_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(written({"a": torch.zeros(1000)}))
    file = SafetensorsFile(path)
    with open(path, "r+b") as handle:
        handle.truncate(file.size - 100)
    with pytest.raises(CheckpointError, match=r"x.safetensors ends at byte .*, 100 bytes early"):
        file.read("a")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*x.safetensors: No such file"):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shard_bytes", [1, 100, 10_000])
def test_a_model_in_shards_is_the_model(tmp_path: Path, shard_bytes: int) -> None:
    held = {f"w{i}": random_tensor(torch.float32, [i, 7], i) for i in range(1, 6)}
    held["state"] = torch.arange(5, dtype=torch.uint8)
    plan = [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()]
    plan[-1] = Planned("state", torch.uint8, (90,), flexible=True)
    write_model(tmp_path, plan, held.items(), shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    read: dict[str, Tensor] = {}
    for file in files:
        read |= safetensors.torch.load_file(file)
    assert_same_bits(held, {name: read[name] for name in held})
    if shard_bytes == 10_000:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / INDEX_NAME).exists()
        return
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    for name, file_name in index["weight_map"].items():
        assert name in SafetensorsFile(tmp_path / file_name).entries
    for file in files:
        entries = SafetensorsFile(file).entries
        assert len(entries) == 1 or sum(e.nbytes for e in entries.values()) <= shard_bytes


def test_a_flexible_tensor_keeps_headers_and_numbers_in_place(tmp_path: Path) -> None:
    plan = [
        Planned("short", torch.uint8, (1000,), flexible=True),
        Planned("numbers", torch.float32, (3,)),
        Planned("long", torch.uint8, (1000,), flexible=True),
    ]
    held = {
        "short": torch.arange(3, dtype=torch.uint8),
        "numbers": torch.tensor([1.0, 2.0, 3.0]),
        "long": torch.full((1000,), 7, dtype=torch.uint8),
    }
    write_model(tmp_path, plan, held.items())
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert_same_bits(held, {name: read[name] for name in held})


@pytest.mark.parametrize(
    "came",
    [
        [("a", torch.zeros(3))],
        [("b", torch.zeros(2))],
        [("a", torch.zeros(2).half())],
    ],
)
def test_what_was_not_planned_is_refused(tmp_path: Path, came: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="planned was"):
        write_model(tmp_path, [Planned("a", torch.float32, (2,))], came)
