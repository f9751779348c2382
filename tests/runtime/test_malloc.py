"""Tensors lie on the heap as torch would have them, and fill the holes that others leave."""

import subprocess
import sys

import pytest
import torch

from halfbyte.engine.memory_policy import used_memory
from halfbyte.runtime import malloc
from halfbyte.runtime.malloc import give_back, keep_freed_memory
from halfbyte.runtime.native import Unavailable
from tests.cli.test_main import with_source


def test_the_allocator_is_told():
    assert keep_freed_memory()


def test_a_hole_between_tensors_is_filled_by_one_of_its_size():
    """In a process of its own; torch's own allocator fills none.

    A tensor may begin up to 256 bytes beside the one that was there, and other holes of the heap
    may fit as well: 16 to 20 of 20 are filled, depending on where the system puts the heap.
    """
    program = """
import torch
from halfbyte.runtime.malloc import keep_freed_memory
keep_freed_memory()
rows = [(torch.ones(300_001), torch.ones(300_001)) for _ in range(20)]
kept, holes = [a for a, _ in rows], {b.data_ptr() for _, b in rows}
del rows
again = [torch.ones(300_001) for _ in range(20)]
filled = [any(abs(t.data_ptr() - hole) <= 256 for hole in holes) for t in again]
assert sum(filled) >= 12, sum(filled)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=with_source())


def test_tensors_are_as_torch_would_have_them():
    keep_freed_memory()
    sizes = [*range(65_400, 65_700, 7), *range(1_000_000, 1_000_500, 11), 1, 0]
    made = [torch.full((n,), i % 100, dtype=torch.uint8) for i, n in enumerate(sizes)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in made)
    assert all(bool((tensor == i % 100).all()) for i, tensor in enumerate(made))
    grown = made[0].clone().resize_(200_000)
    assert torch.equal(grown[: len(made[0])], made[0])
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_without_a_compiler_it_is_said(monkeypatch, caplog):
    def none(*_):
        raise Unavailable("there is no C++ compiler")

    monkeypatch.setattr(malloc, "shared_object", none)
    malloc._fill_holes.__wrapped__()
    assert "more memory, because there is no C++ compiler" in caplog.text


def test_holes_are_given_back():
    keep_freed_memory()
    tensors = [torch.ones(1_000_000) for _ in range(20)]
    del tensors[::2]
    before = used_memory("cpu")
    give_back()
    assert before - used_memory("cpu") > 30_000_000
